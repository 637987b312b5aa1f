# %% [markdown]
# # 11. Find the broken cache
#
# A broken cache seldom fails. It writes a text: fluent, a little worse, and nobody knows of the better one. Here are
# 23 such bugs, each of them one line of this project with a mistake that somebody really made, many of them in
# libraries that everybody uses. You see what they do, name them, and mend them.
#
# You will be able to
#
# - go from a wrong text to the step, the layer, and the one thing in it that is wrong first,
# - tell bugs apart that look alike: a mask and a position, a key and a value, a row and its neighbour,
# - mend each in one line,
# - write the tests that find them: logits before tokens, chunks of any width, batches above one.
#
# Before this: `attention.py`, `cache.py`, and lessons 3 and 5. An hour or two; the gallery may be visited
# in several sittings, in any order.
# %%
import sys; sys.path += ["..", "notebooks"]  # the modules lie one folder above this page

import matplotlib.pyplot as plt
import torch

from attention import CausalSelfAttention
from course import lesson
from course.gallery import CAUSES, EXHIBITS, KINDS, SCENES, WHERE, broken
from course.probes import PROBES, table
from course.speaks import speaks
from course.symptoms import symptoms, workbench
from model import GPT

check, accepted, claim, score = lesson(11)
# %% [markdown]
# ## How to look at an exhibit
#
# Each exhibit decodes in a *scene*: a way to use the cache in which this bug shows. The model is tiny, its weights are
# random and large, and it computes in fp64, so that no difference is rounding. A letter is a token. You see
#
# 1. **the text**, sound and broken; a `^` marks every letter that differs;
# 2. **the first wrong step**: the right letters are forced, so that all steps continue the same text, and the logits of
#    each are held against one uncached pass over that row alone. (`compare.py` does this for any model.)
# 3. **what is wrong there**, one line for each attention in the order in which they run. A `.` is right, `X at 4-7`
#    says at which positions it is not. *newest at* is where the newest token says that it stands, *queries* are what
#    enters, *keys* and *values* are what the queries may read, *output* is what leaves;
# 4. **the attention map** of the first line with an X, sound and broken. White is exactly nothing; the shades are
#    fourth roots, so that even a weight of 0.0001 is seen. A single query is drawn head by head, several as their
#    mean.
#
# What is wrong later is mostly the consequence of what was wrong first. So the diagnosis has three words. *Where*:
# the first line with an X. *Kind*: the leftmost wrong column of that line. *Cause*: what would do this, and no more
# than this.
#
# | column that is wrong first | kind |
# |---|---|
# | newest at | `positions` |
# | queries | `input`: what enters is wrong, though every attention before is right |
# | keys | `keys` |
# | values | `values` |
# | output | `mask`: all that enters is right, and what is made of it is not |
# | none, but the head | `head` |
# %%
print("where:", ", ".join(WHERE))
print("kind: ", ", ".join(KINDS))
print("cause:")
for cause, words in CAUSES.items():
    print(f"    {cause:16} {words}")
print()
symptoms(1)
# %% [markdown]
# Read it from the top. The first line, `self 0`, is right up to its values: the tokens stand where they should, and
# what they may read is what it should be. Only the output has an X. So it is about who sees whom, and the map shows
# it: compare where the white begins. A query at position 4 should see keys 0 to 4. Which cause would do what you see?
#
# Write your diagnosis in the place of `...`, three words in brackets: `("self 1", "values", "stale")`. Once you know,
# take the `#` away: `workbench(1)` prints the function with the bad line marked. The mend is the right line, as text.
# %%
check("diagnosis_1", ...)
# workbench(1)
check("mend_1", ...)
# %%
symptoms(2)
# %% [markdown]
# Exhibit 1 was the mask of the kernel, `is_causal=True`. It is aligned top-left: row *i* sees columns 0 to *i*. That is
# right for a square and wrong behind a prefix, and with one token at a time it is never reached, which is why it lives
# long (PyTorch's own tracker has it as #108108, x-transformers as #187).
#
# Exhibit 2 breaks at step 2. Step 1 is the prefill, and it is right: so look for what a decode step does otherwise.
# In `self 0` everything has an X. That looks like much, and is little: a token with a wrong position has a wrong
# embedding, so its query, key and value are wrong as well. What is leftmost came first. All *earlier* keys are right;
# only the newest is not.
# %%
check("diagnosis_2", ...)
# workbench(2)
check("mend_2", ...)
# %%
symptoms(3)
# %% [markdown]
# Exhibit 2 forgot the offset: each pass began at position 0 again (TransformerLens #777, transformers #43082). A cached
# key was right when it was made, and stays right; so the damage begins with the first step.
#
# Exhibit 3 has four rows that change places. Row 3 stays where it is, and it is right. In row 0 the keys are right and
# the values are not: this row looks where it should, and finds what belongs to another. The maps cannot show that, they
# are equal in `self 0`: weights are made of queries and keys alone.
# %%
check("diagnosis_3", ...)
# workbench(3)
check("mend_3", ...)
# %% [markdown]
# ## The gallery
#
# Twenty more, and you are on your own. First a prediction. Of all 23 exhibits, how many leave **every letter** of
# their scene as it should be, with logits that are wrong?
# %%
unseen = ...
check("unseen", unseen)
for number in range(4, 10):
    symptoms(number)
