# %% [markdown]
# # 3. The KV cache, from scratch
#
# A language model writes one token at a time. Done plainly, each new token makes the model read the whole text again.
# In this lesson we throw away, step by step, what need not be computed twice. What is left over is the KV cache, and
# at the end you write one: fewer than thirty lines, right for any chunks and any batch.
#
# You will be able to
#
# - say why one query is enough for one more token, and why keys and values are what is kept,
# - count what a new token costs with and without a cache, linears included,
# - predict the bytes of a cache, for any model, before anything is allocated,
# - write a working KV cache from memory.
#
# *You need:* attention by hand (lesson 1), and the shapes `B` rows, `T` new tokens, `S` stored ones, `C` width, `H`
# heads, `D = C / H`. The questions we answer are those of sections 3.2 to 3.6 of a tutorial sheet on transformers
# (FNLP 4); its claims are numbered, and we measure each.
# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page
from inspect import getsource
from math import prod

import matplotlib.pyplot as plt
import numpy as np
import torch

from torch.nn.functional import scaled_dot_product_attention

from attention import CausalSelfAttention, attend_explicit
from cost import count
from course import lesson
from course.tasks03 import forward, small_gpt, splits
from further.concat import ConcatCache, StaticCache
from generate import advance, generate
from model import GPT, GPTConfig
from plumbing.utils import set_seed

check, accepted, claim, score = lesson(3)
torch.set_default_dtype(torch.float64)  # so that a mistake cannot hide behind rounding
torch.set_grad_enabled(False)

set_seed(3)
C = 64
gpt = GPT(GPTConfig(n_layer=1, n_head=4, n_embd=C, vocab_size=97, block_size=1024)).eval()
# %% [markdown]
# ## How many scores?
#
# Attention compares queries with keys: each pair that meets is one entry of $QK^T$. Take one head and a text of `N = 8`
# tokens, the newest being the eighth. How many entries are there
#
# 1. in the whole square, each query with each key,
# 2. in that part of it which a causal mask lets through,
# 3. if only the newest token's query is compared with the keys?
# %%
scores = (..., ..., ...)
check("scores", scores)
# %% [markdown]
# ## Counted, not timed
#
# `count(model)` from `cost.py` notes the shape of every matrix product while the model really runs. So we can ask for
# entries of $QK^T$ instead of trusting a stopwatch. If a count grows like $N^p$, its logarithm is a straight line in
# $\log N$, and the slope is $p$.
# %%
def run(N, cached):
    """What was multiplied to let token N enter a text: by reading all N, or by a step behind N - 1 that are stored."""
    idx, cache, start = torch.ones(1, N, dtype=torch.long), None, 0
    if cached:
        cache, start = gpt.new_cache(1, N), N - 1
        gpt.features(idx[:, :start], cache)  # the past, not counted
    with count(gpt) as cost:
        gpt.features(idx[:, start:], cache, start)  # all layers; the output head is left out
    return cost


def entries(cost):
    return sum(prod(record["out"][2:]) for record in cost.records if record["name"] == "qk")  # of one head


def slope(xs, ys):
    return abs(np.polyfit(np.log(xs), np.log(ys), 1)[0])  # nothing here falls, and -0.00 would be ugly


lengths = [16, 32, 64, 128, 256, 512, 1024]
costs = {cached: [run(N, cached) for N in lengths] for cached in (False, True)}
square, one = ([entries(cost) for cost in costs[cached]] for cached in (False, True))
print("tokens            ", *(f"{N:9,}" for N in lengths))
print("all read again    ", *(f"{n:9,}" for n in square))
print("one query, stored ", *(f"{n:9,}" for n in one), "\n")
claim(20, "self-attention over N tokens is O(N^2), because of QK^T",
      f"the entries have slope {slope(lengths, square):.2f}", abs(slope(lengths, square) - 2) < 0.01)
claim(22, "one more token is O(N)", f"the entries have slope {slope(lengths, one):.2f}",
      abs(slope(lengths, one) - 1) < 0.01)
