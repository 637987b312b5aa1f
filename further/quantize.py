"""
Weights as whole numbers of 8 bits: a quarter of the bytes, so that a decode step, which reads every weight for one row
of input, takes about half the time.

    python generate.py --model out/gpt-tiny --prompt "The if statement" --quantize int8
    python -m further.quantize out/gpt-tiny out/gpt-tiny-int8 --source pydoc     # a directory that --model opens

The matrix W (out, in) of a linear becomes whole numbers Q from -127 to 127 and one scale s for each of its outputs,
W ~ diag(s) Q with s = max |W| / 127 along the row, so no weight moves by more than s / 2 (Dettmers et al. 2022,
"LLM.int8()", section 2.1, for rows). Everything else of a model stays as it is; the head becomes a copy of its own, the
embedding is only looked up. A linear stands where a linear stood, so whatever decodes, counts or compares goes on.

In fp64 products are exactly those with s Q. In fp32 and bf16 an x86 CPU multiplies whole numbers, for which the input
is rounded as well, each row of it to 127 levels, or 255 where there is AMX: that is where the speed comes from, and
most of the error. (Compiled for one row, or without AMX, input and result are rounded to bf16 instead; so are many rows
in bf16 where there is AMX.)
With --source, the second command says what rounding costs on held-out text: logits, and loss.
"""

import copy
import math
import os
import warnings
from functools import cached_property
from itertools import islice
from pathlib import Path

from plumbing.errors import Parser, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch
import torch.nn as nn
from torch.nn import functional as F

from plumbing.data import IGNORE, DataConfig, load_data
from plumbing.report import aligned
from plumbing.weights import load_pretrained, save_pretrained
from train import loss_sum

X86 = torch.backends.quantized.engine == "x86"  # whether PyTorch has kernels for whole numbers that are made for it
AMX = torch.cpu._is_amx_tile_supported()  # whether this processor multiplies matrices of 8 and 16 bits by itself
MANY = 256    # rows from which weights that are made bfloat16 first have earned it, where that is what is multiplied
LEVELS = 127  # of either sign; -128 is left out, so that two products of 7 and 8 bits fit the kernel's 16
TINY = torch.finfo(torch.float32).tiny  # what a scale is at least, where it may not be 0
PACKED = "one", "several"  # what an Int8Linear has packed
BATCHES = 100  # of eight held-out rows, at most


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
        weight = linear.weight.float().contiguous()  # GPT-2's are transposed in its file
        new.scale = weight.abs().amax(1) / LEVELS
        new.weight = (weight / new.scale.clamp(min=TINY)[:, None]).round().to(torch.int8)
        new.bias = linear.bias
        return new.to(linear.weight)

    def forward(self, x):
        kernels = x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)
        many = AMX and x.dtype == torch.bfloat16 and x.numel() >= MANY * self.in_features
        if kernels and torch.compiler.is_compiling():  # which cannot trace what is packed for the kernels below
            y = self.traced(x.reshape(-1, self.in_features)).mul_(self.scale)  # its patterns are of matrices
            y = y.view(*x.shape[:-1], self.out_features)
        elif kernels and not many and X86:
            y = (self.alone if AMX and x.numel() == self.in_features else self.together)(x.float())
        else:
            y = F.linear(x, self.weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32)).mul_(self.scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def alone(self, x):
        """
        A row times s Q. Its scale is a number, which the kernel takes: three operations fewer. It multiplies by 1 / by,
        so of a million inputs some five become another level than in together(), where several() rounds by itself.
        """
        by = greatest(x).item() / steps()
        return self.one(x, max(by, TINY))  # in this order a `by` that is no number stays

    def together(self, x):
        """Rows times s Q, each with a scale of its own."""
        by = greatest(x) / steps()
        product = self.several if AMX and x.numel() else self.one
        return product(x / by).mul_(by)  # what is no number is lost there; `by` has it

    def traced(self, rows):
        """rows times Q, in fp32, by operations of which a compiler has kernels: one is made for single rows."""
        if not AMX or len(rows) == 1:
            if self.in_features % 16:  # that kernel reads 16 numbers at a time, and beyond the end
                return F.linear(rows.float(), self.weight.float())
            ones = torch.ones_like(self.scale, dtype=torch.bfloat16)
            return torch._weight_int8pack_mm(rows.bfloat16(), self.weight, ones).float()
        most = greatest(rows.float()) / LEVELS
        return torch._int_mm((rows / most).round().to(torch.int8), self.weight.t()).float() * most

    @cached_property
    def one(self):
        """A function: x (..., in) fp32, whose numbers are rounded to multiples of `by`, up to steps(), times s Q."""
        with warnings.catch_warnings():  # that such tensors will go one day
            warnings.simplefilter("ignore")
            q = torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(),
                                                         torch.zeros_like(self.scale).long(), 0)
            packed = torch.ops.quantized.linear_prepack(q, None)  # the weights once more, in the kernel's order
        zero = steps() + 1  # which number stands for 0
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return lambda x, by=1.0: product(x, by, zero, packed)

    @cached_property
    def several(self):
        """The same of what `by` has divided, by AMX: eight rows 1.3 times as fast, hundreds twice, but not one."""
        packed, zeros = torch.ops.onednn.qlinear_prepack(self.weight, None), torch.zeros_like(self.scale).long()
        return lambda x: torch.ops.onednn.qlinear_pointwise(x.round().to(torch.int8), 1.0, 0, packed, self.scale, zeros,
                                                            None, 1.0, 0, torch.float32, "none", [], "")

    def unpack(self):
        for name in PACKED:
            self.__dict__.pop(name, None)

    def __getstate__(self):  # a copy packs for itself
        return {name: value for name, value in self.__dict__.items() if name not in PACKED}

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        self.unpack()
        return self

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.unpack()


