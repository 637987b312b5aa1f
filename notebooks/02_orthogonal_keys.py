# %% [markdown]
# # 2. Orthogonal keys
#
# Attention is a soft look-up: a query is compared with keys, and out comes a mixture of values. When is it a look-up
# proper, with a single value coming out? And when does a query treat two values exactly alike? The answers are short
# formulas, and one of them is true only in a limit.
#
# You will be able to
# - build keys and queries that fetch one value, and say how close to it the output comes;
# - say what orthogonal keys are good for, and what is needed instead when there are more keys than dimensions;
# - find the queries that treat two keys, or several, alike.
#
# You need: lesson 1, the scalar product, and what a projection is. The questions are those of section 2.1 of *the
# document* of lesson 1 (FNLP, tutorial 4). **Predict first**: put your answer in place of `...`, run the cell, and
# go on.

# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page

import math

import matplotlib.pyplot as plt
import torch

from attention import attend_explicit
from course import lesson

check, accepted, claim, score = lesson(2)
torch.set_printoptions(precision=4, sci_mode=False)

# %% [markdown]
# ## Two equations, with and without a root
#
# The document writes, for one query q, keys k_1 … k_n and values v_1 … v_n:
#
# $$c = \sum_i \alpha_i v_i \qquad \alpha_i = \frac{\exp(k_i^T q)}{\sum_j \exp(k_j^T q)}$$
#
# There is no 1/√d. `attend_explicit` divides by √d, as the document does later. We want to use the project's
# function.
#
# **Exercise `unscaled`.** Which query must be given to `attend_explicit`, so that its weights are those of the
# equation above for q?

# %%
def unscaled(q):
    return ...  # your line


check("unscaled", unscaled)

# %%
unscaled = accepted("unscaled")


def attention(q, K, V):
    """The document's c and alpha, for q (d,), K (n, d) and V (n, any)."""
    c, alpha = attend_explicit(unscaled(q)[None, None, None], K[None, None], V[None, None])
    return c[0, 0, 0], alpha[0, 0, 0]


torch.manual_seed(0)
q, K, V = (torch.randn(*shape, dtype=torch.float64) for shape in ((16,), (5, 16), (5, 3)))
literal = (K @ q).exp() / (K @ q).exp().sum()
c, alpha = attention(q, K, V)
claim(16, "weights are the exponentials of k^T q, divided by their sum; c is the average of the values with them",
      f"attend_explicit, its query multiplied by the root of d, differs by {(alpha - literal).abs().max():.0e} in the "
      f"weights and by {(c - literal @ V).abs().max():.0e} in c; the weights' sum is 1 to {abs(alpha.sum() - 1):.0e}",
      torch.allclose(alpha, literal) and torch.allclose(c, literal @ V) and abs(alpha.sum() - 1) < 1e-12)

# %% [markdown]
# ## Fetching one value
#
# Part (a): choose keys and queries so that the output is always *some* value. The document's answer: let the keys
# be orthogonal to each other, and each query a key multiplied by a constant. We call the constant s and give the
# keys length 1. Then the query s k_j scores s with its own key, and 0 with all others.
#
# **Exercise `keys`.** Write n random orthonormal keys of d numbers, as rows, for n ≤ d. (`torch.linalg.qr` of a
# random square matrix gives one, Q, whose rows are orthonormal.)
#
# **Exercise `alpha`.** Write the weight of the meant key, of n, at a constant s.

# %%
def keys(n, d):
    return ...  # your line: (n, d), in float64


def alpha(s, n):
    return ...  # your line: a number


check("keys", keys)
check("alpha", alpha)

# %% [markdown]
# **Exercise `first`.** What is the smallest whole s with which the meant value gets at least 0.99 of the weight: of
# n = 4 values, and of n = 1,024? A tuple. (Guess first; your function, or a logarithm, tells.)
#
# **Exercise `below`.** "A constant", says the document, of any sign. Let s = −20, and n = 4: what is the weight of
# the meant key, and what that of each other one? A tuple.

