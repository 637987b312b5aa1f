"""
What was counted and compared, made readable: text tables, and one HTML page with a slider over the decoding steps.

Everything arrives as plain data (records, the dict of compare(), token strings, attention weights), so nothing here
knows a model.
"""

import base64
import json
import os
from collections import Counter
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from plumbing.errors import UserError

# -----------------------------------------------------------------------------
# Tables


def aligned(rows):
    """Rows of strings as text, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def symbol(values):
    """A dimension over the steps, {k: size}, as a formula in k: "64" where it is fixed, "k+5", "2k", or a range."""
    (k0, v0), (k1, v1) = min(values.items()), max(values.items())
    slope = (v1 - v0) // (k1 - k0) if k1 > k0 else 0
    start = v0 - slope * k0
    if any(v != slope * k + start for k, v in values.items()):
        return f"{min(values.values())}..{max(values.values())}"
    if slope == 0:
        return str(start)
    return f"{'' if slope == 1 else slope}k{f'{start:+d}' if start else ''}"


def product(sizes):
    """{k: (batch, rows, inner, columns)} as text, "-" if there is none."""
    if not sizes:
        return "-"
    batch, rows, inner, columns = (symbol({k: size[d] for k, size in sizes.items()}) for d in range(4))
    return f"{'' if batch == '1' else batch + ' x '}({rows} x {inner}) @ ({inner} x {columns})"


def trajectories(records):
    """(where, product, kind) -> layer -> step -> (batch, rows, inner, columns)."""
    lines = {}
    for r in records:
        where = r["attention"] or ("head" if r["layer"] is None else "mlp")
        where = f"encoder {where}" if r["phase"] == "encode" else where
        key = where, {"qk": "QK^T", "pv": "PV"}.get(r["name"], r["name"]), r["kind"]
        sizes = prod(r["out"][:-2]), r["out"][-2], r["left"][-1], r["out"][-1]
        lines.setdefault(key, {}).setdefault(r["layer"], {})[r["step"]] = sizes
    return lines


def shape_table(records, training=()):
    """
    Every matrix product of one layer, from the records of a cost.Cost: at the first decoder call, at call k, and, if
    the records of a teacher-forced pass are given, in training. What depends on k is found by comparing the steps.
    """
    trained = trajectories(training)
    rows = [["where", "product", "kind", "layers", "call 1 (prefill)", "call k = 2, 3, ...", "", "training"]]
    for key, layers in trajectories(records).items():
        alike = Counter(tuple(steps.items()) for steps in layers.values())  # layers of one shape are one line
        for steps, n in alike.items():
            first, later = ({k: size for k, size in steps if (k > 1) == after} for after in (False, True))
            text = product(later)
            change = "grows with k" if "k" in text else "varies" if ".." in text else "fixed"
            change = {0: "once", 1: "seen once"}.get(len(later), change)
            passes = dict.fromkeys(product(steps) for steps in trained.get(key, {}).values())
            rows.append([*key, str(n), product(first), text, change, " or ".join(passes)])
    if not training:
        rows = [row[:-1] for row in rows]
    growing = [f"{row[0]} {row[1]} ({row[2]})" for row in rows if row[6] == "grows with k"]
    return (f"{aligned(rows)}\n\n(left) @ (right); the number before a BGEMM is its batch: rows x heads\n"
            f"what grows with k: {', '.join(growing) or 'nothing'}")


def comparison_table(result):
    """The result of compare.compare() as text."""
    rows = [["strategy", "tokens", "logits differ", "verdict", "encoder", "decoder", "total", "closed form",
             "linear rows", "seconds", "first call", "ms/token after", "speed"]]
    for s in result["strategies"]:
        encoder, decoder, rows_seen = s["encoder_tokens"], s["decoder_tokens"], s["linear_rows"]
        closed = f"{sum(s['closed_form']):,}" if s["closed_form"] else "-"
        counts = ["-" if s["unseen"] else f"{n:,}" for n in (encoder, decoder, encoder + decoder, rows_seen)]
        later = "-" if s["token_seconds"] is None else f"{1000 * s['token_seconds']:.2f}"
        rows.append([s["strategy"], "same" if s["identical"] else "DIFFER", f"{s['logit_difference']:.1e}",
                     s["finding"]["verdict"], *counts[:3], closed, counts[3], f"{s['seconds']:.3f}",
                     f"{s['first_seconds']:.3f}", later, f"{s['speed']:.2f}x"])
    lines = [f"{s['strategy']}: {told(s)}" for s in result["strategies"] if s["finding"]["verdict"] != "equal"]
    by_name = {s["strategy"]: s for s in result["strategies"]}
    if {"hoisted", "cached"} <= by_name.keys():
        lines += savings(by_name["hoisted"], by_name["cached"])
    timed = [s for s in result["strategies"] if "step_bytes" in s]
    if timed:
        lines += ["", roofline_table(result["bandwidth"], timed)]
    if timed[1:] and timed[-1]["strategy"] == "cached":
        lines += pays(*timed[-2:])
    little = " (so few that equal tokens say little)" if result["distinct"] < min(result["M"], 8) else ""
    return (f"N = {result['N']:,}, M = {result['M']:,} decoder calls, batch of {result['batch_size']}; "
            f"{result['distinct']} distinct ids in the text{little}\n\n{aligned(rows)}\n\n" + "\n".join(lines))


def roofline_table(bandwidth, timed):
    """What decode steps should take and do take, from the dicts of roofline.explain(), as text."""
    rows = [["a decode step", "MB read", "MFLOP", "predicted ms", "= calls + products", "measured ms", "GB/s",
             f"of {bandwidth / 1e9:,.1f}", "GFLOP/s", "tokens/s", "prefill tokens/s"]]
    for s in timed:
        took, calls, products = s["step_seconds"], s["call_seconds"], s["product_seconds"]
        prefill = s["prefill_tokens"] / s["first_seconds"]
        rows.append([s["strategy"], f"{s['step_bytes'] / 1e6:,.1f}", f"{s['step_flops'] / 1e6:,.0f}",
                     f"{1e3 * (calls + products):.2f}", f"{1e3 * calls:.2f} + {1e3 * products:.2f}",
                     f"{1e3 * took:.2f}",
                     f"{s['step_bytes'] / took / 1e9:.1f}", f"{s['step_bytes'] / took / bandwidth:.0%}",
                     f"{s['step_flops'] / took / 1e9:.1f}", f"{s['batch_size'] / took:,.0f}", f"{prefill:,.0f}"])
    return aligned(rows)


def pays(without, cached):
    """A sentence, or none, from the explained steps of a strategy that keeps nothing and of the cached one."""
    before, after = (1e3 * (s["call_seconds"] + s["product_seconds"]) for s in (without, cached))
    calls = 1e3 * cached["call_seconds"]
    return [] if before >= 1.2 * after else [
        f"The cache will not pay here: a step should take {after:.2f} ms with it and {before:.2f} ms without, since "
        f"{calls:.2f} ms are calls, which take as long for one row as for the whole text."]


def savings(hoisted, cached):
    """What caching saves over hoisting, as lines: in time, and linear by linear of a decoder layer."""
    saved = 1 - cached["seconds"] / hoisted["seconds"]
    fused = {"c_attn": "q, k, v", "c_kv": "k, v"}  # one matrix of ours is several linears
    names, total, once, shrink = [], Counter(), 0, 0
    for name, rows in hoisted["layer_rows"].items():
        role, own = name.split(".")
        n = len(fused.get(own, own).split(", "))
        total[role] += n
        if own == "c_kv":
            once += n
        elif cached["layer_rows"][name] < rows:
            shrink += n
        what = {"attn": "self", "cross": "cross", "mlp": "feed-forward"}[role]
        names.append(f"{what} {fused.get(own, own.removeprefix('c_'))} {rows:,} -> {cached['layer_rows'][name]:,}")
    attention = total["attn"] + total["cross"]
    return [f"caching saves {saved:.0%} of hoisting's time here. (The \"about 40 %\" of older notes is one such "
            f"number: it grows with source and text, and is next to nothing on a GPU that waits for launches.)",
            f"Of the {attention} linears of attention in a decoder layer ({attention + total['mlp']} with the "
            f"feed-forward) {once} run once per source and {shrink} shrink to one row a call. Rows, hoisted -> cached: "
            f"{'; '.join(names)}"]


def told(s):
    """A finding of compare.judge() as a sentence."""
    f, first = s["finding"], s["first_difference"]
    if f["verdict"] == "rounding":
        falls = "vanishes" if f["falls"] is None else f"falls {f['falls']:.0e} times"
        text = f"rounding: with the same tokens in fp64 the difference of {f['size']:.1e} {falls}"
        if f["flips"]:
            text += (f"; it flips a near tie at step {first['step']}, row {first['row']}, where token "
                     f"{first['tokens'][0]} leads {first['tokens'][1]} by {first['gap']:.1e} and the logits differ by "
                     f"{first['difference']:.1e}")
        return text
    if f["kind"] == "counts":
        return (f"BUG: it computes {s['encoder_tokens']} + {s['decoder_tokens']} tokens, and the closed form is "
                f"{s['closed_form']}")
    where = "" if f["layer"] is None else f", layer {f['layer']}, {f['attention']}-attention"
    return (f"BUG, first at step {f['step']}, row {f['row']}{where}: {f['kind']}: {f['note']} "
            f"(off by {f['size']:.1e} in fp64)")


def strict_json(result):
    """As JSON, which has neither infinities nor NaN: they are null."""
    return json.dumps(json.loads(json.dumps(result), parse_constant=lambda name: None))


# -----------------------------------------------------------------------------
# Pictures


@contextmanager
def picture(path):
    """A figure of matplotlib's to draw on, which is saved in the end. Raises UserError where that cannot be."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"--plot {path:.60} needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 5), layout="tight")
    yield figure
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path:.60}: {error.strerror or error}") from None


