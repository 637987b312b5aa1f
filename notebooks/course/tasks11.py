"""The exercises of lesson 11: for every exhibit of the gallery its diagnosis and its mending, and a few about tests."""

import ast
import contextlib
import io
import textwrap

import torch

from compare import TINY
from course import Failed, NotYet, Task, tidy
from course.gallery import CAUSES, EXHIBITS, KINDS, SCENES, WHERE, broken
from course.probes import PROBES, passes

# -----------------------------------------------------------------------------
# Diagnoses: (where, kind, cause)

PARTS = [("where", WHERE, "The place is another: read the table from the top, and stop at the first line with an X."),
         ("kind", KINDS, "The place is right. Read its line from the left: what is wrong first is the kind."),
         ("cause", [*CAUSES], "Place and kind are right. Which cause would do this, and no more than this?")]


def reading(exhibit):
    def read(answer):
        words = tidy(answer)
        if not isinstance(words, list) or len(words) != 3 or not all(isinstance(word, str) for word in words):
            return Failed("form", 'Three words are expected: (where, kind, cause), as ("self 1", "values", "stale").')
        for word, (part, known, _) in zip(words, PARTS):
            if word not in known:
                return Failed("unknown", f"{word!r:.40} is no {part}: choose from the list.")
        for word, right, (*_, hint) in zip(words, (exhibit.where, exhibit.kind, exhibit.cause), PARTS):
            if word != right:
                return Failed(word, hint)
        return "named"

    return read


def misread(exhibit, word):
    """The diagnosis with one word in the place of the right one."""
    right = [exhibit.where, exhibit.kind, exhibit.cause]
    at = next(i for i, (_, known, _) in enumerate(PARTS) if word in known)
    return tuple([*right[:at], word, *right[at + 1 :]])


# -----------------------------------------------------------------------------
# Mending: a line, as text, is put where the wrong one is, and judged by what the project then does

GENERAL = ["plain", "ragged", "beams", "padded"]  # cached against uncached, besides the exhibit's own scene
ENDLESS = ast.While, ast.Import, ast.ImportFrom
OUTSIDE = {"print", "input", "exec", "eval", "open", "exit", "quit", "breakpoint", "iter", "__import__"}


def unfit(text):
    """What is wrong with a line before it is run, or ""."""
    if not text.strip() or len(text) > 500:
        return "One line of Python is expected, as text."
    try:
        tree = parsed(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"This is no line of Python: {str(error).splitlines()[0][:100]}."
    if any(isinstance(node, ENDLESS) or getattr(node, "id", "") in OUTSIDE for node in ast.walk(tree)):
        return "The mend needs no while, no import and nothing from outside: one line like the ones around it."
    if all(isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call | ast.Yield) for node in tree.body):
        return "This line does nothing: a return, an assignment or a call is expected."
    return ""


def parsed(text):
    text = textwrap.dedent(text).strip()
    try:
        return ast.parse(text)
    except SyntaxError:
        return ast.parse(text + "\n    pass")  # an if, whose body follows in the function


def trial(exhibit, line):
    """What a line amounts to: does its probe pass, and of each scene the text, and by how much logits are wrong."""
    names = dict.fromkeys([exhibit.scene, *GENERAL])
    with contextlib.redirect_stdout(io.StringIO()), broken(exhibit, line):
        return passes(exhibit.cause), {name: (SCENES[name].write(), SCENES[name].differs()) for name in names}


def sound(scene, text, difference):
    """Whether a scene is as it should be: its text or refusal is right, its logits are those of the uncached pass."""
    refused = isinstance(text, str)
    return text == SCENES[scene].right and (refused or difference <= 1000 * TINY)


