# %% [markdown]
# # 9. Sparse attention
#
# Causal attention lets every position look at its whole past, which makes n(n + 1)/2 pairs. Child et al. (2019) let it
# look at about sqrt(n) positions instead, chosen so that two layers together still reach everything. In this lesson you
# write their masks, count them, compute one of them without the pairs that it hides, and see what a decode step has to
# keep. The text we check is the first half of a short blog post, "Speeding up Transformers" (2023), and where we quote
# a pattern, it is from the paper, *Generating long sequences with sparse transformers*, section 4.
#
# You will be able to
#
# - write a mask as a predicate over positions, and count what it allows;
# - say when attention costs O(n sqrt(n)), and when it only seems to;
# - turn a mask into a computation that saves something;
# - tell what a cache may forget, and which test notices if it forgets too early.
#
# Before this: lesson 3, the KV cache. Open beside this page: `sparse.py` and `evict.py`.

# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparse
from attention import Causal, CausalSelfAttention, attend, attend_explicit, dense
from course import lesson
from course.speaks import speaks
from evict import Ring
from model import GPTConfig
from sparse import Block, Column, Columns, Fixed, Local, Strided, TopK

torch.manual_seed(0)
torch.set_grad_enabled(False)
check, accepted, claim, score = lesson(9)

# %% [markdown]
# ## Four predicates
#
# A mask answers one question: may the query at position q see the key at position k? In this project that question *is*
# the mask, a function of positions: `dense()` in attention.py turns it into a tensor of True and False, and a
# block-sparse kernel could take it as it is. Causal attention is `k <= q`.
#
# First a number: how many pairs does causal attention have in a text of n = 1,024 positions? Then write the other three
# predicates. `q` and `k` are tensors of positions which broadcast against each other, so combine comparisons with `&`
# and `|`, each in brackets.
#
# - **local**: the newest `w` positions, one's own included.
# - **strided**: the newest `l` positions, and, further back, every `l`-th one, counted backwards from the query. The
#   paper proposes it for images and sound, where `l` is the length of a row or of a period.
# - **fixed**: cut the text into blocks of `l`. A query sees its own block (up to itself), and the last `c` positions of
#   every block before it. These columns have seen their block, so they can sum it up. The paper proposes it for text,
#   where nothing repeats after exactly `l` positions.

# %%
causal_pairs = ...


def local(q, k, w):
    return ...  # your line


def strided(q, k, l):
    return ...  # your line


def fixed(q, k, l, c):
    return ...  # your line


check("causal_pairs", causal_pairs)
check("local", local)
check("strided", strided)
check("fixed", fixed)

# %% [markdown]
# Here they are for 16 positions, with w = l = 4 and c = 1. Row: query. Column: key. Dark: allowed.

# %%
def pairs(predicate, n):
    """The mask (n, n) of a predicate over positions."""
    pos = torch.arange(n)
    return dense(lambda b, h, q, k: predicate(q, k), pos, pos)[0, 0]


masks = {
    "causal": lambda q, k: k <= q,
    "local, w = 4": lambda q, k: accepted("local")(q, k, 4),
    "strided, l = 4": lambda q, k: accepted("strided")(q, k, 4),
    "fixed, l = 4, c = 1": lambda q, k: accepted("fixed")(q, k, 4, 1),
}
fig, axes = plt.subplots(1, 4, figsize=(9, 2.7), sharey=True, layout="constrained")
for ax, (name, predicate) in zip(axes, masks.items()):
    mask = pairs(predicate, 16)
    ax.pcolormesh(mask, cmap="Greys", vmax=1.4, edgecolors="lightgrey", linewidth=0.5)
    ax.set(title=f"{name}\n{mask.sum()} pairs", xlabel="key", xticks=range(0, 17, 4), yticks=range(0, 17, 4))
    ax.set_aspect("equal")
axes[0].set_ylabel("query")
axes[0].invert_yaxis()
plt.show()

