# %% [markdown]
# # 7. Shapes at inference
#
# Somebody looked at the shapes inside a decoder while it wrote, and was puzzled. The text becomes longer with every
# token, and yet nearly all matrix products stay as they are: of the whole text, one token enters. How can
# that fit? This lesson predicts each shape, looks at it in the running model, and answers the question. The puzzle and
# its first answer are a page of questions and answers, quoted here as *the document*.
#
# You will be able to
#
# - say the shape of q, k, v, the scores and the output at any step, in self- and in cross-attention;
# - name the only two products that grow, and say when they begin to matter;
# - tell prefill, decode step and training apart by their shapes alone;
# - find the assumption that breaks when a text begins with more than one token.
#
# You need: lesson 3 (the cache) and lesson 5 (BART's decoder). Open beside this page: `attention.py` and `cost.py`.

# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page

import matplotlib.pyplot as plt
import torch

from attention import Causal, dense
from cost import attention_weights, count, hooks, matrix, watch
from course import lesson
from course.speaks import speaks
from generate import generate
from model import BART, BARTConfig
from plumbing.report import shape_table

check, accepted, claim, score = lesson(7)
torch.set_grad_enabled(False)

# sizes that are all different, so that a shape says what it counts
B, N, H, D, V = 2, 11, 3, 8, 50  # rows, tokens of the source, heads, numbers of a head, vocabulary
C = H * D
torch.manual_seed(8)
bart = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=1, n_head=H, n_embd=C, vocab_size=V, block_size=64)).eval()
for weight in bart.parameters():
    if weight.dim() == 2:  # rougher than a fresh model, which would write one token for ever
        weight.normal_(std=0.4)
sources = torch.randint(3, V, (B, N)).tolist()

# %% [markdown]
# ## One step, two attentions
#
# The decoder has written for a while, with its cache. Call 1 brought the start token, and now it is call 5: the newest
# token enters the decoder layer, as a tensor of shape `(B, 1, C)`. Inside an attention the heads are split, so every
# tensor has four axes. Five of them are worth knowing:
#
# - `q`, `k`, `v`: what the attention works with, **after** the cache has added what it stores;
# - `scores`: what the softmax is taken of;
# - `out`: the weighted sum of values, before the heads are merged.
#
# Write the ten shapes down as tuples of four numbers, with B = 2, N = 11, H = 3, D = 8.

# %%
at_5 = {
    "self": dict(q=..., k=..., v=..., scores=..., out=...),
    "cross": dict(q=..., k=..., v=..., scores=..., out=...),
}
check("self", at_5["self"])
check("cross", at_5["cross"])

# %% [markdown]
# Now look. All that an attention computes passes through its *pattern* (the last section of `attention.py`), so a hook
# there sees q, k, v and the output of every call. `watch` of `cost.py` sets one on every pattern of a model, and the
# model knows nothing of it.

# %%
def seen_in(run):
    """The shapes in every attention of a run: "self", "cross" and the encoder's -> one dict per call."""
    seen = {"self": [], "cross": [], "encoder": []}

    def see(name, pattern, q, k, v, query_pos, key_pos, out):
        role = "encoder" if name.startswith("encoder") else "cross" if "cross" in name else "self"
        shapes = {tensor: tuple(x.shape) for tensor, x in dict(q=q, k=k, v=v, out=out).items()}
        seen[role].append(shapes | dict(scores=(*q.shape[:3], k.size(2))))  # q k^T: queries are rows, keys are columns

    with hooks(watch(bart, see)):
        run()
    return seen


cached = seen_in(lambda: generate(bart, sources, 9, ignore_eos=True))
for role in "self", "cross":
    print(role)
    for call in 1, 2, 5, 9:
        print(f"  call {call}: ", *(f"{name} {str(shape):14}" for name, shape in cached[role][call - 1].items()))
    assert cached[role][4] == accepted(role)

runs = [cached, seen_in(lambda: generate(bart, sources, 9, strategy="naive", ignore_eos=True)),
        seen_in(lambda: bart(torch.tensor(sources), torch.randint(V, (B, 6))))]  # training's pass
