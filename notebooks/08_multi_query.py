# %% [markdown]
# # 8. One set of keys and values for all heads
#
# A decode step reads every weight and every stored key and value, and uses most of them for a single token. Multi-query
# attention (Shazeer 2019) stores one set of keys and values, which all heads share; grouped-query attention (Ainslie et
# al. 2023) stores a few. The model is hardly smaller, the cache is many times smaller. This lesson builds both, counts
# what they save, and measures when that pays. The blog entry that it responds to is called *the document* here.
#
# You will be able to
#
# - share keys and values between heads, in the right order, and prove it equal to ordinary attention with tied weights;
# - compute the bytes of a cache and of a decode step, and the batch at which sharing begins to pay;
# - say why decoding is slow while training is not, and what of it multi-query attention mends;
# - make a trained multi-head model share its heads, with little lost.
#
# You need: lesson 3 (the cache) and lesson 7 (shapes). Open beside this page: `attention.py` and `further/gqa.py`.

# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

from attention import CausalSelfAttention, attend, attend_explicit
from cost import count, predict
from course import lesson
from course.speaks import speaks
from further.gqa import convert, mean, span
from generate import generate
from model import GPT, GPTConfig
from plumbing.models import count_parameters, preset_config
from roofline import multiply, read, seconds_per_call

check, accepted, claim, score = lesson(8)
torch.set_num_threads(1)  # threads that wait for each other on a busy machine would drown what we measure
gpt2 = preset_config("gpt2")  # 12 layers, 12 heads of 64, n_embd=768; n_kv_head=None: as many as heads
grouped, multi_query = replace(gpt2, n_kv_head=4), replace(gpt2, n_kv_head=1)

# %% [markdown]
# ## What is shared
#
# `n_kv_head` says how many heads of keys and values there are (the Turing Institute's minGPT, whose notebook is lesson
# 4, calls it `n_kv_heads`). With as many as `n_head` this is ordinary multi-head attention. The queries keep their
# `n_head` heads, so each key head serves `n_head / n_kv_head` of them. One matrix, `c_attn`, makes queries, keys and
# values at once.
#
# How many columns does its product have in GPT-2's shape, with `n_kv_head` 12, 4 and 1?
#
# Then write the bytes of the cache: `config` is such a configuration, `B` rows, `S` stored positions, `itemsize` bytes
# of a number. (`config.n_kv_head` may be None. `config.kv_width` is a short way to n_kv_head times head_dim.)

# %%
columns = {12: ..., 4: ..., 1: ...}
check("columns", columns)


def cache_bytes(config, B, S, itemsize):
    return ...  # your line


check("cache_bytes", cache_bytes)

# %%
for config in gpt2, grouped, multi_query:
    KV = config.n_kv_head or config.n_head
    layer = CausalSelfAttention(config)
    assert layer.c_attn.out_features == accepted("columns")[KV]
    print(f"n_kv_head={KV:2}: c_attn 768 -> {layer.c_attn.out_features:,}, the cache of a row of 1,024 positions "
          f"{accepted('cache_bytes')(config, 1, 1024, 4):,} bytes")

found, B = {}, 3  # and in caches that really are there, of a small model
small = GPTConfig(n_layer=2, n_head=8, n_embd=64, vocab_size=50, block_size=64)
for KV in 8, 2, 1:
    for S in 16, 32, 64:
        config = replace(small, n_kv_head=KV)
        gpt = GPT(config)
        with count(gpt) as cost:
            generate(gpt, [[1] * (S - 4)] * B, 4)
        found[KV, S] = cost.cache_bytes("self")
        assert found[KV, S] == accepted("cache_bytes")(config, B, S, 4)
