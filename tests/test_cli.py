"""The programs as a shell sees them: what goes in, what comes out where, and with which exit code."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import BART_TOML, GPT_TOML, ROOT, TEXT, call, finish, shell, train_run

import bench
import generate
import model
import sampling
import train
from plumbing.cli import APART
from plumbing.errors import UserError, run
from plumbing.weights import load_pretrained, save_pretrained


@pytest.fixture(scope="module")
def places(tiny_gpt, tiny_bart, tmp_path_factory):
    """The names that stand in braces in the tables below."""
    tmp = tmp_path_factory.mktemp("bad")
    train_run(tmp / "char", GPT_TOML, "--data.tokenizer=char", "--train.steps=1", "--train.batch_size=1",
              "--model.n_layer=1", "--model.block_size=4000")
    files = {"gpt.toml": GPT_TOML, "bart.toml": BART_TOML, "text.txt": TEXT, "empty": "", "short.txt": "abc",
             "garbage.toml": "steps = = 3", "deep.toml": "a = " + "[" * 100_000, "table.toml": "model = 3",
             "array.toml": "[[model]]\n", "notes.txt": "notes", "prompt.txt": "the cat",
             "huge.toml": "[model]\nn_layer = 1000\nn_embd = 65536\nn_head = 64",
             "other.txt": TEXT.replace("cat", "cow")}
    for name, text in files.items():
        (tmp / name).write_text(text.replace("{source}", str(tmp / "text.txt")))
    (tmp / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp / "binary").write_bytes(bytes(range(256)) * 100)
    (tmp / "folder").mkdir()
    os.mkfifo(tmp / "fifo")
    return {"tmp": tmp, "gpt": tiny_gpt.path, "bart": tiny_bart.path, "char": tmp / "char" / "out"}


def words(line, places):
    return [word.format(**places) for word in shlex.split(line)]


def tree(folder):
    """Every path in it with its size and time of change."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def assert_refused(outcome):
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1 and len(outcome.err) <= 300, outcome.err
    assert "Traceback" not in outcome.err


