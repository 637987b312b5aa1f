# %% [markdown]
# # 1. Attention by hand
#
# Three tokens, *The cat is*, go through one attention layer. The numbers are small integers, so that pencil and
# paper suffice: you compute a query, the scores, the weights and an output yourself, and then `attention.py`
# computes the same.
#
# You will be able to
# - write `softmax(Q K^T / sqrt(d)) V` in four lines, and say what each shape means;
# - say which number stands under the root once there are several heads;
# - state a mask as a question about two positions, true or false;
# - count what attention computes for N tokens, and say when that matters.
#
# You need: matrix products, and a little PyTorch. Keep `attention.py` open beside this page. The questions are
# those of a tutorial on transformers (FNLP, tutorial 4); we call it *the document*, and check each of its
# statements. **Predict first**: put your answer in place of `...` and run the cell. Without an answer the page goes
# on with ours.

# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page

import math

import matplotlib.pyplot as plt
import torch

from attention import Causal, CausalSelfAttention, attend, attend_explicit, dense
from cost import count
from course import lesson
from course.speaks import speaks
from model import GPT

check, accepted, claim, score = lesson(1)
torch.set_grad_enabled(False)  # we look, and do not train
torch.set_printoptions(precision=3, sci_mode=False)

# %% [markdown]
# ## From embeddings to queries, keys and values
#
# Each row of X is a token, its position already added: three features say article, noun and verb, the fourth is the
# position. Every token gets a *query* (what it looks for), a *key* (how it is found) and a *value* (what it passes
# on): `Q = X W_Q`, `K = X W_K`, `V = X W_V`.
#
#             X                W_Q                 W_K               W_V
#     the   1  0  0  0       1  2  0  0         2  0  0  0        1  0  2  1
#     cat   0  1  0  1       2  1  0 -1         0  2  0  0        0  2  0  1
#     is    0  0  1  2       0  1 -1  0         0  0  2  0        1  1  0  1
#                            0  0  0  1         0  0  0  1        0  0  0  0
#
# **Exercise `query`.** With a pencil: what is the query of *is*, the last row of Q? Four numbers, as a list.

# %%
query = ...
check("query", query)

# %%
tokens = ["the", "cat", "is"]
X = torch.tensor([[1., 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 2]])  # (N, C)
W_Q = torch.tensor([[1., 2, 0, 0], [2, 1, 0, -1], [0, 1, -1, 0], [0, 0, 0, 1]])
W_K = torch.diag(torch.tensor([2., 2, 2, 1]))
W_V = torch.tensor([[1., 0, 2, 1], [0, 2, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]])
Q, K, V = X @ W_Q, X @ W_K, X @ W_V
for name, matrix in ("Q", Q), ("K", K), ("V", V):
    print(name, *(f"   {token:4}{row}" for token, row in zip(tokens, matrix.int().tolist())), sep="\n")

# %% [markdown]
# ## Scores
#
# The score of query i and key j is their dot product, divided by the root of d, the length of one key (why: below).
#
# **Exercise `scores`.** Write the function, for q of shape (T, d) and k of shape (S, d).
#
# **Exercise `weights`.** Then the softmax along each row, without calling PyTorch's: `e^score`, divided by the sum
# of its row. One of the cases has a score of 1000.

# %%
def scores(q, k):
    return ...  # your line: (T, S)


def weights(scores):
    return ...  # your lines: (T, S), each row sums to one


check("scores", scores)
check("weights", weights)

# %% [markdown]
# **Exercise `peak`.** The products `q k^T` of *is* with the three keys are 0, 4 and 2: check it on the matrices
# above. How much weight does *is* give to *cat*? Three decimals. (e = 2.718, e² = 7.389; here d = 4.)
#
# **Exercise `output`.** Its output is the average of the rows of V with these weights. Two decimals, four numbers.

# %%
peak = ...
output = ...
check("peak", peak)
check("output", output)

