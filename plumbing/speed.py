"""
bench.py decode, prefill: how fast a request is answered, here and by other engines, and how fast it could be.

    python bench.py decode --random gpt2 --prompt-tokens 32 --max-new-tokens 128 --against hf,ctranslate2:int8
    python bench.py decode --random gpt2 --prompt-tokens 32 --max-new-tokens 128 --against llama.cpp,llama.cpp:int8
    python bench.py prefill --random bart-base --prompt-tokens 1024 --max-new-tokens 2 --against hf
    python bench.py decode --random gpt2 --prompt-tokens 32 --also "--compile" --also "--compile --quantize int8"

Every engine is a process of its own with the same weights (plumbing/engines.py). The first request of each sets up what
is set up once, and its tokens are compared: in fp32 all must have written the same, or nothing is timed. Then they take
turns, request by request, so that whatever else the machine does hits all alike. A decode step cannot be faster than
its weights, keys and values are read, nor a prefill than its products are multiplied: the limits are what this machine
reads and multiplies in the same run.
"""

import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from cost import count
from generate import generate
from plumbing import cli
from plumbing.engines import GGUF, SIZES, convert, working, write_gguf
from plumbing.errors import WHOLE, UserError, naming
from plumbing.files import read_json
from plumbing.machine import fresh, machine
from plumbing.models import check_memory
from plumbing.report import aligned, check_path, picture
from plumbing.utils import DTYPES, pick_device
from plumbing.weights import save_pretrained
from roofline import bandwidth, matmul_peak, multiply, read

# of each other engine the modules it needs, what pip calls them, and what may follow a colon
OTHERS = {"hf": (["transformers"], "transformers", [""]),
          "ctranslate2": (["ctranslate2"], "ctranslate2", ["", *SIZES]),
          "llama.cpp": (["llama_cpp", "gguf"], "llama-cpp-python gguf", ["", *GGUF])}
HOW = {"strategy", "dtype", "compile", "quantize"}  # what --also may change
PAUSE = 0.3  # seconds before a turn: threads of the engine before may wait that long for work, and take the cores


def add_arguments(parser):
    cli.add_compile(parser)
    add = parser.add_argument
    add("--strategy", help=f"{cli.STRATEGY}; default: cached")
    add("--against", metavar="A,B,...", help="other engines: hf (transformers), ctranslate2, ctranslate2:int8, "
        "llama.cpp, llama.cpp:int8 (GPTs, on a CPU)")
    add("--also", action="append", default=[], metavar="ARGS", help="once more here, with these further arguments, "
        "e.g. \"--compile --quantize int8\"; may be given several times")
    add("--repeats", type=WHOLE, default=5, metavar="N", help="timed requests of each engine; default: 5")
    add("--plot", metavar="FILE.png", help="draw the speeds, and the limits, as bars")


def joined(words):
    """Arguments with --also and what follows as one word: argparse would take its dashes for another flag."""
    words = iter(words)
    return [f"{word}={next(words, '')}" if word == "--also" else word for word in words]


def check(args, others):
    """Raise UserError on what cannot be measured."""
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    for name in others:
        engine, _, option = name.partition(":")
        modules, packages, options = OTHERS.get(engine, ("", "", []))
        if option not in options:
            known = ", ".join(f"{engine}:{option}".rstrip(":") for engine in OTHERS for option in OTHERS[engine][-1])
            raise UserError(f"--against {name!r:.60} is none of the engines known here: {known}")
        if None in map(find_spec, modules):
            raise UserError(f"--against {name} needs {packages}: pip install {packages}")
    if others and args.decoder_prompt is not None:
        raise UserError(f"--decoder-prompt {args.decoder_prompt!r:.60} is not handed to other engines: leave it out, "
                        f"or --against")
    if args.plot is not None:
        check_path(args.plot)


