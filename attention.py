"""
Attention in three roles, and the cache that makes decoding cheap.

The whole file rests on one idea: *positions are explicit and absolute; a mask is a predicate over positions; a cache
is a buffer indexed by positions.* `start_pos + arange(T)` covers a whole sequence (start 0), a chunk after a prefix, a
single decoded token, and a batch whose rows are at different places (one start per row).

Shapes: B batch, T new (query) positions, S stored (key) positions, C n_embd, H n_head, D head_dim = C / H,
KV n_kv_head (H for multi-head; fewer for grouped-query; 1 for multi-query attention).

This file imports nothing of ours: it can be lifted into other code as it stands.
"""

import math
import weakref
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn import functional as F

# -----------------------------------------------------------------------------
# Masks. A predicate (batch, head, query_pos, key_pos) -> bool says who may attend to whom: True = may attend.
# The signature is FlexAttention's mask_mod, so the same functions can drive a block-sparse kernel.


def causal(b, h, q, k):
    """A position sees itself and its past."""
    return k <= q


def within(lengths):
    """Every position sees the first lengths[b] keys of its row and none of the padding behind them. lengths: (B,)."""
    return lambda b, h, q, k: k < lengths[b]


def dense(predicate, query_pos, key_pos, batch_size=1, n_head=1):
    """
    A predicate as a boolean tensor, (B or 1, H or 1, T, S): axes that the predicate ignores stay 1 and broadcast.
    query_pos: (T,), or (B, T) when the rows are at different places. key_pos: (S,).
    """
    device = key_pos.device
    b = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    h = torch.arange(n_head, device=device).view(1, -1, 1, 1)
    q = query_pos.view(-1, 1, query_pos.size(-1), 1)
    return predicate(b, h, q, key_pos.view(1, 1, 1, -1))


# -----------------------------------------------------------------------------
# The attention function, twice: to be read, and to be fast. The tests tie the two together.


def attend_explicit(q, k, v, mask=None):
    """
    softmax(q k^T / sqrt(D)) v, written out (Vaswani et al. 2017, equation 1; Shazeer 2019 for shared KV heads).

    q: (B, H, T, D); k, v: (B, KV, S, D) with H a multiple of KV: each key head serves H / KV neighbouring query heads.
    mask: bool, broadcastable to (B, H, T, S); every query must be allowed at least one key.
    Returns the output (B, H, T, D) and the attention weights (B, H, T, S).
    """
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


