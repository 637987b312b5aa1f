"""Small things that every program needs: seeds, devices, how long a thing took."""

import random

import torch

from plumbing.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def set_seed(seed):
    """Seed every generator that the project draws from."""
    random.seed(seed)
    torch.manual_seed(seed)  # seeds CUDA and MPS as well


def pick_device(name="auto"):
    """"auto" is the best device there is. Raises UserError on a device that this machine lacks."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if not there.get(name.split(":")[0], False):
        found = ", ".join(device for device, available in there.items() if available)
        raise UserError(f"device {name!r} is not available here: choose one of auto, {found}")
    return name
