"""The cells of the notebook that lesson 4 does again, unchanged: here they print what they print there."""

import ast
import re
import sys
import types
from pathlib import Path

import pytest

import attention
import model
from plumbing import utils

SEEDS = Path(__file__).resolve().parents[2] / "shared" / "seeds"
FOREIGN = {"mingpt": types.ModuleType("mingpt"), "mingpt.model": model, "mingpt.attention": attention,
           "mingpt.utils": utils}
WORD = r"[+-]?\d+\.\d+|\w+"


def is_code(paragraph):
    """Whether this is the next paragraph of a cell, and neither its output nor the prose behind it."""
    if re.match(r"tensor\(|torch\.Size\(|True$|False$", paragraph):  # a printed value, which would be an expression
        return False
    try:
        ast.parse(re.sub(r"^%%.*", "", paragraph))
    except SyntaxError:
        return False
    return True


def cells(document):
    """(number, code, what stands behind it: output and prose) of every cell."""
    for number, text in re.findall(r"^In \[(\d+)\]:\n(.*?)(?=^In \[|\Z)", document, re.M | re.S):
        paragraphs = text.strip().split("\n\n")
        n = next((i for i, paragraph in enumerate(paragraphs) if not is_code(paragraph)), len(paragraphs))
        yield int(number), "\n\n".join(paragraphs[:n]), "\n\n".join(paragraphs[n:])


def words(text):
    """Numbers with a point as numbers, everything else as words, without brackets."""
    return [float(word) if "." in word else word for word in re.findall(WORD, text)]


def agreeing(ours, theirs):
    """
    How many words of an output are theirs, from the beginning on. Both have been rounded to four decimals, so numbers
    that differ in their last bit, as on another processor, may print one unit apart.
    """
    pairs = list(zip(words(ours), words(theirs)))
    return next((i for i, (a, b) in enumerate(pairs) if type(a) is not type(b) or
                 (abs(a - b) > 1.1e-4 if isinstance(a, float) else a != b)), len(pairs))


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """A function that runs a cell as IPython does, in process, and returns what it printed and what it shows."""
    pytest.importorskip("IPython", reason="the cells have %%timeit in them: pip install -e .[notebooks]")
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from traitlets.config import Config

    for name, module in FOREIGN.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = types.ModuleType("published_cells")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # IPython does so too, and leaves it there
    ip = InteractiveShell(user_module=module, config=Config({"HistoryManager": {"enabled": False}}))

    def run(code):
        with capture_output() as captured:
            result = ip.run_cell(code)
        result.raise_error()
        return re.sub(r"Out\[\d+\]: ?", "", captured.stdout), result.result

    yield run
    ip.reset(new_session=False)


# How many words each cell prints, up to where the text that we have is cut off.
PRINTED = {2: 5, 5: 92, 7: 92, 8: 1, 9: 6, 10: 91, 11: 97, 12: 92, 15: 1, 16: 100, 17: 5}


def test_the_published_cells_run_here_unchanged_and_print_what_they_print_there(shell):
    found = sorted(SEEDS.glob("002_*.txt"))
    if not found:
        pytest.skip(f"the text of the notebook is not in {SEEDS.parent.name}/{SEEDS.name}")
    agree, shown = {}, {}
    for number, code, theirs in cells(found[0].read_text(encoding="utf-8")):
        ours, shown[number] = shell(code.replace("%%timeit -n 100", "%%timeit -n 1 -r 1"))
        agree[number] = agreeing(ours, theirs)
    # 13 and 14 ask which entries are equal to the last bit, 19 and 20 take the time: matters of the machine
    assert {n: count for n, count in agree.items() if count and n not in (13, 14, 19, 20)} == PRINTED
    assert list(shown) == list(range(1, 21)) and shown[14].shape == (2, 8, 6)