GPT = "--model {gpt} --prompt the"
BAD_GENERATE = {  # arguments: what the line on stderr must name
    "": "--model",
    "--prompt the": "--model",
    "--model {gpt} --random gpt2 --prompt the": "--random",
    "--model {tmp}/none --prompt the": "none",
    "--model {tmp}/notes.txt --prompt the": "notes.txt",
    "--model {tmp}/folder --prompt the": "config.json",
    "--model ../.. --prompt the": "..",
    "--model '' --prompt the": "directory",
    "--model {tmp}/fifo --prompt the": "fifo",
    "--model {gpt}": "prompt",
    "--model {gpt} --prompt a --prompt-file {tmp}/prompt.txt": "one prompt",
    "--model {gpt} --prompt a -": "one prompt",
    "--model {gpt} --prompt ''": "empty",
    "--model {gpt} --prompt": "--prompt",
    "--model {gpt} --prompt-file {tmp}/none": "none",
    "--model {gpt} --prompt-file {tmp}/folder": "folder",
    "--model {gpt} --prompt-file {tmp}/latin.txt": "UTF-8",
    "--model {gpt} --prompt-file {tmp}/binary": "UTF-8",
    "--model {gpt} --prompt-file {tmp}/fifo": "fifo",
    "--model {gpt} --prompt-file {tmp}/empty": "empty",
    "--model {gpt} --prompt-file /dev/zero": "/dev/zero",
    "--model {gpt} --prompt-file ''": "",
    "--model {gpt} stray": "stray",
    "--model {char} --prompt 'the Ω'": r"\u03a9",
    "--model {gpt} --prompt '" + 100 * "long " + "'": "block_size=64",
    "--model {bart} --prompt '" + 100 * "a" + "'": "block_size=12",
    f"{GPT} --max-new-tokens 0": "max_new_tokens=0",
    f"{GPT} --max-new-tokens -5": "max_new_tokens=-5",
    f"{GPT} --max-new-tokens 1e9": "1e9",
    f"{GPT} --max-new-tokens 1000000000": "1000000000",
    f"{GPT} --max-new-tokens abc": "'abc'",
    f"{GPT} --max-new-tokens 1_0": "whole number value: '1_0'",
    f"{GPT} --max-new-tokens \uff11\uff10": "\uff11\uff10",
    f"{GPT} --num-samples 1_0": "'1_0'",
    f"{GPT} --beams \u0661": "--beams",
    f"{GPT} --temperature 1_0": "number value: '1_0'",
    f"{GPT} --temperature 1 --top-k 1_0": "'1_0'",
    f"{GPT} --temperature 1 --top-p \uff11": "--top-p",
    f"{GPT} --temperature 1 --seed 1_0": "'1_0'",
    f"{GPT} --repetition-penalty 0": "repetition_penalty=0.0",
    f"{GPT} --repetition-penalty nan": "repetition_penalty=nan",
    f"{GPT} --repetition-penalty=-inf": "repetition_penalty=-inf",
    f"{GPT} --temperature 1 --seed {2**64}": "at least 0 and less than 2**63",
    f"{GPT} --temperature 1 --top-k {2**64}": "at least 1 and less than 2**63",
    f"{GPT} --max-new-tokens 62": "block_size=64",
    f"{GPT} --max-new-tokens " + "9" * 5000: "max-new-tokens",
    "--model {bart} --prompt abc --max-new-tokens 12": "block_size=12",
    f"{GPT} --temperature -1": "temperature=-1.0",
    f"{GPT} --temperature nan": "temperature=nan",
    f"{GPT} --temperature inf": "temperature=inf",
    f"{GPT} --temperature warm": "warm",
    f"{GPT} --temperature 1 --top-k 0": "top_k=0",
    f"{GPT} --temperature 1 --top-k 2.5": "2.5",
    f"{GPT} --temperature 1 --top-p 1.5": "top_p=1.5",
    f"{GPT} --temperature 1 --top-p nan": "top_p=nan",
    f"{GPT} --temperature 1 --min-p -0.1": "min_p=-0.1",
    f"{GPT} --temperature 1 --seed -1": "seed=-1",
    f"{GPT} --temperature 1 --seed " + "9" * 30: "seed=999",
    f"{GPT} --strategy nonsense": "nonsense",
    f"{GPT} --strategy hoisted": "naive, cached",
    f"{GPT} --strategy further.concat:conkat": "functions of further.concat: concat, slip",
    f"{GPT} --strategy further.concat:": "functions of further.concat: concat, slip",
    f"{GPT} --strategy further.concat": "MODULE:FUNCTION",
    f"{GPT} --strategy no.such:thing": "No module named 'no'",
    f"{GPT} --strategy :thing": "':thing'",
    f"{GPT} --strategy further:thing": "it has none",
    f"{GPT} --num-samples 0": "--num-samples 0",
    f"{GPT} --num-samples 3": "--temperature",
    f"{GPT} --temperature 1 --num-samples 9999999999999": "--num-samples",
    f"{GPT} --unknown-flag": "--unknown-flag",
    f"{GPT} --max-new": "--max-new",
    f"{GPT} --device quantum": "quantum",
    f"{GPT} --device cpu:x": "cpu:x",
    f"{GPT} --dtype int8": "int8",
    f"{GPT} --beams 0": "--beams 0",
    f"{GPT} --beams -1": "--beams -1",
    f"{GPT} --beams 1000000": "from 1 (greedy) to 1024",
    f"{GPT} --beams 1000": "--beams 1000 are more than the 25",
    f"{GPT} --beams 4 --max-new-tokens 62": "block_size=64",
    f"{GPT} --beams 4 --length-penalty nan": "length_penalty=nan",
    f"{GPT} --beams 4 --length-penalty inf": "length_penalty=inf",
    f"{GPT} --beams 4 --length-penalty -33": "length_penalty=-33.0",
    f"{GPT} --beams 4 --length-penalty long": "long",
    f"{GPT} --beams 4 --early-stopping perhaps": "perhaps",
    f"{GPT} --length-penalty 2": "--length-penalty 2.0 has no effect without beams",
    f"{GPT} --beams 1 --early-stopping true": "--early-stopping true has no effect without beams",
    f"{GPT} --beams 4 --temperature 0.8": "--temperature 0.8 does not go with --beams 4",
    f"{GPT} --beams 4 --temperature 1 --num-samples 2": "--beams 4",
    f"{GPT} --beams 4 --num-samples 2": "--num-samples 2",
    f"{GPT} --beams 4 --strategy naive": "--strategy naive does not go with --beams 4",
    f"{GPT} --top-k 5": "set --temperature",
    f"{GPT} --compare": "--compare",
    f"{GPT} --decoder-prompt the": "--decoder-prompt",
    f"{GPT} --model.n_head=1": "--model.n_head=1",
    "--model {bart} --prompt abc --decoder-prompt caf\udce9": "UTF-8",
    "--model {bart} --prompt abc --decoder-prompt Z": "'Z'",
    "--model {bart} --prompt abc --decoder-prompt abcdefghijk": "block_size=12",
    f"{GPT} --prompt-tokens 3": "--prompt-tokens",
    "--random gpt2 --prompt the": "--random",
}
BAD_BENCH = {
    f"compare {GPT} --temperature 1": "--temperature",
    f"compare {GPT} --top-k 5": "--top-k",
    f"compare {GPT} --beams 4": "--beams 4",
    f"compare {GPT} --length-penalty 2": "--length-penalty",
    f"compare {GPT} --stats": "--stats",
    f"compare {GPT} --strategy naive": "--strategy",
    f"compare {GPT} --strategies cached,nonsense": "'nonsense'",
    f"compare {GPT} --strategies cached,hoisted": "naive, cached",
    f"compare {GPT} --strategies cached,": "''",
    f"compare {GPT} --strategies cached,further.concat:conkat": "functions of further.concat: concat, slip",
    f"report {GPT} --output {{tmp}}/page.html --strategies cached": "--strategies",
    f"trace {GPT} --strategy no.such:thing": "No module named 'no'",
    f"compare {GPT} --max-new-tokens 62": "block_size=64",
    f"compare {GPT} --num-samples 0": "--num-samples 0",
    "compare --model {gpt}": "one prompt",
    "compare --model {gpt} --random gpt2 --prompt the": "--random",
    f"compare {GPT} --decoder-prompt the": "--decoder-prompt",
    f"report {GPT} --output {{tmp}}/page.html --decoder-prompt the": "--decoder-prompt",
    "compare --model {bart} --prompt abc --decoder-prompt abcdefghijk": "block_size=12",
    f"trace {GPT} --num-samples 2": "--num-samples 2",
    f"trace {GPT} --strategy hoisted": "hoisted",
    f"trace {GPT} --output x": "--output",
    f"report {GPT}": "--output",
    f"report {GPT} --output {{tmp}}/page.html --num-samples 2": "--num-samples 2",
    f"report {GPT} --output {{tmp}}/nowhere/page.html": "cannot write",
    f"report {GPT} --output {{tmp}}/folder": "folder",
    f"report {GPT} --output {{tmp}}/none/report.html": "report.html",
    f"compare {GPT} --prompt-tokens 3": "one prompt",
    "compare --model {gpt} --prompt-tokens 3": "--prompt-tokens",
    "compare --random unknown --prompt-tokens 3": "unknown",
    "compare --random gpt2 --prompt-tokens 3 --model.n_heads=1": "'n_head'",
    "compare --random gpt2 --prompt-tokens 3 --model.n_kv_head=5": "n_kv_head=5",
    "compare --random gpt2 --prompt-tokens 3 --model.n_layer": "--model.n_layer",
    "compare --random gpt2 --prompt-tokens 3 --model.eos_id=[[1]]": "eos_id=[[1]]",
    "compare --random gpt2 --prompt-tokens 3 --model.eos_id=[]": "eos_id=[]",
    "compare --random gpt2 --prompt-tokens 3 --model.eos_id=[1.5]": "eos_id=[1.5]",
    f"compare --random gpt2 --prompt-tokens 3 --seed {2**64}": f"seed={2**64}",
    f"compare {GPT} --model.n_layer=1": "--random",
    "load --model {gpt} --model.n_layer=1": "--random",
    "load --random gpt2 --model.n_heads=1": "'n_head'",
    "compare --random '' --prompt-tokens 3": "''",
    "load --model ''": "''",
    "load --random gpt2 --pairs 1_0": "'1_0'",
    "compare --random gpt2 --prompt-tokens 1_0": "'1_0'",
    "compare --random gpt2": "prompt",
    "trace --random gpt2 --prompt the": "--prompt-tokens",
    "trace --random {tmp}/bart.toml --prompt-tokens 3 --decoder-prompt a": "--decoder-prompt",
    "compare --random gpt2 --prompt-tokens 0": "--prompt-tokens 0",
    "compare --random {tmp}/gpt.toml --prompt-tokens 9999999999999": "block_size",
    "compare --random {tmp}/huge.toml --prompt-tokens 3": "GiB",
    "compare --random {tmp}/garbage.toml --prompt-tokens 3": "garbage.toml",
    "compare --random {tmp} --prompt-tokens 3": "regular file",
}


