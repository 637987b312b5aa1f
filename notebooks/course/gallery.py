"""
A gallery of broken caches. An exhibit is one line of the project's own code with a mistake that somebody really made;
it is put in the place of the right one inside `with broken(exhibit):`, and nowhere else.

A scene is where it shows: a way to decode, as generate.py has them, with a tiny model of random weights in fp64, where
nothing can be rounding. What one sees there is in symptoms.py, and a check for each exhibit in probes.py.
"""

import importlib
import inspect
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from compare import in_fp64, replay
from generate import advance, cached, encode, naive, project, stream
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.checks import prepare

# -----------------------------------------------------------------------------
# Exhibits


@dataclass(frozen=True)
class Exhibit:
    """
    cause: in the words of the lesson. owner: module.function or module.class.function. right, wrong: a line of it, and
    what takes its place. mutant: of tests/mutants.py, the same mistake. scene: where it shows. where, kind: the first
    attention that is wrong, and what of it, as compare.py finds. wild: a public report of the same mistake.
    """

    cause: str
    owner: str
    right: str
    wrong: str
    mutant: str
    scene: str
    where: str
    kind: str
    wild: str

    @cached_property
    def place(self):
        """The module or class, and the name of the function in it."""
        module, *path, name = self.owner.split(".")
        thing = importlib.import_module(module)
        for part in path:
            thing = getattr(thing, part)
        return thing, name

    @cached_property
    def source(self):
        owner, name = self.place
        return textwrap.dedent(inspect.getsource(vars(owner)[name]))

    @cached_property
    def line(self):
        """The whole right line, as it is in the project."""
        [line] = [own for own in self.source.splitlines() if self.right in own]
        return line

    def with_line(self, line):
        """The source of the function with another line, or several, in the place of the right one."""
        indent = " " * (len(self.line) - len(self.line.lstrip()))
        return self.source.replace(self.line, textwrap.indent(textwrap.dedent(line).strip(), indent))


@contextmanager
def broken(exhibit, line=None):
    """In the block, the wrong line stands in the project, or another: wherever a module refers to the function."""
    for scene in SCENES.values():
        scene.right  # what is right is found while nothing is broken
    owner, name = exhibit.place
    original, made = vars(owner)[name], {}
    code = compile(exhibit.with_line(exhibit.wrong if line is None else line), "<exhibit>", "exec")
    exec(code, vars(sys.modules[exhibit.owner.split(".")[0]]), made)
    places = [owner, *(m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get(name) is original)]
    try:
        for place in places:
            setattr(place, name, made[name])
        yield
    finally:
        for place in places:
            setattr(place, name, original)


# -----------------------------------------------------------------------------
# Scenes: strategies, as in generate.py, whose cache goes through something before the first step


def behind(opening, model, sources, B, room, choose):
    """Like cached(), on the cache that opening(model, rows, room) leaves behind."""
    cache = None

    def step(rows, which):
        nonlocal cache
        cache = cache or opening(model, rows, room)
        return choose(advance(model, rows, cache)[:, 0], rows, which)

    return step


def chunks(model, rows, room):
    cache = model.new_cache(len(rows), room)
    for n in range(4, len(rows[0]), 4):
        advance(model, [row[:n] for row in rows], cache)
    return cache


def another_text(model, rows, room):
    cache = model.new_cache(len(rows), room)
    advance(model, [[i % 26 for i in range(room)]] * len(rows), cache)
    cache.rewind(0)
    return cache


def beams(model, rows, room):
    cache = model.new_cache(len(rows), room)
    advance(model, [rows[i][:-1] for i in (2, 0, 1, 3)], cache)
    cache.reorder([1, 2, 0, 3])
    return cache


def a_draft(model, rows, room):
    cache = model.new_cache(len(rows), room)
    advance(model, [[*row[:-3], 7, 8] for row in rows], cache)
    cache.rewind(len(rows[0]) - 3)
    return cache


