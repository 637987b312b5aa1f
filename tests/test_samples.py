"""
Several texts from one prompt, and texts longer than block_size: whatever is shared or computed again, the logits are
those of rows that were each decoded alone, and of one uncached pass over what a text's window shows.

MINDECODE_CASES=200 for a long run.
"""

import json
import os
import random

import pytest
import torch

import generate as program
import sampling
from attention import CrossAttention
from conftest import call
from cost import count, predict
from generate import generate, strategies, stream, windows
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import UserError
from test_generate import random_model
from test_model import random_sizes, rough
from test_schedules import random_pattern

CASES = range(int(os.environ.get("MINDECODE_CASES", 12)))


@pytest.fixture
def told(monkeypatch):
    """A function: what generate() returns for these arguments, and {(row, length): logits} that it chose from."""
    def run(*args, **options):
        seen, original = {}, sampling.Chooser.__call__

        def choose(self, logits, rows, which):
            seen.update({(r, len(row)): own.clone() for r, row, own in zip(which, rows, logits)})
            return original(self, logits, rows, which)

        with monkeypatch.context() as patch:
            patch.setattr(sampling.Chooser, "__call__", choose)
            return generate(*args, **options), seen
    return run


def apart(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


# -----------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_samples_of_one_prefill_are_those_of_separate_rows(kind, told):
    """Ragged prompts, rows that end at different steps: logits and texts are those of rows with their own prompts."""
    ended = shared = 0
    for seed in CASES:
        model, prompts, M = random_model(100 + seed, kind)
        rng, n = random.Random(seed), 2 + seed % 3
        options = dict(temperature=rng.choice([0.7, 1.5]), seed=seed, top_k=rng.choice([None, 5]))
        model.config.eos_id = [rng.randrange(model.config.vocab_size) for _ in range(2)]
        texts, logits = told(model, [p for p in prompts for _ in range(n)], M, strategy="naive", **options)
        for strategy in strategies(model):
            ours, seen = told(model, prompts, M, strategy=strategy, num_samples=n, **options)
            assert apart(seen, logits) <= 1e-10 and ours == texts, (seed, strategy)
        ended += len(set(map(len, texts))) > 1
        shared += any(texts[i] != texts[i + 1] for i in range(0, len(texts), n))
    assert min(ended, shared) >= 0.4 * len(CASES)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_the_prompts_enter_once_and_not_once_for_each_sample(kind):
    B, n, N, M = 2, 3, 4, 5
    model = random_model(3, kind)[0]
    bart, V = kind == "bart", model.config.vocab_size
    prompts, P = [[1 % V] * N, [2 % V] * N], 1 if bart else N
    for strategy in strategies(model):
        with count(model) as cost:
            generate(model, prompts, M, strategy=strategy, num_samples=n, temperature=1.0, ignore_eos=True)
        apart = predict(model.config, strategy, N, M, n * B, itemsize=8)  # n * B rows, each with a prompt of its own
        saved = (n - 1) * B * (P if strategy == "cached" else 0)
        assert cost.decoder_tokens == apart["decoder_tokens"] - saved
        assert cost.encoder_tokens == (apart["encoder_tokens"] // (1 if strategy == "naive" else n))
        if strategy == "cached":
            assert list(cost.decoder.values()) == [B * P] + [B * n] * (M - 1)
            assert cost.cache_bytes("self") == apart["self_cache_bytes"]
            assert cost.cache_bytes("cross") * n == apart["cross_cache_bytes"]  # neighbours ask one memory
            assert all(rows == B * N for name, rows in cost.linear_rows.items() if name.endswith("c_kv"))


def test_samples_ask_one_memory_as_long_as_every_source_has_as_many():
    """Sources asked by 3 rows each; after one row of the second has ended each row has a memory of its own."""
    model = random_model(3, "bart")[0]
    sizes = []
    for module in model.modules():
        if isinstance(module, CrossAttention):
            module.pattern.register_forward_pre_hook(lambda _, args: sizes.append(len(args[1])))
    gone = {1: [], 2: [4], 3: [3, 5], 4: [0, 1]}  # the step after which rows leave

    def choose(logits, rows, which):
        return [[0]] * len(which)

    step, alive = program.cached(model, [[1], [2]], 2, 9, choose), list(range(6))
    for k in range(1, 6):
        sizes.clear()
        step([[2] * k for _ in alive], alive)
        assert set(sizes) == {{1: 2, 2: 2, 3: 5, 4: 1, 5: 1}[k]}, k
        alive = [r for r in alive if r not in gone.get(k, [])]


def test_a_sample_draws_what_its_number_draws_alone():
    model, prompts, M = random_model(5, "gpt")
    whole = generate(model, prompts[:1], M, num_samples=4, temperature=1.0, seed=7, ignore_eos=True)
    assert len({tuple(row) for row in whole}) == 4
    few = generate(model, prompts[:1], M, num_samples=2, temperature=1.0, seed=7, ignore_eos=True)
    assert few == whole[:2]


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "2", 2**40, None])
def test_a_number_of_samples_that_makes_no_sense_is_refused(bad):
    with pytest.raises(UserError, match=f"num_samples={bad!r} .*at least 1"):
        stream(random_model(0, "gpt")[0], [[1]], 1, num_samples=bad)


