"""GPT and BART: however a text is cut into calls, the logits are those of one uncached pass."""

import copy
import pickle
import random

import pytest
import torch

from attention import CausalSelfAttention
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.models import count_parameters, preset_config

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def rough(model, dtype=torch.float64):
    """
    Large random weights, biases, positions and norms: with the usual initialisation a forgotten bias or a position
    that is off by one changes too little to be seen.
    """
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "ln" in name and name.endswith("weight") else 0.0, std=0.3)
    return model.to(dtype).eval()


def random_sizes(rng):
    n_head = rng.choice([1, 2, 3, 4])
    return dict(n_head=n_head, n_kv_head=rng.choice([None, *(n for n in (1, 2, 3, 4) if n_head % n == 0)]),
                n_embd=n_head * rng.choice([2, 4, 6, 8]), vocab_size=rng.randint(3, 30), block_size=rng.randint(2, 32),
                max_batch_size=4, tie_weights=rng.random() < 0.5)


@pytest.mark.parametrize("head_size", [1, 3, 5])
def test_heads_may_be_of_odd_size(head_size):
    torch.manual_seed(head_size)
    model = rough(GPT(GPTConfig(n_layer=2, n_head=3, n_embd=3 * head_size, vocab_size=13, block_size=9)))
    idx = torch.randint(13, (2, 9))
    assert worst([model(idx[:, :4], True), model(idx[:, 4:], True, 4)], model(idx)) <= 1e-10


def random_split(rng, T):
    """T as a sum of chunks: all ones, one chunk, or anything between."""
    kind = rng.random()
    if kind < 0.15:
        return [1] * T
    if kind < 0.3:
        return [T]
    split = []
    while sum(split) < T:
        split.append(rng.randint(1, T - sum(split)))
    return split


def worst(parts, whole):
    return (torch.cat(parts, 1) - whole).abs().max().item()


# 100 cases each: with the dtypes and the two models these are 400 random configurations
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", range(10))
def test_gpt_cached_equals_uncached_over_random_configurations_and_splits(block, dtype):
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        model = rough(GPT(GPTConfig(n_layer=rng.randint(1, 3), **random_sizes(rng))), dtype)
        B, T = rng.randint(1, 4), rng.randint(1, model.config.block_size)
        idx = torch.randint(model.config.vocab_size, (B, T))
        whole, parts, start = model(idx), [], 0
        as_tensor = rng.random() < 0.3
        for n in random_split(rng, T):
            pos = torch.full((B, 1), start) if as_tensor else start
            parts.append(model(idx[:, start : start + n], use_kv_cache=True, start_pos=pos))
            start += n
        assert worst(parts, whole) <= TOLERANCE[dtype], f"seed {seed}: {model.config}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block", range(10))
def test_bart_cached_equals_uncached_over_random_configurations_and_splits(block, dtype):
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        sizes = random_sizes(rng)
        model = rough(BART(BARTConfig(n_encoder_layer=rng.randint(1, 2), n_decoder_layer=rng.randint(1, 3),
                                      scale_embedding=rng.random() < 0.5, **sizes)), dtype)
        B, N, T = rng.randint(1, 4), rng.randint(1, sizes["block_size"]), rng.randint(1, sizes["block_size"])
        source, target = torch.randint(sizes["vocab_size"], (B, N)), torch.randint(sizes["vocab_size"], (B, T))
        lengths = torch.tensor([rng.randint(1, N) for _ in range(B)]) if rng.random() < 0.7 else None
        whole, memory, parts, start = model(source, target, lengths), model.encode(source, lengths), [], 0
        for n in random_split(rng, T):
            given = memory if start == 0 or rng.random() < 0.5 else None
            parts.append(model.decode(target[:, start : start + n], given, lengths, use_kv_cache=True, start_pos=start))
            start += n
        assert worst(parts, whole) <= TOLERANCE[dtype], f"seed {seed}: {model.config}"
        for row in range(B):  # and every row is what it is alone, without the padding of its source
            N = N if lengths is None else lengths[row]
            solo = model(source[row : row + 1, :N], target[row : row + 1])
            assert (solo - whole[row]).abs().max() <= TOLERANCE[dtype], f"seed {seed}, row {row}"


@pytest.fixture
def gpt():
    torch.manual_seed(1)
    return rough(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=13, block_size=10)))


@pytest.fixture
def bart():
    torch.manual_seed(1)
    return rough(BART(BARTConfig(n_encoder_layer=2, n_decoder_layer=2, n_head=2, n_embd=16, vocab_size=13, block_size=10)))


