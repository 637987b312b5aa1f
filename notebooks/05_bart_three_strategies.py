# %% [markdown]
# # 5. One text, three bills
#
# An encoder-decoder reads an article and writes a summary, one token per call of its decoder. Written down plainly, the
# loop computes nearly everything again for every token. We write it three times: *naive*, with the encoder *hoisted*
# out of the loop, and *cached*. All three write the same text; we count what each of them lets through the model.
#
# You will be able to
#
# - write each of the three loops for a BART, and say what the next one saves;
# - give their cost in closed form, for a source of N tokens and M generated ones;
# - say what M counts, and why a text that ends early must be counted differently;
# - tell a wasteful loop from a wrong one, and say which test would notice.
#
# You need: lesson 3 (what a cache keeps). The loops are those of Sam Shleifer's "Understanding Incremental Decoding"
# (2020); the numbered claims below are its statements, held against what we count.
# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page
import matplotlib.pyplot as plt
import torch

from compare import compare
from cost import count
from course import lesson
from course.little import little_bart
from course.speaks import speaks
from generate import advance, encode, generate, project, strategies

torch.set_grad_enabled(False)  # we decode, and do not train
check, accepted, claim, score = lesson(5)
# %% [markdown]
# ## The model
#
# A BART with one encoder and one decoder layer and random weights: what it writes means nothing, but what it costs is
# counted in tokens, and a trained one of that shape would cost the same. It has two methods that we need.
#
# - `bart.encode(source)`: ids (1, N) go in, vectors (1, N, C) come out.
# - `bart.decode(target, encoded)`: the ids written so far (1, T) go in, logits (1, T, V) come out, one row for the
#   token after each position. The text begins with `bart.config.start_id`.
# %%
bart = little_bart()
N, M = 1024, 100
source = torch.randint(3, bart.config.vocab_size, (1, N))

encoded = bart.encode(source)
logits = bart.decode(torch.tensor([[bart.config.start_id]]), encoded)
print("encode", tuple(source.shape), "->", tuple(encoded.shape))
print("decode", (1, 1), "->", tuple(logits.shape), "the first token:", logits[0, -1].argmax().item())
# %% [markdown]
# ## Predict
#
# Three loops generate M = 100 tokens from a source of N = 1,024. In call m = 1, 2, .. M
#
# | loop    | what enters the encoder | what enters the decoder                       |
# |---------|-------------------------|-----------------------------------------------|
# | naive   | the source              | the whole text: the start token and m - 1 ids |
# | hoisted | nothing, but in call 1  | the whole text                                |
# | cached  | nothing, but in call 1  | the newest id (in call 1 the start token)     |
#
# How many tokens enter the two stacks in all? Write three numbers in the place of the three dots, before you run
# anything.
# %%
totals = [..., ..., ...]  # naive, hoisted, cached
check("totals", totals)
# %% [markdown]
# ## Naive
#
# Everything again for every token. Fill in the line: encode, decode, and take the likeliest id of the last position.
# All three functions get the model, a source (1, N) and M, and return the M new ids as a list. They ignore the end of
# sequence for now: we want to count exactly M calls. Your function is tried on a small model, and hooks count what
# enters.
# %%
def naive(bart, source, M):
    ids = [bart.config.start_id]
    for _ in range(M):
        next_id = ...  # your line(s)
        ids.append(next_id)
    return ids[1:]


check("naive", naive)
# %% [markdown]
# ## Hoisted, then cached
#
# *Hoisted*: the source does not change while we write, and the encoder never looks at what we write. What follows for
# the loop?
#
# *Cached*: the decoder is causal, so a token that follows changes nothing in what stands before it. Keys and values of
# the past can be kept, and one token enters per call. `bart.decode(target, encoded, use_kv_cache=True, start_pos=n)`
# does that: `target` holds only what is new, and n tokens precede it. At `start_pos=0` a new text begins.
# %%
def hoisted(bart, source, M):
    return ...  # your line(s)


def cached(bart, source, M):
    return ...  # your line(s)


check("hoisted", hoisted)
check("cached", cached)
# %% [markdown]
# ## Count from outside
#
# `cost.count` hangs hooks on the two stacks and counts the positions that enter their first layers. The loops know
# nothing of it. If a loop of yours has been accepted, it is yours that runs here. What the decoder computes to look at
# the source is not in these numbers, as it is not in the document's: lesson 6 counts it.
# %%
texts, costs = {}, {}
for name in "naive", "hoisted", "cached":
    with count(bart) as cost:
        texts[name] = accepted(name)(bart, source, M)
    costs[name] = cost
    print(f"{name:8} encoder {cost.encoder_tokens:>7,}  decoder {cost.decoder_tokens:>5,}  calls {cost.steps}")

