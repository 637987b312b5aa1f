"""
Tokenise texts once, so that trainings on them start at once and hold none of them in memory, however many there are.

    python -m plumbing.prepare out/tokens corpus/ more.jsonl --tokenizer gpt2
    python train.py configs/gpt2-124m.toml --data.source=out/tokens

A path is a text, a .jsonl file with lines {"text": ...}, or a directory of such files. Each file, or line, is a
document, and <|endoftext|> stands between two ("\\n" where a vocabulary has no such id). The directory holds
tokens.bin, all ids one after the other, pieces.txt, with a line for each piece of the texts that is in there,
prepared.json, and the tokenizer. A run that was killed goes on after its last piece when it is started again. Nothing
here is about windows, or which part is held out: that is for a training to choose.
"""

import hashlib
import os
import re
import shutil
from bisect import bisect_right
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.errors import WHOLE, Parser, UserError, run
from plumbing.files import SUFFIXES, decode, files, json_object, lock, read_json, regular, write_json
from plumbing.tokenizers import END, KINDS, load_tokenizer, train_tokenizer

MANIFEST, TOKENS, PIECES = "prepared.json", "tokens.bin", "pieces.txt"
MAX_MANIFEST = 2**30  # bytes: it lists every file
PIECE = 4 * 2**20     # bytes of the texts that a thread takes at a time
FAR = 2**28           # bytes in which there has to be a place to cut at
SAMPLE = 4            # pieces, spread over the texts, that a bpe is learnt from

# GPT-2's pattern ends a token before the last white character in front of a word, so cutting there changes no id. In
# UTF-8, what is not ASCII is known by its first byte; those with which some white characters begin are left out.
SPLIT = re.compile(rb"[\t-\r ](?=[^\t-\r \x80-\xbf\xc2\xe1-\xe3]|\xe3[^\x80])")
LINE = re.compile(rb"(?<=\n)")
DONE = re.compile(r"\d+ \d+ [0-9a-f]{64}\n")  # tokens, characters, and the hash of the ids, of a piece


# ------------------------------------------------------------------------------------------------------------
# what is read


def sources(paths):
    """[path, size, time of the last change] of every file behind the paths that is not empty."""
    found = [path for name in paths for path in (files(name, (*SUFFIXES, ".jsonl")) if os.path.isdir(name) else [name])]
    sizes = [[str(path), info.st_size, info.st_mtime_ns] for path in found for info in [regular(path)] if info.st_size]
    if not sizes:
        raise UserError(f"there is nothing in {', '.join(map(str, paths))}; pass texts that are not empty")
    return sizes


