"""Generation: strategies agree, rows are independent, the cache costs what it should, and the model is given back."""

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attention import CausalSelfAttention, CrossAttention
from generate import advance, generate, loop, strategies, stream
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import NonFiniteError, UserError
from test_model import random_sizes, rough


def random_model(seed, kind):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = random_sizes(rng) | {"block_size": rng.randint(8, 24)}
    if kind == "gpt":
        model = GPT(GPTConfig(n_layer=rng.randint(1, 2), eos_id=1, **sizes))
    else:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=rng.randint(1, 2), **sizes | {"vocab_size": rng.randint(5, 30)}))
    model = rough(model)
    # logits of one scale with the model's own noise: without it a tiny random model repeats one token for ever
    for name, p in model.named_parameters():
        if name in ("wpe.weight", "decoder_wpe.weight"):
            torch.nn.init.normal_(p, std=2.0)
    B = rng.randint(1, 4)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, 6))] for _ in range(B)]
    return model, prompts, rng.randint(1, model.config.block_size - 6)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
@pytest.mark.parametrize("block", range(5))
def test_every_strategy_and_every_batch_gives_the_same_tokens_in_fp64(kind, block):
    for seed in range(8 * block, 8 * block + 8):
        model, prompts, M = random_model(seed, kind)
        rows = generate(model, prompts, M)
        for strategy in strategies(model):
            assert generate(model, prompts, M, strategy=strategy) == rows, (seed, strategy)
        assert [generate(model, [prompt], M)[0] for prompt in prompts] == rows, seed
        for row in rows:  # up to and including the end, nothing after it
            assert len(row) == M or row[-1] == model.config.eos_id
            assert model.config.eos_id not in row[:-1]


def test_these_texts_are_not_one_repeated_token():
    texts = [row for seed in range(40) for row in generate(*random_model(seed, "gpt"), ignore_eos=True)]
    texts = [row for row in texts if len(row) > 4]
    assert sum(len(set(row)) > 2 for row in texts) > len(texts) / 2


