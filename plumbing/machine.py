"""This machine, and processes of their own, for whoever measures."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from plumbing.errors import UserError


def fresh(function, *args):
    """What a function of this project returns in a process of its own."""
    code = ("import importlib, json, sys; name, module, args = sys.argv[1:]; "
            "print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(args))))")
    command = [sys.executable, "-c", code, function.__name__, function.__module__, json.dumps(args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise UserError((done.stderr.splitlines() or [f"killed, {done.returncode}"])[-1].split("UserError: ")[-1])
    return json.loads(done.stdout.splitlines()[-1])


def proc(path, key):
    """The value behind a key in a file of /proc."""
    lines = Path("/proc", path).read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(key))


def resident(key):
    """Bytes of memory that this process has (VmRSS), or had at most (VmHWM)."""
    return int(proc("self/status", key).split()[0]) * 1024


def most_memory(device):
    """Bytes that were taken at most: of the GPU's memory by torch on CUDA, elsewhere by the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss begins with that of whoever started us
        return resident("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on a Mac


def machine(device):
    """What a time needs beside it."""
    gpu = f"{torch.cuda.get_device_name(device)}, " if device.startswith("cuda") else ""
    return (f"{gpu}{os.cpu_count()} x {proc('cpuinfo', 'model name')}, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}")