# %%
check("diagnosis_4", ...)  # (where, kind, cause); then workbench(4)
check("mend_4", ...)
check("diagnosis_5", ...)  # (where, kind, cause); then workbench(5)
check("mend_5", ...)
check("diagnosis_6", ...)  # (where, kind, cause); then workbench(6)
check("mend_6", ...)
check("diagnosis_7", ...)  # (where, kind, cause); then workbench(7)
check("mend_7", ...)
check("diagnosis_8", ...)  # (where, kind, cause); then workbench(8)
check("mend_8", ...)
check("diagnosis_9", ...)  # (where, kind, cause); then workbench(9)
check("mend_9", ...)
# %%
for number in range(10, 17):
    symptoms(number)
# %%
check("diagnosis_10", ...)  # (where, kind, cause); then workbench(10)
check("mend_10", ...)
check("diagnosis_11", ...)  # (where, kind, cause); then workbench(11)
check("mend_11", ...)
check("diagnosis_12", ...)  # (where, kind, cause); then workbench(12)
check("mend_12", ...)
check("diagnosis_13", ...)  # (where, kind, cause); then workbench(13)
check("mend_13", ...)
check("diagnosis_14", ...)  # (where, kind, cause); then workbench(14)
check("mend_14", ...)
check("diagnosis_15", ...)  # (where, kind, cause); then workbench(15)
check("mend_15", ...)
check("diagnosis_16", ...)  # (where, kind, cause); then workbench(16)
check("mend_16", ...)
# %%
for number in range(17, 24):
    symptoms(number)
# %%
check("diagnosis_17", ...)  # (where, kind, cause); then workbench(17)
check("mend_17", ...)
check("diagnosis_18", ...)  # (where, kind, cause); then workbench(18)
check("mend_18", ...)
check("diagnosis_19", ...)  # (where, kind, cause); then workbench(19)
check("mend_19", ...)
check("diagnosis_20", ...)  # (where, kind, cause); then workbench(20)
check("mend_20", ...)
check("diagnosis_21", ...)  # (where, kind, cause); then workbench(21)
check("mend_21", ...)
check("diagnosis_22", ...)  # (where, kind, cause); then workbench(22)
check("mend_22", ...)
check("diagnosis_23", ...)  # (where, kind, cause); then workbench(23)
check("mend_23", ...)
# %% [markdown]
# ## A probe for each
#
# A *probe* asks for one promise of one function, with the smallest input that can break it: "a query behind a prefix
# sees all of the prefix". `notebooks/course/probes.py` has 23, one for each exhibit. Break the project in 23 ways, run
# every probe each time: of 23 x 23 outcomes, how many are failures?
#
# And the usual test, which is the only one that many projects have: one prompt enters, then a token a step, and the
# logits are compared with an uncached pass. How many of the 23 does that one notice?
# %%
failures = ...
check("failures", failures)
usual = ...
check("usual", usual)
# %%
outcomes = torch.tensor(table())  # (24, 23): the last row is that of the sound code
assert outcomes[-1].all() and (~outcomes[:-1]).sum() == accepted("failures")
texts, noticed = [], []
for number, exhibit in enumerate(EXHIBITS, 1):
    scene = SCENES[exhibit.scene]
    with broken(exhibit):
        texts += [number] * (scene.write() == scene.right)
        noticed += [number] * (SCENES["plain"].differs() > 1e-7)
assert len(texts) == accepted("unseen") and len(noticed) == accepted("usual")
print("every letter is right in exhibits", *texts)
print("the usual test notices exhibits  ", *noticed)
print()
for number, (promise, _) in enumerate(PROBES.values(), 1):
    print(f"probe {number:2}: {promise}")

fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
ax.imshow(outcomes.numpy(), cmap="gray", vmin=-0.3, vmax=1.1)
ax.set_yticks([*range(0, 22, 3), 23], [*range(1, 23, 3), "sound"])
ax.set_xticks(range(0, 22, 3), range(1, 23, 3))
ax.set(xlabel="probe (dark: it fails)", ylabel="exhibit")
plt.show()
# %% [markdown]
# The diagonal is what you want of small tests: one that fails for one reason alone also says what is broken. But a
# probe finds the bug that its author thought of. What finds the others is a comparison of everything with everything:
# cached against uncached, at every position, in chunks of any width, with more than one row.
#
# Write that one. `model(rows[:, start:end], use_kv_cache=True, start_pos=start)` lets a chunk enter; `model(rows)` is
# the uncached pass. Your function is run in the sound project, and with six of the exhibits in it.
# %%
def notices(model, rows, widths):
    """rows: (B, T) ids, widths: of the chunks, T in all -> True if the cached logits are wrong."""
    return ...  # your lines


