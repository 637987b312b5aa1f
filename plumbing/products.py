"""
A linear's product by the kernel that is fastest on this processor: the same weights, the same sums.

nn.Linear leaves the choice to PyTorch, which has fp32 multiplied by MKL. That is made for Intel's processors: there one
row of input takes the time to read the weights, though eight rows take 2.5 times that. Asked for many small products
instead, each with one row from every eighth of the weight, it reads in eight places at a time: 1.3 times. On two cores
of an AMD EPYC one row takes twice as long, eight rows five times: MKL gains nothing there from a second thread. Of a
weight cut into eight it makes eight products, which threads share: 1.1 and 2.3 times. Many rows are faster by oneDNN,
which PyTorch has as well. And where a processor has no instructions for numbers of 16 bits, PyTorch widens them one by
one. One row gains, since half the bytes are read; many are up to seven times as fast if weights are widened first,
before each product. RESULTS.md has the measurements.

Who generates from the command line on a CPU gets a model of such linears. They do nothing else where gradients are
recorded, or where a compiler looks on, which has kernels of its own.
"""

import platform
from functools import cache

import torch
import torch.nn as nn
from torch.nn import functional as F

from plumbing.machine import proc

LARGE = 2**17  # numbers in a weight: smaller ones gain less than the calls cost
SEVERAL = 8    # rows: more are multiplied well by MKL where it is not slow
FEW = 64       # rows: more are multiplied by oneDNN where it is
MANY = 8       # rows: fewer are multiplied by numbers of 16 bits as they are
WIDE = 2**21   # numbers that are widened at once: as many as a processor's caches hold


class InParts(nn.Linear):
    """In fp32: by product(), where MKL is slow."""

    def forward(self, x):
        return super().forward(x) if plainly(x, torch.float32) else product(x, self.weight, self.bias)


class Several(nn.Linear):
    """In fp32: by product() but for a single row, where MKL is slow with several alone."""

    def forward(self, x):
        if x.numel() == self.in_features or plainly(x, torch.float32):
            return super().forward(x)
        return product(x, self.weight, self.bias)


class Widened(nn.Linear):
    """In bfloat16 or float16: many rows in fp32, whose result is rounded."""

    def forward(self, x):
        if plainly(x, torch.bfloat16, torch.float16) or x.numel() < MANY * x.size(-1):
            return super().forward(x)
        wide, n = x.float(), -(-self.weight.numel() // WIDE)
        biases = [None] * n if self.bias is None else self.bias.float().chunk(n)
        y = [product(wide, weight.float(), bias) for weight, bias in zip(self.weight.chunk(n), biases)]
        return torch.cat(y, -1).to(x.dtype)


def plainly(x, *dtypes):
    """Whether a product has to be nn.Linear's own: always where x is of no such dtype, as in a copy in fp64."""
    return x.dtype not in dtypes or torch.is_grad_enabled() or torch.compiler.is_compiling()


def product(x, weight, bias):
    """F.linear() in fp32: of few rows by the parts of a large weight, of many by oneDNN where MKL is slow."""
    (n_out, n_in), slow = weight.shape, mkl_is_slow()
    rows, n = x.reshape(-1, n_in), parts(n_out)
    if weight.numel() < LARGE or not slow and (n == 1 or len(rows) > SEVERAL):
        return F.linear(x, weight, bias)
    if n == 1 or len(rows) > FEW:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    weight, bias = weight.reshape(n, -1, n_in).mT, None if bias is None else bias.view(n, 1, -1)  # (n, in, out / n)
    if not slow:  # (out / n, in, n)
        weight, bias = weight.transpose(0, 2), None if bias is None else bias.transpose(0, 2)
    rows = rows.expand(len(weight), -1, -1)
    y = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    if not slow:
        y = y.transpose(0, 2)
    return y.transpose(0, 1).reshape(*x.shape[:-1], n_out)  # from (n, rows, out / n)


@cache
def parts(n):
    """Into how many parts of the same size n rows of a weight are cut: 8, or the next number that divides n, or 1."""
    return next(k for k in (*range(8, 64), 1) if n % k == 0)


@cache
def mkl_is_slow():
    """Whether MKL multiplies fp32 here, on a processor of another maker than its own; reads a file, so once."""
    return torch.backends.mkl.is_available() and "AMD" in maker()


def maker():
    """Who made this processor, as it says itself, or nothing."""
    try:
        return proc("cpuinfo", "vendor_id")
    except (OSError, StopIteration):
        return platform.processor()


def kind(weight):
    """The class of linears that is fastest here for such a weight."""
    if not torch.backends.mkldnn.is_available():  # nothing of this has been measured without it
        return nn.Linear
    if weight.dtype == torch.float32 and weight.numel() >= LARGE and torch.backends.mkl.is_available():
        return InParts if mkl_is_slow() else Several
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Widened
    if weight.dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return Widened
    return nn.Linear


@torch.no_grad()
def fastest(model):
    """Have the linears of a model that is on a CPU multiply as is fastest there, in place; return it."""
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    for linear in linears:
        linear.__class__ = kind(linear.weight)
        linear.weight.data = linear.weight.contiguous()  # GPT-2's files have some transposed
    return model
