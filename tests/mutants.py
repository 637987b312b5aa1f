"""
Break the code on purpose, one bug at a time, and see that the tests notice.

    python tests/mutants.py             all of them, two at a time
    python tests/mutants.py NAME ...    some
    python tests/mutants.py 40          so many, which depends on this file alone

A mutant is a mistake that somebody really made in some codebase. Each is a function below, which replaces functions of
the project from outside, in a process of its own, and in the ranks that this starts, in which the tests of attention,
model, generation and ranks must then fail. So moving a line, or renaming a variable, breaks no mutant, and one that no
longer fits, so that it breaks in its own lines or not at all, is told as that. Exits with 1 if a mutant survives.
"""

import functools
import inspect
import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TESTS = ["tests/test_attention.py", "tests/test_schedules.py", "tests/test_model.py", "tests/test_generate.py",
         "tests/test_sampling.py", "tests/test_concat.py", "tests/test_sparse.py", "tests/test_gqa.py",
         "tests/test_quality.py", "tests/test_samples.py", "tests/test_session.py", "tests/test_serve.py",
         "tests/test_beam.py", "tests/test_speculate.py", "tests/test_quantize.py", "tests/test_compiled.py",
         "tests/test_products.py", "tests/test_ranks.py"]
MUTANTS = {}


def mutant(function):
    MUTANTS[function.__name__] = function
    return function


def project():
    """The modules that mutants change."""
    import attention, cache, generate, model, sampling  # noqa: E401
    return attention, cache, generate, model, sampling


def replace(owner, name, make):
    """Put make(original) in the place of a function or property, wherever the project refers to it."""
    original = vars(owner)[name]
    function = original.__func__ if isinstance(original, staticmethod) else original
    changed = make(function)
    changed = staticmethod(changed) if isinstance(original, staticmethod) else changed
    for place in (owner, *project()):
        if vars(place).get(name) is original:
            setattr(place, name, changed)


def around(owner, name):
    """Decorates f(original, *args, **kwargs), which takes the place of owner.name."""
    def put(f):
        replace(owner, name, lambda original: functools.wraps(original)(lambda *a, **k: f(original, *a, **k)))
    return put


def without(owner, name, words):
    """A check whose refusal with these words is left out."""
    @around(owner, name)
    def check(original, *args):
        try:
            return original(*args)
        except ValueError as error:
            if words not in str(error):
                raise


def passing_with(change):
    """passing() whose positions go through change(pos, start_pos, cache)."""
    _, cache, *_ = project()

    @around(cache, "passing")
    @contextmanager
    def passing(original, kept, start_pos, x, block_size):
        with original(kept, start_pos, x, block_size) as pos:
            yield change(pos, start_pos, kept)


# -----------------------------------------------------------------------------
# Masks and positions


@mutant
def mask_of_a_chunk_is_aligned_top_left():
    attention, *_ = project()

    @around(attention.Causal, "forward")
    def forward(original, self, q, k, v, query_pos, key_pos):
        return attention.attend(q, k, v, None, q.size(2) > 1, self.rate)


@mutant
def mask_is_skipped_when_the_cache_is_used():
    attention, *_ = project()

    @around(attention.Causal, "forward")
    def forward(original, self, q, k, v, query_pos, key_pos):
        return attention.attend(q, k, v, None, key_pos is query_pos, self.rate)


@mutant
def chunk_sees_its_own_future():
    attention, *_ = project()
    replace(attention.Causal, "allows", lambda original: lambda b, h, q, k: k <= q + 1)


@mutant
def positions_are_not_offset():
    passing_with(lambda pos, start_pos, cache: pos - pos[..., :1])


@mutant
def positions_are_offset_by_one_too_few():
    passing_with(lambda pos, start_pos, cache: (pos - int(pos.size(-1) == 1)).clamp(min=0))


@mutant
def tensor_positions_are_those_of_the_first_row():
    import torch
    passing_with(lambda pos, start_pos, cache: pos[:1].expand_as(pos) if isinstance(start_pos, torch.Tensor) else pos)


@mutant
def ragged_rows_share_one_position():
    passing_with(lambda pos, start_pos, cache: pos.amax(0, keepdim=True).expand_as(pos) if pos.dim() == 2 else pos)


@mutant
def key_positions_are_off_by_one():
    _, cache, *_ = project()

    @around(cache.KVCache, "update")
    def update(original, *args):
        keys, values, key_pos = original(*args)
        return keys, values, key_pos + 1


@mutant
def whole_buffer_is_read_without_a_mask():
    _, cache, *_ = project()

    @around(cache.KVCache, "update")
    def update(original, self, layer, pos, k, v):
        original(self, layer, pos, k, v)
        return self.k[layer][: len(k)], self.v[layer][: len(k)], self.places


@mutant
def padding_of_a_source_is_attended_to():
    attention, *_ = project()
    replace(attention.Everything, "allows", lambda original: lambda b, h, q, k: k >= 0)


@mutant
def one_padded_position_of_a_source_counts():
    attention, *_ = project()

    @around(attention, "key_positions")
    def key_positions(original, x, lengths=None):
        return original(x, lengths if lengths is None else (lengths + 1).clamp(max=x.size(1)))


# -----------------------------------------------------------------------------
# Slots that evict, and folds