counted = {name: cost.encoder_tokens + cost.decoder_tokens for name, cost in costs.items()}
print()
for number, name, theirs in (1, "naive", 107_450), (2, "hoisted", 6_074), (3, "cached", 1_124):
    claim(number, f"{name}: {theirs:,} tokens", f"{counted[name]:,} tokens", counted[name] == theirs)
# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
calls = range(1, M + 1)
for (name, cost), style in zip(costs.items(), ("-", "--", ":")):
    so_far = torch.tensor([cost.encoder[m] + cost.decoder[m] for m in calls]).cumsum(0)
    ax.plot(calls, so_far, style, color="black", label=f"{name}: {so_far[-1]:,}")
    print(f"{name:8} after call 1: {so_far[0]:,}, after call 50: {so_far[49]:>6,}")
ax.set_yscale("log")
ax.set_xlabel("decoder call")
ax.set_ylabel("tokens that have entered")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()
# %% [markdown]
# ## Explain this plot
#
# All three curves begin at the same height. Why?
#
# - **a** The first call is not counted, because it only sets things up.
# - **b** In call 1 the source and the start token enter, whatever the strategy.
# - **c** They do not: the logarithmic axis hides small differences.
# - **d** The naive loop has not run its encoder yet.
# %%
figure = ...  # "a", "b", "c" or "d"
check("figure", figure)
# %% [markdown]
# ## The closed form, and what M is
#
# Write the three totals as a function of N and M. Then a question of definition. The document calls M the length of
# `output_tokens` when the loop returns. That list begins with the start token. If *it* is 100 long in the end, which
# three totals would we have counted?
# %%
def closed_form(N, M):
    return ...  # your line(s): naive, hoisted, cached


convention = [..., ..., ...]  # naive, hoisted, cached, where len(output_tokens) == 100

check("closed_form", closed_form)
check("convention", convention)
# %% [markdown]
# The formulas below are yours once they are right, and every size is counted. The sum in the document runs over its M
# calls, from m = 1 to M, so M is the number of calls there, and of generated tokens. Its words, which make M the length
# of `output_tokens`, say one more: the start token is fed, but was not generated, and the last id was generated, but is
# never fed. We keep the formula, which is right, and read M as *decoder calls*. Whoever reports a count should say
# which.
# %%
small = little_bart(block_size=64)
wrong = []
for n, m in (1, 1), (5, 1), (1, 9), (12, 7), (40, 30):
    found = []
    for strategy in strategies(small):
        with count(small) as cost:
            generate(small, [[3] * n], m, strategy=strategy, ignore_eos=True)
        found.append(cost.encoder_tokens + cost.decoder_tokens)
    print(f"N = {n:2}, M = {m:2}: {found}")
    wrong += [(n, m)] * (found != list(accepted("closed_form")(n, m)))
print(f"sizes where the closed form and the count differ: {len(wrong)}\n")

output_tokens, as_written = [bart.config.start_id], []
with count(bart) as cost:
    encoded = bart.encode(source)
    while len(output_tokens) < 100:
        logits = bart.decode(torch.tensor([output_tokens]), encoded)
        output_tokens.append(logits[0, -1].argmax().item())
found = cost.encoder_tokens + cost.decoder_tokens
claim(4, f"M is len(output_tokens); hoisted, M = 100: {counted['hoisted']:,}",
      f"len(output_tokens) is {len(output_tokens)} after {cost.steps} decoder calls and {found:,} tokens",
      found == counted["hoisted"])
# %% [markdown]
# ## The same text, nearly the same logits
#
# A cheaper loop is worth something only if it writes the same. `compare` runs the project's own three strategies side
# by side. The ids must be equal. The logits need not be, to the last bit: a product of one row may add in another order
# than a product of a hundred. Where they differ, `compare` decodes again in double precision: rounding falls by many
# orders of magnitude there, and a bug stays.
# %%
result = compare(bart, strategies(bart), source.tolist(), M, ignore_eos=True)
for one in result["strategies"]:
    print(f"{one['strategy']:8} logits differ by at most {one['logit_difference']:.1e}  {one['finding']['verdict']}")
print(f"{result['distinct']} distinct ids, beginning {texts['naive'][:12]}")
same = {tuple(text) for text in texts.values()} == {tuple(one["ids"][0]) for one in result["strategies"]}
same = same and len(set(map(tuple, texts.values()))) == 1
claim(5, "the three loops write the same", f"the same {M} ids: {same}; of the logits, nothing but rounding: "
      f"{not result['bug']}", same and not result["bug"])
# %% [markdown]
# ## Where a text ends
#
# A real loop stops at the end of sequence. `step(ids)` is given all ids so far, the start token first, and returns the
# next. Write the loop: it returns the new ids up to and including `end`, and at most `most` of them. BART has one
# peculiarity, and it is in the tests: its decoder *starts* from the end token.
#
# Then predict: our three loops are allowed 100 tokens, N = 1,024, and the 40th new id is the end. What enters in all?
# %%
def until_end(step, start, end, most):
    return ...  # your line(s)


