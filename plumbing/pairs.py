"""
bench.py batch, beams, speculate: two ways to decode the same, taking turns, each time in a process of its own.

batch: texts of different lengths one after another, and as one batch. beams: beam search in transformers, on the same
weights, and here. speculate: one token a pass, and guesses that are verified. Each way writes a few tokens first,
which is not timed; whether both write the same is said.
"""

import tempfile
import time
from argparse import Namespace
from functools import lru_cache
from statistics import median

import torch

from further.beam import beam_search
from generate import generate, stream
from plumbing import cli
from plumbing.errors import WHOLE, UserError
from plumbing.report import aligned
from plumbing.weights import save_pretrained

ROWS = 8
WARM = 4     # tokens
LEAST = 1.0  # seconds: what is shorter is done again and again


def one_by_one(request, rows, n):
    return [generate(request.model, [row], n, **request.options)[0] for row in rows]


def together(request, rows, n):
    return generate(request.model, rows, n, **request.options)


def beams_here(request, rows, n):
    return [texts[0][1] for texts in beam_search(request.model, rows, n, **request.options)]


def beams_of_transformers(request, rows, n):
    options = dict(max_new_tokens=n, do_sample=False, num_beams=request.options["beams"], eos_token_id=None)
    return [theirs(request.model).generate(torch.tensor([row]), **options)[0, -n:].tolist() for row in rows]


@lru_cache
def theirs(model):
    """The model in transformers."""
    import transformers
    bart = model.config.is_encoder_decoder
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, model)
        cls = transformers.BartForConditionalGeneration if bart else transformers.GPT2LMHeadModel
        loaded = cls.from_pretrained(folder).eval()
    loaded.generation_config.forced_eos_token_id = None
    return loaded


def one_a_pass(request, rows, n):
    return generate(request.model, rows, n, **request.options | {"speculate": None})


WAYS = {"batch": {"one by one": one_by_one, "together": together},
        "beams": {"transformers": beams_of_transformers, "minDecode": beams_here},
        "speculate": {"one a pass": one_a_pass, "guesses": together}}


def add_arguments(parser, name):
    cli.add_arguments(parser)
    cli.add_random(parser)
    parser.add_argument("--pairs", type=WHOLE, default=5, metavar="N", help="measurements of each way; default: 5")
    if name == "speculate":
        parser.add_argument("--speculate", metavar="DRAFT", default="lookup", help="lookup, or a small model")
    parser.set_defaults(length_penalty=None, early_stopping=None)  # as on the command line of generate.py


def ragged(ids):
    """Prompts of different lengths, the longest first, from one: beginnings of it."""
    return [ids[: len(ids) - r * len(ids) // (2 * ROWS)] for r in range(ROWS)]


def measure_way(values, way):
    """What it takes, as a dict. values: the arguments, as a dict; way: the name of one of WAYS[section]."""
    args = Namespace(**values)
    request, function = cli.read(args), WAYS[args.section][way]
    rows = ragged(request.ids) if args.section == "batch" else [request.ids]
    function(request, rows, min(WARM, request.max_new_tokens))
    start, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() - start < LEAST:
        written, times = function(request, rows, request.max_new_tokens), times + 1
    seconds = (time.perf_counter() - start) / times
    steps = stream(request.model, rows, request.max_new_tokens, **request.options) if way == "guesses" else ()
    return dict(seconds=seconds, ids=written, passes=sum(1 for _ in steps))


def check(args):
    """Raise UserError on what cannot be measured. The model that is read for it is not kept beside the measurements."""
    if args.pairs < 1:
        raise UserError(f"--pairs {args.pairs} must be at least 1")
    request = cli.read(args)
    if args.section == "beams" and request.technique != "beams":
        raise UserError("beams needs a number of beams above 1: give --beams N")
    if args.section == "beams" and args.quantize:
        raise UserError(f"--quantize {args.quantize}: transformers cannot open such a model; leave it out")
    if args.section == "beams" and args.random is None:
        raise UserError(f"beams with --model {args.model}: what its publishers ask for is not handed to transformers; "
                        f"give --random CONFIG")
    if request.technique and args.section != "beams":
        raise UserError(f"--beams is for bench.py beams: pass --beams 1 to bench.py {args.section}")
    if args.section == "batch" and args.decoder_prompt is not None:
        raise UserError(f"--decoder-prompt {args.decoder_prompt!r:.60} is for one text: leave it out")
    if args.rows > 1:
        raise UserError(f"--num-samples {args.rows}: {args.section} knows its texts; leave it out")
    if args.section == "batch" and len(request.ids) < ROWS:
        raise UserError(f"a prompt of {len(request.ids)} tokens: give at least {ROWS}, for prompts of as many lengths")


def measure(args, fresh):
    """All that was measured, as a dict. fresh: runs a function in a process of its own."""
    check(args)
    found = {way: [] for way in WAYS[args.section]}
    for _ in range(args.pairs):
        for way in found:
            found[way].append(fresh(measure_way, vars(args), way))
    return dict(section=args.section, model=args.random or args.model, ways=found)


def table(result):
    """The measurements as text."""
    ways, rows = result["ways"], [["way", "seconds, median", "least to most", "tokens/s", "faster"]]
    first = None
    for way, runs in ways.items():
        seconds, tokens = [run["seconds"] for run in runs], sum(map(len, runs[0]["ids"]))
        first = first or median(seconds)
        rows.append([way, f"{median(seconds):.3f}", f"{min(seconds):.3f} to {max(seconds):.3f}",
                     f"{tokens / median(seconds):,.1f}", f"{first / median(seconds):.2f}x"])
    a, b = (runs[0] for runs in ways.values())
    lines = [aligned(rows), f"both write {'the same' if a['ids'] == b['ids'] else 'something else'}"]
    if b["passes"]:
        lines.append(f"{sum(map(len, b['ids']))} tokens in {b['passes']} passes: "
                     f"{sum(map(len, b['ids'])) / b['passes']:.2f} each")
    return "\n".join(lines)
