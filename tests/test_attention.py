"""Attention and its cache: the seed notebook's numbers, any split of a sequence, and what is refused."""

import copy
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attention
from attention import (NOWHERE, Causal, CausalSelfAttention, CrossAttention, Everything, KVCache, SelfAttention, attend,
                       attend_explicit, dense, key_positions)
from cache import passing
from model import GPT
from plumbing.utils import set_seed


def config(**settings):
    config = GPT.get_default_config()
    for key, value in settings.items():
        setattr(config, key, value)
    return config


@pytest.fixture(autouse=True)
def drawn():
    """The same numbers, in whatever order the tests run: of some, rounding in fp32 is above 1e-5."""
    set_seed(42)


@pytest.fixture
def seed():
    """The seed notebook's input and layer."""
    set_seed(42)
    x = torch.rand(2, 8, 6)
    set_seed(42)
    return x, CausalSelfAttention(config(n_layer=1, n_head=1, n_embd=6, block_size=8)).eval()


def rough(layer, dtype):
    """Large random weights and biases: with the usual small ones, many mistakes drown in rounding."""
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer.to(dtype).eval()


# -----------------------------------------------------------------------------
# the seed notebook


def test_seed_notebook_numbers_are_reproduced(seed):
    x, mha = seed
    assert x[0, 0].tolist() == pytest.approx([0.8823, 0.9150, 0.3829, 0.9593, 0.3904, 0.6009], abs=5e-5)
    y = mha(x, use_kv_cache=True)
    assert y[0, 0].tolist() == pytest.approx([-0.2179, 0.4357, 0.3333, 0.0294, -0.0310, -0.0278], abs=5.1e-5)
    assert y[0, 7].tolist() == pytest.approx([-0.1245, 0.3554, 0.3567, -0.0293, -0.0346, 0.0549], abs=5.1e-5)
    assert y[1, 7].tolist() == pytest.approx([-0.0447, 0.0996, 0.4243, -0.0101, 0.0275, 0.2254], abs=5.1e-5)
    assert mha.cache_k[0, 0, 0].tolist() == pytest.approx([-0.0403, 0.4043, -0.2079, -0.1077, -0.4971, -0.2688], abs=5.1e-5)
    assert mha.cache_k[1, 0, 6].tolist() == pytest.approx([-0.1156, 0.4128, -0.0587, -0.2097, -0.2028, -0.1035], abs=5.1e-5)


def test_prefill_with_cache_is_bit_equal_to_without(seed):
    x, mha = seed
    assert torch.equal(mha(x), mha(x, use_kv_cache=True))


def test_cache_shape_is_max_batch_kv_head_block_head_dim_and_unwritten_slots_are_zero(seed):
    x, mha = seed
    assert mha.cache_k is None and mha.cache_v is None
    mha(x[:, :3], use_kv_cache=True)
    for cache in (mha.cache_k, mha.cache_v):
        assert cache.shape == (64, 1, 8, 6)
        assert cache[:2, :, :3].abs().min() > 0 and cache[2:].abs().max() == 0 and cache[:, :, 3:].abs().max() == 0


def test_prefill_of_three_and_five_single_steps_is_close(seed):
    x, mha = seed
    parts = [mha(x[:, :3], True, 0)] + [mha(x[:, i : i + 1], True, i) for i in range(3, 8)]
    assert [p.shape[1] for p in parts] == [3, 1, 1, 1, 1, 1]
    assert torch.allclose(torch.cat(parts, 1), mha(x))


def test_a_misspelt_field_is_an_error():
    with pytest.raises(AttributeError):
        config(n_kv_heads=2)