def mending(exhibit):
    def read(answer):
        if answer is ...:
            raise NotYet
        if not isinstance(answer, str):
            return Failed("form", "Text is expected: the right line between quotation marks.")
        if words := unfit(answer):
            return Failed("form", words)
        try:
            passed, found = trial(exhibit, answer)
        except Exception as error:  # it does not compile there
            return Failed("form", f"This line does not fit its place: {str(error).splitlines()[0][:100]}.")
        wrong = [name for name in found if not sound(name, *found[name])]
        if passed and not wrong:
            return "mended"
        kind = passed, *((text, by if isinstance(by, str) else f"{by:.3g}") for text, by in found.values())
        words = f"Not mended: its probe {'passes' if passed else 'fails'} ({PROBES[exhibit.cause][0]})"
        for name in wrong[:1]:
            by = found[name][1]
            words += f", and where {SCENES[name].words}, " + (
                f"it ends in {by}" if isinstance(by, str) else f"logits are off by {by:.2g}")
        return Failed(repr(kind), words + ".")

    return read


# -----------------------------------------------------------------------------
# What people answer. Of each exhibit: a wrong word of the diagnosis, or a wrong line, and what its author should hear.

LINE, STORE, STAND, MOVE = (next(each.line.strip() for each in EXHIBITS if each.cause == cause)
                            for cause in ("top-left", "first-row-only", "not-offset", "keys-only"))