# %% [markdown]
# ## How many pairs
#
# The fixed pattern with l = sqrt(n) and c = 1 can be counted with a pencil. Within the blocks there are n/l triangles
# of side l. And each query sees one column for every block before its own. What does that make for n = 1,024, l = 32?
#
# The next cell counts it. The blog post says that time and memory "no longer grow quadratically" but as O(n sqrt(n)).
# On logarithmic axes a power of n is a straight line, and its slope is the power. No stopwatch is needed: we fit the
# counts.

# %%
fixed_pairs = ...
check("fixed_pairs", fixed_pairs)

# %%
lengths = [64, 256, 1024, 4096]
counted = {"full": [], "fixed": [], "strided": [], "strided, l = 8": []}
for n in lengths:
    l = math.isqrt(n)
    counted["full"].append(pairs(masks["causal"], n).sum().item())
    counted["fixed"].append(pairs(lambda q, k: accepted("fixed")(q, k, l, 1), n).sum().item())
    counted["strided"].append(pairs(lambda q, k: accepted("strided")(q, k, l), n).sum().item())
    counted["strided, l = 8"].append(pairs(lambda q, k: accepted("strided")(q, k, 8), n).sum().item())
print("n         ", *(f"{n:>10,}" for n in lengths))
for name in ("full", "fixed", "strided"):
    print(f"{name:10}", *(f"{count:>10,}" for count in counted[name]))
exact = [n * math.isqrt(n) for n in lengths]
claim(44, "with l = sqrt(n) and c = 1 the paper's fixed pattern makes n sqrt(n) pairs",
      f"fixed {counted['fixed']}, n sqrt(n) {exact}", counted["fixed"] == exact)

slopes = {name: np.polyfit(np.log(lengths), np.log(counts), 1)[0] for name, counts in counted.items()}
claim(45, "time and memory grow like n sqrt(n) instead of n^2",
      "pairs grow with the power " + ", ".join(f"{slopes[name]:.2f} ({name})" for name in ("full", "fixed", "strided")),
      abs(slopes["full"] - 2) < 0.05 and all(abs(slopes[name] - 1.5) < 0.05 for name in ("fixed", "strided")))

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
styles = {"full": "ks-", "strided, l = 8": "kx:", "strided": "ko-", "fixed": "k^--"}
for name, style in styles.items():
    label = name if name in ("full", "strided, l = 8") else f"{name}, l = sqrt(n)"
    ax.loglog(lengths, counted[name], style, label=f"{label}: slope {slopes[name]:.2f}", fillstyle="none")
ax.set(xlabel="positions n", ylabel="pairs of query and key")
ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
ax.minorticks_off()
ax.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# **Explain this plot.** The dotted line is the strided pattern too, but its stride stays 8 while the text grows. It
# begins where the solid one begins, and climbs faster. What will its slope be in the long run?
#
# - **a** 1.5: the stride is a constant, and constants do not count in O(...).
# - **b** 1: each position has a window of 8 keys, and that is what grows with the text.
# - **c** 2: behind a query at q there are about q / 8 far keys, so the pairs are about n^2 / 16.
# - **d** What was fitted: a power law has one slope everywhere.

# %%
stride_kept = ...
check("stride_kept", stride_kept)

# %% [markdown]
# ## Two hops
#
# The patterns see little at once. The paper's promise is that two of them in a row see everything: it splits each
# pattern into two parts, for two kinds of heads or for layers in turn.
#
# - strided = **local** (the newest l) and **column** (every l-th before oneself);
# - fixed = **block** (one's own block) and **columns** (the last c of every block, and oneself).
#
# In the first layer position m gathers from what it sees; in the second, position i gathers from the m that *it* sees.
# Write that: from the masks of both layers, each (n, n) with rows for queries, the mask of all (i, j) such that
# something of j can have arrived in i after the second layer.
#
# Does it matter which part comes first? Predict, with a pencil and l = 4 if you like: everything before a query is
# reached
#
# - **a** with both patterns, in either order;
# - **b** with strided in either order, with fixed only if the layer with blocks comes first;
# - **c** with strided in either order, with fixed only if the layer with columns comes first;
# - **d** with neither pattern: three hops are needed.

# %%
def reach(first, second):
    return ...  # your line


orders = ...
check("reach", reach)
check("orders", orders)

