"""
The lecture whose slides are the files themselves: which lines to project, for how long, and what to say.

    python notebooks/course/slides.py --write     makes notebooks/SLIDES.md

What is named here are functions and classes; the numbers of their lines are looked up, so that they stay right.
"""

import ast
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1]
ROOT = NOTEBOOKS.parent
PAGE = NOTEBOOKS / "SLIDES.md"
LECTURES = {
    "1. What does the next token cost? (lessons 1 to 5)": [
        (3, "attention.py", "attend_explicit", "Equation 1 in five lines. Ask for every shape before you show its comment."),
        (2, "attention.py", "attend", "The same through one kernel. Two of them, so that one can be read and one is fast; a "
         "test ties them."),
        (4, "attention.py", "SelfAttention", "One matrix for queries, keys and values; heads are a view."),
        (2, "attention.py", "Causal.allows", "The whole causal mask: a predicate over positions. Where does a chunk behind a "
         "prefix need a special case? Nowhere."),
        (5, "attention.py", "CausalSelfAttention.forward", "The line that stores. With a cache three names change their "
         "meaning; without one nothing does."),
        (4, "cache.py", "KVCache.update", "A slot belongs to a position. Which row would the mistake 'only row 0' spoil?"),
        (4, "cache.py", "passing", "Positions are explicit. What is refused here is what other codebases get silently wrong."),
        (3, "generate.py", "naive", "Everything again, for each token: 107,450 tokens. Let them write the sum."),
        (3, "generate.py", "hoisted", "One line moved up: 6,074."),
        (4, "generate.py", "cached", "What stands before the step is kept: 1,124."),
        (4, "generate.py", "loop", "The only loop. Ends, rows that leave, several tokens from one step."),
        (3, "cost.py", "predict", "Rows, products and bytes in closed form, against which `bench.py compare` holds every count."),
    ],
    "2. What is read at every step? (lessons 6 to 8)": [
        (4, "model.py", "DecoderLayer", "Eight linears of attention, two of the feed-forward. Which of them run once?"),
        (3, "attention.py", "CrossAttention", "The source's keys and values are a function of the source alone."),
        (3, "further/concat.py", "ConcatCache", "The textbook's cache: right, and how many bytes it copies."),
        (3, "further/concat.py", "slip", "A lecture note's cache without the newest token. `compare` finds it: let it fail on "
         "the screen."),
        (3, "cache.py", "KVCache.nbytes", "Measured. The closed form on the board: 2 x layers x rows x key heads x positions x head size x bytes."),
        (3, "cache.py", "KVCache.reorder", "Rows become other rows. Keys alone are not enough: exhibits of lesson 11."),
        (5, "roofline.py", "explain", "A decode step from what it reads and multiplies; then measure it in front of them."),
        (3, "further/gqa.py", "pool", "Heads that share keys, made from heads that did not."),
    ],
    "3. Less than everything, and more than one token (lessons 9 to 11)": [
        (4, "sparse.py", "Strided", "A predicate, and a computation that does no more than it must."),
        (4, "evict.py", "Ring", "What no later query can see is overwritten."),
        (5, "further/beam.py", "beam_search", "Rows of a cache become other rows, in place; the source stands still."),
        (5, "further/speculate.py", "accepted", "Several tokens from one pass, and still the text of one a pass."),
        (5, "further/serve.py", "continuous", "Who waits takes the row of a text that has ended."),
        (5, "compare.py", "compare", "Is a difference rounding, or a bug, and where? Then open lesson 11."),
    ],
}


def lines_of(file, name):
    """The first and last line of a function or class, "Class.method" too, its decorators included."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        [node] = [node for node in body if getattr(node, "name", None) == part]
        body = getattr(node, "body", [])
    return min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.end_lineno


def table():
    text = ["# The files are the slides", "",
            "Made by `python notebooks/course/slides.py --write`. Open the files in an editor, large letters, one name at a",
            "time; about 45 minutes each, questions included."]
    for title, slides in LECTURES.items():
        text += ["", f"## {title}", "", f"{sum(minutes for minutes, *_ in slides)} minutes of talk.", "",
                 "| minute | file | lines | what | say |", "|---|---|---|---|---|"]
        at = 0
        for minutes, file, name, say in slides:
            first, last = lines_of(file, name)
            text.append(f"| {at} to {at + minutes} | [{file}](../{file}#L{first}-L{last}) | {first} to {last} | `{name}` | {say} |")
            at += minutes
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(table(), encoding="utf-8")
    print(table())
