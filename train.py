"""
Train a GPT on a text, or a BART on pairs of texts. One straight loop.

    python train.py configs/gpt-tiny.toml
    python train.py configs/gpt-tiny.toml --data.source=my-notes.txt --train.out_dir=out/notes --train.steps=3000
    python train.py configs/gpt-tiny.toml --train.resume=true
    python train.py configs/gpt2-124m.toml --dry-run
    python train.py configs/gpt-tiny.toml --train.init_from=out/gpt-tiny --train.out_dir=out/further --train.lr=3e-3
    torchrun --nproc-per-node=2 train.py configs/gpt-tiny.toml

A configuration has three tables, [model], [data] and [train]; --section.key=value changes any of its values, and
--help lists them all. A run lives in its out_dir: step-*/ checkpoints, each a Hugging Face directory (the last two and
the best are kept), log.jsonl, and loss.png where matplotlib is installed. Ctrl-C saves and stops. --train.resume=true
continues from the newest checkpoint, bit for bit on a CPU as if the run had never stopped; a run that is there is
never overwritten. --dry-run tries a few steps, says what all would take, and keeps nothing. --train.init_from=DIR
begins a run with the weights and the tokenizer of a model instead of random ones: its matrices must have the shapes
that [model] says. Under torchrun, processes with a GPU each, or parts of a CPU, share the rows of every batch and do
the same run, by DDP, or with --train.shard=true by FSDP2: then each holds its part of weights, gradients and averages.
What some of them saved, any number resumes.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice

from plumbing.errors import NonFiniteError, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch
from torch.nn import functional as F
from tqdm import tqdm

from generate import generate
from model import BART, GPT
from plumbing import config as configs
from plumbing import loggers, ranks
from plumbing.data import IGNORE, DataConfig, load_data
from plumbing.meters import meter
from plumbing.models import PRESETS, check_memory, model_class, read_model_config
from plumbing.muon import Muon
from plumbing.runs import Run
from plumbing.utils import DTYPES, set_seed

GIVEN, WRITTEN = 8, 64  # tokens of a sample

@dataclass(slots=True)
class TrainConfig:
    out_dir: str = "out/run"
    init_from: str | None = None  # a model's directory or its name on the hub: what to begin with
    seed: int = 1337            # of the initial weights and of dropout; the data has its own
    steps: int = 2000           # optimizer steps
    batch_size: int = 12        # sequences in a micro-batch, of all ranks together
    accumulation: int = 1       # micro-batches in a step: their gradient is that of one batch of all of them
    optimizer: str = "adamw"    # or muon: orthogonalised momentum on the layers' matrices, AdamW on the rest
    lr: float = 1e-3            # peak learning rate, after the warm-up
    min_lr: float = 1e-4        # where its cosine ends
    warmup_steps: int = 100
    weight_decay: float = 0.1   # on matrices only
    beta2: float = 0.99         # AdamW's memory of squared gradients
    grad_clip: float = 1.0      # largest norm of a step's gradient
    eval_every: int = 250       # steps between evaluations, each followed by a checkpoint
    eval_batches: int | None = None  # held-out batches in an evaluation, None = all
    log_every: int = 10         # steps between lines of log.jsonl
    logger: str | None = None   # where these go besides: tensorboard, wandb, or MODULE:NAME, see plumbing/loggers.py
    sample_every: int | None = None  # steps between texts that the model writes, to be looked at; None = never
    device: str = "auto"
    dtype: str = "auto"         # of autocast: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    compile: bool = False       # torch.compile the model: worth its wait on a GPU
    shard: bool = False         # each of torchrun's ranks holds a part of the model, for one that does not fit a GPU
    resume: bool = False        # continue the run that is in out_dir

    def validate(self):
        least = {"steps": 1, "batch_size": 1, "accumulation": 1, "warmup_steps": 0, "eval_every": 1, "log_every": 1,
                 "lr": 0, "min_lr": 0, "weight_decay": 0, "beta2": 0, "grad_clip": 1e-9, "seed": 0, "eval_batches": 1,
                 "sample_every": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < 2**63:
                raise UserError(f"train.{name}={value} must be at least {low} and less than 2**63")
        if self.beta2 >= 1:
            raise UserError(f"train.beta2={self.beta2} must be below 1, which would be a memory without end")
        if self.batch_size > 2**16:
            raise UserError(f"train.batch_size={self.batch_size} must be at most {2**16}: use train.accumulation")
        if self.batch_size % ranks.world():
            raise UserError(f"train.batch_size={self.batch_size} must be a multiple of torchrun's {ranks.world()} "
                            f"ranks, which share it: change one of the two")
        for name, allowed in {"optimizer": ("adamw", "muon"), "dtype": ("auto", "float32", "bfloat16")}.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"train.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.logger is not None:
            loggers.find(self.logger)


# -----------------------------------------------------------------------------


def lr_at(step, config):
    """Learning rate of a step: a linear warm-up, then half a cosine from lr down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def make_optimizers(model, config):
    """
    AdamW, with weight decay on matrices only (a norm's gain or a bias has no reason to be small); or Muon (Jordan
    et al. 2024) for the matrices inside the layers, and AdamW for the rest: embeddings, head, vectors.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = [name for name, p in trained.items() if config.optimizer == "muon" and p.dim() == 2
             and not name.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))]  # in the same order on all ranks
    matrices = [p for name, p in trained.items() if p.dim() >= 2 and name not in inner]
    vectors = [p for p in trained.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = config.device.startswith("cuda") or None  # elsewhere as torch sees fit
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=fused)]
    if inner:  # its updates rescaled to the size of AdamW's, so that one learning rate serves both
        optimizers.append(Muon([trained[name] for name in inner], lr=config.lr, momentum=0.9,
                               weight_decay=config.weight_decay))
    return optimizers


def loss_sum(model, inputs, labels):
    """Cross-entropy summed over the labels that count, in nats, and the logits (B, T, V) it came from."""
    logits = model(*inputs)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"), logits


def to(device, batch):
    """This rank's rows of a batch, on the device."""
    inputs, labels = batch
    cuda = device.startswith("cuda")  # where a copy from pinned memory waits in the GPU's queue, and we need not
    *inputs, labels = ((x.pin_memory() if cuda else x).to(device, non_blocking=cuda)
                       for x in map(ranks.share, (*inputs, labels)))
    return tuple(inputs), labels