# %% [markdown]
# Counted is the whole square, although a causal mask throws nearly half of it away: a product of matrices knows no
# triangles. (Kernels that work in blocks skip those that are masked altogether; that is a factor of two at best, and
# the slope stays 2.) Both claims hold, for scores. Scores are not all that a token costs, and we come back to that.
#
# ## One query is enough
#
# The text so far ends in a token whose output decides what comes next. Row $i$ of $\mathrm{softmax}(QK^T / \sqrt D)\,V$
# uses row $i$ of $Q$ and no other. So write the last row alone: `attend_explicit(q, k, v)` from `attention.py` returns
# `(output, weights)`; `q`, `k` and `v` are `(B, H, N, D)`, and wanted is `(B, H, 1, D)`.
#
# Then decide what to keep for the tokens to come. Which of these does the row of a *later* token need of an earlier
# one?
#
# - **a** its query, its key and its value
# - **b** its key and its value
# - **c** its row of attention weights
# - **d** its output
# %%
def last_row(q, k, v):
    return ...  # your line

stored = ...  # "a", "b", "c" or "d"

check("last_row", last_row)
check("stored", stored)
# %% [markdown]
# Two measurements. First, is the last row the same? (With the causal mask and without: the last token sees everything
# anyway. The sheet's formula has no mask. For one row of one layer that is harmless. For the rows above it is not.)
#
# Second, what does the last output depend on? We change `q`, `k` or `v` of all earlier tokens and look whether it
# moves.
# %%
q, k, v = torch.randn(3, 2, 4, 8, 16)  # B = 2, H = 4, N = 8, D = 16
causal = torch.ones(8, 8).tril().bool()
masked, unmasked = attend_explicit(q, k, v, causal)[0], attend_explicit(q, k, v)[0]
last = accepted("last_row")(q, k, v)
apart = max((last - full[:, :, -1:]).abs().max().item() for full in (masked, unmasked))
print(f"rows that the mask leaves as they are: {torch.isclose(masked, unmasked).all(-1)[0, 0].int().tolist()}\n")
claim(21, "the next token needs the query of the last token only",
      f"one query, and the last row of the whole, differ by {apart:.0e}", apart < 1e-12)


def moved(name):
    x = {"q": q, "k": k, "v": v}
    x[name] = x[name].clone()
    x[name][:, :, :-1] += torch.rand(2, 4, 7, 16)  # of all tokens but the last
    return (attend_explicit(**x, mask=causal)[0] - masked)[:, :, -1].abs().max().item()


moves = {name: moved(name) for name in "qkv"}
print("\nthe last output moves by", ", ".join(f"{by:.2f} with earlier {name}" for name, by in moves.items()))
matter = [name for name in moves if moves[name] > 0]
kept = [name for name in vars(gpt.new_cache(1, 8)) if name in "qkv"]
claim(23, "what is stored are the key and value vectors", f"of earlier tokens {' and '.join(matter)} matter; "
      f"a KVCache has buffers for {' and '.join(kept)}", matter == kept == ["k", "v"])
# %% [markdown]
# ## Keep them
#
# Now the step. A new token `x` `(B, 1, C)` enters a layer; `k` and `v` `(B, H, S, D)` are those of the earlier
# tokens. `attn.qkv(x)` gives the new token's `q, k, v`, `attn.output(y)` merges the heads, and `torch.cat` puts
# tensors end to end. Return the output `(B, 1, C)`, and the keys and values with the new ones behind.
#
# And predict. A text grows from nothing to 1,000 tokens, one at a time. In one layer, for how many positions in all
# are keys written, (1) if `torch.cat` makes a new tensor in each step, (2) if there is one buffer with 1,000 slots,
# and a step writes into the next free one?
# %%
def step(attn, x, k, v):
    return ...  # your lines

copied = (..., ...)

check("step", step)
check("copied", copied)
# %%
attn = CausalSelfAttention(GPTConfig(n_head=4, n_embd=C)).eval()
x = torch.randn(2, 8, C)
k = v = torch.zeros(2, 4, 0, 16)  # nothing yet
rows = []
for i in range(8):
    y, k, v = accepted("step")(attn, x[:, i : i + 1], k, v)
    rows.append(y)