def attend(q, k, v, mask=None, is_causal=False, dropout_p=0.0):
    """The same through PyTorch's fused kernel. is_causal only when T == S: the kernel aligns that mask top-left."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, enable_gqa=grouped)


# -----------------------------------------------------------------------------


class KVCache:
    """
    Keys and values of the positions seen so far, so that a decode step computes only its own.

    Two buffers (batch_size, KV, length, D), zero where unwritten, allocated at the first update with the dtype and
    device of its keys. KV heads are stored unrepeated: sharing them is what makes the cache small (Shazeer 2019).
    Not a module, so the buffers are in no state_dict; written detached, so they carry no gradient.
    """

    def __init__(self, batch_size, length):
        self.batch_size, self.length = batch_size, length
        self.k = self.v = None
        self.rows = 0    # batch rows of the sequences that are stored
        self.filled = 0  # positions that are stored; None once they come as tensors, which only the device can read

    def update(self, start_pos, k, v):
        """
        Store k and v, (B, KV, T, D), at start_pos.. and return all that attention may read, (B, KV, S, D) each.

        start_pos as an int is the number of stored positions, or 0 to start afresh; S = start_pos + T.
        As a tensor, () or (B, 1), rows may be at different places: S is then the whole buffer, at an address that
        never changes, and the causal predicate hides what is not written yet. Tensor positions are not checked.
        Raises ValueError, before anything is written, on a gap, an overflow, or a batch that is too large or changes.
        """
        B, _, T, _ = k.shape
        tensor = isinstance(start_pos, torch.Tensor)
        self.check(start_pos, B, T)
        if not tensor and start_pos == 0:
            self.rewind(0)
        if self.k is None or self._layout(self.k) != self._layout(k):
            if self.filled != 0:
                raise ValueError(f"the cache holds {self._layout(self.k)} but the keys are now {self._layout(k)}: "
                                 f"start again at start_pos=0")
            self._allocate(k)
        if tensor:
            b = torch.arange(B, device=k.device)[:, None]
            pos = (start_pos + torch.arange(T, device=k.device)).expand(B, T)
            self.k[b, :, pos] = k.detach().transpose(1, 2)  # (B, T, KV, D), the shape of an indexed write
            self.v[b, :, pos] = v.detach().transpose(1, 2)
            self.rows, self.filled = B, None
            return self.k[:B], self.v[:B]
        end = start_pos + T
        self.k[:B, :, start_pos:end] = k.detach()
        self.v[:B, :, start_pos:end] = v.detach()
        self.rows, self.filled = B, end
        return self.k[:B, :, :end], self.v[:B, :, :end]

    def check(self, start_pos, B, T):
        """Raise ValueError if B rows of T positions cannot be stored at start_pos. Changes nothing."""
        tensor = isinstance(start_pos, torch.Tensor)
        if tensor and start_pos.shape not in ((), (B, 1)):
            raise ValueError(f"start_pos has the shape {tuple(start_pos.shape)}: it must be () or ({B}, 1)")
        if B > self.batch_size:
            raise ValueError(f"a batch of {B} rows does not fit a cache of {self.batch_size} (max_batch_size): "
                             f"use fewer rows or a larger max_batch_size")
        if not tensor and start_pos not in (0, self.filled):
            stored = "an unknown number of" if self.filled is None else self.filled
            raise ValueError(f"start_pos={start_pos}, but {stored} positions are stored: continue at that position, "
                             f"rewind() to an earlier one, or start again at start_pos=0")
        if T + (0 if tensor else start_pos) > self.length:
            raise ValueError(f"start_pos={start_pos} and {T} new positions overflow a cache of {self.length}: "
                             f"generate less or raise block_size")
        if (tensor or start_pos > 0) and self.rows not in (0, B):
            raise ValueError(f"the batch changed from {self.rows} rows to {B} at start_pos={start_pos}: "
                             f"start again at start_pos=0")

    def rewind(self, filled):
        """Forget every position from `filled` on. Raises ValueError if fewer are stored."""
        stored = self.length if self.filled is None else self.filled
        if not 0 <= filled <= stored:
            raise ValueError(f"cannot rewind to position {filled}: {stored} positions are stored")
        if self.k is not None:
            self.k[: self.rows, :, filled : self.filled] = 0
            self.v[: self.rows, :, filled : self.filled] = 0
        self.filled = filled
        self.rows = self.rows if filled else 0

    @torch.inference_mode(False)  # a buffer born in inference mode could never be written outside it
    def _allocate(self, k):
        shape = self.batch_size, k.size(1), self.length, k.size(3)
        self.k = torch.zeros(shape, dtype=k.dtype, device=k.device)
        self.v = torch.zeros_like(self.k)

    @staticmethod
    def _layout(x):
        return f"{x.size(1)} heads of {x.size(3)}, {x.dtype}, {x.device}"


class MemoryCache:
    """
    What cross-attention keeps of a source: the keys and values of its memory, projected once, and which of them count.

    k, v: (B, KV, N, D). lengths: (B,) or None. `of` tells whether they come from this very memory, so that another
    source can never meet them.
    """

    def __init__(self, memory, lengths, k, v):
        self.memory, self.version = weakref.ref(memory), version(memory)
        self.lengths, self.k, self.v = lengths, k.detach(), v.detach()

    def of(self, memory, lengths):
        """Whether memory and lengths, where they are given, are those that are stored, not changed since."""
        same = memory is None or (self.memory and self.memory() is memory and version(memory) == self.version)
        return same and (lengths is None or self.lengths is not None and torch.equal(lengths, self.lengths))

    def __getstate__(self):
        return self.__dict__ | {"memory": None}  # a reference cannot be pickled: a copy knows no memory by sight


def version(x):
    """How often a tensor was written in place; tensors of inference mode do not count that."""
    return None if x.is_inference() else x._version


@contextmanager
def in_step(layers, start_pos, B, T):
    """
    Let a stack of attention layers store the same positions of the same text: if one of them fails, those before it
    forget. What cannot be stored is refused here, before any layer runs. A text that a failed call at start_pos=0
    was about to replace is lost.
    """
    before = {layer: layer.cache for layer in layers}
    for cache in before.values():
        if isinstance(cache, KVCache):
            cache.check(start_pos, B, T)
    try:
        yield
    except BaseException:
        for layer, cache in before.items():
            if isinstance(layer, CrossAttention):
                layer.cache = cache
            elif layer.cache is not None and not isinstance(start_pos, torch.Tensor):
                layer.cache.rewind(min(start_pos, layer.cache.filled))  # a step at tensor positions just rewrites them
        raise


# -----------------------------------------------------------------------------


class Attention(nn.Module):
    """
    What the three roles have in common: heads are split, attended to and merged, then projected by c_proj.

    config needs n_embd, n_head, n_kv_head (None = n_head), attn_pdrop and resid_pdrop; causal self-attention also
    max_batch_size and block_size, the size of the cache that it makes for itself if it is given none.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_head if config.n_kv_head is None else config.n_kv_head
        if config.n_embd % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={self.n_head}, "
                             f"and n_head of n_kv_head={self.n_kv_head}")
        self.head_dim = config.n_embd // self.n_head
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.cache = None

    @property
    def cache_k(self):
        """The stored keys (max_batch_size, KV, block_size, D), None before the first cached call."""
        return None if self.cache is None else self.cache.k

    @property
    def cache_v(self):
        """The stored values, as cache_k."""
        return None if self.cache is None else self.cache.v

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, n * D) -> (B, n, T, D)

    def output(self, q, k, v, mask=None, is_causal=False):
        y = attend(q, k, v, mask, is_causal, self.attn_pdrop if self.training else 0.0)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)