calls = [call for run in runs for each in run.values() for call in each]
claim(39, "the output of attention has always the shape of the query",
      f"{sum(call['out'] == call['q'] for call in calls)} of {len(calls)} attentions, cached, naive and in training",
      all(call["out"] == call["q"] for call in calls))

# %% [markdown]
# That is half of the answer. **The output has the shape of the query, whatever is stored.** The axis that counts keys
# comes in with `k`, lives in the scores, and is summed away by the product with `v`. One row goes in, one row comes
# out, and everything behind the attention, the cross-attention's query among it, needs that one row.
#
# ## What grows?
#
# Here are the ten products of a decoder layer that run at every decode step. A plain one multiplies rows by a weight
# (GEMM); a batched one, `qk` or `pv`, multiplies rows by stored keys or values, one product for each row and head
# (BGEMM). Say of each whether its shapes are `"fixed"` from step to step, or whether one of them `"grows"`.
#
# Then write the function that finds out. `count` of `cost.py` records every product as a dict like this:
#
#     {"phase": "step", "step": 5, "attention": "self", "name": "qk", "kind": "BGEMM",
#      "left": [2, 3, 1, 8], "right": [2, 3, 8, 5], "out": [2, 3, 1, 5], ...}
#
# A phase is one of `"encode"`, `"project"` (of the source), `"prefill"` (call 1) and `"step"`. Return the set of pairs
# `(attention, name)` whose shapes are not the same at all decode steps.

# %%
changes = {
    "self c_attn": ..., "self qk": ..., "self pv": ..., "self c_proj": ...,
    "cross c_q": ..., "cross qk": ..., "cross pv": ..., "cross c_proj": ...,
    "mlp c_fc": ..., "mlp c_proj": ...,
}
check("changes", changes)


def growing(records):
    return ...  # your lines


check("growing", growing)

# %%
M = 40  # decoder calls
with count(bart) as cost:
    generate(bart, sources, M, ignore_eos=True)
with count(bart) as training:  # one teacher-forced pass, for the last column
    bart(torch.tensor(sources), torch.randint(V, (B, M)))
print(shape_table(cost.records, training.records), "\n")

found = accepted("growing")(cost.records)
predicted = {tuple(name.split()) for name, change in accepted("changes").items() if change == "grows"}
claim(38, "only the batched products of self-attention grow, everything else is fixed",
      f"of {len({(r['attention'], r['name']) for r in cost.records if r['phase'] == 'step'})} products of a step, "
      f"{len(found)} change their shapes: {', '.join(' '.join(pair) for pair in sorted(found))}",
      found == predicted == {("self", "qk"), ("self", "pv")})

# %% [markdown]
# The table is `python bench.py trace`, which does the same to any model. And this is the other half of the answer: the
# length of the text is an axis of **stored** keys and values, not of the input. The document's answer says so too: what
# is kept of earlier tokens is joined to the new one. It has one slip of the pen: by its words they are joined before
# the embedding. Only the newest id is embedded, and keys and values are joined after their projection, in each layer.
#
# ## When does growing matter?
#
# A product of (m x n) and (n x p) takes 2 m n p FLOPs. So `c_attn` takes the same at every step, while `qk` and `pv`
# of self-attention together take more and more. With C = 24, at which call k do those two first take as many FLOPs
# as `c_attn` alone? (One layer, all heads; biases and softmax do not count.)

# %%
crossing = ...
check("crossing", crossing)

# %%
def flops(record):
    return 2 * torch.tensor(record["out"]).prod().item() * record["left"][-1]


steps = range(1, M + 1)
curves = {"self c_attn": "k:", "cross c_q": "k-.", "self qk + pv": "k-", "cross qk + pv": "k--"}
fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for label, style in curves.items():
    role, *names = label.replace(" + ", " ").split()
    sums = dict.fromkeys(steps, 0)
    for r in cost.records:
        if r["attention"] == role and r["name"] in names and r["phase"] in ("prefill", "step"):
            sums[r["step"]] += flops(r)
    if label == "self c_attn":
        fixed = sums
    if label == "self qk + pv":
        assert min(k for k in steps if sums[k] >= fixed[k]) == accepted("crossing")
    ax.plot(steps, [sums[k] for k in steps], style, label=label)
