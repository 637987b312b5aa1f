# %% [markdown]
# # 10. What can be computed at once
#
# A transformer is trained on all tokens of a text at once, and decodes them one by one. Both follow from what has to
# wait for what. In this lesson you count that: the longest chain of operations that wait for each other, in an RNN, in
# a linear recurrence, and in a transformer layer. We check section 1 of a tutorial on foundations of natural language
# processing ("FNLP tutorial 4"), with its footnote.
#
# You will be able to
#
# - say what an RNN waits for, and prove it by its Jacobian;
# - write an associative scan, and say which recurrences can be scanned;
# - show that a transformer is parallel over tokens and not over layers;
# - compute the loss of a text in one pass and one by one, and say what the difference costs.
#
# Before this: lesson 3, the KV cache; gradients of matrix products. Open beside this page: `model.py`.

# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page

import math
import random
import time

import matplotlib.pyplot as plt
import torch

from cost import count
from course import lesson
from generate import advance
from model import GPT, BARTConfig, EncoderLayer, GPTConfig
from train import loss_sum

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # so that equal things are equal to ten digits
torch.set_num_threads(1)
check, accepted, claim, score = lesson(10)

# %% [markdown]
# ## An RNN waits
#
# The plainest RNN reads token t with h_t = tanh(W h_{t-1} + u_t), where u_t is made of the token alone: all u_t are one
# matrix product. The states are not: each needs the one before it. How strictly it needs it, calculus tells. By the
# chain rule dh_T / dh_0 is a product of T matrices, one per step, and tanh' = 1 - tanh^2.
#
# Write it. `W` is (D, D), `h` is (T, D), the states h_1 to h_T. The result is (D, D): row i, column j holds the
# derivative of entry i of h_T by entry j of h_0.

# %%
def jacobian(W, h):
    return ...  # your lines


check("jacobian", jacobian)

# %% [markdown]
# To count what waits for what, we need not trust anybody's description: autograd records which result was made from
# which. `chain` walks this record and returns the largest number of operations of one kind that stand on one way. (We
# count whole operations. Inside a matrix product or a softmax there are sums, which are scans of their own and short.)

# %%
def chain(y, *kinds):
    """The longest chain of operations whose name contains one of `kinds`, among all that led to y."""
    longest, todo = {}, [y.grad_fn]
    while todo:
        node = todo[-1]
        before = [other for other, _ in node.next_functions if other]
        missing = [other for other in before if other not in longest]
        if not missing:
            counts = any(kind in node.name() for kind in kinds)
            longest[node] = counts + max((longest[other] for other in before), default=0)
            todo.pop()
        todo += missing
    return longest[y.grad_fn]


def rnn(W, u, h):
    states = []
    for new in u:
        h = torch.tanh(W @ h + new)
        states.append(h)
    return states


D, lengths = 16, [16, 64, 256, 1024]
W = (torch.randn(D, D) / math.sqrt(D)).requires_grad_()
h_0 = torch.zeros(D)
depth = {"RNN": [chain(rnn(W, torch.randn(n, D), h_0)[-1], "Tanh") for n in lengths]}
print("tokens                    ", lengths)
print("longest chain of tanh     ", depth["RNN"])

u = torch.randn(10, D)
exact = torch.autograd.functional.jacobian(lambda h: rnn(W, u, h)[-1], h_0)
with torch.no_grad():
    gap = (accepted("jacobian")(W, torch.stack(rnn(W, u, h_0))) - exact).abs().max()
print(f"the product of 10 matrices and autograd's Jacobian differ by {gap:.0e}")
claim(13, "an RNN encoder is not easily parallelised over tokens: each state waits for the one before",
      f"of {lengths} steps {depth['RNN']} wait for each other", depth["RNN"] == lengths and gap < 1e-10)