# -----------------------------------------------------------------------------
# Longer than block_size


def shown(text, written, size):
    """What a window shows of a text that begins with `text` and grew by `written`, followed token by token."""
    seen = list(text)
    for i in [None, *written]:
        seen += [] if i is None else [i]
        while len(seen) > size:
            seen = seen[max(1, size // 2) :]
    return seen


def test_a_window_forgets_half_a_block_whenever_the_text_is_full():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=30, block_size=6))
    starts = [windows(model, [list(range(n))])[0][0] for n in range(1, 16)]
    assert starts == [0] * 6 + [3, 3, 3, 6, 6, 6, 9, 9, 9]
    for size in (1, 2, 3, 7, 8):
        model.config.block_size = size
        for begun in (1, size, 3 * size + 1):
            for n in range(20):
                text = list(range(begun + n))
                assert windows(model, [text]) == [shown(text[:begun], text[begun:], size)]


def slide_case(seed, kind):
    """A random model of few positions, rows that are ragged and may be longer, and how many tokens more."""
    rng = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    sizes = random_sizes(rng) | dict(block_size=rng.randint(1, 9), vocab_size=rng.randint(6, 30))
    if sizes["block_size"] > 2 and rng.random() < 0.4:
        sizes["pattern"] = random_pattern(rng, sizes)
    ends = [rng.randrange(sizes["vocab_size"]) for _ in range(rng.choice([1, 2]))]
    model = rough(GPT(GPTConfig(n_layer=2, eos_id=ends, **sizes)) if kind == "gpt" else
                  BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=2, **sizes | {"eos_id": ends})))
    size, ids = sizes["block_size"], lambda n: [rng.randrange(sizes["vocab_size"]) for _ in range(n)]
    B = rng.randint(1, 3)
    texts = [ids(rng.randint(1, 3 * size)) for _ in range(B)]
    sources = [ids(rng.randint(1, size)) for _ in range(B)]
    return model, sources if kind == "bart" else texts, texts if kind == "bart" else None, rng.randint(1, 4 * size)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_texts_that_slide_have_the_logits_of_an_uncached_pass_over_their_window(kind, told):
    moved = 0
    for seed in CASES:
        model, prompts, starts, M = slide_case(seed, kind)
        n, size = 1 + seed % 3, model.config.block_size
        options = dict(temperature=1.0, seed=seed, num_samples=n, overflow="slide", decoder_prompts=starts)
        texts, logits = told(model, prompts, M, strategy="naive", **options)
        for strategy in strategies(model):
            ours, seen = told(model, prompts, M, strategy=strategy, **options)
            assert apart(seen, logits) <= 1e-10 and ours == texts, (seed, strategy)
        for r, new in enumerate(texts):
            begun = prompts[r // n] if starts is None else [model.config.start_id, *starts[r // n]]
            for k in range(len(new)):
                text = torch.tensor([shown(begun, new[:k], size)])
                with torch.no_grad():
                    true = model(text) if starts is None else model(torch.tensor([prompts[r // n]]), text)
                assert (logits[r, len(begun) + k] - true[0, -1]).abs().max() <= 1e-10
            moved += len(begun) + len(new) - 1 > size
    assert moved > len(CASES)


@pytest.mark.parametrize("lengths", [[5], [5, 5], [5, 3, 9]], ids=["alone", "alike", "ragged"])
@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_text_that_slides_is_computed_again_once_in_half_a_block(lengths, kind):
    """Half a block less one token enters again at every move, and nothing of the other rows does."""
    torch.manual_seed(0)
    sizes = dict(n_head=1, n_embd=4, vocab_size=13, block_size=6)
    texts, M, size, half = [[3] * n for n in lengths], 20, 6, 3
    if kind == "gpt":
        model, given = GPT(GPTConfig(n_layer=1, **sizes)), dict(prompts=texts)
    else:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=1, **sizes))
        given = dict(prompts=[[3]] * len(texts), decoder_prompts=[text[1:] for text in texts])
    with count(model) as cost:
        new = generate(model, max_new_tokens=M, overflow="slide", ignore_eos=True, **given)
    assert [len(row) for row in new] == [M] * len(texts)
    first = [len(shown(text, [], size)) for text in texts]
    moves = [sum(len(shown([3] * (n + k), [], size)) <= len(shown([3] * (n + k - 1), [], size)) for k in range(1, M))
             for n in lengths]
    assert min(moves) >= (M - 1) // half - 1
    assert cost.decoder_tokens == len(texts) * (max(first) + M - 1) + sum(moves) * (size - half)
    assert cost.cache_bytes("self") == len(texts) * 2 * size * 4 * 4  # a block of each row, fp32
    assert cost.encoder_tokens == (len(texts) if kind == "bart" else 0)


def test_rules_see_what_the_window_has_left_behind():
    torch.manual_seed(0)
    model = rough(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=30, block_size=4, eos_id=0)))
    for strategy in strategies(model):
        [row] = generate(model, [[5, 6]], 27, strategy=strategy, overflow="slide", no_repeat_ngram=1, min_length=29)
        assert len({5, 6, *row}) == 29 and 0 not in row


def test_a_cache_that_is_concatenated_slides_where_all_rows_move_together():
    from further.concat import concat
    model, prompts, _, M = slide_case(1, "gpt")
    model.config.block_size = 5
    options = dict(overflow="slide", ignore_eos=True, num_samples=2, temperature=1.0, seed=0)
    assert (generate(model, prompts[:1], M, strategy=concat, **options) == generate(model, prompts[:1], M, **options))


def test_by_default_what_does_not_fit_is_refused_and_another_word_always():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=30, block_size=4))
    with pytest.raises(UserError, match="block_size=4: .*slide"):
        stream(model, [[1]], 4)
    for bad in ("slid", None, True, ["slide"]):
        with pytest.raises(UserError, match="overflow=.* must be 'refuse' or 'slide'"):
            stream(model, [[1]], 2, overflow=bad)
    bart = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=1, n_head=1, n_embd=4, vocab_size=30, block_size=4))
    with pytest.raises(UserError, match="source of 5 tokens"):  # a source is read as a whole
        stream(bart, [[1] * 5], 2, overflow="slide")


