"""
Measure what the README claims, on your machine.

    python bench.py load --model DIR
    python bench.py load --random gpt2-xl --dtype bfloat16 --device cuda

load: how long load_pretrained takes beside merely reading the file, and how much memory, of a model that is there or a
random one of a published size. Every measurement is a fresh process, in which everything is imported and CUDA started
before the clock; readings and loadings alternate, so that what else the machine does hits both, and the file is in the
page cache. It needs Linux, whose /proc tells what memory was used.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from model import BART
from plumbing.errors import Parser, UserError, run
from plumbing.models import MODELS, count_parameters, random_model
from plumbing.utils import DTYPES, pick_device
from plumbing.weights import load_pretrained, save_pretrained

PRESETS = {name: cls for cls in MODELS.values() for name in cls.presets}


def fresh(function, *args):
    """What a function of this file returns in a process of its own."""
    code = "import bench, json, sys; print(json.dumps(getattr(bench, sys.argv[1])(*json.loads(sys.argv[2]))))"
    command = [sys.executable, "-c", code, function.__name__, json.dumps(args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise UserError((done.stderr.splitlines() or [f"killed, {done.returncode}"])[-1].split("UserError: ")[-1])
    return json.loads(done.stdout.splitlines()[-1])


def proc(path, key):
    """The value behind a key in a file of /proc."""
    lines = Path("/proc", path).read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(key))


def machine(device):
    """What a time needs beside it."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.startswith("cuda") else ""
    return (f"{gpu}{os.cpu_count()} x {proc('cpuinfo', 'model name')}, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}")


# -----------------------------------------------------------------------------
# load


def measure_read(paths):
    """Seconds to read files into new memory, with one readinto() each."""
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb") as file:
            file.readinto(torch.empty(os.path.getsize(path), dtype=torch.uint8).numpy())
    return time.perf_counter() - start


def measure_load(directory, dtype, device):
    """Seconds that load_pretrained takes, and the most memory it uses beyond what was in use before."""
    resident = lambda key: int(proc("self/status", key).split()[0]) * 1024
    torch.empty(1, device=device)
    cuda, before, start = torch.cuda.is_initialized(), resident("VmRSS"), time.perf_counter()
    model, _ = load_pretrained(directory, DTYPES.get(dtype), device)
    if cuda:
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
            "bytes": resident("VmHWM") - before, "gpu_bytes": torch.cuda.max_memory_allocated() if cuda else 0}


@torch.no_grad()
def measure_parity(directory, device):
    """The largest difference between our logits and transformers', in fp32, on random ids of shape (2, 64)."""
    import transformers
    model, _ = load_pretrained(directory, torch.float32, device)
    bart, T = isinstance(model, BART), min(64, model.config.block_size)
    source, target = torch.randint(model.config.vocab_size, (2, 2, T), generator=torch.manual_seed(0)).to(device)
    ours = model(source, target) if bart else model(source)
    kind = transformers.BartForConditionalGeneration if bart else transformers.GPT2LMHeadModel
    theirs = kind.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    theirs = theirs(source, decoder_input_ids=target) if bart else theirs(source)
    return {"difference": (ours - theirs.logits).abs().max().item(), "largest_logit": ours.abs().max().item()}


def save_random(directory, name, dtype):
    save_pretrained(directory, random_model(name, DTYPES[dtype], "cpu"))


def measure_random(args):
    """measure_loading of a random model, written for that and removed afterwards."""
    if args.random not in PRESETS:
        raise UserError(f"--random {args.random!r:.60} is not one of {', '.join(PRESETS)}")
    dtype, folder = args.dtype or "float32", tempfile.gettempdir()
    need = count_parameters(PRESETS[args.random].get_preset_config(args.random)) * DTYPES[dtype].itemsize
    if 1.1 * need > (free := shutil.disk_usage(folder).free):
        raise UserError(f"{args.random} needs {need / 2**30:.1f} GiB in {folder}, and {free / 2**30:.1f} GiB are free "
                        f"there: set TMPDIR to a folder with more")
    with tempfile.TemporaryDirectory() as directory:
        fresh(save_random, directory, args.random, dtype)
        return measure_loading(directory, args)


def measure_loading(directory, args):
    """What loading costs, as a dict."""
    directory = os.path.abspath(directory)
    paths = sorted(map(str, Path(directory).glob("*.safetensors")))
    if not paths:
        raise UserError(f"{directory} has no *.safetensors: pass the directory of a model")
    measure_read(paths)  # from here on they are in the page cache
    read, loaded = zip(*((fresh(measure_read, paths), fresh(measure_load, directory, args.dtype, args.device))
                         for _ in range(args.pairs)))
    load, size = [l["seconds"] for l in loaded], sum(map(os.path.getsize, paths))
    result = {"model": args.random or args.model, "dtype": loaded[0]["dtype"], "device": args.device,
              "file_bytes": size, "machine": machine(args.device), "read_seconds": read, "load_seconds": load,
              "ratios": [b / a for a, b in zip(read, load)], "memory_ratio": max(l["bytes"] for l in loaded) / size,
              "gpu_memory_ratio": max(l["gpu_bytes"] for l in loaded) / size}
    return result | (fresh(measure_parity, directory, args.device) if args.parity else {})


def report_loading(r):
    names = {"read_seconds": "seconds to read", "load_seconds": "seconds to load", "ratios": "load / read"}
    lines = [f"load {r['model']}, {r['dtype']}, {r['device']}: {r['file_bytes'] / 1e6:,.1f} MB, medians of "
             f"{len(r['ratios'])} pairs", r["machine"]]
    lines += [f"{name:16} {median(r[key]):.3f} ({min(r[key]):.3f} to {max(r[key]):.3f})" for key, name in names.items()]
    lines.append(f"most memory / file size: {r['memory_ratio']:.3f}, on the GPU {r['gpu_memory_ratio']:.3f}")
    if "difference" in r:
        lines.append(f"logits differ from transformers' by at most {r['difference']:.1e} in fp32 (the largest is "
                     f"{r['largest_logit']:.1f})")
    return "\n  ".join(lines)


# -----------------------------------------------------------------------------


def main(args=None):
    parser = Parser(prog="bench.py", description=__doc__)
    sections = parser.add_subparsers(dest="section", required=True)
    load = sections.add_parser("load", description="load_pretrained beside reading the file")
    which = load.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help="a Hugging Face directory")
    which.add_argument("--random", metavar="PRESET", help=f"a random model: {', '.join(PRESETS)}")
    load.add_argument("--dtype", choices=sorted(DTYPES), help="of the loaded weights; default: as in the file")
    load.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps")
    load.add_argument("--pairs", type=int, default=7, help="measurements of each kind")
    load.add_argument("--parity", action="store_true", help="compare the logits with transformers' in fp32")
    load.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(args)
    if args.pairs < 1:
        raise UserError(f"--pairs {args.pairs} must be at least 1")
    args.device = pick_device(args.device)
    result = measure_random(args) if args.random else measure_loading(args.model, args)
    print(json.dumps(result) if args.json else report_loading(result))


if __name__ == "__main__":
    run(main)
