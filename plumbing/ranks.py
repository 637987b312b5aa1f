"""
One training in several processes, as torchrun starts them: the ranks. Each computes its rows of every batch, and
together they take the step that one process would take. Without torchrun there is one rank, and nothing here does
anything.

Sums of numbers go from CPU to CPU (gloo); gradients, and what else is on a GPU, from GPU to GPU (NCCL).
"""

import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import wraps

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plumbing.errors import UserError
from plumbing.utils import pick_device

PATIENCE = 10  # seconds in which torchrun ends the others, once rank 0 has said what is wrong


def world():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def joined():
    """
    Inside, the processes that torchrun started are ranks of one run, of which rank 0 alone is heard. What goes wrong on
    all of them is said once, by rank 0; what does on another alone, by that one, later.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere:
            with redirect_stdout(nowhere if rank() else sys.stdout), redirect_stderr(nowhere if rank() else sys.stderr):
                yield
    except KeyboardInterrupt:
        if rank():
            sys.exit(130)
        raise
    except Exception as error:
        if rank():
            time.sleep(PATIENCE)
        if isinstance(error, dist.DistError) or type(error) is RuntimeError and "gloo" in str(error):  # gloo has no own
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before the line is out
            raise ConnectionError("another rank has gone, see torchrun's report: --train.resume=true continues from "
                                  "the last checkpoint") from None
        raise
    dist.destroy_process_group()  # not after an error: others would find us gone before we have said why


def first(method):
    """A method that does its work on rank 0 alone: what is on the disk is written once."""
    return wraps(method)(lambda *args, **kwargs: None if rank() else method(*args, **kwargs))


def device(name):
    """What pick_device() makes of the name; on CUDA, a GPU of the rank's own. Raises UserError on one for all ranks."""
    name = pick_device(name)
    if world() == 1 or name == "cpu":
        return name
    if name != "cuda":
        raise UserError(f"train.device={name} is one device for {world()} ranks: pass cuda, which gives each its own, "
                        f"or cpu")
    name = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    torch.cuda.set_device(name)
    return name


def share(x):
    """This rank's rows of x (B, ...): as many as the others', or one less."""
    return x.tensor_split(world())[rank()]


def replicated(model):
    """The model, its gradients the mean over ranks of what each has computed."""
    return DistributedDataParallel(model) if world() > 1 else model


def keeping(model, more):
    """Inside, with more micro-batches to come, gradients of a replicated model stay on their rank."""
    return model.no_sync() if more and world() > 1 else nullcontext()


def mean(x):
    """The mean of a tensor over ranks."""
    if world() > 1:
        x = x.double()
        dist.all_reduce(x)
        x /= world()
    return x


def total(*numbers):
    """Each of the numbers, summed over ranks."""
    if world() > 1:
        x = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(x)
        numbers = x.tolist()
    return numbers
