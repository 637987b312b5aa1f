"""A training run on disk: its checkpoints, its log, its loss curve, and stopping it without losing anything."""

import json
import os
import signal
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from plumbing import loggers, ranks
from plumbing.checkpoints import load_checkpoint, load_weights, save_checkpoint
from plumbing.config import build
from plumbing.data import DataConfig
from plumbing.errors import NonFiniteError, UserError
from plumbing.files import lock, read_bytes
from plumbing.manifests import newest
from plumbing.tokenizers import load_tokenizer
from plumbing.weights import locate

# what a resumed run must have in common with the run it continues: all of these sections (None), or some of their keys
RESUMABLE = {"model": None, "data": None, "text": None, "train": ("seed", "batch_size", "accumulation", "optimizer",
             "weight_decay", "beta2")}  # the optimizers come back with their own, and would not hear of others
MAX_LOG = 2**31  # bytes of a log.jsonl


def trained_on(directory, source=None):
    """
    The DataConfig of the run in a directory, but for another data.source if one is given; None where is neither. Raises
    UserError where there is no model at all.
    """
    run = load_checkpoint(directory)
    if run is None:
        locate(directory)
    values = (run.extra["data"] if run else {}) | ({"source": source} if source else {})
    return build(DataConfig, values, "data") if values else None


class Run:
    """
    The run in a directory. step and val_loss: where its newest checkpoint stands, 0 and None for a new run; tokenizer:
    the checkpoint's, or that of the model init_from, whose weights a new run begins with. Raises UserError if there is
    a run and `resume` was not asked for: a run is never overwritten; and if another process is training there. Of
    several ranks, all read and only the first writes.
    """

    def __init__(self, out_dir, resume, init_from=None):
        self.out, self.asked, self.stop, self.val_loss, self.locked = Path(out_dir), False, False, None, None
        self.lock()
        self.checkpoint = load_checkpoint(self.out)
        self.step = self.checkpoint.step if self.checkpoint else 0
        if self.checkpoint and not resume:
            raise UserError(f"{self.out} holds a run at step {self.step}: pass --train.resume=true to continue it, or "
                            f"another --train.out_dir")
        self.origin = self.checkpoint.path if self.checkpoint else init_from and locate(init_from)
        self.tokenizer = load_tokenizer(self.origin) if self.origin else None
        if self.origin and self.tokenizer is None:
            raise UserError(f"{self.origin} has no tokenizer: put its vocab.json and merges.txt (or tokenizer.json) "
                            f"there")

    def restore(self, model, optimizers, described):
        """
        Make everything what it was at the checkpoint, if there is one, and forget what was logged after it; or the
        weights those of init_from.
        described: the settings as dicts, saved with every checkpoint.
        """
        self.described = described
        was = self.checkpoint.extra if self.checkpoint else described
        for section, keys in RESUMABLE.items():
            for key in keys or described[section]:
                now, then = described[section][key], was.get(section, {}).get(key)
                if then != now and key != "python":  # the text's hash tells more than its Python
                    raise UserError(f"{section}.{key} is {now!r}, but the run in {self.out} has {then!r}: "
                                    f"resume it with what it had")
        if self.checkpoint:
            self.checkpoint.restore(model, optimizers)
            self.val_loss = was.get("val_loss")
        elif self.origin:
            load_weights(model, self.origin)
        self.rewind_log()

    @ranks.first
    def lock(self):
        """Keep other trainings out of the directory, once it is there, as long as this object and its process live."""
        if self.locked or not self.out.is_dir():
            return
        handle = lock(self.out, f"another training is at work in {self.out}: wait for its end, or name another "
                                f"--train.out_dir")
        self.locked = weakref.finalize(self, os.close, handle)

    @ranks.first
    def rewind_log(self):
        """Keep of log.jsonl what happened up to the checkpoint, the rest will happen again; begin the other log."""
        lines = [json.dumps(line) + "\n" for line in self.history() if line["step"] <= self.step]
        beside = self.out / ".log.jsonl"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock()
            beside.write_text("".join(lines))
            beside.replace(self.out / "log.jsonl")  # a kill finds the old log or the new one, never half of it
        except OSError as error:
            raise UserError(f"cannot write in {self.out}: {error.strerror}; name another with --train.out_dir")
        self.also = loggers.begin(self.described["train"]["logger"], self.out, self.step, self.described)

    def history(self):
        """The lines of log.jsonl as dicts, without any that a power cut left unfinished or that hold no numbers."""
        path, lines = self.out / "log.jsonl", []
        for line in read_bytes(path, MAX_LOG).splitlines() if os.path.lexists(path) else []:
            try:
                numbers = {"step": 0} | json.loads(line)
                sum(numbers.values(), 0.0)  # all of them are some
            except (ValueError, TypeError, OverflowError, RecursionError):
                continue
            lines.append(numbers)
        return lines

    @ranks.first
    def log(self, step, **numbers):
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | numbers) + "\n")
        self.also(step, numbers)

    def save(self, step, model, optimizers, val_loss=None):
        """Save a checkpoint and only then say so. All ranks must call: each may hold a part."""
        self.val_loss = val_loss
        extra = self.described | {"val_loss": val_loss}
        path = save_checkpoint(self.out, step, model, self.tokenizer, optimizers, extra)
        tqdm.write(f"step {step}: saved {path}" + ("" if val_loss is None else f", held-out loss {val_loss:.4f}"))
        sys.stdout.flush()

    def steps(self, last):
        """The numbers of the steps that are left, counted by self.bar; once self.stop is set, the next is not begun."""
        with tqdm(total=last, initial=self.step, unit="step", dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 15) as self.bar:
            for step in range(self.step + 1, last + 1):
                yield step
                self.bar.update()
                if self.stop:
                    raise KeyboardInterrupt

    def agree(self):
        """Set self.stop if any rank was asked to stop. Once in every step, so that all stop at the same one."""
        [self.stop] = ranks.total(self.asked)

    @contextmanager
    def stoppable(self):
        """
        Inside, a first Ctrl-C or SIGTERM is noted for agree(), to be honoured between two steps; a second one stops at
        once, if there is one rank: torchrun passes on a signal that all have had. A stop on a number that is none says
        where that was, what is left and what to do.
        """
        def ask(signum, frame):
            self.asked = True
            if ranks.world() == 1:
                signal.signal(signum, before[signum])

        before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except NonFiniteError as error:
            good = newest(self.out)
            left = f"the last good checkpoint is {good}: resume it" if good else "there is no checkpoint: begin again"
            lr = self.described["train"]["lr"]
            raise NonFiniteError(f"{error} at step {self.bar.n + 1}; {left} with a lower --train.lr (it was {lr:g}) or "
                                 f"--train.grad_clip") from None
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @ranks.first
    def plot(self):
        """Draw loss.png, where matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(7, 4))
        axes = figure.subplots()
        for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "held out")):
            points = [(line["step"], line[key]) for line in self.history() if key in line]
            axes.plot(*zip(*(points or [(0, float("nan"))])), style, label=label)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        figure.savefig(self.out / "loss.png", dpi=120, bbox_inches="tight")