# -----------------------------------------------------------------------------
# any split


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_any_split_into_chunks_gives_the_same_output(n_kv_head, dtype, tolerance):
    mha = rough(CausalSelfAttention(config(n_head=4, n_kv_head=n_kv_head, n_embd=16, block_size=12)), dtype)
    x = torch.randn(3, 12, 16, dtype=dtype)
    whole = mha(x)
    for split in ([12], [4, 8], [3, 2, 7], [1] * 12, [11, 1], [1, 11], [2, 2, 2, 2, 2, 2]):
        for tensor in (False, True):  # positions as ints and as a tensor
            start, parts = 0, []
            for T in split:
                pos = torch.full((3, 1), start) if tensor else start
                parts.append(mha(x[:, start : start + T], use_kv_cache=True, start_pos=pos))
                start += T
            assert (torch.cat(parts, 1) - whole).abs().max() <= tolerance, (split, tensor)
            mha.cache = None


def test_rows_at_different_positions_equal_their_solo_runs():
    mha = rough(CausalSelfAttention(config(n_head=2, n_embd=8, block_size=10)), torch.float64)
    x, lengths = torch.randn(3, 10, 8, dtype=torch.float64), [5, 2, 7]
    mha(x[:, :7], True, 0)  # prefilled to the longest: what lies behind a row's length is padding
    mha.cache.rewind(lengths)
    new = torch.stack([x[row, n : n + 1] for row, n in enumerate(lengths)])
    for starts in (torch.tensor(lengths)[:, None], torch.tensor(lengths), lengths):  # on the device, or known to the host
        y = mha(new, True, starts)
        for row, n in enumerate(lengths):
            assert (y[row, 0] - mha(x[row : row + 1])[0, n]).abs().max() < 1e-12
    assert mha.cache.filled == [6, 3, 8]  # counted for the host's, not for the device's


def test_an_uncached_call_between_two_cached_steps_changes_nothing(seed):
    x, mha = seed
    mha(x[:, :3], True, 0)
    mha(torch.rand(5, 7, 6))
    assert torch.allclose(mha(x[:, 3:], True, 3), mha(x)[:, 3:])


def test_stale_contents_of_the_cache_are_never_read(seed):
    x, mha = seed
    mha(torch.full_like(x, 1e4), True, 0)  # an earlier text, longer than the next
    assert torch.equal(mha(x[:, :3], True, 0), mha(x[:, :3]))
    assert mha.cache_k[:, :, 3:].abs().max() == 0
    assert torch.allclose(mha(x[:, 3:5], True, 3), mha(x[:, :5])[:, 3:])


# -----------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("start_pos, T, B, numbers", [
    ([3, 4], 1, 2, "start_pos=4 row 1 3"),    # ragged: a gap
    ([-3, 3], 1, 2, "start_pos=-3 row 0 3"),
    ([3, 2], 1, 2, "start_pos=2 row 1 3"),
    ([0, 3], 6, 2, "start_pos=3 6 8"),        # and an overflow of one row
    ([3], 1, 2, "2 rows 1 starts"),
    ([3, 3, 3], 1, 2, "2 rows 3 starts"),
    (5, 1, 2, "start_pos=5 3"),    # a gap
    (2, 1, 2, "start_pos=2 3"),    # back, without rewind()
    (-1, 1, 2, "start_pos=-1 3"),
    (3, 6, 2, "start_pos=3 6 8"),  # an overflow
    (0, 9, 2, "start_pos=0 9 8"),
    (0, 1, 65, "65 64"),           # more rows than max_batch_size
    (torch.tensor(3), 1, 65, "65"),
    (3, 1, 3, "2 3"),              # another batch in mid-stream
    (3, 1, 1, "2 1"),
])
def test_what_cannot_be_stored_is_refused_before_anything_is_written(seed, start_pos, T, B, numbers):
    x, mha = seed
    mha(x[:, :3], True, 0)
    before = mha.cache_k.clone(), mha.cache_v.clone()
    with pytest.raises(ValueError) as error:
        mha(torch.rand(B, T, 6), True, start_pos)
    assert all(number in str(error.value) for number in numbers.split())
    assert torch.equal(mha.cache_k, before[0]) and torch.equal(mha.cache_v, before[1])
    assert torch.allclose(mha(x[:, 3:4], True, 3), mha(x)[:, 3:4])  # and the text goes on as if nothing had been