# %%
scores, weights = accepted("scores"), accepted("weights")
A = weights(scores(Q, K))
print("Q K^T", *(Q @ K.T).int().tolist(), sep="\n   ")
print("weights", A, "output", A @ V, sep="\n")
claim(16, "the output is an average over the value vectors, weighted by the attention weights",
      f"no weight below {A.min():.3f}, row sums {[round(s, 6) for s in A.sum(1).tolist()]}, and the entry that is 1 in "
      f"each value is {[round(s, 6) for s in (A @ V)[:, 3].tolist()]} in the outputs",
      bool((A >= 0).all()) and torch.allclose(A.sum(1), torch.ones(3)) and torch.allclose((A @ V)[:, 3], torch.ones(3)))

# %% [markdown]
# Look at the rows of weights: they hold the same three numbers in another order, because the scores are 0, 1 and 2
# in another order. Only differences count: adding 5 to all scores of a row multiplies above and below the line by
# e⁵. That is also how a score of 1000 is survived: subtract the row's maximum first, as PyTorch does. (The document
# numbers the weights "α_i, …, α_n"; they begin at α₁.)
#
# ## No looking ahead
#
# *the* gives two thirds of its attention to *cat*, which has not been written yet when *the* is read. A decoder
# must not do that, since it learns to predict just these tokens. So in every row the scores of later keys become
# −inf *before* the softmax.
#
# **Exercise `masked`.** The scores of *cat*, divided by the root, are 2, 1 and 0. What are its three weights with
# the mask?
#
# **Exercise `may`.** In this project a mask is a question about two positions: may the query at q see the key at k?
# Write it so that it also holds for a query that stands alone at position 4 while keys 0 to 4 are stored: the
# decode step.

# %%
masked = ...


def may(q, k):
    return ...  # your line: q and k are tensors of positions that broadcast


check("masked", masked)
check("may", may)

# %%
may = accepted("may")
pos = torch.arange(3)
mask = dense(lambda b, h, q, k: may(q, k), pos, pos).bool()  # (1, 1, T, S), as attention.py makes it
assert mask.equal(dense(Causal.allows, pos, pos))
causal = weights(scores(Q, K).masked_fill(~mask[0, 0], -math.inf))
step = dense(lambda b, h, q, k: may(q, k), torch.tensor([4]), torch.arange(5))
print("a decode step, position 4 among keys 0 to 4:", step.flatten().tolist())

