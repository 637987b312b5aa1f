"""
A decode step of one row, or of a few, in four small Triton kernels: how near does it come to the memory's bandwidth?

    python -m further.kernel_bench --random gpt2 --prompt-tokens 32 --max-new-tokens 224

One token needs every weight once, and next to no arithmetic. So a step should take bytes / bandwidth: 58 us for gpt2 in
bfloat16 on an H200. What keeps it from that is not multiplying but waiting: a kernel begins when the one before it has
ended, and its first weight arrives a microsecond later. Three ideas, in the order of what they bring:

    fuse        a norm costs less than launching one: each product norms its input, adds bias and residual, applies GELU
    capture     the host needs 20 us to launch a kernel: it records all of them once, as a CUDA graph (by the caller)
    overlap     a kernel starts while the one before it is ending, and asks for its weights before it waits for its
                input (programmatic dependent launch, from Hopper on: `gdc_wait`)

Why early loads are safe: a kernel lets the next one start (`gdc_launch_dependents`) only when its own wait is over. So
while one loads early, the kernel right before it may still be running, and none that is older. Weights are written by
nobody; what an attention has stored in this layer's cache was stored a step ago.

BART's norms stand after the sums, GPT's before the sublayers. That is one order, if a norm belongs to the product that
reads it: of BART, what was normed is then the residual, so it is kept (Lewis et al. 2019; Radford et al. 2019).

Shapes: B rows (1 to 4), K columns and N rows of a weight, H heads, KV key/value heads, D head_dim. Sums are in
fp32, and so is the residual stream.
"""

from __future__ import annotations  # tl.constexpr below is not looked up where there is no Triton

import math
from functools import partial

import torch

from attention import NOWHERE, Causal
from cache import Slots
from model import BART, GPT

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a machine without a GPU: fits() says no
    triton = None

jit = triton.jit if triton else lambda kernel: kernel

# -----------------------------------------------------------------------------
# The kernels. A pointer that is None is not there when the kernel is compiled, nor are the lines that use it.