def prepare(args, variants, others, folder):
    """
    Save the model for all engines; what they are asked for, as a dict, and strategy -> what its first and its middle
    call multiply. Raises UserError if so many models do not fit the memory, or if others cannot open it.
    """
    plain = Namespace(**vars(args) | dict(dtype=None, quantize=None, compile=False, strategy="cached"))
    request = cli.ask(plain, *cli.load(plain)[:2], {})
    model, (rows, n) = request.model, request.batch()
    if n < 2:
        raise UserError(f"--max-new-tokens {n} leaves no decode step after the first token: ask for 2")
    engines, device = len(variants) + len(others), pick_device(args.device)
    dtype = args.dtype or str(model.wte.weight.dtype).removeprefix("torch.")
    sizes = {name.partition(":")[2] or dtype for name in others if name.startswith("llama.cpp")}
    files = {size: str(Path(folder, f"{size}.gguf")) for size in sizes}
    if files and (model.config.is_encoder_decoder or device != "cpu" or dtype not in GGUF):
        raise UserError(f"--against llama.cpp is for GPTs, on a CPU, in one of {', '.join(GGUF)}: leave it out")
    check_memory(f"a model for each of {engines} engines", model.config, engines * model.wte.weight.itemsize, device)
    save_pretrained(folder, model)
    kind = read_json(Path(folder, "config.json"))["model_type"]
    if others and kind.startswith("mindecode"):
        raise UserError(f"--against {others[0]} cannot open a {kind}, which no other engine knows: leave it out")
    calls = {}
    for strategy in {variant.strategy for variant in variants}:
        with count(model) as cost:
            generate(model, rows, n // 2 + 1, **request.options | dict(strategy=strategy))
        calls[strategy] = cost.step(1), cost.step(n // 2 + 1)
    if any(name.startswith("ctranslate2") for name in others):
        fresh(convert, folder, model.config.vocab_size, str(Path(folder, "ct2")))
    for size, file in files.items():
        fresh(write_gguf, folder, size, file)
    return dict(directory=folder, converted=str(Path(folder, "ct2")), gguf=files, bart=model.config.is_encoder_decoder,
                rows=rows, n=n, dtype=dtype, device=device, prompt=request.prompt), calls


def compare(workers):
    """
    Set every engine up by a request that is not timed, and say which share of its tokens are the first one's. Exits
    with 1 if one that computes as exactly as the first writes something else.
    """
    first = None
    for worker in workers:
        worker.set_up = worker.ask()
        first, ids = first or worker, worker.set_up["ids"]
        exact = all(one.found["precision"] in ("float32", "float64") for one in (first, worker))
        equal = [[a == b for a, b in zip(*rows, strict=True)] for rows in zip(first.set_up["ids"], ids, strict=True)]
        worker.equal = sum(map(sum, equal)) / sum(map(len, equal))
        if exact and worker.equal < 1:
            row, i = next((r, row.index(False)) for r, row in enumerate(equal) if False in row)
            print(f"{worker.name} writes something else, first in row {row}, token {i}: {ids[row][i]}, where "
                  f"{first.name} has {first.set_up['ids'][row][i]}", file=sys.stderr)
            sys.exit(1)


def measure(args, parse, words):
    """
    All that was measured: of the machine, a dict, and of every engine, a list of dicts. parse: the program's own
    parser, for what --also adds to its words.
    """
    others, variants, names = args.against.split(",") if args.against else [], [args], ["minDecode"]
    for more in args.also:
        with naming(f"--also {more!r:.60}"):
            variants.append(parse([*words, *shlex.split(more)]))
        names.append(f"minDecode {more}")
        for name, value in vars(variants[-1]).items():
            if name not in HOW | {"also"} and value != getattr(args, name):
                raise UserError(f"--also {more!r:.60} asks for another model or text: only "
                                f"{', '.join(f'--{how}' for how in sorted(HOW))} can differ")
    for variant in variants:
        cli.check(variant)
        cli.check_counted(variant)
        variant.ignore_eos = True
    check(args, others)
    with tempfile.TemporaryDirectory() as folder:
        asked, calls = prepare(args, variants, others, folder)
        if args.random is None:  # standard input can be read once
            for variant in variants:
                variant.prompt, variant.prompt_file, variant.stdin = asked["prompt"], None, None
        jobs = [(name, asked | {"engine": "minDecode", "args": vars(variant)})
                for name, variant in zip(names, variants)]
        jobs += [(name, asked | {"engine": name.split(":")[0], "compute": name.partition(":")[2] or asked["dtype"]})
                 for name in others]
        with working(jobs) as workers:
            compare(workers)
            reads = take_turns(workers, args.repeats, torch.device(asked["device"]))
    B, N, dtype, device = len(asked["rows"]), len(asked["rows"][0]), asked["dtype"], asked["device"]
    where = dict(section=args.section, model=args.random or args.model, rows=B, prompt_tokens=N, new_tokens=asked["n"],
                 machine=machine(device), bandwidth=median(reads), bandwidths=reads, dtype=dtype,
                 omp={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "OMP_WAIT_POLICY": None},  # of the workers
                 peak_flops=matmul_peak(DTYPES[dtype], torch.device(device)))
    strategies = [variant.strategy for variant in variants] + ["cached"] * len(others)
    return where, [described(worker, *calls[strategy], B, N) for worker, strategy in zip(workers, strategies)]


def take_turns(workers, repeats, device):
    """Have every worker answer so often, in turns; what the machine read per second after each round."""
    reads = []
    for _ in range(repeats):
        for worker in workers:
            time.sleep(PAUSE)
            worker.answers.append(worker.ask())
        time.sleep(PAUSE)
        reads.append(bandwidth(device))
    return reads


def described(worker, first, middle, B, N):
    """All that was measured of an engine, as a dict. first, middle: what those calls multiply."""
    found, answers = worker.found, worker.answers
    seconds = [answer["seconds"] for answer in answers]
    return dict(engine=worker.name, **found, equal=worker.equal, seconds=seconds,
                first_seconds=[answer["first"] for answer in answers],
                set_up_seconds=worker.set_up["seconds"] - median(seconds),
                bytes_per_token=read(middle, found["weight_size"], found["kept_size"]) / B,
                flops_per_prompt_token=multiply(first) / (B * N), peak_bytes=answers[-1]["peak"],
                gpu_peak_bytes=answers[-1]["gpu_peak"], ids=worker.set_up["ids"])


def speeds(where, engine):
    """Tokens per second of every timed request: of the prompts, or of those that decode steps wrote."""
    if where["section"] == "prefill":
        return [where["rows"] * where["prompt_tokens"] / first for first in engine["first_seconds"]]
    written = where["rows"] * (where["new_tokens"] - 1)
    return [written / (all_ - first) for first, all_ in zip(engine["first_seconds"], engine["seconds"])]


def limit(where, engine):
    """Tokens per second that this machine allows, None if it was not measured what it multiplies so."""
    if where["section"] == "decode":
        return where["bandwidth"] / engine["bytes_per_token"]
    return where["peak_flops"] / engine["flops_per_prompt_token"] if engine["precision"] == where["dtype"] else None


def table(where, engines):
    """The measurements as text."""
    unit, per = {"decode": ("MB/token", "bytes_per_token"),
                 "prefill": ("MFLOP/token", "flops_per_prompt_token")}[where["section"]]
    rows = [["engine", "precision", "tokens/s", "least to most", "of the first", unit, "of the limit",
             "first token, ms", "request, s", "set-up, s", "peak, MB", "tokens"]]
    base = median(speeds(where, engines[0]))
    for engine in engines:
        found, most = speeds(where, engine), limit(where, engine)
        speed, peak = median(found), engine["gpu_peak_bytes"] or engine["peak_bytes"]
        rows.append([engine["engine"], engine["precision"], f"{speed:,.1f}", f"{min(found):,.1f} to {max(found):,.1f}",
                     f"{speed / base:.2f}x", f"{engine[per] / 1e6:,.1f}", f"{speed / most:.0%}" if most else "-",
                     f"{1e3 * median(engine['first_seconds']):,.1f}", f"{median(engine['seconds']):.3f}",
                     f"{engine['set_up_seconds']:.2f}", f"{peak / 1e6:,.0f}",
                     "same" if engine["equal"] == 1 else f"{engine['equal']:.1%} equal"])
    omp = ", ".join(f"{key} {'unset' if value is None else value}" for key, value in where["omp"].items())
    threads = ", ".join(f"{engine['version']}: {engine['threads']} threads" for engine in
                        {engine["version"]: engine for engine in engines}.values())
    return (f"{where['machine']}\n{omp}; {threads}\n{where['section']}: {where['model']}, {where['rows']} x "
            f"{where['prompt_tokens']:,} tokens read, {where['new_tokens']:,} written; it reads "
            f"{where['bandwidth'] / 1e9:.1f} GB/s and multiplies {where['peak_flops'] / 1e9:,.0f} GFLOP/s in "
            f"{where['dtype']}\n\n{aligned(rows)}")


def plot(where, engines, path):
    """Tokens per second as bars, and each one's limit as a line."""
    with picture(path) as figure:
        axes = figure.add_subplot()
        for y, engine in enumerate(engines):
            found, most = speeds(where, engine), limit(where, engine)
            speed = median(found)
            axes.barh(y, speed, xerr=[[speed - min(found)], [max(found) - speed]])
            if most:
                axes.vlines(most, y - 0.45, y + 0.45, colors="black")
        axes.set_yticks(range(len(engines)), [engine["engine"] for engine in engines])
        axes.invert_yaxis()
        axes.set(xlabel=f"{where['section']}, tokens/s; the line is the limit")