print(f"eight steps and one pass differ by {(torch.cat(rows, 1) - attn(x)).abs().max():.0e}\n")

position = 2 * C * torch.tensor(0.0).itemsize  # bytes of a position's key and value
for kind in ConcatCache, StaticCache:
    cache, places = kind(1, 1000), set()
    for n in range(1, 1001):
        advance(gpt, [[1] * n], cache)
        places.add(cache.k[0].data_ptr())
    print(f"{kind.__name__:12} {cache.copied // position:9,} positions written; at one address: {len(places) == 1}")
# %% [markdown]
# ## A buffer, and where we are in it
#
# So allocate once: `(B, H, length, D)`. Slot `s` holds position `s`, for ever. All one has to know is how many
# positions are stored; a new token stands there. This number is called `start_pos`. (The fixed address matters too: a
# step that finds its keys where the last one did can be recorded, and replayed, by a GPU.)
#
# Nothing says that only *one* token may enter. A prompt is a chunk of `T` tokens at `start_pos = 0`; a second
# question in a conversation is a chunk behind a prefix. The `T` queries stand at `start .. start + T - 1`, the keys
# at `0 .. start + T - 1`. A query may look at a key whose position is not greater than its own. Write that as a
# boolean tensor `(T, start + T)`, True where looking is allowed.
# %%
def mask(start, T):
    return ...  # your line

check("mask", mask)
# %%
right, wrong = torch.as_tensor(accepted("mask")(5, 3)).bool(), torch.ones(3, 8).tril().bool()
fig, axes = plt.subplots(1, 2, figsize=(6, 2.4), layout="constrained")
for ax, allowed, title in zip(axes, (right, wrong), ("by position", "counted from the corner")):
    ax.imshow(allowed, cmap="Greys", vmin=0, vmax=1.6, extent=(-0.5, 7.5, 7.5, 4.5))
    ax.set_xticks(range(8))
    ax.set_yticks([5, 6, 7])
    ax.set(title=title, xlabel="position of the key (grey: may look)", ylabel="of the query")
plt.show()

q, k, v = attn.qkv(x)
q, whole = q[:, :, 5:], attn(x)[:, 5:]  # three queries behind five stored positions, and the rows they should give
for title, out in [("by position", attend_explicit(q, k, v, right)[0]),
                   ("counted from the corner", attend_explicit(q, k, v, wrong)[0]),
                   ("is_causal=True", scaled_dot_product_attention(q, k, v, is_causal=True))]:
    print(f"{title:24} rows 5 to 7 differ from the whole by {(attn.output(out) - whole).abs().max():.0e}")
# %% [markdown]
# The right-hand mask is not made up. PyTorch's fused kernel makes it from `is_causal=True` when there are fewer
# queries than keys: it counts from the top left corner. A one-token step needs no mask at all, so code with this
# mistake looks right until a chunk enters behind a prefix. Masks that compare positions cannot make it.
#
# ## What a token really costs
#
# "The dominant term is $QK^T$", says the sheet, and so O($N^2$). That leaves out the width. A block of GPT with width
# `C` also has linears: `c_attn` (C to 3C), `c_proj` (C to C), and the feed-forward layer (C to 4C, and back). A pass
# over `N` tokens sends `N` rows through them. In multiply-adds,
#
# $$\underbrace{N (3 + 1 + 4 + 4)\, C^2}_{\text{linears}} + \underbrace{2\, N^2 C}_{QK^T \text{ and weights} \cdot V}$$
#
# Predict: with `C = 64`, at which `N` do the two parts of a full pass cost the same?
# %%
crossover = ...
check("crossover", crossover)
# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for cached, style, label in (False, "o-", "all read again"), (True, "s--", "cached step"):
    left.loglog(lengths, [entries(cost) for cost in costs[cached]], style, color="black", mfc="white", label=label)
    right.loglog(lengths, [(cost.flops("GEMM") + cost.flops("BGEMM")) / 2 for cost in costs[cached]], style,
                 color="black", mfc="white", label=label)