def test_future_tokens_cannot_change_past_logits(gpt):
    idx = torch.randint(13, (2, 10))
    changed = idx.clone()
    changed[:, 6] = (idx[:, 6] + 1) % 13
    assert torch.equal(gpt(idx)[:, :6], gpt(changed)[:, :6])
    assert not torch.equal(gpt(idx)[:, 6:], gpt(changed)[:, 6:])


def test_positions_matter(gpt):
    idx = torch.full((1, 10), 3)
    logits = gpt(idx)[0]
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 0.01


def test_text_beyond_the_block_is_refused_alike_with_and_without_cache(gpt, bart):
    for use_kv_cache in (False, True):
        with pytest.raises(ValueError, match="position 10 .*block_size=10"):
            gpt(torch.zeros(1, 11, dtype=torch.long), use_kv_cache)
        with pytest.raises(ValueError, match="block_size=10"):
            bart.decode(torch.zeros(1, 11, dtype=torch.long), bart.encode(torch.zeros(1, 3, dtype=torch.long)), None, use_kv_cache)
    with pytest.raises(ValueError, match="block_size=10"):
        bart.encode(torch.zeros(1, 11, dtype=torch.long))


def test_an_uncached_evaluation_in_mid_stream_changes_nothing(gpt):
    idx = torch.randint(13, (2, 10))
    gpt(idx[:, :4], True, 0)
    gpt(torch.randint(13, (3, 9)))
    assert (gpt(idx[:, 4:], True, 4) - gpt(idx)[:, 4:]).abs().max() < 1e-10


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("start", [0, 4])
def test_after_a_failure_in_any_layer_the_same_call_can_be_repeated(gpt, layer, start):
    idx = torch.randint(13, (2, 10))
    if start:
        gpt(idx[:, :start], True, 0)

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = gpt.h[layer].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        gpt(idx[:, start:], True, start)
    handle.remove()
    assert gpt.cache.filled == [start] * 2
    assert (gpt(idx[:, start:], True, start) - gpt(idx)[:, start:]).abs().max() < 1e-10


def test_rewinding_lets_a_prefix_be_continued_in_another_way(gpt):
    idx = torch.randint(13, (1, 10))
    gpt(idx, True, 0)
    gpt.cache.rewind(6)
    other = torch.cat([idx[:, :6], torch.randint(13, (1, 3))], 1)
    assert (gpt(other[:, 6:], True, 6) - gpt(other)[:, 6:]).abs().max() < 1e-10
    gpt.clear_kv_cache()
    assert gpt.cache is None and all(block.attn.cache is None for block in gpt.h)


def test_a_new_source_never_meets_an_old_cache(bart):
    a, b, target = torch.randint(13, (2, 7)), torch.randint(13, (2, 7)), torch.randint(13, (2, 5))
    A, B = bart.encode(a), bart.encode(b)
    bart.decode(target[:, :3], A, use_kv_cache=True)
    with pytest.raises(ValueError, match="start_pos=3 .*not the stored one"):
        bart.decode(target[:, 3:], B, use_kv_cache=True, start_pos=3)
    with pytest.raises(ValueError, match="not the stored one"):  # other lengths are another source as well
        bart.decode(target[:, 3:], A, torch.tensor([7, 3]), use_kv_cache=True, start_pos=3)
    assert (bart.decode(target[:, 3:], A, use_kv_cache=True, start_pos=3) - bart(a, target)[:, 3:]).abs().max() < 1e-10
    assert (bart.decode(target, B, use_kv_cache=True) - bart(b, target)).abs().max() < 1e-10
    assert (bart.decode(target, A[:, :4], use_kv_cache=True) - bart.decode(target, A[:, :4])).abs().max() < 1e-10


def test_a_new_source_that_fails_half_way_is_mixed_with_nothing(bart):
    A, B = (bart.encode(torch.randint(13, (2, 7))) for _ in range(2))
    target = torch.randint(13, (2, 5))
    bart.decode(target, A, use_kv_cache=True)
    handle = bart.decoder[1].attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bart.decode(target, B, use_kv_cache=True)
    handle.remove()
    for start in (1, 5):  # the text that it replaced is gone, and nothing goes on with either source
        with pytest.raises(ValueError, match="0 positions are stored"):
            bart.decode(target[:, :1], None, use_kv_cache=True, start_pos=start)
    assert (bart.decode(target, A, use_kv_cache=True) - bart.decode(target, A)).abs().max() < 1e-10