WORDS = {
    "top-left": [("keys", "In self 0 the keys are right, and the output is not. Self 1 comes later."),
                 ("no-mask", "Without a mask a query would see more than it should. Here it sees less.")],
    "not-offset": [("keys", "A key of a wrong embedding is wrong, too: something further left is wrong already."),
                   ("off-by-one", "One too few would be 8. Where does the table say it stands?")],
    "keys-only": [("keys", "The keys of this row are right: they did move."),
                  ("not-moved", "Had nothing moved, the keys would be wrong as well.")],
    "no-mask": [("top-left", "Then the first query would see key 0 alone. Count what is not white in its row."),
                ("own-future", "With one key too many the edge would still be a staircase.")],
    "first-row-only": [("mask", "The output is wrong, but so is something further left."),
                       ("not-moved", "Nothing is reordered in this scene."),
                       ("values-for-keys", "Then row 0 would suffer as well.")],
    "off-by-one": [("not-offset", "Then every step would stand at 0."),
                   ("one-length", "There is one row: it cannot have the length of another.")],
    "stale": [("no-mask", "A step of one token needs no mask, as long as it is handed its own text and no more."),
              ("not-forgotten", "Then some keys of this text would be another's. All of them are right.")],
    "not-moved": [("keys-only", "The values are wrong as well."),
                  ("first-row-only", "Row 0 is wrong, too.")],
    "one-length": [("not-offset", "Then it would stand at 0."),
                   ("off-by-one", "It is off by four: where does the other row stand?")],
    "own-future": [("no-mask", "Without a mask every query would see everything: the edge would be straight."),
                   ("top-left", "Then a query would see less than it should. Compare the last rows.")],
    "last-column": [("self 1", "No line of self 1 has a cross."),
                    ("one-length", "Every token stands where it should, and every attention is right.")],
    "old-source": [("encoder 0", "The encoder has read the new source, and read it rightly."),
                   ("first-memory", "Then layer 0 would read the right one."),
                   ("memory-stays", "There is one row, and nothing leaves.")],
    "values-for-keys": [("values", "The values are right, and something further left is not."),
                        ("first-row-only", "It is row 0 that is wrong here, and the prefill was right.")],
    "not-forgotten": [("stale", "What is read ends where the text ends; some of it is of another text."),
                      ("mask", "The output is wrong, but so is something further left.")],
    "heads-regrouped": [("no-mask", "A single query sees its whole past, with or without a mask."),
                        ("values", "The values are right: all that enters is.")],
    "small-ring": [("self 0", "Layer 0 sees everything, and has no cross."),
                   ("stale", "Then there would be a key too many, not one too few."),
                   ("overflow", "Then the newest key would be missing. Which one is it here?")],
    "overflow": [("mask", "It sees too little because something is not there: look further left."),
                 ("small-ring", "Then the oldest key would be missing. Which one is it here?")],
    "first-memory": [("cross 0", "Cross 0 has no cross in its line."),
                     ("old-source", "Then layer 0 would read the old one, too.")],
    "memory-stays": [("keys", "The keys of the source are right."),
                     ("keys-only", "That is about rows of the decoder's cache. Here the source's are wrong."),
                     ("first-memory", "Then layer 0 would be right.")],
    "tiled": [("not-moved", "Nothing is reordered here: rows are copied. Which of them are right?"),
              ("first-row-only", "The last row is right.")],
    "padding-counts": [("cross 0", "Something before it is wrong already: the decoder reads what the encoder made."),
                       ("own-future", "An encoder has no future. What does its token see besides its source?")],
    "shared-fork": [("not-moved", "Nothing is reordered here."),
                    ("not-forgotten", "Nothing is rewound here. Who else writes?")],
    "crossed-beams": [("cross 1", "There is a cross further up."),
                      ("keys", "The keys of the source are right."),
                      ("memory-stays", "Then keys or values of the source would be wrong. Who asks?")],
}
LINES = {
    "top-left": [("return attend(q, k, v, None, False, self.rate)",
                  "Now a query sees the prefix, and its future as well."),
                 (LINE.replace("query_pos, key_pos", "key_pos, query_pos"),
                  "Queries and keys are exchanged: the mask is (S, T).")],
    "not-offset": [("yield start_pos + new", "start_pos is a list where there is a start per row."),
                   (STAND.replace("stop - T + new if", "stop + new if"),
                    "stop is where the pass ends, not where it begins.")],
    "keys-only": [(MOVE.replace("index_copy_", "index_copy"),
                   "Without its underscore index_copy makes another tensor, which nobody keeps."),
                  ("for x in self.v: x[:, :, used].index_copy_(0, to, x[source, :, used])", None)],
    "no-mask": [("return attend(q, k, v, None, True, self.rate)", "That mask is aligned top-left: exhibit 1."),
                (LINE.replace("self.rate)", "self.rate).transpose(1, 2)"),
                 "The mask is back; what comes out is turned around.")],
    "first-row-only": [("keys[:, :, self.stop - T :] = k", "The keys are stored for all rows. And the values?"),
                       (STORE.replace("self.stop - T :", ": T"), "Every pass now writes to the front of the buffer.")],
    "off-by-one": [(STAND.replace("stop - T + new if", "stop - T + 1 + new if"),
                    "Now it is one too many: a text begins at 0."),
                   (STAND.replace("stop - T + new if", "max(stop - T, 1) + new if"),
                    "The steps are right, and the prefill is not.")],
    "stale": [("return keys, values, self.places", "The keys end with the text, and their positions with the buffer."),
              ("return keys[:, :, -T:], values[:, :, -T:], self.places[: T]",
               "These are the new ones alone: nothing is remembered.")],
    "not-moved": [(MOVE.replace("(0, to", "(0, source").replace("x[source", "x[to"),
                   "Each row now gives to the row from which it should take."),
                  (MOVE.replace("x[source", "x[rows"),
                   "rows are all of them, and only those that become another are written.")],
    "one-length": [(STAND.replace("torch.tensor(starts, ", "torch.tensor([min(starts)] * B, "),
                    "The short row is right now, and the long one is not: each has its own start."),
                   (STAND.replace("[:, None] + new", "[:, None] + T"),
                    "T is how many enter: the starts are where the first stands.")],
    "own-future": [("return k < q", "A query sees its own position as well."),
                   ("return q <= k", "That is the future, and nothing of the past.")],
    "last-column": [("ends = torch.tensor([range(len(new[0]) - last, len(new[0])) for ids in new], device=idx.device)",
                     "There the first row ends. Each has an end of its own."),
                    ("ends = torch.tensor([range(last) for ids in new], device=idx.device)",
                     "These are the first that entered.")],
    "old-source": [("source = source or (*copies, self.project(*copies))",
                    "The source that came first is kept for ever."),
                   ("source = *copies, None", "Without a memory the decoder reads no source at all.")],
    "values-for-keys": [("write(values, pos, v)", "The next line does that. Who writes the keys?"),
                        ("write(keys, pos, q)", "There is no q here: a cache keeps no queries.")],
    "not-forgotten": [("self.filled = position", "position may be one number for all rows: filled has one for each."),
                      ("self.filled = [p + 1 for p in to]", "One position too many stays.")],
    "heads-regrouped": [("k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)",
                         "repeat lays the set behind itself, and it is neighbouring heads that should share."),
                        ("k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)",
                         "Right without a mask; but a mask was folded by the line above, for folded queries.")],
    "small-ring": [("return [Ring(size, self.window - 1, self.sinks) if size < length else Slots(length)]",
                    "There are slots enough, and one of them is never used: slots are counted modulo the window."),
                   ("return [Ring(size + 1, self.window, self.sinks) if size < length else Slots(length)]",
                    "Two slots now claim the same position."),
                   ("return [Slots(length)]", "It decodes rightly, and forgets nothing: a window is there to keep little.")],
    "overflow": [("if start >= self.length:", "Two more at the last slot do not fit either."),
                 ("if start + T >= self.length:", "The last slot may be used.")],
    "first-memory": [("x = self.ln_cross(x + self.cross(x, *memory.kv[-1], memory.key_pos))",
                      "Now all read that of the last layer."),
                     ("x = self.ln_cross(self.cross(x, *memory.kv[self.attn.layer], memory.key_pos))",
                      "The memory is right, and what the layer knew before is lost.")],
    "memory-stays": [("return Memory([(k[: len(rows)], v[: len(rows)]) for k, v in self.kv], key_pos)",
                      "Now neither of them moves."),
                     ("return Memory([(v[rows], k[rows]) for k, v in self.kv], key_pos)",
                      "They move together, and are exchanged.")],
    "tiled": [("self.k, self.v = self._each(lambda x: x[:B].repeat_interleave(n, 1))", "Axis 1 is that of the heads."),
              ("self.k, self.v = self._each(lambda x: x[:1].repeat_interleave(n * B, 0))",
               "Now all rows are copies of the first.")],
    "padding-counts": [("return pos.where(pos < lengths, NOWHERE)",
                        "lengths has one number per row, and pos one per column."),
                       ("return pos.expand(B, N)", "Now all of the padding counts.")],
    "shared-fork": [("return self._like(self.batch_size, slice(1), torch.Tensor.clone)",
                     "Only the first row is counted in the fork."),
                    ("return self._like(self.batch_size, self.filled, torch.Tensor.clone)",
                     "The second argument says which rows: a slice.")],
    "crossed-beams": [("q = self.heads(self.c_q(x))",
                       "There are as many rows of queries as beams, and of keys as sources."),
                      ("q = self.heads(self.c_q(x).reshape(k.size(0), -1, x.size(2)).flip(1))",
                       "Neighbours still ask for each other.")],
}
LINES["keys-only"][1] = (LINES["keys-only"][1][0], "Now the values move, and the keys do not.")