def test_a_start_position_without_a_cache_is_refused(seed):
    x, mha = seed
    with pytest.raises(ValueError, match="start_pos=3"):
        mha(x[:, 3:4], start_pos=3)


def test_rewind_forgets_and_continues_in_another_way(seed):
    x, mha = seed
    mha(x, True, 0)
    mha.cache.rewind(2)
    other = torch.rand(2, 3, 6)
    assert torch.allclose(mha(other, True, 2), mha(torch.cat([x[:, :2], other], 1))[:, 2:])
    for position in (7, -3, [2, 6], [2], [1, 1, 1]):
        with pytest.raises(ValueError, match=rf"position {re.escape(str(position))}: \[5, 5\]"):
            mha.cache.rewind(position)
    assert mha.cache.filled == [5, 5]


def test_tensor_positions_have_one_start_or_one_per_row_and_need_a_cache(seed):
    x, mha = seed
    for starts in (torch.tensor([0, 0, 0]), torch.zeros(3, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match="3 positions for 2 rows: it must hold 1 or 2"):
            mha(x[:, :1], True, starts)
    with pytest.raises(ValueError, match="with a cache"):
        mha(x[:, :1], False, torch.tensor(0))
    assert torch.allclose(mha(x[:, :3], True, torch.tensor(0)), mha(x[:, :3]))


def test_the_cache_may_be_filled_to_its_last_slot_and_no_further(seed):
    x, mha = seed
    mha(x, True, 0)
    with pytest.raises(ValueError, match="overflow a cache of 8"):
        mha(x[:, :1], True, 8)


# -----------------------------------------------------------------------------
# what the cache is not


def test_the_cache_carries_no_gradient_and_is_in_no_state_dict(seed):
    x, mha = seed
    keys = list(mha.state_dict())
    y = mha(x[:, :3].requires_grad_(), True, 0)
    assert y.requires_grad and not mha.cache_k.requires_grad and not mha.cache_v.requires_grad
    assert list(mha.state_dict()) == keys == [name for name, _ in mha.named_parameters()]
    copy.deepcopy(mha)


def test_a_cache_born_in_inference_mode_can_be_used_outside(seed):
    x, mha = seed
    with torch.inference_mode():
        mha(x[:, :3], True, 0)
    assert torch.allclose(mha(x[:, 3:], True, 3), mha(x)[:, 3:])


def test_the_cache_follows_the_dtype_of_its_keys_and_refuses_a_change_in_mid_stream(seed):
    x, mha = seed
    mha(x[:, :3], True, 0)
    mha.double()
    with pytest.raises(ValueError, match="float32.*float64.*start again at start_pos=0"):
        mha(x[:, 3:4].double(), True, 3)
    mha(x.double(), True, 0)
    assert mha.cache_k.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        mha.float()(x, True, 0)
    assert mha.cache_k.dtype == torch.bfloat16


def test_a_cache_of_ones_own_size_can_be_lent(seed):
    x, mha = seed
    mha.cache = KVCache(2, 5)
    mha(x[:, :4], True, 0)
    assert mha.cache_k.shape == (2, 1, 5, 6)


# -----------------------------------------------------------------------------
# masks and the two forms of attention


def test_a_chunk_after_a_prefix_sees_the_prefix_and_its_own_past():
    mask = dense(Causal.allows, torch.tensor([3, 4]), torch.arange(5))
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    ragged = dense(Causal.allows, torch.tensor([[0], [2]]), torch.arange(3))
    assert ragged[:, 0, 0].int().tolist() == [[1, 0, 0], [1, 1, 1]]
    padded = dense(Everything.allows, None, key_positions(torch.zeros(2, 3), torch.tensor([2, 3])))
    assert padded[:, 0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_predicate_may_ask_for_row_and_head_and_keys_may_stand_anywhere():
    own = lambda b, h, q, k: (k <= q) & ((b + h) % 2 == 0)
    key_pos = torch.tensor([[4, 1, NOWHERE], [2, 3, 9]])  # each row's slots hold other positions
    mask = dense(own, torch.tensor([2, 9]), key_pos, n_head=2)
    assert mask.shape == (2, 2, 2, 3)
    assert mask[0, 0].int().tolist() == [[0, 1, 0], [1, 1, 0]] and mask[1, 1].int().tolist() == [[1, 0, 0], [1, 1, 1]]
    assert not mask[0, 1].any() and not mask[1, 0].any()


@pytest.mark.parametrize("seed", range(20))
def test_the_readable_and_the_fast_attention_agree_and_equal_a_loop(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, T, S, D, KV = rng.randint(1, 3), rng.randint(1, 5), rng.randint(5, 9), rng.randint(1, 8), rng.choice([1, 2, 4])
    q, k, v = (torch.randn(B, n, L, D, dtype=torch.float64) for n, L in ((4, T), (KV, S), (KV, S)))
    mask = torch.rand(B, 1, T, S) < 0.5
    mask[..., 0] = True
    y, weights = attend_explicit(q, k, v, mask)
    assert (attend(q, k, v, mask) - y).abs().max() < 1e-12
    assert weights.shape == (B, 4, T, S) and (weights.sum(-1) - 1).abs().max() < 1e-12
    b, h, t = rng.randrange(B), rng.randrange(4), rng.randrange(T)  # one query by hand
    scores = [math.exp(q[b, h, t] @ k[b, h * KV // 4, s] / math.sqrt(D)) * mask[b, 0, t, s].item() for s in range(S)]
    by_hand = sum(w * v[b, h * KV // 4, s] for s, w in enumerate(scores)) / sum(scores)
    assert (y[b, h, t] - by_hand).abs().max() < 1e-12


@pytest.mark.parametrize("n_kv_head", [1, 2])
def test_shared_kv_heads_equal_full_heads_with_the_same_keys_and_values(n_kv_head):
    few = rough(CausalSelfAttention(config(n_head=4, n_kv_head=n_kv_head, n_embd=16, block_size=9)), torch.float64)
    full = rough(CausalSelfAttention(config(n_head=4, n_embd=16, block_size=9)), torch.float64)
    def repeat(w):  # every key and value head as often as query heads share it
        q, kv = w[:16], w[16:].view(2, n_kv_head, 4, -1)
        return torch.cat([q, kv.repeat_interleave(4 // n_kv_head, 1).reshape(32, *w.shape[1:])])
    full.load_state_dict({"c_attn.weight": repeat(few.c_attn.weight), "c_attn.bias": repeat(few.c_attn.bias),
                          "c_proj.weight": few.c_proj.weight, "c_proj.bias": few.c_proj.bias})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    assert (few(x, use_kv_cache=True) - full(x, use_kv_cache=True)).abs().max() < 1e-12
    assert few.cache_k.numel() * 4 == full.cache_k.numel() * n_kv_head


def test_padding_of_a_source_is_never_seen():
    torch.manual_seed(0)
    encoder = rough(SelfAttention(config(n_head=2, n_kv_head=1, n_embd=8)), torch.float64)
    cross = rough(CrossAttention(config(n_head=2, n_kv_head=1, n_embd=8)), torch.float64)
    x, q, lengths = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64), torch.tensor([4, 6])
    pos, key_pos = torch.arange(6), key_positions(x, lengths)
    solo = encoder(x[:1, :4], pos[:4], pos[:4]), cross(q[:1], *cross.project(x[:1, :4]), pos[:4])
    assert (encoder(x, pos, key_pos)[:1, :4] - solo[0]).abs().max() < 1e-12
    assert (cross(q, *cross.project(x), key_pos)[:1] - solo[1]).abs().max() < 1e-12
    assert (encoder(x, pos, pos)[:1, :4] - solo[0]).abs().max() > 1e-3  # it would matter


# -----------------------------------------------------------------------------
# cross-attention


def test_rows_side_by_side_ask_one_source():
    cross = rough(CrossAttention(config(n_head=2, n_kv_head=1, n_embd=8)), torch.float64)
    x, encoded = torch.randn(6, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    k, v = cross.project(encoded)
    assert k.is_contiguous() and v.is_contiguous()  # on a CPU: every step reads them, head by head
    for lengths in (None, torch.tensor([5, 2])):
        key_pos = key_positions(encoded, lengths)
        y = cross(x, k, v, key_pos)
        for row in range(6):  # rows 0 to 2 ask source 0, rows 3 to 5 source 1
            n = 5 if lengths is None else lengths[row // 3]
            alone = cross(x[row : row + 1], *cross.project(encoded[row // 3 : row // 3 + 1, :n]), torch.arange(n))
            assert (y[row] - alone[0]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="3 rows attend to a memory of 2"):
        cross(x[:3], k, v, torch.arange(5))


# -----------------------------------------------------------------------------
# in other people's code


def test_a_config_with_nothing_but_sizes_is_enough():
    bare = SimpleNamespace(n_embd=8, n_head=2)
    mha, x = rough(CausalSelfAttention(bare), torch.float64).train(), torch.randn(2, 7, 8, dtype=torch.float64)
    whole = mha(x)  # no dropout, as none was asked for
    assert (torch.cat([mha(x[:, :4], True), mha(x[:, 4:], True, 4)], 1) - whole).abs().max() < 1e-12
    assert mha.cache_k.shape[1:] == (2, 1024, 4) and mha(torch.randn(1, 2000, 8, dtype=torch.float64)).shape[1] == 2000
    encoder, cross, pos = SelfAttention(bare).double(), CrossAttention(bare).double(), torch.arange(7)
    assert cross(x, *cross.project(encoder(x, pos, pos)), pos).shape == x.shape


def test_attention_and_cache_import_nothing_else_of_ours(tmp_path):
    root = Path(attention.__file__).parent
    for name in ("attention.py", "cache.py"):
        shutil.copy(root / name, tmp_path)
    code = "from attention import CausalSelfAttention; from types import SimpleNamespace as S; import torch; " \
           "print(CausalSelfAttention(S(n_embd=4, n_head=2))(torch.ones(1, 3, 4), use_kv_cache=True).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"})
    assert done.stdout.strip() == "torch.Size([1, 3, 4])", done


def test_another_pattern_takes_the_place_of_the_causal_one():
    class Window(Causal):
        """The newest two positions."""

        def forward(self, q, k, v, query_pos, key_pos):
            return attend(q, k, v, dense(lambda b, h, q, k: (k <= q) & (k > q - 2), query_pos, key_pos))

    mha = rough(CausalSelfAttention(config(n_head=2, n_embd=8, block_size=10), pattern=Window), torch.float64)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    whole = mha(x)
    parts = [mha(x[:, :4], True, 0), mha(x[:, 4:5], True, 4), mha(x[:, 5:], True, 5)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-12
    changed = x.clone()
    changed[:, 2] += 1  # seen from positions 2 and 3 alone
    assert (mha(changed) - whole).abs().amax((0, 2)).gt(1e-6).tolist() == [False] * 2 + [True] * 2 + [False] * 5


# -----------------------------------------------------------------------------
# what an attack found


def test_texts_of_more_and_fewer_rows_follow_each_other(seed):
    x, mha = seed
    cache = KVCache(5, 8)
    for rows in (4, 2, 5, 1, 4):
        text = torch.rand(rows, 4, 6)
        for kept in (mha, None):  # its own, and one that is passed
            if kept:
                parts = [mha(text[:, :3], True), mha(text[:, 3:], True, 3)]
            else:
                parts = []
                for start, stop in ((0, 3), (3, 4)):
                    with passing(cache, start, text[:, start:stop], 8) as pos:
                        parts.append(mha(text[:, start:stop], pos=pos, cache=cache))
            assert (torch.cat(parts, 1) - mha(text)).abs().max() < 1e-5
    cache.reorder([3])
    mha.cache = cache
    assert torch.allclose(mha(x, True), mha(x))


@pytest.mark.parametrize("how", ["a new text", "rewound first", "one row afresh", "a pass that failed", "reordered"])
def test_numbers_that_are_none_do_not_outlive_their_text(how, seed):
    x, mha = seed
    bad = x.clone()
    bad[:, 3] = float("nan")
    mha(x[:, :1], True)
    if how == "a pass that failed":
        handle = mha.pattern.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mha(bad, True)
        handle.remove()
    else:
        mha(torch.cat([bad[:1], x[1:]]) if how == "one row afresh" else bad, True)
    if how == "rewound first":
        mha.cache.rewind(0)
    if how == "reordered":
        mha.cache.rewind([0, 4])
        mha.cache.reorder([0])
    if how == "one row afresh":
        mha.cache.rewind([8, 2])
        y = mha(x[:, 2:3], True, [0, 2])
        assert torch.allclose(y[:1], mha(x[:1, 2:3])) and torch.allclose(y[1:], mha(x)[1:, 2:3])
    else:
        mha(x[:, :2], True)
        mha.cache.rewind([2, 1])
        y = mha(torch.stack([x[0, 2:3], x[1, 1:2]]), True, [2, 1])
        assert torch.allclose(y[0], mha(x)[0, 2:3]) and torch.allclose(y[1], mha(x)[1, 1:2])


def test_what_is_no_row_cannot_be_viewed_and_counts_are_ones_own(seed):
    x, mha = seed
    cache = mha.cache = KVCache(3, 8)
    with pytest.raises(ValueError, match="row 0"):
        KVCache(None, 8).row(0)
    mha(x, True)
    for row in (-1, 2, 3):
        with pytest.raises(ValueError, match=f"row {row}"):
            cache.row(row)
    position = torch.tensor([3, 4])
    cache.rewind(position)
    position += 2
    assert cache.filled == [3, 4] and all(type(n) is int for n in cache.filled)
    for rows in ([0, 2], [-1], [0, 1, 0, 1]):
        with pytest.raises(ValueError, match="cannot make rows"):
            cache.reorder(rows)


def test_rows_are_filled_one_by_one_before_a_batch_has_been_there(seed):
    x, mha = seed
    cache = KVCache(2, 8)
    views = [cache.row(0), cache.row(1)]  # both before either has written
    for row, T in ((1, 3), (0, 2)):
        mha.cache = views[row]
        mha(x[row : row + 1, :T], True)
        if row == 0:
            cache.filled = [2, 3]
    kept, mha.cache = cache.k[0].data_ptr(), cache
    y = mha(torch.stack([x[0, 2:3], x[1, 3:4]]), True, [2, 3])
    assert torch.allclose(y[0], mha(x)[0, 2:3]) and torch.allclose(y[1], mha(x)[1, 3:4])
    assert cache.k[0].data_ptr() == kept
    mha.cache = cache.row(1)
    with pytest.raises(ValueError, match="layer 0 .*float32, cpu, but the keys are now .*float64"):
        mha.double()(x[1:, :1].double(), True)
    cache = mha.cache = KVCache(None, 8)
    mha(x.double(), True)
    cache.rewind(0)
    mha.cache = cache.row(1)
    mha.float()(x[1:], True)  # the first row, which is not there yet, will have numbers of this kind
    assert cache.k[0].shape[0] == 2 and cache.k[0].dtype == torch.float32


def test_lengths_are_one_for_each_row():
    for lengths in ([3], [3, 3, 3]):
        with pytest.raises(ValueError, match="must be 2 numbers between 1 and the width 4"):
            key_positions(torch.zeros(2, 4), torch.tensor(lengths))