# %% [markdown]
# ## A scan does not
#
# The tutorial's footnote says that some newer RNNs are built so that an "associative scan" can compute them. Their
# trick is to leave the tanh out: h_t = a_t h_{t-1} + b_t, entry by entry, where a_t and b_t come from the token alone.
# One step is then the map h -> a h + b, which the pair (a, b) describes completely. And two steps are again such a map,
# so they have a pair as well. That is all we need: neighbours may be combined in any grouping.
#
# 1. `combine(first, then)`: the pair of the map that does `first`, then `then`.
# 2. How many rounds does a scan of n = 1,000 steps take, if every position combines itself in round 1 with its
#    neighbour, in round 2 with the one 2 before, then 4 before, and so on?
# 3. `scan(combine, a, b)`: a, b are (n, D), h before the first step is 0, the result is all states, (n, D). In each
#    round call `combine` **once**, for all positions at once. This way of scanning is that of Hillis and Steele (1986).

# %%
def combine(first, then):
    (a, b), (c, d) = first, then
    return ...  # your line: a pair


rounds = ...


def scan(combine, a, b):
    return ...  # your lines: about six


check("combine", combine)
check("rounds", rounds)
check("scan", scan)

# %%
def loop(a, b):
    h, states = torch.zeros(a.size(1)), []
    for t in range(len(a)):
        h = a[t] * h + b[t]
        states.append(h)
    return torch.stack(states)


depth["scan"], gaps = [], []
print("   n   longest chain   combined pairs   in a loop   difference")
for n in lengths:
    pairs = []

    def counting(first, then):
        pairs.append(len(first[0]))
        return accepted("combine")(first, then)

    a, b = torch.rand(n, D, requires_grad=True), torch.randn(n, D)
    h = accepted("scan")(counting, a, b)
    depth["scan"].append(chain(h[-1], "Add"))  # one addition in each combine
    gaps.append((h - loop(a, b)).abs().max().item())
    print(f"{n:4} {depth['scan'][-1]:15} {sum(pairs):16,} {n - 1:11,}   {gaps[-1]:.0e}")
claim(15, "an associative scan computes some RNNs more efficiently",
      f"a linear recurrence of {lengths} steps in chains of {depth['scan']}, and the same states",
      all(chained <= 2 * math.log2(n) for chained, n in zip(depth["scan"], lengths)) and max(gaps) < 1e-10)

# %% [markdown]
# The chain is short, but there is more work: about n log2(n) pairs where the loop combines n - 1. A scan pays if there
# are cores to share it. (Blelloch 1990 needs about 2n, in twice the rounds. Martin and Cundy 2018 scan linear RNNs in
# this way.)
#
# ## What the scan needs
#
# It needs two steps to make one step *of the same kind*, described by as many numbers. Which of these recurrences can
# be scanned? x_t comes from the token alone, w is a constant. Answer with a set of letters.
#
# - **a** h_t = max(h_{t-1}, x_t)
# - **b** h_t = tanh(w h_{t-1} + x_t)
# - **c** h_t = sigmoid(x_t) h_{t-1} + (1 - sigmoid(x_t)) x_t
# - **d** h_t = sigmoid(h_{t-1}) h_{t-1} + x_t

# %%
scannable = ...
check("scannable", scannable)

# %%
# A linear map has one slope: moving h by 1 moves the result by the same amount, wherever h was. Are five steps linear?
x = torch.randn(5)
kinds = {"a  max": lambda h, x: max(h, x), "b  tanh": lambda h, x: torch.tanh(0.9 * h + x),
         "c  gate from the token": lambda h, x: x.sigmoid() * h + (1 - x.sigmoid()) * x,
         "d  gate from the state": lambda h, x: h.sigmoid() * h + x}
for name, step in kinds.items():
    ends = []
    for start in 0.0, 1.0, 2.0:
        h = torch.tensor(start)
        for each in x:
            h = step(h, each)
        ends.append(h.item())
    print(f"{name:24} from 0: {ends[0]:6.3f}   0 to 1: {ends[1] - ends[0]:+.6f}   1 to 2: {ends[2] - ends[1]:+.6f}")