@mutant
def ring_is_one_slot_too_small():
    import evict
    import sparse
    replace(sparse.Local, "slots", lambda original: lambda self, length: [
        evict.Ring(slots.size - 1, slots.window - 1, slots.sinks) if slots.evicts and slots.window > 1 else slots
        for slots in original(self, length)])


@mutant
def slots_are_told_one_position_late():
    import evict
    replace(evict.Ring, "held", lambda original: lambda self, count: original(self, count - 1))


@mutant
def slots_never_written_hold_a_position():
    import evict
    replace(evict.Ring, "held", lambda original: lambda self, count: original(self, count).clamp(max=0))


@mutant
def chunk_evicts_before_it_is_attended_to():
    _, cache, *_ = project()

    @around(cache.KVCache, "_evict")
    def _evict(original, self, layer, pos, new, kept):
        found = original(self, layer, pos, new, kept)
        if pos.size(-1) > 1 and any(self.starts):
            for buffer, x in zip(kept, new):
                cache.write(buffer, self.slots[layer].of(pos), x)
            n = kept[0].size(2)
            found = (*(x.clone() for x in found[:2]), found[2])
            for x, buffer in zip(found, kept):
                x[:, :, :n] = buffer
        return found


@mutant
def padding_takes_slots():
    _, cache, *_ = project()

    @around(cache.KVCache, "rewind")
    def rewind(original, self, position):
        self.settle()
        original(self, position)


@mutant
def rewind_is_checked_by_count():
    import evict
    replace(evict.Ring, "remembers", lambda original: lambda self, position, count: position + self.window >= count)


@mutant
def rewind_forgets_how_far_a_row_has_been():
    _, cache, *_ = project()

    @around(cache.KVCache, "rewind")
    def rewind(original, self, position):
        self.most = list(self.filled)
        original(self, position)


@mutant
def reorder_moves_as_many_slots_as_positions():
    _, cache, *_ = project()
    cache.LONG, original = 0, cache.LONG

    @around(cache.KVCache, "begin")
    def begin(inner, self, *args):
        cache.LONG = original
        inner(self, *args)
        cache.LONG = 0


@mutant
def first_block_sees_zeros_before_it():
    import sparse
    replace(sparse, "attend_blocks", lambda original: lambda q, k, v, allowed, rate: original(
        q, k, v, None if allowed is None else allowed[-1:].expand_as(allowed), rate))


@mutant
def joined_softmax_is_an_average():
    import sparse
    replace(sparse.torch, "logaddexp", lambda original: lambda a, b: original(a, b) + math.log(2))


@mutant
def joined_softmax_goes_back_by_its_parts():
    import sparse

    @around(sparse, "BACKWARD")
    def backward(original, grad, q, k, v, y, total, *args, **kwargs):
        return original(grad, q, k, v, *sparse.KERNEL(q, k, v, is_causal=args[1], **kwargs), *args, **kwargs)


@mutant
def strangers_are_pooled():
    from further import gqa
    replace(gqa, "mean", lambda original: lambda heads: original(heads.roll(1, 0)))
    gqa.WAYS["mean"] = gqa.mean


@mutant
def queries_do_not_learn_of_the_new_keys():
    from further import gqa

    @around(gqa, "span")
    def span(original, heads):
        shared, change = original(heads)
        return shared, gqa.torch.eye(heads.size(2)).to(heads).expand_as(change)


@mutant
def pooled_model_is_compared_with_a_wider_one():
    from further import quality
    replace(quality, "converted", lambda original: lambda way, fields, values, *args: original(
        way, fields, quality.widened(values, fields), *args))


@mutant
def summaries_are_counted_twice():
    import sparse
    replace(sparse.Fixed, "allows", lambda original: lambda self, b, h, q, k: original(self, b, h, q, k) & (k != q - 1))


@mutant
def split_heads_read_the_others_slots():
    import sparse

    @around(sparse.Split, "keep")
    def keep(original, *args):
        return tuple(tuple(reversed(each)) for each in original(*args))


@mutant
def shared_heads_are_folded_in_the_wrong_order():
    attention, *_ = project()

    @around(attention, "attend")
    def attend(original, q, k, v, *args, **kwargs):
        group = q.size(1) // k.size(1)
        return original(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), *args, **kwargs)


# -----------------------------------------------------------------------------
# What is written


def writing(change):
    """update() that stores change(k), change(v) but nothing else is different."""
    _, cache, *_ = project()

    @around(cache.KVCache, "update")
    def update(original, self, layer, pos, k, v):
        return original(self, layer, pos, *change(self, k, v))


@mutant
def keys_are_written_one_slot_late():
    writing(lambda cache, k, v: (k.roll(1, 2), v))


@mutant
def values_are_not_written_after_the_prefill():
    writing(lambda cache, k, v: (k, v * (cache.stop == v.size(2))))


@mutant
def values_are_written_where_keys_belong():
    writing(lambda cache, k, v: (v, v))


@mutant
def only_the_first_row_is_written():
    _, cache, *_ = project()

    @around(cache.KVCache, "update")
    def update(original, self, layer, pos, k, v):
        before = None if self.k[layer] is None else (self.k[layer][1:].clone(), self.v[layer][1:].clone())
        found = original(self, layer, pos, k, v)
        for buffer, old in zip((self.k[layer], self.v[layer]), before or (0.0, 0.0)):
            buffer[1:] = old
        return found


