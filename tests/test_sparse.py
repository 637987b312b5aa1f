"""Sparse patterns: each computation equals its predicate, entries are counted, slots keep what can still be seen."""

import json
import math

import pytest
import torch

import sparse
from attention import Causal, attend, attend_explicit, dense, keeping
from cache import KVCache, Slots, passing
from conftest import call
from model import BART, GPT, BARTConfig, GPTConfig
from test_model import rough
from plumbing.errors import UserError
from plumbing.patterns import named, patterns
from plumbing.weights import load_pretrained, save_pretrained
from sparse import Block, Column, Columns, Fixed, Local, Split, Strided, TopK

PATTERNS = [Local(5), Local(1), Local(4, 2), Local(100), Block(4), Fixed(4, 1), Fixed(5, 2), Fixed(3, 3), Columns(4, 1),
            Columns(6, 3), Strided(4), Strided(7), Strided(1), Column(3), Column(8), Split([Local(3), Column(4)], 4),
            Split([Block(4), Columns(4, 2)], 4)]


def draw(T, H, KV, dtype=torch.float64):
    return [torch.randn(2, heads, T, 8, dtype=dtype, requires_grad=True) for heads in (H, KV, KV)]


def gap(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: " ".join(map(str, vars(p).values()))[-1:] + type(p).__name__)
@pytest.mark.parametrize("T", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_fold_is_its_predicate_values_and_gradients(pattern, T, dtype, tolerance):
    torch.manual_seed(T)
    for KV in (4, 2):
        q, k, v = draw(T, 4, KV, dtype)
        pos = torch.arange(T)
        y, true = pattern(q, k, v, pos, pos), attend_explicit(q, k, v, dense(pattern.allows, pos, pos, 4))[0]
        given = torch.randn_like(y)
        assert gap([y], [true]) <= tolerance
        assert gap(*(torch.autograd.grad(out, (q, k, v), given) for out in (y, true))) <= tolerance * 10


def test_the_written_out_union_is_the_same():
    """Where there is dropout, or a GPU, no kernel gives its sums. The dropout itself is left out here."""
    torch.manual_seed(0)
    q, k, v = draw(33, 4, 2)
    found = []
    for p in (0.0, 0.5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse.F, "dropout", lambda x, p: x)
            patch.setattr(sparse, "KERNEL", sparse.KERNEL if not p else None)
            y = Strided(7, p).fold(q, k, v)
            found.append([y, *torch.autograd.grad(y.sin().sum(), (q, k, v))])
    assert gap(*found) < 1e-12


@pytest.mark.parametrize("KV", [4, 2, 1])
def test_top_k_reads_its_own_block_and_the_best_before_it(KV):
    """Against a loop that says what is meant."""
    torch.manual_seed(KV)
    pattern, l, T = TopK(3, 2), 3, 17
    q, k, v = draw(T, 4, KV)
    pos = torch.arange(T)
    y = pattern(q, k, v, pos, pos)
    for b in range(2):
        for h in range(4):
            keys, values = k[b, h * KV // 4], v[b, h * KV // 4]
            for t in range(T):
                before = sorted(range(t // l), key=lambda n: -(q[b, h, t] @ keys[n * l + l - 1]).item())[:2]
                seen = [p for p in range(t + 1) if p // l in [*before, t // l]]
                weights = (keys[seen] @ q[b, h, t] / math.sqrt(8)).softmax(0)
                assert (weights @ values[seen] - y[b, h, t]).abs().max() < 1e-12
    steps = [pattern(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], pos[t : t + 1], pos[: t + 1]) for t in range(T)]
    assert gap([torch.cat(steps, 2)], [y]) < 1e-12


def entries(pattern, n):
    pos = torch.arange(n)
    return dense(pattern.allows, pos, pos).sum().item()


@pytest.mark.parametrize("n, union", [(64, 708), (256, 5896), (1024, 48144), (4096, 389152)])
def test_the_entries_are_n_sqrt_n(n, union):
    l = math.isqrt(n)
    block, summaries = n * (l + 1) // 2, l * l * (l - 1) // 2
    assert entries(Strided(l), n) == union
    assert entries(Fixed(l, 1), n) == block + summaries == n * l
    assert entries(Local(l), n) == l * n - l * (l - 1) // 2 and entries(Block(l), n) == block


@pytest.mark.parametrize("first, second", [(Local(8), Column(8)), (Block(8), Columns(8, 1))])
def test_two_hops_reach_every_earlier_position(first, second):
    """Child et al. 2019, section 4.2: what two heads of the factorised patterns see together, one after the other."""
    pos = torch.arange(64)
    a, b = (dense(p.allows, pos, pos)[0, 0].double() for p in (first, second))
    reached = (a @ b + b @ a) > 0
    before = pos <= pos[:, None]
    if isinstance(first, Block):  # over the last column of an earlier block: its own block comes one hop later
        reached |= (a @ b @ a) > 0
    assert torch.equal(reached & before, before)


def test_multi_query_is_grouped_by_all_and_multi_head_with_tied_heads():
    torch.manual_seed(0)
    q, k, v = draw(9, 4, 1)
    for T in (9, 1):
        one = q[:, :, -T:]
        tied = attend(one, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1), is_causal=T > 1)
        assert gap([attend(one, k, v, is_causal=T > 1)], [tied]) < 1e-14
    mask = torch.rand(2, 1, 9, 9) < 0.7
    mask[..., 0] = True
    for shape in (mask, mask.expand(2, 4, 9, 9).clone(), mask[:, :, :1]):
        for keys in (1, 2):
            a, b = k.repeat(1, keys, 1, 1), v.repeat(1, keys, 1, 1)
            assert gap([attend(q, a, b, shape)], [attend_explicit(q, a, b, shape)[0]]) < 1e-14


@pytest.mark.parametrize("kv", [8, 4, 2, 1])
def test_cache_bytes_divide_by_how_many_share(kv):
    gpt = GPT(GPTConfig(n_layer=2, n_head=8, n_kv_head=kv, n_embd=64, vocab_size=11, block_size=16))
    cache = gpt.new_cache(3)
    gpt.features(torch.zeros(3, 2, dtype=torch.long), cache)
    assert cache.nbytes == 2 * 2 * 3 * 16 * 64 * 4 * kv // 8


def filled(name, n, rows=2, T=None):
    """A cache of one layer under a pattern after n positions, in chunks of T, and the keys that went into it."""
    pattern = named(name, 2, 2, 64)
    cache, x = keeping([pattern], rows, 64), torch.randn(rows, 2, n, 4)
    for start in range(0, n, T or n):
        part = x[:, :, start : start + (T or n)]
        with passing(cache, start, part[:, 0], math.inf) as pos:
            pattern.keep(cache, 0, pos, part, part)
    cache.settle()
    return cache, x


@pytest.mark.parametrize("name, slots", [("full", 64), ("local:8", 8), ("sinks:3,8", 11), ("block:8", 8), ("fixed:8,2", 22),
                                         ("columns:8,2", 22), ("strided:8", 64), ("local:64", 64), ("topk:8", 64)])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_a_cache_keeps_what_can_still_be_seen(name, slots, T):
    """22 slots: 8 blocks with 2 columns each, and the 6 others of one block."""
    pattern = named(name, 2, 2, 64)
    cache, x = filled(name, 40, T=T)
    assert cache.nbytes == 2 * 2 * 2 * slots * 4 * 4
    if cache.slots[0].evicts:
        held = cache.slots[0].held(torch.tensor([40]))
        later = torch.arange(40, 64)[:, None]
        seen = dense(pattern.allows, torch.arange(40, 64), torch.arange(40))[0, 0].any(0).nonzero().flatten().tolist()
        assert set(seen) <= set(held.tolist())
        for slot, p in enumerate(held.tolist()):
            if p in seen:
                assert torch.equal(cache.k[0][:, :, slot], x[:, :, p])


def test_heads_that_are_kept_in_different_ways_have_buffers_of_their_own():
    cache, x = filled("local:8+column:8", 40)
    assert [slots.size for slots in cache.slots] == [8, 64] and cache.nbytes == 2 * 2 * (8 + 64) * 4 * 4
    assert torch.equal(cache.k[1][:, :, :40], x[:, 1:])


def test_a_rewind_to_what_has_been_evicted_is_refused_by_name_and_a_repeated_one_too():
    cache, _ = filled("local:8", 20, T=1)
    for position in (18, 12, 5):
        with pytest.raises(ValueError, match=rf"cannot rewind to position {position}: .* evicted from Ring\(size=8"):
            cache.rewind(position)
        assert cache.filled == [20, 20]
    cache.rewind(19)  # it sees 12 and later, and these are there
    with pytest.raises(ValueError, match="cannot rewind to position 18"):  # though only 19 are stored now
        cache.rewind(18)
    cache.rewind(0)  # nothing is needed there


def test_a_chunk_evicts_only_what_counts_of_it_in_the_end():
    """Drafts that are rejected, and padding, take no slots: so there is no need for spare ones."""
    cache, x = filled("local:8", 12)
    more = torch.randn(2, 2, 6, 4)
    with passing(cache, 12, more[:, 0], math.inf) as pos:
        cache.update(0, pos, more, more)
    cache.rewind([13, 12])
    cache.settle()
    assert torch.equal(cache.k[0][0, :, cache.slots[0].of(torch.arange(5, 12))], x[0, :, 5:12])
    assert torch.equal(cache.k[0][0, :, 12 % 8], more[0, :, 0])
    assert torch.equal(cache.k[0][1, :, cache.slots[0].of(torch.arange(4, 12))], x[1, :, 4:12])


def test_a_chunk_that_fails_evicts_nothing():
    cache, x = filled("local:8", 12)
    more = torch.randn(2, 2, 6, 4)
    with pytest.raises(ZeroDivisionError), passing(cache, 12, more[:, 0], math.inf) as pos:
        cache.update(0, pos, more, more)
        1 / 0
    cache.settle()
    assert cache.filled == [12, 12]
    assert torch.equal(cache.k[0][:, :, cache.slots[0].of(torch.arange(4, 12))], x[:, :, 4:12])


def test_a_layer_with_a_window_goes_on_beyond_its_buffer():
    """No position is learned in a layer that stands alone: text may be longer than block_size."""
    from attention import CausalSelfAttention
    config = GPTConfig(n_head=2, n_embd=8, block_size=16, max_batch_size=2, attn_pdrop=0.0, resid_pdrop=0.0)
    for make in (lambda p: Local(5, p=p), lambda p: Local(4, 3, p=p)):
        torch.manual_seed(0)
        mha, x = CausalSelfAttention(config, pattern=make).double(), torch.randn(2, 60, 8, dtype=torch.float64)
        parts = [mha(x[:, a:b], True, a) for a, b in ((0, 20), (20, 23), *((i, i + 1) for i in range(23, 60)))]
        assert gap([torch.cat(parts, 1)], [mha(x)]) < 1e-12
    full = CausalSelfAttention(config).double()
    with pytest.raises(ValueError, match="overflow a cache of 16"):
        full(x, True)


@pytest.mark.parametrize("cls, extra", [(GPT, dict(n_layer=3)), (BART, dict(n_encoder_layer=1, n_decoder_layer=3))])
def test_a_sparse_model_is_saved_as_our_own_type_and_loaded(cls, extra, tmp_path):
    names = ["local:3", "fixed:4,1", "block:4+columns:4,1"]
    torch.manual_seed(0)
    model = cls(cls.config_class(n_head=4, n_embd=16, vocab_size=13, block_size=20, pattern=names, **extra)).eval()
    save_pretrained(tmp_path, model)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"].startswith("mindecode") and saved["pattern"] == names
    again, _ = load_pretrained(tmp_path)
    assert [type(layer.attn.pattern) for layer in again.decoder_layers()] == [Local, Fixed, Split]
    idx = torch.randint(13, (2, 20))
    given = (idx[:, :5], idx) if cls is BART else (idx,)
    assert torch.equal(again(*given), model(*given))


def test_the_decoder_of_a_bart_may_share_heads_by_itself(tmp_path):
    config = BARTConfig(n_encoder_layer=1, n_decoder_layer=1, n_head=4, n_embd=16, vocab_size=13, block_size=20,
                        n_decoder_kv_head=1, n_cross_kv_head=2)
    bart = BART(config).eval()
    assert [bart.encoder[0].attn.n_kv_head, bart.decoder[0].attn.n_kv_head, bart.decoder[0].cross.n_kv_head] == [4, 1, 2]
    save_pretrained(tmp_path, bart)
    again, _ = load_pretrained(tmp_path)
    assert (again.config.n_kv_head, again.config.n_decoder_kv_head, again.config.n_cross_kv_head) == (None, 1, 2)
    idx = torch.randint(13, (2, 9))
    assert torch.equal(again(idx, idx), bart(idx, idx))
    with pytest.raises(UserError, match="n_head of n_kv_head=5"):
        BART(BARTConfig(n_cross_kv_head=5))


@pytest.mark.parametrize("name, words", [
    ("locl:3", "none of full, local"), ("local", "has 0 numbers: write local:WINDOW"), ("local:3,4", "has 2 numbers"),
    ("local:0", "window=0 must be a whole number from 1 to block_size=16"), ("local:17", "block_size=16"),
    ("fixed:4,5", "columns=5 are more than stride=4"), ("strided:-1", "stride=-1"), ("strided:x", "stride=x"),
    ("local:３", "window=３"), ("local:3+local:3+local:3", "3 parts, and 4"), ("", "none of full"), (3, "must be a text"),
    (["full"], "1 entries for 2 layers"), (["full", 3], "must be a text"), ("full:1", "has 1 numbers: write full")])
def test_what_cannot_be_a_pattern_is_refused_by_name(name, words):
    with pytest.raises(UserError, match=words.replace("+", r"\+")):
        GPTConfig(n_layer=2, n_head=4, n_embd=8, block_size=16, pattern=name).validate()


def test_the_command_line_refuses_a_pattern_that_does_not_fit():
    import bench
    outcome = call(bench.main, "compare", "--random", "gpt2", "--prompt-tokens", 4, "--model.pattern=fixed:4,5")
    assert outcome.code == 2 and "columns=5" in outcome.err and not outcome.out


@pytest.mark.parametrize("name", ["local:4", "fixed:4,1", "sinks:2,3", "strided:4", "topk:3,1", "local:4+column:4"])
def test_compare_finds_no_bug_in_a_pattern_and_one_in_what_is_done_to_it(name):
    """Keys of the second layer that are a tenth too large."""
    from compare import compare
    from generate import cached, naive
    torch.manual_seed(0)
    gpt = rough(GPT(GPTConfig(n_layer=2, n_head=4, n_embd=16, vocab_size=13, block_size=32, pattern=name)))
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
    assert not compare(gpt, {"naive": naive, "cached": cached}, prompts, 12, ignore_eos=True)["bug"]

    def wrong(model, *args):
        cache = model.new_cache(2, 32)
        write_keys = cache.update
        cache.update = lambda layer, pos, k, v: write_keys(layer, pos, k * (1 + 0.1 * (layer == 1)), v)
        return cached(model, *args, cache=cache)

    found = compare(gpt, {"naive": naive, "wrong": wrong}, prompts, 12, ignore_eos=True)["strategies"][1]["finding"]
    assert (found["verdict"], found["layer"], found["attention"], found["kind"]) == ("bug", 1, "self", "keys")


def test_shared_heads_cannot_be_split():
    with pytest.raises(UserError, match="2 parts, and 1 have keys"):
        patterns(GPTConfig(n_head=4, n_kv_head=1, pattern="local:3+column:3"), 1)


@pytest.mark.parametrize("name", ["full", "local:8", "sinks:3,8", "block:8", "fixed:8,2", "strided:8", "column:8", "topk:4,2",
                                  "local:8+column:8"])
def test_a_captured_step_reads_the_slots_at_fixed_addresses(name):
    """start_pos as a tensor: positions that only the device knows, whatever the pattern."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=16, vocab_size=13, block_size=32, pattern=name)).double().eval()
    idx, cache = torch.randint(13, (2, 32)), gpt.new_cache(2)
    with torch.no_grad():
        gpt.features(idx[:, :5], cache)
        found, at = [], torch.tensor([5])
        for i in range(5, 32):
            found.append(gpt.features(idx[:, i : i + 1], cache, at))
            at += 1
        assert gap([torch.cat(found, 1)], [gpt.features(idx)[:, 5:]]) < 1e-10


def test_looking_at_a_cache_in_the_middle_of_a_pass_changes_nothing():
    """Counting does, while the last layer runs."""
    cache, x = filled("local:8", 12)
    more = torch.randn(2, 2, 3, 4)
    with passing(cache, 12, more[:, 0], math.inf) as pos:
        cache.update(0, pos, more, more)
        assert cache.nbytes == 2 * 2 * 2 * 8 * 4 * 4
    cache.settle()
    assert torch.equal(cache.k[0][:, :, cache.slots[0].of(torch.arange(12, 15))], more)


def test_a_chunk_at_positions_that_only_the_device_knows_is_refused_where_it_would_evict():
    cache, _ = filled("local:8", 12)
    with pytest.raises(ValueError, match="let one enter at a time"), passing(cache, torch.tensor([12]), torch.zeros(2, 3), 64):
        pass


def test_the_command_measures_patterns_and_shared_heads(tmp_path):
    import bench
    args = ["attention", "--lengths", "20,40", "--stored", 30, "--rows", "1,2", "--backward"]
    found = json.loads(call(bench.main, *args, "--json").out)
    full, local, *_ = found["steps"]
    assert (full["pattern"], local["pattern"], local["keys"]) == ("full", "local:16", 16)
    assert local["bytes"] == local["cache_bytes"] == 2 * 16 * 16 * 64 * 4 and full["keys"] == 30 + 12
    assert [s["bytes"] for s in found["steps"] if s["pattern"] == "full" and s["rows"] == 2] == [
        2 * 2 * kv * 42 * 64 * 4 for kv in (16, 2, 1)]
    assert {t["n"] for t in found["texts"]} == {20, 40} and min(t["seconds"] for t in found["texts"]) > 0
    pytest.importorskip("matplotlib")
    shown = call(bench.main, *args, "--plot", tmp_path / "a.png")
    assert shown.code == 0 and "keys read" in shown.out and (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("args, words", [("--lengths 0", "--lengths '0'"), ("--rows 1,x", "--rows '1,x'"), ("--lengths 1,", "'1,'"),
                                         ("--stored 0", "--stored '0'"), ("--rows 9999999", "GiB"), ("--plot no/a.png", "no/a.png")])
def test_what_cannot_be_measured_is_refused_in_one_line(args, words):
    import bench
    outcome = call(bench.main, "attention", *args.split())
    assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1 and not outcome.out
