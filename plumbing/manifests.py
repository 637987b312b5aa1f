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


def facts(path):
    """The size and the sha256 of a regular file, as a dict; None if it is not there or something else, a link too."""
    if not (os.path.lexists(path) and stat.S_ISREG(path.lstat().st_mode)):
        return None
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def describe(directory):
    """What the manifest of these files says, as a dict."""
    return {"files": {path.name: facts(path) for path in directory.iterdir()}}


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
    """Raise UserError unless a checkpoint is a folder with a manifest, and every file is as that says."""
    whole = not path.is_symlink() and facts(path / MANIFEST) is not None
    files = read_json(path / MANIFEST).get("files") if whole else None
    if not isinstance(files, dict) or "model.safetensors" not in files:
        raise UserError(f"{path} is no folder with a {MANIFEST} that lists its files; use another checkpoint")
    for name, said in files.items():
        found = facts(path / name) if Path(name).name == name else None
        if found is None or found != said:
            raise UserError(f"{path}: {name!a:.80} is {found or 'not there as a regular file'}, and the manifest says "
                            f"{said!a:.120}; the checkpoint is damaged or was changed, use another one")