@pytest.mark.parametrize("main, line, named", [
    *((generate.main, *item) for item in BAD_GENERATE.items()), *((bench.main, *item) for item in BAD_BENCH.items())],
    ids=lambda value: value[:60] if isinstance(value, str) else value.__module__)
def test_generate_and_bench_refuse_in_one_line_that_names_it(main, line, named, places):
    before = tree(places["tmp"])
    outcome = call(main, *words(line, places))
    assert_refused(outcome)
    assert tree(places["tmp"]) == before
    assert named in outcome.err


def test_a_prompt_that_is_not_unicode_is_refused(places):
    for args in (["--prompt", "caf\udce9"], ["--prompt", "\ud83d"], ["--prompt-file", "caf\udce9"]):
        assert_refused(call(generate.main, "--model", places["gpt"], *args))
    outcome = call(generate.main, "--model", places["gpt"], "-", stdin=b"caf\xe9 and more")
    assert_refused(outcome)
    assert "offset 3" in outcome.err
    assert_refused(call(generate.main, "--model", places["gpt"], "-", stdin=b""))


TRAIN = "{tmp}/gpt.toml --train.out_dir={tmp}/new"
BART = "{tmp}/bart.toml --train.out_dir={tmp}/new"
BAD_TRAIN = {
    "": "configuration",
    "--train.lr=1e-3": "configuration",
    "{tmp}/none.toml": "none.toml",
    "{tmp}": "regular file",
    "{tmp}/fifo": "fifo",
    "{tmp}/garbage.toml": "garbage.toml",
    "{tmp}/deep.toml": "deep.toml",
    "{tmp}/table.toml": "[model]",
    "{tmp}/table.toml --model.n_layer=1": "[model]",
    "{tmp}/array.toml --model.n_layer=1": "[model]",
    "{tmp}/latin.txt": "UTF-8",
    f"{TRAIN} steps=3": "--section.key=value",
    f"{TRAIN} --train.steps": "--section.key=value",
    f"{TRAIN} --steps=3": "--section.key=value",
    f"{TRAIN} --trian.steps=3": "'train'",
    f"{TRAIN} --train.step=3": "'steps'",
    f"{TRAIN} --model.n_heads=3": "'n_head'",
    f"{TRAIN} --train.steps=ten": "int",
    f"{TRAIN} --train.steps=1.5": "int",
    f"{TRAIN} --train.steps=true": "int",
    f"{TRAIN} --train.lr=true": "float",
    f"{TRAIN} --train.resume=1": "bool",
    f"{TRAIN} --train.out_dir=3": "str",
    f"{TRAIN} --train.steps=[3]": "int",
    f"{TRAIN} --train.steps=" + "9" * 30: "steps",
    f"{TRAIN} --train.steps=" + "9" * 5000: "steps",
    f"{TRAIN} --train.lr=1" + "0" * 400: "lr",
    f"{TRAIN} --train.steps=-1": "train.steps=-1",
    f"{TRAIN} --train.batch_size=0": "train.batch_size=0",
    f"{TRAIN} --train.accumulation=0": "train.accumulation=0",
    f"{TRAIN} --train.eval_batches=0": "train.eval_batches=0",
    f"{TRAIN} --train.lr=nan": "train.lr=nan",
    f"{TRAIN} --train.lr=inf": "train.lr=inf",
    f"{TRAIN} --train.grad_clip=0": "train.grad_clip=0",
    f"{TRAIN} --train.beta2=1.0": "train.beta2=1.0",
    f"{TRAIN} --train.optimizer=sgd": "sgd",
    f"{TRAIN} --train.dtype=int8": "int8",
    f"{TRAIN} --train.device=quantum": "quantum",
    f"{TRAIN} --model.type=rnn": "rnn",
    f"{TRAIN} --model.type=[]": "type",
    f"{TRAIN} --model.preset=gpt5": "gpt5",
    f"{TRAIN} --model.preset=[1]": "preset",
    f"{TRAIN} --model.n_head=3": "n_head=3",
    f"{TRAIN} --model.n_kv_head=3": "n_kv_head=3",
    f"{TRAIN} --model.n_layer=0": "n_layer=0",
    f"{TRAIN} --model.vocab_size=256": "vocabulary of 256",
    f"{TRAIN} --data.tokenizer=char --model.vocab_size=5": "model.vocab_size=5",
    f"{TRAIN} --model.embd_pdrop=1.0": "embd_pdrop=1.0",
    f"{TRAIN} --model.block_size=1000000": "block_size",
    f"{TRAIN} --model.n_embd=1000000": "GiB",
    f"{TRAIN} --data.source={{tmp}}/none": "none",
    f"{TRAIN} --data.source={{tmp}}/empty": "empty",
    f"{TRAIN} --data.source={{tmp}}/short.txt": "short.txt",
    f"{TRAIN} --data.source={{tmp}}/binary": "UTF-8",
    f"{TRAIN} --data.source={{tmp}}/folder": "folder",
    f"{TRAIN} --data.source={{tmp}}/fifo": "fifo",
    f"{TRAIN} --data.source=reverse": "reverse",
    f"{TRAIN} --data.tokenizer=words": "words",
    f"{TRAIN} --data.tokenizer=bpe --data.vocab_size=99": "vocab_size",
    f"{TRAIN} --data.val_fraction=1.0": "val_fraction",
    f"{BART} --data.source=pydoc": "pydoc",
    f"{BART} --data.max_length=30 --data.min_length=30": "block_size is 12",
    f"{BART} --data.max_length=1": "fewer than",
    f"{TRAIN} --train.out_dir={{tmp}}/notes.txt": "notes.txt",
    f"{TRAIN} --train.out_dir={{tmp}}/notes.txt/run": "notes.txt",
    f"{TRAIN} --train.out_dir=/proc/run": "/proc",
    f"{TRAIN} --train.out_dir={{tmp}}/caf\udce9": "UTF-8",
    f"{TRAIN} '--train.out_dir=\"a\\u0000b\"'": "null",
    f"{TRAIN} --train.out_dir={{gpt}}": "--train.resume=true",
    f"{TRAIN} --train.out_dir={{gpt}} --train.resume=true --model.n_layer=3": "model.n_layer",
    f"{TRAIN} --train.out_dir={{gpt}} --train.resume=true --data.source={{tmp}}/other.txt": "data.source",
    f"{TRAIN} --train.out_dir={{gpt}} --train.resume=true --data.seed=1": "data.",
    f"{BART} --train.out_dir={{gpt}} --train.resume=true": "family",
}