def test_the_command_line_samples_and_slides(tiny_gpt, tiny_bart):
    for tiny, size in ((tiny_gpt, 64), (tiny_bart, 12)):
        line = ["--model", tiny.path, "--prompt", "abc", "--json", "--temperature", 1, "--seed", 3, "--ignore-eos",
                "--num-samples", 2, "--max-new-tokens", 150, "--device", "cpu"]
        refused = call(program.main, *line)
        assert refused.code == 2 and not refused.out and f"block_size={size}" in refused.err
        assert "--overflow slide" in refused.err
        outcome = call(program.main, *line, "--overflow", "slide", "--stats")
        ids = [json.loads(out)["ids"] for out in outcome.out.splitlines()]
        assert ids == generate(tiny.model, [tiny.tokenizer.encode("abc")], 150, temperature=1.0, seed=3, num_samples=2,
                               ignore_eos=True, overflow="slide", n_vocab=tiny.tokenizer.n_vocab)
        assert f"cache of {size} positions, {2 * 2 * 2 * size * 32 * 4:,} bytes" in outcome.err
    plain = call(program.main, "--model", tiny_gpt.path, "--prompt", "the cat", "--overflow", "slide", "--json")
    assert len(json.loads(plain.out)["ids"]) == 100  # the default, though 64 is a block


@pytest.mark.parametrize("flag", ["--overflow=slid", "--num-samples=0", "--num-samples=1025"])
def test_the_command_line_refuses_what_is_neither(flag, tiny_gpt):
    outcome = call(program.main, "--model", tiny_gpt.path, "--prompt", "abc", "--temperature", 1, flag)
    assert outcome.code == 2 and not outcome.out and flag.split("=")[1] in outcome.err and outcome.err.count("\n") == 1
