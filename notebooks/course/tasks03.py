"""The exercises of lesson 3, the model that runs around a cache, and the cache itself."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from attention import Causal, CausalSelfAttention, attend_explicit, dense
from cost import linears, predict
from course import NotYet, Task
from model import GPTConfig
from plumbing.models import random_model


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# -----------------------------------------------------------------------------
# One more token


def thrifty(answer, q, k, v):
    """What an answer returned, and whether it multiplied no more than one query needs."""
    with FlopCounterMode(display=False) as flops:
        return answer(q, k, v), flops.get_total_flops() <= 4 * k.numel()


def step(attn, x, k, v):
    q, new_k, new_v = attn.qkv(x)
    k, v = torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)
    return attn.output(attend_explicit(q, k, v)[0]), k, v


def forgetting(attn, x, k, v):
    return step(attn, x, k[:, :, :0], v[:, :, :0])


def not_itself(attn, x, k, v):
    q, new_k, new_v = attn.qkv(x)
    y = attn.output(attend_explicit(q, k, v)[0])
    return y, torch.cat((k, new_k), 2), torch.cat((v, new_v), 2)


def newest_first(attn, x, k, v):
    q, new_k, new_v = attn.qkv(x)
    k, v = torch.cat((new_k, k), 2), torch.cat((new_v, v), 2)
    return attn.output(attend_explicit(q, k, v)[0]), k, v


def not_kept(attn, x, k, v):
    return step(attn, x, k, v)[0], k, v


def layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return CausalSelfAttention(GPTConfig(n_head=2, n_embd=8)).double().eval()


# -----------------------------------------------------------------------------
# The cache


class Cache:
    def __init__(self, n_layer, shape):
        self.k = [torch.zeros(shape) for _ in range(n_layer)]
        self.v = [torch.zeros(shape) for _ in range(n_layer)]
        self.filled = 0

    def positions(self, T):
        return self.filled + torch.arange(T)

    def write(self, layer, q, k, v):
        stop = self.filled + k.size(2)
        self.k[layer][:, :, self.filled : stop] = k
        self.v[layer][:, :, self.filled : stop] = v
        return self.k[layer][:, :, :stop], self.v[layer][:, :, :stop]

    def mask(self, T):
        return torch.arange(self.filled + T) <= self.positions(T)[:, None]


def forward(gpt, idx, cache):
    """The next T tokens of each row, idx (B, T) -> their logits (B, T, V). What GPT does, with a cache to be asked."""
    T = idx.size(1)
    x = gpt.wte(idx) + gpt.wpe(cache.positions(T))        # where do the T new tokens stand?
    for layer, block in enumerate(gpt.h):
        q, k, v = block.attn.qkv(block.ln_1(x))           # of the new tokens: (B, H, T, D) each
        k, v = cache.write(layer, q, k, v)                # of all tokens so far: (B, H, S, D) each
        y, weights = attend_explicit(q, k, v, cache.mask(T))  # which of the S may each of the T see?
        x = x + block.attn.output(y)
        x = x + block.mlp(block.ln_2(x))
    cache.filled += T                                     # all layers have written: now the new tokens count
    return gpt.lm_head(gpt.ln_f(x))


class TopLeft(Cache):
    def mask(self, T):
        return torch.ones(T, self.filled + T).tril().bool()


class SeesAll(Cache):
    def mask(self, T):
        return torch.ones(T, self.filled + T).bool()


class FromZero(Cache):
    def positions(self, T):
        return torch.arange(T)

    def mask(self, T):
        return torch.arange(self.filled + T) <= self.filled + torch.arange(T)[:, None]


class SlotZero(Cache):
    def write(self, layer, q, k, v):
        T = k.size(2)
        self.k[layer][:, :, :T], self.v[layer][:, :, :T] = k, v
        return self.k[layer][:, :, : self.filled + T], self.v[layer][:, :, : self.filled + T]


class RowZero(Cache):
    def write(self, layer, q, k, v):
        keys, values = super().write(layer, q, k[:1], v[:1])
        keys[1:], values[1:] = 0, 0
        return keys, values


class KeysOnly(Cache):
    def write(self, layer, q, k, v):
        keys, values = super().write(layer, q, k, v)
        values = values.clone()
        values[:, :, : self.filled] = 0
        return keys, values


class Forgetful(Cache):
    def write(self, layer, q, k, v):
        return k, v

    def mask(self, T):
        return torch.ones(T, T).tril().bool()


class Queries(Cache):
    def write(self, layer, q, k, v):
        return super().write(layer, q, q, v)


class OneBuffer(Cache):
    def __init__(self, n_layer, shape):
        super().__init__(n_layer, shape)
        self.v = self.k


class OneLayer(Cache):
    def write(self, layer, q, k, v):
        return super().write(0, q, k, v)


def small_gpt(**sizes):
    """A random GPT in fp64 that writes varied texts: 97 ids, 32 positions."""
    sizes |= dict(vocab_size=97, block_size=32, eos_id=96)
    return random_model("gpt2", torch.float64, "cpu", [f"--model.{key}={value}" for key, value in sizes.items()])


def filled_in(method):
    """The method, for which an open line is no mistake."""
    def call(self, *args):
        if (out := method(self, *args)) is ...:
            raise NotYet
        return out
    return call


def decode(make, B, chunks):
    """The logits (B, sum of chunks, V) of a small GPT whose tokens enter in these chunks, in fp64."""
    kind = type("Cache", (make,), {name: filled_in(getattr(make, name)) for name in ("positions", "write", "mask")})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        gpt = small_gpt(n_layer=2, n_head=2, n_embd=16)
        idx, cache = torch.randint(97, (B, sum(chunks))), kind(2, (B, 2, 32, 8))
        with torch.no_grad():
            return torch.cat([forward(gpt, part, cache) for part in idx.split(chunks, 1)], 1)
    finally:
        torch.set_default_dtype(before)


def splits(n, total=12):
    """Some ways to cut a text of 12 tokens, drawn once and for all: all at once, one by one, and n others."""
    g = torch.Generator().manual_seed(3)
    ways = [[total], [1] * total, [5, *[1] * (total - 5)]]
    for _ in range(n):
        cuts = (torch.randperm(total - 1, generator=g)[:3] + 1).sort().values.tolist()
        ways.append([b - a for a, b in zip([0, *cuts], [*cuts, total])])
    return ways


# -----------------------------------------------------------------------------


def kv_bytes(L, B, H, KV, D, S, itemsize):
    config = GPTConfig(n_layer=L, n_head=H, n_kv_head=KV, n_embd=H * D, block_size=S)
    return predict(config, "cached", 1, S - 1, B, itemsize)["self_cache_bytes"]


N, C = 8, 64
ONE_LAYER = [row.n_in * row.n_out for row in linears(GPTConfig(n_layer=1, n_head=4, n_embd=C)) if row.of == "decoder"]

TASKS = {
    "scores": Task(
        (N * N, N * (N + 1) // 2, N),
        wrong=[((N * N, N * (N - 1) // 2, N), "In the middle: a token sees itself as well."),
               ((N * N, N * N // 2, N),
                "In the middle: half the square is not quite it. Add up the rows: 1, 2, 3, ..."),
               ((N * N, N * (N + 1) // 2, 1), "Last: one query is one row of scores. How many keys does it meet?"),
               ((N * N, N * (N + 1) // 2, N + 1),
                "Last: the newest token is the eighth. It meets itself and seven more."),
               ((N, N * (N + 1) // 2, N), "First: each of the 8 queries meets each of the 8 keys.")],
        hint="Draw the square of queries by keys, and count its fields."),
    "last_row": Task(
        lambda q, k, v: attend_explicit(q[:, :, -1:], k, v)[0],
        wrong=[(lambda q, k, v: attend_explicit(q, k, v)[0], "Every query was used: only the last one is asked for."),
               (lambda q, k, v: attend_explicit(q, k, v)[0][:, :, -1:],
                "The row is right. But all queries were multiplied, and then thrown away: slice before, not behind."),
               (lambda q, k, v: attend_explicit(q[:, :, :1], k, v)[0], "That is the query of the first token."),
               (lambda q, k, v: attend_explicit(q[:, :, :-1], k, v)[0],
                ":-1 is everything but the last; -1: is the last alone."),
               (lambda q, k, v: attend_explicit(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])[0],
                "One query, yes. But it looks at the keys and values of all tokens.")],
        cases=[(x, x.sin(), x.cos()) for x in (draw(2, 2, 5, 4), draw(1, 3, 7, 2))], run=thrifty,
        hint="Slice q along its third axis so that the axis stays, and hand the rest on as it is."),
    "stored": Task(
        "b",
        wrong=[("a",
                "One of the three is used by its own token alone. Which one stands on the left of q k^T?"),
               ("c", "A row of weights belongs to one query. The next token makes a row of its own, from what?"),
               ("d",
                "An output is finished. Look at the formula for the new row: of earlier tokens, what occurs in it?")],
        hint="Answer with one of the letters a to d.",
        praise="The next cell measures it."),
    "step": Task(
        step,
        wrong=[(forgetting,
                "The new token sees only itself: put its key and value behind what was kept, and attend to all."),
               (not_itself, "A token sees itself too: append first, attend then."),
               (newest_first,
                "The output is right, for a single query does not mind the order of the keys. But keep them in "
                              "the order of the text, so that later place s holds position s."),
               (not_kept,
                "The output is right, but the new key and value are not handed on: the next token will miss them.")],
        cases=[(layer(), draw(2, 1, 8), draw(2, 2, 3, 4), draw(2, 2, 3, 4) + 1),
               (layer(), draw(3, 1, 8), draw(3, 2, 6, 4), draw(3, 2, 6, 4) + 1)],
        hint="Three lines: q, k and v of x; torch.cat along the axis of positions, which is 2; attend and output."),
    "copied": Task(
        (sum(range(1, 1001)), 1000),
        wrong=[((1000 * 999 // 2, 1000), "torch.cat copies what was kept, and the newest as well."),
               ((1000 * 1000, 1000), "The tensor is short in the beginning: 1 position, then 2, then 3."),
               ((1000, 1000), "torch.cat makes a new tensor each time. What has to be written into it?"),
               ((sum(range(1, 1001)),) * 2, "The buffer stays where it is. What has to be written in a step?")],
        hint="Add up the lengths of all tensors that are written."),
    "mask": Task(
        lambda start, T: dense(Causal.allows, start + torch.arange(T), torch.arange(start + T))[0, 0],
        wrong=[(lambda start, T: torch.ones(T, start + T).tril().bool(),
                "This counts from the top left corner: your first new token sees one key. Yet all `start` earlier ones "
                "are its past."),
               (lambda start, T: torch.ones(T, start + T).bool(),
                "Within the chunk a token would see those behind it."),
               (lambda start, T: torch.arange(start + T) < start + torch.arange(T)[:, None],
                "A token sees itself: which comparison allows that?"),
               (lambda start, T: torch.ones(T, T).tril().bool(),
                "A row needs a place for every key, the `start` stored ones as well: (T, start + T)."),
               (lambda start, T: torch.arange(start + T) > start + torch.arange(T)[:, None],
                "True means: may look. Yours is True where a key lies in the future.")],
        cases=[(0, 4), (3, 1), (3, 4), (5, 2)],
        hint="Make the positions of the queries and those of the keys, and compare each with each."),
    "crossover": Task(
        sum(ONE_LAYER) / (2 * C),
        wrong=[(sum(ONE_LAYER) / C,
                "There are two products with keys or values, q k^T and weights times v: N x N x C each."),
               (ONE_LAYER[0] / (2 * C),
                "That counts c_attn alone: there are the output projection and the feed-forward too."),
               (sum(ONE_LAYER[:2]) / (2 * C), "The feed-forward layer has two linears, of C x 4C each."),
               (C,
                "N x N x C against N x C x C: now with their constants. How many such products are on each side?")],
        hint="Set the two parts of the formula equal, and divide by what they share."),
    "plot": Task(
        "c",
        wrong=[("a", "Look at the left panel: the single query's entries grow from the very start."),
               ("b", "Nothing here was timed: these are counts."),
               ("d", "Both lines are of the same model. What does one token cost, even with no past at all?")],
        hint="Answer with one of the letters a to d.",
        praise="12 C^2 for the linears, 2 N C for attention: it bends where the second catches up with the first."),
    "bytes": Task(
        kv_bytes,
        wrong=[(lambda L, B, H, KV, D, S, i: L * B * KV * D * S * i, "Keys and values: there are two buffers."),
               (lambda L, B, H, KV, D, S, i: 2 * L * B * H * D * S * i,
                "Stored are the heads of the keys. Where query heads share them, there are fewer."),
               (lambda L, B, H, KV, D, S, i: 2 * B * KV * D * S * i, "Every layer has keys and values of its own."),
               (lambda L, B, H, KV, D, S, i: 2 * L * KV * D * S * i, "Every row of the batch has a past of its own."),
               (lambda L, B, H, KV, D, S, i: 2 * L * B * KV * D * S,
                "That is how many numbers. How many bytes is each?")],
        cases=[(12, 1, 12, 12, 64, 1024, 4), (2, 3, 4, 1, 8, 32, 8), (3, 2, 8, 2, 16, 64, 2)],
        hint="It is one product: multiply the axes of the buffers, and then the number of buffers."),
    "cache": Task(
        Cache,
        wrong=[(TopLeft,
                "A chunk behind a prefix sees too little: your mask counts from the top left corner, as if the first "
                         "new token were the first of all."),
               (SeesAll, "A token of a chunk sees those behind it: mask by comparing positions."),
               (FromZero, "The second chunk is embedded at positions 0, 1, ...: new tokens stand behind those stored."),
               (SlotZero, "The new keys land on top of the first ones: position s belongs into slot s."),
               (RowZero, "The first row of the batch is right, the others are not: are they written?"),
               (KeysOnly, "The keys are right and the old values are lost: what do the weights multiply?"),
               (Forgetful, "Each chunk looks only at itself: return all that is stored so far."),
               (OneBuffer, "k and v are one and the same list, so that the values overwrite the keys."),
               (Queries, "q stands where k should. Later tokens look at keys, and nobody asks for an old query."),
               (OneLayer, "All layers write into one buffer, so that each reads the keys of the one before it.")],
        cases=[(B, way) for B in (1, 3) for way in splits(4)], run=decode, close=1e-10,
        hint="Look at positions(), write() and mask() when filled is not 0: a chunk behind a prefix is the test.",
        praise="Any chunks, any batch, all layers: this is a KV cache."),
}
