"""bench.py prepare: how fast texts are tokenised, beside tiktoken's own batches, and how soon a training begins."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str

from plumbing.data import DataConfig, load_data
from plumbing.errors import REAL, WHOLE, UserError
from plumbing.files import read_json, write_json
from plumbing.machine import fresh, machine, resident
from plumbing.prepare import MANIFEST, PIECE, PIECES, TOKENS, Pieces, prepare, sources
from plumbing.tokenizers import BPETokenizer, load_tokenizer

BATCH = 64     # texts of 1 MiB that tiktoken gets at a time: enough that its threads end at nearly the same time
BLOCK = 2**26  # bytes of random ids, of which a large file is made


def add_arguments(parser):
    add = parser.add_argument
    add("paths", metavar="PATH", nargs="+", help="what plumbing/prepare.py reads")
    add("--tokenizer", default="gpt2", help="gpt2, bpe, byte, or a directory; default: gpt2")
    add("--workers", type=WHOLE, default=os.cpu_count(), help="threads of each; default: one for each core")
    add("--pairs", type=WHOLE, default=3, help="measurements of each kind")
    add("--gigabytes", type=REAL, default=1.0, help="size of the file of ids that a training begins with")
    add("--json", action="store_true", help="one JSON object")


def measure_prepare(directory, paths, tokenizer, workers):
    """Seconds from the first look at the texts to the last id on the disk, and of all cores; and how many ids."""
    start, busy = time.perf_counter(), time.process_time()
    ids = prepare(directory, paths, tokenizer, 1024, workers).ids
    return time.perf_counter() - start, time.process_time() - busy, len(ids)


def measure_tiktoken(directory, paths, workers):
    """
    The same of encode_ordinary_batch() alone, with GPT-2's pattern as tiktoken has it: the tokenizer is there, and the
    texts are read, decoded and cut before.
    """
    tokenizer, pieces, seconds, busy, ids = load_tokenizer(directory), Pieces(sources(paths), 2**20), 0, 0, 0
    if not isinstance(tokenizer, BPETokenizer):
        raise UserError("--tokenizer is of single characters, which tiktoken has not: choose gpt2, bpe or byte")
    bpe = tiktoken.Encoding("theirs", pat_str=r50k_pat_str, special_tokens={},
                            mergeable_ranks=tokenizer.bpe._mergeable_ranks)
    for first in range(0, len(pieces), BATCH):
        texts = [text for k in range(first, min(first + BATCH, len(pieces))) for _, text in pieces.texts(k)]
        start, before = time.perf_counter(), time.process_time()
        lists = bpe.encode_ordinary_batch(texts, num_threads=workers)
        seconds, busy = seconds + time.perf_counter() - start, busy + time.process_time() - before
        ids += sum(map(len, lists))
    return seconds, busy, ids


def enlarge(directory, size):
    """Make the file of ids in a prepared directory at least `size` bytes of random ids, and not in the page cache."""
    block = torch.randint(256, (BLOCK // 2,), dtype=torch.int16).numpy().tobytes()
    blocks = -(-size // BLOCK)
    with open(Path(directory, TOKENS), "wb") as file:
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    n, manifest = PIECE // 4, Path(directory, MANIFEST)  # ids of a usual piece
    Path(directory, PIECES).write_text(f"{n} {n} {'0' * 64}\n" * (blocks * BLOCK // 2 // n))
    write_json(manifest, read_json(manifest) | {"pieces": blocks * BLOCK // 2 // n})


def measure_start(directory, block_size):
    """Seconds until the first batch is there, and the memory for it beyond what torch and the code take."""
    before, start = resident("VmRSS"), time.perf_counter()
    data, _ = load_data(DataConfig(directory), seq2seq=False)
    data.batch_at(0, batch_size=12, block_size=block_size)
    return time.perf_counter() - start, resident("VmHWM") - before


def measure(args):
    """All that was measured, as a dict."""
    if args.pairs < 1 or args.workers < 1 or not 0 < args.gigabytes < 1e6:
        raise UserError(f"--pairs {args.pairs}, --workers {args.workers}, --gigabytes {args.gigabytes} must be above 0")
    files, ours, theirs = sources(args.paths), [], []
    paths = [os.path.abspath(path) for path in args.paths]
    tokenizer = os.path.abspath(args.tokenizer) if os.path.isdir(args.tokenizer) else args.tokenizer
    size, free = int(args.gigabytes * 1e9), shutil.disk_usage(tempfile.gettempdir()).free
    if free < size + 2 * sum(size for _, size, _ in files):
        raise UserError(f"--gigabytes {args.gigabytes} and the texts' ids do not fit in {free / 1e9:.1f} GB, free in "
                        f"{tempfile.gettempdir()}: set TMPDIR to a folder with more")
    with tempfile.TemporaryDirectory() as folder:
        for n in range(args.pairs):
            directory = str(Path(folder, str(n)))
            ours.append(fresh(measure_prepare, directory, paths, tokenizer, args.workers))
            theirs.append(fresh(measure_tiktoken, directory, paths, args.workers))
        enlarge(directory, size)
        starts = {block: fresh(measure_start, directory, block) for block in (1024, 64)}
    return {"machine": machine("cpu"), "bytes": sum(size for _, size, _ in files), "files": len(files), "ours": ours,
            "tiktoken": theirs, "workers": args.workers, "tokenizer": args.tokenizer, "gigabytes": args.gigabytes,
            "starts": starts}


def table(r):
    """The measurements as text."""
    mb, kinds = r["bytes"] / 1e6, {"texts to ids on the disk": "ours", "tiktoken's batches alone": "tiktoken"}
    spread = lambda of: f"{median(of):.2f} ({min(of):.2f} to {max(of):.2f})"
    lines = [f"prepare {r['files']:,} files, {mb:,.1f} MB, {r['tokenizer']}, {r['workers']} at work; medians of "
             f"{len(r['ours'])}", r["machine"]]
    lines += [f"{name:26} {spread([mb / seconds for seconds, *_ in r[key]])} MB/s, "
              f"{spread([mb / busy for _, busy, _ in r[key]])} of a core; {r[key][0][2]:,} ids"
              for name, key in kinds.items()]
    ratios = [[theirs[i] / ours[i] for ours, theirs in zip(r["ours"], r["tiktoken"])] for i in (0, 1)]
    lines.append(f"{'ratio':26} {spread(ratios[0])}, {spread(ratios[1])} of a core")
    lines += [f"{r['gigabytes']} GB of ids, windows of {block}: a batch after {seconds:.3f} s, with {size / 1e6:.1f} MB"
              for block, (seconds, size) in r["starts"].items()]
    return "\n  ".join(lines)
