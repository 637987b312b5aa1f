"""
Measure what the README claims, on your machine.

    python bench.py compare --model out/gpt-tiny --prompt "The if statement"
    python bench.py compare --random bart-base --prompt-tokens 1024 --max-new-tokens 100
    python bench.py decode --random gpt2 --prompt-tokens 32 --max-new-tokens 32 --against hf,ctranslate2:int8
    python bench.py prefill --random bart-base --prompt-tokens 1024 --max-new-tokens 2 --also "--dtype bfloat16"
    python bench.py precision --model out/gpt-tiny
    python bench.py train configs/gpt-tiny.toml
    torchrun --nproc-per-node=2 bench.py train configs/gpt2-124m.toml
    python bench.py compare --random gpt2 --prompt-tokens 32 --strategies naive,cached,further.concat:slip
    python bench.py trace --model out/bart-headline --prompt-file article.txt
    python bench.py report --model out/bart-headline --prompt-file article.txt --output page.html
    python bench.py load --random gpt2-xl --dtype bfloat16 --device cuda
    python bench.py prepare corpus.txt --gigabytes 10
    python bench.py attention --plot attention.png
    python bench.py batch --random gpt2 --prompt-tokens 32 --max-new-tokens 64
    python bench.py beams --random bart-large --prompt-tokens 1024 --max-new-tokens 60 --beams 4
    python bench.py speculate --model out/bart-headline --prompt-file article.txt

compare runs every strategy on the same input, or those that are named (MODULE:FUNCTION is one of your own): do they
write the same, what does each cost, and where they differ, is it rounding or a bug, and where? It exits with 1 where
there is a bug: further.concat:slip is one, from a lecture note, its cache lacks the newest token. decode times
requests, here and in other engines, against what the machine can read, and predicts a step; without a model it predicts
and measures twenty settings. prefill times their first tokens, against what the machine can multiply, train the steps
of a training. precision says what fewer bits cost, in loss and in logits. trace prints the shape of every matrix
product, which are fixed and which grow. report writes a page that shows the decoding step by step. load says how long
load_pretrained takes beside merely reading the file, and how much memory, prepare how fast texts are tokenised and how
soon a training on them begins. attention measures the sparse patterns and shared heads by themselves. All decode
greedily.
"""

import json
import sys
from argparse import Namespace
from statistics import median

from plumbing.errors import Parser, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch
from tqdm import tqdm

from compare import compare
from cost import attention_weights, count, matrix
from generate import find_strategy, generate, strategies
from plumbing import attention_bench, cli, load_bench, pairs, precision_bench, prepare_bench
from plumbing import ranks, report, speed, train_bench
from plumbing.machine import fresh, machine
from plumbing.models import check_memory
from plumbing.utils import pick_device
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
    with count(model) as cost:  # which also sets up what is set up once
        generate(model, prompts, max_new_tokens, **request.options)
    seconds = seconds_per_call(model, prompts, max_new_tokens, **request.options)
    if len(seconds) < 2:
        raise UserError(f"--max-new-tokens {max_new_tokens} leaves no decode step after the first token: ask for 2")
    products = Products.of(model)
    step = cost.step(cost.steps // 2 + 1)
    return dict(strategy=request.options.get("strategy", "cached"), N=len(prompts[0]),
                prefill_tokens=cost.encoder[1] + cost.decoder[1], first_seconds=seconds[0],
                bandwidth=bandwidth(products.device),
                **explain(model, prompts, products, seconds, step, **request.options))


def print_speed(args, parse, words):
    """Requests, timed; of decode also a plain step's prediction beside its measurement."""
    where, engines = speed.measure(args, parse, words)
    if args.plot is not None:
        speed.plot(where, engines, args.plot)
    if args.json:
        print("\n".join(map(json.dumps, [where, *engines])))
    else:
        print(speed.table(where, engines))
    if args.section == "decode":
        result = measure_decoding(cli.read(Namespace(**vars(args) | dict(compile=False))))
        print(json.dumps(result) if args.json else "\n" + report.roofline_table(result["bandwidth"], [result]))


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


MEASURED = {"load": load_bench, "train": train_bench, "prepare": prepare_bench, "precision": precision_bench}


def print_measured(args):
    module = MEASURED[args.section]
    with ranks.joined():
        result = module.measure(args)
        print(json.dumps(result) if args.json else module.table(result))


def main(args=None):
    parser = Parser(prog="bench.py", description=__doc__)
    sections = parser.add_subparsers(dest="section", required=True)
    decoding = {"compare": (print_comparison, "every strategy on the same input: what it writes, what it costs"),
                "trace": (print_trace, "the shape of every matrix product, which are fixed and which grow"),
                "report": (write_report, "a page that shows the decoding step by step")}
    timed = {"decode": "how fast decode steps are, how fast they should be, and what others make of it",
             "prefill": "how fast a prompt is read, and the first token is there"}
    for name, what in ({name: what for name, (_, what) in decoding.items()} | timed).items():
        section = sections.add_parser(name, description=what)
        cli.add_arguments(section)
        cli.add_random(section)
        if name in timed:
            speed.add_arguments(section)
        if name == "trace":
            section.add_argument("--strategy", help=f"{cli.STRATEGY}; default: cached")
        if name == "compare":
            section.add_argument("--strategies", metavar="A,B,...", help=f"the first is what the others are held "
                                 f"against; each is {cli.STRATEGY}; default: all that the model has")
        if name == "report":
            section.add_argument("--output", metavar="FILE.html", required=True, help="where the page is written")
    for name, module in MEASURED.items():
        module.add_arguments(sections.add_parser(name, description=module.__doc__))
    attention_bench.add_arguments(sections.add_parser("attention", description=attention_bench.__doc__))
    for name in pairs.WAYS:
        pairs.add_arguments(sections.add_parser(name, description=pairs.__doc__), name)
    words = speed.joined(sys.argv[1:] if args is None else args)
    args = parser.parse_args(words)
    others = dict.fromkeys(MEASURED, print_measured) | dict.fromkeys(pairs.WAYS, compare_ways)
    others["attention"] = attention
    if args.section in others:
        return others[args.section](args)
    if args.section == "decode" and args.model is None and args.random is None:
        return decode_settings(parser.parse_args)
    if args.section in timed:
        return print_speed(args, parser.parse_args, words)
    if args.section in ("trace", "report") and args.rows > 1:
        raise UserError(f"{args.section} shows one text: leave out --num-samples {args.rows}")
    if args.section == "trace":
        cli.check_counted(args)
    decoding[args.section][0](cli.read(args), args)


if __name__ == "__main__":
    run(main)