# %% [markdown]
# Only c moves by equal amounts: it is linear in h, although its gate is not linear in x. Mamba, the footnote's example,
# is of this kind, nonlinear in the tokens and linear in the state. Two values of a linear map give all others, which is
# why a pair (a, b) is enough for any number of steps. Five steps of b or d are bent, each bend on top of the one
# before, and no fixed handful of numbers describes them. The maximum is not linear either, but five steps of it are
# one: the maximum with the largest x. So what counts is that steps combine into one of their kind, and linearity is the
# usual way to have that.
#
# The tutorial's word for the RNN is "not *easily* parallelisable", and it is well chosen.
#
# ## A transformer layer
#
# The tutorial asks about the encoder layer, which is `EncoderLayer` in model.py: attention, a norm, the feed-forward
# part, a norm. Its claim: a token's output integrates all tokens of the *previous* layer, and none of the *current*
# one. If that is so, token i's output can be computed alone, knowing no other output.
#
# Write that: `x` is (B, N, C), the result (B, 1, C). `layer.attn` has `qkv(x)`, which makes (B, H, N, D) each,
# `pattern(q, k, v, query_pos, key_pos)` and `output(y)`; positions are tensors such as `torch.arange(x.size(1))`.

# %%
def one_token(layer, x, i):
    return ...  # your lines: about five


check("one_token", one_token)

# %%
layer = EncoderLayer(BARTConfig(n_head=2, n_embd=D)).eval()
x, pos = torch.randn(1, 12, D), torch.arange(12)
whole = layer(x, pos, pos)
order = random.Random(0).sample(range(12), 12)
gap = max((accepted("one_token")(layer, x, i) - whole[:, i : i + 1]).abs().max().item() for i in order)
print(f"in the order {order}, each token on its own: difference {gap:.0e}")

ATTENTION = "ScaledDotProduct", "Softmax"  # PyTorch's kernel, or the same in pieces
depth["layer"] = []
for n in lengths:
    x, pos = torch.randn(1, n, D), torch.arange(n)
    depth["layer"].append(chain(layer(x, pos, pos), *ATTENTION))
print("tokens                    ", lengths)
print("longest chain of attention", depth["layer"])

# %% [markdown]
# ## Over tokens, not over layers
#
# Two predictions.
#
# 1. A GPT of 4 layers with the pattern `local:3` (one's own position and 2 before it) reads 12 tokens. We change the
#    token at position 5. How many positions of the output of layer 1 change? Of layers 2, 3 and 4? Positions are 0 to
#    11.
# 2. A stack of 6 layers reads 512 tokens, with as many cores as you like. How many *cells* stand on the longest chain
#    of an RNN stack, where cell t of layer l waits for cell t - 1 of its layer and cell t of the layer below? How many
#    *attentions* on that of a transformer?

# %%
cone = ...              # four numbers
rounds_of_stacks = ...  # two numbers
check("cone", cone)
check("rounds_of_stacks", rounds_of_stacks)

# %%
def outputs(model, ids):
    """What each layer of a GPT makes of a text, one (N, C) for each."""
    pos = torch.arange(len(ids))
    x, found = model.wte(ids)[None] + model.wpe(pos), []
    for block in model.h:
        x = block(x, pos)
        found.append(x[0])
    return found


ids = torch.randint(50, (12,))
other = ids.clone()
other[5] += 1
fig, axes = plt.subplots(1, 2, figsize=(7, 2.2), sharey=True, layout="constrained")
for ax, pattern in zip(axes, ("local:3", "full")):
    gpt = GPT(GPTConfig(n_layer=4, n_head=2, n_embd=16, vocab_size=64, block_size=12, pattern=pattern)).eval()
    both = zip(outputs(gpt, ids), outputs(gpt, other))
    changed = torch.stack([(a != b).any(-1) for a, b in both])  # (layer, position)
    print(f"{pattern:8} positions that change, by layer:", changed.sum(1).tolist())
    assert pattern == "full" or changed.sum(1).tolist() == list(accepted("cone"))
    ax.pcolormesh(changed, cmap="Greys", vmax=1.4, edgecolors="lightgrey", linewidth=0.5)
    ax.set(title=pattern, xlabel="position", xticks=[i + 0.5 for i in range(12)], xticklabels=range(12))
    ax.set(yticks=[0.5, 1.5, 2.5, 3.5], yticklabels=[1, 2, 3, 4])
