"""Change a file of the project in a copy of it, and hear which tests speak."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("*.py", "pyproject.toml", "further/*.py", "plumbing/*", "tests/*.py", "configs/*")


def speaks(file, old, new, tests):
    """
    Puts new in the place of old in a copy of a file of the project, and runs tests there ("tests/test_x.py::test_y").
    Returns the names of those that fail, in order. The project itself stays as it is.
    Raises ValueError if old is not in the file exactly once, or no test ran: a change that changes nothing shows nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            for path in filter(Path.is_file, ROOT.glob(part)):
                copy = Path(folder, path.relative_to(ROOT))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        target = Path(folder, file)
        source = target.read_text(encoding="utf-8")
        if source.count(old) != 1:
            raise ValueError(f"{old!r} is {source.count(old)} times in {file}: choose words that are there once")
        target.write_text(source.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "--color=no", "-p", "no:cacheprovider", *tests]
        result = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": folder}, text=True,
                                capture_output=True)
    if result.returncode not in (0, 1):  # neither passed nor failed: no such test, or the file no longer compiles
        raise ValueError((result.stdout + result.stderr).strip().splitlines()[-1])
    return list(dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", result.stdout, re.MULTILINE)))
