"""Small things that every program needs: seeds, devices, code of the user's own, what a GPU is to do at once."""

import random
from importlib import import_module
from inspect import isfunction

import torch

from plumbing.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def set_seed(seed):
    """Seed every generator that the project draws from. Raises UserError on a number that torch's cannot take."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be at least 0 and less than 2**63")
    random.seed(seed)
    torch.manual_seed(seed)  # seeds CUDA and MPS as well


def pick_device(name="auto"):
    """"auto" is the best device there is. Raises UserError on a device that this machine lacks."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    kinds = [kind for kind, count in counts.items() if count]
    if name == "auto":
        return kinds[0]
    if name not in kinds + [f"{kind}:{i}" for kind in kinds for i in range(counts[kind])]:
        raise UserError(f"device {name!r:.60} is not available here: choose one of auto, {', '.join(kinds)}")
    return name


def find_own(setting, name):
    """
    The function or class that a setting names as MODULE:NAME; the module is imported only here. Raises UserError,
    naming what there is, if there is none.
    """
    module, _, function = name.partition(":")
    try:
        own = vars(import_module(module))
    except (Exception, SystemExit) as error:  # whatever a module does
        raise UserError(f"{setting}={name!r}: {type(error).__name__}: {error}: name a module that can be imported "
                        f"from here") from None
    if not callable(own.get(function)):
        there = [key for key, value in own.items() if isfunction(value) and value.__module__ == module]
        raise UserError(f"{setting}={name!r} is not one of the functions of {module}: "
                        f"{', '.join(there) or 'it has none'}")
    return own[function]


def captured(step):
    """A function that launches at once what step() launches on a GPU, one CUDA graph, and returns what that did."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is set up once, on this stream, is not part of it
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay():
        graph.replay()
        return out

    return replay
