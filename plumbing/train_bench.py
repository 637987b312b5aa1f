"""
bench.py train: what a training step takes, beside what the machine can multiply.

    python bench.py train configs/gpt-tiny.toml --train.batch_size=32
    torchrun --nproc-per-node=2 bench.py train configs/gpt2-124m.toml

train.py --dry-run does the same with fewer steps. The configuration is read as train.py reads it, the loop is its own,
and nothing is kept. A token is a label that counts. FLOPs are those of the products, masked ones included: a forward
pass, counted, and twice as many for the gradients by inputs and by weights. MFU (Chowdhery et al. 2022, appendix B) is
what is left of the best that a matrix product reaches.
"""

import sys
import tempfile
import time
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch

import train
from plumbing import ranks
from plumbing.errors import WHOLE, UserError
from plumbing.machine import machine, most_memory
from plumbing.meters import flops_per_token
from plumbing.utils import DTYPES
from roofline import matmul_peak

FIRST = 3  # steps that are not timed: something is still set up in them


def add_arguments(parser):
    parser.add_argument("random", metavar="CONFIG.toml", help="a configuration of train.py's, which any number of "
                        "--section.key=value change")
    parser.add_argument("--repeats", type=WHOLE, default=20, metavar="N", help=f"steps that are timed, after {FIRST} "
                        f"others; default: 20")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def measure(args):
    """All that was measured, as a dict."""
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    model_values, data_config, config = train.read([args.random, *args.overrides])
    steps = config.steps
    config = replace(train.settled(config), steps=FIRST + args.repeats, resume=False, log_every=1, eval_batches=1,
                     eval_every=FIRST + args.repeats, logger=None)
    times, speeds = [], []

    def log(step, tokens_per_second=None, **numbers):
        if tokens_per_second is not None:  # not an evaluation
            times.append(time.perf_counter())
            speeds.append(tokens_per_second)

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        config.out_dir = str(Path(folder, "run"))
        this_run, data, model, optimizers = train.set_up(model_values, data_config, config)
        this_run.log, this_run.save = log, lambda *args: None
        shape = dict(batch_size=config.batch_size, block_size=model.config.block_size)
        with train.autocast_of(config):
            flops = flops_per_token(model, data.batch_at(0, **shape))
        peak = matmul_peak(DTYPES[config.dtype], torch.device(config.device))
        start = time.perf_counter()
        train.loop(this_run, data, model, optimizers, config)
    seconds = [after - before for before, after in zip([start, *times], times)]
    return dict(config=args.random, steps=steps, machine=machine(config.device), device=config.device,
                dtype=config.dtype, ranks=ranks.world(), **shape,
                accumulation=config.accumulation, compiled=config.compile, parameters=model.count_parameters(),
                seconds=seconds, tokens_per_second=speeds, set_up_seconds=seconds[0] - median(seconds[FIRST:]),
                flops_per_token=flops, peak_bytes=most_memory(config.device), peak_flops=peak)


def table(r):
    """The measurements as text."""
    speeds, seconds = r["tokens_per_second"][FIRST:], r["seconds"]
    reached = r["flops_per_token"] * median(speeds)
    whole = timedelta(seconds=round(r["steps"] * median(seconds[FIRST:])))
    return "\n  ".join([
        f"train {r['config']}: {r['parameters']:,} parameters, {r['accumulation']} x {r['batch_size']} x "
        f"{r['block_size']} a step, {r['dtype']}, {'compiled' if r['compiled'] else 'eager'}; medians of {len(speeds)} "
        f"steps after {FIRST}", r["machine"] + (f", one of {r['ranks']} ranks" if r["ranks"] > 1 else ""),
        f"tokens/s     {median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})",
        f"a step       {median(seconds[FIRST:]):.3f} s, the first {seconds[0]:.3f}: {r['set_up_seconds']:.3f} of "
        f"set-up",
        f"a token      {r['flops_per_token'] / 1e6:,.1f} MFLOP: {reached / 1e9:,.1f} GFLOP/s, MFU "
        f"{reached / r['peak_flops'] / r['ranks']:.1%} of the {r['peak_flops'] / 1e9:,.1f} of a product",
        f"most memory  {r['peak_bytes'] / 1e6:,.0f} MB",
        f"all {r['steps']:,} steps would take {whole}, evaluations besides"])


def dry_run(args):
    """What train.py's arguments would take, as text, after a few steps of it."""
    config, *overrides = args or ["--"]  # which is no configuration, as will be said
    return table(measure(Namespace(random=config, overrides=overrides, repeats=5)))
