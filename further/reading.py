"""
What a compiler of decode steps is given: attention and products of a single row, each in the form it does best with.

    python bench.py decode --random gpt2 --dtype bfloat16 --prompt-tokens 32 --max-new-tokens 256 --num-samples 64 \\
        --compile

What a compiled step attends to is as long as the room there is, since its shapes may not change; a mask says how much
of that counts. On a GPU PyTorch's kernels read everything and apply the mask afterwards. The kernel here looks at the
mask first: of a tile of keys that nobody may see, it reads neither keys nor values. It takes any mask: rows at places
of their own, padded sources, a window. One pass over the tiles keeps a running maximum, sum and result (Milakov and
Gimelshein 2018; Dao et al. 2022, algorithm 1).

On a CPU PyTorch's kernel is made for many queries, too, and is a call of its own. For a single one the equation is
written out: loops, of which the compiler makes C++, that read keys and values once and fuse with what is around them.

So are products of a single row. On a CPU there is more to gain than calls. A core fetches ahead where it reads: not
far, but in several places at a time. Who goes through a matrix from its beginning to its end, as a library does, gets
22 GB/s from a memory that gives the same two cores 28, if they read eight places of the matrix side by side.

A model takes part as a copy of its modules, around the same weights, whose patterns and linears are the ones below:
attention.py stays as it is.
"""

from __future__ import annotations  # as in kernels.py

from copy import deepcopy

import torch
from torch import nn

from attention import Causal, Everything, dense
from further.kernels import jit, look, triton, up
from further.quantize import Int8Linear
from plumbing.products import LARGE, InParts, Several, Widened

if triton:
    import triton.language as tl

PLACES = 8  # where a CPU's core reads a large matrix at the same time


@jit
def one_query(q, keys, values, seen, y, S, q_row, q_head, of_row, of_head, of_key, seen_row, H: tl.constexpr,
              KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """y (B, H, D): what a query of each head of each row finds. A program does one. seen: (1 or B, S) bool."""
    head, row, d = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, D)
    Q = tl.load(q + row * q_row + head * q_head + d[None]).to(tl.float32) * D**-0.5
    at = row * of_row + head // (H // KV) * of_head + d[None]
    top, total, out, first = -1e30, 0.0, tl.zeros((D,), tl.float32), 0
    while first < S:
        s = first + tl.arange(0, TILE)[:, None]
        sees = tl.load(seen + row * seen_row + s, mask=s < S, other=0) != 0
        if tl.max(sees.to(tl.int32)) > 0:  # else nothing of this tile is read
            K = tl.load(keys + at + s * of_key, mask=sees, other=0.0)
            V = tl.load(values + at + s * of_key, mask=sees, other=0.0)
            top, total, out = look(K, V, Q, sees, top, total, out)
        first += TILE
    tl.store(y + (row * H + head) * D + d, (out / total).to(y.dtype.element_ty))


def attend_one(q, k, v, mask, tile):
    """
    What attend() does, for a single query of every row: q (B, H, 1, D), k and v (B, KV, S, D) laid out alike, mask
    (1 or B, 1, 1, S) -> (B, H, 1, D). Every query must be allowed at least one key. D is a power of two. tile: how many
    keys a program looks at together, 32 for each of its warps.
    """
    (B, H, _, D), (_, KV, S, _) = q.shape, k.shape
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    one_query[H, B](q, k, v, mask, y, S, *q.stride()[:2], *k.stride()[:3], mask.stride(0) if len(mask) > 1 else 0,
                    H=H, KV=KV, D=D, TILE=tile, num_warps=tile // 32)
    return y


def written_out(q, k, v, mask):
    """The same, as loops for a compiler, where attend_explicit() has products: sums are in fp32 at least."""
    (B, H, _, D), KV = q.shape, k.size(1)
    products = q.view(B, KV, H // KV, 1, D) * k[:, :, None]
    scores = products.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)) * D**-0.5  # (B, KV, H / KV, S)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2).to(q.dtype).view(B, H, 1, D)


class Read:
    """A pattern whose single queries are answered by one(q, k, v, mask); those of more are the pattern's own."""

    def forward(self, q, k, v, query_pos, key_pos):
        if q.size(2) > 1:
            return super().forward(q, k, v, query_pos, key_pos)
        return self.one(q, k, v, dense(self.allows, query_pos, key_pos))


class ReadCausal(Read, Causal):
    def one(self, *args):
        return attend_one(*args, 64)   # of some hundred keys: all heads of 64 rows at once on an H200, 13 us, by 128 18


class ReadEverything(Read, Everything):
    def one(self, *args):
        return attend_one(*args, 128)  # of a thousand, a source: more of them under way, 37 us where 64 take 45


class WrittenCausal(Read, Causal):
    def one(self, *args):
        return written_out(*args)


class WrittenEverything(Read, Everything):
    def one(self, *args):
        return written_out(*args)


class OneRow(nn.Linear):
    """A linear that writes out the product of a single row. What a library has is made for many, and fuses nothing."""

    def forward(self, x):
        if x.numel() > self.in_features:
            return super().forward(x)
        y = (self.weight * x.flatten()).sum(-1) if x.is_cuda else side_by_side(self.weight, x.flatten())  # (out,)
        return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)


class OneRowOfWhole(Int8Linear):
    """The same of whole numbers: nothing else is rounded."""

    def traced(self, rows):
        return super().traced(rows) if len(rows) > 1 else side_by_side(self.weight, rows.flatten())[None]


def side_by_side(weight, x):
    """weight (out, in) times x (in,), in fp32 at least: sums of parts of it, which a compiler makes one loop."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x = x.to(exact).as_strided(x.shape, x.stride())  # a view needs memory: else every row computes its input again
    places = PLACES if weight.numel() >= LARGE else 1
    parts = weight.split(max(1, len(weight) // places))  # and what is left over
    return torch.cat([(part.to(exact) * x).sum(-1) for part in parts])


def reading(model):
    """The model whose decode steps use these, where they can: a copy around the same weights."""
    head_dim, cuda = model.config.n_embd // model.config.n_head, model.wte.weight.is_cuda
    if not cuda:
        ours = {Causal: WrittenCausal, Everything: WrittenEverything, Int8Linear: OneRowOfWhole}
        ours |= dict.fromkeys((nn.Linear, InParts, Several, Widened), OneRow)
    elif triton and head_dim == up(head_dim):
        ours = {Causal: ReadCausal, Everything: ReadEverything, nn.Linear: OneRow}
    else:
        return model
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, shared | {id(model.cache): None, id(model.source): None})  # without a text of its own
    with torch.inference_mode(False), torch.no_grad():
        for module in copy.modules():
            module.__class__ = ours.get(type(module), type(module))
            if isinstance(module, OneRow) and not (cuda or module.weight.is_contiguous()):  # as GPT-2's file has them
                module.weight = nn.Parameter(module.weight.contiguous(), requires_grad=False)
    return copy