def test_a_text_that_is_refused_leaves_the_one_before_and_its_source(gpt, bart):
    A, B, target = *(bart.encode(torch.randint(13, (2, 7))) for _ in range(2)), torch.randint(13, (3, 11))
    bart.decode(target[:2, :5], A, use_kv_cache=True)
    gpt(target[:2, :5], use_kv_cache=True)
    for start in (0, [0, 0]):
        with pytest.raises(ValueError, match="block_size=10"):
            bart.decode(target[:2], B, use_kv_cache=True, start_pos=start)
    with pytest.raises(ValueError, match="block_size=10"):
        gpt(target, use_kv_cache=True)  # more rows, too
    step = bart.decode(target[:2, 5:6], None, use_kv_cache=True, start_pos=5)
    assert (step - bart.decode(target[:2, :6], A)[:, 5:]).abs().max() < 1e-10
    assert (gpt(target[:2, 5:6], True, 5) - gpt(target[:2, :6])[:, 5:]).abs().max() < 1e-10


def test_a_new_text_without_a_source_has_none(bart):
    A, target = bart.encode(torch.randint(13, (2, 7))), torch.randint(13, (2, 5))
    bart.decode(target, A, use_kv_cache=True)
    assert (bart.decode(target, None, use_kv_cache=True) - bart.decode(target, None)).abs().max() < 1e-10
    bart.decode(target, A, use_kv_cache=True, start_pos=[0, 0])
    bart.clear_kv_cache()
    assert bart.source is None and bart.cache is None and bart.decoder[0].attn.cache_k is None


def test_a_decoding_may_begin_in_inference_mode_and_go_on_outside(gpt, bart):
    target = torch.randint(13, (2, 5))
    with torch.inference_mode():
        A = bart.encode(torch.randint(13, (2, 7)))
        bart.decode(target[:, :3], A, use_kv_cache=True)
        gpt(target[:, :3], use_kv_cache=True)
        whole = bart.decode(target, A), gpt(target)
    assert (bart.decode(target[:, 3:], None, use_kv_cache=True, start_pos=3) - whole[0][:, 3:]).abs().max() < 1e-10
    assert (gpt(target[:, 3:], True, 3) - whole[1][:, 3:]).abs().max() < 1e-10


def test_a_layer_that_is_called_by_itself_does_not_move_the_models_cache(gpt):
    idx, x = torch.randint(13, (2, 8)), torch.randn(2, 5, 16, dtype=torch.float64)
    layer = gpt.h[0].attn
    gpt(idx[:, :4], True)
    layer(x[:, :3], True)
    assert (gpt(idx[:, 4:], True, 4) - gpt(idx)[:, 4:]).abs().max() < 1e-10
    assert (layer(x[:, 3:], True, 3) - layer(x)[:, 3:]).abs().max() < 1e-10


def test_a_memory_that_was_changed_in_place_is_another_memory(bart):
    A, target = bart.encode(torch.randint(13, (2, 7))).detach(), torch.randint(13, (2, 5))
    bart.decode(target[:, :3], A, use_kv_cache=True)
    A.mul_(2)
    with pytest.raises(ValueError, match="not the stored one"):
        bart.decode(target[:, 3:], A, use_kv_cache=True, start_pos=3)


def test_lengths_that_are_not_the_stored_ones_are_refused_also_without_a_memory(bart):
    A, target = bart.encode(torch.randint(13, (2, 7))), torch.randint(13, (2, 5))
    bart.decode(target[:, :3], A, use_kv_cache=True)
    with pytest.raises(ValueError, match="not the stored one"):
        bart.decode(target[:, 3:], None, torch.tensor([7, 3]), use_kv_cache=True, start_pos=3)


def test_source_lengths_outside_the_source_are_refused(bart):
    for lengths in ([0, 3], [4, 8]):
        with pytest.raises(ValueError, match="between 1 and the width 7"):
            bart.decode(torch.randint(13, (2, 2)), torch.zeros(2, 7, 16, dtype=torch.float64), torch.tensor(lengths))
    for lengths in ([0, 3], [4, 8]):
        with pytest.raises(ValueError, match="between 1 and the width 7"):
            bart.encode(torch.randint(13, (2, 7)), torch.tensor(lengths))


