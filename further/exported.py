"""
A decode step as a graph of tensors, and code of it that looks at nothing else: how a CPU's step is compiled.

    python bench.py decode --random configs/gpt-shakespeare-cpu.toml --prompt-tokens 16 --max-new-tokens 48 --compile

torch.compile stays with the model: before every call it looks whether the modules are still what they were when it
traced them, and Python carries tensors in and out. A step of a large model hides that; of one of 4 x 128, 0.47 ms, it
is a third. torch.export runs the model once, on tensors that have shapes and no numbers, and writes down which
operations they met; lengths are symbols. That graph is compiled by itself and knows neither modules nor caches. So what
torch.compile would have looked at for every token is looked at once for a decoding: whether the model is the one that
was traced (compiled.steps), and whether shapes are such as the graph was written for, which it tells.
"""

from contextlib import redirect_stderr
from copy import copy
from functools import partial
from io import StringIO

import torch
from torch.export import Dim
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_leaves, tree_map

from plumbing.errors import UserError

WRITTEN = {"size_asserts": False}  # of one row, whose products are written out: there is nothing to be tried
FASTEST = WRITTEN | {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}  # of several


def check_compiler():
    """Raise UserError where PyTorch finds no compiler of C++."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    try:
        get_cpp_compiler()
    except Exception:  # each version has its own
        raise UserError("--compile makes C++ of a step, and there is no C++ compiler: install g++ or clang++, or leave "
                        "it out") from None


class OfTensors(torch.nn.Module):
    """A step of a model from tensors alone. All else that a cache is stays as it is here."""

    def __init__(self, step, model, cache):
        super().__init__()
        self.step, self.model, self.cache = step, model, cache

    def forward(self, ids, at, k, v, places, memory, more):
        cache = copy(self.cache)
        cache.k, cache.v, cache.places = list(k), list(v), places
        return self.step(self.model, self.model.lm_head, ids, at, cache, memory, *more)


class Exported:
    """
    What has been compiled of steps of a model, step(model, head, ids, at, cache, memory, *more) -> a tensor, which may
    write into these. more: tensors, and numbers that are part of the code.
    """

    def __init__(self, model):
        self.model, self.codes, self.served = model, [], {}

    def __call__(self, step, ids, at, cache, memory, more, sized):
        """
        The step from these, which must stay where they are, as a function of nothing. sized: which tensors may have
        another length next time, and in which dimension. Compiles where no code of before serves these shapes.
        """
        args = ids, at, cache.k, cache.v, cache.places, memory, more
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        kind = step, len(tensors), *(x for x in more if not isinstance(x, torch.Tensor))
        asked = kind, *(x.shape for x in tensors)
        if asked not in self.served:  # to ask a graph takes as long as some steps of a small model
            serves = (code for of, holds, code in self.codes if of == kind and holds(tensors))
            code = next(serves, None) or self.compile(kind, cache, args, {id(x): axis for x, axis in sized})
            self.served[asked] = code
        code = self.served[asked]
        return lambda: code(*tensors)[0]

    def compile(self, kind, cache, args, axes):
        lengths = tree_map(lambda x: {axes[id(x)]: Dim.AUTO} if id(x) in axes else None, args)
        with torch.inference_mode(False), torch.no_grad():  # what is traced in that mode cannot be compiled
            program = torch.export.export(OfTensors(kind[0], self.model, cache), args, dynamic_shapes=lengths,
                                          strict=False)
        module = program.module(check_guards=False)
        graph = module.graph
        graph.set_codegen(CodeGen())  # tensors one after the other, not in the containers of args
        for node in graph.find_nodes(op="placeholder"):
            if not isinstance(node.meta["val"], torch.Tensor):
                graph.erase_node(node)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
            graph.erase_node(node)  # stands between operations that the compiler knows as one
        module = torch.fx.GraphModule(module, graph)  # of which nothing keeps the compiler from finding earlier code
        inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
        symbols = inputs[0].fake_mode.shape_env
        guards = symbols.produce_guards_expression(inputs, ignore_static=False)
        options = FASTEST if len(args[0]) > 1 else WRITTEN
        with torch._inductor.config.patch(options), redirect_stderr(StringIO()):  # where it tells all that it tries
            code = torch._inductor.compile(module, inputs)
        self.codes.append((kind, partial(symbols.evaluate_guards_expression, guards), code))
        return code