def samples(model, rows, room):
    cache = model.new_cache(len(rows) // 2, room)
    advance(model, [row[:-1] for row in rows[::2]], cache)
    cache.expand(2)
    return cache


def a_fork(model, rows, room):
    cache = model.new_cache(len(rows), room)
    advance(model, [row[:-2] for row in rows], cache)
    other = cache.fork()
    advance(model, [row[:-1] for row in rows], cache)
    advance(model, [[*row[:-2], 7] for row in rows], other)
    return cache


def little_room(model, rows, room):
    return model.new_cache(len(rows), room - 3)


def second_source(model, sources, B, room, choose):
    """The model's own cache, as BART.decode() keeps it, after another source."""
    (other, _), (encoded, _), stored = encode(model, [[9, 8, 7, 6]]), encode(model, sources), 0
    model.clear_kv_cache()

    @torch.inference_mode()
    def step(rows, which):
        nonlocal stored
        if not stored:
            model.decode(torch.tensor(rows), other, use_kv_cache=True)
        new, start, stored = [row[stored:] for row in rows], stored, len(rows[0])
        return choose(model.decode(torch.tensor(new), encoded, use_kv_cache=True, start_pos=start)[:, -1], rows, which)

    return step


def two_of_each(model, sources, B, room, choose):
    """Rows 0 and 1 ask one source, rows 2 and 3 another."""
    memory, cache = project(model, *encode(model, sources)).take([0, 2]), model.new_cache(B, room)
    return lambda rows, which: choose(advance(model, rows, cache, memory)[:, 0], rows, which)


def tiny(kind, **fields):
    """A model of two layers with large random weights in fp64: with small ones a wrong position would hardly show."""
    torch.manual_seed(1)
    sizes = dict(n_head=4, n_kv_head=2, n_embd=16, vocab_size=26, block_size=32, **fields)
    model = GPT(GPTConfig(n_layer=2, **sizes)) if kind == "gpt" else BART(
        BARTConfig(n_encoder_layer=1, n_decoder_layer=2, **sizes))
    for name, p in model.named_parameters():
        if "ln" not in name and "lm_head.bias" != name or name.endswith("weight"):
            torch.nn.init.normal_(p, mean=float("ln" in name), std=0.8)
    return model.double().eval().requires_grad_(False)


def ids(text):
    return [ord(letter) - ord("a") for letter in text]


def letters(row):
    return "".join(chr(ord("a") + i) for i in row)


class Scene:
    def __init__(self, words, make, texts, steps=8, kind="gpt", begun=None, **fields):
        self.words, self.make, self.kind, self.fields = words, make, kind, fields
        self.request = [ids(text) for text in texts.split()], steps
        self.begun = begun and [ids(letter) for letter in begun]

    @cached_property
    def truth(self):
        """The model, its sources and rows, the right ids, and compare.py's uncached pass over every row alone."""
        model = tiny(self.kind, **self.fields)
        right = [[i for step in each for i in step] for each in zip(*stream(
            model, *self.request, decoder_prompts=self.begun, strategy=naive, ignore_eos=True))]
        given = prepare(model, *self.request, self.begun)
        return model, given, right, in_fp64(model, given, right)

    @cached_property
    def right(self):
        return self.write()

    def write(self):
        """The text of every row, or why there is none."""
        try:
            steps = [*stream(self.truth[0], *self.request, strategy=self.make, decoder_prompts=self.begun,
                             ignore_eos=True)]
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return [letters(i for step in each for i in step) for each in zip(*steps)]

    def replay(self):
        _, (sources, rows), right, (model, _) = self.truth
        return replay(model, self.make, sources, rows, right, 0)

    def differs(self):
        """By how much logits are wrong, over all steps with the right tokens; or the name of an error."""
        alone, starts = self.truth[3][1], self.truth[1][1]
        try:
            return max((logits - alone[r][0][len(starts[r]) + k - 1]).abs().max().item()
                       for r, k, logits, _, _ in self.replay())
        except Exception as error:
            return type(error).__name__


SCENES = {
    "plain": Scene("one prompt enters, then a token a step", cached, "thecatsat"),
    "chunks": Scene("a prompt of 8 letters enters in two chunks of 4", partial(behind, chunks), "themouse"),
    "ragged": Scene("prompts of 3 and 7 letters in one batch", cached, "the quickly"),
    "batch": Scene("three prompts of the same length in one batch", cached, "thecat thedog themat"),
    "again": Scene("the cache has held a longer text before", partial(behind, another_text), "secondtext"),
    "beams": Scene("four beams entered in another order, and are reordered", partial(behind, beams), "hello world again there"),
    "draft": Scene("two drafted letters were wrong, and are rewound", partial(behind, a_draft), "speculate"),
    "samples": Scene("two prompts entered, and each becomes two rows", partial(behind, samples), "first first other other"),
    "fork": Scene("a fork of the cache goes its own way", partial(behind, a_fork), "twoways another"),
    "full": Scene("the text is two letters too long for its cache", partial(behind, little_room), "fulltext", 6),
    "window": Scene("layer 0 sees everything, layer 1 the newest 8 positions", cached, "window",
                    pattern=["full", "local:8"]),
    "source": Scene("the model has summarised another source before", second_source, "article", kind="bart"),
    "leaving": Scene("three sources in one batch, and the first summary is complete after 2 letters", cached,
                     "foxes geese bears", [2, 6, 6], kind="bart"),
    "padded": Scene("sources of 3 and 7 letters in one batch", cached, "fox buffalo", kind="bart"),
    "neighbours": Scene("two sources, and two beams of each, which begin with a and b", two_of_each,
                        "foxes foxes geese geese", kind="bart", begun="abab"),
}

LINE = "return attend(q, k, v, dense(self.allows, query_pos, key_pos), False, self.rate)"
MOVE = "self._each(lambda x: x[:, :, used].index_copy_(0, to, x[source, :, used]))"
STORE = "keys[:, :, self.stop - T :], values[:, :, self.stop - T :] = k, v"
STAND = "yield stop - T + new if alike else torch.tensor(starts, device=x.device)[:, None] + new"
EXHIBITS = [
    Exhibit("top-left", "attention.Causal.forward", LINE, "return attend(q, k, v, None, True, self.rate)",
            "mask_of_a_chunk_is_aligned_top_left", "chunks", "self 0", "mask",
            "pytorch #108108, x-transformers #187, gpt-fast #233"),
    Exhibit("not-offset", "cache.passing", STAND, STAND.replace("stop - T + new if", "new if"),
            "positions_are_not_offset", "plain", "self 0", "positions", "TransformerLens #777, transformers #43082"),
    Exhibit("keys-only", "cache.KVCache.reorder", MOVE, """
            for x in self.k:
                x[:, :, used].index_copy_(0, to, x[source, :, used])""",
            "keys_are_reordered_without_their_values", "beams", "self 0", "values", "transformers #34232"),
    Exhibit("no-mask", "attention.Causal.forward", LINE, "return attend(q, k, v, None, False, self.rate)",
            "mask_is_skipped_when_the_cache_is_used", "chunks", "self 0", "mask", "TinyLLM #17"),
    Exhibit("first-row-only", "cache.KVCache.update", STORE,
            "keys[:1, :, self.stop - T :], values[:1, :, self.stop - T :] = k[:1], v[:1]",
            "only_the_first_row_is_written", "batch", "self 0", "keys", ""),
    Exhibit("off-by-one", "cache.passing", STAND, STAND.replace("stop - T + new if", "max(stop - T - 1, 0) + new if"),
            "positions_are_offset_by_one_too_few", "plain", "self 0", "positions", ""),
    Exhibit("stale", "cache.KVCache.update", "return keys, values, self.places[: self.stop]",
            "return self.k[layer][:B], self.v[layer][:B], self.places",
            "whole_buffer_is_read_without_a_mask", "again", "self 0", "mask", "litgpt #83, transformers #30351"),
    Exhibit("not-moved", "cache.KVCache.reorder", MOVE, MOVE.replace("index_copy_", "index_copy"),
            "beams_are_not_reordered", "beams", "self 0", "keys", "transformers #46612"),
    Exhibit("one-length", "cache.passing", STAND,
            STAND.replace("torch.tensor(starts, device=x.device)[:, None]",
                          "torch.tensor([stop - T] * B, device=x.device)[:, None]"),
            "ragged_rows_share_one_position", "ragged", "self 0", "positions", "transformers #21080"),
    Exhibit("own-future", "attention.Causal.allows", "return k <= q", "return k <= q + 1",
            "chunk_sees_its_own_future", "chunks", "self 0", "mask", ""),
    Exhibit("last-column", "generate.advance",
            "ends = torch.tensor([range(len(ids) - last, len(ids)) for ids in new], device=idx.device)  # (B, last)",
            "ends = torch.tensor([range(idx.size(1) - last, idx.size(1)) for ids in new], device=idx.device)",
            "a_ragged_prefill_takes_the_last_column", "ragged", "head", "head", ""),
    Exhibit("old-source", "model.BART.decode",
            "source = *copies, encoded if encoded is None else self.project(*copies)",
            "source = *copies, source[2] if source else self.project(*copies)",
            "an_old_source_answers_for_a_new_one", "source", "cross 0", "keys", "transformers #31166"),
    Exhibit("values-for-keys", "cache.KVCache.update", "write(keys, pos, k)", "write(keys, pos, v)",
            "values_are_written_where_keys_belong", "ragged", "self 0", "keys", ""),
    Exhibit("not-forgotten", "cache.KVCache.rewind", "self.filled = to", "self.filled = list(self.filled)",
            "a_healed_count_forgets_what_was_rejected", "draft", "self 0", "keys", ""),
    Exhibit("heads-regrouped", "attention.attend", "q = q.reshape(B, -1, group * T, D)  # elsewhere",
            "q = q.unflatten(1, (group, -1)).transpose(1, 2).flatten(2, 3).contiguous()",
            "shared_heads_are_folded_in_the_wrong_order", "plain", "self 0", "mask", ""),
    Exhibit("small-ring", "sparse.Local.slots",
            "return [Ring(size, self.window, self.sinks) if size < length else Slots(length)]",
            "return [Ring(size - 1, self.window - 1, self.sinks) if size < length else Slots(length)]",
            "ring_is_one_slot_too_small", "window", "self 1", "keys", "litgpt #2182, transformers #37574"),
    Exhibit("overflow", "cache.KVCache.check", "if start + T > self.length:  # padding needs room as well",
            "if T > self.length:", "an_overflow_is_accepted", "full", "self 0", "keys", "transformers #11943"),
    Exhibit("first-memory", "model.DecoderLayer.forward",
            "x = self.ln_cross(x + self.cross(x, *memory.kv[self.attn.layer], memory.key_pos))",
            "x = self.ln_cross(x + self.cross(x, *memory.kv[0], memory.key_pos))",
            "every_layer_reads_the_memory_of_the_first", "neighbours", "cross 1", "keys", ""),
    Exhibit("memory-stays", "cache.Memory.take",
            "return Memory([(k[rows], v[rows]) for k, v in self.kv], key_pos)",
            "return Memory([(k[rows], v[: len(rows)]) for k, v in self.kv], key_pos)",
            "the_memory_stays_when_rows_leave", "leaving", "cross 0", "values", "fairseq2 #307"),
    Exhibit("tiled", "cache.KVCache.expand", "self.k, self.v = self._each(lambda x: x[:B].repeat_interleave(n, 0))",
            "self.k, self.v = self._each(lambda x: x[:B].repeat(n, 1, 1, 1))",
            "expanded_rows_do_not_stand_side_by_side", "samples", "self 0", "keys", ""),
    Exhibit("padding-counts", "attention.key_positions", "return pos.where(pos < lengths[:, None], NOWHERE)",
            "return pos.where(pos <= lengths[:, None], NOWHERE)",
            "one_padded_position_of_a_source_counts", "padded", "encoder 0", "mask", ""),
    Exhibit("shared-fork", "cache.KVCache.fork", "return self._like(self.batch_size, slice(None), torch.Tensor.clone)",
            "return self._like(self.batch_size, slice(None), lambda x: x)",
            "a_fork_shares_its_buffers", "fork", "self 0", "keys", ""),
    Exhibit("crossed-beams", "attention.CrossAttention.forward",
            "q = self.heads(self.c_q(x).reshape(k.size(0), -1, x.size(2)))  # (B, H, n T, D)",
            "q = self.heads(self.c_q(x).reshape(-1, k.size(0), x.size(2)).transpose(0, 1))",
            "rows_side_by_side_ask_different_sources", "neighbours", "cross 0", "input", "mlx-examples #1429"),
]
CAUSES = {
    "crossed-beams": "neighbouring rows ask in each other's place",
    "first-memory": "every layer reads the source's keys and values of layer 0",
    "first-row-only": "only row 0 is stored",
    "heads-regrouped": "query heads share the keys of the wrong head",
    "keys-only": "of rows that move, only the keys do",
    "last-column": "logits are taken where the longest row ends",
    "memory-stays": "values of a source stay where they are when rows leave",
    "no-mask": "what follows a prefix is not masked at all",
    "not-forgotten": "a rewind leaves the count as it is",
    "not-moved": "rows that should move do not",
    "not-offset": "every pass begins at position 0",
    "off-by-one": "what follows a prefix stands one position too early",
    "old-source": "the first source answers for every later one",
    "one-length": "all rows go on where the longest one does",
    "overflow": "more is accepted than there is room for",
    "own-future": "a query also sees the next position",
    "padding-counts": "a padded position of a source is seen",
    "shared-fork": "a fork writes into the buffers of the original",
    "small-ring": "a window forgets one position too early",
    "stale": "what lies behind the text is read as well",
    "tiled": "the rows are copied as a, b, a, b instead of a, a, b, b",
    "top-left": "the mask of a chunk begins at key 0",
    "values-for-keys": "values are stored where keys belong",
}
WHERE = ["encoder 0", "self 0", "self 1", "cross 0", "cross 1", "head"]
KINDS = ["positions", "keys", "values", "mask", "input", "head"]