print("\nmeasured (n_kv_head, positions) -> bytes:", found)
claim(24, "the cache is linear in the length, and multi-query divides it by the number of heads",
      f"twice the length, {found[8, 64] / found[8, 32]:g} times the bytes; one head instead of 8, "
      f"{found[8, 64] / found[1, 64]:g} times fewer",
      found[8, 64] == 2 * found[8, 32] == 4 * found[8, 16] and found[8, 64] == 8 * found[1, 64])

# %%
contexts = range(512, 8193, 512)
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for config, label, style in ((gpt2, "multi-head: 12", "k-"), (grouped, "grouped: 4", "k--"),
                             (multi_query, "multi-query: 1", "k:")):
    ax.plot(contexts, [accepted("cache_bytes")(config, 1, S, 4) / 1e6 for S in contexts], style, label=label)
ax.axhline(4 * count_parameters(gpt2) / 1e6, color="grey", linewidth=1)
ax.text(100, 4 * count_parameters(gpt2) / 1e6 + 12, "all weights of the multi-head model", fontsize=9)
ax.set(xlabel="context, positions", ylabel="cache, MB", title="GPT-2's shape, one row, fp32", xlim=0, ylim=0)
ax.legend(title="key/value heads", fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.8))
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## In which order?
#
# In `attend_explicit` the shared heads are repeated until there is one for each query head. Neighbours share: of 4
# query heads and 2 key heads, queries 0 and 1 ask key head 0, queries 2 and 3 ask key head 1. Write it, for `x` of
# shape `(B, KV, S, D)`; return `(B, n_head, S, D)`.
#
# PyTorch has two ways to repeat, and taking the other one is the typical bug. Suppose that one. With 8 query heads, for
# which of `n_kv_head` = 1, 2, 4, 8 does the layer compute something wrong? (A list, ascending.)
#
# And if `attend_explicit` itself has that bug, which of these four tests of `tests/test_attention.py` speaks?
#
# - **a** `test_shared_kv_heads_equal_full_heads_with_the_same_keys_and_values`
# - **b** `test_any_split_into_chunks_gives_the_same_output`
# - **c** `test_the_readable_and_the_fast_attention_agree_and_equal_a_loop`
# - **d** `test_cache_shape_is_max_batch_kv_head_block_head_dim_and_unwritten_slots_are_zero`

# %%
def share(x, n_head):
    return ...  # your line


check("share", share)
visible = ...  # a list
check("visible", visible)
speaking = ...  # a letter
check("speaking", speaking)

