"""
Which folders of a run are whole. Each holds a manifest.json, the size and sha256 of all its other files: a folder that
was damaged after it was written is told by it, and passed over.
"""

import hashlib
import os
import re
import stat
import sys
from pathlib import Path

from plumbing.errors import UserError
from plumbing.files import read_json

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d+)(-replaced)?$")


def describe(directory):
    """What the manifest of these files says, as a dict."""
    return {"files": {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in directory.iterdir()}}


def checkpoints(run_dir):
    """(step, folder) of every checkpoint, valid or not, newest first; a replaced one behind its replacement."""
    found = [(int(STEP.match(path.name)[1]), path) for path in run_dir.glob("step-*") if STEP.match(path.name)]
    return sorted(found, key=lambda item: (-item[0], item[1].name))


def newest(run_dir):
    """
    The newest valid checkpoint folder of a run, None if there is none at all. A line on stderr tells of those that are
    damaged. Raises UserError if all are.
    """
    damage = []
    for _, path in checkpoints(Path(run_dir)):
        try:
            verify(path)
        except UserError as error:
            damage.append(str(error))
            continue
        if damage:
            print(f"passed over {len(damage)} damaged checkpoint(s), using {path}: {damage[0]}", file=sys.stderr)
        return path
    if damage:
        raise UserError(f"every checkpoint in {run_dir} is damaged ({damage[0]}); start again in another directory")
    return None


def verify(path):
    """Raise UserError unless every file of a checkpoint is there, a plain file, and has its size and sha256."""
    def check(good, what):
        if not good:
            raise UserError(f"{what}; the checkpoint is damaged or was changed, use another one")

    def plain(file):
        return os.path.lexists(file) and stat.S_ISREG(file.lstat().st_mode)

    check(not path.is_symlink() and path.is_dir(), f"{path} is not a folder")
    check(plain(path / MANIFEST), f"{path} has no manifest.json")
    files = read_json(path / MANIFEST).get("files")
    check(isinstance(files, dict) and "model.safetensors" in files, f"{path}/manifest.json lists no files")
    for name, facts in files.items():
        check(Path(name).name == name and isinstance(facts, dict), f"{path}/manifest.json names {name!a:.80}")
        check(plain(path / name), f"{path / name} is not there as a regular file")
        size = (path / name).stat().st_size
        check(size == facts.get("size"), f"{path / name} has {size} bytes instead of {facts.get('size')}")
    for name, facts in files.items():
        check(sha256(path / name) == facts.get("sha256"), f"{path / name} has another sha256 than its manifest says")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