# %%
n, l = 64, 8
part = {p: pairs(lambda q, k: p.allows(0, 0, q, k), n) for p in (Local(l), Column(l), Block(l), Columns(l, 1))}
names = {p: type(p).__name__ for p in part}
window, column, block, columns = part
everything = pairs(lambda q, k: k <= q, n)
complete = {}
for first, second in (window, column), (column, window), (block, columns), (columns, block):
    reached = accepted("reach")(part[first], part[second])
    complete[first, second] = torch.equal(reached, everything)
    print(f"{names[first]:8} then {names[second]:8} {reached.sum():5} of {everything.sum()} pairs")
claim(46, "two factorised hops reach every causal pair (the paper)",
      f"strided: in both orders {complete[window, column] and complete[column, window]}; "
      f"fixed: with blocks first {complete[block, columns]}, with columns first {complete[columns, block]}",
      complete[window, column] and complete[block, columns])

# %% [markdown]
# So the order of the layers belongs to the pattern. (A deep stack which takes turns contains both orders, one layer
# apart.) The merged patterns, which you wrote above, put both parts under one softmax and lose nothing of this.
#
# ## Learned patterns?
#
# The post says that the authors present "fixed and learned attention patterns", the latter chosen from the input. It is
# a natural reading of the title, but the paper's two patterns are called *strided* and *fixed*, and both are static:
# which pairs they allow is known before any text is. We can ask the computation itself. With unit vectors as values,
# the output of attention *is* its weights. So we run each pattern on two different texts, and compare who saw whom.
#
# For contrast there is `TopK`, which is not from this paper. It sees its own block, and the earlier blocks whose last
# keys match the query best, so what it sees depends on the content. Early forms of such attention are those of Kitaev
# et al. (2020, Reformer) and Roy et al. (2021, Routing Transformer).

# %%
def seen(pattern, q, k):
    """Who sees whom in the output of a pattern, (n, n): where its weights are not zero."""
    units = torch.eye(n, dtype=q.dtype).expand(1, 1, n, n)
    return pattern(q, k, units, torch.arange(n), torch.arange(n))[0, 0] > 0


texts = [[torch.randn(1, 1, n, 16, dtype=torch.float64) for _ in "qk"] for _ in range(2)]
changed = {}
for pattern in Fixed(l, 1), Strided(l), TopK(l, 2):
    one, other = (seen(pattern, *text) for text in texts)
    name = type(pattern).__name__
    changed[name] = (one != other).sum().item()
    print(f"{name:8} {one.sum():5} pairs in one text; in {changed[name]} places another text has other pairs")
claim(47, "the patterns are fixed ones, and ones that are learned from the input",
      f"another text changes {changed['Fixed']} pairs of fixed and {changed['Strided']} of strided: both are static",
      changed["Fixed"] + changed["Strided"] > 0)

# %% [markdown]
# ## A mask saves nothing
#
# The scores that a mask hides are computed first, and hidden then: n^2 products, whatever the mask. To save, the
# computation must bring together only what may meet. For the **block** part that is easy: blocks do not see each other,
# so they may be rows of the batch. Write it: q, k, v are (B, H, n, D), n is a multiple of l, and so is the result.
# `attend(q, k, v, is_causal=True)` is causal attention in each row of a batch.

# %%
def block_attention(q, k, v, l):
    return ...  # your lines


check("blocks", block_attention)

# %% [markdown]
# `sparse.py` does that for each pattern: `fold()` is your function, with padding, and for the union of strided it joins
# two attentions into one softmax. We count the scores that reach the kernel, and compare with the masked form.

