"""
Sparse attention: each position sees a part of its past, at a cost of O(n w) or O(n sqrt(n)) instead of O(n^2).

A mask alone saves nothing: the scores that it hides are computed all the same. So every pattern here is two things: a
predicate over positions, allows(), which defines it; and a fold, which brings together what may see each other (blocks
or residue classes of positions become rows of the batch) so that ordinary attention on the folds computes no more than
is needed. The tests hold each against the masked form. A pattern also says where a decoding keeps its positions: what
no later query can see is evicted (slots()), so a decode step reads little as well.

Local windows are those of Longformer (Beltagy et al. 2020) and Mistral, with sinks those of Xiao et al. 2023, whose
renumbering of positions we do not follow: ours are absolute. Strided and Fixed are those of Child et al. 2019,
"Generating long sequences with sparse transformers", section 4: static, both of them. TopK asks the content, so what
it sees is learned with the keys; learned otherwise is the sparse attention of LLMs-from-scratch, by a network of its
own that ranks the keys.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from attention import Causal, attend, dense
from cache import Slots
from evict import Ring, Summaries

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what attend() calls there, with its sums
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# -----------------------------------------------------------------------------
# Folds. n positions, from 0 on, as blocks of `width`, the last one filled up: what is added lies in everybody's future.


def blocks(x, width):
    """(B, H, n, D) -> (B, H, n / width rounded up, width, D)."""
    return F.pad(x, (0, 0, 0, -x.size(2) % width)).unflatten(2, (-1, width))


def with_previous(x):
    """Blocks (B, H, nb, width, D), each behind the one before it: (B, H, nb, 2 width, D); the first is behind zeros."""
    return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], 3)


def attend_blocks(q, k, v, allowed, rate):
    """Attention within blocks: q (B, H, nb, T, D), k and v (B, KV, nb, S, D), allowed (nb, T, S) -> (B, H, nb T, D)."""
    B, _, nb, T, _ = q.shape
    mask = None if allowed is None else allowed.repeat(B, 1, 1)[:, None]  # (B nb, 1, T, S)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # blocks are rows of the batch
    return attend(q, k, v, mask, allowed is None, rate).unflatten(0, (B, nb)).transpose(1, 2).flatten(2, 3)


class Joined(torch.autograd.Function):
    """
    One softmax over two sets of keys, from an attention to each, on a CPU: (B n, H, l, D). A kernel knows the logarithm
    of its sum of exponentials, which says what its part weighs in the whole (Dao et al. 2022, section 3.1); backward,
    told the output and the sum of the whole, it finds the gradients of its part.

    parts: q, k, v of n blocks, (B n, H, l or 2 l, D), and of l residue classes, (B l, H, n - 1, D): the first block has
    nothing behind it. The mask is added to the scores of the blocks; the classes are causal.
    """

    @staticmethod
    def forward(ctx, mask, *parts):
        near, sum_near = KERNEL(*parts[:3], attn_mask=mask)
        l = near.size(2)
        far, sum_far = (x.unflatten(0, (-1, l)) for x in KERNEL(*parts[3:], is_causal=True))  # (B, l, H, n - 1, ...)
        far, sum_far = (torch.cat([torch.full_like(x[:, :, :, :1], none), x], 3).transpose(1, 3).flatten(0, 1)
                        for x, none in ((far, 0.0), (sum_far, -torch.inf)))
        total = torch.logaddexp(sum_near, sum_far)
        weights = (x.sub(total).exp()[..., None].to(near.dtype) for x in (sum_near, sum_far))
        y = near * next(weights) + far * next(weights)
        ctx.save_for_backward(mask, *parts, y, total)
        return y

    @staticmethod
    def backward(ctx, grad):
        mask, *parts, y, total = ctx.saved_tensors
        near = BACKWARD(grad, *parts[:3], y, total, 0.0, False, attn_mask=mask)
        n = parts[3].size(2) + 1
        whole = [x.unflatten(0, (-1, n)).transpose(1, 3)[:, :, :, 1:].flatten(0, 1) for x in (grad, y, total)]
        return None, *near, *BACKWARD(whole[0], *parts[3:], *whole[1:], 0.0, True)


def gathered(x, at):
    """The keys or values (B, KV, W, D) at places (B, KV, W) of x, (B, KV, S, D)."""
    b, h = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return x[b[:, None, None], h[:, None], at]


# -----------------------------------------------------------------------------
# Patterns


class Sparse(Causal):
    """
    What the patterns share: a whole text is folded. What comes behind a prefix, a chunk or a token, is attended to with
    a mask, since the keys are few: those that the cache still has.
    """

    def forward(self, q, k, v, query_pos, key_pos):
        T, S = q.size(2), k.size(2)
        if query_pos.dim() == 1 and T == S > 1:
            return self.fold(q, k, v)[:, :, :T]
        if T == 1:
            return self.step(q, k, v, query_pos, key_pos)
        return attend(q, k, v, dense(self.allows, query_pos, key_pos), False, self.rate)

    def step(self, q, k, v, query_pos, key_pos):
        return attend(q, k, v, dense(self.allows, query_pos, key_pos), False, self.rate)


class Local(Sparse):
    """The newest `window` positions, one's own included, and the first `sinks`."""

    def __init__(self, window, sinks=0, p=0.0):
        super().__init__(p)
        self.window, self.sinks = window, sinks

    def allows(self, b, h, q, k):
        return (k <= q) & ((q - k < self.window) | (k < self.sinks))

    def slots(self, length):
        size = self.sinks + self.window
        return [Ring(size, self.window, self.sinks) if size < length else Slots(length)]

    def fold(self, q, k, v):
        w, device = self.window, q.device
        sinks = [x[:, :, None, : self.sinks] for x in (k, v)]
        q, k, v = (blocks(x, w) for x in (q, k, v))
        nb, at = q.size(2), torch.arange(w, device=device)
        own = torch.arange(nb, device=device)[:, None] * w  # where each block starts
        query_pos, key_pos = own + at, own + torch.arange(-w, w, device=device)
        allowed = self.allows(0, 0, query_pos[:, :, None], key_pos[:, None]) & (key_pos >= self.sinks)[:, None]
        k, v = with_previous(k), with_previous(v)
        if self.sinks:
            k, v = (torch.cat([s.expand(-1, -1, nb, -1, -1), x], 3) for s, x in zip(sinks, (k, v)))
            first = torch.arange(sinks[0].size(3), device=device)
            allowed = torch.cat([first <= query_pos[:, :, None], allowed], 2)
        return attend_blocks(q, k, v, allowed, self.rate)