def steps():
    """Whole numbers of either sign that an input may become: 7 bits, or sums overflow; AMX does not add in 16."""
    return LEVELS if AMX else LEVELS // 2


def greatest(rows):
    """The largest number of each row without its sign, (..., 1): no row depends on the others."""
    return rows.abs().amax(-1, True)


def quantize(model):
    """Put an Int8Linear in the place of every nn.Linear of a model, its head too, and return it. Those there stay."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Int8Linear.of(module))
    return model


# -----------------------------------------------------------------------------
# What it costs


@torch.no_grad()
def held_out(models, batches):
    """
    Of each of some models: the mean loss over the labels that count, in nats; how far its logits are from those of the
    first one, as a root mean square, and at most. batches: of (inputs, labels), as train.py has them.
    """
    sums, labelled, numbers = [[0.0, 0.0, 0.0] for _ in models], 0, 0
    for inputs, labels in batches:
        first, counts = None, labels != IGNORE
        for i, model in enumerate(models):
            loss, logits = loss_sum(model, inputs, labels)
            logits = logits[counts].double()  # (n, V)
            first = logits if first is None else first
            apart, (losses, squares, most) = (logits - first).abs(), sums[i]
            sums[i] = losses + loss.item(), squares + apart.square().sum().item(), max(most, apart.max().item())
        labelled, numbers = labelled + counts.sum().item(), numbers + first.numel()
    return [(losses / labelled, math.sqrt(squares / numbers), most) for losses, squares, most in sums]


def main(args=None):
    parser = Parser(prog="further.quantize", description=__doc__)
    add = parser.add_argument
    add("model", metavar="DIR_OR_NAME", help="a Hugging Face directory, a run, or a name on the hub")
    add("output", metavar="OUT", help="where the model is written, which must not be there yet")
    add("--source", help="data.source of a configuration, of whose held-out tenth is said what it costs there")
    args = parser.parse_args(args)
    if os.path.lexists(args.output):
        raise UserError(f"{args.output} is there already: name another directory")
    model, tokenizer = load_pretrained(args.model)
    if isinstance(model.lm_head, Int8Linear):
        raise UserError(f"{args.model} is of whole numbers already: --model opens it as it is")
    data = args.source and load_data(DataConfig(args.source), seq2seq=model.config.is_encoder_decoder,
                                     tokenizer=tokenizer)[0]
    whole = quantize(copy.deepcopy(model))
    save_pretrained(args.output, whole, tokenizer)
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    size = Path(args.output, "model.safetensors").stat().st_size
    print(f"{args.output}: {linears:,} weights of linears as int8; {size:,} bytes, of which the embedding has "
          f"{model.wte.weight.nbytes:,}")
    if data:
        models = {"as it was": model, "weights rounded": copy.deepcopy(whole).double(), "as it runs here": whole}
        found = held_out(models.values(), islice(data.val_batches(8, model.config.block_size), BATCHES))
        rows = [[name, f"{loss:.5f}", f"{rms:.1e}", f"{most:.1e}"] for name, (loss, rms, most) in zip(models, found)]
        print(aligned([["", "held-out loss", "logits differ by (rms)", "at most"], *rows]))


if __name__ == "__main__":
    run(main)
