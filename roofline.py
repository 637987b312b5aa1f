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
from statistics import median

import torch
from torch.nn import functional as F

from cost import count
from generate import stream

class Products:
    """What products take on a device, each measured when first asked for."""

    def __init__(self, dtype, device):
        self.dtype, self.device, self.measured = dtype, device, {}
        self.queued = 1 if self.device.type == "cpu" else 20  # elsewhere many are launched before one has ended

    @torch.inference_mode()
    def seconds(self, rows, n_in, n_out, among):
        """Of one product (rows, n_in) @ (n_in, n_out), in a step that reads `among` bytes of such matrices in turn."""
        n = max(1, among // (n_in * n_out * self.dtype.itemsize) * 16 // max(rows, 16))  # many rows: memory can wait
        key = rows, n_in, n_out, n
        if key not in self.measured:
            matrices = torch.ones(n, n_out, n_in, dtype=self.dtype, device=self.device)
            x, took = matrices.new_ones(rows, n_in), []
            while len(took) < 4 or sum(took) < 0.05:
                start = time.perf_counter()
                for matrix in [*matrices] * self.queued:
                    y = F.linear(x, matrix)
                y[0, 0].item()  # waits
                took.append(time.perf_counter() - start)
            self.measured[key] = median(took[1:]) / n / self.queued
        return self.measured[key]

    def predict(self, step):
        """Seconds of all products of a step, as Cost.step() has them."""
        total, among = 0.0, self.dtype.itemsize * read(step)
        for (batch, rows, n_in, n_out), times in step.items():
            if batch is None:
                total += times * self.seconds(rows, n_in, n_out, among)
            else:  # one call goes through the keys and values of all heads: what counts is how many there are
                total += times * batch * n_in * n_out / 2**20 * self.seconds(rows, 2**10, 2**10, among)
        return total


def bandwidth(device):
    """Bytes per second that are read from memory at best: by fp32 products with one row, of 256 MB."""
    return 2**26 / Products(torch.float32, device).seconds(1, 2**12, 2**12, 2**28)


def read(step):
    """Numbers in the matrices of a step: weights, keys and values."""
    return sum((batch or 1) * n_in * n_out * times for (batch, _, n_in, n_out), times in step.items())


def multiply(step):
    """FLOPs of a step: 2 per multiply-add."""
    return sum(2 * (batch or 1) * rows * n_in * n_out * times for (batch, rows, n_in, n_out), times in step.items())


def narrow(model):
    """The same model with two columns for each head: as many calls, and hardly a number to multiply."""
    width = 2 * model.config.n_head
    return type(model)(replace(model.config, n_embd=width, n_inner=width)).to(model.wte.weight)


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
                product_seconds=products.predict(step), step_bytes=products.dtype.itemsize * read(step),
                step_flops=multiply(step))