# %%
torch.manual_seed(0)
wrong = []
for KV in 1, 2, 4, 8:
    q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, KV, 5, 16), torch.randn(2, KV, 5, 16)
    y, _ = attend_explicit(q, k, v)
    ours, _ = attend_explicit(q, accepted("share")(k, 8), accepted("share")(v, 8))
    bug, _ = attend_explicit(q, k.repeat(1, 8 // KV, 1, 1), v.repeat(1, 8 // KV, 1, 1))
    assert torch.allclose(ours, y)
    print(f"n_kv_head={KV}: repeat() instead of repeat_interleave() is off by {(bug - y).abs().max():.1e}")
    wrong += [KV] * (not torch.allclose(bug, y))
assert wrong == accepted("visible")

tests = dict(a="test_shared_kv_heads_equal_full_heads_with_the_same_keys_and_values",
             b="test_any_split_into_chunks_gives_the_same_output",
             c="test_the_readable_and_the_fast_attention_agree_and_equal_a_loop",
             d="test_cache_shape_is_max_batch_kv_head_block_head_dim_and_unwritten_slots_are_zero")
failed = speaks("attention.py", "k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)",
                "k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)",
                [f"tests/test_attention.py::{test}" for test in tests.values()])
print("\nthe bug in attend_explicit: it speaks", failed)
assert failed == [tests[accepted("speaking")]]

# %% [markdown]
# The two extremes hide the bug, so a test of multi-query attention alone would never hear it: test what lies between.
# And layers call `attend`, the fast one, which does not repeat anything: it makes the queries that share a head rows of
# one product, so that the head is read once. `attend_explicit` is there to be read, and the test that ties the two
# together is the one that speaks.
#
# ## The same as multi-head with tied weights
#
# The document calls multi-query attention "identical except that the different heads share a single set of keys and
# values". That can be proved, by building the multi-head layer that computes the same. Its `c_attn` has the queries'
# rows, then those of all keys, then those of all values, `D` rows a head. Write `tied(weight, n_head)`: from the weight
# of a layer with shared heads, `(C + 2 KV D, C)`, make that of the multi-head layer, `(3 C, C)`, in which heads that
# shared have equal rows. It should work for any KV.
#
# And predict: how many parameters fewer has GPT-2 as a multi-query model? (Weights and biases, all 12 layers. Of
# 124,439,808.)

# %%
def tied(weight, n_head):
    return ...  # your lines


check("tied", tied)
fewer = ...
check("fewer", fewer)

# %%
torch.manual_seed(1)
multi_head = GPT(small).double().eval()
one_head = GPT(replace(small, n_kv_head=1)).double().eval()
state, full = one_head.state_dict(), dict(multi_head.named_parameters())
differ = [name for name in full if full[name].shape != state[name].shape]
assert count_parameters(gpt2) - count_parameters(multi_query) == accepted("fewer")
claim(48, "multi-query is identical except that the heads share one set of keys and values",
      f"of {len(full)} tensors these have another shape: {', '.join(differ)}; in GPT-2's shape that saves "
      f"{accepted('fewer'):,} parameters, {accepted('fewer') / count_parameters(gpt2):.0%}",
      all("c_attn" in name for name in differ))

for name in differ:  # the biases of a fresh model are zero
    weight = name.endswith("weight")
    state[name] = accepted("tied")(state[name], small.n_head) if weight else state[name].new_zeros(3 * small.n_embd)
multi_head.load_state_dict(state)
ids = torch.randint(50, (2, 20))
with torch.no_grad():
    difference = (multi_head(ids) - one_head(ids)).abs().max().item()
    back = (convert(multi_head, n_kv_head=1)(ids) - one_head(ids)).abs().max().item()
claim(49, "multi-query = grouped-query with one group = multi-head with tied keys and values",
      f"logits of the multi-head model with tied weights differ by {difference:.0e} in fp64; "
      f"pooled again by further/gqa.py, by {back:.0e}", difference < 1e-12 and back < 1e-12)

# %% [markdown]
# ## When does it pay?
#
# A decode step reads the weights once, whatever the batch. It reads the cache of every row. So with one row the weights
# outweigh the cache, and with many rows the cache outweighs the weights. In fp32 GPT-2's linears have 494 MB of
# weights, and 442 MB as a multi-query model (the closed form is `predict` of `cost.py`). Behind 1,024 positions, what
# is the smallest batch whose cache is **larger** than the weights, multi-head and multi-query? Two numbers;
# `cache_bytes` is yours.

# %%
batch = [..., ...]  # multi-head, multi-query
check("break_even", batch)

# %%
def step_reads(config, B, S=1024):
    """Bytes of weights, and of cached keys and values, that one decode step reads."""
    closed = predict(config, "cached", S, 1, B)
    return closed["weight_bytes"], closed["step_bytes"] - closed["weight_bytes"]


batches = [2**i for i in range(9)]
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
ax.plot(batches, [step_reads(gpt2, B)[0] / 1e6 for B in batches], "k-", linewidth=3, alpha=0.3, label="weights")
for config, label, style in (gpt2, "cache, multi-head", "k-"), (multi_query, "cache, multi-query", "k:"):
    ax.plot(batches, [step_reads(config, B)[1] / 1e6 for B in batches], style, label=label)
for config, B in zip((gpt2, multi_query), accepted("break_even")):
    weights, cache = step_reads(config, B)
    assert cache > weights >= step_reads(config, B - 1)[1]
    ax.plot(B, cache / 1e6, "ko")
    ax.annotate(f"B = {B}", (B, cache / 1e6), xytext=(-12, 10), textcoords="offset points", ha="right", fontsize=9)
ax.set(xscale="log", yscale="log", xlabel="rows B", ylabel="MB read by a decode step",
       title="GPT-2's shape behind 1,024 positions, fp32", xticks=batches, xticklabels=batches)
ax.minorticks_off()
ax.legend(fontsize=9, frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()
for B in 1, 8, 64, 256:
    print(f"B={B:3}: multi-head reads {sum(step_reads(gpt2, B)) / sum(step_reads(multi_query, B)):5.2f} times what "
          f"multi-query reads")

# %% [markdown]
# The two dots lie where the cache outgrows the weights: sharing moves that point from 7 rows to 71. Left of 7, even the
# multi-head cache is the smaller part, and at B = 1 multi-query saves a fifth of the bytes and no more. What would make
# the gain at B = 1 larger? (The gain: what multi-head reads, divided by what multi-query reads.)
#
# - **a** weights and cache both in 16 bits
# - **b** a context sixteen times as long
# - **c** a wider feed-forward layer
# - **d** a memory twice as fast

# %%
more = ...  # a letter
check("more", more)

# %%
def gain(S=1024, itemsize=4, **changes):
    reads = [predict(replace(config, **changes), "cached", S, 1, 1, itemsize)["step_bytes"]
             for config in (gpt2, multi_query)]
    return reads[0] / reads[1]


gains = dict(a=gain(itemsize=2), b=gain(S=16 * 1024), c=gain(n_inner=8 * 768), d=gain())
print(f"now {gain():.2f} times;", ", ".join(f"{letter}: {times:.2f}" for letter, times in gains.items()))
assert accepted("more") == max(gains, key=gains.get)

# %% [markdown]
# ## Does it pay here?
#
# Bytes are a prediction: a step that waits for memory takes the time to read them. A tiny model does not wait for
# memory but for Python, as lesson 4 finds. So the document's "greatly speeds up inference" is measured twice: a
# tiny model with one row and a short text; and the attention alone of a larger one, 16 heads of 64, 16 rows behind
# 1,024 positions. Both kinds of heads take turns, and of several rounds the fastest counts. Times are shown and not
# graded: yours differ.

# %%
def throughput(config, B, N, steps=24):
    """Tokens per second of the prefill, and of the decode steps after it."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    first, *later = seconds_per_call(model, torch.randint(config.vocab_size, (B, N)).tolist(), steps)
    return B * N / first, B / min(later)


tiny = GPTConfig(n_layer=4, n_head=8, n_embd=128, vocab_size=65, block_size=512)
speed = {}
for B, N in (1, 64), (16, 384):
    for KV in (8, 1) * 3:
        now = throughput(replace(tiny, n_kv_head=KV), B, N)
        speed[B, KV] = [max(pair) for pair in zip(now, speed.get((B, KV), now))]
    for KV in 8, 1:
        prefill, decode = speed[B, KV]
        print(f"4 x 128, {B:2} rows of {N:3}, n_kv_head={KV}: prefill {prefill:7,.0f} tokens/s, decode {decode:6,.0f}")

q, stored = torch.randn(16, 16, 1, 64), {KV: torch.randn(2, 16, KV, 1024, 64) for KV in (16, 1)}
took = {KV: [] for KV in stored}
for _ in range(7):
    for KV, (k, v) in stored.items():
        begin = time.perf_counter()
        attend(q, k, v)
        took[KV].append(time.perf_counter() - begin)
for KV, kv in stored.items():
    print(f"attention alone, n_kv_head={KV:2}: {1e3 * min(took[KV]):6.2f} ms for {kv.nbytes / 1e6:5.1f} MB")
alone, tiny_gain = min(took[16]) / min(took[1]), speed[1, 1][1] / speed[1, 8][1]
print()
claim(50, "sharing greatly speeds up inference (a tiny model, one row)", f"{tiny_gain:.2f} times as fast",
      tiny_gain > 1.5)
claim(50, "sharing greatly speeds up inference (attention alone, 16 rows behind 1,024 positions)",
      f"{alone:.1f} times as fast, for a sixteenth of the bytes", alone > 1.5)

# %% [markdown]
# That is what the bytes predict. Where nothing waits for the cache, a smaller cache gains little or nothing; where all
# wait for it, it gains much; and the tiny model with 16 rows lies between. Shazeer measured batches of 1,024 sentences
# on a TPU: 46 microseconds a token in the decoder became 3.8. `RESULTS.md` has our long rows on an H200: 5.0 times as
# fast. The document is right about servers, and promises too much for a laptop with one text. What the smaller cache
# always gives is room: more rows, or longer ones.
#
# ## Why training does not mind
#
# The document gives the reason: training is parallel over the length of a text, decoding is not, and it is slow "due to
# repeated loading of the keys and value tensors". Bring both into one number, the FLOPs per byte that is read. Take a
# linear with fp32 weights (biases, inputs and outputs are small: leave them out). How many FLOPs does it do per byte of
# its weights, in a decode step of 1 row, in one of 8 rows, and in a prefill of 256 tokens?

# %%
intensity = [..., ..., ...]  # 1 row, 8 rows, 256 tokens
check("intensity", intensity)

# %%
model = GPT(replace(tiny, n_embd=256)).eval()
measured = []
for B, N, call in (1, 1, 2), (8, 1, 2), (1, 256, 1):
    with count(model) as cost:
        generate(model, [[1] * N] * B, 2)
    linears = {each: times for each, times in cost.step(call).items() if each[:2] == (None, B * N)}  # without the head
    measured.append(multiply(linears) / (4 * read(linears)))
assert measured == accepted("intensity")

prefill, decode = speed[1, 8]
claim(51, "training is parallel over the length, decoding is slow",
      f"FLOPs per byte of weights: {measured[2]:g} with 256 tokens at once, {measured[0]:g} in a decode step; "
      f"prefill {prefill / decode:.0f} times the tokens a second", measured[2] > measured[0] and prefill > 2 * decode)
for B in 1, 128:
    weights, cache = step_reads(gpt2, B)
    claim(51, f"decoding is slow because keys and values are loaded again and again (GPT-2, 1,024 positions, B = {B})",
          f"keys and values are {cache / (weights + cache):.0%} of the bytes that a step reads", cache > weights)

# %% [markdown]
# The reason is right for the batches that the paper has in mind. For one row it is the weights that are loaded again
# and again. More rows mend that, as 8 rows use a weight 8 times; nothing mends it for the cache, whose rows are read by
# one query each. Sharing does: with one key head, the 12 queries of a row read it together. That is the same cure.
#
# ## A trained model that shares
#
# A trained multi-head model need not be thrown away. Ainslie et al. make one head of each group of neighbours by their
# **mean**, and train a little further. Write it: `heads` is `(heads, D, C)`, the projections of all key heads; return
# `(groups, D, C)`.
#
# Do you expect a mean of heads that were trained apart to be of use?

# %%
def pool(heads, groups):
    return ...  # your line


check("pool", pool)

# %% [markdown]
# The other way, in `further/gqa.py`, is by the **span**: which number of a head means what is an accident of training,
# and the query may be turned to fit. So the shared head keeps the directions that serve the whole group best, and each
# query head takes up the matrix that leads from there back to its own old keys. To compare the two, a small model
# learns in a few seconds to go on with a word of 3 or 4 letters that repeats itself, which takes attention.

# %%
def texts(n, seed):
    draw = torch.Generator().manual_seed(seed)
    period, word = torch.randint(3, 5, (n, 1), generator=draw), torch.randint(16, (n, 4), generator=draw)
    return word.gather(1, torch.arange(13) % period)  # (n, 13): each repeats a word of its own


def loss(model, x):
    return F.cross_entropy(model(x[:, :-1])[:, 5:].flatten(0, 1), x[:, 6:].flatten())  # when the word is known


def train(model, steps, lr):
    optimiser = torch.optim.AdamW(model.parameters(), lr)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
        optimiser.zero_grad()
        loss(model, texts(32, step)).backward()
        optimiser.step()


torch.manual_seed(1)
trained = GPT(GPTConfig(n_layer=1, n_head=4, n_embd=32, vocab_size=16, block_size=12))
heads = trained.h[0].attn.c_attn.weight[32:64].unflatten(0, (4, 8))  # the keys' projections, (4, 8, 32)
assert torch.allclose(accepted("pool")(heads, 2), mean(heads.unflatten(0, (2, -1)))[0])
train(trained.eval(), 300, 6e-3)  # eval: no dropout
held_out = texts(512, seed=10**6)
with torch.no_grad():
    print(f"multi-head: {loss(trained, held_out):.2f} nats a letter; guessing would be {torch.tensor(16.0).log():.2f}")
results = ["n_kv_head  by    at once  after another 5 % of the steps"]
for KV in 2, 1:
    for way in mean, span:
        pooled = convert(trained, way, n_kv_head=KV)
        at_once = loss(pooled, held_out).item()
        train(pooled, 15, 1e-3)
        results.append(f"{KV:9}  {way.__name__:4} {at_once:8.2f} {loss(pooled, held_out).item():8.2f}")
print("\n".join(results))

# %% [markdown]
# With one head for all four, by the mean, the model does worse than guessing: it has forgotten what it had learnt. By
# the span most of it is kept, and 15 steps bring more of it back. `RESULTS.md` has the same for models trained on text:
# multi-query by the mean costs 1.51 nats a character at once, by the span 0.05. The paper's further training is
# hundreds of times as long as ours, and by the mean it needs it.
#
# ## Questions
#
# Try each one before you unfold the answer.
#
# **1.** Why are the queries not shared as well?
#
# <details><summary>Answer</summary>
#
# Then all heads would compute the same, and there would be one head. Queries cost nothing to keep: they are never
# stored. It is only what is stored, and read at every step, that is worth sharing.
#
# </details>
#
# **2.** A layer with 8 query heads and `n_kv_head=1` passes all its tests. Does that say anything about `n_kv_head=2`?
#
# <details><summary>Answer</summary>
#
# Not about the order of the heads: with one of them every order is the same. A test with 2 or 4 is needed, and one
# that does not compare the layer with itself.
#
# </details>
#
# **3.** Multi-query divides the cache by 12 in GPT-2's shape. Why is a step with 64 rows only 6.3 times lighter?
#
# <details><summary>Answer</summary>
#
# The weights are read too. With 64 rows they are 494 MB beside a cache of 4,832 MB, and sharing leaves them nearly as
# they are: (494 + 4,832) / (442 + 403). Only with ever more rows, or longer ones, does the ratio approach 12.
#
# </details>
#
# **4.** Does multi-query attention do fewer FLOPs in a decode step?
#
# <details><summary>Answer</summary>
#
# Only in `c_attn`, which makes fewer keys and values. In the attention itself every query head still meets every key:
# as many scores, as many multiply-adds. It reads less for the same work. Fewer bytes, not less arithmetic.
#
# </details>
#
# **5.** In a BART, which attentions gain from sharing while it writes, and which do not?
#
# <details><summary>Answer</summary>
#
# The decoder's self-attention and its cross-attention: both read stored keys and values at every step, and with a long
# source the latter reads far more. The encoder runs once, with all tokens at a time, and stores nothing, so it gains
# next to nothing; hence `n_decoder_kv_head` and `n_cross_kv_head`, with which it can keep all of its heads.
#
# </details>

# %%
score()