check("notices", notices)

torch.manual_seed(42)
config = GPT.get_default_config()
config.n_head, config.n_embd = 1, 6
layer, x = CausalSelfAttention(config).eval(), torch.rand(2, 8, 6)
with torch.no_grad():
    pieces = [layer(part, use_kv_cache=True, start_pos=start)
              for start, part in zip((0, 3, 4, 5, 6, 7), x.split([3, 1, 1, 1, 1, 1], 1))]
    whole = layer(x)
joined = torch.cat(pieces, 1)
claim(29, "a prefill of 3 and five steps are not equal to the whole bit by bit, and close (there 83 of 96 are equal)",
      f"{(joined == whole).sum()} of 96 are equal, the largest difference is {(joined - whole).abs().max():.0e}",
      not torch.equal(joined, whole) and torch.allclose(joined, whole))
# %% [markdown]
# How many are equal depends on the machine and on the version of PyTorch. So compare with a tolerance, and never assert
# the pattern: a test that asks for equal bits cries wolf on sound code, until somebody switches it off.
#
# Three rules for tests of a cache. **Logits before tokens**: two exhibits left every letter right. **Chunks of random
# widths**: a prefill and single steps never reach the mask. **Batches above one**, of different lengths, whose rows
# move: with one row, no row can be taken for another. What is left needs a history: a second text or source, a
# rewind, a fork, a cache that is full. `tests/test_schedules.py` is all of this as one test: random histories of
# chunks, rewinds, reorders and forks, beside the same rows kept as plain lists.
#
# ## Change this file, and see which test speaks
#
# In `attention.py`, the last line of `Causal.forward` becomes exhibit 4: no mask. These tests are in
# `tests/test_attention.py`. Read the four lines of `Causal.forward`: which of them reach its last one? Answer with a
# set such as `{"a", "b"}`.
#
# - **a** `test_prefill_with_cache_is_bit_equal_to_without`
# - **b** `test_prefill_of_three_and_five_single_steps_is_close`
# - **c** `test_any_split_into_chunks_gives_the_same_output`
# - **d** `test_rows_at_different_positions_equal_their_solo_runs`
# %%
speaking = ...
check("speaks", speaking)
# %%
names = {"a": "test_prefill_with_cache_is_bit_equal_to_without",
         "b": "test_prefill_of_three_and_five_single_steps_is_close",
         "c": "test_any_split_into_chunks_gives_the_same_output",
         "d": "test_rows_at_different_positions_equal_their_solo_runs"}
found = speaks("attention.py", EXHIBITS[3].line.strip(), EXHIBITS[3].wrong,
               [f"tests/test_attention.py::{name}" for name in names.values()])
print("\n".join(found))
assert found == [names[letter] for letter in sorted(accepted("speaks"))]
# %% [markdown]
# ## Five questions
#
# **1.** In exhibit 2 the prefill is right, and every later step is wrong, though all keys of the prompt are right.
# Why is a comparison of the cache's contents after the prefill no test for it?
#
# <details><summary>Answer</summary>
#
# With `start_pos=0` the offset is 0, so positions with and without it are the same. The bug needs a second pass. What
# is stored is right until then; what is computed next is not.
#
# </details>
#
# **2.** The stale cache of exhibit 7 changed no letter. What decides how much it changes, and why is a buffer that
# starts with zeros no protection?
#
# <details><summary>Answer</summary>
#
# The weight that the stale keys get: softmax shares 1 among all that are read, so one strong key of another text is
# enough. A key of zeros has a score of 0, not of minus infinity. It takes its part of the weight, and it gives zeros
# for it: the output shrinks. Only a mask, or a read that ends where the text ends, takes nothing.
#
# </details>
#
# **3.** Beams that are not reordered, and beams whose keys move without their values: why may a search with the first
# bug still find a good text, and which assertion belongs into every test of a reorder?
#
# <details><summary>Answer</summary>
#
# Beams of one prompt resemble each other, and often the best one stays in its row: then nothing has to move. So the
# test must assert that some row really took the place of another, and then compare its next logits with an uncached
# pass over its own text.
#
# </details>
#
# **4.** A model is broken in the cached and in the uncached path alike, say with scores that are not scaled. Which of
# the tests of this page find it, and what would?
#
# <details><summary>Answer</summary>
#
# None that compares the two paths: they agree. It takes something from outside: numbers written down earlier, a loop
# that is too simple to be wrong, or another implementation, such as the parity with published weights.
#
# </details>
#
# **5.** Overflow of a cache is an error in exhibit 17's sound scene, and a text in the broken one. Why is the error
# better, when the text looks plausible?
#
# <details><summary>Answer</summary>
#
# The keys of the letters that did not fit are missing, so nothing later can see them: the model forgets what it has
# just written. An error comes before anything is printed and names both numbers, so that somebody can choose: a
# larger cache, a shorter text, or a window that slides on purpose.
#
# </details>
# %%
score()
