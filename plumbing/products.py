"""
A linear's product by the kernel that is fastest on this processor: the same weights, the same sums.

nn.Linear leaves the choice to PyTorch, which has fp32 multiplied by MKL. That is made for Intel's processors: there one
row of input takes the time to read the weights. On two cores of an AMD EPYC it takes twice as long, eight rows five
times, for MKL's threads get in each other's way in one thin product. A weight cut into eight gives eight products,
which they share out: 1.1 and 2.3 times as long. Many rows are faster by oneDNN, which PyTorch has as well. And where a processor has no instructions for
numbers of 16 bits, PyTorch widens them one by one. One row gains, since half the bytes are read; many are up to five
times as fast if all weights are widened first, before each product. RESULTS.md has the measurements.

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
FEW = 64       # rows: more are multiplied by oneDNN
MANY = 12      # rows: fewer are multiplied by numbers of 16 bits as they are


@cache
def parts(n):
    """Into how many parts of the same size n rows of a weight are cut: 8, or the next number that divides n, or 1."""
    return next(k for k in (*range(8, 64), 1) if n % k == 0)


class Cut(nn.Linear):
    """In fp32: few rows by a large weight in parts, many by oneDNN."""

    def forward(self, x):
        if plainly(x, torch.float32) or self.weight.numel() < LARGE:
            return super().forward(x)
        rows, n = x.reshape(-1, self.in_features), parts(self.out_features)
        if n == 1 or len(rows) > FEW:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        rows, weight = rows.expand(n, -1, -1), self.weight.reshape(n, -1, self.in_features).mT
        if self.bias is None:
            y = torch.bmm(rows, weight)  # (n, rows, out / n)
        else:
            y = torch.baddbmm(self.bias.view(n, 1, -1), rows, weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)


class Widened(nn.Linear):
    """In bfloat16 or float16: many rows in fp32, whose result is rounded."""

    def forward(self, x):
        if plainly(x, torch.bfloat16, torch.float16) or x.numel() < MANY * x.size(-1):
            return super().forward(x)
        return F.linear(*(y if y is None else y.float() for y in (x, self.weight, self.bias))).to(x.dtype)


def plainly(x, *dtypes):
    """Whether a product has to be nn.Linear's own: always where x is of no such dtype, as in a copy in fp64."""
    return x.dtype not in dtypes or torch.is_grad_enabled() or torch.compiler.is_compiling()


def maker():
    """Who made this processor, as it says itself, or nothing."""
    try:
        return proc("cpuinfo", "vendor_id")
    except (OSError, StopIteration):
        return platform.processor()


def kind(dtype):
    """The class of linears of a dtype that is fastest here, or None for nn.Linear."""
    if not torch.backends.mkldnn.is_available():  # nothing of this has been measured without it
        return None
    if dtype == torch.float32 and torch.backends.mkl.is_available() and "AMD" in maker():
        return Cut
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Widened
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return Widened
    return None


@torch.no_grad()
def fastest(model):
    """Have the linears of a model that is on a CPU multiply as is fastest there, in place; return it."""
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    if all(linear.weight.numel() < LARGE for linear in linears):
        return model  # which spends its time on calls, not on products
    kinds = {dtype: kind(dtype) for dtype in {linear.weight.dtype for linear in linears}}
    for linear in linears:
        if cls := kinds[linear.weight.dtype]:
            linear.__class__ = cls
            linear.weight.data = linear.weight.contiguous()
    return model
