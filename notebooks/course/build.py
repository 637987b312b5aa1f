"""
Run the lessons, headless, two at a time, and say how long each took; exits with 1 if one does not do what it should.

    python notebooks/course/build.py               all of them, and nothing is kept
    python notebooks/course/build.py --write       one at a time, and the pages with their figures are kept in the .ipynb
    python notebooks/course/build.py --write 3 5   some

A lesson is a text file, NN_name.py, in which "# %%" begins a cell; NN_name.ipynb is made from it, never edited.
"""

import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[1]
SECONDS = 60  # for a lesson on 2 cores, which two lessons share here
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}


def sources():
    return sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))


def notebook(source):
    """The notebook that a lesson's text file describes, without any output. The same file always makes the same one."""
    import jupytext

    return bare(jupytext.read(source, fmt="py:percent"))


def bare(page):
    """Without what differs from one machine, or run, to another."""
    page.metadata = METADATA
    for i, cell in enumerate(page.cells):
        cell.id, cell.metadata = f"cell-{i + 1:02}", {}
    return page


def execute(page, folder=NOTEBOOKS, timeout=4 * SECONDS):
    """Runs all cells of a notebook in a fresh kernel of this Python, in place. Raises on the first that fails."""
    import nbclient

    for name in "PYTHONPATH", "MPLBACKEND":  # a backend that is already chosen would keep the figures to itself
        os.environ.pop(name, None)
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # "python3" means this environment's
    nbclient.NotebookClient(page, timeout=timeout, kernel_name="python3",
                            extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(folder)}}).execute()
    return bare(page)


def printed(page):
    return "".join(output.text for cell in page.cells if cell.cell_type == "code" for output in cell.outputs
                   if output.output_type == "stream")


def complaints(page, tasks):
    """What is wrong with a page that has run, its exercises not filled in: a list of sentences."""
    outputs = [output for cell in page.cells if cell.cell_type == "code" for output in cell.outputs]
    text, folded = printed(page), sum(cell.source.count("<details>") for cell in page.cells)
    return [words for words, true in [
        ("it draws no figure", not any("image/png" in output.get("data", {}) for output in outputs)),
        ("it warns", any(output.get("name") == "stderr" for output in outputs)),
        ("an exercise is filled in", ": right" in text or ": not right" in text),
        ("it has more than 30 cells", len(page.cells) > 30),
        (f"it has {folded} folded answers, not 5", folded != 5),
        *((f"it never asks {name}", f"{name}: not yet" not in text) for name in tasks)] if true]


def run(source, write):
    """-> (seconds, complaints) of one lesson."""
    sys.path[:0] = [str(NOTEBOOKS), str(NOTEBOOKS.parent)]
    import importlib

    import nbformat

    number, start = int(source.name[:2]), time.perf_counter()
    try:
        page = execute(notebook(source))
    except Exception as error:  # a cell that fails, a kernel that dies
        return time.perf_counter() - start, [re.sub(r"\x1b\[[\d;]*m", "", str(error))[-2000:]]
    seconds = time.perf_counter() - start
    found = complaints(page, importlib.import_module(f"course.tasks{number:02}").TASKS)
    found += [f"it takes {seconds:.0f} s, more than {SECONDS}"] * (seconds > SECONDS)
    if write and not found:
        nbformat.write(page, source.with_suffix(".ipynb"))
    return seconds, found


def main(words):
    write = "--write" in words
    numbers = [int(word) for word in words if word != "--write"]
    chosen = [source for source in sources() if not numbers or int(source.name[:2]) in numbers]
    if not write:
        os.environ["OMP_NUM_THREADS"] = "1"  # of two at a time, each has a core
    start, failed = time.perf_counter(), 0
    with ProcessPoolExecutor(1 if write else 2) as pool:
        for source, (seconds, found) in zip(chosen, pool.map(partial(run, write=write), chosen)):
            failed += bool(found)
            print(f"{source.stem:40} {seconds:4.0f} s  {'; '.join(found) or 'ok'}", flush=True)
    print(f"{len(chosen)} lessons in {time.perf_counter() - start:.0f} s")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
