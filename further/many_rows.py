"""
The decode step of kernels.py for so many rows that multiplying is work: tensor cores, and products cut both ways.

    python -m further.kernel_bench --random gpt2 --rows 64

The weights are read once for all rows, so 64 of them cost little more than one, if only everything is busy. A product
of 64 rows and 768 x 768 weights takes 2 us on an H200 if 72 programs do it, 64 rows of the weight and 128 columns each;
the library's takes 3.8. What a program finds is then part of a sum. The kernel that comes next adds up these parts,
with bias and residual: it is the norm, which reads them anyway.

So a step is: embed, and for each sublayer norms(), products(), attention() where there is one, and products() in parts.
Everything else, as the early start of a kernel, is as kernels.py has it. Shapes as there, of 5 to 64 rows.
"""

from __future__ import annotations  # as in kernels.py

import torch

from further.kernels import Step, activated, jit, triton, up, wait

if triton:
    import triton.language as tl

TALL, WIDE = 64, 128  # rows and columns of a weight that a program multiplies at a time
BUSY = 132  # programs that keep a GPU busy: as many as an H200 has processors


@jit
def norms(stream, some, bias, gain, shift, x, EPS: tl.constexpr, KEEP: tl.constexpr, PARTS: tl.constexpr,
          B: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, PDL: tl.constexpr):
    """
    stream (B, C) plus the PARTS of a product in some (PARTS, B, C), and its bias: x is their norm, and the stream goes
    on as it, a BART's, or, with KEEP, as the sum. A program does one row.
    """
    row, c = tl.program_id(0), tl.arange(0, CP)
    G = tl.load(gain + c, mask=c < C, other=0.0).to(tl.float32)
    S = tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)
    if bias is not None:
        add = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    wait(PDL)
    stream += row * C + c
    X = tl.load(stream, mask=c < C, other=0.0)
    for part in tl.static_range(PARTS):
        X += tl.load(some + (part * B + row) * C + c, mask=c < C, other=0.0)
    if bias is not None:
        X += add
    apart = tl.where(c < C, X - tl.sum(X) / C, 0.0)
    normed = apart * tl.rsqrt(tl.sum(apart * apart) / C + EPS) * G + S
    tl.store(stream, X if KEEP else normed, mask=c < C)
    tl.store(x + row * C + c, normed.to(x.dtype.element_ty), mask=c < C)


@jit
def products(x, weight, scale, bias, y, which, N, GELU: tl.constexpr, B: tl.constexpr, BP: tl.constexpr,
             K: tl.constexpr, OWN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """
    y = [gelu] (x @ weight^T [* scale] [+ bias]), x (B, K), weight (N, K), y (B, N); where several programs have the
    same rows of the weight, OWN columns each, what each finds of the sums, y (parts, B, N); where `which` is given the
    largest of each BN of a row, and its index. Weights, which depend on nothing, are asked for early: they come as far
    as the L2 cache.
    """
    part, share, b = tl.program_id(0), tl.program_id(1), tl.arange(0, BP)
    n, k = part * BN + tl.arange(0, BN), tl.arange(0, BK)[None]
    W = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    if PDL:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
        for first in range(0, OWN, 16 * LINE):
            line = W + tl.minimum(share * OWN + first + tl.arange(0, 16) * LINE, K - 1)[None]
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line.to(tl.int64)],
                                      dtype=tl.int32, is_pure=False, pack=1)
    wait(PDL)
    r = tl.zeros((BN, BP), tl.float32)
    for first in range(0, OWN, BK):
        at = share * OWN + first + k
        w = tl.load(W + at, mask=at < K, other=0.0).to(x.dtype.element_ty)
        X = tl.load(x + b[:, None] * K + at, mask=(b[:, None] < B) & (at < K), other=0.0)
        r = tl.dot(w, tl.trans(X), r, input_precision="ieee")
    n = n[:, None]
    if scale is not None:
        r *= tl.load(scale + n, mask=n < N, other=0.0)
    if bias is not None:
        r += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    r = activated(r, GELU)
    if which is None:
        tl.store(y + (share * B + b[None]) * N + n, r.to(y.dtype.element_ty), mask=(b[None] < B) & (n < N))
    else:
        r = tl.where(n < N, tl.where(r == r, r, float("inf")), float("-inf"))  # as in product()
        most, found = tl.max(r, 0, return_indices=True)
        tl.store(y + b * tl.num_programs(0) + part, most, mask=b < B)
        tl.store(which + b * tl.num_programs(0) + part, part * BN + found, mask=b < B)


class ManyRows(Step):
    """A Step of 5 to 64 rows."""

    ROWS = range(5, 65)

    def __init__(self, model, ids, at, cache, *args, **options):
        B, C = len(ids), model.config.n_embd
        self.x = torch.empty(B, C, dtype=cache.k[0].dtype, device=ids.device)
        shares = max(1, BUSY // triton.cdiv(C, TALL))  # of a product whose result goes to the stream
        self.some = torch.empty(shares, B, C, device=ids.device)
        self.parts, self.bias = 0, None  # what the next norm is to add to the stream
        super().__init__(model, ids, at, cache, *args, **options)

    def product(self, x, linear, y, norm=None, kept=None, residual=None, which=None, N=None, GELU=None):
        weight, scale, bias, (rows, K) = linear.weight, getattr(linear, "scale", None), linear.bias, linear.weight.shape
        (BN, BK), own = self.block(weight), K
        self.nbytes += weight[:N].nbytes
        if norm is not None:
            self.launch(norms, self.B, x, self.some, self.bias, norm.weight, norm.bias, self.x, EPS=norm.eps,
                        KEEP=kept is None, PARTS=self.parts, B=self.B, C=K, CP=up(K))
            x = self.x
        if residual is not None:
            BN, own = TALL, BK * triton.cdiv(K, BK * len(self.some))
            self.parts, self.bias, bias, y = triton.cdiv(K, own), bias, None, self.some
        self.launch(products, (triton.cdiv(N or rows, BN), triton.cdiv(K, own)), x, weight, scale, bias, y, which,
                    N or rows, GELU=GELU, B=self.B, BP=max(16, up(self.B)), K=K, OWN=own, BN=BN, BK=BK)

    @classmethod
    def fits(cls, model, ids, cache, memory=None):
        """As Step's; float32, which tensor cores do not multiply exactly, is slower here than what a compiler makes."""
        return super().fits(model, ids, cache, memory) and cache.k[0].dtype != torch.float32

    @staticmethod
    def block(weight):
        """Of a weight (N, K): how many rows a program takes, if it takes whole ones, and how many columns at a time."""
        return TALL if len(weight) >= 2048 else 16, WIDE

    @staticmethod
    def tiles(S, own):
        """As Step's. A program of one warp waits for no other, and there are many; of a source, which is long, two."""
        return 32, 1 if own else 2, 1


def kind_of(B):
    """The Step for so many rows, if there is one."""
    return Step if B in Step.ROWS else ManyRows