ended = [..., ..., ...]  # naive, hoisted, cached
check("until_end", until_end)
check("ended", ended)
# %% [markdown]
# This is the document's last loop on our files. There the decoder is given the newest id and a cache, which is `None`
# at first, and returns logits and a cache. In ours the cache is an object, which the loop makes and passes in:
# `advance` lets enter what `cache.filled` says is not stored yet. `memory` holds what the decoder keeps of the source;
# lesson 6 is about it. Our random model knows no end, so we declare one of its rarer ids to be it.
# %%
end = max(set(texts["naive"]), key=texts["naive"].index)  # the id that appears last for the first time
memory, cache = project(bart, *encode(bart, source.tolist())), bart.new_cache(batch_size=1, length=1 + M)
shapes = []


def step(ids):
    logits = advance(bart, [ids], cache, memory)  # (1, 1, V)
    shapes.append(tuple(logits.shape))
    return logits[0, -1].argmax().item()


with count(bart) as cost:
    new = accepted("until_end")(step, bart.config.start_id, end, M)
print(f"{len(new)} of at most {M} ids, the last is the end: {new[-1] == end}; stored: {cache.filled[0]} positions")
print(f"tokens per decoder call: {set(cost.decoder.values())}, shapes of the logits: {set(shapes)}")
bart.config.eos_id = end
alike = generate(bart, source.tolist(), M) == [new]
bart.config.eos_id = 2
claim(6, "one id enters and logits come back, with a cache that the loop carries, until the end of sequence",
      f"one id a call: {set(cost.decoder.values()) == {1}}; stops at the end, as generate() does: {alike}",
      set(cost.decoder.values()) == {1} and new[-1] == end and alike)
# %% [markdown]
# ## Which test would notice?
#
# In `generate.py` the strategy `hoisted` encodes before its step begins. Suppose somebody encodes in the step *again*,
# by mistake. We make the change in a copy of the project and run two tests there: `counts`, which counts tokens for the
# sizes of this page, and `tokens`, which compares the texts of all strategies. Which of them fail? Predict, then run.
# %%
wasteful = ...  # a list: [], ["counts"], ["tokens"] or ["counts", "tokens"]
check("wasteful", wasteful)
# %%
tests = {"counts": "tests/test_cost.py::test_1024_tokens_into_100_cost_107450_then_6074_then_1124",
         "tokens": "tests/test_generate.py::test_every_strategy_and_every_batch_gives_the_same_tokens_in_fp64"}
right = "        memory = project(model, encoded[own], None if lengths is None else lengths[own])"
again = "        nonlocal encoded, lengths\n        encoded, lengths = encode(model, sources)\n"
failed = speaks("generate.py", right, again + right, tests.values())
found = [name for name, test in tests.items() if test.split("::")[1] in failed]
print(found)
assert found == accepted("wasteful")
# %%
score()
# %% [markdown]
# ## Questions
#
# **1.** Hoisting saves 101,376 tokens here, caching another 4,950. For which texts would it be the other way round,
# caching saving more than hoisting?
#
# <details><summary>Answer</summary>
#
# Hoisting saves N (M - 1), caching M (M - 1) / 2. Caching saves more where M > 2 N: where the text becomes more than
# twice as long as its source, as in a story from a title. With no source at all, in a GPT, it is the only one of the
# two.
#
# </details>
#
# **2.** Why can the encoder's result be kept as it is, while of the decoder only keys and values are kept, layer by
# layer?
#
# <details><summary>Answer</summary>
#
# Nothing enters the encoder while we write, so nobody runs it again. The decoder does run, on a new token that must
# look at the past in every layer; and it looks at keys and values. That they stand still is owed to the causal mask.
#
# </details>
#
# **3.** N + M is 1,124 tokens, 95 times fewer than 107,450. Why is the cached loop not 95 times as fast?
#
# <details><summary>Answer</summary>
#
# Tokens are not time. One token on its own reads all the weights of the decoder, as a hundred tokens do, and every call
# has a price of its own. The head and the attention to stored keys are not counted here either, and the encoder's 1,024
# tokens stay. On 2 cores BART-base is 18.5 times as fast (see README).
#
# </details>
#
# **4.** Your cached loop writes the right text, and the count says N + M(M + 1)/2. What happened?
#
# <details><summary>Answer</summary>
#
# The whole text enters each time, at `start_pos=0`, so each call begins afresh: the cache is written and never read.
# Equal texts cannot show that. It takes a count.
#
# </details>
#
# **5.** And the other way round: the count says N + M, and the text is wrong. Name a mistake that does it.
#
# <details><summary>Answer</summary>
#
# The newest token at position 0 every time; or the first token fed instead of the newest; or a cache that was kept from
# another text; or, in a batch, rows that moved without their cache. The count is right in all of them: one token enters
# per call.
#
# </details>