axes[0].set_ylabel("layer")
fig.suptitle("outputs that change (dark) with the token at position 5", fontsize=11)
plt.show()

# %%
L, n = 6, 512
states = list(torch.randn(n, D))
for _ in range(L):
    states = rnn(W, states, h_0)  # the layer above reads the states of the one below, each as soon as it is there
x, pos = torch.randn(1, n, D), torch.arange(n)
stack = [EncoderLayer(BARTConfig(n_head=2, n_embd=D)).eval() for _ in range(L)]
for each in stack:
    x = each(x, pos, pos)
cells, attentions = chain(states[-1], "Tanh"), chain(x, *ATTENTION)
print(f"{L} layers, {n} tokens: chains of {cells} cells in the RNN, of {attentions} attentions in the transformer")
claim(14, "a transformer layer is parallel over tokens; layers wait for each other",
      f"alone and in any order, tokens come out the same ({gap:.0e}); chains of {max(depth['layer'])} attention in one "
      f"layer, of {attentions} in {L}", gap < 1e-10 and max(depth["layer"]) == 1 and attentions == L)
assert (cells, attentions) == tuple(accepted("rounds_of_stacks"))

# %% [markdown]
# All of it in one figure: what we have counted, and what it takes on one core (this one; yours will differ). The RNN
# and the recurrence are loops in Python, and their time is mostly that of making small calls.

# %%
def milliseconds(run, *args):
    times = []
    for _ in range(20):  # the fastest counts: whatever else the machine does can only make a run slower
        start = time.perf_counter()
        run(*args)
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


ms = {"RNN": [], "scan": [], "layer": []}
with torch.no_grad():
    for n in lengths:
        x, pos, a = torch.randn(n, D), torch.arange(n), torch.rand(n, D)
        ms["RNN"].append(milliseconds(rnn, W, x, h_0))
        ms["scan"].append(milliseconds(accepted("scan"), accepted("combine"), a, x))
        ms["layer"].append(milliseconds(layer, x[None], pos, pos))
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for name, style in ("RNN", "ks-"), ("scan", "ko--"), ("layer", "k^:"):
    axes[0].plot(lengths, depth[name], style, label=name, fillstyle="none")
    axes[1].plot(lengths, ms[name], style, label=name, fillstyle="none")
for ax, title in zip(axes, ("longest chain (counted)", "milliseconds (measured)")):
    ax.set(xscale="log", yscale="log", xlabel="tokens n", ylabel=title)
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.minorticks_off()
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# **Explain this plot.** The layer's chain is 1 for every length (left), yet its time grows (right), at the end faster
# than n. Why?
#
# - **a** The count is too low: inside the kernel tokens do wait for each other.
# - **b** The chain says what waits, not what must be done: there are n^2 scores, and only so many units to compute
#   them.
# - **c** The softmax goes through the keys one after the other.
# - **d** The matrices of the layer grow with the text.

# %%
why = ...
check("time", why)

# %% [markdown]
# ## Training in one pass, decoding in many
#
# In training, the whole text is known: token t + 1 is the label of position t, whatever the model would have chosen
# (*teacher forcing*). So one pass over all tokens finds the loss of each. In decoding token t + 1 is unknown until
# position t has been computed through all layers: then what was parallel over tokens has to wait after all.
#
# The loss of a text is the same either way. A text of 65 tokens has 64 predictions:
#
# 1. How many calls of the decoder are there in training, and in decoding with a cache? How many tokens enter, in all
#    calls together, in training and in decoding?
# 2. Write the loss by decoding: the sum over the text of minus the logarithm of the probability of its next token.
#    `advance(model, [ids so far], cache)` lets what is new enter and returns logits (1, 1, V).

# %%
calls = ...  # four numbers: calls in training, in decoding; tokens in training, in decoding


def decoded_loss(model, ids):
    cache = model.new_cache(batch_size=1)
    return ...  # your lines: about five