right.axvline(6 * C, color="black", linestyle=":")
right.text(5.8 * C, 1e6, "N = 6 C", ha="right")
left.set(title="entries of $QK^T$, one head", xlabel="tokens N", ylabel="for one more token")
right.set(title="multiply-adds, linears included", xlabel="tokens N")
left.legend(frameon=False)
plt.show()

for cached, label in (False, "all read again"), (True, "cached step"):
    GEMM, BGEMM = ([cost.flops(kind) / 2 for cost in costs[cached]] for kind in ("GEMM", "BGEMM"))
    both = [a + b for a, b in zip(GEMM, BGEMM)]
    print(f"{label:15} slopes: linears {slope(lengths, GEMM):5.2f}, attention {slope(lengths, BGEMM):4.2f}, "
          f"both {slope(lengths, both):4.2f}")
# %% [markdown]
# **Explain the plot.** In the right panel the line of the cached step is flat on the left, although its score
# entries, in the left panel, grow with slope 1. Why?
#
# - **a** Up to some length the single query meets a constant number of keys.
# - **b** The times are too short to be measured there.
# - **c** The linears of the one new token cost the same whatever lies before it, and at first they are most of it.
# - **d** The cached model is smaller.
#
# ## What it costs in memory
#
# Time is bought with memory. Write down the bytes: of a model with `L` layers, for `B` rows of `S` positions, with
# `H` query heads and `KV` heads of keys and values, of `D` numbers, each of `itemsize` bytes.
# %%
plot = ...

def kv_bytes(L, B, H, KV, D, S, itemsize):
    return ...  # your line

check("plot", plot)
check("bytes", kv_bytes)
# %%
def measured(L, B, H, KV, D, S):
    model = GPT(GPTConfig(n_layer=L, n_head=H, n_kv_head=KV, n_embd=H * D, vocab_size=9, block_size=S)).eval()
    cache = model.new_cache(B, S)
    advance(model, [[1]] * B, cache)  # a first pass allocates it
    return cache.nbytes


print("L  B  H  KV D   S      measured     your formula")
for shape in (2, 1, 4, 4, 16, 128), (2, 3, 4, 4, 16, 128), (2, 3, 4, 1, 16, 128), (5, 3, 4, 2, 16, 128):
    print(*(f"{n:<2}" for n in shape), f"{measured(*shape):12,} {accepted('bytes')(*shape, 8):14,}")
sizes = [measured(2, 1, 4, 4, 16, S) for S in lengths]
claim(24, "K and V are N d each, so memory scales as O(N)",
      f"the bytes of the buffers have slope {slope(lengths, sizes):.2f}", abs(slope(lengths, sizes) - 1) < 0.01)

row = accepted("bytes")(12, 1, 12, 12, 64, 1024, 4) / 2**20  # GPT-2's smallest, fp32, all of its positions
print(f"\nGPT-2: weights {124e6 * 4 / 2**20:,.0f} MiB; cache {row:,.0f} MiB for one row, {32 * row:,.0f} MiB for 32")
# %% [markdown]
# ## Two things to add to the sheet
#
# *Time.* A pass is O($N C^2 + N^2 C$), a cached step O($C^2 + N C$). The cache removes a factor of `N` from **both**
# terms: that is why it pays long before the quadratic term does. In GPT-2, `C = 768`, the terms meet at 6 x 768 =
# 4,608 tokens, far beyond its 1,024: in every pass it ever makes, the linears are the larger part.
#
# *Memory.* "$N \cdot d$ each" is one layer of one row. The whole is that times layers and rows, and $d$ is `KV` x
# `D`, the width of the *keys*: where heads share keys (lesson 8) it is smaller, and the cache with it.
#
# ## Your cache
#
# You have all the parts. Here is what a GPT does with a cache, and the three questions it asks. Everything else is
# `model.py`'s. Note that the count moves once per pass, behind the last layer: all layers write at the same positions.
#
# Your class is tried with one row and with three, in texts that are cut into chunks in seven ways, and its logits
# have to be right to 1e-10.
# %%
print(getsource(forward))
# %%
class MyCache:
    def __init__(self, n_layer, shape):
        """shape: (B, H, length, D), room for the keys of one layer; as much for its values. fp64 is the default."""
        self.k = ...
        self.v = ...
        self.filled = 0  # how many positions are stored: forward() counts it up

    def positions(self, T):
        return ...  # of the T new tokens: (T,)

    def write(self, layer, q, k, v):
        return ...  # keep what later tokens need, (B, H, T, D); return all keys and values so far, (B, H, S, D) each

    def mask(self, T):
        return ...  # (T, S), True where a new token may look


