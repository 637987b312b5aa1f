"""
Weights as whole numbers of 8 bits: a quarter of the bytes, so that a decode step, which reads every weight for one row
of input, takes about half the time.

    python generate.py --model out/gpt-tiny --prompt "The if statement" --quantize int8
    python -m further.quantize out/gpt-tiny out/gpt-tiny-int8       # a directory that --model opens

The matrix W (out, in) of a linear becomes whole numbers Q from -127 to 127 and one scale s for each of its outputs,
W ~ diag(s) Q with s = max |W| / 127 along the row, so no weight moves by more than s / 2 (Dettmers et al. 2022,
"LLM.int8()", section 2.1, for rows). Everything else of a model stays as it is; the head becomes a copy of its own, the
embedding is only looked up. A linear stands where a linear stood, so whatever decodes, counts or compares goes on.

In fp64 products are exactly those with s Q. In fp32 and bf16 an x86 CPU multiplies whole numbers, for which the input
is rounded as well, each row of it to 127 levels: that is where the speed comes from, and most of the error. The second
command says what both cost: logits and loss of the last tenth of --text, or of what the model writes itself.
"""

import math
import os
import sys
import warnings
from functools import cached_property

from plumbing.errors import Parser, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch
import torch.nn as nn
from torch.nn import functional as F

from plumbing.weights import load_pretrained, save_pretrained

LEVELS = 127  # of either sign; -128 is left out, so that two products of 7 and 8 bits fit the kernel's 16
ENDS = torch.tensor([-1.0, 1.0])


class Int8Linear(nn.Module):
    """
    nn.Linear with weight (out, in) int8, scale (out,) fp32, whatever the model is converted to, and bias (out,) or
    None: (..., in) -> (..., out). Made as nn.Linear is, with nothing in it; see quantize().
    """

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    @torch.no_grad()
    def of(cls, linear):
        """The Int8Linear of an nn.Linear, whose bias it takes over."""
        new = cls(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.float()
        new.scale = weight.abs().amax(1) / LEVELS
        new.weight = (weight / new.scale.clamp(min=torch.finfo().tiny)[:, None]).round().to(torch.int8)
        new.bias = linear.bias
        return new

    def forward(self, x):
        kernels = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        if kernels and torch.compiler.is_compiling():  # what is packed for the other kernel cannot be traced
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale.to(x.dtype)).unflatten(0, x.shape[:-1])
        elif kernels and torch.backends.quantized.engine == "x86":
            y = self.whole(x.flatten(0, -2).float()).to(x.dtype).unflatten(0, x.shape[:-1])
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def whole(self, x):
        """
        x (rows, in) fp32 through the kernel of whole numbers, which rounds it to 127 levels between its least and its
        greatest number. So every row is first divided by its largest one, and -1 and 1 stand behind it, where the
        weights are 0: the levels are the same for every row, and what one row gives does not depend on the others.
        """
        size = x.abs().amax(1, keepdim=True)
        x = torch.cat([(x / size).nan_to_num(), ENDS.expand(len(x), 2)], 1)  # what is no number is refused: size has it
        return torch.ops.quantized.linear_dynamic(x, self.packed, True) * size  # True: 7 bits, or sums overflow

    @cached_property
    def packed(self):
        """The weights once more, in the kernel's order."""
        with warnings.catch_warnings():  # that such tensors will go one day
            warnings.simplefilter("ignore")
            q = torch._make_per_channel_quantized_tensor(F.pad(self.weight, (0, 2)), self.scale.double(),
                                                         torch.zeros_like(self.scale, dtype=torch.long), 0)
            return torch.ops.quantized.linear_prepack(q, None)

    def __getstate__(self):  # a copy packs for itself
        return {name: value for name, value in self.__dict__.items() if name != "packed"}

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        self.__dict__.pop("packed", None)
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.__dict__.pop("packed", None)


def quantize(model):
    """Put an Int8Linear in the place of every nn.Linear of a model, its head too, and return it. Those there stay."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Int8Linear.of(module))
    return model


def check(path):
    """Raise UserError if there is something at a path already."""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already: name another directory")


def main(args=None):
    parser = Parser(prog="further.quantize", description=__doc__)
    parser.add_argument("model", metavar="DIR_OR_NAME", help="a Hugging Face directory, a run, or a name on the hub")
    parser.add_argument("output", metavar="OUT", help="where the model is written, which must not be there yet")
    args = parser.parse_args(args)
    check(args.output)
    model, tokenizer = load_pretrained(args.model)
    save_pretrained(args.output, quantize(model), tokenizer)


if __name__ == "__main__":
    run(main)