@mutant
def cache_keeps_gradients():
    import torch
    _, cache, *_ = project()

    @around(cache.KVCache, "update")
    def update(original, *args):
        detach, torch.Tensor.detach = torch.Tensor.detach, lambda x: x
        try:
            return original(*args)
        finally:
            torch.Tensor.detach = detach


@mutant
def cache_is_born_in_inference_mode():
    import torch
    _, cache, *_ = project()
    replace(cache.KVCache, "_allocate", lambda original: torch.no_grad()(original.__wrapped__))


@mutant
def cache_keeps_its_first_dtype():
    _, cache, *_ = project()

    @around(cache.KVCache, "update")
    def update(original, self, layer, pos, k, v):
        kept = k if self.k[layer] is None else self.k[layer]
        return original(self, layer, pos, k.to(kept.dtype), v.to(kept.dtype))


@mutant
def an_old_text_is_not_cleared():
    _, cache, *_ = project()

    @around(cache.KVCache, "clear")
    def clear(original, self, rows):
        if self.k[0] is not None and len(self.k[0]) <= max(rows):
            original(self, rows)


# -----------------------------------------------------------------------------
# What is counted and refused


@mutant
def positions_count_before_success():
    """A pass that fails half-way leaves its first layers ahead."""
    _, cache, *_ = project()

    @around(cache, "passing")
    @contextmanager
    def passing(original, kept, start_pos, x, block_size):
        with original(kept, start_pos, x, block_size) as pos:
            if kept is not None and None not in kept.k and not hasattr(start_pos, "shape"):
                kept.filled = [n + x.size(1) for n in kept.filled]
            yield pos


@mutant
def a_gap_is_accepted():
    without(project()[1].KVCache, "check", "positions are stored in row")


@mutant
def a_gap_in_a_later_row_is_accepted():
    _, cache, *_ = project()

    @around(cache.KVCache, "check")
    def check(original, self, starts, B, T):
        return original(self, [starts[0], *self.filled[1:B]] if len(starts) == B and any(starts) else starts, B, T)


@mutant
def an_overflow_is_accepted():
    without(project()[1].KVCache, "check", "overflow")


@mutant
def a_batch_above_the_maximum_is_accepted():
    without(project()[1].KVCache, "check", "does not fit a cache of")


@mutant
def the_batch_may_change_in_mid_stream():
    without(project()[1].KVCache, "check", "the batch changed")


@mutant
def one_token_too_many_is_accepted():
    _, _, generate, *_ = project()

    @around(generate, "prepare")
    def prepare(original, model, prompts, max_new_tokens, decoder_prompts, overflow="refuse"):
        return original(model, prompts, max(max_new_tokens - 1, min(max_new_tokens, 1)), decoder_prompts, overflow)


# -----------------------------------------------------------------------------
# Rows that move


@mutant
def a_fork_shares_its_buffers():
    _, cache, *_ = project()

    @around(cache.KVCache, "fork")
    def fork(original, self):
        return self._like(self.batch_size, self.filled, lambda x: x)


@mutant
def a_row_is_a_copy():
    _, cache, *_ = project()

    @around(cache.KVCache, "row")
    def row(original, self, i):
        return original(self.fork(), i)


@mutant
def keys_are_reordered_without_their_values():
    _, cache, *_ = project()

    @around(cache.KVCache, "reorder")
    def reorder(original, self, rows):
        values = [x if x is None else x.clone() for x in self.v]
        original(self, rows)
        self.v = values


@mutant
def a_reorder_moves_rows_one_after_the_other():
    """So that a row which was overwritten already is read."""
    _, cache, *_ = project()

    @around(cache.KVCache, "reorder")
    def reorder(original, self, rows):
        if len(rows) > len(self.filled) or max(rows) >= len(self.filled) or min(rows) < 0:
            return original(self, rows)  # which refuses
        for i, row in enumerate(rows):
            for x in (*self.k, *self.v):
                if x is not None:
                    x[i] = x[row].clone()
        self.filled = [self.filled[row] for row in rows]


@mutant
def counts_are_not_reordered():
    _, cache, *_ = project()

    @around(cache.KVCache, "reorder")
    def reorder(original, self, rows):
        filled = self.filled[: len(rows)]
        original(self, rows)
        self.filled = filled


@mutant
def expanded_rows_do_not_stand_side_by_side():
    _, cache, *_ = project()

    @around(cache.KVCache, "expand")
    def expand(original, self, n):
        B = len(self.filled)
        original(self, n)
        self.reorder([i % B * n for i in range(n * B)])


@mutant
def every_row_is_rewound_as_the_first():
    _, cache, *_ = project()

    @around(cache.KVCache, "rewind")
    def rewind(original, self, position):
        original(self, position)
        self.filled = [min(n, self.filled[0]) for n in self.filled]


@mutant
def padding_is_not_rewound():
    _, cache, generate, *_ = project()

    @around(generate, "advance")
    def advance(original, model, rows, kept=None, memory=None, last=1):
        if kept is None:
            return original(model, rows, kept, memory, last)
        width = max(len(row) - n for row, n in zip(rows, kept.filled))
        after = [n + width for n in kept.filled]
        logits = original(model, rows, kept, memory, last)
        kept.filled = after
        return logits


