"""
Attention in three roles: causal self-attention (a decoder), bidirectional (an encoder), cross-attention (between them).

The whole code rests on one idea: *positions are explicit and absolute; a mask is a predicate over positions; a cache
is a buffer indexed by positions.* `start_pos + arange(T)` covers a whole sequence (start 0), a chunk after a prefix, a
single decoded token, and a batch whose rows are at different places (one start per row).

Shapes: B batch, T new (query) positions, S stored (key) positions, C n_embd, H n_head, D head_dim = C / H,
KV n_kv_head (H for multi-head; fewer for grouped-query; 1 for multi-query attention).

With cache.py this file can be lifted into other code: a config needs n_embd and n_head, and may have n_kv_head,
attn_pdrop, resid_pdrop, max_batch_size and block_size.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from cache import KVCache, Slots, passing

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
    B, H, T, D = q.shape
    group = H // k.size(1)
    if group == 1 or q.is_cuda or (is_causal and T > 1):  # on CUDA the kernels read a shared head once by themselves
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, enable_gqa=group > 1)
    if mask is not None:  # (b, 1 or H, T, S) -> (b, 1 or KV, group * T, S)
        mask = mask.expand(-1, max(mask.size(1), group), T, -1).flatten(1, 2).unflatten(1, (-1, group * T))
    q = q.reshape(B, -1, group * T, D)  # elsewhere, if the queries that share it are rows of one product
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p).view(B, H, T, -1)


# -----------------------------------------------------------------------------
# Causal self-attention


class Attention(nn.Module):
    """What the three roles have in common: heads are split, attended to by `pattern`, and merged again."""

    def __init__(self, config, pattern):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = head_sizes(config)
        self.pattern = pattern(getattr(config, "attn_pdrop", 0.0))
        self.resid_dropout = Dropout(getattr(config, "resid_pdrop", 0.0))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, n * D) -> (B, n, T, D)

    def output(self, y):
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, H, T, D) -> (B, T, C)


class SelfAttention(Attention):
    """Bidirectional self-attention, as in an encoder: every position sees every position of its row."""

    def __init__(self, config, pattern=None):
        super().__init__(config, pattern or Everything)
        # queries, keys and values of all heads in one matrix: one large product instead of three small ones
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def qkv(self, x):
        H, KV = self.n_head, self.n_kv_head
        return self.heads(self.c_attn(x)).split([H, KV, KV], dim=1)  # (B, H, T, D), (B, KV, T, D), (B, KV, T, D)

    def forward(self, x, pos, key_pos):
        """x: (B, T, C) at positions pos (T,) -> (B, T, C). key_pos: the same, or (B, T) where rows are padded."""
        return self.output(self.pattern(*self.qkv(x), pos, key_pos))


class CausalSelfAttention(SelfAttention):
    """
    Causal self-attention, as in a decoder, with a cache for incremental decoding.

    *Prefill*: the prompt enters at once with start_pos=0; its keys and values are stored. *Decode*: every further
    call passes only the new token(s) with start_pos = the number of tokens before them; their queries attend to
    everything stored. The output has the length of the input, whatever is stored.
    """

    def __init__(self, config, layer=0, pattern=None):
        super().__init__(config, pattern or Causal)
        self.layer = layer  # which layer of a decoding's cache is ours
        self.size = getattr(config, "max_batch_size", 64), getattr(config, "block_size", 1024)
        self.cache = None   # our own, when we stand alone
        self.shown = None   # that of the model around us, to be looked at

    def forward(self, x, use_kv_cache=False, start_pos=0, pos=None, cache=None):
        """
        x: (B, T, C) -> (B, T, C). A model passes the positions pos, (T,) or (B, T), and the cache of a decoding or
        None; a layer on its own takes use_kv_cache and start_pos, see alone().
        """
        if pos is None:
            return self.alone(x, use_kv_cache, start_pos)
        q, k, v = self.qkv(x)
        key_pos = pos
        if cache is not None:
            k, v, key_pos = self.pattern.keep(cache, self.layer, pos, k, v)  # (B, KV, S, D) twice, and (S,)
        return self.output(self.pattern(q, k, v, pos, key_pos))

    def alone(self, x, use_kv_cache, start_pos):
        """
        Outside a model, a layer keeps a cache for itself. start_pos: an int (what is stored, or 0 to start afresh), a
        list of one per row, or a tensor. Raises ValueError on a gap, an overflow or another batch: see passing().
        """
        if use_kv_cache and self.cache is None:
            self.cache = keeping([self.pattern] * (self.layer + 1), *self.size)
        cache = self.cache if use_kv_cache else None
        with passing(cache, start_pos, x, block_size=math.inf) as pos:
            return self.forward(x, pos=pos, cache=cache)  # not self(...): a hook has been called already

    @property
    def cache_k(self):
        """The stored keys (max_batch_size, KV, block_size, D), zeros where unwritten; None before a cached call."""
        cache = self.shown or self.cache
        return cache and cache.k[self.layer]

    @property
    def cache_v(self):
        """The stored values, as cache_k."""
        cache = self.shown or self.cache
        return cache and cache.v[self.layer]


# -----------------------------------------------------------------------------
# Cross-attention


class CrossAttention(Attention):
    """Attention of a decoder to an encoder's output. Its keys and values depend on the source alone: project() once."""

    def __init__(self, config):
        super().__init__(config, Everything)
        self.c_q = nn.Linear(config.n_embd, config.n_embd)
        self.c_kv = nn.Linear(config.n_embd, 2 * self.n_kv_head * self.head_dim)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def project(self, encoded):
        """(B, N, C) -> keys and values, (B, KV, N, D) each."""
        k, v = self.heads(self.c_kv(encoded)).chunk(2, dim=1)
        if k.is_cuda:  # whose heads are read all at once, wherever they lie
            return k, v
        return k.contiguous(), v.contiguous()  # elsewhere one by one, by every step: what lies together comes sooner

    def forward(self, x, k, v, key_pos):
        """
        x: (B n, T, C); k, v of B sources, key_pos as in key_positions() -> (B n, T, C). n neighbouring rows (beams,
        samples) ask one source, which is no more to attention than n T queries. Raises ValueError on other numbers.
        """
        if x.size(0) % k.size(0):
            raise ValueError(f"{x.size(0)} rows attend to a memory of {k.size(0)}: encode a source for each row")
        q = self.heads(self.c_q(x).reshape(k.size(0), -1, x.size(2)))  # (B, H, n T, D)
        return self.output(self.pattern(q, k, v, None, key_pos)).view_as(x)  # where queries stand means nothing here


