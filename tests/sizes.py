"""
How long the files and functions are, beside what they should be. A report: growth is to be noticed, and then to be
answered with a simpler mechanism, not with a failing test for whoever changes the code.

    python tests/sizes.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LESSON = ["attention", "cache", "evict", "sparse", "model", "sampling", "generate", "cost", "train", "compare", "roofline",
          "bench"]  # in reading order
FILE, FUNCTION, PARAMETERS, LESSON_LINES, PLUMBING_LINES = 350, 50, 7, 1900, 1800


def mark(n, limit):
    return f"{n:6,}" + (f"  over {limit:,}" if n > limit else "")


def functions(path):
    """(lines, parameters without self, name) of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            a = node.args
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg]
            yield node.end_lineno - node.lineno + 1, len([name for name in names if name != "self"]), node.name


if __name__ == "__main__":
    groups = {"lesson": ([ROOT / f"{name}.py" for name in LESSON], LESSON_LINES),
              "plumbing": (sorted(ROOT.glob("plumbing/*.py")), PLUMBING_LINES)}
    for group, (paths, limit) in groups.items():
        lines = {path: len(path.read_text().splitlines()) for path in paths}
        for path, n in lines.items():
            print(f"{path.name:16}{mark(n, FILE)}")
        print(f"{group:16}{mark(sum(lines.values()), limit)}\n")
    for path in (path for paths, _ in groups.values() for path in paths):
        for lines, parameters, name in functions(path):
            if lines > FUNCTION or parameters > PARAMETERS:
                print(f"{path.name}: {name} has {lines} lines and {parameters} parameters")