class Block(Sparse):
    """One's own block of `stride` positions: the first kind of head of the fixed pattern."""

    def __init__(self, stride, p=0.0):
        super().__init__(p)
        self.stride = stride

    def allows(self, b, h, q, k):
        return (k <= q) & (k // self.stride == q // self.stride)

    def slots(self, length):
        return [Ring(self.stride, self.stride) if self.stride < length else Slots(length)]

    def fold(self, q, k, v):
        return attend_blocks(*(blocks(x, self.stride) for x in (q, k, v)), None, self.rate)


class Fixed(Sparse):
    """
    One's own block of `stride` positions, and the last `columns` of every block before it, which sum it up (Child et
    al. 2019, the fixed pattern, merged into one softmax).
    """

    def __init__(self, stride, columns, p=0.0):
        super().__init__(p)
        self.stride, self.columns = stride, columns

    def allows(self, b, h, q, k):
        return (k <= q) & ((k // self.stride == q // self.stride) | (k % self.stride >= self.stride - self.columns))

    def slots(self, length):
        size = -(-length // self.stride) * self.columns + self.stride - self.columns
        return [Summaries(size, self.stride, self.columns) if size < length else Slots(length)]

    def fold(self, q, k, v):
        l, c, device = self.stride, self.columns, q.device
        q, k, v = (blocks(x, l) for x in (q, k, v))
        nb = q.size(2)
        start = torch.arange(nb, device=device)[:, None] * l
        own = start + torch.arange(l, device=device)  # (nb, l) positions
        summary = own[:, l - c :].flatten()
        before = (summary < start)[:, None]  # (nb, 1, nb c)
        allowed = torch.cat([before & self.allows(0, 0, own[:, :, None], summary),
                             self.allows(0, 0, own[:, :, None], own[:, None])], 2)
        summed = [x[:, :, None, :, l - c :].flatten(3, 4).expand(-1, -1, nb, -1, -1) for x in (k, v)]
        k, v = (torch.cat(both, 3) for both in zip(summed, (k, v)))
        return attend_blocks(q, k, v, allowed, self.rate)


class Columns(Fixed):
    """The last `columns` positions of every block, and oneself: the second kind of head of the fixed pattern."""

    def allows(self, b, h, q, k):
        return (k <= q) & ((k == q) | (k % self.stride >= self.stride - self.columns))


class Strided(Sparse):
    """
    The newest `stride` positions and every stride-th before them (Child et al. 2019, merged into one softmax). Every
    position is seen again later, one in each stride, so nothing can be evicted; split over heads, the local half can.
    """

    def __init__(self, stride, p=0.0):
        super().__init__(p)
        self.stride = stride

    def allows(self, b, h, q, k):
        return (k <= q) & ((q - k < self.stride) | ((q - k) % self.stride == 0))

    def back(self, S, device):
        """How far behind a query its keys stand, at most, among S."""
        far = torch.arange(self.stride, max(S, self.stride), self.stride, device=device)
        return torch.cat([torch.arange(self.stride, device=device), far])

    def reads(self, S, length):
        return len(self.back(S, "cpu"))

    def step(self, q, k, v, query_pos, key_pos):
        """One position: its keys are gathered. They stand in their own slots."""
        want = query_pos[..., None, :].flatten(-2) - self.back(k.size(2), q.device)  # (W,) or (B, W)
        at = want.clamp(min=0)
        if want.dim() == 1:
            k, v = (x.index_select(2, at) for x in (k, v))
        else:
            k, v = (gathered(x, at.expand(len(x), -1)[:, None].expand(-1, x.size(1), -1)) for x in (k, v))
        return attend(q, k, v, (want >= 0).view(-1, 1, 1, want.size(-1)), False, self.rate)

    def fold(self, q, k, v):
        """Blocks for what is near, residue classes for what is far, and one softmax over both."""
        group, l, device = q.size(1) // k.size(1), self.stride, q.device
        q, k, v = (blocks(x, l) for x in (q, *(x.repeat_interleave(group, 1) for x in (k, v))))  # (B, H, n, l, D)
        i, j, block = (torch.arange(*ends, device=device) for ends in ((l,), (-l, l), (q.size(2),)))
        near = (j <= i[:, None]) & (i[:, None] - j < l) & (block[:, None, None] * l + j >= 0)  # (n, l, 2l)
        same = q.size(4) == v.size(4)  # who shows the weights passes unit vectors, which are wider
        if device.type == "cpu" and not self.rate and len(block) > 1 and same:  # twice as fast as what follows
            mask = torch.zeros(near.shape, dtype=q.dtype).masked_fill(~near, -torch.inf).repeat(len(q), 1, 1)[:, None]
            by_block = [x.transpose(1, 2).flatten(0, 1) for x in (q, with_previous(k), with_previous(v))]
            by_class = [x.permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (q[:, :, 1:], k[:, :, :-1], v[:, :, :-1])]
            return Joined.apply(mask, *by_block, *by_class).unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)
        q = q / math.sqrt(q.size(4))
        far = block[:, None] > block  # (n, n): what is in the window as well is counted there
        by_class = lambda x: x.transpose(2, 3)  # (B, H, n, l, ...) <-> (B, H, l, n, ...)
        a = (q @ with_previous(k).transpose(-1, -2)).masked_fill(~near, -torch.inf)  # (B, H, n, l, 2l)
        b = (by_class(q) @ by_class(k).transpose(-1, -2)).masked_fill(~far, -torch.inf)  # (B, H, l, n, n)
        top = torch.maximum(a.amax(-1, keepdim=True), by_class(b.amax(-1, keepdim=True))).detach()
        a, b = (a - top).exp(), (b - by_class(top)).exp()  # the largest is 1, so nothing overflows
        total = a.sum(-1, keepdim=True) + by_class(b.sum(-1, keepdim=True))
        a, b = (F.dropout(x, self.rate) for x in (a, b))
        return ((a @ with_previous(v) + by_class(b @ by_class(v))) / total).flatten(2, 3)


class Column(Strided):
    """Every stride-th position before oneself: the second kind of head of the strided pattern, Local the first."""

    def allows(self, b, h, q, k):
        return (k <= q) & ((q - k) % self.stride == 0)

    def back(self, S, device):
        return torch.arange(0, S, self.stride, device=device)

    def fold(self, q, k, v):
        q, k, v = (blocks(x, self.stride).transpose(2, 3) for x in (q, k, v))  # (B, H, stride, n, D)
        y = attend_blocks(q, k, v, None, self.rate)
        return y.unflatten(2, (self.stride, -1)).transpose(2, 3).flatten(2, 3)


COARSE = {torch.float64: torch.float32, torch.float32: torch.bfloat16}


class TopK(Sparse):
    """
    One's own block of `stride` positions, and whole blocks before it: the `best` whose last keys have the largest
    product with the query. So content decides, for each head and position anew, and no predicate over positions tells.
    A block is scored by one key that never changes, so it does not matter in which chunks a text enters.

    A decode step reads n / stride last keys and best + 1 blocks. For whole texts it is a mask over all scores, O(n^2):
    every query would need keys of its own to be copied, which takes longer than what it saves.
    """

    def __init__(self, stride, best=4, p=0.0):
        super().__init__(p)
        self.stride, self.best = stride, best

    def reads(self, S, length):
        n = S // self.stride
        return n + (min(self.best, n) + 1) * self.stride

    def choose(self, q, k, query_pos):
        """The blocks (B, H, T, best) that queries see beside their own; where there are not so many, some at random."""
        last = k[:, :, self.stride - 1 :: self.stride]  # (B, KV, n, D)
        scores = q @ last.repeat_interleave(q.size(1) // k.size(1), 1).transpose(-1, -2)  # (B, H, T, n)
        own = query_pos.view(-1, 1, query_pos.size(-1), 1) // self.stride
        later = torch.arange(last.size(2), device=q.device) >= own
        # at half their precision, so that rounding, which is another in a chunk than in a step, does not choose
        scores = scores.masked_fill(later, -torch.inf).to(COARSE.get(scores.dtype, scores.dtype))
        return scores.sort(descending=True, stable=True).indices[..., : self.best]  # of equals the earliest

    def forward(self, q, k, v, query_pos, key_pos):
        if q.size(2) == 1:
            return self.step(q, k, v, query_pos, key_pos)
        chosen = self.choose(q, k, query_pos)
        seen = torch.zeros(*chosen.shape[:-1], k.size(2) // self.stride + 1, dtype=torch.bool, device=q.device)
        seen = seen.scatter_(-1, chosen, True).repeat_interleave(self.stride, -1)[..., : k.size(2)]
        own = dense(lambda b, h, q, k: k // self.stride == q // self.stride, query_pos, key_pos)
        return attend(q, k, v, dense(self.allows, query_pos, key_pos) & (seen | own), False, self.rate)

    def step(self, q, k, v, query_pos, key_pos):
        """One position: the keys of its blocks are gathered, for every head its own. They stand in their own slots."""
        (B, H, _, D), KV, l = q.shape, k.size(1), self.stride
        own = (query_pos.view(-1, 1, 1, 1) // l).expand(B, H, 1, 1)
        found = torch.cat([self.choose(q, k, query_pos), own], -1)  # (B, H, 1, best + 1)
        want = (found[..., None] * l + torch.arange(l, device=q.device)).view(B, H, -1)  # (B, H, W) positions
        at = want.clamp(max=k.size(2) - 1).view(B, KV, -1)
        k, v = (gathered(x, at).view(B * H, 1, -1, x.size(3)) for x in (k, v))
        # a block that was taken for want of others is one's own, or later
        once = (found < own) | (torch.arange(found.size(-1), device=q.device) == found.size(-1) - 1)
        seen = once.repeat_interleave(l, -1).view(B, H, -1) & (want <= query_pos.view(-1, 1, 1))
        return attend(q.reshape(B * H, 1, 1, D), k, v, seen.view(B * H, 1, 1, -1), False, self.rate).view(B, H, 1, -1)


class Split(nn.Module):
    """Heads in as many equal parts as there are patterns, in order, each with a pattern, keys and slots of its own."""

    def __init__(self, parts, n_head):
        super().__init__()
        self.parts, self.heads = nn.ModuleList(parts), n_head // len(parts)

    def allows(self, b, h, q, k):
        seen = [part.allows(b, h, q, k) & (h // self.heads == i) for i, part in enumerate(self.parts)]
        return torch.stack(torch.broadcast_tensors(*seen)).any(0)

    def slots(self, length):
        return [slots for part in self.parts for slots in part.slots(length)]

    def reads(self, S, length):
        return sum(part.reads(S, length) for part in self.parts) / len(self.parts)  # of all heads' keys

    def keep(self, cache, layer, pos, k, v):
        n = len(self.parts)
        stored = [part.keep(cache, layer + i * cache.n_layer, pos, *new)
                  for i, (part, *new) in enumerate(zip(self.parts, k.chunk(n, 1), v.chunk(n, 1)))]
        return tuple(zip(*stored))  # what each part reads

    def forward(self, q, k, v, query_pos, key_pos):
        n = len(self.parts)
        if isinstance(k, torch.Tensor):  # nothing is stored
            k, v, key_pos = k.chunk(n, 1), v.chunk(n, 1), [key_pos] * n
        return torch.cat([part(*each, query_pos, at) for part, *each, at
                          in zip(self.parts, q.chunk(n, 1), k, v, key_pos)], 1)
