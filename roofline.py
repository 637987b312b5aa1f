"""
How fast can this machine decode a model, and what keeps it from being faster? Predicted beside measured.

    python bench.py decode --random gpt2 --prompt-tokens 32 --max-new-tokens 32
    python bench.py decode                  # twenty settings, a line each

All that a step computes are products: rows of input times a matrix, which is a linear's weight or, in attention, the
stored keys and values. With few rows a product takes the time to read its matrix, with many the time to multiply: the
two roofs of Williams et al. 2009. So a step's time follows from what the machine does without the model: what products
of those shapes take when their matrices come from memory (Products), and what is left of a step when its matrices are
next to nothing (narrow()): calls into PyTorch, which cost the same for one row as for many.
"""

import time
from dataclasses import replace
from functools import cache
from statistics import median

import torch
import torch.nn as nn

from generate import stream
from plumbing.weights import Uninitialised


class Products:
    """What products take on a device, each measured when first asked for: of linears of a kind, or plain."""

    def __init__(self, dtype, device, kind=nn.Linear):
        self.dtype, self.device, self.kind, self.measured = dtype, device, kind, {}
        self.plain = self if kind is nn.Linear else Products(dtype, device)  # keys and values are matrices as they are
        self.itemsize = self.linears(1, 1, 1)[0].weight.itemsize
        self.queued = 1 if self.device.type == "cpu" else 20  # elsewhere many are launched before one has ended

    @classmethod
    def of(cls, model):
        """Those of a model: its head tells which kind its linears are."""
        return cls(model.wte.weight.dtype, model.wte.weight.device, type(model.lm_head))

    def linears(self, n, n_in, n_out):
        """So many linears of ones."""
        with torch.device(self.device), Uninitialised():
            made = [self.kind(n_in, n_out, bias=False).to(self.dtype) for _ in range(n)]
        for one in made:
            one.weight.data.fill_(1)
        return made

    @torch.inference_mode()
    def seconds(self, rows, n_in, n_out, among):
        """Of one product (rows, n_in) @ (n_in, n_out), in a step that reads `among` bytes of such matrices in turn."""
        n = max(1, among // (n_in * n_out * self.itemsize) * 16 // max(rows, 16))  # many rows: memory can wait
        key = rows, n_in, n_out, n
        if key not in self.measured:
            linears, took = self.linears(n, n_in, n_out), []
            x = torch.ones(rows, n_in, dtype=self.dtype, device=self.device)
            while len(took) < 4 or sum(took) < 0.05:
                start = time.perf_counter()
                for linear in linears * self.queued:
                    y = linear(x)
                y[0, 0].item()  # waits
                took.append(time.perf_counter() - start)
            self.measured[key] = median(took[1:]) / n / self.queued
        return self.measured[key]

    def predict(self, step):
        """Seconds of all products of a step, as Cost.step() has them."""
        total, among = 0.0, self.read(step)
        for (batch, rows, n_in, n_out), times in step.items():
            if batch is None:
                total += times * self.seconds(rows, n_in, n_out, among)
            else:  # one call goes through the keys and values of all heads: what counts is how many there are
                total += times * batch * n_in * n_out / 2**20 * self.plain.seconds(rows, 2**10, 2**10, among)
        return total

    def read(self, step):
        """Bytes that a step reads of matrices."""
        return read(step, self.itemsize, self.plain.itemsize)


def bandwidth(device):
    """
    Bytes per second that are read from memory at best, of 256 MB: by fp32 products with one row, or by sums, which are
    twice as fast where the library's products are not made for the processor.
    """
    x, products, took = torch.ones(2**26, device=device), Products(torch.float32, device), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(products.queued):
            total = x.sum()
        total.item()  # waits
        took.append(time.perf_counter() - start)
    product = products.seconds(1, 2**12, 2**12, 2**28)  # a quarter of it
    return max(products.queued * 2**28 / median(took), 2**26 / product)


@cache
def matmul_peak(dtype, device):
    """FLOPs per second at best: by products of square matrices, twice as wide each time until the machine is busy."""
    products, n, seconds, peak = Products(dtype, device), 2**8, 0.0, 0.0
    while products.queued * seconds < 0.02:  # wider ones say the same, and take a small machine ten seconds
        seconds = products.seconds(n, n, n, 0)
        n, peak = 2 * n, max(peak, 2 * n**3 / seconds)
    return peak


def read(step, weight=1, kept=1):
    """Numbers in the matrices of a step, or bytes, given those of a number in a weight, and in keys and values."""
    return sum((batch or 1) * n_in * n_out * times * (kept if batch else weight)
               for (batch, _, n_in, n_out), times in step.items())


def multiply(step):
    """FLOPs of a step: 2 per multiply-add."""
    return sum(2 * (batch or 1) * rows * n_in * n_out * times for (batch, rows, n_in, n_out), times in step.items())


def narrow(model):
    """The same model with two columns for each head: as many calls, and hardly a number to multiply."""
    width, kind = 2 * model.config.n_head, type(model.lm_head)
    small = type(model)(replace(model.config, n_embd=width, n_inner=width))
    for name, own in list(small.named_modules()):
        if isinstance(own, nn.Linear):
            small.set_submodule(name, kind(own.in_features, own.out_features, own.bias is not None))
    return small.to(model.wte.weight)


def seconds_per_call(model, prompts, max_new_tokens, **options):
    """How long each decoder call of a generation takes, what stands before it included: a list."""
    took, start = [], time.perf_counter()
    for _ in stream(model, prompts, max_new_tokens, **options):
        took.append(time.perf_counter() - start)
        start += took[-1]
    return took


def explain(model, prompts, products, seconds, step, **options):
    """
    A dict that explains what a decode step took. products: a Products of the model's device and dtype. seconds: of all
    calls, at least two. step: what the middle call multiplied. options: of stream(), as in the measured run.
    """
    few, endless = min(len(seconds), 9), dict(ignore_eos=True, stop=())  # an end that it wrote would mean nothing
    calls = median(seconds_per_call(narrow(model), prompts, few, **options | endless)[1:])
    return dict(batch_size=len(prompts), step_seconds=median(seconds[1:]), call_seconds=calls,
                product_seconds=products.predict(step), step_bytes=products.read(step),
                step_flops=multiply(step))