class Pieces:
    """Files in a row, as pieces of `size` bytes; each really ends at the next place to cut at, the same for all."""

    def __init__(self, files, size):
        self.files, self.size = files, size
        self.ends = list(accumulate(size for _, size, _ in files))

    def __len__(self):
        return -(-self.ends[-1] // self.size)

    def texts(self, k):
        """(whether a document begins here, text) of each stretch of text in piece k."""
        first, last = k * self.size, min((k + 1) * self.size, self.ends[-1])
        for n in range(bisect_right(self.ends, first), bisect_right(self.ends, last - 1) + 1):
            path, size, _ = self.files[n]
            begin = self.ends[n] - size  # of this file in the row
            with open(path, "rb") as file:
                start, stop = (place(path, file, size, at - begin) for at in (first, last))
                file.seek(start)
                data = file.read(stop - start)
            if data and path.endswith(".jsonl"):
                for i, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
                    yield True, document(path, start, i, line)
            elif data:
                yield start == 0, decode(f"{path} from byte {start:,} on" if start else path, data)


def place(path, file, size, at):
    """The first place from `at` on at which a file can be cut: a line's begin, or before a white character."""
    if at <= 0:
        return 0
    pattern, ahead = (LINE, 1) if path.endswith(".jsonl") else (SPLIT, 0)
    window = 2**12
    while at < size:
        file.seek(at - ahead)
        found = pattern.search(file.read(window))
        if found:
            return at - ahead + found.start()
        if at + window > size:
            break
        if window >= FAR:
            raise UserError(f"{path} has no {'end of a line' if ahead else 'white space'} in {FAR:,} bytes from byte "
                            f"{at:,} on; break it up, it would not fit in memory")
        window *= 16
    return size


def document(path, start, n, line):
    """The text in a line, the n-th from byte `start` of a file on."""
    try:
        text = json_object("it", decode("it", line)).get("text")
        if not isinstance(text, str):
            raise UserError(f"'text' is {text!a:.60}; it must be a text")
        return text
    except UserError as error:
        with open(path, "rb") as file:  # only now: to count the lines before every piece takes longer than all else
            for at in range(0, start, 2**20):
                n += file.read(min(2**20, start - at)).count(b"\n")
        raise UserError(f"{path}, line {n}: {error}") from None


# ------------------------------------------------------------------------------------------------------------
# what is made of it


class Work:
    """What all threads share. Nearly all of their time is tiktoken's, in which they do not wait for each other."""

    def __init__(self, pieces, tokenizer, dtype):
        self.pieces, self.tokenizer, self.dtype = pieces, tokenizer, dtype
        end = tokenizer.eos_id
        self.between = tokenizer.encode_array("\n") if end is None else np.array([end])
        self.sizes = characters(tokenizer)

    def tokenise(self, k):
        """The ids of piece k as bytes, and the line about them."""
        parts = []
        for begins, text in self.pieces.texts(k):
            parts += [self.between] * begins + [self.tokenizer.encode_array(text)]
        parts = parts[k == 0:] or [self.between[:0]]  # nothing stands before the first document
        ids = np.concatenate(parts).astype(self.dtype)
        return ids.tobytes(), f"{len(ids)} {self.sizes[ids].sum()} {hashlib.sha256(ids).hexdigest()}\n"


def characters(tokenizer):
    """How many characters begin in the bytes of each id, (V,)."""
    return np.array([sum(byte & 0xC0 != 0x80 for byte in token) for token in tokenizer.tokens])


def in_order(pool, function, items, ahead):
    """The results of a function, in order, at most `ahead` of them in memory or in the making."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ------------------------------------------------------------------------------------------------------------
# what is written


def prepare(directory, paths, tokenizer, vocab_size, workers, piece=PIECE):
    """
    Write the ids of all texts into a directory that load_data() takes, or go on with it; returns it as Prepared.
    `tokenizer` is one of KINDS, a bpe being of vocab_size ids, or a directory that holds one. Raises UserError if the
    texts or the tokenizer are others than they were when it was begun, or cannot be read.
    """
    directory = Path(directory)
    if inside := [path for path in paths if os.path.isdir(path) and
                  directory.resolve().is_relative_to(Path(path).resolve())]:
        raise UserError(f"{directory} is in {inside[0]}, and would be read as a part of it; write elsewhere")
    pieces = Pieces(sources(paths), piece)
    held = None if tokenizer in KINDS else of_gpt(tokenizer)
    asked = {"tokenizer": named(tokenizer, vocab_size, held), "piece": piece, "pieces": len(pieces),
             "files": pieces.files}
    if not is_prepared(directory):
        begun(directory, asked, held or make_tokenizer(tokenizer, vocab_size, pieces))
    with locked(directory):
        manifest = unchanged(directory, asked)
        lines = done(directory)
        if len(lines) < len(pieces):
            append(directory, pieces, lines, np.dtype(manifest["dtype"]), workers)
    return Prepared(directory)


def of_gpt(directory):
    """The tokenizer in a directory. Raises UserError if there is none, or one that frames what it encodes."""
    held = load_tokenizer(directory) if os.path.isdir(directory) else None
    if held is None or held.seq2seq:
        raise UserError(f"the tokenizer {directory!a} is {'a BART' if held else 'none'}; choose {', '.join(KINDS)}, or "
                        f"the directory of a GPT")
    return held


def named(kind, vocab_size, held):
    """A tokenizer as a manifest has it: its kind, or of one that is held a hash of what its ids mean."""
    if held is not None:
        return hashlib.sha256(repr((held.tokens, held.specials)).encode()).hexdigest()
    return f"bpe of {vocab_size}" if kind == "bpe" else kind


def make_tokenizer(kind, vocab_size, pieces):
    text = {"bpe": lambda: sample(pieces), "char": lambda: letters(pieces)}.get(kind, str)()
    return train_tokenizer(kind, text, vocab_size)


def sample(pieces):
    return "".join(text for k in range(0, len(pieces), -(-len(pieces) // SAMPLE)) for _, text in pieces.texts(k))


def letters(pieces):
    """All characters, and the one that stands between documents."""
    found = {"\n"}
    for k in range(len(pieces)):
        for _, text in pieces.texts(k):
            found.update(text)
    return "".join(found)


def begun(directory, asked, tokenizer):
    """Make the directory, with all but the ids: beside its place, so that a kill leaves all of it there or nothing."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is there and holds something else; name a new directory")
    beside = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tokenizer.save(beside)
    kind = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
    write_json(beside / MANIFEST, {"dtype": kind} | asked)
    for name in (TOKENS, PIECES):
        (beside / name).touch()
    beside.rename(directory)


@contextmanager
def locked(directory):
    """Keeps other processes out of a directory, where a file system can."""
    handle = lock(directory, f"another process is writing {directory}; wait for its end")
    try:
        yield
    finally:
        os.close(handle)


def manifest_of(directory):
    """What a directory's manifest says. Raises UserError if that is not what we write."""
    said = read_json(directory / MANIFEST, MAX_MANIFEST)
    if said.get("dtype") not in ("uint16", "uint32") or not isinstance(said.get("files"), list):
        raise UserError(f"{directory / MANIFEST} has no dtype or no files; remove {directory} and prepare it again")
    return said