@torch.no_grad()
def evaluate(model, batches, device, autocast, loss_sum=loss_sum):
    """
    Mean loss per held-out token in nats, and the fraction of rows in which every token is predicted. For BART that
    is the exact match of greedy decoding: as long as each choice equals the target, the decoder reads the target.
    The model may stay in train mode: there is no dropout where no gradients are recorded.
    """
    total = tokens = exact = rows = 0
    for batch in batches:
        inputs, labels = to(device, batch)
        with autocast:
            loss, logits = loss_sum(model, inputs, labels)
        if ranks.rank() >= len(batch[1]):  # the last batch has fewer rows than there are ranks: it computed for company
            continue
        total, tokens = total + loss.item(), tokens + (labels != IGNORE).sum().item()
        right = (logits.argmax(-1) == labels) | (labels == IGNORE)  # (B, T)
        exact, rows = exact + right.all(1).sum().item(), rows + len(labels)
    total, tokens, exact, rows = ranks.total(total, tokens, exact, rows)
    if not math.isfinite(total):  # said before a checkpoint is made of such weights
        raise NonFiniteError(f"the held-out loss is {total / tokens:.4g}")
    return total / tokens, exact / rows


def sample(model, data, tokenizer):
    """What the model makes of the first held-out text: it goes on after a few tokens, or answers the source. Greedy."""
    (first, *_), _ = next(data.val_batches(batch_size=1, block_size=model.config.block_size))
    given = first[0].tolist() if model.config.is_encoder_decoder else first[0, :GIVEN].tolist()
    room = model.config.block_size - model.config.starts(len(given))
    [new] = generate(model, [given], min(WRITTEN, room))
    return f"{tokenizer.decode(given)!r} -> {tokenizer.decode(new)!r}"


def update(model, optimizers, batches, config, autocast, loss_sum=loss_sum):
    """
    One optimizer step on the mean loss over all labels of the micro-batches (not a mean of means: they, and ranks, may
    differ in how many labels they hold). Returns that loss, the gradient's norm before clipping, and how many labels.
    """
    count = ranks.mean(sum((labels != IGNORE).sum() for _, labels in batches))  # a mean, as the gradient will be one
    loss = 0.0
    for i, (inputs, labels) in enumerate(batches, start=1):
        with ranks.keeping(model, i < len(batches)):
            with autocast:
                part = loss_sum(model, inputs, labels)[0] / count
            part.backward()
        loss += part.detach()
    loss = ranks.mean(loss)
    norm = ranks.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip))
    loss, norm, count = loss.item(), norm.item(), count.item()  # all here: later they would wait for the step as well
    if not math.isfinite(loss + norm):  # looked at before the step, so that the weights are still the good ones
        raise NonFiniteError(f"the loss is {loss:.4g} and its gradient's norm {norm:.4g}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm, count * ranks.world()


# -----------------------------------------------------------------------------


def train(model_values, data_config, config):
    """Train as configured, anew or from the newest checkpoint in out_dir. Returns the last held-out loss, in nats."""
    config = settled(config)
    this_run, data, model, optimizers = set_up(model_values, data_config, config)
    loop(this_run, data, model, optimizers, config)
    this_run.plot()
    return this_run.val_loss


def settled(config):
    """The same TrainConfig with the device and the dtype that are meant by "auto" here."""
    device = ranks.device(config.device)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    return replace(config, device=device, dtype=dtype)


def autocast_of(config):
    return torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.dtype == "bfloat16")