ax.axvline(N, color="lightgrey", zorder=0)
ax.text(N + 0.5, 300, f"k = N = {N}", fontsize=9)
ax.set(xlabel="decoder call k", ylabel="FLOPs", title="One decoder layer: products of a decode step", ylim=0)
ax.legend(fontsize=9, frameon=False)
ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# One line rises by one key at a time, and three do not move. It crosses the cross-attention where the target is as long
# as the source, and `c_attn` at 3/2 C. In BART-base, C = 768, that is 1,152: more than its 1,024 positions. There the
# growing products never cost as much as `c_attn` does. (They may still take more **time**: lesson 8 says why.)
#
# ## The first call
#
# At call 1 nothing is stored. The document concludes that the first token is generated "completely" from the encoded
# input. How much of that is true? Begin with self-attention: one query, one key, a softmax over a single number. So
# the layer computes something simpler than attention. Write it: `attn` is a `CausalSelfAttention`, `x` is `(B, 1, C)`;
# return what `attn(x)` returns, without scores and softmax, from `attn.c_attn` and `attn.c_proj` alone.

# %%
def first_step(attn, x):
    return ...  # your line


check("first_step", first_step)

# %%
def first_logits(source, start):
    memory = bart.project(bart.encode(torch.tensor([source])))
    return bart.lm_head(bart.features(torch.tensor([[start]]), memory))[0, 0]


layer, x = bart.decoder[0].attn, torch.randn(B, 1, C)
assert torch.allclose(accepted("first_step")(layer, x), layer(x), atol=1e-5)

with attention_weights(bart) as weights:
    generate(bart, sources, 3, ignore_eos=True)
first = weights["self"][0][0]
print(f"self-attention's weights at call 1: shape {tuple(first.shape)}, from {first.min()} to {first.max()}\n")

start = bart.config.start_id
usual = first_logits(sources[0], start)
by_source = (first_logits(sources[1], start) - usual).abs().max().item()
by_start = (first_logits(sources[0], start + 1) - usual).abs().max().item()
claim(40, "at the first step nothing is stored, and the first token depends on the source",
      f"all weights of self-attention are 1, and another source moves the first logits by {by_source:.1f}",
      bool((first == 1).all()) and by_source > 0.1)
claim(40, "it depends on the source completely", f"another start token moves the first logits by {by_start:.1f}",
      by_start < 1e-5)

# %% [markdown]
# So: self-attention has nothing to choose from, and hands on the start token's own value. That still says which token
# it was, and where it stood. As a decoder always starts from the same token, what **differs** between two first tokens
# comes from the source alone, and that is surely what the document means.
#
# ## "Always one token"
#
# The document also says that the input of the decoder is always one token, the last that was generated. A decoder may
# be given the beginning of its text, though. Here it is four tokens, which stand behind the start token:
#
#     generate(bart, sources, 4, decoder_prompts=[[5, 6, 7, 8], [9, 8, 7, 6]])
#
# How many tokens **of each row** enter the decoder at calls 1, 2, 3 and 4?
#
# Now do what the document says. In `generate.py`, `advance` lets everything enter that is not stored yet:
# `new = [row[n:] for row, n in zip(rows, stored)]`. We put `new = [row[-1:] for row in rows]` in its place: always one
# token. One of these four tests fails then. Which?
#
# - **a** `test_only_the_products_of_cached_self_attention_grow`
# - **b** `test_a_decoder_prompt_enters_at_once_and_then_one_token_at_a_time`
# - **c** `test_attention_output_has_the_shape_of_its_query`
# - **d** `test_cache_bytes_are_keys_and_values_of_every_kv_head`

# %%
entering = [..., ..., ..., ...]
check("entering", entering)
speaking = ...  # a letter
check("speaking", speaking)