# %%
first = ..., ...
below = ..., ...
check("first", first)
check("below", below)

# %%
alpha = accepted("alpha")


def keys(n, d):
    return torch.as_tensor(accepted("keys")(n, d), dtype=torch.float64)


torch.manual_seed(1)
n, d, j = 4, 8, 2  # four values; the third is meant
K = keys(n, d)
V = torch.randn(n, d, dtype=torch.float64)
print("   s   alpha measured  predicted   |c - v_j|")
for s in 1, 5, 10, 20, -20:
    c, weights = attention(s * K[j], K, V)
    print(f"{s:4}   {weights[j]:14.10f} {alpha(s, n):10.5f}   {(c - V[j]).norm():.1e}")

errors = [(attention(s * K[j], K, V)[0] - V[j]).norm().item() for s in (1, 5, 10, 20)]
claim(17, "with a query that is a key multiplied by a constant, the output c equals a value",
      f"for s = 1, 5, 10, 20 it is {', '.join(f'{e:.0e}' for e in errors)} away from it", max(errors) == 0)
kinds = {"random": V, "large": 1e6 * V, "all but one alike": torch.ones_like(V).index_fill(0, torch.tensor([j]), 5)}
far = [((attention(30 * K[j], K, v)[0] - v[j]).norm() / v[j].norm()).item() for v in kinds.values()]
claim(17, "we could pick any value vectors", f"s = 30, values {', '.join(kinds)}: c is the meant one to a relative "
      f"{max(far):.0e}", max(far) < 1e-11)

# %% [markdown]
# So the recipe is good, with two words more: the constant must be *large and positive*. At a finite s each other
# value keeps a weight of about e^(−s), and c equals v_j only in the limit s → ∞. The error has a closed form, since
# what v_j lacks is shared out evenly: c − v_j = (1 − α) (mean of the others − v_j).
#
# The same with the root: `attend_explicit` divides by √d, so the query needs s √d to do what s does here.
#
# ## How fast?
#
# The error for s from 0 to 40, on a logarithmic axis, in both precisions. Which curve do you expect of something like
# e^(−s)?

# %%
scales = torch.arange(0, 41, 1.0, dtype=torch.float64)
others = V[[i for i in range(n) if i != j]].mean(0)
closed = [(n - 1) / (math.exp(s) + n - 1) * (others - V[j]).norm().item() for s in scales.tolist()]
measured = {dtype: [(attention((s * K[j]).to(dtype), K.to(dtype), V.to(dtype))[0] - V[j].to(dtype)).norm().item()
                    for s in scales] for dtype in (torch.float64, torch.float32)}
assert all(abs(m - e) < 1e-12 for m, e in zip(measured[torch.float64], closed))

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.semilogy(scales, closed, "-", color="black", label="closed form")
for (dtype, values), mark in zip(measured.items(), "ox"):
    ax.semilogy(scales, [value or math.nan for value in values], mark, color="black", markersize=4, fillstyle="none",
                label=f"measured, {str(dtype)[6:]}")
ax.set_xlabel("s, the length of the query (marks at exactly 0 cannot be drawn)")
ax.set_ylabel("error |c - v_j|")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()
print("float32: the error is exactly 0 from s =", measured[torch.float32].index(0))

# %% [markdown]
# **Exercise `floor`.** The crosses leave the line near s = 17, and soon the error in fp32 is exactly 0. Why?
#
# - a: c has become v_j: beyond this s the softmax of real numbers gives the others no weight at all.
# - b: what the other values add is smaller than half the distance between v_j's entries and the next fp32 number.
# - c: e^s is too large for fp32.
# - d: the keys are not orthogonal in fp32.
#
# ## Must keys be orthogonal?
#
# Let all four keys have length 1 and a cosine of 0.9 with each other: they are nearly parallel.
#
# **Exercise `factor`.** How many times as large must s be, to reach the same weight as with orthogonal keys?

# %%
floor = ...
factor = ...
check("floor", floor)
check("factor", factor)