@jit
def wait(PDL: tl.constexpr):
    """Until the kernel before has ended, and all that it has written can be seen; then the next one may start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@jit
def embed(ids, at, wte, wpe, x, length, TIMES: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, PDL: tl.constexpr):
    """x[row] = wte[newest id] + wpe[its position]. A program does one row."""
    row, c = tl.program_id(0), tl.arange(0, CP)
    wait(PDL)
    p = tl.load(at + row)
    i = tl.load(ids + row * length + p)
    token = tl.load(wte + i * C + c, mask=c < C).to(tl.float32) * TIMES
    tl.store(x + row * C + c, token + tl.load(wpe + p * C + c, mask=c < C).to(tl.float32), mask=c < C)


@jit
def activated(r, GELU: tl.constexpr):
    """r, or GELU of it."""
    if GELU == "tanh":  # 1 + tanh(z) = 2 sigmoid(2 z)
        r *= tl.sigmoid(1.5957691216057308 * (r + 0.044715 * r * r * r))
    if GELU == "none":  # what PyTorch calls the exact one
        r *= 0.5 + 0.5 * tl.erf(r * 0.7071067811865476)
    return r


@jit
def whole(W):
    """int8 as fp32, exactly: the last bits of 1.5 x 2^23, which then goes. All units add; only few of them convert."""
    return (W.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 1.5 * 2**23


@jit
def product(x, weight, scale, bias, gain, shift, gained, kept, residual, y, which, N, EPS: tl.constexpr,
            GELU: tl.constexpr, B: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr,
            BN: tl.constexpr, PDL: tl.constexpr):
    """
    y = [residual +] [gelu] ([norm] x @ weight^T [* scale] [+ bias]), x (B, K), weight (N, K), y (B, N); where `which`
    is given instead the largest of each BN of them, and its index. A program keeps BN rows of the weight, whole, in its
    registers, for all rows of x, so that each weight is read once.

    K is cut into pieces of WIDE numbers (KP: K up to a power of two). Where a piece is what a warp reads at once, 16
    bytes a thread, Triton gives each warp rows of its own, which it sums up alone; where it is KP, warps share rows.

    With gain g and shift s, the product of a norm is (sum w g x - mean sum w g) / deviation + sum w s. So all sums over
    x are taken at once; those over the weights alone are known before: `gained`, and in the bias.
    """
    part = tl.program_id(0)
    n = part * BN + tl.arange(0, BN)[:, None, None]
    k = tl.arange(0, KP // WIDE)[None, :, None] * WIDE + tl.arange(0, WIDE)[None, None]
    k = k // 8 * 8 + k % 8  # a thread reads 8 of every dtype: of int8 it would be 16, and weights had to change threads
    if WIDE < KP:
        n, k = tl.broadcast(n, k)  # (BN, KP / WIDE, WIDE): each warp reads all of x
    W = tl.load(weight + n.to(tl.int64) * K + k, mask=(n < N) & (k < K), other=0.0, eviction_policy="evict_first")
    n = part * BN + tl.arange(0, BN)  # evict_first: no weight is read twice, so the cache is left to what is
    if gain is not None:
        G, S = tl.load(gain + k, mask=k < K, other=0.0), tl.load(gained + n, mask=n < N, other=0.0)
    if scale is not None:
        by = tl.load(scale + n, mask=n < N, other=0.0)
    if bias is not None:
        add = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    wait(PDL)  # what was asked for so far depends on nothing, and nothing has waited for it yet
    for b in tl.static_range(B):
        X = tl.load(x + b * K + k, mask=k < K, other=0.0).to(tl.float32)
        if gain is not None:
            mean = tl.sum(tl.sum(X, 1), 1) / K  # (BN,), or (1,)
            inverse = tl.rsqrt(tl.sum(tl.sum(X * X, 1), 1) / K - mean * mean + EPS)
            if kept is not None:
                if part == 0:
                    normed = (X - mean[:, None, None]) * inverse[:, None, None] * G.to(tl.float32)
                    normed += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
                    tl.store(kept + b * K + k, normed, mask=k < K)
            X *= G.to(tl.float32)
        w = (W if scale is None else whole(W)).to(tl.float32)
        r = tl.sum(tl.sum(w * X, 1), 1)  # (BN,)
        if scale is not None:
            r *= by
        if gain is not None:
            r = (r - mean * S) * inverse
        if bias is not None:
            r += add
        r = activated(r, GELU)
        if residual is not None:
            r += tl.load(residual + b * N + n, mask=n < N, other=0.0)
        if which is None:
            tl.store(y + b * N + n, r.to(y.dtype.element_ty), mask=n < N)
        else:
            r = tl.where(n < N, tl.where(r == r, r, float("inf")), float("-inf"))  # a NaN wins: choose() shall see it
            most, first = tl.max(r, 0, return_indices=True)  # of equal ones, the lowest index
            tl.store(y + b * tl.num_programs(0) + part, most)
            tl.store(which + b * tl.num_programs(0) + part, part * BN + first)


@jit
def look(K, V, Q, sees, top, total, out):
    """
    A tile of keys and values more (TILE, D), of which some are seen (TILE, 1), for a query (1, D): the running maximum,
    sum and result of attention (Milakov and Gimelshein 2018).
    """
    a = tl.where(sees, tl.sum(K.to(tl.float32) * Q, 1, keep_dims=True), -1e30)
    higher = tl.maximum(top, tl.max(a))
    e, fade = tl.where(sees, tl.exp(a - higher), 0.0), tl.exp(top - higher)  # fade: of what was summed before
    return higher, total * fade + tl.sum(e), out * fade + tl.sum(e * V.to(tl.float32), 0)


@jit
def attention(q, keys, values, count, y, some, arrived, of_row, of_head, of_key, OWN: tl.constexpr, H: tl.constexpr,
              KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, TP: tl.constexpr, PDL: tl.constexpr):
    """
    A query against the first count[row] keys of its row. OWN: q is followed by the newest key and value, which are
    stored at count[row] and seen as well. Programs share the tiles of keys for a head of a row, and the last one to
    arrive joins what they found (Flash-Decoding, Dao et al. 2023). Heads that share keys read them again, from the L2
    cache.
    """
    tile, head, row, d = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.arange(0, D)
    tiles, group = tl.num_programs(0), head // (H // KV)
    n, s = tl.load(count + row), tile * TILE + tl.arange(0, TILE)[:, None]
    at = row * of_row + group * of_head + d[None]
    K = tl.load(keys + at + s * of_key, mask=s < n, other=0.0)
    V = tl.load(values + at + s * of_key, mask=s < n, other=0.0)
    wait(PDL)  # these were stored at least a step ago
    q += row * (H + 2 * KV if OWN else H) * D + d[None]
    Q = tl.load(q + head * D).to(tl.float32) * D**-0.5  # (1, D)
    top, total, out, first = -1e30, 0.0, tl.zeros((D,), tl.float32), tile * TILE
    if OWN:
        if tile == 0:
            newest, value = tl.load(q + (H + group) * D), tl.load(q + (H + KV + group) * D)
            tl.store(keys + at + n * of_key, newest)
            tl.store(values + at + n * of_key, value)
            top, total, out = tl.sum(newest.to(tl.float32) * Q), 1.0, tl.sum(value.to(tl.float32), 0)
    while first < n:
        top, total, out = look(K, V, Q, s < n, top, total, out)
        first, s = first + tiles * TILE, s + tiles * TILE
        K = tl.load(keys + at + s * of_key, mask=s < n, other=0.0)
        V = tl.load(values + at + s * of_key, mask=s < n, other=0.0)
    y += (row * H + head) * D
    if TP == 1:
        tl.store(y + d, (out / total).to(y.dtype.element_ty))
    else:
        arrived += row * H + head
        some += (row * H + head) * tiles * (D + 2)
        tl.store(some + tile * (D + 2) + d, out)
        tl.store(some + tile * (D + 2) + D, top)
        tl.store(some + tile * (D + 2) + D + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1) == tiles - 1:  # all others can be seen
            t = tl.arange(0, TP)[:, None]
            tops = tl.load(some + t * (D + 2) + D, mask=t < tiles, other=-1e30, cache_modifier=".cg")
            weight = tl.exp(tops - tl.max(tops))
            totals = tl.load(some + t * (D + 2) + D + 1, mask=t < tiles, other=0.0, cache_modifier=".cg")
            outs = tl.load(some + t * (D + 2) + d[None], mask=t < tiles, other=0.0, cache_modifier=".cg")
            outs = tl.sum(weight * outs, 0) / tl.sum(weight * totals)
            tl.store(y + d, outs.to(y.dtype.element_ty))
            tl.store(arrived, 0)


@jit
def choose(most, which, ids, at, finite, parts, length, PP: tl.constexpr, PDL: tl.constexpr):
    """
    The id of the largest logit stands behind the newest of its row; `at` goes there. The host is never asked. A program
    does one row.
    """
    row, i = tl.program_id(0), tl.arange(0, PP)
    wait(PDL)
    tops = tl.load(most + row * parts + i, mask=i < parts, other=float("-inf"))
    top, part = tl.max(tops, 0, return_indices=True)
    p = tl.load(at + row)
    tl.store(ids + row * length + p + 1, tl.load(which + row * parts + part), mask=p + 1 < length)
    tl.store(finite + row, tl.load(finite + row) & (tl.abs(top) < float("inf")))
    tl.store(at + row, tl.minimum(p + 1, length - 2))


# -----------------------------------------------------------------------------


class Step:
    """
    step(): one greedy token for every row, on the device alone, so that a CUDA graph can capture it.

    model: a GPT or BART; a linear that has a `scale` holds int8, a scale for each row. ids: (B, length) int64, the
    texts; at: (B, 1) int64, the position of the newest id of each row, whose key is not stored yet. cache: a
    KVCache with what lies before, by Slots. memory: a BART's, of as many rows, or None. n_vocab: choose among the first
    so many. scored: return their logits (B, n_vocab) fp32 instead, who has them chooses. overlap: False where kernels
    shall not, to see what that brings.
    A step writes ids[row, at + 1], the keys and values at `at`, and adds 1 to at, but for the last position of ids.
    finite: (B,) bool, whether all steps so far had logits to choose from. Counts of the cache are the caller's.
    """

    ROWS = range(1, 5)

    def __init__(self, model, ids, at, cache, memory=None, n_vocab=None, scored=False, overlap=True):
        (self.B, length), config, bart = ids.shape, model.config, model.config.is_encoder_decoder
        cuda = overlap and ids.is_cuda and torch.version.hip is None
        self.launches, self.nbytes, self.pdl = [], 0, cuda and torch.cuda.get_device_capability(ids.device) >= (9, 0)
        layers, dtype, C, V = model.decoder_layers(), cache.k[0].dtype, config.n_embd, n_vocab or config.vocab_size
        new = partial(torch.empty, device=ids.device)
        stream, kept = new(self.B, C), new(self.B, C) if bart else None
        self.finite = torch.ones(self.B, dtype=torch.bool, device=ids.device)
        qkv, heads, inner = (new(self.B, n, dtype=dtype) for n in (len(layers[0].attn.c_attn.weight), C, config.inner))
        norms, add = iter(reads(model, memory)), kept if bart else stream
        if memory is not None:
            self.lengths = new(self.B, dtype=torch.long)
            self.read(memory)
        self.launch(embed, self.B, ids, at, model.wte.weight, (model.decoder_wpe if bart else model.wpe).weight, stream,
                    length, C=C, CP=up(C), TIMES=math.sqrt(C) if bart and config.scale_embedding else 1.0)
        for i, layer in enumerate(layers):
            self.product(stream, layer.attn.c_attn, qkv, next(norms), kept)
            self.attend(layer.attn, qkv, cache.k[i], cache.v[i], at, heads, OWN=True)
            self.product(heads, layer.attn.c_proj, stream, residual=add)
            if memory is not None:
                self.product(stream, layer.cross.c_q, qkv, next(norms), kept)
                self.attend(layer.cross, qkv, *memory.kv[i], self.lengths, heads, OWN=False)
                self.product(heads, layer.cross.c_proj, stream, residual=add)
            self.product(stream, layer.mlp.c_fc, inner, next(norms), kept, GELU=layer.mlp.act.approximate)
            self.product(inner, layer.mlp.c_proj, stream, residual=add)
        self.scores = new(self.B, V) if scored else None
        if scored:
            self.product(stream, model.lm_head, self.scores, next(norms), N=V)
        else:
            parts = triton.cdiv(V, self.block(model.lm_head.weight)[0])
            self.most, which = new(self.B, parts), new(self.B, parts, dtype=torch.int32)
            self.product(stream, model.lm_head, self.most, next(norms), which=which, N=V)
            self.launch(choose, self.B, self.most, which, ids, at, self.finite, parts, length, PP=up(parts),
                        num_warps=16)

    @classmethod
    def fits(cls, model, ids, cache, memory=None):
        """Whether a step of this kind can do this: else the plain model does."""
        layers = model.decoder_layers() if type(model) in (GPT, BART) else []
        return bool(
            triton and ids.is_cuda and ids.is_contiguous() and len(ids) in cls.ROWS and ids.size(1) >= 2 and layers
            and all(type(layer.attn.pattern) is Causal for layer in layers) and set(map(type, cache.slots)) == {Slots}
            and cache.k[0] is not None and len(ids) <= len(cache.k[0]) and ids.size(1) <= cache.k[0].size(2) + 1
            and cache.k[0].dtype in (torch.float32, torch.float16, torch.bfloat16)
            and layers[0].attn.head_dim == up(layers[0].attn.head_dim)
            and (memory is None or len(memory.kv[0][0]) == len(ids)))

    def read(self, memory):
        """How long the sources are, which may be others by now, in the same place. Padding is on the right."""
        self.lengths.copy_((memory.key_pos < NOWHERE).sum(-1))

    def launch(self, kernel, grid, *args, num_warps=4, **sizes):
        early = dict(launch_pdl=True) if self.pdl else {}
        grid = grid if isinstance(grid, tuple) else (grid,)
        self.launches.append(partial(kernel[grid], *args, PDL=self.pdl, num_warps=num_warps, **sizes, **early))

    def product(self, x, linear, y, norm=None, kept=None, residual=None, which=None, N=None, GELU=None):
        weight, scale, bias = linear.weight, getattr(linear, "scale", None), linear.bias
        (rows, K), (BN, WIDE) = weight.shape, self.block(weight)
        self.nbytes += weight[:N].nbytes
        gain = shift = gained = None
        if norm is not None:  # sums over weights alone, which the kernel needs not take every time
            gain, shift = norm.weight, norm.bias
            gained, shifted = torch.stack([gain, shift]).float() @ weight.float().T * (1 if scale is None else scale)
            bias = shifted if bias is None else shifted + bias
        self.launch(product, triton.cdiv(N or rows, BN), x, weight, scale, bias, gain, shift, gained, kept, residual, y,
                    which, N or rows, EPS=norm.eps if norm else 0.0, GELU=GELU, B=self.B, K=K, KP=up(K), WIDE=WIDE,
                    BN=BN)

    @staticmethod
    def block(weight):
        """
        Of a weight (N, K): how many rows a program of 4 warps takes, and how wide the pieces of a row are. Some 64
        numbers for each thread are enough under way to hide how long the first takes, and fit the registers.
        """
        KP, size = up(weight.size(1)), weight.element_size()
        if KP <= 1024:
            return 8, min(512 // max(size, 2), KP)  # of a warp each thread 8 numbers, in up to 16 bytes
        return 8 if KP <= 2048 else max(1, 16384 // (KP * size)), KP

    @staticmethod
    def tiles(S, own):
        """Of S keys: how many a program looks at together, how many programs share them, and the warps of each."""
        return TILE, triton.cdiv(S, TILE), 8

    def attend(self, part, q, keys, values, count, y, OWN):
        (tile, tiles, warps), (of_row, of_head, of_key, _) = self.tiles(keys.size(2), OWN), keys.stride()
        some = torch.empty(self.B, part.n_head, tiles, part.head_dim + 2, device=q.device)
        arrived = torch.zeros(self.B, part.n_head, dtype=torch.int32, device=q.device)
        self.launch(attention, (tiles, part.n_head, self.B), q, keys, values, count, y, some, arrived, of_row, of_head,
                    of_key, OWN=OWN, H=part.n_head, KV=part.n_kv_head, D=part.head_dim, TILE=tile, TP=up(tiles),
                    num_warps=warps)

    def __call__(self):
        for launch in self.launches:
            launch()
        return self.scores


TILE = 256  # keys that a program of attention looks at together


def up(n):
    """The next power of two: what a tile's side must be."""
    return 1 << (n - 1).bit_length()


def reads(model, memory):
    """The norms before what reads the residual stream, in order. Of a BART these are those after the sums before."""
    if not model.config.is_encoder_decoder:
        return [norm for block in model.h for norm in (block.ln_1, block.ln_2)] + [model.ln_f]
    after = ("ln_1", "ln_2") if memory is None else ("ln_1", "ln_cross", "ln_2")
    return [model.decoder_ln] + [getattr(layer, name) for layer in model.decoder for name in after]