check("cache", MyCache)
# %%
Mine = accepted("cache")
set_seed(3)
model = small_gpt(n_layer=3, n_head=4, n_embd=C)  # random, but it attends sharply and writes varied texts
idx = torch.randint(97, (5, 12))
worst = 0
for chunks in splits(20):
    cache = Mine(3, (5, 4, 32, 16))
    logits = torch.cat([forward(model, part, cache) for part in idx.split(chunks, 1)], 1)
    worst = max(worst, (logits - model(idx)).abs().max().item())  # model(idx): the project's own pass, without a cache
print(f"{len(splits(20))} ways to cut 5 rows of 12 tokens: logits differ by at most {worst:.0e}")

cache, ids, text = Mine(3, (1, 4, 32, 16)), idx[:1], []
while len(text) < 20:
    ids = forward(model, ids, cache)[:, -1:].argmax(-1)  # the prompt first, then one token at a time
    text += ids[0].tolist()
[plain] = generate(model, idx[:1].tolist(), 20, strategy="naive", ignore_eos=True)
print("with your cache", *text)
print("without        ", *plain)
assert worst < 1e-10 and text == plain
# %% [markdown]
# Now open `cache.py` beside it. `positions` is what `passing()` yields. `write` is `KVCache.update`, `mask` is
# `Causal.allows` in `attention.py`, and `filled` is `filled`, one number for each row, so that rows may stand at
# different places. What is more there is for refusing a wrong call in plain words, for going back, and for caches
# that forget.
#
# ## Questions
#
# Try each one before you unfold the answer.
#
# **1.** Without a cache, in a model of 12 layers, could one still compute the query of the last token alone?
#
# <details><summary>Answer</summary>
#
# Only in the top layer. There the last row is all that is wanted, but it needs keys and values of all tokens, which
# come from the outputs of layer 11 for all tokens, and these need all queries of layer 11, and so on down. The saving
# of one query in every layer is possible because keys and values *are kept*. The sheet's two steps are one.
#
# </details>
#
# **2.** One more token is O(N) in the scores. What is a whole text of N tokens, with the cache and without?
#
# <details><summary>Answer</summary>
#
# Add up the steps. With the cache 1 + 2 + ... + N, about N² / 2, as many as the causal mask lets through in a single
# pass over the text. Without it 1 + 4 + 9 + ... + N², about N³ / 3.
#
# </details>
#
# **3.** Why may a key be kept at all? After all, the text goes on, and the model may "think again" about an old token.
#
# <details><summary>Answer</summary>
#
# Because of the causal mask. A token's key in any layer is made from what lies at or before it, and that does not
# change. Without the mask every new token would change the outputs of all earlier ones, and so their keys in the
# layers above. An encoder has no such cache.
#
# </details>
#
# **4.** Your buffer holds zeros, or an earlier text, behind `filled`. Why does nobody read that?
#
# <details><summary>Answer</summary>
#
# `write` returns only the first `filled + T` slots, and all of these have been written. If it returned the whole
# buffer, the mask would have to hide the rest, and it could: a slot behind the newest token has a position greater
# than every query's. Multiplied by a weight of 0 it would still spoil the sum if it held a NaN, which is why
# `cache.py` makes zeros of a row that starts afresh.
#
# </details>
#
# **5.** Positions are *added to the embeddings* here. Where would a wrong `positions()` show, and where would it not?
#
# <details><summary>Answer</summary>
#
# Prefill alone is right, as it starts at 0. The first step behind it is wrong: its token is embedded as if it were
# the first of the text. The mask may be right all the same, so nothing crashes, and the text merely becomes worse.
# That is why we compare logits, and not whether the text looks sensible.
#
# </details>
# %%
score()
