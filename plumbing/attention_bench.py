"""
bench.py attention: what attention costs under each pattern, in one run. A decode step by what it reads, the cache's own
work in it; a whole text by its length, beside dense attention and FlexAttention with the same predicate; and, on a GPU,
the steps of a model whose heads share keys.
"""

import time
from statistics import median

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attention import keeping
from cache import passing
from model import GPT, GPTConfig
from plumbing.errors import WHOLE, UserError
from plumbing.models import free_memory
from plumbing.patterns import named
from plumbing.report import aligned, picture
from plumbing.utils import DTYPES, captured, pick_device
from sparse import Strided

HEADS, DIM = 16, 64  # of every measurement
MAX_LENGTH = 2**24
STEPS = 24           # decode steps that are timed one by one


def near_root(n):
    """A window or stride for n positions: near their square root, a multiple of 16."""
    return max(16, round(n**0.5 / 16) * 16)


def names_at(n):
    """What is compared at n positions."""
    l = near_root(n)
    return ["full", f"local:{l}", f"sinks:4,{l}", f"strided:{l}", f"local:{l}+column:{l}", f"fixed:{l},1",
            f"block:{l}+columns:{l},1"]


def wait(device):
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(function, device, repeats=5):
    """The median of what a call takes, of several in a row where the host does not wait for them."""
    queued, took = 1 if device == "cpu" else 10, []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        for _ in range(queued):
            function()
        wait(device)
        took.append((time.perf_counter() - start) / queued)
    return median(took[1:])


def draw(rows, heads, T, dtype, device, requires_grad=False):
    return torch.randn(rows, heads, T, DIM, dtype=dtype, device=device, requires_grad=requires_grad)


@torch.inference_mode()
def measure_step(name, n, rows, kv, dtype, device):
    """One-token steps behind n stored positions: a dict with what a step reads, what is reserved, and its seconds."""
    length = n + STEPS
    pattern = named(name, HEADS, kv, length).to(device)
    cache, x = keeping([pattern], rows, length), torch.zeros(rows, n, device=device)
    with passing(cache, 0, x, length) as pos:
        pattern.keep(cache, 0, pos, *(draw(rows, kv, n, dtype, device) for _ in "kv"))
    q, k, v, took = *(draw(rows, heads, 1, dtype, device) for heads in (HEADS, kv, kv)), []
    for i in range(STEPS):
        wait(device)
        start = time.perf_counter()
        with passing(cache, n + i, x[:, :1], length) as pos:
            keys, values, key_pos = pattern.keep(cache, 0, pos, k, v)
            pattern(q, keys, values, pos, key_pos)
        wait(device)
        took.append(time.perf_counter() - start)
    read = pattern.reads(n + STEPS // 2, length)
    return dict(pattern=name, n_kv_head=kv, stored=n, rows=rows, keys=read, seconds=median(took[4:]),
                bytes=round(2 * rows * kv * read * DIM * dtype.itemsize), cache_bytes=cache.nbytes)


def measure_pass(name, n, dtype, device, backward, flex=False):
    """
    One row of n positions: a dict with the seconds of forward, or forward and backward. On CUDA it is captured: then it
    is the device that is timed, not the launching of its kernels.
    """
    pattern = named(name, HEADS, HEADS, n).to(device)
    q, k, v = (draw(1, HEADS, n, dtype, device, requires_grad=backward) for _ in "qkv")
    pos, grad = torch.arange(n, device=device), draw(1, HEADS, n, dtype, device)
    if flex:
        mask = create_block_mask(lambda b, h, q, k: pattern.allows(b, h, q, k), None, None, n, n, device)
        compiled = torch.compile(flex_attention, dynamic=False)
        run = lambda: compiled(q, k, v, block_mask=mask)
    else:  # torch 2.11 fails to compile the strided union
        compiled = torch.compile(pattern, dynamic=False, disable=device != "cuda" or isinstance(pattern, Strided))
        run = lambda: compiled(q, k, v, pos, pos)
    once = (lambda: torch.autograd.grad(run(), (q, k, v), grad)) if backward else run
    with torch.set_grad_enabled(backward):
        took = seconds(captured(once) if device == "cuda" else once, device)
    torch.compiler.reset()
    return dict(pattern=name, n=n, flex=flex, backward=backward, seconds=took)


@torch.inference_mode()
def measure_model(kv, rows=128, stored=4096):
    """Tokens per second of a 6-layer GPT, 1,024 wide, in bfloat16 on CUDA, its step compiled and captured."""
    config = GPTConfig(n_layer=6, n_head=HEADS, n_kv_head=kv, n_embd=HEADS * DIM, block_size=stored)
    model = GPT(config).to("cuda", torch.bfloat16).eval()
    cache, ids = model.new_cache(rows), torch.zeros(rows, 1, dtype=torch.long, device="cuda")
    model.features(ids, cache)  # so that there are buffers; what they hold takes no other time
    at = torch.tensor([stored - 1], device="cuda")

    def step():
        ids.copy_(model.lm_head(model.features(ids, cache, at)[:, 0]).argmax(-1, keepdim=True))

    took = seconds(captured(torch.compile(step)), "cuda")
    torch.compiler.reset()
    return dict(n_kv_head=kv, rows=rows, stored=stored, seconds=took, tokens_per_second=rows / took,
                cache_bytes=cache.nbytes)


# -----------------------------------------------------------------------------
# The command


def add_arguments(parser):
    add = parser.add_argument
    add("--device", default="cpu", help="auto, cpu, cuda or mps")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="of queries, keys and values")
    add("--lengths", default="1024,2048,4096", metavar="N,N,...", help="of whole texts, in positions")
    add("--stored", type=WHOLE, default=4096, metavar="N", help="positions that precede a decode step")
    add("--rows", default="1,16", metavar="B,B,...", help="of decode steps")
    add("--backward", action="store_true", help="whole texts forward and backward")
    add("--flex", action="store_true", help="FlexAttention beside it, which is compiled first")
    add("--plot", metavar="FILE.png", help="draw time by length (needs matplotlib)")
    add("--json", action="store_true", help="one JSON object")