@mutant
def a_healed_count_forgets_what_was_rejected():
    """The count is never rewound, only capped by what the rows hold: a new draft then meets rejected keys."""
    _, cache, *_ = project()

    @around(cache.KVCache, "rewind")
    def rewind(original, self, position):
        before = self.filled
        original(self, position)
        self.filled = [max(n, old - 1) for n, old in zip(self.filled, before)]


# -----------------------------------------------------------------------------
# Sources


@mutant
def a_new_source_that_is_refused_leaves_a_mixture_of_two():
    *_, model, _ = project()

    @around(model.BART, "decode")
    def decode(original, self, target, encoded, source_lengths=None, use_kv_cache=False, start_pos=0):
        try:
            return original(self, target, encoded, source_lengths, use_kv_cache, start_pos)
        except ValueError:
            self.source = encoded.clone(), source_lengths, self.project(encoded, source_lengths)
            raise


def decoding(change):
    """decode() with the source and lengths that change(self, encoded, lengths, start_pos) makes of its own."""
    *_, model, _ = project()

    @around(model.BART, "decode")
    def decode(original, self, target, encoded, source_lengths=None, use_kv_cache=False, start_pos=0):
        if use_kv_cache:
            encoded, source_lengths = change(self, encoded, source_lengths, start_pos)
        return original(self, target, encoded, source_lengths, use_kv_cache, start_pos)


@mutant
def an_old_source_answers_for_a_new_one():
    *_, model, _ = project()

    @around(model.BART, "decode")
    def decode(original, self, target, encoded, source_lengths=None, use_kv_cache=False, start_pos=0):
        before = self.source
        if use_kv_cache and before and before[0] is not None:
            encoded = before[0] if start_pos == 0 else None
        return original(self, target, encoded, source_lengths, use_kv_cache, start_pos)


@mutant
def another_source_is_not_noticed_in_mid_stream():
    decoding(lambda self, encoded, lengths, start_pos: (None if start_pos else encoded, lengths))


@mutant
def other_lengths_are_not_noticed_in_mid_stream():
    decoding(lambda self, encoded, lengths, start_pos: (encoded, None if start_pos else lengths))


@mutant
def a_memory_that_was_overwritten_passes_for_the_stored_one():
    *_, model, _ = project()

    @around(model.BART, "decode")
    def decode(original, self, target, encoded, *args, **kwargs):
        logits = original(self, target, encoded, *args, **kwargs)
        if self.source and encoded is not None:
            self.source = encoded, *self.source[1:]  # the tensor itself in place of a copy
        return logits


@mutant
def rows_ask_the_neighbouring_source():
    attention, *_ = project()

    @around(attention.CrossAttention, "forward")
    def forward(original, self, x, k, v, key_pos):
        return original(self, x, k.roll(1, 0), v.roll(1, 0), key_pos)


@mutant
def rows_side_by_side_ask_different_sources():
    attention, *_ = project()

    @around(attention.CrossAttention, "forward")
    def forward(original, self, x, k, v, key_pos):
        n = len(x) // len(k)
        order = [i * len(k) + s for s in range(len(k)) for i in range(n)]
        y = original(self, x[order], k, v, key_pos)
        return y[[order.index(r) for r in range(len(x))]]


@mutant
def every_layer_reads_the_memory_of_the_first():
    *_, model, _ = project()

    @around(model.DecoderLayer, "forward")
    def forward(original, self, x, pos, cache=None, memory=None):
        return original(self, x, pos, cache, memory and memory._replace(kv=memory.kv[:1] * len(memory.kv)))


@mutant
def the_memory_stays_when_rows_leave():
    _, cache, *_ = project()

    @around(cache.Memory, "take")
    def take(original, self, rows):
        return original(self, list(range(len(rows))))


@mutant
def the_source_is_projected_at_every_step():
    _, _, generate, *_ = project()

    @around(generate, "cached")
    def cached(original, model, sources, B, room, choose):
        step = original(model, sources, B, room, choose)

        def wasteful(rows, which):
            generate.project(model, *generate.encode(model, sources))
            return step(rows, which)
        return wasteful


# -----------------------------------------------------------------------------
# Whose state it is


@mutant
def an_uncached_pass_moves_the_cache():
    *_, model, _ = project()

    @around(model.GPT, "forward")
    def forward(original, self, idx, use_kv_cache=False, start_pos=0):
        return original(self, idx, use_kv_cache or self.cache is not None, start_pos)


@mutant
def two_decodings_share_a_cache():
    *_, model, _ = project()

    @around(model.Model, "new_cache")
    def new_cache(original, self, batch_size, length=None):
        known = self.__dict__.setdefault("known", {})
        kept = known.setdefault((batch_size, length), original(self, batch_size, length))
        kept.filled = [0] * (batch_size or 0)
        return kept


@mutant
def caches_are_left_on_the_model():
    *_, model, _ = project()

    @around(model.Model, "new_cache")
    def new_cache(original, self, *args, **kwargs):
        self.cache = original(self, *args, **kwargs)
        return self.cache


@mutant
def dropout_is_on_while_generating():
    attention, *_ = project()
    replace(attention.Dropout, "rate", lambda original: property(lambda self: self.p if self.training else 0.0))


