"""
Checkpoints that survive anything: a kill, a full disk, a flipped bit.

A run's directory holds folders step-00000200, each a complete Hugging Face directory (see weights.py) with, besides,
training.safetensors (optimizers and random number generators), training.json (step and whatever the run notes) and
manifest.json (size and sha256 of every file). A folder is written under a hidden name, brought to the disk, and only
then renamed: what is called step-* is whole, unless the disk changed it later, which the manifest tells.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plumbing.errors import UserError
from plumbing.files import read_json
from plumbing.manifests import MANIFEST, checkpoints, describe, newest
from plumbing.weights import load_pretrained, save_pretrained


@dataclass
class Checkpoint:
    path: Path
    step: int
    extra: dict       # what save_checkpoint was given
    optimizers: list  # their groups and scalars, by parameter name

    def restore(self, model, optimizers=()):
        """
        Put the run back where it was: weights and optimizer states into these live objects, and the states of the
        random number generators. Raises UserError if they are not of the same shape as those saved.
        """
        saved, _ = load_pretrained(self.path)
        try:
            model.load_state_dict(saved.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{self.path} is of another model than this one ({reason}); use its config") from None
        tensors = load_file(self.path / "training.safetensors")
        if len(optimizers) != len(self.optimizers):
            raise UserError(f"{self.path} has {len(self.optimizers)} optimizers, not {len(optimizers)}; use its "
                            f"configuration")
        for i, (optimizer, groups) in enumerate(zip(optimizers, self.optimizers)):
            prefix = f"optimizer.{i}."
            unpack(optimizer, groups, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)},
                   names_of(model), self.path)
        torch.set_rng_state(tensors["rng.cpu"])
        for i in range(torch.cuda.device_count()):
            if f"rng.cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)


def save_checkpoint(run_dir, step, model, tokenizer, optimizers, extra, keep=2):
    """
    Save a run at `step` and return the folder. `extra` is a dict for JSON; its "val_loss", if there is one, says which
    checkpoint is the best. Of this and earlier steps, the last `keep` and the best stay; the others go once this one is
    in place. Raises UserError if it cannot be written; what was there before then still is.
    """
    run_dir = Path(run_dir)
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
        for i, optimizer in enumerate(optimizers):
            states, scalars = pack(optimizer, names_of(model))
            tensors |= {f"optimizer.{i}.{name}": x for name, x in states.items()}
            groups.append(scalars)
        save_file(tensors, temporary / "training.safetensors")
        write_json(temporary / "training.json", {"step": step, "extra": extra, "optimizers": groups})
        write_json(temporary / MANIFEST, describe(temporary))
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        if final.exists():  # it keeps a name that loads until the new one has its own
            shutil.rmtree(aside(final), ignore_errors=True)
            final.rename(aside(final))
        temporary.rename(final)
        fsync(run_dir)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot save step {step} in {run_dir}: {error}; earlier ones are as they were") from None
    prune(run_dir, step, keep)
    return final


def aside(path):
    return path.with_name(f"{path.name}-replaced")


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
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(run_dir):
    """
    The newest valid Checkpoint of a run, None if there is none at all. One that is damaged is passed over, with a line
    on stderr. Raises UserError if all are damaged.
    """
    path = newest(run_dir)
    if path is None:
        return None
    training = read_json(path / "training.json")
    return Checkpoint(path, training["step"], training["extra"], training["optimizers"])


# -----------------------------------------------------------------------------
# Optimizers, keyed by the names of parameters: an index would change its meaning with the order of the groups


def names_of(model):
    return {p: name for name, p in model.named_parameters()}


def pack(optimizer, names):
    """(tensors, groups) of any torch optimizer: {"name:key": tensor}, and its hyperparameters and scalars for JSON."""
    plain = lambda x: x.item() if isinstance(x, torch.Tensor) else x
    tensors, groups = {}, []
    for group in optimizer.param_groups:
        options = {key: plain(value) for key, value in group.items() if key != "params"}
        groups.append({"params": [names[p] for p in group["params"]], "options": options, "scalars": {}})
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{names[p]}:{key}"] = value.detach().cpu().contiguous()
                else:
                    groups[-1]["scalars"].setdefault(names[p], {})[key] = value
    return tensors, groups


def unpack(optimizer, groups, tensors, names, path):
    """The reverse of pack, into a live optimizer. Raises UserError if it holds other parameters."""
    live = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if [sorted(group) for group in live] != [sorted(group["params"]) for group in groups]:
        raise UserError(f"{path} has other parameters in its optimizer than this run; use its configuration")
    states = {name: dict(scalars) for group in groups for name, scalars in group["scalars"].items()}
    params = {name: p for p, name in names.items()}
    for name, value in tensors.items():
        name, key = name.split(":")
        like = torch.empty_like(params[name], dtype=value.dtype, device="cpu") if value.ndim else value.clone()
        states.setdefault(name, {})[key] = like.copy_(value)  # in memory of its own, laid out as the parameter
    state_dict = optimizer.state_dict()
    order = {i: name for group, members in zip(state_dict["param_groups"], live)
             for i, name in zip(group["params"], members)}
    state_dict["state"] = {i: states[name] for i, name in order.items() if name in states}
    for group, saved in zip(state_dict["param_groups"], groups):
        for key, value in saved["options"].items():  # JSON knows no tuples
            group[key] = tuple(value) if isinstance(value, list) else value
    optimizer.load_state_dict(state_dict)


# -----------------------------------------------------------------------------
# Files


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
