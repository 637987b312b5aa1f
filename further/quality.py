"""
What sharing heads, or seeing less, costs in quality and saves in decoding: one table, three seeds of everything.

    python -m further.quality configs/gpt-shakespeare-cpu.toml --train.out_dir=out/quality [--data.source=PATH]
    python -m further.quality configs/bart-headline.toml --train.out_dir=out/quality-bart

Takes what train.py takes, and trains every variant of a GPT for as many steps, on the same data in the same order,
below out_dir; --train.resume=true goes on where it was stopped. Variants that share heads have wider feed-forward
layers, so that all have as many parameters (Shazeer 2019). Then the multi-head model of each seed, of a BART the only
variant, is converted by gqa.py, by the mean of heads or their span, which makes it smaller, and trained for another 5 %
of its steps.

Losses are of the held-out part, in nats per token, as mean (least to most) over the seeds; "to MHA" is the mean
difference to the multi-head model of the same seed; an exact match has every token right. Decoding is of one row on the
CPU, half of block_size read and half written: medians over all steps and seeds, and the bytes that are kept. A seed is
that of the initial weights and of the data.
"""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from statistics import mean, median

from plumbing.errors import UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

from cost import predict
from further.gqa import WAYS, convert
from plumbing.data import load_data
from plumbing.models import count_parameters, read_model_config
from plumbing.report import aligned
from plumbing.utils import pick_device
from plumbing.weights import load_pretrained, save_pretrained
from roofline import seconds_per_call
from train import evaluate, read, train

SEEDS = 3
MORE_STEPS = 0.05                     # after a conversion, of those before it
MORE_LR = {"mean": 1.0, "span": 0.1}  # of the peak before: what has lost little is only to settle


def variants(model_config):
    """Name -> fields of [model]: of what is trained from the beginning, and of what the multi-head model becomes."""
    n, H = model_config.block_size, model_config.n_head
    if n < 16:
        raise UserError(f"model.block_size={n} must be at least 16: windows and strides are an eighth of it")
    mqa = {"MQA": {"n_kv_head": 1}}
    if model_config.is_encoder_decoder:
        return {"MHA": {}}, mqa | {"MQA self": {"n_decoder_kv_head": 1}, "MQA cross": {"n_cross_kv_head": 1}}
    shared = {"GQA": {"n_kv_head": H // 2}} | mqa
    sparse = {"local": f"local:{n // 8}", "strided": f"strided:{n // 8}", "fixed": f"fixed:{n // 8},{-(-n // 32)}",
              "topk": f"topk:{n // 8},2"}
    return {"MHA": {}} | shared | {name: {"pattern": pattern} for name, pattern in sparse.items()}, shared


def widened(values, fields):
    """A [model] table with these fields, and feed-forward layers that make up for the parameters that it lacks."""
    wanted, config = (read_model_config(table) for table in (values, values | fields))
    wider = replace(config, n_inner=config.inner + 1)
    lacking, each = (count_parameters(a) - count_parameters(config) for a in (wanted, wider))
    return values | fields | {"n_inner": config.inner + lacking // each}


def decoded(model):
    """How large a model is, how fast it decodes and what it keeps meanwhile, as a dict."""
    half, V = model.config.block_size // 2, model.config.vocab_size
    seconds = seconds_per_call(model, [[i % V for i in range(half)]], half, ignore_eos=True)
    cost = predict(model.config, "cached", half, half, itemsize=model.wte.weight.itemsize)
    return dict(parameters=model.count_parameters(), decode=1e3 * median(seconds[1:]),
                kept=cost["self_cache_bytes"] + cost["cross_cache_bytes"])


def trained(values, data_config, config):
    """Train as configured. Returns what came of it, as a dict."""
    with redirect_stdout(sys.stderr):
        train(values, data_config, config)
    *steps, last = [json.loads(line) for line in Path(config.out_dir, "log.jsonl").read_text().splitlines()]
    speed = median(line["tokens_per_second"] for line in steps if "loss" in line)
    model, _ = load_pretrained(config.out_dir)
    return dict(loss=last["val_loss"], exact=last["exact_match"], speed=speed) | decoded(model)


def converted(way, fields, values, data_config, config, source):
    """Pool the heads of the model in a directory, and train it further. Returns what came of either, as dicts."""
    pooled, (model, tokenizer) = f"{config.out_dir}-pooled", load_pretrained(source)
    model, lr = convert(model, WAYS[way], **fields), MORE_LR[way]
    save_pretrained(pooled, model, tokenizer)
    data, _ = load_data(data_config, seq2seq=model.config.is_encoder_decoder, tokenizer=tokenizer)
    held_out = islice(data.val_batches(config.batch_size, model.config.block_size), config.eval_batches)
    loss, exact = evaluate(model.to(config.device), held_out, config.device, nullcontext())
    steps = max(1, round(MORE_STEPS * config.steps))
    config = replace(config, init_from=pooled, steps=steps, warmup_steps=steps // 10, lr=lr * config.lr,
                     min_lr=lr * config.min_lr, eval_every=steps)
    return dict(loss=loss, exact=exact) | decoded(model.cpu()), trained(values | fields, data_config, config)


def one_seed(values, data_config, config):
    """Everything with one seed: name -> what came of it."""
    begun, later = variants(read_model_config(values))
    place = lambda name: replace(config, out_dir=f"{config.out_dir}/{'-'.join(name.split())}-{config.seed}")
    found = {name: trained(widened(values, fields), data_config, place(name)) for name, fields in begun.items()}
    for (name, fields), way in product(later.items(), WAYS):
        result = converted(way, fields, values, data_config, place(f"to {name} by {way}"), place("MHA").out_dir)
        found |= zip((f"MHA to {name} by {way}", f"MHA to {name} by {way}, trained further"), result)
    return found


def as_table(seeds):
    """The results of all seeds as text, a line for each name."""
    rows = [["variant", "parameters", "held-out loss", "to MHA", "exact match", "training, tokens/s",
             "decode, ms/token", "cache, bytes"]]
    for name, first in seeds[0].items():
        of = lambda key: [seed[name][key] for seed in seeds if key in seed[name]]
        losses, apart = of("loss"), mean(seed[name]["loss"] - seed["MHA"]["loss"] for seed in seeds)
        rows.append([name, f"{first['parameters']:,}", f"{mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})",
                     f"{apart:+.4f}", f"{mean(of('exact')):.4f}", f"{median(of('speed')):,.0f}" if of("speed") else "",
                     f"{median(of('decode')):.2f}", f"{first['kept']:,}"])
    return aligned(rows)


def main(args=None):
    args = sys.argv[1:] if args is None else args
    if "-h" in args or "--help" in args:
        print(__doc__)
        return
    values, data_config, config = read(args)
    config = replace(config, device=pick_device(config.device), dtype="float32", log_every=1, eval_every=config.steps)
    for table in variants(read_model_config(values)):
        for fields in table.values():
            widened(values, fields)  # what cannot be is said before hours of work
    seeds = [one_seed(values, replace(data_config, seed=data_config.seed + i), replace(config, seed=config.seed + i))
             for i in range(SEEDS)]
    print(as_table(seeds))


if __name__ == "__main__":
    run(main)
