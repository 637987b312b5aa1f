"""
Command lines that nobody would type and model directories that nobody would save, made from seeds.

Whatever is asked of generate.py and bench.py, and whatever is in the files: they leave within seconds, in a few GB,
with an exit code that means something, and refuse in one line. Every case runs in a fork of this process, in a folder
of its own with tiny models. MINDECODE_CASES=2000 for the run that is recorded; -rP tells how they ended.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import bench
import generate
from plumbing.cli import UNSUPPORTED
from plumbing.errors import run
from plumbing.manifests import MANIFEST, describe
from plumbing.models import random_model
from plumbing.tokenizers import train_tokenizer
from plumbing.weights import BART_FIELDS, BART_FIXED, GPT_FIELDS, GPT_FIXED, save_pretrained

CASES = int(os.environ.get("MINDECODE_CASES", 50))
SECONDS, BYTES = 10, 3 * 2**30  # that a case may take
CRASHED = 70                    # the exit code of a traceback, which Python would end with 1

# -----------------------------------------------------------------------------
# Running them


def outcome(main, words, stdin, folder):
    """What a program does in a fork, in this folder: its exit code (-14: it hangs), stdout and stderr."""
    streams = [folder.with_name(name) for name in ("stdin", "stdout", "stderr")]
    streams[0].write_bytes(stdin)
    if not (child := os.fork()):
        code = CRASHED
        try:
            for fd, path in enumerate(streams):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | (fd and os.O_TRUNC)), fd)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="backslashreplace")
            os.chdir(folder)
            signal.alarm(SECONDS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES,) * 2)
            run(lambda: main(words))
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, *(path.read_text(encoding="utf-8") for path in streams[1:])


def right(words, code, out, err):
    """
    Whether a program may end so. That a damaged checkpoint was passed over is told besides; a line that cannot be
    answered comes after others in a chat.
    """
    lines = [line for line in err.splitlines() if not line.startswith("passed over")]
    if code == 2:
        return (not out or "--chat" in words) and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) <= 300
    return code in (0, 3) + (1,) * (words[0] == "compare") and "Traceback" not in err and "Warning" not in err


def run_all(make, places, tmp_path, monkeypatch):
    """Make and run the cases, and tell with which codes they ended, and of all that were wrong."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # a fork cannot use one that is in use
    codes, wrong = Counter(), ""
    for seed in range(CASES):
        rng, folder = random.Random(seed), tmp_path / "here"
        torch.manual_seed(seed)
        folder.mkdir()
        for path in places.iterdir():
            (folder / path.name).symlink_to(path) if path.is_dir() else shutil.copy(path, folder)
        main, words = make(rng, folder)
        found = outcome(main, words, rng.choice([b"cab"] * 8 + [b"", b"\xff", b"\n"]), folder)
        codes[found[0]] += 1
        if not right(words, *found):
            wrong += f"\n{seed}: {main.__module__} {words}: exit code {found[0]}\n{found[1][:300]}\n{found[2][-1500:]}"
        shutil.rmtree(folder)
    print(", ".join(f"{n} x {code}" for code, n in sorted(codes.items())))
    assert not wrong, wrong
    assert {0, 2} <= codes.keys()  # or they tell nothing


GPT = "[model]\nn_layer = 1\nn_head = 2\nn_embd = 8\nblock_size = 24\nvocab_size = 300\neos_id = 3\n"
BART = ('[model]\ntype = "bart"\nn_encoder_layer = 1\nn_decoder_layer = 1\nn_head = 2\nn_embd = 8\nblock_size = 12\n'
        'vocab_size = 40\n')