# %%
def alike(cosine, n=4):
    """Unit keys that have this cosine with each other."""
    return torch.linalg.cholesky(torch.full((n, n), cosine, dtype=torch.float64).fill_diagonal_(1))


longer = alike(0.7)
longer[0] *= 2  # the first key is twice as long: its product with the third is 1.4
cases = {"orthogonal": (alike(0.0), "-"), "cosine 0.9": (alike(0.9), "--"),
         "cosine 0.7, another key longer": (longer, ":")}
steps = range(0, 101)
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for name, (K4, line) in cases.items():
    weight = torch.stack([attention(s * K4[j], K4, V)[1][j] for s in steps])
    ax.plot(steps, weight, line, color="black", label=name)
    reached = next((s for s, w in zip(steps, weight) if w >= 0.99), None)
    print(f"{name:31} lead of the own key {(2 * K4[j] @ K4[j] - (K4 @ K4[j]).topk(2).values.sum()).item():5.2f}   "
          f"0.99 from s = {reached}")
ax.set_xlabel("s")
ax.set_ylabel("weight of the meant value")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# Orthogonality is sufficient, and more than is needed. What counts is the **lead** of the own key,
# $k_j^T k_j - \max_{i \neq j} k_i^T k_j$: if it is positive, the weight goes to 1, and what is missing shrinks like
# $e^{-s \cdot lead}$. Unit keys that are different always lead, because their product with others is less than 1. The
# recipe breaks when another key is *longer*, so that it wins with a query that was not meant for it. What
# orthogonality buys is a lead of 1, the same for all.
#
# ## More keys than dimensions
#
# **Exercise `most`.** How many vectors of 64 numbers, none of them zero, can be orthogonal to each other?
#
# **Exercise `found`.** 1,000 random unit keys of 64 numbers, and the 1,000 queries 20 k_j. For how many of them is
# the largest weight that of their own key?

# %%
most = ...
found = ...
check("most", most)
check("found", found)

# %%
torch.manual_seed(3)
assert keys(64, 64).size(0) == torch.linalg.matrix_rank(keys(64, 64)) == accepted("most")
print("   n    d   largest cosine   own key first   smallest s for 0.99, for every one of them")
for n, d in (64, 64), (256, 64), (1000, 64), (1000, 512):
    K = keys(n, d) if n <= d else torch.nn.functional.normalize(torch.randn(1000, d, dtype=torch.float64), dim=1)[:n]
    products = K @ K.T
    own = (products.argmax(1) == torch.arange(n)).sum().item()
    needed = next(s for s in range(1, 200) if (s * products).softmax(1).diagonal().min() >= 0.99)
    print(f"{n:4} {d:4}   {products.fill_diagonal_(-1).max():14.2f}   {own:13}   {needed:10}")
    assert (n, d) != (1000, 64) or own == accepted("found")

# %% [markdown]
# At most d keys are orthogonal, and a thousand in 64 dimensions are still told apart: random directions are nearly
# orthogonal, the better the more dimensions (cosines spread by 1/√d). The price is a larger s. So a head of 64
# numbers can work with 1,024 positions.
#
# ## Equal attention
#
# Part (b): two keys, and a query that gives both the weight 1/2. The weights are equal when the scores are. In the
# document's copy that we have, the line reads "k₁ᵀq k₂ᵀq = (k₁ᵀ k₂ᵀ)q = 0", and "orthogonal to the difference vector
# k₁ k₂". The minus signs got lost; the words "difference vector" tell where they belong:
#
# $$k_1^T q = k_2^T q \iff k_1^T q - k_2^T q = (k_1 - k_2)^T q = 0$$
#
# **Exercise `equal`.** Write the query with equal weights that is nearest to a given r.

# %%
def equal(k1, k2, r):
    return ...  # your lines: (d,), orthogonal to k1 - k2, and otherwise r


check("equal", equal)

