"""bench.py load: how long load_pretrained takes beside merely reading the file, and how much memory."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from plumbing.errors import WHOLE, UserError
from plumbing.machine import fresh, machine, resident
from plumbing.models import PRESETS, count_parameters, random_config, random_model
from plumbing.utils import DTYPES, pick_device
from plumbing.weights import load_pretrained, save_pretrained


def add_arguments(parser):
    add = parser.add_argument
    add("--model", metavar="DIR", help="a Hugging Face directory")
    add("--random", metavar="PRESET", choices=PRESETS, help=f"a random model: {', '.join(PRESETS)}")
    add("--dtype", choices=sorted(DTYPES), help="of the loaded weights; default: as in the file")
    add("--device", default="cpu", help="auto, cpu, cuda or mps")
    add("--pairs", type=WHOLE, default=7, help="measurements of each kind")
    add("--parity", action="store_true", help="compare the logits with transformers' in fp32")
    add("--json", action="store_true", help="one JSON object")


def measure_read(paths):
    """Seconds to read files into new memory, with one readinto() each."""
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb") as file:
            file.readinto(torch.empty(os.path.getsize(path), dtype=torch.uint8).numpy())
    return time.perf_counter() - start


def measure_load(directory, dtype, device):
    """Seconds that load_pretrained takes, and the most memory it uses beyond what was in use before."""
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
    bart, T = model.config.is_encoder_decoder, min(64, model.config.block_size)
    source, target = torch.randint(model.config.vocab_size, (2, 2, T), generator=torch.manual_seed(0)).to(device)
    ours = model(source, target) if bart else model(source)
    kind = transformers.BartForConditionalGeneration if bart else transformers.GPT2LMHeadModel
    theirs = kind.from_pretrained(directory, dtype=torch.float32).to(device).eval()
    theirs = theirs(source, decoder_input_ids=target) if bart else theirs(source)
    return {"difference": (ours - theirs.logits).abs().max().item(), "largest_logit": ours.abs().max().item()}


def save_random(directory, name, dtype, overrides):
    save_pretrained(directory, random_model(name, DTYPES[dtype], "cpu", overrides))


def check_disk(folder, name, dtype, overrides):
    """Raise UserError if a random model does not fit where it is to be written."""
    config, free = random_config(name, overrides)[1], shutil.disk_usage(folder).free
    need = count_parameters(config) * DTYPES[dtype].itemsize
    if 1.1 * need > free:
        raise UserError(f"{name} needs {need / 2**30:.1f} GiB in {folder}, and {free / 2**30:.1f} GiB are free there: "
                        f"set TMPDIR to a folder with more")


def measure_loading(directory, args):
    """What loading a directory's model costs, as a dict."""
    paths = sorted(map(str, Path(directory).absolute().glob("*.safetensors"))) if directory else []  # "" is no "."
    if not paths:
        raise UserError(f"{directory!r:.150} has no *.safetensors: pass the directory of a model")
    directory = os.path.dirname(paths[0])
    measure_read(paths)  # from here on they are in the page cache
    read, loaded = zip(*((fresh(measure_read, paths), fresh(measure_load, directory, args.dtype, args.device))
                         for _ in range(args.pairs)))
    seconds, size = [l["seconds"] for l in loaded], sum(map(os.path.getsize, paths))
    result = {"model": args.random or args.model, "dtype": loaded[0]["dtype"], "device": args.device,
              "file_bytes": size, "machine": machine(args.device), "read_seconds": read, "load_seconds": seconds,
              "ratios": [b / a for a, b in zip(read, seconds)], "memory_ratio": max(l["bytes"] for l in loaded) / size,
              "gpu_memory_ratio": max(l["gpu_bytes"] for l in loaded) / size}
    return result | (fresh(measure_parity, directory, args.device) if args.parity else {})


def table(r):
    """The measurements as text."""
    names = {"read_seconds": "seconds to read", "load_seconds": "seconds to load", "ratios": "load / read"}
    lines = [f"load {r['model']}, {r['dtype']}, {r['device']}: {r['file_bytes'] / 1e6:,.1f} MB, medians of "
             f"{len(r['ratios'])} pairs", r["machine"]]
    lines += [f"{name:16} {median(r[key]):.3f} ({min(r[key]):.3f} to {max(r[key]):.3f})" for key, name in names.items()]
    lines.append(f"most memory / file size: {r['memory_ratio']:.3f}, on the GPU {r['gpu_memory_ratio']:.3f}")
    if "difference" in r:
        lines.append(f"logits differ from transformers' by at most {r['difference']:.1e} in fp32 (the largest is "
                     f"{r['largest_logit']:.1f})")
    return "\n  ".join(lines)


def measure(args):
    """What loading costs, as a dict."""
    if args.pairs < 1:
        raise UserError(f"--pairs {args.pairs} must be at least 1")
    if (args.model is None) == (args.random is None):
        raise UserError("give one of --model DIR and --random PRESET")
    args.device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            wanted = args.random, args.dtype or "float32", args.overrides
            check_disk(tempfile.gettempdir(), *wanted)
            fresh(save_random, folder, *wanted)
        return measure_loading(folder if args.model is None else args.model, args)
