"""A cache that is concatenated holds what the static one holds, copies what its formula says, and its slip is found."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compare import compare
from cost import count, predict
from further.concat import ConcatCache, StaticCache, concat, slip
from generate import advance, cached, encode, generate, project, strategies
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.report import comparison_table
from test_model import random_sizes, rough

KINDS = {StaticCache: "cached", ConcatCache: "naive"}  # whose closed form counts the positions that are copied


def random_case(seed):
    """A rough model in fp64, its sources or None, and rows of one length."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    sizes = random_sizes(rng) | {"block_size": rng.randint(8, 24)}
    if seed % 2:
        model = GPT(GPTConfig(n_layer=rng.randint(1, 3), **sizes))
    else:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=rng.randint(1, 3), **sizes))
    B, V = rng.randint(1, 4), model.config.vocab_size
    ids = lambda n: [[rng.randrange(V) for _ in range(n)] for _ in range(B)]
    return rng, rough(model), None if seed % 2 else ids(5), ids(sizes["block_size"])


@pytest.mark.parametrize("seed", range(24))
def test_whatever_its_rows_go_through_it_gives_the_logits_of_the_static_cache(seed):
    """Chunks, rewinds, rows that leave, multiply or begin afresh, forks; beside the static cache, and none at all."""
    rng, model, sources, rows = random_case(seed)
    static, ours = (kind(len(rows), len(rows[0]), len(model.decoder_layers())) for kind in KINDS)
    n = 0
    for _ in range(12):
        if n and (n == len(rows[0]) or rng.random() < 0.2):
            n = rng.randrange(n)
            static.rewind(n), ours.rewind(n)
        if n and rng.random() < 0.3:  # some leave, or all stay in another order
            kept = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
            static.reorder(kept), ours.reorder(kept)
            rows, sources = [rows[r] for r in kept], sources and [sources[r] for r in kept]
        if n and rng.random() < 0.2:
            static, ours = static.fork(), ours.fork()
        if n and rng.random() < 0.2 and len(rows) < 3:
            static.expand(2), ours.expand(2)
            rows, sources = [row for row in rows for _ in "ab"], sources and [row for row in sources for _ in "ab"]
        n += rng.randint(1, min(3, len(rows[0]) - n))
        text, memory = [row[:n] for row in rows], project(model, *encode(model, sources))
        expected, found, alone = (advance(model, text, cache, memory) for cache in (static, ours, None))
        assert (found - expected).abs().max() <= 1e-10 and (found - alone).abs().max() <= 1e-10
        assert ours.k[0].size(2) == n


def position(model, B):
    """Bytes of the keys and values of one position."""
    return 2 * len(model.decoder_layers()) * B * model.config.kv_width * model.wte.weight.itemsize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("P, M, B", [(1, 1, 1), (1, 9, 2), (7, 1, 1), (6, 10, 3)])
def test_copied_bytes_are_those_of_the_formula(kind, P, M, B):
    for sizes in dict(n_head=4), dict(n_head=4, n_kv_head=2), dict(n_head=4, n_kv_head=1):
        sizes |= dict(n_embd=16, vocab_size=11, block_size=16)
        gpt, bart = GPT(GPTConfig(n_layer=3, **sizes)), BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=2, **sizes))
        for model, prompts, more in ((gpt, [[3] * P] * B, {}),
                                     (bart, [[3] * 4] * B, {"decoder_prompts": [[5] * (P - 1)] * B})):
            cache = kind(B, P + M, len(model.decoder_layers()))
            with count(model) as cost:
                generate(model, prompts, M, strategy=lambda *given: cached(*given, cache), ignore_eos=True, **more)
            formula = {StaticCache: P + M - 1, ConcatCache: P * M + M * (M - 1) // 2}[kind]
            assert cache.copied == position(model, B) * formula
            assert cost.cache_bytes("self") == position(model, B) * (P + M - (kind is ConcatCache))
            if model is gpt:  # the tokens that this strategy computes are as many
                assert predict(model.config, KINDS[kind], P, M, B)["decoder_tokens"] == B * formula


class Copies(TorchDispatchMode):
    """Counts the bytes that are copied in the block, from below: copies, and whatever makes a tensor of others."""

    def __init__(self):
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.cat, torch.ops.aten.clone):
            self.copied += out.nbytes
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_copied_is_what_was_really_copied(kind):
    cache, start = kind(2, 12), 0
    with Copies() as copies:
        for T in 4, 1, 1, 3:
            cache.stop = start + T
            cache.update(0, torch.arange(start, start + T), torch.ones(2, 3, T, 5), torch.ones(2, 3, T, 5))
            start += T
    assert cache.copied == copies.copied > 0