TASKS = {}
for number, exhibit in enumerate(EXHIBITS, 1):
    wild = f"In the wild: {exhibit.wild}. " * bool(exhibit.wild)
    TASKS[f"diagnosis_{number}"] = Task(
        (exhibit.where, exhibit.kind, exhibit.cause), read=reading(exhibit),
        wrong=[(misread(exhibit, word), hint) for word, hint in WORDS[exhibit.cause]],
        praise=f"{wild}Its line: workbench({number}).")
    TASKS[f"mend_{number}"] = Task(
        exhibit.line.strip(), read=mending(exhibit),
        wrong=[(exhibit.wrong, "That is the line that is there."), *LINES[exhibit.cause]],
        praise="The project does again what it should.")

# -----------------------------------------------------------------------------
# Tests


def counted(seen):
    """Of how many exhibits something is true, while they are in the project."""
    n = 0
    for exhibit in EXHIBITS:
        with broken(exhibit):
            n += seen(exhibit)
    return n


def letters_are_right(exhibit):
    return SCENES[exhibit.scene].write() == SCENES[exhibit.scene].right


def usual_test_fails(exhibit):
    """One prompt, a prefill, then a token a step, and logits compared."""
    difference = SCENES["plain"].differs()
    return isinstance(difference, str) or difference > 1000 * TINY