@pytest.mark.parametrize("line", BAD_TRAIN, ids=lambda line: line[:75] or "no arguments")
def test_train_refuses_in_one_line_that_names_it_and_touches_nothing(line, places):
    before = tree(places["tmp"]) | tree(places["gpt"])
    outcome = call(train.main, *words(line, places))
    assert tree(places["tmp"]) | tree(places["gpt"]) == before
    assert_refused(outcome)
    assert BAD_TRAIN[line] in outcome.err


def test_real_processes_refuse_the_same(places):
    lines = {"generate.py": [f"{GPT} --temperature -1", "--model {tmp}/none --prompt the", "--model {gpt} --prompt ''"],
             "train.py": ["{tmp}/garbage.toml", f"{TRAIN} --model.n_heads=3"]}
    started = [shell(program, *words(line, places)) for program in lines for line in lines[program]]
    started.append(shell("generate.py", "--model", places["gpt"], "--prompt", b"caf\xe9".decode(errors="surrogateescape")))
    for process in started:
        assert_refused(finish(process))


# -----------------------------------------------------------------------------
# Output


def test_streamed_collected_and_piped_output_are_the_same_bytes(tiny_gpt, tiny_bart):
    for path, prompt in ((tiny_gpt.path, "the cat"), (tiny_bart.path, "abc")):
        args = ["--model", path, "--prompt", prompt, "--temperature", 1, "--seed", 3]
        streamed, collected = call(generate.main, *args), call(generate.main, *args, "--no-stream")
        assert streamed == collected and streamed.code == 0 and streamed.err == ""
        assert streamed.out.endswith("\n") and len(streamed.out) > 3
    assert finish(shell("generate.py", *args)) == streamed


