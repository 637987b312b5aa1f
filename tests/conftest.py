"""What tests share: programs called as a shell calls them, and two tiny models that were really trained."""

import io
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
torch.set_num_threads(1)  # tiny models are slower on more

import train
from plumbing.errors import run
from plumbing.weights import load_pretrained

ROOT = Path(__file__).parent.parent
TEXT = "the cat 😀 sat on the mat, 你好 said the dog.\nthe dog ate the hat and ran away.\n" * 60
GPT_TOML = """
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 64
embd_pdrop = 0.0
attn_pdrop = 0.0
resid_pdrop = 0.0
[data]
source = "{source}"
tokenizer = "byte"
[train]
steps = 120
batch_size = 8
optimizer = "muon"
lr = 1e-2
warmup_steps = 5
eval_every = 60
eval_batches = 4
device = "cpu"
"""
BART_TOML = """
[model]
type = "bart"
n_encoder_layer = 1
n_decoder_layer = 2
n_head = 4
n_embd = 32
block_size = 12
embd_pdrop = 0.0
attn_pdrop = 0.0
resid_pdrop = 0.0
[data]
source = "reverse"
tokenizer = "char"
min_length = 1
max_length = 5
n_train = 3000
n_val = 100
[train]
steps = 200
batch_size = 32
optimizer = "muon"
lr = 1e-2
warmup_steps = 5
eval_every = 200
device = "cpu"
"""

Outcome = namedtuple("Outcome", "code out err")


def call(main, *args, stdin=b""):
    """What `python PROGRAM.py args` would do, without the seconds of starting it: exit code, stdout and stderr."""
    streams = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors, newline="\n")
                                         for data, errors in ((stdin, "strict"), (b"", "strict"), (b"", "backslashreplace")))
    try:
        run(lambda: main([str(arg) for arg in args]))
    except SystemExit as exit:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return Outcome(exit.code or 0, *(s.buffer.getvalue().decode() for s in (sys.stdout, sys.stderr)))
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams


def shell(program, *args, stdin=None, **kwargs):
    """The same as a real process, started and not waited for."""
    return subprocess.Popen([sys.executable, ROOT / program, *map(str, args)], stdin=stdin, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def finish(process, stdin=None):
    out, err = process.communicate(stdin, timeout=60)
    return Outcome(process.returncode, out.decode(), err.decode())


def train_run(folder, toml, *overrides):
    """Train in-process, in a folder that gets config.toml, text.txt and out/. Returns the Outcome; it must succeed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    (folder / "config.toml").write_text(toml.replace("{source}", str(folder / "text.txt")))
    outcome = call(train.main, folder / "config.toml", f"--train.out_dir={folder / 'out'}", *overrides)
    assert outcome.code == 0, outcome
    return outcome


Tiny = namedtuple("Tiny", "model tokenizer path")


@pytest.fixture(scope="session")
def tiny_gpt(tmp_path_factory):
    """(model, tokenizer, path of the run): two layers, bytes, trained on a text with emoji; block_size 64."""
    folder = tmp_path_factory.mktemp("tiny-gpt")
    train_run(folder, GPT_TOML)
    return Tiny(*load_pretrained(folder / "out"), folder / "out")


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory):
    """(model, tokenizer, path of the run): it reverses up to five letters, and is not always right; block_size 12."""
    folder = tmp_path_factory.mktemp("tiny-bart")
    train_run(folder, BART_TOML)
    return Tiny(*load_pretrained(folder / "out"), folder / "out")