# %%
prompts = [[5, 6, 7, 8], [9, 8, 7, 6]]
with count(bart) as prompted:
    generate(bart, sources, 4, decoder_prompts=prompts, ignore_eos=True)
entered = [prompted.decoder[call] // B for call in (1, 2, 3, 4)]
assert entered == accepted("entering")
prefill = next(r for r in prompted.records if (r["phase"], r["attention"], r["name"]) == ("prefill", "self", "qk"))
print(f"prefill: {prefill['left']} @ {prefill['right']} -> scores {prefill['out']}\n")
claim(41, "the input of the decoder is always one token", f"tokens of each row at calls 1 to 4: {entered}",
      entered == [1, 1, 1, 1])

tests = dict(a="test_only_the_products_of_cached_self_attention_grow",
             b="test_a_decoder_prompt_enters_at_once_and_then_one_token_at_a_time",
             c="test_attention_output_has_the_shape_of_its_query",
             d="test_cache_bytes_are_keys_and_values_of_every_kv_head")
failed = speaks("generate.py", "new = [row[n:] for row, n in zip(rows, stored)]", "new = [row[-1:] for row in rows]",
                [f"tests/test_cost.py::{test}" for test in tests.values()])
print("\nalways one token: it speaks", failed)
assert failed == [tests[accepted("speaking")]]

# %% [markdown]
# A prefill has T > 1 and T x T scores, of which the mask hides nearly half; then T is 1. The rule that covers both, and
# also a chunk behind a prefix or the guesses of speculative decoding, is in `advance`: **what is not stored yet
# enters**.
#
# Look at which tests stayed silent. The output still has the shape of the query, and the right products still grow. A
# wrong input may have all the right shapes: shapes are necessary, and they are not enough.
#
# ## When to stop
#
# One token enters, and yet the whole list of ids is kept, since that is the text, and since somebody must ask whether
# it is complete. Write this loop. `step(i, position)` feeds the id `i`, which stands at `position` of the list, and
# returns the next id. Append until the appended id is `end`, or until the list has `most` ids. Return the list, with
# the end if it came. `ids` is what the text begins with, and only its last id has to be fed. (BART's decoder starts
# from its end token, of all tokens.)

# %%
def decode(step, ids, end, most):
    return ...  # your lines


check("decode", decode)

# %%
whole = generate(bart, sources[:1], 12, ignore_eos=True)[0]
end = next(i for i in whole[4:] if i not in whole[: whole.index(i)])  # an id that comes late: we call it the end
memory, cache, fed = bart.project(bart.encode(torch.tensor(sources[:1]))), bart.new_cache(1, 16), []


def step(i, position):
    x = bart.features(torch.tensor([[i]]), memory, cache, position)  # (1, 1, C)
    fed.append((x.size(1), position + 1))
    return bart.lm_head(x)[0, 0].argmax().item()


ids = accepted("decode")(step, [start], end, 13)
assert ids[-1] == end
print("the list:", ids)
print("entered at each call:", [T for T, _ in fed], " ids in the list:", [kept for _, kept in fed], "\n")
by_end = ids[1:] == generate(bart, sources[:1], 12, stop=[[end]], ignore_eos=True)[0]
cache.rewind(0)
by_length = accepted("decode")(step, [start], None, 13)[1:] == whole
claim(42, "new ids are joined to the earlier ones to check the end of sequence or the length, and the last one is fed",
      f"one id entered at each of {len(fed)} calls; the loop over the growing list writes what generate() does, ended "
      f"by its end: {by_end}, by its length: {by_length}", by_end and by_length and all(T == 1 for T, _ in fed))

# %% [markdown]
# Does the check need the whole list? For an end token the newest id is enough, for the length a count. A stop of
# several ids needs the last few, and a stop text needs whatever tokens it may be spelled with. So `loop` in
# `generate.py` hands over the row, and lets whoever asks decide.
#
# ## Training
#
# In training the text is known. All T tokens enter at once, shifted by one, and the mask keeps each from looking ahead
# ("teacher forcing"). Take T = 6 and one head: how many scores does that pass compute? And how many are computed
# over the 6 calls of a cached decoding of the same text?

# %%
scores = [..., ...]  # in training, while decoding
check("scores", scores)

# %%
T = 6
text = torch.cat([torch.full((B, 1), start), torch.tensor(generate(bart, sources, T - 1, ignore_eos=True))], 1)
with count(bart) as decoding, attention_weights(bart) as stepwise:
    generate(bart, sources, T, ignore_eos=True)
with count(bart) as training, attention_weights(bart) as at_once:
    bart(torch.tensor(sources), text)


def scores_of(cost):
    return sum(r["out"][2] * r["out"][3] for r in cost.records
               if (r["attention"], r["name"]) == ("self", "qk") and r["phase"] != "encode")


allowed = dense(Causal.allows, torch.arange(T), torch.arange(T)).sum().item()
rows = [cost.linear_rows["decoder.0.attn.c_attn"] // B for cost in (training, decoding)]
difference = (matrix(stepwise["self"][0]) - at_once["self"][0][0]).abs().max().item()
each = [scores_of(training), scores_of(decoding)]
assert each == accepted("scores") and rows == [T, T]
print(f"scores: {each[0]} in training, {each[1]} while decoding, {allowed} allowed by the mask")
print(f"rows through c_attn: {rows[0]} in training, {rows[1]} while decoding\n")
claim(43, "the decoder runs in another way in training than at inference",
      f"one pass with T x T scores, or T calls with one row each; within the causal half they are as many, and the "
      f"weights differ by {difference:.0e}", each[0] != each[1] == allowed and difference < 1e-5)

# %% [markdown]
# The same rows pass through every linear, and the same attention weights come out. So training computes nothing that
# decoding does not, but for the masked half; it computes it in one large product instead of many small ones. That is
# why a triangle cut into rows can be decoded at all: row k needs nothing that comes after it.
#
# ## Questions
#
# Try each one before you unfold the answer.
#
# **1.** A colleague traces a decoder and finds `qk` with shapes (2, 3, 1, 8) and (2, 3, 8, 11) at every step, never
# growing. Is the cache broken?
#
# <details><summary>Answer</summary>
#
# Not if that is the cross-attention: its keys belong to the source, here of 11 tokens, and a source does not grow. In
# self-attention it would be a bug, or a buffer of fixed length that is read whole, with a mask over the empty part.
# Some implementations do just that, because fixed shapes can be compiled once.
#
# </details>
#
# **2.** Three more requests join the batch, so B is 5. Which numbers of the trace change?
#
# <details><summary>Answer</summary>
#
# Every product has more rows: 5 through each linear, and 5 x 3 products in each BGEMM. No axis of keys changes. For the
# linears that is a gift: the same weights serve more rows. For the BGEMMs it is not: each row brings keys and values of
# its own. Lesson 8 builds on this difference.
#
# </details>
#
# **3.** At call 1 all self-attention weights are 1. Do the query's weights in `c_attn` matter there at all?
#
# <details><summary>Answer</summary>
#
# No. The softmax of one number is 1, whatever the number. Queries and keys are computed, and the query has no effect.
# The key is needed: it is stored, and call 2 looks at it.
#
# </details>
#
# **4.** A GPT has a prompt of 100 tokens. What are T and S at calls 1, 2 and 3, and what size have the scores of a
# head?
#
# <details><summary>Answer</summary>
#
# Call 1 is the prefill: T = S = 100, so 100 x 100. At call 2 T = 1 and S = 101, at call 3 T = 1 and S = 102. In general
# call k has S = 99 + k. The source of a BART is another matter: it enters the encoder, not the decoder.
#
# </details>
#
# **5.** The change of `advance` to "always one token" left three of the four tests silent. What sort of test hears
# such a mistake in general?
#
# <details><summary>Answer</summary>
#
# One that compares results: the same text with and without a cache, or with the prompt in one piece and in several.
# Tests of shapes hear only what changes a shape. The repository has both; `tests/test_generate.py` compares all
# strategies in fp64.
#
# </details>

# %%
score()