# -----------------------------------------------------------------------------
# The page

MAX_WEIGHTS = 9_000_000  # attention weights in a page: 36 MB, which a browser still opens
SCALE = 2**24 - 1        # a weight is stored as an integer of 24 bits, right to 3e-8


def check_size(n_weights):
    """Raise UserError if a page cannot hold so many attention weights: layers x heads x positions x keys, summed."""
    if n_weights > MAX_WEIGHTS:
        raise UserError(f"a report with {n_weights:,} attention weights is too large for a browser, the limit is "
                        f"{MAX_WEIGHTS:,}: use a shorter source, fewer new tokens or a smaller model")


def check_path(path):
    """Raise UserError unless a file can be written there, before hours of work go into it."""
    folder = Path(path).absolute().parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: name a file in a folder that exists and can be written")


def packed(weights):
    """A tensor of weights (H, T, S) as text: 24-bit little-endian integers in base64."""
    numbers = (weights.double() * SCALE).round().int().flatten()
    triples = torch.stack([numbers >> shift & 255 for shift in (0, 8, 16)], dim=-1)
    return base64.b64encode(bytes(triples.flatten().tolist())).decode()


def write_report(path, result, source, target, weights, title="Incremental decoding, step by step"):
    """
    Write one self-contained HTML page about one decoded text.

    result: of bench.compare(), for a batch of one. source: the source's tokens as strings, [] for GPT. target: the
    decoder's, from its prompt or start token to the last generated one. weights: "self" and "cross" -> per layer
    a tensor (H, T, S) of the cached run. Raises UserError if the page would be too large or cannot be written.
    """
    check_size(sum(layer.numel() for layers in weights.values() for layer in layers))
    data = dict(title=title, source=source, target=target, calls=result["M"], scale=SCALE,
                strategies=[dict(name=s["strategy"], steps=s["steps"]) for s in result["strategies"]],
                shapes={kind: list(layers[0].shape) for kind, layers in weights.items() if layers},
                weights={kind: [packed(layer) for layer in layers] for kind, layers in weights.items()})
    # inside a script element only "<" could end it
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("{{data}}", text)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another file") from None
