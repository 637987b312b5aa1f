"""
Measure what the README claims, on your machine.

    python bench.py compare --model out/gpt-tiny --prompt "The if statement"
    python bench.py compare --random bart-base --prompt-tokens 1024 --max-new-tokens 100
    python bench.py decode --random gpt2 --prompt-tokens 32 --max-new-tokens 32
    python bench.py compare --random gpt2 --prompt-tokens 32 --strategies naive,cached,further.concat:slip
    python bench.py trace --model out/bart-headline --prompt-file article.txt
    python bench.py report --model out/bart-headline --prompt-file article.txt --output page.html
    python bench.py load --random gpt2-xl --dtype bfloat16 --device cuda
    python bench.py attention --plot attention.png
    python bench.py batch --random gpt2 --prompt-tokens 32 --max-new-tokens 64
    python bench.py beams --random bart-large --prompt-tokens 1024 --max-new-tokens 60 --beams 4
    python bench.py speculate --model out/bart-headline --prompt-file article.txt

compare runs every strategy on the same input, or those that are named (MODULE:FUNCTION is one of your own): do they
write the same, what does each cost, and where they differ, is it rounding or a bug, and where? It exits with 1 where
there is a bug: further.concat:slip is one, from a lecture note, its cache lacks the newest token. decode predicts how
long a decode step takes on this machine, and measures it; without a model, for twenty settings. trace prints the shape
of every matrix product, which are fixed and which grow. report writes a page that shows the decoding step by step. load
says how long load_pretrained takes beside merely reading the file, and how much memory. attention measures the sparse
patterns and shared heads by themselves. All decode greedily.
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

from plumbing.errors import WHOLE, Parser, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch
from tqdm import tqdm

from compare import compare
from cost import attention_weights, count, matrix
from generate import find_strategy, generate, strategies
from plumbing import attention_bench, cli, pairs, report
from plumbing.models import PRESETS, check_memory, count_parameters, random_config, random_model
from plumbing.utils import DTYPES, pick_device
from plumbing.weights import load_pretrained, save_pretrained
from roofline import Products, bandwidth, explain, seconds_per_call

# -----------------------------------------------------------------------------
# compare


def compare_request(request, names=None):
    """
    compare() on a cli.Request, of the strategies with these names, or of all that the model has, and why their steps
    take so long. Raises UserError, before anything is computed, if the model in fp64 does not fit beside it.
    """
    model, (prompts, max_new_tokens) = request.model, request.batch()
    check_memory("the copy in fp64 that tells rounding from a bug", model.config, 8, str(model.wte.weight.device))
    makes = {name: find_strategy(model, name) for name in names or strategies(model)}
    result = compare(model, makes, prompts, max_new_tokens, **request.options)
    products = Products.of(model)
    for one, make in zip(result["strategies"], makes.values()) if result["M"] > 1 else []:
        seconds, step = [took for *_, took in one["steps"]], {tuple(p): times for *p, times in one["products"]}
        one |= explain(model, prompts, products, seconds, step, strategy=make, **request.options)
    return result | dict(bandwidth=bandwidth(products.device))


def print_comparison(request, args):
    result = compare_request(request, args.strategies and args.strategies.split(","))
    for done in result["strategies"] if request.tokenizer and not request.json else []:
        print(f"--- {done['strategy']}\n{request.shown}{request.tokenizer.decode(done['ids'][0])}\n")
    print(report.strict_json(result) if request.json else report.comparison_table(result))
    if result["bug"]:
        sys.exit(1)


# -----------------------------------------------------------------------------
# decode

SMALL = "gpt2 --model.n_layer={0} --model.n_head={0} --model.n_embd={1}"
SETTINGS = [f"decode --random={model} --prompt-tokens={N} --num-samples={B} --max-new-tokens=20"
            for model in (SMALL.format(4, 128), SMALL.format(6, 384), "gpt2", "bart-base", "gpt2-medium")
            for B in (1, 8) for N in (64, 900)]


def measure_decoding(request):
    """The cached decoding of a cli.Request, explained: a dict."""
    model, (prompts, max_new_tokens) = request.model, request.batch()
    generate(model, prompts, min(max_new_tokens, 2), **request.options)  # what is set up once, before anybody looks on
    with count(model) as cost:  # compiled or not, a step multiplies the same
        generate(model, prompts, max_new_tokens, **request.options | dict(strategy="cached"))
    seconds = seconds_per_call(model, prompts, max_new_tokens, **request.options)
    if len(seconds) < 2:
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no decode step after the first token: ask for 2")
    products = Products.of(model)
    step = cost.step(cost.steps // 2 + 1)
    return dict(strategy=request.options.get("strategy", "cached").split(":")[-1], N=len(prompts[0]),
                prefill_tokens=cost.encoder[1] + cost.decoder[1], first_seconds=seconds[0],
                bandwidth=bandwidth(products.device),
                **explain(model, prompts, products, seconds, step, **request.options))


def print_decoding(request, args):
    result = measure_decoding(request)
    print(json.dumps(result) if request.json else report.roofline_table(result["bandwidth"], [result]))


def decode_settings(parse):
    """Every line of SETTINGS, as one table."""
    results = []
    for line in tqdm(SETTINGS, leave=False, disable=None):
        results.append(dict(measure_decoding(cli.read(parse(line.split()))), strategy=line.removeprefix("decode ")))
    near = sum(abs((r["call_seconds"] + r["product_seconds"]) / r["step_seconds"] - 1) <= 0.25 for r in results)
    print(f"{report.roofline_table(median(r['bandwidth'] for r in results), results)}\n\n"
          f"{near} of {len(results)} are predicted within 25 %; {machine('cpu')}")


# -----------------------------------------------------------------------------
# trace and report


def print_trace(request, args):
    """The matrix products of a generation, beside those of one teacher-forced pass over the same tokens."""
    model = request.model
    with count(model) as counted:
        new = generate(model, *request.batch(), **request.options)[0]
    rows = [request.ids, [model.config.start_id, *request.begun]] if model.config.is_encoder_decoder else [request.ids]
    rows[-1] = rows[-1] + new[:-1]
    with count(model) as training, torch.no_grad():
        model(*(torch.tensor([text], device=model.wte.weight.device) for text in rows))
    lines = map(json.dumps, counted.records)
    print("\n".join(lines) if request.json else report.shape_table(counted.records, training.records))


def write_report(request, args):
    """Compare the strategies, collect the attention weights of a cached run, and write both as a page."""
    config = request.model.config
    N = len(request.ids) if config.is_encoder_decoder else 0
    T = config.starts(len(request.ids)) + len(request.begun) + request.max_new_tokens - 1
    report.check_size(config.n_head * len(request.model.decoder_layers()) * T * (T + N))
    report.check_path(args.output)
    result = compare_request(request)
    with attention_weights(request.model) as weights:
        new = generate(request.model, *request.batch(), **request.options)[0]
    weights = {role: [matrix(calls)[0] for calls in layers if calls] for role, layers in weights.items()}
    show = request.tokenizer.show if request.tokenizer else str
    source, target = (request.ids, [config.start_id, *request.begun, *new]) if N else ([], request.ids + new)
    report.write_report(args.output, result, [show(i) for i in source], [show(i) for i in target], weights)
    print(report.strict_json(result) if request.json else report.comparison_table(result))
    print(f"wrote {args.output}", file=sys.stderr)


def fresh(function, *args):
    """What a function of this project returns in a process of its own."""
    code = ("import importlib, json, sys; name, module, args = sys.argv[1:]; "
            "print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(args))))")
    module = Path(__file__).stem if function.__module__ == "__main__" else function.__module__
    command = [sys.executable, "-c", code, function.__name__, module, json.dumps(args)]
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
    """What loading costs, as a dict."""
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


def attention(args):
    if args.plot is not None:
        report.check_path(args.plot)
    result = attention_bench.measure(args)
    if args.plot is not None:
        attention_bench.plot(result, args.plot)
    where = machine(pick_device(args.device))
    print(json.dumps(result | dict(machine=where)) if args.json else f"{where}\n\n{attention_bench.tables(result)}")


def compare_ways(args):
    result = pairs.measure(args, fresh) | dict(machine=machine(pick_device(args.device)))
    print(json.dumps(result) if args.json else f"{result['machine']}\n\n{pairs.table(result)}")


def add_load(parser):
    add = parser.add_argument
    add("--model", metavar="DIR", help="a Hugging Face directory")
    add("--random", metavar="PRESET", choices=PRESETS, help=f"a random model: {', '.join(PRESETS)}")
    add("--dtype", choices=sorted(DTYPES), help="of the loaded weights; default: as in the file")
    add("--device", default="cpu", help="auto, cpu, cuda or mps")
    add("--pairs", type=WHOLE, default=7, help="measurements of each kind")
    add("--parity", action="store_true", help="compare the logits with transformers' in fp32")
    add("--json", action="store_true", help="one JSON object")


def load(args):
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
        result = measure_loading(folder if args.model is None else args.model, args)
    print(json.dumps(result) if args.json else report_loading(result))


def main(args=None):
    parser = Parser(prog="bench.py", description=__doc__)
    sections = parser.add_subparsers(dest="section", required=True)
    decoding = {"compare": (print_comparison, "every strategy on the same input: what it writes, what it costs"),
                "decode": (print_decoding, "what a decode step should take on this machine, and what it takes"),
                "trace": (print_trace, "the shape of every matrix product, which are fixed and which grow"),
                "report": (write_report, "a page that shows the decoding step by step")}
    for name, (_, what) in decoding.items():
        section = sections.add_parser(name, description=what)
        cli.add_arguments(section)
        cli.add_random(section)
        if name == "trace":
            section.add_argument("--strategy", help=f"{cli.STRATEGY}; default: cached")
        if name == "compare":
            section.add_argument("--strategies", metavar="A,B,...", help=f"the first is what the others are held "
                                 f"against; each is {cli.STRATEGY}; default: all that the model has")
        if name == "report":
            section.add_argument("--output", metavar="FILE.html", required=True, help="where the page is written")
    add_load(sections.add_parser("load", description="load_pretrained beside reading the file"))
    attention_bench.add_arguments(sections.add_parser("attention", description=attention_bench.__doc__))
    for name in pairs.WAYS:
        pairs.add_arguments(sections.add_parser(name, description=pairs.__doc__), name)
    args = parser.parse_args(args)
    others = {"load": load, "attention": attention} | dict.fromkeys(pairs.WAYS, compare_ways)
    if args.section in others:
        return others[args.section](args)
    if args.section == "decode" and args.model is None and args.random is None:
        return decode_settings(parser.parse_args)
    if args.section in ("trace", "report") and args.rows > 1:
        raise UserError(f"{args.section} shows one text: leave out --num-samples {args.rows}")
    decoding[args.section][0](cli.read(args), args)


if __name__ == "__main__":
    run(main)