def numbers(flag, text):
    """Whole numbers from a flag, separated by commas."""
    found = [int(part) for part in text.split(",") if part.isascii() and part.isdigit()]
    if len(found) != text.count(",") + 1 or not all(1 <= n <= MAX_LENGTH for n in found):
        raise UserError(f"{flag} {text!r:.60} must be whole numbers from 1 to {MAX_LENGTH:,}, separated by commas")
    return found


def measure(args):
    """All that the arguments ask for: {"steps": ..., "texts": ..., "models": ...}, lists of dicts."""
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    lengths, rows = numbers("--lengths", args.lengths), numbers("--rows", args.rows)
    [stored] = numbers("--stored", str(args.stored))
    largest = 2 * max(rows) * HEADS * DIM * (stored + STEPS) * dtype.itemsize
    if largest > free_memory(device):
        raise UserError(f"--rows {max(rows)} x --stored {stored} need {largest / 2**30:,.1f} GiB for keys and values, "
                        f"and {free_memory(device) / 2**30:,.1f} GiB are free on {device}: ask for less")
    asked = [(name, HEADS) for name in names_at(stored) + [f"topk:{near_root(stored)},4"]] + [("full", 2), ("full", 1)]
    steps = [measure_step(name, stored, B, kv, dtype, device) for B in rows for name, kv in asked]
    texts = [measure_pass(name, n, dtype, device, args.backward, flex) for n in lengths for name in names_at(n)
             for flex in ([False, True] if args.flex and "+" not in name else [False])]
    models = [measure_model(kv) for kv in (HEADS, 4, 2, 1)] if device == "cuda" else []
    return dict(steps=steps, texts=texts, models=models)


def tables(result):
    """The measurements as text; factors are over full attention beside them."""
    rows = [["decode step", "KV heads", "rows", "stored", "keys read", "KB read", "KB reserved", "us", "faster"]]
    full = {s["rows"]: s["seconds"] for s in result["steps"] if (s["pattern"], s["n_kv_head"]) == ("full", HEADS)}
    for s in result["steps"]:
        rows.append([s["pattern"], str(s["n_kv_head"]), str(s["rows"]), f"{s['stored']:,}", f"{s['keys']:,g}",
                     f"{s['bytes'] / 1e3:,.0f}", f"{s['cache_bytes'] / 1e3:,.0f}", f"{1e6 * s['seconds']:,.0f}",
                     f"{full[s['rows']] / s['seconds']:.1f}x"])
    text = aligned(rows)
    rows = [["whole text", "positions", "by", "ms", "faster"]]
    full = {t["n"]: t["seconds"] for t in result["texts"] if t["pattern"] == "full" and not t["flex"]}
    for t in result["texts"]:
        rows.append([t["pattern"], f"{t['n']:,}", "FlexAttention" if t["flex"] else "folds",
                     f"{1e3 * t['seconds']:.3f}", f"{full[t['n']] / t['seconds']:.1f}x"])
    text += "\n\n" + aligned(rows)
    if result["models"]:
        rows = [["KV heads of 16", "rows", "stored", "tokens/s", "of multi-head"]]
        for m in result["models"]:
            rows.append([str(m["n_kv_head"]), str(m["rows"]), f"{m['stored']:,}", f"{m['tokens_per_second']:,.0f}",
                         f"{m['tokens_per_second'] / result['models'][0]['tokens_per_second']:.2f}x"])
        text += "\n\n" + aligned(rows)
    return text


def plot(result, path):
    """Time by length, a line for each kind of pattern, as a picture."""
    with picture(path) as figure:
        axes, lines = figure.add_subplot(), {}
        for t in result["texts"]:
            kind = "+".join(part.split(":")[0] for part in t["pattern"].split("+"))
            lines.setdefault(kind + " (FlexAttention)" * t["flex"], []).append((t["n"], 1e3 * t["seconds"]))
        for kind, points in lines.items():
            axes.loglog(*zip(*points), "o--" if "Flex" in kind else "o-", label=kind)
        axes.set(xlabel="positions", ylabel="ms")
        axes.legend()