def set_up(model_values, data_config, config):
    """The run, its data, its model and optimizers, new or as they were at the newest checkpoint."""
    this_run = Run(config.out_dir, config.resume, config.init_from)
    set_seed(config.seed)
    cls = model_class(model_values)
    data, this_run.tokenizer = load_data(data_config, seq2seq=cls is BART, tokenizer=this_run.tokenizer)
    model_config = read_model_config(model_values, this_run.tokenizer)
    each = 16 / ranks.world() if config.shard else 16  # bytes: a weight, its gradient, AdamW's two averages
    check_memory("training this model", model_config, each, config.device)
    shape = {"batch_size": config.batch_size, "block_size": model_config.block_size}
    data.batch_at(0, **shape), next(data.val_batches(**shape))  # a text that does not fit is found out before we write
    model = cls(model_config)
    model = ranks.sharded(model, config.device, DTYPES[config.dtype]) if config.shard else model.to(config.device)
    optimizers = make_optimizers(model, config)
    this_run.restore(model, optimizers, {"model": asdict(model.config), "data": asdict(data_config),
                                         "text": data.identity, "train": asdict(config)})
    if ranks.rank():  # its dropout is its own; the checkpoint has that of rank 0
        set_seed(hash((config.seed, this_run.step, ranks.rank())) % 2**63)
    print(f"{model.count_parameters():,} parameters, {this_run.tokenizer.n_vocab:,} tokens in the vocabulary, "
          f"on {config.device} in {config.dtype}")
    if this_run.step >= config.steps:
        print(f"the run in {config.out_dir} is at step {this_run.step} already: raise --train.steps to go on")
    return this_run, data, model, optimizers


def loop(this_run, data, model, optimizers, config):
    """The steps that are left, with a look at the held-out data and a checkpoint every eval_every of them."""
    autocast = autocast_of(config)
    compute = torch.compile(loss_sum) if config.compile else loss_sum  # with the loss: its logits are what is large
    replica = ranks.replicated(model)
    shape = {"batch_size": config.batch_size, "block_size": model.config.block_size}
    with autocast:  # without it, layers that are gathered in bfloat16 would meet float32
        measured = meter(model, data.batch_at(0, **shape), config)
    with this_run.stoppable():
        for step in this_run.steps(config.steps):
            started, lr = time.perf_counter(), lr_at(step - 1, config)
            set_lr(optimizers, lr)
            micro = range((step - 1) * config.accumulation, step * config.accumulation)
            batches = [to(config.device, data.batch_at(i, **shape)) for i in micro]
            loss, norm, tokens = update(replica, optimizers, batches, config, autocast, compute)
            speed = tokens / (time.perf_counter() - started)
            this_run.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:,.0f}", refresh=False)
            this_run.agree()
            if step % config.log_every == 0:
                this_run.log(step, loss=loss, lr=lr, grad_norm=norm, tokens_per_second=speed, **measured(speed))
            if step % config.eval_every == 0 or step == config.steps:
                held_out = islice(data.val_batches(**shape), config.eval_batches)
                val_loss, exact = evaluate(model, held_out, config.device, autocast, compute)
                per_character = val_loss / data.chars_per_token
                this_run.log(step, val_loss=val_loss, nats_per_character=per_character, exact_match=exact)
                this_run.save(step, model, optimizers, val_loss)
            elif this_run.stop:
                this_run.save(step, model, optimizers)
            if config.sample_every and step % config.sample_every == 0:
                with ranks.at_hand(model), autocast:
                    text = sample(model, data, this_run.tokenizer)
                tqdm.write(f"step {step}: {text}")


def read(args):
    """A configuration's path and its overrides as the arguments of train()."""
    if not args or args[0].startswith("--"):
        raise UserError("name a configuration first, e.g. python train.py configs/gpt-tiny.toml")
    values = configs.read(args[0], args[1:], ("model", "data", "train"))
    return (values["model"], configs.build(DataConfig, values["data"], "data"),
            configs.build(TrainConfig, values["train"], "train"))


def main(args=None):
    args = sys.argv[1:] if args is None else args
    if "-h" in args or "--help" in args:
        settings = configs.describe(model=GPT.get_default_config(), data=DataConfig(), train=TrainConfig())
        print(f"{__doc__}\n{settings}\n\n[model] also takes type (gpt or bart) and preset "
              f"({', '.join(PRESETS)}); a bart has n_encoder_layer and n_decoder_layer.")
        return
    with ranks.joined():
        if "--dry-run" not in args:
            train(*read(args))
        else:
            from plumbing import train_bench  # which imports this file
            print(train_bench.dry_run([arg for arg in args if arg != "--dry-run"]))


if __name__ == "__main__":
    run(main)