def test_rows_end_on_their_own_and_leave_the_others_alone():
    ends = set()
    for seed in range(60):
        model, prompts, M = random_model(seed, "gpt")
        full, short = generate(model, prompts, M, ignore_eos=True), generate(model, prompts, M)
        for whole, row in zip(full, short):
            cut = whole.index(1) + 1 if 1 in whole else M
            assert row == whole[:cut]
            ends.add("first" if cut == 1 else "middle" if cut < M else "never")
    assert ends == {"first", "middle", "never"}


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_any_of_several_ids_ends_a_row(kind):
    differ = 0
    for seed in range(40):
        model, prompts, M = random_model(seed, kind)
        full = generate(model, prompts, M, ignore_eos=True)
        model.config.eos_id = ends = [full[0][-1], full[-1][M // 2]]
        cuts = [next((n + 1 for n, i in enumerate(row) if i in ends), M) for row in full]
        expected = [row[:cut] for row, cut in zip(full, cuts)]
        for strategy in strategies(model):
            assert generate(model, prompts, M, strategy=strategy) == expected
        differ += len(set(cuts)) > 1
    assert differ > 5  # rows leave the batch at different steps


@pytest.mark.parametrize("strategy", ["naive", "hoisted", "cached"])
def test_rows_that_have_ended_cost_nothing_more(strategy):
    for seed in range(100):  # until one is found whose rows end at different steps
        model, sources, M = random_model(seed, "bart")
        full = generate(model, sources, M, ignore_eos=True)
        model.config.eos_id = [full[0][M // 2], full[-1][0]]
        if len({len(row) for row in generate(model, sources, M)}) > 2:
            break
    entered, read = [], []
    model.decoder[0].register_forward_pre_hook(lambda layer, args: entered.append(len(args[0])))
    model.encoder[0].register_forward_pre_hook(lambda layer, args: read.append(len(args[0])))
    new = generate(model, sources, M, strategy=strategy)
    alive = [sum(len(row) > k for row in new) for k in range(max(map(len, new)))]
    assert entered == alive and len(set(alive)) > 1
    assert read == (alive if strategy == "naive" else [len(sources)])


def test_a_step_may_find_several_ids_and_the_end_is_asked_for_after_each():
    asked = []

    def step(rows, which):
        return [[10 * r + len(rows[n]) + i for i in range(3)] for n, r in enumerate(which)]

    def ended(r, row):
        asked.append((r, row[-1]))
        return r == 1 and row[-1] == 15

    found = list(loop(step, [[7], [7, 7], []], [6, 7, 5], ended))
    assert found == [[[1, 2, 3], [12, 13, 14], [20, 21, 22]], [[4, 5], [15], [23, 24]]]
    assert (1, 15) in asked and (1, 16) not in asked


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_any_number_of_threads_on_one_model_give_each_its_own_tokens(kind):
    """Ragged batches, in train mode with dropout 0.5, while another thread trains a step beside them."""
    model, _, M = random_model(11, kind)
    rng = random.Random(0)
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.5
    batches = [[[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, 6))] for _ in range(3)] for _ in range(4)]
    alone = [generate(model, prompts, M, ignore_eos=True) for prompts in batches]
    model.train()
    start = threading.Barrier(5, timeout=60)

    def work(prompts, expected):
        start.wait()
        return [generate(model, prompts, M, ignore_eos=True) == expected for _ in range(20)]

    def train():
        start.wait()
        ids, drawn = torch.zeros(2, 4, dtype=torch.long), []
        for _ in range(20):
            logits = [model(ids) if kind == "gpt" else model(ids, ids) for _ in range(2)]
            torch.autograd.grad(logits[0].sum(), model.lm_head.weight)
            drawn.append(not torch.equal(*logits))
        return drawn  # there is dropout where gradients are recorded

    with ThreadPoolExecutor(5) as pool:
        done = [pool.submit(work, *pair) for pair in zip(batches, alone)] + [pool.submit(train)]
        assert [future.result(timeout=60) for future in done] == [[True] * 20] * 5
    assert all(module.training for module in model.modules())


def test_advance_lets_enter_what_is_not_stored_and_refuses_a_row_without_anything_new():
    model = random_model(3, "gpt")[0]
    rows, cache = [[1, 2, 3, 0], [2, 0]], model.new_cache(2, 7)
    whole = [model(torch.tensor([row]))[0] for row in rows]
    assert (advance(model, rows) - torch.stack([logits[-1:] for logits in whole])).abs().max() < 1e-10  # without a cache
    advance(model, [[1], [2]], cache)
    entered = []
    model.h[0].register_forward_pre_hook(lambda layer, args: entered.append(args[0].shape[:2]))
    logits = advance(model, rows, cache)
    assert entered == [(2, 3)] and cache.filled == [4, 2]
    assert max((logits[r, 0] - whole[r][-1]).abs().max() for r in (0, 1)) < 1e-10
    for given, last, new in (([rows[0] + [1], rows[1]], 1, "[1, 0]"), ([rows[0] + [1]], 1, "[1]"), (rows, 0, "[0, 0]"),
                             ([], 1, "[]"), ([rows[0] + [1], rows[1] + [1]], 2, "[1, 1]")):
        with pytest.raises(ValueError, match=rf"{last} new ids of every row .*2 rows {re.escape(new)}"):
            advance(model, given, cache, last=last)
    with pytest.raises(ValueError, match="overflow"):
        advance(model, [rows[0] + [1] * 4, rows[1] + [1]], cache)
    assert cache.filled == [4, 2]


@pytest.mark.parametrize("seed", range(10))
def test_a_decoder_prompt_is_continued(seed):
    model, sources, M = random_model(seed, "bart")
    M = max(M, 4)
    whole = generate(model, sources, M, ignore_eos=True)
    starts = [row[: n % 4] for n, row in enumerate(whole)]  # ragged, one of them empty
    for strategy in strategies(model):
        rest = generate(model, sources, M - 3, decoder_prompts=starts, ignore_eos=True, strategy=strategy)
        for row, start, new in zip(whole, starts, rest):
            assert new == row[len(start) : len(start) + M - 3]


# -----------------------------------------------------------------------------
# what a step costs


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4], [5, 6]]], ids=["one row", "ragged"])
@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_after_prefill_one_position_per_row_enters_and_the_source_is_projected_once(kind, prompts):
    model = random_model(3, kind)[0]
    B, entered, projected, sizes, heads = len(prompts), [], [], set(), []

    def kept(module, args):
        q, k, v, query_pos, key_pos = args
        sizes.add(tuple(x.untyped_storage().nbytes() for x in (k, v)))

    model.decoder_layers()[0].register_forward_pre_hook(lambda layer, args: entered.append(args[0].shape[:2]))
    model.lm_head.register_forward_pre_hook(lambda layer, args: heads.append(args[0].shape[:-1].numel()))
    for layer in model.modules():
        if isinstance(layer, CrossAttention):
            layer.c_kv.register_forward_hook(lambda *_: projected.append(1))
        if isinstance(layer, CausalSelfAttention):  # what attention reads lies in the buffers of the cache
            layer.pattern.register_forward_pre_hook(kept)
    prompts = [[i % model.config.vocab_size for i in prompt] for prompt in prompts]
    generate(model, prompts, 5, ignore_eos=True)
    P = 1 if kind == "bart" else max(map(len, prompts))
    assert entered == [(B, P)] + [(B, 1)] * 4
    assert heads == [B] * 5  # only the positions whose logits are asked for pass through the head
    assert len(projected) == (model.config.n_decoder_layer if kind == "bart" else 0)
    config = model.config
    assert sizes == {(B * config.kv_width * (P + 5) * 8,) * 2}


