"""
Checkpoints that survive anything: a kill, a full disk, a flipped bit.

A run's directory holds folders step-00000200, each a complete Hugging Face directory (see weights.py) with, besides,
training.safetensors (optimizers and random number generators), training.json (step and whatever the run notes) and
manifest.json (size and sha256 of every file). A folder is written under a hidden name, brought to the disk, and only
then renamed: what is called step-* is whole, unless the disk changed it later, which the manifest tells.
"""

import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plumbing import ranks
from plumbing.errors import UserError
from plumbing.files import read_json, write_json
from plumbing.manifests import MANIFEST, checkpoints, describe, newest
from plumbing.weights import Uninitialised, load_model, save_pretrained


@dataclass
class Checkpoint:
    path: Path
    step: int
    extra: dict       # what save_checkpoint was given
    optimizers: list  # of each the groups: which parameters are in them, and their options

    def restore(self, model, optimizers=()):
        """
        Put the run back where it was: weights and optimizer states into these live objects, and the states of the
        random number generators. Raises UserError if they are not of the same shape as those saved.
        """
        load_weights(model, self.path)
        tensors = load_file(self.path / "training.safetensors")
        names = {p: name for name, p in model.named_parameters()}
        named = [[sorted(names[p] for p in group["params"]) for group in optimizer.param_groups]
                 for optimizer in optimizers]
        if named != [[sorted(group["params"]) for group in groups] for groups in self.optimizers]:
            raise UserError(f"{self.path} has other parameters in its {len(self.optimizers)} optimizers than this run; "
                            f"use its configuration")
        for i, (optimizer, groups) in enumerate(zip(optimizers, self.optimizers)):
            prefix = f"optimizer.{i}."
            unpack(model, optimizer, groups,
                   {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})
        torch.set_rng_state(tensors["rng.cpu"])
        for i in range(torch.cuda.device_count()):
            if f"rng.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)