fig, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
panels = ("Q", Q, None), ("K", K, None), ("weights, all seen", A, tokens), ("weights, causal", causal, tokens)
for ax, (title, matrix, columns) in zip(axes, panels):
    ax.imshow(matrix if columns else torch.zeros_like(matrix), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(matrix.tolist()):
        for j, number in enumerate(row):
            ax.text(j, i, f"{number:.2f}" if columns else f"{number:.0f}", ha="center", va="center",
                    color="white" if columns and number > 0.5 else "black")
    ax.set_title(title, fontsize=10)
    ax.set_yticks(range(3), tokens)
    ax.set_xticks(range(matrix.size(1)), columns or range(4))
    ax.set_xlabel("key of" if columns else "feature")
    ax.set_ylabel("query of" if title != "K" else "key of")
plt.show()

# %% [markdown]
# ## The same in attention.py
#
# `attend_explicit` is what you have just written, for any number of rows and heads; `attend` gives the same through
# a fused kernel. The layer `CausalSelfAttention` has the three matrices in one, `c_attn`, and a fourth behind the
# heads, `c_proj`. We set them by hand: biases to zero, and `c_proj` to the identity (the document has none).
#
# **Exercise `picture`.** First a look at the two grey tables: the row of *is* is the same in both. Why?
#
# - a: its largest score is as large as in the other rows.
# - b: it is the last token, so the mask hides nothing from it.
# - c: the mask changes only weights below one half.
# - d: it is an accident of these small numbers.
#
# **Exercise `packed`.** What is `c_attn.weight`, of shape (3 C, C), made of W_Q, W_K and W_V? An `nn.Linear` with
# weight A computes `x A^T`; `qkv()` in `attention.py` shows the order.

# %%
picture = ...


def packed(W_Q, W_K, W_V):
    return ...  # your line: (3 C, C)


check("picture", picture)
check("packed", packed)

# %%
def layer(n_head):
    config = GPT.get_default_config()
    config.n_layer, config.n_head, config.n_embd, config.block_size = 1, n_head, 4, 3
    layer = CausalSelfAttention(config).eval()
    for linear, matrix in (layer.c_attn, accepted("packed")(W_Q, W_K, W_V)), (layer.c_proj, torch.eye(4)):
        linear.weight.copy_(torch.as_tensor(matrix))
        linear.bias.zero_()
    return layer


q, k, v = (matrix[None, None] for matrix in (Q, K, V))  # (B, H, T, D) = (1, 1, 3, 4)
ours = causal @ V
found = {"attend_explicit": attend_explicit(q, k, v, mask)[0][0, 0], "attend": attend(q, k, v, mask)[0, 0],
         "CausalSelfAttention": layer(1)(X[None])[0]}
differences = {name: (y - ours).abs().max().item() for name, y in found.items()}
print(ours)
claim(19, "Attention = softmax(Q K^T / sqrt(d)) V, with Q = X W_Q, K = X W_K, V = X W_V",
      ", ".join(f"{name} differs by {d:.0e}" for name, d in differences.items()), max(differences.values()) < 1e-6)

# %% [markdown]
# ## Which d?
#
# The document adds "where d is the embedding dimension". With one head that is so: both are 4. Now the same four
# matrices in a layer of **two** heads: each head gets two of the four columns of Q, K and V.
#
# **Exercise `root`.** GPT-2's smallest model has C = 768 and 12 heads. By which number are its scores divided?

# %%
root = ...
check("root", root)

# %%
y = layer(2)(X[None])[0]
gap = {}
for d in 2, 4:  # the length of one head's key, or the width of the embedding
    each = [weights((Q[:, h] @ K[:, h].T / math.sqrt(d)).masked_fill(~mask[0, 0], -math.inf)) @ V[:, h]
            for h in (slice(0, 2), slice(2, 4))]
    gap[d] = (torch.cat(each, 1) - y).abs().max().item()
claim(19, "d is the embedding dimension",
      f"two heads: with d = 4, the embedding's width, the outputs are {gap[4]:.2f} off, with d = 2, the head's, "
      f"{gap[2]:.0e}", gap[4] < 1e-6)

torch.manual_seed(0)
for D in 4, 64, 768:  # numbers of mean 0 and spread 1, as a layer norm makes them
    dots = (torch.randn(10_000, D) * torch.randn(10_000, D)).sum(-1)
    print(f"D = {D:3}: q k^T spreads by {dots.std():5.1f}, the root of D is {math.sqrt(D):5.1f}")

# %% [markdown]
# So d is the *head size* D = C / H, and the sentence holds for a single head only. The measurement shows what the
# root is for: a dot product of D terms grows like √D, whatever the heads are called. Scores that spread by 28 would
# leave nearly all weight on one key and nearly no gradient; divided by √D they spread by 1, for any head size.
# In GPT-2 D is 768 / 12 = 64, and the divisor 8, not 27.7.
#
# **Exercise `speaks`.** We make the document's slip in the project: `attend_explicit` shall divide by
# `sqrt(H D)`. Two tests are run. *seed* sends a sequence through a layer of one head and compares with printed numbers;
# *loop* compares `attend_explicit` for four heads with `attend`, and one query with a plain loop. Which fail?

# %%
fails = ...  # a list of the words "seed" and "loop", of those that fail
check("speaks", fails)

# %%
tests = {"seed": "test_seed_notebook_numbers_are_reproduced",
         "loop": "test_the_readable_and_the_fast_attention_agree_and_equal_a_loop"}
failed = speaks("attention.py", "math.sqrt(q.size(-1))", "math.sqrt(q.size(1) * q.size(-1))",
                [f"tests/test_attention.py::{test}" for test in tests.values()])
print(*failed, sep="\n")
assert [word for word, test in tests.items() if test in failed] == accepted("speaks")

# %% [markdown]
# ## What it costs
#
# **Exercise `entries`.** How many scores has a text of N = 1,024 tokens in one head: without a mask, and of those,
# how many does the causal mask allow? A tuple of two numbers.
#
# **Exercise `crossover`.** The document calls `Q K^T` the dominant term. Count multiplications: q, k, v and
# `c_proj` take 4 C² for each of the N tokens; `Q K^T` and weights times V take N² C each. At which N do the latter
# equal the former, for GPT-2's C = 768?

# %%
entries = ..., ...
crossover = ...
check("entries", entries)
check("crossover", crossover)

# %%
def counted(N, C=8):
    """Scores of a pass over N tokens, those that the mask allows, multiplications of its linears, and of attention."""
    config = GPT.get_default_config()
    config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size = 1, 1, C, N, 10
    gpt = GPT(config).eval()
    with count(gpt) as cost:
        gpt(torch.zeros(1, N, dtype=torch.long))
    self = [record for record in cost.records if record["attention"] == "self"]
    products = {kind: sum(math.prod(r["out"]) * r["left"][-1] for r in self if r["kind"] == kind)
                for kind in ("GEMM", "BGEMM")}
    [table] = [r["out"] for r in self if r["name"] == "qk"]
    pos = torch.arange(N)
    return math.prod(table), dense(Causal.allows, pos, pos).sum().item(), products["GEMM"], products["BGEMM"]


print("   N     scores   allowed   projections   attention   (C = 8)")
for N in 3, 8, 16, 32, 1024:
    print("{:4} {:10,} {:9,} {:13,} {:11,}".format(N, *counted(N)))
assert counted(1024)[:2] == accepted("entries") and counted(2 * 8)[2] == counted(2 * 8)[3]
slopes = [math.log2(b / a) for a, b in zip(counted(512), counted(1024))]
claim(20, "O(N^2) for a sequence of length N", f"twice the length (512 to 1,024): scores x 2^{slopes[0]:.3f}, allowed "
      f"x 2^{slopes[1]:.3f}", all(abs(slope - 2) < 0.01 for slope in slopes[:2]))
projections, attention = counted(1024, 768)[2:]
claim(20, "the dominant term is the multiplication Q K^T", f"a layer of GPT-2's width at its 1,024 tokens: q, k, v and "
      f"c_proj multiply {projections:,} times, Q K^T and weights times V {attention:,} times", attention > projections)

# %% [markdown]
# Both sentences are right in their way. O(N²) is about long texts, and for those it holds: twice the text, four
# times the scores. Within GPT-2's 1,024 tokens, though, the projections are the larger part: what grows fastest
# need not be what is largest. The causal mask allows N (N + 1) / 2 of the N² scores. A masked product computes all
# of them; only a kernel that skips blocks saves the rest.

# %%
score()

# %% [markdown]
# ## Questions
#
# **1.** In the causal picture the row of *the* is 1, 0, 0. Would other matrices W_Q and W_K change it?
#
# <details><summary>Answer</summary>
#
# No. The first token sees one key, itself. Whatever the score, a softmax over one number is 1.
#
# </details>
#
# **2.** Why are the scores masked before the softmax, and not the weights after it?
#
# <details><summary>Answer</summary>
#
# Weights that are zeroed afterwards no longer sum to one, so the output is no average but a shrunken one. Before
# the softmax, −inf becomes exactly 0 and the others share out 1. What is hidden then has no influence at all, also
# not through the sum below the line.
#
# </details>
#
# **3.** The document's equation 2 has no root of d, its equation 4 has. Do they contradict each other?
#
# <details><summary>Answer</summary>
#
# They are two models with the same possibilities: multiply W_Q by √d, and equation 4 computes what equation 2 did.
# What differs is how large the scores are when training begins, which is what the root is for. Lesson 2 uses both.
#
# </details>
#
# **4.** Swap the first two rows of X, whole rows with their position feature. What happens to the output of *is*?
#
# <details><summary>Answer</summary>
#
# Nothing, with the mask or without: *is* sees both, and a sum has no order. Attention knows order only through the
# position in the fourth feature, and through the mask: with it, the outputs of *the* and *cat* do change.
#
# </details>
#
# **5.** A model has C = 1,024 and 16 heads, then 32 heads. Which of these change: the number under the root, the
# number of scores, the size of `c_attn`?
#
# <details><summary>Answer</summary>
#
# Under the root stands D = C / H: 64, then 32. Each head has a table of N² scores, so there are twice as many.
# `c_attn` stays 1,024 x 3,072: the same columns are split into more parts.
#
# </details>
