"""Reading files that somebody else wrote: kind, size and encoding are checked before a byte is believed.

Everything that can be wrong with a file becomes a UserError that names the file; nothing here knows what is
in it.
"""

import fcntl
import hashlib
import json
import os
import stat
import urllib.request
from collections import Counter
from http.client import HTTPException
from pathlib import Path

from plumbing.errors import UserError

SUFFIXES = (".txt", ".md", ".py")  # of texts, what is read of a directory
MAX_BYTES = 64 * 2**20  # of a JSON or vocabulary file; GPT-2's largest has 1 MB, today's models 10 to 20


def regular(path):
    """The stat of a regular file. A FIFO would block and a device never ends, so the kind is asked first."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte in it
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', error)}; check the path") from None
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path} is not a regular file; pass a file that can be read to its end")
    return info


def files(directory, suffixes):
    """The paths of all files below a directory whose names end so, in order. Raises UserError if there are none."""
    paths = sorted(Path(folder, file) for folder, _, names in os.walk(directory) for file in names
                   if file.endswith(suffixes) and Path(folder, file).is_file())
    if not paths:
        raise UserError(f"the directory {directory} holds no {', '.join(suffixes)} file; pass one that does")
    return paths


def lock(directory, busy):
    """
    A handle that keeps other processes out of a directory until it is closed, where a file system can. Raises UserError
    with the text `busy` if one is there.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(busy) from None
    except OSError:
        pass  # a file system without locks
    return handle


def read_bytes(path, max_bytes=MAX_BYTES):
    """The bytes of a regular file."""
    info = regular(path)
    if info.st_size > max_bytes:
        raise UserError(f"{path} has {info.st_size:,} bytes, the limit is {max_bytes:,}; cut it")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from None


def read_text(path, max_bytes=MAX_BYTES):
    """The text of a UTF-8 file, its line ends as they are."""
    return decode(path, read_bytes(path, max_bytes))


def decode(what, data):
    """The text of UTF-8 bytes, of which `what` says where they come from."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start:,}; "
                        f"convert it first") from None


def read_json(path, max_bytes=MAX_BYTES):
    """The object (a dict) in a JSON file."""
    return json_object(path, read_text(path, max_bytes))


def json_object(path, text):
    """The object in a text of JSON, from `path`. A key given twice is refused: readers disagree on which counts."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise UserError(f"{path} holds the key {twice!a} twice; keep one")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read; it is no file of ours") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}; it may be cut short, fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object; check the file")
    return value


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=1) + "\n")


def fetch(url, sha256, path, remedy):
    """The bytes behind `url`, kept at `path` between calls and believed only if their sha256 is right.

    `remedy` ends the sentence of the UserError that an offline machine gets.
    """
    def right(data):
        return hashlib.sha256(data).hexdigest() == sha256

    path = Path(path)
    if path.is_file() and right(data := read_bytes(path)):
        return data
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            data = reply.read(MAX_BYTES)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"cannot download {url} ({error}); {remedy}") from None
    if not right(data):
        raise UserError(f"{url} answered with other bytes than the known ones (sha256 differs); {remedy}")
    try:  # written beside and renamed: a reader sees the whole file or none
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(data)
        beside.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs the next run a download, nothing else
    return data
