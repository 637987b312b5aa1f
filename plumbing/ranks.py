"""
One training in several processes, as torchrun starts them: the ranks. Each computes its rows of every batch, and
together they take the step that one process would take. Without torchrun there is one rank, and nothing here does
anything.

Sums of numbers go from CPU to CPU (gloo); gradients, and what else is on a GPU, from GPU to GPU (NCCL).
"""

import os
import re
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import wraps

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from plumbing.errors import UserError
from plumbing.utils import pick_device

PATIENCE = 10  # seconds: torchrun ends all ranks within a few once one of them has gone, by force after 30
speaking = threading.Lock()  # whose thread says why this process ends: the other must not end it before that is said


def world():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def joined():
    """
    Inside, the processes that torchrun started are ranks of one run, of which rank 0 alone is heard. What goes wrong on
    all of them is said once, by rank 0; what does on another alone, by that one, later; that a rank has gone without a
    word, by those that are left.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    from torch.distributed.rendezvous import rendezvous  # here: not every torch has it
    store, number, n = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=n)
    listen(store.clone(), n)
    try:
        with open(os.devnull, "w") as nowhere:
            with redirect_stdout(nowhere if rank() else sys.stdout), redirect_stderr(nowhere if rank() else sys.stderr):
                yield
    except KeyboardInterrupt:
        if rank():
            sys.exit(130)
        raise
    except Exception as error:
        if isinstance(error, dist.DistError) or type(error) is RuntimeError and "gloo" in str(error):
            leave(store)
        if rank():
            time.sleep(PATIENCE)
        speaking.acquire()
        store.add("said", 1)
        raise
    dist.destroy_process_group()  # not after an error: others would find us gone before we have said why


def listen(store, n):
    """
    Look out for the SIGTERM that torchrun sends to all n ranks once one has gone. The main thread may wait for what
    that one would have sent, deaf to signals, with NCCL without end. So another hears them: who does not answer has
    gone.
    """
    def watch():
        while signal.SIGTERM not in os.read(heard, 1):
            pass
        store.add("answered", 1)
        for _ in range(10 * PATIENCE):
            if store.check(["said"]):
                break
            if store.add("answered", 0) == n:  # it was not because of a rank that torchrun asks us to end
                return
            time.sleep(0.1)
        leave(store)

    def end(signum, frame):
        """What SIGTERM does as long as nothing else is to be done: an end as by Ctrl-C, if no rank has gone."""
        if not speaking.locked():  # else this end is near anyhow
            watcher.join()
            raise KeyboardInterrupt

    heard, signals = os.pipe()
    os.set_blocking(signals, False)
    signal.set_wakeup_fd(signals)
    signal.signal(signal.SIGTERM, end)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()


def leave(store):
    """End this process, because another rank has gone, at once: NCCL waits for it even then. Say so, if nobody has."""
    speaking.acquire()
    if store.add("said", 1) == 1:  # and end the line of what rank 0 was writing, as a bar
        print("\nerror: another rank has gone, see torchrun's report: --train.resume=true continues from the last "
              "checkpoint", file=sys.__stderr__)
    for stream in (sys.__stdout__, sys.__stderr__):
        stream.flush()
    os._exit(1)


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
    """This rank's rows of x (B, ...): as many as the others', or one less; of fewer rows than ranks, one at least."""
    return x.tensor_split(world())[rank() % len(x)]


def replicated(model):
    """The model, its gradients the mean over ranks of what each has computed: DDP, unless it is sharded."""
    return DistributedDataParallel(model) if world() > 1 and not is_sharded(model) else model


def keeping(model, more):
    """
    Inside, with more micro-batches to come, gradients of a replicated model stay on their rank. Those of a sharded one
    are dealt out each time: kept, they would be as large as the whole model.
    """
    return model.no_sync() if more and hasattr(model, "no_sync") else nullcontext()


# -----------------------------------------------------------------------------
# Sharding, by torch's FSDP2 (fully_shard; Zhao et al. 2023): each rank holds its rows of every parameter as a DTensor,
# and so of its gradient and of what optimizers keep for it. A layer is gathered while it computes. Torch's functions
# are imported where they are used because that takes a second.


def sharded(model, device, dtype):
    """
    The model on the device, of whose parameters this rank holds its rows only; of one rank, all. Layers are gathered
    one by one, and what is called from outside its layer, BART's c_kv, by itself. dtype: of autocast. On a GPU layers
    are gathered in it: autocast would make, and keep for the backward pass, such a copy of each whole matrix.
    """
    if world() == 1:
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.split(":")[0], (world(),))
    gathered_as = dtype if device.startswith("cuda") else None
    policy = MixedPrecisionPolicy(gathered_as, torch.float32, cast_forward_inputs=False)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views that we do not write to
    layers = [module for name, module in model.named_modules() if re.search(r"\.(\d+|c_kv)$", name)]
    for layer in reversed(layers):  # the inner ones first
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model):
    return hasattr(model, "unshard")


@contextmanager
def at_hand(model):
    """Inside, parts of a sharded model can be called without it: what is in no layer is gathered and stays so."""
    if is_sharded(model):
        model.unshard()
    yield
    if is_sharded(model):
        model.reshard()


def whole(x):
    """A tensor, of which each rank may hold its rows only: all of it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gathered(x):
    """The same on the CPU of rank 0, for the disk; on other ranks, which must ask as well, None."""
    x = whole(x.detach())
    return None if rank() else x.cpu().contiguous()


@torch.no_grad()
def part(x, like):
    """Of a whole tensor x, what this rank holds of a parameter or so that is like it: its rows, or x."""
    if not hasattr(like, "to_local") or x.shape != like.shape:
        return x
    out = torch.empty_like(like, dtype=x.dtype)
    mine, n = out.to_local(), -(-len(x) // world())  # the last ranks may have fewer than n rows, or none
    mine.copy_(x[rank() * n :][: len(mine)])
    return out


# -----------------------------------------------------------------------------


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