def enter(model, rows, widths):
    """The logits (B, T, V) of rows that enter chunk by chunk, through the model's own cache."""
    ends = torch.tensor(widths).cumsum(0).tolist()
    return torch.cat([model(rows[:, end - n : end], use_kv_cache=True, start_pos=end - n)
                      for n, end in zip(widths, ends)], 1)


def notices(model, rows, widths):
    return not torch.allclose(enter(model, rows, widths), model(rows))


def in_a_broken_project(answer, cause, widths):
    model = SCENES["plain"].truth[0]
    model.clear_kv_cache()
    rows = torch.tensor([[19, 7, 4, 2, 0, 19, 18, 0], [3, 14, 6, 18, 4, 0, 19, 18], [8, 5, 19, 7, 4, 17, 4, 8]])
    exhibit = next((each for each in EXHIBITS if each.cause == cause), None)
    with broken(exhibit) if exhibit else contextlib.nullcontext():
        return answer(model, rows, widths)


def in_any_order(answer):
    return tidy(set(answer) if isinstance(answer, str | list | tuple) else answer)


ONES = [1] * 8
TASKS |= {
    "usual": Task(counted(usual_test_fails), wrong=[
        (len(EXHIBITS), "It has one row, enters its prompt at once, and never goes back."),
        (len(EXHIBITS) // 2, "Fewer: leave out what needs a second row, chunk, text or source, a window, a rewind."),
        (1, "More: positions alone make two.")],
        hint="Go through the exhibits: which of them need no more than one prompt, a prefill and single steps?",
        praise="The others need a second row, a second chunk, a second text, or a source."),
    "unseen": Task(counted(letters_are_right), wrong=[
        (0, "Logits may be wrong and have their maximum where it should be."),
        (len(EXHIBITS), "Then nobody would ever have found them. Most texts do change, from some letter on.")],
        hint="Count the exhibits in which every row is \"the same\", once you have seen all of them.",
        praise="A test that looks at the text alone would pass with these."),
    "failures": Task(len(EXHIBITS), wrong=[
        (len(EXHIBITS) ** 2, "That is every probe for every exhibit: a probe asks for one promise alone."),
        (0, "Then no probe would notice anything.")],
        hint="A probe fails for one exhibit and for no other. How many are there?",
        praise="A test that fails for one reason alone also says what is broken."),
    "notices": Task(
        notices, run=in_a_broken_project,
        cases=[(None, [8]), (None, [3, 1, 4]), (None, ONES), ("top-left", [4, 4]), ("no-mask", [2, 6]),
               ("own-future", [5, 3]),
               ("off-by-one", ONES), ("first-row-only", [3, 1, 4]), ("heads-regrouped", [7, 1])],
        wrong=[
            (lambda model, rows, widths: not torch.equal(enter(model, rows, widths), model(rows)),
             "A false alarm: chunks round otherwise than the whole, so sound code is not equal to the last bit."),
            (lambda model, rows, widths: not torch.allclose(enter(model, rows[:1], widths), model(rows[:1])),
             "With a batch of one, nothing is learned about the second row."),
            (lambda model, rows, widths: not torch.allclose(enter(model, rows, [8]), model(rows)),
             "Everything enters at once: a cache that nothing is read from is never wrong."),
            (lambda model, rows, widths: not torch.allclose(enter(model, rows, ONES), model(rows)),
             "One letter at a time: a chunk behind a prefix is never tried."),
            (lambda model, rows, widths: torch.allclose(enter(model, rows, widths), model(rows)),
             "The other way round: True means that something is wrong.")],
        hint="Compare the logits of all rows and all positions, with a tolerance.",
        praise="Sound code passes, and six exhibits do not."),
    "speaks": Task({"c", "d"}, read=in_any_order, wrong=[
        ({"a", "b", "c", "d"}, "Some of these never let a chunk enter behind a prefix, and their rows are all alike."),
        ({"c"}, "Rows at different positions need that line for every step, even for a single token."),
        ({"b", "c", "d"}, "Single steps of rows that are alike never reach that line: they return further up.")],
        hint="Which of them reach the last line of Causal.forward, and which leave it further up?",
        praise="A test speaks only where it reaches the line."),
}