# -----------------------------------------------------------------------------
# the model is given back as it was found


@pytest.mark.parametrize("kind", ["gpt", "bart"])
@pytest.mark.parametrize("strategy", ["naive", "cached"])
def test_generation_leaves_the_model_as_it_found_it(kind, strategy):
    model, prompts, M = random_model(5, kind)
    reference = generate(model, prompts, M)
    model.train()
    model.decoder_layers()[0].mlp.eval()  # a mixture is kept as well
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    modes = [m.training for m in model.modules()]
    caches = {m: object() for m in model.modules() if hasattr(m, "cache")}
    assert len(caches) == 1 + len(model.decoder_layers())
    for m, cache in caches.items():
        m.cache = cache
    rng, keys = torch.get_rng_state(), list(model.state_dict())
    assert generate(model, prompts, M, strategy=strategy) == reference  # no dropout
    model.lm_head.register_forward_hook(explode := Explode(at=2))
    with pytest.raises(RuntimeError, match="exploded"):
        generate(model, prompts, 3, strategy=strategy, ignore_eos=True)
    explode.at = None
    assert [m.training for m in model.modules()] == modes
    assert all(m.cache is cache for m, cache in caches.items())
    assert torch.equal(torch.get_rng_state(), rng) and list(model.state_dict()) == keys
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    assert generate(model, prompts, M, strategy=strategy) == reference


class Explode:
    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("exploded")


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_two_generations_on_one_model_do_not_mix(kind):
    model, prompts, M = random_model(7, kind)
    other = [[(i + 1) % model.config.vocab_size for i in prompt] + [0] for prompt in prompts[::-1]]
    alone = [generate(model, texts, M, ignore_eos=True) for texts in (prompts, other)]
    together = [stream(model, texts, M, ignore_eos=True) for texts in (prompts, other)]
    steps = []
    for pair in zip(*together):
        steps.append(pair)
        model(*[torch.tensor([[0, 1]])] * (1 if kind == "gpt" else 2))  # and somebody evaluates in between
    for n in (0, 1):
        assert [sum(row, []) for row in zip(*(step[n] for step in steps))] == alone[n]


def test_generations_in_a_row_do_not_see_each_other():
    model, prompts, M = random_model(9, "bart")
    other = [[(i + 2) % model.config.vocab_size for i in prompt] for prompt in prompts]
    first = generate(model, prompts, M)
    generate(model, other, M)
    assert generate(model, prompts, M) == first


# -----------------------------------------------------------------------------
# what is refused


def test_a_request_that_does_not_fit_is_refused_alike_with_and_without_cache_before_anything_runs():
    for kind in ("gpt", "bart"):
        model = random_model(1, kind)[0]
        block = model.config.block_size
        texts = [[0, 1], [0] * 5] if kind == "gpt" else [[0, 1]]
        longest = 5 if kind == "gpt" else 1
        model.decoder_layers()[0].register_forward_pre_hook(Explode(at=1))
        for strategy in strategies(model):
            with pytest.raises(ValueError, match=f"max_new_tokens={block - longest + 1} .*block_size={block}"):
                stream(model, texts, block - longest + 1, strategy=strategy)  # refused by the call, not its first step
            with pytest.raises(RuntimeError, match="exploded"):  # one fewer fits, and starts
                model.decoder_layers()[0]._forward_pre_hooks.clear()
                model.decoder_layers()[0].register_forward_pre_hook(Explode(at=1))
                generate(model, texts, block - longest, strategy=strategy)


def test_a_block_is_filled_to_its_last_position():
    for kind in ("gpt", "bart"):
        model = random_model(1, kind)[0]
        M = model.config.block_size - 1
        rows = [generate(model, [[0]], M, strategy=strategy, ignore_eos=True)[0] for strategy in strategies(model)]
        assert len(rows[0]) == M and all(row == rows[0] for row in rows)


