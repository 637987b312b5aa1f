"""
Where the numbers of log.jsonl go besides, as --train.logger says: to tensorboard, to wandb, or to MODULE:NAME, which is
one's own. What has such a name is called once, with the run's directory (a Path), the step where the run stands, and
its settings (a dict of dicts); what it returns is called with (step, numbers) for every line.
"""

import sys
from functools import partial
from importlib import import_module

from tqdm import tqdm

from plumbing.errors import UserError
from plumbing.utils import find_own


def tensorboard(SummaryWriter, out, step, settings):
    """Into a directory of the run: tensorboard --logdir OUT_DIR."""
    writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)  # what will happen again is not shown twice

    def log(step, numbers):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    return log


def wandb(init, out, step, settings):
    """To where wandb's own settings say (WANDB_PROJECT, WANDB_MODE); it keeps what it has of steps that come again."""
    mark = out / "wandb-id"
    known = mark.read_text() if step and mark.exists() else None
    live = init(id=known, resume="allow", reinit="finish_previous", dir=out.absolute(), name=out.name, config=settings,
                allow_val_change=True)
    mark.write_text(live.id)
    return lambda step, numbers: live.log(numbers, step=step)


KNOWN = {"tensorboard": (tensorboard, "torch.utils.tensorboard", "SummaryWriter"), "wandb": (wandb, "wandb", "init")}


def find(name):
    """What begins the log of that name, its library imported. Raises UserError where there is none."""
    if ":" in name:
        return find_own("train.logger", name)
    if name not in KNOWN:
        raise UserError(f"train.logger={name!r} is not one of {', '.join(KNOWN)}; one of your own is MODULE:NAME")
    make, library, part = KNOWN[name]
    try:
        return partial(make, getattr(import_module(library), part))
    except Exception as error:  # not there, a folder that happens to have its name, or broken
        raise UserError(f"train.logger={name!r} needs {name} ({error}): pip install {name}") from None


def begin(name, out, step, settings):
    """
    A function of (step, numbers) that logs under that name, or nowhere. It never raises: a training is worth more than
    its second log, which ends at the first error. Raises UserError if it cannot begin.
    """
    if name is None:
        return lambda step, numbers: None
    make = find(name)
    try:
        own = make(out, step, settings)
    except (Exception, SystemExit) as error:  # of a library, or of whoever wrote it
        raise UserError(f"train.logger={name!r}: {type(error).__name__}: {error}: mend it, or leave it out") from None

    def log(step, numbers):
        nonlocal own
        try:
            own(step, numbers)
        except (Exception, SystemExit) as error:
            own = lambda step, numbers: None
            tqdm.write(f"train.logger={name!r} has ended at step {step}: {type(error).__name__}: {error}; log.jsonl "
                       f"and the training go on", file=sys.stderr)

    return log