check("calls", calls)
check("decoded_loss", decoded_loss)

# %%
gpt = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=65, block_size=64)).eval()
ids = torch.randint(65, (65,)).tolist()
inputs, labels = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
with torch.no_grad(), count(gpt) as forced:
    together = loss_sum(gpt, (inputs,), labels)[0].item()  # the loss that train.py minimises
with torch.no_grad(), count(gpt) as decoded:
    one_by_one = float(accepted("decoded_loss")(gpt, ids))
print(f"loss {together:.10f} in one pass, {one_by_one:.10f} one by one, in nats")
assert abs(together - one_by_one) < 1e-8
assert [forced.steps, decoded.steps, forced.decoder_tokens, decoded.decoder_tokens] == list(accepted("calls"))
print("FLOP       calls   tokens   products with weights   in attention")
for name, cost in ("training", forced), ("decoding", decoded):
    print(f"{name:10} {cost.steps:5} {cost.decoder_tokens:8} {cost.flops('GEMM'):23,} {cost.flops('BGEMM'):14,}")
with torch.no_grad():
    times = milliseconds(loss_sum, gpt, (inputs,), labels), milliseconds(accepted("decoded_loss"), gpt, ids)
print(f"{times[0]:.1f} ms and {times[1]:.1f} ms here")
total = [cost.flops("GEMM") + cost.flops("BGEMM") for cost in (forced, decoded)]
claim("of the introduction", "parallel computation trains on much more data with less compute",
      f"{total[0]:,} FLOP in parallel, {total[1]:,} one by one", total[0] < total[1])

# %% [markdown]
# The tutorial's introduction promises training "with less compute". More exactly: with the same compute, in less time.
# Not one product with a weight is saved, and attention even computes the half of the square that its mask then hides.
# What shrinks is the number of calls, and each reads every weight from memory once: one reading for 64 tokens instead
# of 64.

# %%
score()

# %% [markdown]
# ## Questions
#
# Try each one before you unfold the answer.
#
# **1.** The Jacobian of the tanh RNN is a product of matrices, and such products are associative. Can its *gradient* be
# computed by a scan?
#
# <details><summary>Answer</summary>
#
# Yes, once all states are known: the backward pass is a linear recurrence in the gradients, whose factors are the
# matrices diag(1 - h_t^2) W. But the states must be there first, and they come from the loop. Besides, each combine is
# a product of two (D, D) matrices, D^3 operations, where the loop multiplies a vector with a matrix, D^2.
#
# </details>
#
# **2.** An LSTM's gates look at h_{t-1} and x_t. What would you change so that its cell state can be scanned?
#
# <details><summary>Answer</summary>
#
# Let gates and candidates depend on x_t alone. Then c_t = f_t c_{t-1} + i_t g_t is a linear recurrence, entry by entry.
# It is another model, whose gates cannot react to what it remembers within a layer; more layers make up for some of it.
#
# </details>
#
# **3.** Does teacher forcing make an RNN parallel?
#
# <details><summary>Answer</summary>
#
# No. It makes all inputs known, so W_x x_t is one product for all tokens, and rows of a batch go side by side. The
# states still wait for each other. For the transformer it removes the only thing that waits, beside the layers.
#
# </details>
#
# **4.** A GPT has L layers and writes M tokens behind a prompt. How long is the longest chain of attentions in training
# on the finished text, and in decoding it?
#
# <details><summary>Answer</summary>
#
# L in training, for any length. M L in decoding: each new token enters at the bottom only when the one before it has
# left at the top. The prefill counts for L, whatever the length of the prompt.
#
# </details>
#
# **5.** A cached decode step is one row of work for every weight that is read. How can a transformer's parallelism over
# tokens help one single text that is being decoded?
#
# <details><summary>Answer</summary>
#
# Guess several tokens, and let them enter together: one pass says for all of them whether the model would have chosen
# them, as in training. Those up to the first wrong guess are kept. That is speculative decoding,
# `further/speculate.py`.
#
# </details>