FILES = {"gpt.toml": GPT, "bart.toml": BART, "huge.toml": GPT.replace("24", "9" * 12), "garbage.toml": "a = = 3",
         "prompt.txt": "cab", "empty.txt": "", "latin.txt": "café", "lines.txt": "cab\na\nabcdefgh\nb\n",
         "lines.jsonl": '{"prompt": "cab"}\n{"prompt": "a", "max_new_tokens": 2}\n',
         "odd.jsonl": '{"prompt": "a"}\n{"prompt": 1}'}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The folder: models as strangers and as we would have saved them, and files that are none."""
    here = tmp_path_factory.mktemp("fuzz")
    for name, text in FILES.items():
        (here / name).write_text(text, encoding="latin-1")
    (here / "empty").mkdir()
    torch.manual_seed(0)

    def save(name, toml, tokenizer, *overrides):
        save_pretrained(here / name, random_model(str(here / toml), torch.float32, "cpu", overrides), tokenizer)

    bpe = train_tokenizer("bpe", 9 * "the cat ate the hat", 270)
    chars = train_tokenizer("char", "abcdefgh", seq2seq=True)
    save("gpt", "gpt.toml", bpe, f"--model.vocab_size={bpe.n_vocab}")
    save("bart", "bart.toml", chars)
    save("own", "gpt.toml", bpe, "--model.n_kv_head=1", "--model.tie_weights=false")  # of our own type, in two files
    tensors = load_file(here / "own" / "model.safetensors")
    for n, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, here / "own" / f"model-0000{n}-of-00002.safetensors")
    (here / "own" / "model.safetensors").unlink()
    (here / "own" / "model.safetensors.index.json").write_text('{"weight_map": {}}')  # which is not asked
    for name in ("run/step-00000001", "run/step-00000002", "worn/step-00000001", "worn/step-00000002"):
        save(name, "bart.toml", chars, "--model.n_kv_head=1")
        (here / name / MANIFEST).write_text(json.dumps(describe(here / name)))
    (here / "worn/step-00000002/config.json").write_text("{}")  # so the one before it counts
    return here


# -----------------------------------------------------------------------------
# Command lines

ODD = ["", " ", "-", "--", "0", "-0", "-1", "1", "2", "1.5", "-1e-3", "1e9", "1e400", "nan", "inf", "-inf", "+3", " 3",
       "1_0", "0x10", "\uff11\uff12", "\u0661", "9" * 12, "-" + "9" * 12, "9" * 19, "9" * 30, "9" * 5000, "true",
       "[]", '["a"]', "{a=1}", "1979-05-27", "'", '"', "a" * 5000, "a\nb", "\r", "\x1b[31m", "caf\udce9", "\ufeff", "😀",
       "%s", "%(prog)s", "{0}", "$HOME", "~", "*", ".", "..", "/", "/dev/null", "/dev/zero", "/etc/passwd/x", "none",
       "a/b", "a/b/c", "x" * 300, "gpt.toml/x", "--model", "-h", "compare", "cpu:0", "cpu:1", "meta", "float8", "gpt2",
       "empty", "gpt.toml", "garbage.toml", "prompt.txt", "latin.txt"]
SHARED = {  # flags and values that are right, or nearly so
    "--max-new-tokens": ["1", "2", "5", "11", "24", "100"], "--num-samples": ["1", "2", "3", "40", "1025"],
    "--beams": ["1", "2", "3", "40"], "--ignore-eos": None, "--json": None, "--device": ["cpu", "cpu:0", "meta"],
    "--dtype": ["float32", "float64", "bfloat16", "float16", "int8"],
    "--seed": ["0", "1", "9" * 18, "9" * 19, "9" * 20, "-1"]}
PROMPTS = {"--prompt": ["cab", "a", "the", "\n", "  ", "é😀", "abcdefgh"], "-": None,
           "--prompt-file": ["prompt.txt", "prompt.txt", "-", "latin.txt", "empty.txt"]}
MANY = {"--prompts": ["lines.txt", "lines.jsonl", "prompt.txt", "odd.jsonl", "empty.txt"]}
DECODER_PROMPT = {"--decoder-prompt": ["a", "cab", "", "Z", "abcdefgh"]}
STRATEGY = {"--strategy": ["naive", "hoisted", "cached"]}
FLAGS = {
    "generate": SHARED | DECODER_PROMPT | STRATEGY | MANY | {"--batch-size": ["1", "2", "1024", "1025"],
        "--temperature": ["0", "0.5", "1", "1e-9", "1e30", "1e300"], "--top-k": ["1", "3", "1000"], "--stats": None,
        "--top-p": ["0", "0.5", "1"], "--min-p": ["0", "0.1", "1"], "--no-stream": None,
        "--repetition-penalty": ["1", "1.3", "0.2", "1e-30", "1e18", "1e300"], "--chat": None,
        "--stop": ["a", "b", "é", "\n", "ab"], "--overflow": ["refuse", "slide", "slide"],
        "--length-penalty": ["0", "1", "-2", "1e9"], "--early-stopping": ["true", "false", "never"]},
    "compare": SHARED,
    "trace": SHARED | DECODER_PROMPT | STRATEGY,
    "report": SHARED | {"--output": ["page.html", "gpt.toml", "none/page.html", "empty"]},
    "load": {"--model": ["empty", "none", "gpt.toml"], "--pairs": ["0", "-1"], "--dtype": ["float32"], "--json": None,
             "--parity": None, "--device": ["cpu", "meta"]},  # one that is done takes many seconds
}
PRESETS = {"gpt2": ["n_layer"], "gpt2-xl": ["n_layer"], "bart-base": ["n_encoder_layer", "n_decoder_layer"]}  # of 1
TINY = {"n_head": 2, "n_embd": 8, "vocab_size": 40, "block_size": 16}
IDS = ["0", "1", "39", "40", "[]", "[1]", "[1, 2]", "[1, 'a']", "[[1]]", "[1.5]", "[-1]", "[99]", "[true]", "[{}]"]
KEYS = {  # overrides
    **dict.fromkeys(["n_layer", "n_encoder_layer", "n_decoder_layer", "n_kv_head", "n_inner", "max_batch_size", *TINY],
                    ["0", "1", "2", "3", "4", "8", "-1", "1.0", "9" * 12, "9" * 30, "[1]"]),
    **dict.fromkeys(["eos_id", "pad_id", "start_id", "bos_id"], IDS),
    **dict.fromkeys(["embd_pdrop", "attn_pdrop", "layer_norm_eps"], ["0", "0.5", "1", "1e-300", "nan", "true"]),
    **dict.fromkeys(["tie_weights", "scale_embedding"], ["true", "false", "1"]), "type": ["gpt", "bart", "[]"],
    "preset": [*PRESETS, "[]"], **dict.fromkeys(["", "x", "n_head.x", "é", "caf\udce9", "N_LAYER"], ["1"])}


def flag(rng, flags):
    """One of the flags, with a value that is mostly one of its own."""
    name = rng.choice(list(flags))
    return [name, rng.choice(flags[name] if rng.random() < 0.9 else ODD)] if flags[name] else [name]


def start(rng, section):
    """A line that is mostly right, as a list of units: words that belong together."""
    if section == "load":
        return [["--model", "empty"]]
    units = [["--device", "cpu"], ["--max-new-tokens", rng.choice("123456")]]
    units += [["--output", "page.html"]] * (section == "report")
    if section == "generate" or rng.random() < 0.5:
        units += [["--temperature", "1"]] * (section == "generate" and rng.random() < 0.5)
        return units + [["--model", rng.choice(["gpt", "bart", "own", "run", "worn"])],
                        flag(rng, PROMPTS | MANY if section == "generate" else PROMPTS)]
    name = rng.choice(["gpt.toml", "bart.toml", "huge.toml", *PRESETS])
    units += [["--random", name], ["--prompt-tokens", rng.choice("1234")]]
    sizes = TINY | dict.fromkeys(PRESETS[name], 1) if name in PRESETS else {}
    return units + [[f"--model.{key}={value}"] for key, value in sizes.items()]


def one_more(rng, units, section):
    """A flag or an override that the program may know takes the place of its like, or is new."""
    if any("--random" in words for words in units) and rng.random() < 0.5:
        key = rng.choice(list(KEYS))
        new = [f"--model.{key}={rng.choice(KEYS[key] if rng.random() < 0.9 else ODD)}"]
    else:
        new = flag(rng, FLAGS[section])
    named = lambda words: words[0].partition("=")[0]
    units[:] = [words for words in units if named(words) != named(new)] + [new]


def change(rng, units, section):
    """Make one thing about a line odd."""
    words, at, kind = rng.choice(units), rng.randint(0, len(units)), rng.randrange(18)
    name, equals, _ = words[0].partition("=")
    if kind < 10:
        one_more(rng, units, section)
    elif kind < 12:
        words[:] = [name + equals + rng.choice(ODD)] if equals else [name, rng.choice(ODD)]
    elif kind == 12:
        words[0] = rng.choice([name[: rng.randint(0, len(name))], name + rng.choice("sx-=_\u0131"), name[1:],
                               name.upper(), name.replace("-", "_"), "-" + name])
    elif kind == 13:
        words.pop(rng.randrange(len(words)))
    elif kind == 14:
        units.insert(at, list(words))
    elif kind == 15:
        words[:] = [rng.choice(["=", "", " "]).join(words)]
    elif kind == 16:
        units.insert(at, [rng.choice(ODD)])
    else:
        rng.shuffle(units)
    units[:] = [words for words in units if words] or [[""]]


def line(*sections):
    def make(rng, folder):
        section = rng.choice(sections)
        units = start(rng, section)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
            change(rng, units, section)
        words = [word for words in units for word in words]
        if section == "generate":
            return generate.main, words
        return bench.main, [section if rng.random() < 0.97 else rng.choice(ODD), *words]
    return make


@pytest.mark.parametrize("make", [line("generate"), line(*["compare", "trace", "report"] * 4, "load")],
                         ids=["generate", "bench"])
def test_a_line_that_nobody_would_type_is_done_or_refused(make, places, tmp_path, monkeypatch):
    run_all(make, places, tmp_path, monkeypatch)


# -----------------------------------------------------------------------------
# Model directories

VALUES = [None, True, False, 0, 1, -1, 2, 3, 7, 99, 1.5, -0.5, 1e-9, 1e308, 2**28 - 1, 2**31, 2**63, 10**30,
          float("nan"), float("inf"), "", "x", "gpt2", "</s>", "<s>", "\ud800", "a" * 999, [], [1], [1, 2], ["a"],
          [[1]], [None, None], {}, {"a": 1}, "F16", "I64", "BF16"]
NAMES = [key for fields in (GPT_FIELDS, BART_FIELDS) for _, *theirs in fields.values() for key in theirs]
NAMES += [*GPT_FIXED, *BART_FIXED, "model_type", "architectures", "files", "added_tokens", "normalizer", "__metadata__"]
PUBLISHED = [*UNSUPPORTED, "repetition_penalty", "num_beams", "length_penalty", "early_stopping", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
             "eos_token_id", "no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "stop_strings"]
PIECES = [b"", b"\xff", b"\0", b"9" * 30, b"-", b"[" * 100_000, b'"', b"\xef\xbb\xbf", b"\n", b" ", b"{}", b"1e999",
          b"\xed\xa0\x80"]


def holders(value):
    """Every (container, key) inside of what a JSON file holds."""
    for key in value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0):
        yield value, key
        yield from holders(value[key])


def near(rng, x):
    """Something that is nearly x."""
    if isinstance(x, str):
        return rng.choice([x[:-1], x + "x", x.upper(), [x], x + " ", x[::-1]])
    if isinstance(x, bool) or not isinstance(x, int | float):
        return [x]
    return rng.choice([x + 1, x - 1, -x, 2 * x, x * 10**9, x / 2, x // 2, float(x), str(x), [x]])


def change_json(rng, value):
    (where, key), (there, other) = (rng.choice([*holders(value)] or [([0], 0)]) for _ in range(2))
    kind = rng.randrange(6)
    if kind == 0:
        where[key] = rng.choice(VALUES)
    elif kind == 1:
        where[key] = near(rng, where[key])
    elif kind == 2:
        del where[key]
    elif kind == 3:
        where[key], there[other] = json.loads(json.dumps([there[other], where[key]]))  # copies: no ring
    elif kind == 4 and isinstance(value, dict):
        value[rng.choice(NAMES)] = rng.choice(VALUES)
    elif isinstance(where, dict):
        where[str(rng.choice([near(rng, key), rng.choice(NAMES)]))] = where.pop(key)


def in_json(rng, path):
    value = json.loads(path.read_text())
    if path.name == "generation_config.json":
        value[rng.choice(PUBLISHED)] = rng.choice(VALUES)
    change_json(rng, value)
    path.write_text(json.dumps(value))


def in_header(rng, path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change_json(rng, header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def in_tensors(rng, path):
    """A file that is right, of tensors that are not."""
    tensors = load_file(path)
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    x = tensors.pop(name)
    x = rng.choice([x.t() if x.dim() == 2 else x[None], x[:-1], x[:0], x.flatten()[:1].sum(), x.half(), x.double(), x,
                    x.long(), x.bool(), x * 1e30, x * 1e-40, x * 0, x / 0, torch.cat([x, x]), torch.zeros(0),
                    x.to(torch.float8_e4m3fn), 1e4 * torch.randn_like(x)])
    name = rng.choice([name] * 4 + [other, name + "x", name.split(".", 1)[-1], "model." + name, "", "lm_head.weight"])
    save_file({name: tensor.clone().contiguous() for name, tensor in (tensors | {name: x}).items()}, path)


def in_lines(rng, path):
    lines = path.read_text().split("\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[i] = rng.choice([lines[j], "", lines[i] + " x", lines[i][:-1], lines[i].upper(), "\u0120 t h", "#version: 9"])
    path.write_text("\n".join(lines))


def in_bytes(rng, path):
    """Bits turned over, or a stretch of bytes cut out, doubled, or replaced."""
    data, kind = bytearray(path.read_bytes()), rng.randrange(5)
    at = rng.randint(0, min(len(data), rng.choice([16, 400, 10**9])))
    to = min(len(data), at + rng.choice([0, 1, 1, 2, 8, 100, 10**9]))
    if kind == 0:
        for n in rng.sample(range(8 * len(data)), min(8 * len(data), rng.choice([1, 1, 3, 30]))):
            data[n // 8] ^= 1 << n % 8
    elif kind == 1:
        data[at:at] = data[at:to]
    else:
        data[at:to] = rng.choice([rng.choice(PIECES), rng.randbytes(min(to - at, 100)), b""])
    path.write_bytes(data)


def whole(rng, path):
    """Another file, or something else, in its place."""
    here, there = (sorted(other for other in folder.glob(which) if other.is_file())
                   for folder, which in ((path.parent, "*"), (path.parent.parent, f"*/*{path.suffix}")))
    other = rng.choice(rng.choice([here, there]))
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.unlink()
    rng.choice([lambda: None, path.touch, path.mkdir, lambda: path.symlink_to(path), lambda: path.symlink_to("none"),
                lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path.parent),
                *[lambda: path.write_bytes(theirs)] * 5, lambda: path.write_bytes(pickle.dumps({"a": 1})),
                lambda: path.with_suffix(".bin").write_bytes(mine)])()


def directory(rng, folder):
    """Change one to three things in the files of a model, and use it."""
    name = rng.choice(["gpt", "gpt", "bart", "bart", "own", "run"])
    shutil.copytree((folder / name).resolve(), folder / "model")
    last = folder / "model" / "step-00000002" if name == "run" else folder / "model"
    for _ in range(rng.choice([1, 1, 2, 3])):
        path = rng.choice(sorted(path for path in last.iterdir() if path.is_file() and not path.is_symlink()))
        kinds = {".json": [in_json] * 6, ".safetensors": [in_header, in_tensors] * 2, ".txt": [in_lines] * 2}
        try:
            rng.choice([*kinds.get(path.suffix, []), in_bytes, whole])(rng, path)
        except (ValueError, TypeError, IndexError, SafetensorError):  # a second change, of what can no longer be read
            in_bytes(rng, path)
    if name == "run" and (last / MANIFEST).is_file() and rng.random() < 0.7:  # as if it had been saved so
        (last / MANIFEST).unlink()
        (last / MANIFEST).write_text(json.dumps(describe(last)))
    words = ["--model", "model", "--prompt", "cab", "--device", "cpu"] + rng.choice([[], ["--max-new-tokens", "4"]])
    if rng.random() < 0.2:
        return bench.main, rng.choice([["compare"], ["trace"], ["report", "--output", "page.html"]]) + words
    return generate.main, words + rng.choice([[], [], ["--temperature", "1", "--seed", "0"], ["--dtype", "float16"],
                                              ["--strategy", "naive"], ["--json"], ["--stats"], ["--beams", "1"], ["--beams", "3"]])


def test_a_directory_that_nobody_would_save_is_used_or_refused(places, tmp_path, monkeypatch):
    run_all(directory, places, tmp_path, monkeypatch)