@pytest.mark.parametrize("arguments, words", [
    (dict(prompts=[[]]), "prompt 0 is empty"), (dict(prompts=[[0], [13]]), "prompt 1 13 12"),
    (dict(prompts=[[-1]]), "-1"), (dict(prompts=[[0.5]]), "0.5"), (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(max_new_tokens=-5), "max_new_tokens=-5"), (dict(strategy="hoisted"), "'hoisted' naive, cached"),
    (dict(decoder_prompts=[[1]]), "encoder-decoder"), (dict(temperature=-1), "temperature=-1"),
    (dict(temperature=float("nan")), "temperature=nan"), (dict(top_k=0), "top_k=0"), (dict(top_p=1.5), "top_p=1.5"),
    (dict(top_k=2.5), "top_k=2.5"), (dict(top_k=True), "top_k=True"), (dict(top_k=2**64), "less than 2**63"),
    (dict(seed=1.5), "seed=1.5"), (dict(seed="1"), "seed='1'"), (dict(seed=2**64), "less than 2**63"),
    (dict(no_repeat_ngram=1.5), "no_repeat_ngram=1.5"), (dict(min_length=1.5), "min_length=1.5"),
    (dict(min_length=None), "min_length=None"), (dict(temperature=None), "temperature=None 0 (greedy)"),
    (dict(temperature="1"), "temperature='1'"), (dict(top_p="1"), "top_p='1'"), (dict(min_p=[1]), "min_p=[1]"),
    (dict(max_new_tokens=2.5), "max_new_tokens=2.5"), (dict(max_new_tokens=True), "max_new_tokens=True"),
    (dict(prompts=[1, 2]), "prompt 0 is 1 a list of ids"), (dict(prompts=torch.tensor([1])), "tensor(1) tolist()"),
    (dict(prompts=torch.tensor([[1]])), "tensor([1]) tolist()"), (dict(prompts=["the"]), "'the' a list of ids"),
    (dict(prompts=[[True]]), "True"), (dict(forced_last=1.5), "1.5")])
def test_bad_requests_are_refused_with_the_value_and_the_limit(arguments, words):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=13, block_size=10))
    with pytest.raises(UserError) as error:
        generate(model, **(dict(prompts=[[1]], max_new_tokens=2) | arguments))
    assert all(word in str(error.value) for word in words.split())


def test_bad_requests_to_an_encoder_decoder_are_refused():
    model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=1, n_head=1, n_embd=4, vocab_size=13, block_size=10))
    for arguments in (dict(decoder_prompts=[]), dict(decoder_prompts=[[1], [2]]), dict(decoder_prompts=[[13]]),
                      dict(decoder_prompts=[1])):
        with pytest.raises(UserError, match="decoder prompt"):
            generate(model, [[1]], 2, **arguments)
    with pytest.raises(UserError, match="source of 11 tokens .*block_size=10"):
        generate(model, [[1] * 11], 2)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_prompts_may_come_from_a_generator_and_the_model_may_be_compiled(kind):
    model, prompts, M = random_model(3, kind)
    for strategy in strategies(model):
        rows = generate(model, prompts, M, strategy=strategy)
        assert generate(model, (tuple(prompt) for prompt in prompts), M, strategy=strategy) == rows
        assert generate(torch.compile(model, backend="eager"), prompts, M, strategy=strategy) == rows


def test_no_prompts_give_no_texts():
    assert generate(random_model(0, "gpt")[0], [], 3) == [] == generate(random_model(0, "bart")[0], [], 3)


def test_ids_beyond_the_vocabulary_that_may_be_chosen():
    """A model's vocabulary may be padded: n_vocab ids are real. Ends and prompts may lie behind, forced ids may not."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=13, block_size=10, eos_id=12))
    assert len(generate(model, [[12, 2]], 5, n_vocab=10, min_length=5, no_repeat_ngram=1)[0]) == 5
    with pytest.raises(UserError, match="id 12: ids are integers from 0 to 9"):
        stream(model, [[1, 2]], 2, n_vocab=10, forced_last=12)


def test_a_misspelt_choice_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        generate(random_model(0, "gpt")[0], [[1]], 1, temprature=1.0)


def test_logits_that_are_no_numbers_stop_the_generation():
    model = random_model(0, "gpt")[0]
    model.ln_f.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError):
        generate(model, [[1]], 1)