def load_weights(model, path):
    """The weights of a model's directory into this live model. Raises UserError if they are of other shapes."""
    saved = load_model(path)
    live = model.state_dict()
    try:
        model.load_state_dict({name: ranks.part(x, live.get(name, x)) for name, x in saved.state_dict().items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is of another model than this one ({reason}); use its config") from None


def save_checkpoint(run_dir, step, model, tokenizer, optimizers, extra, keep=2):
    """
    Save a run at `step` and return the folder. `extra` is a dict for JSON; its "val_loss", if there is one, says which
    checkpoint is the best. Of this and earlier steps, the last `keep` and the best stay; the others go once this one is
    in place. Raises UserError if it cannot be written; what was there before then still is. Of several ranks, all must
    call, since each may hold a part, and the first writes.
    """
    return write_checkpoint(Path(run_dir), step, whole(model), tokenizer, [pack(model, each) for each in optimizers],
                            extra, keep)


@ranks.first
def write_checkpoint(run_dir, step, model, tokenizer, optimizers, extra, keep):
    """What save_checkpoint() does once everything is in one place. optimizers: packed."""
    final = run_dir / f"step-{step:08d}"
    temporary = run_dir / f".tmp-{step:08d}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for stale in run_dir.glob(".tmp-*"):  # of runs that were killed
            shutil.rmtree(stale)
        save_pretrained(temporary, model, tokenizer)
        tensors, groups = {"rng.cpu": torch.get_rng_state()}, []
        if torch.cuda.is_initialized():
            tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        for i, (state, options) in enumerate(optimizers):
            tensors |= {f"optimizer.{i}.{name}": x for name, x in state.items()}
            groups.append(options)
        save_file(tensors, temporary / "training.safetensors")
        write_json(temporary / "training.json", {"step": step, "extra": extra, "optimizers": groups})
        write_json(temporary / MANIFEST, describe(temporary))
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        if final.exists():  # it keeps a name that loads until the new one has its own
            discard(aside(final))
            final.rename(aside(final))
        temporary.rename(final)
        fsync(run_dir)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot save step {step} in {run_dir}: {error}; earlier ones are as they were") from None
    prune(run_dir, step, keep)
    return final


def whole(model):
    """On rank 0, a sharded model in one piece on the CPU, of the class that it was of before; any other as it is."""
    if not ranks.is_sharded(model):
        return model
    state = model.state_dict(keep_vars=True)
    found = {x: ranks.gathered(x) for x in dict.fromkeys(state.values())}  # tied ones once
    if ranks.rank():
        return model
    found = {x: torch.nn.Parameter(full) if isinstance(x, torch.nn.Parameter) else full for x, full in found.items()}
    with torch.device("meta"), Uninitialised():
        model = type(model)(model.config)  # a class of fully_shard's, whose new objects are of the one it was made from
    model.load_state_dict({name: found[x] for name, x in state.items()}, assign=True)
    return model


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside(path):
    return path.with_name(f"{path.name}-replaced")


def discard(path):
    """Remove a folder, if it can be. It loses its name first: a kill meanwhile leaves no half of it there."""
    gone = path.with_name(f".tmp-{path.name}")
    with suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone)


def prune(run_dir, step, keep):
    found = checkpoints(run_dir)
    spent = [aside(path) for _, path in found if aside(path).exists()]
    past = [path for n, path in found if n <= step and path not in spent]  # newest first
    losses = {}
    for path in past:
        try:
            losses[path] = float(read_json(path / "training.json")["extra"]["val_loss"])
        except (UserError, KeyError, TypeError, ValueError):
            continue  # no loss recorded, or not readable: no candidate
    best = min((path for path, loss in losses.items() if math.isfinite(loss)), key=losses.get, default=None)
    for path in spent + [path for path in past[keep:] if path != best]:
        discard(path)


def load_checkpoint(run_dir):
    """
    The newest valid Checkpoint of a run, None if there is none at all. One that is damaged is passed over, with a line
    on stderr. Raises UserError if all are damaged.
    """
    path = newest(run_dir)
    if path is None:
        return None
    training = read_json(path / "training.json")
    for key, kind in {"step": int, "extra": dict, "optimizers": list}.items():
        if type(training.get(key)) is not kind:
            raise UserError(f"{path / 'training.json'}: {key} is {training.get(key)!a:.60}, no {kind.__name__}; "
                            f"remove {path} to go on from the checkpoint before it")
    return Checkpoint(path, training["step"], training["extra"], training["optimizers"])


# -----------------------------------------------------------------------------
# Optimizers, by the names of parameters: an index would change its meaning with the order of the groups. The functions
# are torch's; they are imported where they are used because that takes half a second.


def pack(model, optimizer):
    """(tensors, groups) of an optimizer whose state is tensors: {"name:key": tensor}, and its options for JSON."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    new = not optimizer.state
    named = get_optimizer_state_dict(model, optimizer)
    if new:  # torch has made it take a step of zeros to see what its state will be
        optimizer.state.clear()
        named["state"] = {}
    tensors = {f"{name}:{key}": ranks.gathered(x) for name, of_one in named["state"].items()
               for key, x in of_one.items()}
    return tensors, [{"params": group.pop("params"), "options": group} for group in named["param_groups"]]


def unpack(model, optimizer, groups, tensors):
    """The reverse of pack, into a live optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
    params, state = dict(model.named_parameters()), {}
    for name, x in tensors.items():
        name, key = name.split(":")
        x = ranks.part(x, params[name])
        like = torch.empty_like(params[name], dtype=x.dtype) if x.ndim else x.clone()
        state.setdefault(name, {})[key] = like.copy_(x)  # in memory of its own, laid out as the parameter
    groups = [{"params": group["params"]} | {key: tuple(value) if isinstance(value, list) else value  # as JSON has it
              for key, value in group["options"].items()} for group in groups]
    set_optimizer_state_dict(model, optimizer, optim_state_dict={"state": state, "param_groups": groups},
                             options=StateDictOptions(strict=False))  # what never had a gradient has no state