def test_the_first_token_depends_on_the_source(bart):
    start = torch.full((1, 1), 2)
    logits = [bart(torch.randint(13, (1, 5)), start) for _ in range(2)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_a_decoder_needs_no_source(bart):
    target = torch.randint(13, (2, 8))
    whole = bart.decode(target, None)
    parts = [bart.decode(target[:, :5], None, None, True), bart.decode(target[:, 5:], None, None, True, 5)]
    assert worst(parts, whole) <= 1e-10
    assert (whole - bart(torch.randint(13, (2, 3)), target)).abs().max() > 1e-3
    cache = bart.new_cache(2)
    assert worst([bart.lm_head(bart.features(target[:, :5], None, cache)),
                  bart.lm_head(bart.features(target[:, 5:], None, cache, 5))], whole) <= 1e-10


def test_several_rows_ask_one_memory_which_is_not_copied(bart):
    sources, target, lengths = torch.randint(13, (2, 7)), torch.randint(13, (6, 5)), torch.tensor([7, 4])
    memory = bart.project(bart.encode(sources, lengths), lengths)
    assert memory.nbytes == 2 * 2 * 2 * 7 * 16 * 8  # keys and values, layers, sources, positions, n_embd, bytes
    cache, seen = bart.new_cache(6), []
    bart.decoder[1].cross.pattern.register_forward_pre_hook(lambda module, args: seen.append(args[1].data_ptr()))
    parts = [bart.lm_head(bart.features(target[:, :3], memory, cache)),
             bart.lm_head(bart.features(target[:, 3:], memory, cache, 3))]
    assert seen == [memory.kv[1][0].data_ptr()] * 2
    repeated = [0, 0, 0, 1, 1, 1]
    assert worst(parts, bart(sources[repeated], target, lengths[repeated])) <= 1e-10
    taken = memory.take([1, 0, 1])
    logits = bart.lm_head(bart.features(target[:3], taken))
    assert (logits - bart(sources[[1, 0, 1]], target[:3], lengths[[1, 0, 1]])).abs().max() <= 1e-10


def test_lengths_are_copied_with_their_source(bart):
    A, target, lengths = bart.encode(torch.randint(13, (2, 7))), torch.randint(13, (2, 5)), torch.tensor([7, 4])
    whole = bart.decode(target, A, lengths.clone())
    memory = bart.project(A, lengths)
    first = bart.decode(target[:, :3], A, lengths, True)
    lengths.fill_(1)
    assert (bart.lm_head(bart.features(target, memory)) - whole).abs().max() <= 1e-10
    assert worst([first, bart.decode(target[:, 3:], None, None, True, 3)], whole) <= 1e-10
    with pytest.raises(ValueError, match="not the stored one"):
        bart.decode(target[:, 3:], None, lengths, True, 3)


def test_dropout_works_where_gradients_are_recorded_and_nowhere_else():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=13, block_size=10, embd_pdrop=0.5, attn_pdrop=0.5,
                        resid_pdrop=0.5))
    idx = torch.randint(13, (2, 10))
    assert not torch.equal(gpt(idx), gpt(idx))
    with torch.no_grad():
        plain = gpt(idx)
        assert torch.equal(plain, gpt(idx)) and torch.equal(plain, gpt.eval()(idx))
    for dropout in (module for module in gpt.train().modules() if isinstance(module, torch.nn.Dropout)):
        before, dropout.p = dropout.p, 0.0
    assert torch.allclose(gpt(idx), plain) and before == 0.5
    for dropout in (module for module in gpt.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.5  # each of them matters by itself
        assert not torch.allclose(gpt(idx), plain)
        dropout.p = 0.0


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_step_with_a_tensor_start_compiles_to_one_graph_that_serves_every_position(kind, gpt, bart):
    """The step that a CUDA graph will capture: whole buffers at fixed addresses, positions that only the device knows."""
    model, memory = (gpt, None) if kind == "gpt" else (bart, bart.project(bart.encode(torch.randint(13, (3, 7)))))
    given = {} if memory is None else {"memory": memory}
    target, cache, graphs = torch.randint(13, (3, 10)), model.new_cache(3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(idx, start_pos):
        return model.lm_head(model.features(idx, cache=cache, start_pos=start_pos, **given))

    with torch.inference_mode():
        whole = model.lm_head(model.features(target, **given))
        model.features(target[:, :4], cache=cache, **given)
        addresses = [x.data_ptr() for x in (*cache.k, *cache.v)]
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        torch._dynamo.reset()
        for at in range(4, 10):
            starts = torch.full((3, 1), at)
            assert (compiled(target[:, at : at + 1].clone(), starts)[:, 0] - whole[:, at]).abs().max() <= 1e-10
        ragged = torch.tensor([[2], [5], [9]])
        assert (compiled(target.gather(1, ragged), ragged)[:, 0] - whole[range(3), ragged[:, 0]]).abs().max() <= 1e-10
    assert len(graphs) == 1 and addresses == [x.data_ptr() for x in (*cache.k, *cache.v)]


def test_caches_follow_autocast_and_device_dtype(gpt):
    idx = torch.randint(13, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        gpt.float()(idx[:, :4], True, 0)
        gpt(idx[:, 4:], True, 4)
    assert gpt.h[0].attn.cache_k.dtype == torch.bfloat16


def test_a_model_with_caches_can_be_copied_and_its_state_is_its_parameters(gpt, bart):
    gpt(torch.randint(13, (2, 6)), use_kv_cache=True)
    bart.decode(torch.randint(13, (2, 6)), bart.encode(torch.randint(13, (2, 6))), use_kv_cache=True)
    for model in (gpt, bart):
        copy.deepcopy(model)
        pickle.dumps(model)
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters(remove_duplicate=False)]


def test_tied_weights_are_one_tensor_wherever_they_go_and_untied_ones_are_as_many_as_their_uses():
    for cls, uses, sizes in ((GPT, 2, dict(n_layer=1)), (BART, 3, dict(n_encoder_layer=1, n_decoder_layer=1))):
        sizes |= dict(n_head=1, n_embd=4, vocab_size=5, block_size=4)
        tied, untied = cls(cls.config_class(**sizes)), cls(cls.config_class(tie_weights=False, **sizes))
        for model in (tied, untied, copy.deepcopy(tied).double(), copy.deepcopy(untied).double()):
            named = dict(model.named_parameters(remove_duplicate=False))
            tables = {named[name] for name in ("wte.weight", "encoder_wte.weight", "lm_head.weight") if name in named}
            assert len(tables) == (1 if model.config.tie_weights else uses)
            assert model.count_parameters() == count_parameters(model.config)
        assert untied.count_parameters() - tied.count_parameters() == 5 * 4 * (uses - 1)


def test_memory_of_the_caches_is_made_at_the_first_cached_call_and_for_the_kv_heads_alone():
    gpt = GPT(GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, vocab_size=13, block_size=10, max_batch_size=3))
    gpt(torch.randint(13, (2, 6)))
    assert all(m.cache is None for m in gpt.modules() if isinstance(m, CausalSelfAttention))
    for rows in (2, 1, 5):  # it has as many rows as were needed so far, and not max_batch_size
        gpt(torch.randint(13, (rows, 6)), use_kv_cache=True)
        have = max(rows, 2)
        sizes = [m.cache_k.nbytes + m.cache_v.nbytes for m in gpt.modules() if isinstance(m, CausalSelfAttention)]
        assert sizes == [2 * have * 2 * 10 * 4 * 4] * 2  # keys and values x rows x KV heads x slots x head_dim x bytes
        assert gpt.cache.nbytes == sum(sizes)
    cache = gpt.new_cache(3, 7)
    assert cache.nbytes == 0
    gpt.features(torch.randint(13, (2, 6)), cache)
    assert cache.nbytes == 2 * 2 * 3 * 2 * 7 * 4 * 4


@pytest.mark.parametrize("settings, words", [
    (dict(n_embd=10, n_head=3), "n_embd=10 n_head=3"), (dict(n_head=4, n_embd=8, n_kv_head=3), "n_head=4 n_kv_head=3"),
    (dict(n_layer=0), "n_layer=0"), (dict(vocab_size=-1), "vocab_size=-1"), (dict(attn_pdrop=1.0), "attn_pdrop=1.0"),
    (dict(eos_id=50257), "eos_id=50257 50257"), (dict(block_size=0), "block_size=0")])
def test_impossible_configurations_are_refused_with_the_numbers(settings, words):
    with pytest.raises(ValueError) as error:
        GPT(GPTConfig(**settings))
    assert all(word in str(error.value) for word in words.split())


def test_a_preset_that_does_not_exist_names_those_that_do():
    with pytest.raises(ValueError, match="gpt3.*gpt2-xl"):
        preset_config("gpt3")
    with pytest.raises(ValueError, match="gpt2.*bart-large"):
        preset_config("gpt2", BART)