# %%
equal = accepted("equal")
torch.manual_seed(4)
unequal = {"k1 - k2": 0.0, "k1 k2 as printed, read entry by entry,": 0.0}
for _ in range(100):
    k1, k2, r = torch.randn(3, 8, dtype=torch.float64)
    for name, direction in zip(unequal, (k1 - k2, k1 * k2)):
        q = equal(direction, torch.zeros(8, dtype=torch.float64), r)  # r without what it has of this direction
        weights = attention(q, torch.stack([k1, k2]), torch.eye(2, dtype=torch.float64))[1]
        unequal[name] = max(unequal[name], abs(weights[0] - 0.5).item())
for name, error in unequal.items():
    claim(18, f"q orthogonal to {name} has the weights 1/2 and 1/2", f"100 random pairs, off by up to {error:.0e}",
          error < 1e-12)

# %% [markdown]
# ## Several at once
#
# **Exercise `several`.** Both parts together: of n orthonormal keys, some are chosen, for example [0, 2]. Write the
# query with which each chosen key scores s, and each other 0. What comes out, for a large s, is the mean of the
# chosen values.
#
# **Exercise `generic`.** Now the keys are any vectors of 8 numbers, in no special position. For how many of them, at
# most, is there always a query, not 0, that gives all of them the same weight?

# %%
def several(K, chosen, s):
    return ...  # your line: (d,)


generic = ...
check("several", several)
check("generic", generic)

# %%
torch.manual_seed(5)
several, K, V = accepted("several"), keys(6, 8), torch.randn(6, 3, dtype=torch.float64)
for chosen in [0, 2], [1, 3, 4], [0, 1, 2, 3, 4, 5]:
    c, weights = attention(several(K, chosen, 20), K, V)
    m = len(chosen)
    print(chosen, "weights", weights, f"off the mean by {(c - V[chosen].mean(0)).norm():.0e}")
    assert abs(weights[chosen[0]] - math.exp(20) / (m * math.exp(20) + 6 - m)) < 1e-12

free = {}
for m in range(2, 11):
    K = torch.randn(m, 8, dtype=torch.float64)
    free[m] = 8 - torch.linalg.matrix_rank(K[1:] - K[0]).item()  # m - 1 conditions, as long as they are independent
print("keys -> dimensions of the queries that treat them alike:", free)
assert max(m for m in free if free[m]) == accepted("generic")

# %%
score()

# %% [markdown]
# ## Questions
#
# **1.** A query and a key have 64 entries of size 1. Which s can equation 4, with its root, reach at most, and what
# is then the weight of the meant one of 1,024 orthogonal keys?
#
# <details><summary>Answer</summary>
#
# Both have length √64 = 8, so the product is at most 64, and 64 / √64 = 8. The weight is e⁸ / (e⁸ + 1,023) = 0.74.
# (1,024 orthogonal keys do not fit into 64 dimensions, so take it as an estimate.) A head that wants to be sharper
# must learn longer queries or keys.
#
# </details>
#
# **2.** The query q = 0 treats all keys alike. What is the output?
#
# <details><summary>Answer</summary>
#
# The plain mean of all values: each weight is 1/n. It is the trivial answer to part (b), for any number of keys.
#
# </details>
#
# **3.** Two keys are equal. Which queries tell their values apart?
#
# <details><summary>Answer</summary>
#
# None: k₁ − k₂ = 0 is orthogonal to every q, so both values always have the same weight. A word that stands twice
# in a text has the same key at both places unless its position is part of what the key is made from.
#
# </details>
#
# **4.** Let k₃ = (k₁ + k₂) / 2. Is there a query of any kind, not only a multiple of k₃, that gives v₃ more weight
# than the two others?
#
# <details><summary>Answer</summary>
#
# No. Its score is the mean of the two other scores, so it never exceeds both. A key can be singled out exactly when
# it is a corner of the convex hull of all keys. Unit keys are all corners, since they lie on a sphere.
#
# </details>
#
# **5.** From s = 5.7 on, one of four orthogonal keys has 0.99 of the weight. What must s be for 0.9999?
#
# <details><summary>Answer</summary>
#
# e^s must be 9,999 · 3 instead of 99 · 3, so ln 101 = 4.6 more: 10.3. Each factor of 100 in the error costs 4.6 in s.
#
# </details>