def test_characters_of_several_bytes_are_never_broken_in_the_stream(tiny_gpt, monkeypatch):
    pieces = []
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    generate.main(["--model", str(tiny_gpt.path), "--prompt", "the cat", "--max-new-tokens", "40"])
    monkeypatch.undo()
    assert len(pieces) > 25  # it came bit by bit
    assert "😀" in pieces and "你" in pieces and not any("\ufffd" in piece for piece in pieces)
    # cut in the middle of the emoji: the rest of it is said to be missing, at the end
    cut = call(generate.main, "--model", tiny_gpt.path, "--prompt", "the cat", "--max-new-tokens", 3)
    assert cut.out == "the cat \ufffd\n"
    assert cut == call(generate.main, "--model", tiny_gpt.path, "--prompt", "the cat", "--max-new-tokens", 3, "--no-stream")


def test_a_reader_that_goes_away_ends_it_quietly(places):
    for args in (["--model", places["gpt"], "--prompt", "the cat"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        process = subprocess.Popen([sys.executable, ROOT / "generate.py", *args], stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(places):
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, ROOT / "generate.py", "--model", places["gpt"], "--prompt", "the"],
                                   stdout=full, stderr=subprocess.PIPE)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and err.count(b"\n") == 1 and err.startswith(b"error: ")


@pytest.mark.parametrize("line, closed", [
    (f"generate.py {GPT}", ">&-"), ("generate.py --model {gpt} -", "<&-"), (f"bench.py compare {GPT}", ">&-"),
    ("bench.py compare --model {gpt} -", "<&-"), ("train.py {tmp}/gpt.toml --train.out_dir={tmp}/new", ">&-")])
def test_a_stream_that_is_closed_is_refused(line, closed, places):
    program, *args = words(line, places)
    command = shlex.join([sys.executable, str(ROOT / program), *args])
    assert_refused(finish(subprocess.Popen(f"{command} {closed}", shell=True, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE)))


def test_with_nobody_to_tell_an_error_it_does_not_go_to_stdout_and_training_goes_on(places, tmp_path):
    out = tmp_path / "out"
    train_line = f"{places['tmp']}/gpt.toml --train.out_dir={out} --train.steps=1 --train.eval_batches=1"
    for line, code in ((f"generate.py --model {places['gpt']} --prompt ''", 2), (f"train.py {train_line}", 0)):
        process = subprocess.Popen(f"{sys.executable} {ROOT}/{line} <&- 2>&-", shell=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        outcome = finish(process)
        assert outcome.code == code and "error" not in outcome.out, outcome
    assert f"step 1: saved {out}" in outcome.out


def test_every_way_to_give_a_prompt_gives_the_same_text(places):
    file, start = places["tmp"] / "given.txt", ["--model", places["gpt"], "--max-new-tokens", 9]
    file.write_text("the dog 你好\n")
    outcome = call(generate.main, *start, "--prompt", "the dog 你好")
    assert outcome.code == 0 and outcome.out.startswith("the dog 你好")
    assert call(generate.main, *start, "--prompt-file", file) == outcome
    assert call(generate.main, *start, "-", stdin=file.read_bytes()) == outcome
    assert call(generate.main, *start, "--prompt-file", "-", stdin=file.read_bytes()) == outcome
    assert call(generate.main, "-", *start, stdin="the dog 你好".encode()) == outcome


def test_a_decoder_prompt_is_continued_and_shown_like_the_prompt_of_a_gpt(tiny_bart):
    args = ["--model", tiny_bart.path, "--prompt", "abcde"]
    whole = call(generate.main, *args).out
    assert len(whole) > 4
    for flags in ([], ["--no-stream"], ["--strategy", "naive"], ["--stats"]):
        assert call(generate.main, *args, *flags, "--decoder-prompt", whole[:3]).out == whole
    line, rest = (json.loads(call(generate.main, *args, "--json", *more).out) for more in ([], ["--decoder-prompt", whole[:3]]))
    assert rest["text"] == whole[3:-1] and rest["ids"] == line["ids"][4:]  # they begin with <s>
    records = [json.loads(text) for text in call(bench.main, "trace", *args, "--json", "--decoder-prompt", whole[:3]).out.splitlines()]
    assert {r["out"][-2] for r in records if r["attention"] == "self" and r["step"] == 1 and r["phase"] != "encode"} == {5}


def test_compare_and_report_continue_a_decoder_prompt_and_count_it(tiny_bart, tmp_path, monkeypatch):
    args = ["--model", tiny_bart.path, "--prompt", "abcde", "--decoder-prompt", "ed", "--max-new-tokens", 5]
    args.append("--ignore-eos")
    outcome = call(bench.main, "compare", *args, "--json")
    assert outcome.code == 0, outcome
    done = {s["strategy"]: s for s in json.loads(outcome.out)["strategies"]}
    assert done["cached"]["closed_form"] == [7, 4 + 4] and done["hoisted"]["closed_form"] == [7, 4 * 5 + 5 * 4 // 2]
    assert all(s["closed_form"] == [s["encoder_tokens"], s["decoder_tokens"]] for s in done.values())
    assert "--- cached\ned" in call(bench.main, "compare", *args).out
    page, sizes = tmp_path / "page.html", []
    monkeypatch.setattr(bench.report, "check_size", sizes.append)
    assert call(bench.main, "report", *args, "--output", page).code == 0
    assert sizes[0] == sizes[1] > 0  # what is refused before the work is what would be refused after it
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])
    new = done["cached"]["ids"][0]
    show = tiny_bart.tokenizer.show
    assert data["calls"] == 5 and data["target"][2:] == ["e", "d", *map(show, new)] and len(data["target"]) == 4 + 5
    assert data["shapes"]["self"][1:] == [8, 8] and data["shapes"]["cross"][1:] == [8, 7]


def test_underscores_do_as_well_as_hyphens(places):
    hyphens = call(generate.main, "--model", places["gpt"], "--prompt", "a_b", "--max-new-tokens", 5, "--no-stream")
    assert hyphens.code == 0 and hyphens.out.startswith("a_b")
    assert call(generate.main, "--model", places["gpt"], "--prompt=a_b", "--max_new_tokens=5", "--no_stream") == hyphens


def test_json_is_one_object_a_line_and_says_what_the_text_says(tiny_gpt):
    args = ["--model", tiny_gpt.path, "--prompt", "the", "--max-new-tokens", 20]
    outcome = call(generate.main, *args, "--json", "--temperature", 1, "--seed", 0, "--num-samples", 3)
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert len(lines) == 3 and all(line["prompt"] == "the" for line in lines)
    assert all(tiny_gpt.tokenizer.decode(line["ids"]) == line["text"] for line in lines)
    line = json.loads(call(generate.main, *args, "--json").out)
    assert call(generate.main, *args).out == "the" + line["text"] + "\n"


OWN = """
from further.concat import concat
from generate import cached


def backwards(model, sources, B, room, choose):
    return cached(model, [source[::-1] for source in sources], B, room, choose)
"""


def test_a_strategy_of_ones_own_is_named_by_its_module(tiny_bart, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {"own_steps": OWN, "spoilt_steps": "def x(:", "leaving_steps": "import sys; sys.exit(0)"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    args = "--model", tiny_bart.path, "--prompt", "abcde"
    same = call(generate.main, *args)
    assert call(generate.main, *args, "--strategy", "own_steps:concat") == same
    assert call(generate.main, *args, "--strategy", "own_steps:backwards").out != same.out
    told = call(generate.main, *args, "--strategy", "own_steps:concat", "--stats").err
    assert "new tokens" in told and "cache" not in told  # what it keeps is its own affair
    traced = [call(bench.main, "trace", *args, *more) for more in ([], ["--strategy", "own_steps:concat"])]
    assert traced[0] == traced[1] and traced[0].code == 0
    compared = call(bench.main, "compare", *args, "--strategies", "hoisted,own_steps:backwards", "--json")
    names = [done["strategy"] for done in json.loads(compared.out)["strategies"]]
    assert compared.code == 1 and names == ["hoisted", "own_steps:backwards"]
    for name, words in {"spoilt_steps": "SyntaxError", "leaving_steps": "SystemExit"}.items():
        refused = call(bench.main, "compare", *args, "--strategies", f"cached,{name}:step")
        assert_refused(refused)
        assert words in refused.err and name in refused.err
    refused = call(generate.main, *args, "--strategy", "own_steps:forwards")
    assert_refused(refused)
    assert "functions of own_steps: backwards" in refused.err


def test_what_builds_on_the_core_is_imported_only_when_it_is_asked_for(tiny_gpt, monkeypatch):
    args = "compare", "--model", tiny_gpt.path, "--prompt", "the", "--max-new-tokens", 5
    for name in ("further", "further.concat"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert call(bench.main, *args).code == 0 and "further" not in sys.modules
    outcome = call(bench.main, *args, "--strategies", "cached,further.concat:concat,further.concat:slip")
    assert outcome.code == 1 and "slip: BUG, first at step 2, row 0, layer 0, self-attention: keys" in outcome.out
    assert "naive" not in outcome.out and "further.concat:concat: BUG" not in outcome.out
    # as a program, which is another module than the one that the strategy is built on
    args = "--model", tiny_gpt.path, "--prompt", "the", "--max-new-tokens", 5
    assert finish(shell("generate.py", *args, "--strategy", "further.concat:concat")) == call(generate.main, *args)


def test_samples_follow_the_seed_and_differ_among_each_other(tiny_gpt):
    args = ["--model", tiny_gpt.path, "--prompt", "the", "--temperature", 1.5, "--num-samples", 4]
    first, again, other = (call(generate.main, *args, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again != other
    texts = first.split("---\n")
    assert len(texts) == 4 and len(set(texts)) == 4 and all(text.startswith("the") for text in texts)


def test_stats_go_to_stderr_and_change_nothing_else(tiny_gpt, tiny_bart):
    args = ["--model", tiny_gpt.path, "--prompt", "the", "--max-new-tokens", 20]
    plain, outcome = call(generate.main, *args), call(generate.main, *args, "--stats")
    assert outcome.out == plain.out and plain.err == ""
    assert "3 prompt tokens" in outcome.err and "20 new tokens" in outcome.err
    config = tiny_gpt.model.config
    assert f"{2 * config.n_layer * 23 * config.n_embd * 4:,} bytes" in outcome.err
    config, args = tiny_bart.model.config, ["--model", tiny_bart.path, "--prompt", "abc", "--max-new-tokens", 4]
    told = call(generate.main, *args, "--decoder-prompt", "cb", "--stats").err
    assert "cache of 8 positions" in told  # two that frame it, the two letters, and four
    assert f"{2 * config.n_decoder_layer * 8 * config.n_embd * 4:,} bytes" in told


def test_without_a_limit_it_writes_what_fits(tiny_gpt):
    ids = json.loads(call(generate.main, "--model", tiny_gpt.path, "--prompt", "the", "--ignore-eos", "--json").out)["ids"]
    assert len(ids) == tiny_gpt.model.config.block_size - 3


# -----------------------------------------------------------------------------
# What a model's publishers ask for


@pytest.fixture
def published(tiny_bart, tmp_path):
    """A function: the outcome of a generation from the tiny BART with these lines in its generation_config.json."""
    step = max(tiny_bart.path.glob("step-*"))
    for file in step.iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())

    def outcome(*args, **lines):
        (tmp_path / "generation_config.json").write_text(json.dumps(lines))
        return call(generate.main, "--model", tmp_path, "--prompt", "abcde", "--json", *args)

    return outcome


@pytest.mark.parametrize("lines", [
    {"num_beams": "four"}, {"num_beams": 1025}, {"length_penalty": float("nan"), "num_beams": 4},
    {"length_penalty": "x", "num_beams": 4}, {"early_stopping": "x", "num_beams": 4},
    {"early_stopping": 1, "num_beams": 4}, {"early_stopping": [True], "num_beams": 4}, {"num_beams": [4] * 1000},
    {"repetition_penalty": 0}, {"repetition_penalty": "x"},
    {"repetition_penalty": -1.5}, {"encoder_repetition_penalty": 1.2},
    {"bad_words_ids": [[n] for n in range(1000)]}, {"min_length": -1}, {"max_length": 1.5}, {"no_repeat_ngram_size": "x"},
    {"forced_eos_token_id": [2]}, {"eos_token_id": [2, 500]}, {"eos_token_id": [500]},
    {"eos_token_id": "x"}, {"eos_token_id": -5}, {"eos_token_id": [-5]}, {"eos_token_id": ["x"]}, {"eos_token_id": []}, {"stop_strings": [""]}, {"typical_p": 0.9}, {"forced_bos_token_id": 10**6}, {"decoder_start_token_id": 10**6}], ids=str)
def test_what_cannot_be_honoured_is_refused_by_name(published, lines):
    outcome = published(**lines)
    assert_refused(outcome)
    assert next(iter(lines)).removesuffix("_token_id") in outcome.err


def test_idle_and_harmless_lines_change_nothing(published):
    plain = published()
    assert plain.code == 0
    assert published(num_beams=1, repetition_penalty=1.0, bad_words_ids=None, length_penalty=2.0, early_stopping=True,
                     do_sample=False, transformers_version="5.0") == plain
    assert published("--beams", 1, num_beams=4, length_penalty=2.0, early_stopping=True) == plain


def test_lengths_and_forced_ids_are_honoured(published, tiny_bart):
    ids = lambda *args, **lines: json.loads(published(*args, **lines).out)["ids"]
    config, letter = tiny_bart.model.config, tiny_bart.tokenizer.encode("q")[1]
    assert ids(max_length=4)[-1:] != [config.eos_id] and len(ids(max_length=4)) == 3  # the start token counts
    assert ids(max_length=4, forced_eos_token_id=config.eos_id)[-1] == config.eos_id
    assert ids(forced_bos_token_id=letter)[0] == letter
    assert len(ids("--prompt", "a", min_length=8)) >= 7 > len(ids("--prompt", "a"))
    assert len(ids("--max-new-tokens", 2, max_length=9)) == 2
    twice = "--prompt", "aabb", "--repetition-penalty"
    assert ids(*twice[:2], repetition_penalty=9) == ids(*twice, 9) != ids(*twice, 1, repetition_penalty=9)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_vocabulary_may_be_padded_beyond_its_tokenizer(kind, tiny_gpt, tiny_bart, tmp_path):
    _, tokenizer, _ = {"gpt": tiny_gpt, "bart": tiny_bart}[kind]
    cls = {"gpt": model.GPT, "bart": model.BART}[kind]
    config = replace(cls.get_default_config(), n_head=1, n_embd=4, vocab_size=400, block_size=20)
    save_pretrained(tmp_path, cls(config), tokenizer)

    def outcome(**published):
        (tmp_path / "generation_config.json").write_text(json.dumps(published))
        return call(generate.main, "--model", tmp_path, "--prompt", "abc", "--json", "--max-new-tokens", 9)

    for key in ("forced_eos_token_id", "forced_bos_token_id"):
        refused = outcome(**{key: 399})
        assert_refused(refused)
        assert f"{key}=399" in refused.err and f"0 to {tokenizer.n_vocab - 1}" in refused.err
    done = outcome(min_length=6, eos_token_id=399)
    assert done.code == 0 and done.err == "" and len(json.loads(done.out)["ids"]) == 9


def test_each_of_several_published_ends_is_honoured(published):
    ids = lambda **lines: json.loads(published(**lines).out)["ids"]
    whole = ids()
    assert len(set(whole)) == len(whole) > 4
    assert ids(eos_token_id=[whole[-1], whole[3]]) == whole[:4]
    assert ids(eos_token_id=[whole[2]]) == whole[:3] and ids(eos_token_id=whole[1]) == whole[:2]
    assert not {whole[3], whole[1]} & set(ids(eos_token_id=[whole[3], whole[1]], min_length=4)[:3])


def test_a_tokenizer_that_cannot_be_read_is_named_and_its_model_still_loads(tiny_gpt, tmp_path, capsys):
    save_pretrained(tmp_path, tiny_gpt.model, tiny_gpt.tokenizer)
    (tmp_path / "vocab.json").write_text("{}")
    loaded, tokenizer = load_pretrained(tmp_path)
    said = capsys.readouterr()
    assert tokenizer is None and said.out == "" and said.err.count("\n") == 1 and str(tmp_path / "vocab.json") in said.err
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in tiny_gpt.model.state_dict().items())
    for main, section in ((generate.main, []), (bench.main, ["compare"])):
        outcome = call(main, *section, "--model", tmp_path, "--prompt", "the")
        assert_refused(outcome)
        assert str(tmp_path / "vocab.json") in outcome.err


@pytest.mark.parametrize("name, n_head", [("gpt2", 12), ("{tmp}/gpt.toml", 4)])
def test_a_random_model_is_changed_by_overrides(name, n_head, places):
    def cache_bytes(n_kv_head):
        sizes = dict(n_layer=1, n_head=n_head, n_embd=24, vocab_size=99, eos_id=3, n_kv_head=n_kv_head)
        outcome = call(bench.main, "compare", "--random", name.format(**places), "--prompt-tokens", 3, "--max-new-tokens", 4,
                       "--json", *(f"--model.{key}={value}" for key, value in sizes.items()))
        return json.loads(outcome.out)["strategies"][-1]["self_cache_bytes"]

    assert cache_bytes(n_head) == n_head * cache_bytes(1) > 0


# -----------------------------------------------------------------------------
# Being interrupted, and starting fast


def test_control_c_in_a_generation_exits_130(places):
    process = shell("generate.py", "--model", places["char"], "--prompt", "the", "--ignore-eos", "--max-new-tokens", 3900)
    process.stdout.read(8)  # it is under way
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.code == 130 and outcome.err == "interrupted\n"


@pytest.mark.parametrize("program", ["generate.py", "bench.py", "train.py"])
def test_control_c_while_torch_is_imported_exits_130(program, tmp_path):
    """As some of its parts do, this torch makes another error of whatever is raised while it is imported."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntry: time.sleep(30)\n"
                                       "except BaseException: raise ImportError('initialization failed')")
    process = shell(program, "--help", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")


@pytest.mark.parametrize("program", ["generate.py", "train.py"])
def test_help_is_there_and_imports_nothing_heavy(program):
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['{program}', '--help']\n"
            f"try: runpy.run_path({str(ROOT / program)!r}, run_name='__main__')\n"
            f"except SystemExit as exit: assert not exit.code\n"
            f"heavy = {{'transformers', 'matplotlib', 'huggingface_hub', 'numba', 'pandas'}} & set(sys.modules)\n"
            f"print(*heavy, file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr.strip(), result.stderr
    assert "--train.steps=2000" in result.stdout if program == "train.py" else "--max-new-tokens" in result.stdout
    assert program == "train.py" or "prompt + new tokens <= block_size" in " ".join(result.stdout.split())


def test_exit_codes_have_one_home(capsys):
    def failing(error):
        def main():
            raise error
        return main

    for error, code in ((UserError("a\nb"), 2), (sampling.NonFiniteError("nan"), 3), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as exit:
            run(failing(error))
        out, err = capsys.readouterr()
        assert exit.value.code == code and out == "" and err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        run(failing(ZeroDivisionError()))


FLAGS = {"num_samples": ["--num-samples", 2], "strategy": ["--strategy", "naive"], "overflow": ["--overflow", "slide"],
         "speculate": ["--speculate", "lookup"], "compile": ["--compile"], "chat": ["--chat"], "stats": ["--stats"], "json": ["--json"],
         "decoder_prompt": ["--decoder-prompt", "a"], "temperature": ["--temperature", 0.5], "prompts": ["--prompts", "p.txt"]}


@pytest.mark.parametrize("technique, other", [(a, b) for a, others in APART.items() for b in others])
def test_what_does_not_go_together_is_refused_by_both_names(technique, other, tiny_gpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("the cat\n")
    words = [*(["--beams", 3] if technique == "beams" else FLAGS[technique]), *FLAGS[other], "--max-new-tokens", 4]
    words += [] if {"prompts", "chat"} & {technique, other} else ["--prompt", "the"]
    assert_refused(outcome := call(generate.main, "--model", tiny_gpt.path, "--temperature", 0.5 * (other == "num_samples"), *words))
    assert f"--{technique}" in outcome.err and f"--{other.replace('_', '-')}" in outcome.err