@mutant
def generating_switches_training_off():
    _, _, generate, *_ = project()

    @around(generate, "stream")
    def stream(original, model, *args, **kwargs):
        return original(model.eval(), *args, **kwargs)


# -----------------------------------------------------------------------------
# Attention, the loop, choosing


@mutant
def shared_heads_are_repeated_in_the_wrong_order():
    attention, *_ = project()

    @around(attention, "attend")
    def attend(original, q, k, v, *args, **kwargs):
        group = q.size(1) // k.size(1)
        return original(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), *args, **kwargs)


@mutant
def scores_are_not_scaled():
    attention, *_ = project()

    @around(attention, "attend_explicit")
    def attend_explicit(original, q, k, v, mask=None):
        return original(q * math.sqrt(q.size(-1)), k, v, mask)


@mutant
def a_ragged_prefill_takes_the_last_column():
    _, _, generate, *_ = project()

    @around(generate, "advance")
    def advance(original, model, rows, kept=None, memory=None, last=1):
        new = [row[n:] for row, n in zip(rows, kept.filled if kept else [0] * len(rows))]
        width = max(map(len, new))
        filled = [len(row) for row in rows]
        logits = original(model, [row + [0] * (width - len(n)) for row, n in zip(rows, new)], kept, memory, last)
        if kept:
            kept.filled = filled
        return logits


@mutant
def every_position_passes_through_the_head():
    _, _, generate, *_ = project()

    @around(generate, "advance")
    def advance(original, model, rows, kept=None, memory=None, last=1):
        new = min(len(row) - n for row, n in zip(rows, kept.filled if kept else [0] * len(rows)))
        return original(model, rows, kept, memory, max(new, last))[:, -last:]


@mutant
def the_first_row_that_ends_stops_the_batch():
    _, _, generate, *_ = project()

    @around(generate, "loop")
    def loop(original, step, rows, limits, ended):
        done = []

        def ends(r, row):
            done.extend([r] if ended(r, row) else [])
            return bool(done)
        return original(step, rows, limits, ends)


@mutant
def a_row_goes_on_after_its_end():
    _, _, generate, *_ = project()

    @around(generate, "loop")
    def loop(original, step, rows, limits, ended):
        return original(step, rows, limits, lambda r, row: False)


@mutant
def the_end_is_asked_for_once_a_step():
    _, _, generate, *_ = project()

    @around(generate, "loop")
    def loop(original, step, rows, limits, ended):
        last = {}

        def remember(rows, which):
            found = step(rows, which)
            last.update({r: len(row) + len(ids) for r, row, ids in zip(which, rows, found)})
            return found
        return original(remember, rows, limits, lambda r, row: len(row) == last[r] and ended(r, row))


@mutant
def only_the_first_of_several_ends_counts():
    *_, model, _ = project()
    replace(model.Config, "end_ids", lambda original: property(lambda self: original.fget(self)[:1]))


@mutant
def the_highest_id_wins_among_equals():
    *_, sampling = project()

    @around(sampling.Chooser, "__call__")
    def call(original, self, logits, rows, which):
        if self.choice.temperature:
            return original(self, logits, rows, which)
        scores = self.scores(logits, rows, which)
        return (scores.size(-1) - 1 - scores.flip(-1).argmax(-1, keepdim=True)).tolist()


@mutant
def top_k_keeps_ties():
    import dataclasses

    import torch
    *_, sampling = project()

    @around(sampling.Chooser, "draw")
    def draw(original, self, scores, parts):
        if not self.choice.top_k:
            return original(self, scores, parts)
        least = scores.topk(min(self.choice.top_k, scores.size(-1)))[0][:, -1:]
        own, self.choice = self.choice, dataclasses.replace(self.choice, top_k=None)
        try:
            return original(self, scores.masked_fill(scores < least, -torch.inf), parts)
        finally:
            self.choice = own


@mutant
def a_rule_reads_the_limit_of_another_row():
    *_, sampling = project()

    @around(sampling.Chooser, "scores")
    def scores(original, self, logits, rows, which):
        return original(self, logits, rows, range(len(rows)))


# -----------------------------------------------------------------------------
# What is concatenated


def concatenating():
    from further import concat
    return concat


@mutant
def a_concatenation_counts_only_what_is_new():
    concat = concatenating()

    @around(concat.ConcatCache, "update")
    def update(original, self, layer, pos, k, v):
        before = self.copied
        found = original(self, layer, pos, k, v)
        self.copied = before + k.nbytes + v.nbytes
        return found


@mutant
def a_write_counts_the_whole_buffer():
    concat = concatenating()

    @around(concat.StaticCache, "update")
    def update(original, self, layer, pos, k, v):
        before = self.copied
        found = original(self, layer, pos, k, v)
        self.copied = before + sum(x.nbytes for x in found[:2])
        return found


@mutant
def what_was_rewound_is_concatenated_too():
    concat = concatenating()

    @around(concat.ConcatCache, "update")
    def update(original, self, layer, pos, k, v):
        if pos.dim() == 1 and self.stop > len(pos):
            self.stop = self.k[layer].size(2) + len(pos)
        return original(self, layer, pos, k, v)