PROMPTS = [[3, 9, 4, 22, 17], [5, 11, 2, 2, 30]]
SIZES = dict(n_head=4, n_kv_head=2, n_embd=32, vocab_size=40, block_size=24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reference", ["naive", "cached"])
@pytest.mark.parametrize("cls", [GPT, BART])
def test_concatenation_is_rounding_and_the_slip_is_a_bug_from_the_second_step_on(cls, reference, dtype):
    torch.manual_seed(0)
    depth = dict(n_layer=3) if cls is GPT else dict(n_encoder_layer=1, n_decoder_layer=3)
    model = rough(cls(cls.config_class(**depth, **SIZES)), dtype)
    makes = {reference: strategies(model)[reference], "concat": concat, "slip": slip}
    result = compare(model, makes, PROMPTS, 8, ignore_eos=True)
    first, second, third = (s["finding"] for s in result["strategies"])
    assert first["verdict"] == "equal" and second["verdict"] in ("equal", "rounding")
    assert third["verdict"] == "bug" and (third["step"], third["layer"], third["attention"]) == (2, 0, "self")
    newest = 5 if cls is GPT else 1  # behind the prompt, or the start token
    assert third["kind"] == "keys" and third["note"] == f"0 keys stand at position {newest}"
    assert "slip: BUG, first at step 2" in comparison_table(result)


def test_a_bug_of_the_strategy_that_the_others_are_held_against_is_found():
    model = rough(GPT(GPTConfig(n_layer=2, **SIZES)), torch.float32)
    result = compare(model, {"slip": slip, "cached": cached}, PROMPTS, 8, ignore_eos=True)
    first, second = (s["finding"] for s in result["strategies"])
    assert result["bug"] and (first["verdict"], first["step"], first["kind"]) == ("bug", 2, "keys")
    assert second["verdict"] == "rounding"


def test_rows_at_different_positions_are_refused_by_name():
    model = rough(GPT(GPTConfig(n_layer=1, **SIZES)))
    with pytest.raises(ValueError, match=r"shape \(2, 1\).* no ragged rows .* use a KVCache"):
        generate(model, [[3, 4], [5]], 3, strategy=concat, ignore_eos=True)
    cache = ConcatCache(2, 24, 1)
    advance(model, [[3], [4]], cache)
    with pytest.raises(ValueError, match=r"shape \(1, 1\).* no tensor start_pos"), torch.inference_mode():
        model.features(torch.tensor([[3], [4]]), cache, torch.tensor(1))
    with pytest.raises(ValueError, match="row 1 .* use a KVCache"):
        cache.row(1)


def test_a_text_may_begin_outside_inference_mode_in_the_cache_of_another():
    model, cache = rough(GPT(GPTConfig(n_layer=2, **SIZES))), ConcatCache(1, 24, 2)
    advance(model, [[3, 4]], cache)
    model.features(torch.tensor([[7, 8, 9]]), cache, 0)
    x = model.features(torch.tensor([[6]]), cache, 3)
    assert (x[:, -1] - model.features(torch.tensor([[7, 8, 9, 6]]))[:, -1]).abs().max() <= 1e-10
    assert not cache.k[0].requires_grad