# -----------------------------------------------------------------------------
# Masks. A predicate (batch, head, query_pos, key_pos) -> bool says who may attend to whom: True = may attend.
# The signature is FlexAttention's mask_mod, so the same functions can drive a block-sparse kernel.

NOWHERE = 2**31 - 1  # the position of a key that does not count, such as padding: everybody's future


def key_positions(x, lengths=None):
    """
    The positions of the keys of sources x, (B, N) or (B, N, C): (N,), or (B, N) where rows are padded. lengths: (B,),
    how many of the N count in each row, None for all. Raises ValueError on a length outside 1..N, or other than B.
    """
    B, N = x.shape[:2]
    pos = torch.arange(N, device=x.device)
    if lengths is None:
        return pos
    if len(lengths) != B or not (1 <= lengths.min() and lengths.max() <= N):
        raise ValueError(f"source_lengths={lengths.tolist()} must be {B} numbers between 1 and the width {N}")
    return pos.where(pos < lengths[:, None], NOWHERE)


def dense(predicate, query_pos, key_pos, n_head=1):
    """
    A predicate as a boolean tensor, (B or 1, H or 1, T, S): axes that the predicate ignores stay 1 and broadcast.
    query_pos: (T,), or (B, T) when rows are at different places, or None where it means nothing. key_pos: (S,) or
    (B, S).
    """
    q = None if query_pos is None else query_pos.view(-1, 1, query_pos.size(-1), 1)
    k = key_pos.view(-1, 1, 1, key_pos.size(-1))
    b = torch.arange(max(len(x) for x in (q, k) if x is not None), device=k.device).view(-1, 1, 1, 1)
    h = torch.arange(n_head, device=k.device).view(1, -1, 1, 1)
    return predicate(b, h, q, k)


# -----------------------------------------------------------------------------
# Patterns: parameterless modules that turn q, k, v and their positions into (B, H, T, D). All that an attention
# computes passes through one, so a hook here sees everything, and another kind of attention is another module here.


class Dropout(nn.Dropout):
    """
    On in train mode where gradients are recorded. Recording belongs to a thread, train() to the model, so generating
    needs no eval(), and disturbs nobody who trains or generates beside it.
    """

    @property
    def rate(self):
        return self.p if self.training and torch.is_grad_enabled() else 0.0

    def forward(self, x):
        return F.dropout(x, self.rate) if self.rate else x


class Everything(Dropout):
    """Every query sees every key that counts."""

    @staticmethod
    def allows(b, h, q, k):
        return k < NOWHERE

    def forward(self, q, k, v, query_pos, key_pos):
        mask = None if key_pos.dim() == 1 else dense(self.allows, query_pos, key_pos)  # (B, 1, 1, S)
        return attend(q, k, v, mask, dropout_p=self.rate)


class Causal(Dropout):
    """A query sees its own position and what lies before it."""

    @staticmethod
    def allows(b, h, q, k):
        return k <= q

    def slots(self, length):
        """Where a text of that length is kept, one for each part of the heads that is kept alike: here all of it."""
        return [Slots(length)]

    def reads(self, S, length):
        """How many keys a decode step reads where S positions are stored, of a text of that length."""
        [slots] = self.slots(length)
        return slots.size if slots.evicts else S

    def keep(self, cache, layer, pos, k, v):
        """Store in a layer of a KVCache, and return what update() does."""
        return cache.update(layer, pos, k, v)

    def forward(self, q, k, v, query_pos, key_pos):
        T, S = q.size(2), k.size(2)
        if query_pos.dim() == 1 and T in (1, S):  # all rows alike: the queries are the last T of the S keys, so that
            return attend(q, k, v, None, T == S, self.rate)  # a single one sees all, and the kernel knows the square
        return attend(q, k, v, dense(self.allows, query_pos, key_pos), False, self.rate)  # (1 or B, 1, T, S)


def keeping(patterns, batch_size, length):
    """A KVCache for the layers that have these patterns."""
    each = [pattern.slots(length) for pattern in patterns]
    parts = max(map(len, each))  # of heads, in the layer that has most
    slots = [own[part] if part < len(own) else Slots(length) for part in range(parts) for own in each]
    return KVCache(batch_size, length, len(patterns), slots)


def head_sizes(config):
    """(H, KV, D) of a configuration; n_kv_head may be None or absent. Raises ValueError if they do not divide."""
    H, KV = config.n_head, getattr(config, "n_kv_head", None) or config.n_head
    if config.n_embd % H or H % KV:
        raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={H}, and n_head of n_kv_head={KV}")
    return H, KV, config.n_embd // H