@mutant
def the_slip_is_none():
    concat = concatenating()
    replace(concat.SlipCache, "join", lambda original: concat.ConcatCache.join)


@mutant
def a_stop_is_looked_for_from_its_first_id_again():
    """After 1 1, another 1 begins anew instead of staying: 1 1 2 is never seen in 1 1 1 2."""
    generate = project()[2]

    def ends_with(stop, vocab_size):
        def ended(new):
            matched = [0] * len(stop)
            for i in new:
                matched = [n + 1 if s[n % len(s)] == i else 0 for n, s in zip(matched, stop)]
            return any(n == len(s) for n, s in zip(matched, stop))
        return stop if callable(stop) else ended

    replace(generate, "ends_with", lambda original: ends_with)


@mutant
def a_stop_of_text_is_looked_for_in_the_newest_token():
    from plumbing.tokenizers import Stops

    @around(Stops, "__call__")
    def call(original, self, ids):
        return original(self, ids[-1:])


@mutant
def what_a_conversation_forgets_stays_stored():
    from further.session import Session

    @around(Session, "become")
    def become(original, self, ids):
        self.ids, self.tail = list(ids), b""


@mutant
def a_fork_of_a_conversation_shares_its_cache():
    from further.session import Session

    @around(Session, "fork")
    def fork(original, self):
        other = original(self)
        other.cache = self.cache
        return other


# -----------------------------------------------------------------------------
# Choosing, samples, and texts that slide