# %%
class Scores(TorchDispatchMode):
    """Counts the scores (queries x keys, in all rows) of each attention kernel that runs in the block."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if getattr(function, "overloadpacket", None) is sparse.KERNEL:
            rows, heads, T, _ = args[0].shape
            self.total += rows * heads * T * args[1].size(2)
        return function(*args, **(kwargs or {}))


n, l = 1024, 32
pos = torch.arange(n)
q, k, v = (torch.randn(1, 1, n, 16, dtype=torch.float64) for _ in range(3))
gaps = []
print("          allowed    computed   difference from the mask")
for pattern in Causal(0.0), Local(l), Block(l), Fixed(l, 1), Strided(l):
    with Scores() as scores:
        y = pattern(q, k, v, pos, pos)
    allowed = dense(pattern.allows, pos, pos)
    gaps.append((y - attend_explicit(q, k, v, allowed)[0]).abs().max().item())
    print(f"{type(pattern).__name__:8} {allowed.sum():8,} {scores.total:11,}   {gaps[-1]:.0e}")
gaps.append((accepted("blocks")(q, k, v, l) - Block(l)(q, k, v, pos, pos)).abs().max().item())
assert max(gaps) < 1e-10

# %% [markdown]
# Each computation does about twice the pairs of its mask, because it works in squares where the mask has triangles, and
# not the n^2 of the masked form. So the n sqrt(n) of the paper becomes time. (A layer also has projections, which cost
# n C^2 whatever the pattern: for short texts they are most of it, and sparse attention changes little.)
#
# ## What a decode step must keep
#
# A decode step has one query. What it reads is one row of the mask, at most 2l - 1 keys for fixed and strided. What the
# KV cache must *keep* is another question: a key may go only when no later query can see it.
#
# Write that down. `allowed` is the mask (n, n) of a pattern, and the keys of positions 0 to t have been stored. How
# many of them does query t, or one after it, still see?
#
# With that, predict for n = 4,096 and w = l = 64, c = 1 how many slots a row of the cache needs for *full*, *local*,
# *strided* and *fixed*, in this order. (Two positions share a slot if the older one is never needed again.)

# %%
def must_keep(allowed, t):
    return ...  # your line


slots = ...
check("must_keep", must_keep)
check("slots", slots)

# %%
def longest_need(pattern, n):
    """The most keys that must be kept at any time, by your function."""
    mask = pairs(lambda q, k: pattern.allows(0, 0, q, k), n)
    return max(int(accepted("must_keep")(mask, t)) for t in range(n))


n, l = 4096, 64
config = GPTConfig(n_head=1, n_embd=8, block_size=n, max_batch_size=1, attn_pdrop=0.0)
x = torch.randn(1, n, 8)
print("           n = 256, l = 16      n = 4,096, l = 64")
print("           must keep   slots    slots   read by the last step")
kept = []
for cls, *rest in (Causal,), (Local,), (Strided,), (Fixed, 1):
    make = lambda l: cls(0.0) if cls is Causal else cls(l, *rest)
    layer = CausalSelfAttention(config, pattern=lambda p: make(l)).eval()
    layer(x[:, :-1], use_kv_cache=True)  # prefill
    with Scores() as step:
        layer(x[:, -1:], use_kv_cache=True, start_pos=n - 1)
    kept.append(layer.cache_k.size(2))
    print(f"{cls.__name__:8} {longest_need(make(16), 256):11,} {make(16).slots(256)[0].size:7,} {kept[-1]:8,} "
          f"{step.total:8,}")
assert kept == list(accepted("slots"))

# %% [markdown]
# Strided reads as little as fixed, yet it must keep nearly everything: each position is due again every l steps. The
# fixed pattern keeps the columns and one block, 2l - 1 slots. So the "memory" of the post is that of training, where
# attention, written out, keeps all its pairs for the backward pass. In decoding it is the cache, and there only one of
# the two patterns is small.
#
# In evict.py `Ring` serves the window, whose position p goes into slot p modulo w, and `Summaries` the fixed pattern:
# the columns stay in front, and blocks take turns in the slots behind them.
#
# ## A window that forgets too early
#
# Suppose somebody counts the window as "what lies before me", and gives the ring of a window of 8 only 7 slots. A whole
# text at once is computed right, nothing is stored there. A text that is decoded, one token at a time from position 0
# on: at which position is the output wrong for the first time?
#
# Nothing crashes, and the texts look plausible: only a comparison finds such a mistake. **Change this file and see
# which test speaks.** We make that very change in a copy of `sparse.py`, and run four of its tests. Which of them fail?
#
# - **a** `test_a_fold_is_its_predicate_values_and_gradients`: whole texts, fold against mask
# - **b** `test_the_entries_are_n_sqrt_n`: counts the predicates
# - **c** `test_a_cache_keeps_what_can_still_be_seen`: looks into the slots after 40 positions
# - **d** `test_a_layer_with_a_window_goes_on_beyond_its_buffer`: prefill and decode steps against the whole text

# %%
first_wrong = ...
which = ...  # a set of letters, such as {"a", "b"}
check("first_wrong", first_wrong)
check("speaks", which)

# %%
class Forgetful(Local):
    def slots(self, length):
        return [Ring(self.window - 1, self.window - 1)]


config.n_embd, config.block_size = 16, 64
gap = {}
x = torch.randn(1, 24, 16)
for kind in Local, Forgetful:
    torch.manual_seed(0)  # the same weights
    layer = CausalSelfAttention(config, pattern=lambda p: kind(8, p=p)).eval()
    steps = [layer(x[:, t : t + 1], use_kv_cache=True, start_pos=t) for t in range(24)]
    gap[kind] = (torch.cat(steps, 1) - layer(x)).abs().amax((0, 2))
wrong = (gap[Forgetful] > 1e-5).nonzero().flatten().tolist()
print("a ring of 8: largest difference", f"{gap[Local].max():.0e}")
print("a ring of 7: wrong at positions", wrong)
assert wrong[0] == accepted("first_wrong")

tests = {"a": "test_a_fold_is_its_predicate_values_and_gradients", "b": "test_the_entries_are_n_sqrt_n",
         "c": "test_a_cache_keeps_what_can_still_be_seen", "d": "test_a_layer_with_a_window_goes_on_beyond_its_buffer"}
old, new = "[Ring(size, self.window, self.sinks) if", "[Ring(size - 1, self.window - 1, self.sinks) if"
failed = speaks("sparse.py", old, new, [f"tests/test_sparse.py::{name}" for name in tests.values()])
print("it speaks:", *failed, sep="\n  ")
assert set(failed) == {tests[letter] for letter in accepted("speaks")}

# %%
score()

# %% [markdown]
# ## Questions
#
# Try each one before you unfold the answer.
#
# **1.** Why do the fixed pattern's columns stand at the *end* of each block and not at its beginning?
#
# <details><summary>Answer</summary>
#
# In a causal model a position knows only what lies before it. The last position of a block can have seen the whole of
# it, the first one nothing of it. Through first positions the rest of an earlier block would never arrive.
#
# </details>
#
# **2.** With l = 128 in all texts, from which length on has the strided pattern more far keys than near ones, for the
# last query?
#
# <details><summary>Answer</summary>
#
# Near are l = 128 keys, far about n / l. They are equal at n = l^2 = 16,384, which is where l = sqrt(n) comes from: it
# balances the two. Beyond that length the far ones win, and the pairs grow with the square.
#
# </details>
#
# **3.** A query of a local pattern sees 128 positions, in each of 12 layers. How far back can the last layer's output
# depend on the text?
#
# <details><summary>Answer</summary>
#
# Each layer goes back 127 further positions, so 12 x 127 = 1,524 positions, and its own. A window is not a horizon. But
# what comes from far has passed through twelve softmaxes.
#
# </details>
#
# **4.** The strided pattern as one softmax keeps every key. Split over heads, half of them local and half column: what
# must the cache of one layer keep?
#
# <details><summary>Answer</summary>
#
# The local heads need a ring of l slots. The column heads need all n, since every residue class is asked again. So half
# of the heads' cache shrinks to l / n of its size, and the whole to a little more than half. `local:64+column:64` is
# that pattern by name.
#
# </details>
#
# **5.** A decoding with `local:8` has stored 20 tokens one by one. Why is `rewind(18)` refused, and `rewind(19)` not?
#
# <details><summary>Answer</summary>
#
# After a rewind to 18 the next query stands at 18 and sees positions 11 to 18. The ring holds the newest 8, 12 to 19:
# 11 has been overwritten. A query at 19 sees 12 to 19, which are there, or about to be written. What has been evicted
# cannot be had back, so the cache refuses by name (`remembers()` in evict.py) where the alternative is a wrong text.
#
# </details>