class SelfAttention(Attention):
    """Bidirectional self-attention, as in an encoder: every position sees every position of its row."""

    def __init__(self, config):
        super().__init__(config)
        # queries, keys and values of all heads in one matrix: one large product instead of three small ones
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def qkv(self, x):
        H, KV, D = self.n_head, self.n_kv_head, self.head_dim
        q, k, v = self.c_attn(x).split([H * D, KV * D, KV * D], dim=-1)
        return self.heads(q), self.heads(k), self.heads(v)  # (B, H, T, D), (B, KV, T, D), (B, KV, T, D)

    def forward(self, x, lengths=None):
        """x: (B, T, C) -> (B, T, C). lengths: (B,) tokens that count per row, None for all of them."""
        q, k, v = self.qkv(x)
        pos = torch.arange(x.size(1), device=x.device)
        mask = None if lengths is None else dense(within(lengths), pos, pos, x.size(0))  # (B, 1, 1, T)
        return self.output(q, k, v, mask)


class CausalSelfAttention(SelfAttention):
    """
    Causal self-attention, as in a decoder, with a cache for incremental decoding.

    *Prefill*: the prompt enters at once with start_pos=0; its keys and values are stored. *Decode*: every further
    call passes only the new token(s) with start_pos = the number of tokens before them; their queries attend to
    everything stored. The output has the length of the input, whatever is stored.
    """

    def __init__(self, config):
        super().__init__(config)
        self.max_batch_size, self.block_size = config.max_batch_size, config.block_size

    def forward(self, x, use_kv_cache=False, start_pos=0):
        """
        x: (B, T, C) at positions start_pos.. -> (B, T, C). start_pos: int, or a tensor () or (B, 1); see KVCache.
        Raises ValueError where the cache does, and on a start_pos other than 0 without a cache.
        """
        T = x.size(1)
        q, k, v = self.qkv(x)
        if use_kv_cache:
            if self.cache is None:
                self.cache = KVCache(self.max_batch_size, self.block_size)
            k, v = self.cache.update(start_pos, k, v)  # (B, KV, S, D)
        elif isinstance(start_pos, torch.Tensor) or start_pos != 0:
            raise ValueError(f"start_pos={start_pos} needs use_kv_cache=True: without a cache nothing precedes x")
        S = k.size(2)
        if S == T:  # queries and keys are the same positions: the kernel knows this mask without being given it
            return self.output(q, k, v, is_causal=True)
        if T == 1 and not isinstance(start_pos, torch.Tensor):  # the newest position sees all that is stored
            return self.output(q, k, v)
        query_pos = start_pos + torch.arange(T, device=x.device)  # (T,) or (B, T)
        return self.output(q, k, v, dense(causal, query_pos, torch.arange(S, device=x.device)))


class CrossAttention(Attention):
    """
    Attention of a decoder to the encoder's output ("memory"). Its keys and values depend on the source alone, so with
    a cache they are projected once per source: memory given, project it (and store); memory absent, read the cache.
    """

    def __init__(self, config):
        super().__init__(config)
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_kv = nn.Linear(config.n_embd, 2 * self.n_kv_head * self.head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, memory=None, lengths=None, use_kv_cache=False):
        """
        x: (B, T, C), memory: (B, N, C) -> (B, T, C). lengths: (B,) memory positions that count per row.
        Raises ValueError if there is neither a memory nor a stored one, or if the stored one has another batch size.
        """
        if memory is not None:
            k, v = (self.heads(y) for y in self.c_kv(memory).chunk(2, dim=-1))  # (B, KV, N, D)
            if use_kv_cache:
                self.cache = MemoryCache(memory, lengths, k, v)
        elif use_kv_cache and self.cache is not None:
            k, v, lengths = self.cache.k, self.cache.v, self.cache.lengths
        else:
            raise ValueError("there is no memory to attend to: pass memory, or use_kv_cache=True after a call with one")
        if k.size(0) != x.size(0):
            raise ValueError(f"{x.size(0)} rows attend to a memory of {k.size(0)}: encode a source for each row")
        pos = torch.arange(k.size(2), device=x.device)
        mask = None if lengths is None else dense(within(lengths), pos[:1], pos, x.size(0))  # (B, 1, 1, N)
        return self.output(self.heads(self.c_q(x)), k, v, mask)