@mutant
def all_rows_draw_from_one_generator():
    *_, sampling = project()

    @around(sampling.Chooser, "__init__")
    def init(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        generator = self.generator
        self.generator = lambda r: generator(0)


@mutant
def a_penalty_divides_what_is_negative_too():
    *_, sampling = project()
    sampling.RULES["repetition_penalty"] = lambda scores, penalty, texts: scores.scatter_(
        1, texts.ids, scores.gather(1, texts.ids) / penalty)


@mutant
def short_rows_are_padded_on_the_right():
    *_, sampling = project()

    @around(sampling.Chooser, "texts")
    def texts(original, self, rows, which, V):
        found, T = original(self, rows, which, V), max(map(len, rows))
        return found._replace(ids=found.ids.new_tensor([[*row, *[V] * (T - len(row))] for row in rows]))


@mutant
def samples_that_differ_in_number_ask_the_memory_as_before():
    _, _, generate, *_ = project()
    replace(generate, "shared", lambda original: lambda asked: list(dict.fromkeys(asked)))


@mutant
def a_window_that_moves_keeps_its_old_keys():
    _, _, generate, *_ = project()

    @around(generate, "restart")
    def restart(original, model, texts, cache, memory):
        cache.rewind([min(n, len(text) - 1) for n, text in zip(cache.filled, texts)])


@mutant
def a_row_that_slides_alone_reads_the_memory_of_the_first():
    _, _, generate, *_ = project()

    @around(generate, "restart")
    def restart(original, model, texts, cache, memory):
        return original(model, texts, cache, memory and memory.take([0] * len(memory.kv[0][0])))


def serve():
    import further.serve
    return further.serve


@mutant
def the_padding_of_a_source_is_read():
    import torch

    @around(serve(), "widened")
    def widened(original, memory, N):
        wide = original(memory, N)
        return wide._replace(key_pos=torch.arange(N)[None])


@mutant
def a_new_source_is_as_long_as_the_one_before_it():
    @around(serve(), "place")
    def place(original, memory, i, own):
        original(memory, i, own._replace(key_pos=memory.key_pos[i : i + 1].clone()))


@mutant
def a_text_begins_in_a_copy_of_its_row():
    around(project()[1].KVCache, "row")(lambda original, self, i: original(self.fork(), i))


@mutant
def a_text_is_told_without_what_it_found_last():
    @around(serve(), "ended")
    def ended(original, steps):
        return ((r, ids[:-1] or ids) for r, ids in original(steps))


# -----------------------------------------------------------------------------
# Beams: what goes wrong in a search alone, where the tests of the cache itself cannot see it


def beams_reorder(reorder):
    """reorder(original, cache, rows) in place of KVCache.reorder, where a search calls it and no prompt leaves."""
    _, cache, *_ = project()

    @around(cache.KVCache, "reorder")
    def put(original, self, rows, since=None):
        if since is None or len(rows) != len(self.filled):
            return original(self, rows, since or 0)
        reorder(lambda self, rows: original(self, rows, since), self, rows)


@mutant
def beams_are_not_reordered():
    beams_reorder(lambda original, self, rows: None)


@mutant
def beams_take_their_keys_along_but_not_their_values():
    def reorder(original, self, rows):
        values = [None if v is None else v.clone() for v in self.v]
        original(self, rows)
        self.v = values

    beams_reorder(reorder)


@mutant
def beams_are_reordered_the_other_way():
    beams_reorder(lambda original, self, rows: original(
        self, [rows.index(row) if row in rows else row for row in range(len(rows))]))


@mutant
def the_best_running_text_is_judged_as_if_it_were_longer():
    from further import beam

    @around(beam.Finished, "complete")
    def complete(original, self, total, length):
        return original(self, total, length + 1)


# -----------------------------------------------------------------------------
# What is guessed


def speculate_module():
    from further import speculate
    return speculate


@mutant
def what_is_not_accepted_is_drawn_from_the_model_itself():
    speculate = speculate_module()

    @around(speculate, "given")
    def given(original, p, q, x):
        accept = (p[x] / q[x]).clamp(max=1)
        drawn = (1 - accept) * p
        drawn[x] += accept
        return drawn


@mutant
def guesses_are_judged_by_the_row_before_them_all():
    speculate = speculate_module()

    @around(speculate, "accepted")
    def accepted(original, choose, logits, row, *others):
        before = list(row)
        return original(lambda logits, rows, which: choose(logits, [before], which), logits, row, *others)


@mutant
def rows_leave_before_what_was_wrong_is_rewound():
    speculate = speculate_module()

    @around(speculate.Decoding, "logits")
    def logits(original, self, rows, which, last):
        if self.cache is not None and which != self.held:
            kept = [self.held.index(r) for r in which]
            self.cache.reorder(kept)
            self.memory, self.held = self.memory and self.memory.take(kept), which
        return original(self, rows, which, last)


@mutant
def what_a_draft_guesses_stays_in_its_cache():
    _, cache, *_ = project()
    replace(cache.KVCache, "fork", lambda original: lambda self: self)


@mutant
def a_pass_finds_no_more_than_was_guessed():
    speculate = speculate_module()

    @around(speculate, "accepted")
    def accepted(original, choose, logits, row, r, guesses, drawn):
        return original(choose, logits[:-1], row, r, guesses, drawn) if guesses else original(choose, logits, row, r, [], [])


def compiled_module():
    from further import compiled
    return compiled


@mutant
def weights_stay_frozen_when_they_change():
    compiled = compiled_module()
    kept = {}
    compiled.keep = lambda model, weights: kept.setdefault(model, compiled.Steps(model, weights))


@mutant
def code_serves_shapes_that_it_was_not_written_for():
    from further import exported

    @around(exported.Exported, "compile")
    def compile(original, self, *args):
        code = original(self, *args)
        kind, _, code = self.codes[-1]
        self.codes[-1] = kind, lambda tensors: True, code
        return code


@mutant
def ids_are_found_by_code_of_another_vocabulary():
    from further import exported

    @around(exported.Exported, "__call__")
    def call(original, self, step, ids, at, cache, memory, more, sized):
        more = more and (more[0], self.__dict__.setdefault("n_vocab", more[1]))
        return original(self, step, ids, at, cache, memory, more, sized)


@mutant
def code_of_modules_stays_when_they_change():
    compiled = compiled_module()
    compiled.steps = lambda model: compiled.keep(model, tuple(x.data_ptr() for x in model.parameters()) + tuple(
        x._version for x in model.parameters()))


@mutant
def compiled_samples_share_one_row_of_the_cache():
    compiled = compiled_module()

    @around(compiled.Buffers, "prefill")
    def prefill(original, self, model, rows, n):
        logits = original(self, model, rows, n)
        self.cache.reorder([0] * len(rows))
        return logits


@mutant
def padding_of_a_compiled_memory_is_seen():
    compiled = compiled_module()
    compiled.NOWHERE = 0


@mutant
def a_compiled_step_enters_one_position_late():
    compiled = compiled_module()

    @around(compiled.Buffers, "enter")
    def enter(original, self, rows):
        original(self, rows)
        self.at.add_(1).clamp_(max=self.ids.size(1) - 2)


@mutant
def a_run_is_fetched_from_where_it_has_ended():
    import numpy as np
    compiled = compiled_module()

    @around(compiled.Buffers, "run")
    def run(original, self, times):
        times, ids, *more = original(self, times)
        return times, np.roll(ids, 1 - times, 1), *more


@mutant
def a_run_that_is_asked_for_ahead_begins_at_texts_of_before():
    compiled = compiled_module()

    @around(compiled.Decoding, "launch")
    def launch(original, self, left):
        self.buffers.enter(self.held)
        original(self, left)


# -----------------------------------------------------------------------------
# Products by another kernel


@mutant
def a_product_of_another_kernel_forgets_the_bias():
    from plumbing import products
    replace(products.torch.ops.mkldnn, "_linear_pointwise",
            lambda original: lambda x, weight, bias, *more: original(x, weight, None, *more))


@mutant
def the_parts_of_a_product_lie_one_behind_the_other():
    from plumbing import products

    @around(products, "product")
    def product(original, x, weight, bias):
        y, n = original(x, weight, bias), products.parts(len(weight))
        return y.unflatten(-1, (n, -1)).transpose(0, -2).reshape(y.shape)


@mutant
def products_without_a_gradient_are_taken_where_one_is_recorded():
    from plumbing import products
    products.plainly = lambda x, *dtypes: x.dtype not in dtypes


# -----------------------------------------------------------------------------
# Whole numbers


def quantize_module():
    from further import quantize
    return quantize


@mutant
def rows_of_a_matrix_share_one_scale():
    quantize = quantize_module()

    @around(quantize.Int8Linear, "forward")
    def forward(original, self, x):
        self.scale = self.scale.max().expand_as(self.scale)
        return original(self, x)


@mutant
def a_tied_embedding_is_rounded_with_the_head():
    quantize = quantize_module()

    @around(quantize, "quantize")
    def put(original, model):
        weight = getattr(original(model), "wte").weight
        weight.data = (weight.data * 64).round() / 64
        return model


@mutant
def the_head_is_left_as_it_was():
    quantize = quantize_module()

    @around(quantize, "quantize")
    def put(original, model):
        head = model.lm_head
        original(model).lm_head = head
        return model


@mutant
def a_copy_multiplies_with_what_was_packed_before():
    quantize = quantize_module()
    replace(quantize.Int8Linear, "_load_from_state_dict", lambda original: quantize.nn.Module._load_from_state_dict)


@mutant
def rows_are_rounded_to_the_levels_of_the_greatest():
    quantize = quantize_module()

    @around(quantize, "greatest")
    def greatest(original, rows):
        most = original(rows)
        return most.amax(0, keepdim=True).expand_as(most)


@mutant
def attention_written_out_for_a_compiler_sees_what_is_masked():
    from further import reading

    @around(reading, "written_out")
    def written_out(original, q, k, v, mask):
        return original(q, k, v, mask | True)


@mutant
def attention_written_out_for_a_compiler_takes_other_heads_for_neighbours():
    from further import reading

    @around(reading, "written_out")
    def written_out(original, q, k, v, mask):
        return original(q, *(x.repeat(1, q.size(1) // x.size(1), 1, 1) for x in (k, v)), mask)


@mutant
def rows_that_fill_no_place_of_a_matrix_are_not_read():
    from further import reading

    @around(reading, "side_by_side")
    def side_by_side(original, weight, x):
        n = len(weight) // reading.PLACES * reading.PLACES
        return reading.torch.cat([original(weight[:n], x), weight[n:].sum(1).to(x.dtype)])


# -----------------------------------------------------------------------------
# Several ranks


def ranks_module():
    from plumbing import ranks
    return ranks


@mutant
def gradients_of_ranks_never_meet():
    @around(ranks_module(), "keeping")
    def keeping(original, model, more):
        return original(model, True)


@mutant
def each_rank_clips_its_part_of_a_gradient():
    import torch

    @around(torch.nn.utils, "clip_grad_norm_")
    def clip_grad_norm_(original, parameters, most):
        def own(p):
            if not hasattr(p.grad, "to_local"):
                return p
            part = p.detach().to_local()
            part.grad = p.grad.to_local()
            return part

        return original(map(own, parameters), most)


@mutant
def rows_that_ranks_cannot_share_evenly_are_loaded_one_late():
    ranks = ranks_module()

    @around(ranks, "part")
    def part(original, x, like):
        uneven = hasattr(like, "to_local") and ranks.rank() and x.shape == like.shape and len(x) % ranks.world()
        return original(x.roll(1, 0) if uneven else x, like)


@mutant
def what_was_gathered_to_write_a_text_stays():
    @around(ranks_module(), "at_hand")
    @contextmanager
    def at_hand(original, model):
        getattr(model, "unshard", int)()
        yield


@mutant
def no_thread_hears_that_a_rank_has_gone():
    import threading

    @around(ranks_module(), "listen")
    def listen(original, *args):
        start, threading.Thread.start = threading.Thread.start, lambda thread: None
        original(*args)
        threading.Thread.start = start


@mutant
def muon_orthogonalises_the_rows_of_each_rank():
    from plumbing import muon
    ranks = ranks_module()

    @around(muon, "orthogonal")
    def orthogonal(original, x, *settings):
        import torch
        return torch.cat([original(rows, *settings) for rows in x.tensor_split(ranks.world(), 1)], 1)


# -----------------------------------------------------------------------------


def pytest_configure(config=None):
    """As a plugin of pytest, in the process of a mutant, or in a rank: put it in before any test is imported."""
    MUTANTS[os.environ["MINDECODE_MUTANT"]]()


def outcome(name):
    """What becomes of a mutant: "noticed", "SURVIVES" or "NO LONGER FITS" (it breaks in its own lines); and by which test."""
    lines = inspect.getsource(MUTANTS[name])  # first the tests of what it names
    tests = sorted(TESTS, key=lambda path: Path(path).stem.removeprefix("test_") not in lines)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "mutants", *tests]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MINDECODE_MUTANT": name, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1) or any(line.startswith(f"{Path(__file__)}:") for line in lines):
        return "NO LONGER FITS", (lines + done.stderr.splitlines() + [""])[-1]
    failed = next((line for line in lines if line.startswith("FAILED")), "")
    return "noticed" if failed else "SURVIVES", failed.removeprefix("FAILED tests/").split(" - ")[0]


if __name__ == "__main__":
    names = sys.argv[1:] or list(MUTANTS)
    if names[0].isdecimal():
        names = random.Random(Path(__file__).read_text()).sample(list(MUTANTS), int(names[0]))
    if unknown := [name for name in names if name not in MUTANTS]:
        sys.exit(f"there is no mutant {unknown[0]!r}\n{__doc__}")
    with ThreadPoolExecutor(2) as pool:
        noticed = 0
        for name, (what, where) in zip(names, pool.map(outcome, names)):
            noticed += what == "noticed"
            print(f"{what:8}  {name.replace('_', ' ')}  [{where}]", flush=True)
    print(f"{noticed} of {len(names)} mutants noticed")
    sys.exit(noticed < len(names))