def unchanged(directory, asked):
    """The manifest of a directory. Raises UserError unless it was begun with these texts and this tokenizer."""
    said = manifest_of(directory)
    for then, now in zip(said["files"], asked["files"]):
        if then != now:
            raise UserError(f"{now[0]} is {now}, and was {then} when {directory} was begun; remove it to begin again")
    for key, now in asked.items():
        then = said.get(key)
        if then != now:
            then, now = (len(value) if key == "files" else value for value in (then, now))
            raise UserError(f"{directory} was begun with {key} {then!a:.80}, not {now!a:.80}; remove it to begin again")
    return said


def done(directory):
    """The lines about the pieces that are in a directory, without one that a kill left unfinished."""
    text = (directory / PIECES).read_text(errors="replace")
    return list(takewhile(DONE.fullmatch, text.splitlines(keepends=True)))


def append(directory, pieces, lines, dtype, workers):
    """Tokenise what is missing. Ids are on the disk before their line is, and what has no line is cut off again."""
    work, pool = Work(pieces, load_tokenizer(directory), dtype), ThreadPoolExecutor(workers)
    bar = tqdm(total=pieces.ends[-1], initial=len(lines) * pieces.size, unit="B", unit_scale=True, disable=None)
    try:
        with open(directory / TOKENS, "r+b") as tokens, open(directory / PIECES, "r+") as journal, bar:
            tokens.seek(counted(lines)[0] * dtype.itemsize)
            journal.seek(sum(map(len, lines)))
            for file in (tokens, journal):
                file.truncate()
            for data, line in in_order(pool, work.tokenise, range(len(lines), len(pieces)), 2 * workers):
                for file, new in ((tokens, data), (journal, line)):
                    file.write(new)
                    file.flush()
                    os.fsync(file.fileno())
                bar.update(min(pieces.size, bar.total - bar.n))
    finally:
        pool.shutdown(cancel_futures=True)


def counted(lines):
    """Tokens and characters in the pieces of these lines."""
    numbers = [line.split(" ") for line in lines]
    return sum(int(n) for n, *_ in numbers), sum(int(n) for _, n, _ in numbers)


# ------------------------------------------------------------------------------------------------------------
# what is read of it


def is_prepared(source):
    return os.path.isfile(os.path.join(source, MANIFEST))


class Prepared:
    """
    What a directory holds: ids, a memory map (tokens,), of which nothing is read, the tokenizer, and the sha256 of all
    that is said of the pieces, the hash of each among it. Raises UserError if it is not finished or not whole.
    """

    def __init__(self, directory):
        directory = Path(directory)
        said, self.lines, self.tokenizer = manifest_of(directory), done(directory), load_tokenizer(directory)
        if len(self.lines) != said["pieces"]:
            raise UserError(f"{directory} has {len(self.lines):,} of {said['pieces']:,} pieces; run python -m "
                            f"plumbing.prepare again as before to finish it")
        (tokens, self.characters), dtype = counted(self.lines), np.dtype(said["dtype"])
        size = os.path.getsize(directory / TOKENS)
        if not size or size != tokens * dtype.itemsize:
            raise UserError(f"{directory / TOKENS} has {size:,} bytes, and {tokens:,} ids of {dtype.itemsize} should "
                            f"be in it; remove {directory} and prepare it again from texts that are not empty")
        self.ids = np.memmap(directory / TOKENS, dtype, "r")
        self.sha256 = hashlib.sha256("".join(self.lines).encode()).hexdigest()

    def characters_from(self, start):
        """How many characters are in the ids from `start` on; at most one piece is looked at."""
        ends = list(accumulate(int(line.split(" ")[0]) for line in self.lines))
        n = bisect_right(ends, start)
        return characters(self.tokenizer)[self.ids[start:ends[n]]].sum().item() + counted(self.lines[n + 1:])[1]


def main(args=None):
    parser = Parser(prog="prepare.py", description=__doc__)
    parser.add_argument("directory", metavar="OUT_DIR", help="a new directory, or one to go on with")
    parser.add_argument("paths", metavar="PATH", nargs="+", help=f"{', '.join(SUFFIXES)}, .jsonl, or a directory")
    parser.add_argument("--tokenizer", default="gpt2", help=f"{', '.join(KINDS)}, or a directory; default: gpt2")
    parser.add_argument("--vocab-size", type=WHOLE, default=1024, help=f"ids of a bpe, {END} included; default: 1024")
    parser.add_argument("--workers", type=WHOLE, default=os.cpu_count(), help="threads; default: one for each core")
    args = parser.parse_args(args)
    if not 1 <= args.workers <= 1024:
        raise UserError(f"--workers {args.workers} must be from 1 to 1024")
    found = prepare(args.directory, args.paths, args.tokenizer, args.vocab_size, args.workers)
    print(f"{len(found.ids):,} ids of {found.tokenizer.n_vocab:,}, {found.ids.itemsize} bytes each, "
          f"{found.characters / len(found.ids):.2f} characters an id, in {args.directory}")


if __name__ == "__main__":
    run(main)
