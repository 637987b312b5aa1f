"""Many prompts through few rows: every text is what its prompt gives alone, and no position is computed twice."""

import json
import os
import random
import signal
import sys
from collections import Counter
from dataclasses import asdict, replace

import pytest
from conftest import call, finish, shell

import further.serve
import generate as program
from cost import count, predict
from further.serve import continuous, serve
from generate import generate, loop
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing import checks
from plumbing.errors import UserError
from plumbing.weights import save_pretrained
from sampling import Choice, Chooser
from test_cli import assert_refused
from test_generate import Explode, random_model
from test_schedules import random_pattern

CASES = int(os.environ.get("MINDECODE_CASES", 16))


@pytest.fixture
def logits_of(monkeypatch):
    """A function: the logits by which ids are chosen while run() runs, {(number, length of its text): (V,)}."""
    seen, scores = {}, Chooser.scores

    def watch(self, logits, rows, which):
        seen.update({(r, len(row)): own.clone() for own, row, r in zip(logits, rows, which, strict=True)})
        return scores(self, logits, rows, which)

    def collect(run):
        seen.clear()
        return run(), dict(seen)

    monkeypatch.setattr(Chooser, "scores", watch)
    return collect


def arrivals(seed, kind):
    """A model in fp64, often of a pattern that evicts, prompts in any order, and options for each alone and for all."""
    rng = random.Random(f"{kind} {seed}")
    model, _, M = random_model(seed, kind)
    if seed % 2:
        sparse = type(model)(replace(model.config, pattern=random_pattern(rng, asdict(model.config))))
        sparse.load_state_dict(model.state_dict())
        model = sparse.double().eval()
    R, V = rng.randint(1, 12), model.config.vocab_size
    ids = lambda least: [rng.randrange(V) for _ in range(rng.randint(least, 5))]
    prompts, most = [ids(1) for _ in range(R)], [rng.randint(1, M) for _ in range(R)]
    starts = [ids(0) for _ in range(R)] if kind == "bart" and seed % 3 else None
    whole = generate(model, prompts, most, decoder_prompts=starts, ignore_eos=True)
    if seed % 4:
        model.config.eos_id = [rng.choice(rng.choice(whole)) for _ in range(2)]
    rules = dict(no_repeat_ngram=rng.choice([None, 2]), min_length=rng.randint(0, 6), forced_last=rng.choice([None, 1]))
    return rng, model, prompts, most, starts, rules if V > M and rng.random() < 0.5 else {}


def alone(logits_of, model, prompts, most, starts, options):
    """The ids of each prompt alone, and the logits by which they were chosen."""
    texts, logits = [], {}
    for r, (prompt, n) in enumerate(zip(prompts, most)):
        ids, own = logits_of(lambda: generate(model, [prompt], n, decoder_prompts=starts and [starts[r]], **options))
        texts += ids
        logits |= {(r, length): x for (_, length), x in own.items()}
    return texts, logits


def assert_same_logits(found, expected):
    assert found.keys() == expected.keys()
    assert max((found[key] - x).abs().max() for key, x in expected.items()) <= 1e-10


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_rows_of_a_ragged_batch_that_end_at_different_steps_equal_solo_runs(kind, logits_of):
    """MINDECODE_CASES=200 for the run that is recorded."""
    differ = 0
    for seed in range(CASES):
        _, model, prompts, most, starts, options = arrivals(seed, kind)
        expected = alone(logits_of, model, prompts, most, starts, options)
        rows, logits = logits_of(lambda: generate(model, prompts, most, decoder_prompts=starts, **options))
        assert_same_logits(logits, expected[1])
        assert rows == expected[0], seed
        differ += len(set(map(len, rows))) > 1
    assert differ > CASES / 3


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_whatever_the_order_and_the_batch_size_texts_equal_solo_runs_and_nothing_is_computed_twice(kind, logits_of):
    """MINDECODE_CASES=100 for the run that is recorded."""
    waited = 0
    for seed in range(CASES):
        rng, model, prompts, most, starts, options = arrivals(seed, kind)
        texts, expected = alone(logits_of, model, prompts, most, starts, options)
        batch_size = rng.randint(1, 5)
        with count(model) as cost:
            run = lambda: list(serve(model, prompts, most, batch_size=batch_size, decoder_prompts=starts, **options))
            pairs, logits = logits_of(run)
        assert_same_logits(logits, expected)
        assert len(pairs) == len(prompts) and dict(pairs) == dict(enumerate(texts)), seed
        lengths = [len(start) + 1 for start in starts or [[]] * len(prompts)] if kind == "bart" else map(len, prompts)
        assert cost.decoder_tokens == sum(P + len(text) - 1 for P, text in zip(lengths, texts))
        assert cost.encoder_tokens == (sum(map(len, prompts)) if kind == "bart" else 0)
        waited += len(prompts) > batch_size
    assert waited > CASES / 2


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_64_prompts_through_8_rows_cost_what_each_alone_costs_in_every_linear(kind):
    rng, sizes = random.Random(0), dict(n_head=1, n_embd=4, vocab_size=11, block_size=700)
    if kind == "gpt":
        model = GPT(GPTConfig(n_layer=2, **sizes)).eval()
    else:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=2, **sizes)).eval()
    prompts = [[rng.randrange(11) for _ in range(rng.randint(10, 500))] for _ in range(64)]
    most = [rng.randint(10, 200) for _ in prompts]
    steps, rows = [], Counter()
    model.decoder_layers()[0].register_forward_pre_hook(lambda layer, args: steps.append(args[0].shape[:2]))
    with count(model) as cost:
        texts = dict(serve(model, prompts, most, ignore_eos=True))
    assert [len(texts[r]) for r in range(64)] == most
    for prompt, M in zip(prompts, most):
        rows.update(predict(model.config, "cached", len(prompt), M)["linear_rows"])
    assert cost.linear_rows == rows
    steps = [B for B, T in steps if T == 1]  # first all rows are taken, in the end fewer and fewer
    full = steps.count(8)
    assert steps[:full] == [8] * full and full > 0.8 * len(steps)
    assert steps[full:] == sorted(steps[full:], reverse=True) and sum(steps) == sum(most)


def test_texts_are_told_when_they_end_and_by_their_numbers():
    model = random_model(1, "gpt")[0]
    told = [r for r, _ in serve(model, [[0]] * 4, [6, 1, 1, 3], batch_size=2, ignore_eos=True)]
    assert told == [1, 2, 3, 0]


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_neighbouring_texts_may_ask_one_source(kind):
    """As samples do: the strategy gets B sources, the loop n times as many rows."""
    for seed in range(5):
        model, prompts, _ = random_model(seed, kind)
        sources, texts = (prompts, [[2]] * len(prompts)) if kind == "bart" else (None, prompts)
        solo = [generate(model, [prompt], 8 - len(row), ignore_eos=True)[0] for prompt, row in zip(prompts, texts)]
        step = continuous(model, sources, len(texts), 8, Chooser(Choice()), 3)
        steps = loop(step, [row for row in texts for _ in "abc"], [8] * 3 * len(texts), lambda r, row: False)
        assert [sum(ids, []) for ids in zip(*steps)] == [row for row in solo for _ in "abc"]


@pytest.mark.parametrize("arguments, words", [
    (dict(batch_size=0), "batch_size=0 at least 1"), (dict(batch_size=2.0), "batch_size=2.0"),
    (dict(batch_size=True), "batch_size=True"), (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(max_new_tokens=[1]), "1 numbers max_new_tokens for 2 prompts"), (dict(max_new_tokens=[1, 0]), "tokens=0"),
    (dict(max_new_tokens=[1, 99]), "max_new_tokens=99 block_size="), (dict(max_new_tokens=["1", 1]), "'1'")])
def test_bad_requests_are_refused_by_the_call(arguments, words):
    with pytest.raises(UserError) as error:
        serve(random_model(1, "gpt")[0], **(dict(prompts=[[1], [2]], max_new_tokens=2) | arguments))
    assert all(word in str(error.value) for word in words.split())


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_caches_that_do_not_fit_the_memory_are_refused_before_anything_is_computed(kind, monkeypatch):
    model, prompts, _ = random_model(2, kind)
    prompts = (prompts * 8)[:8]
    with count(model) as cost:
        list(serve(model, prompts, 4, ignore_eos=True))
    need = cost.cache_bytes("self") + cost.cache_bytes("cross")
    monkeypatch.setattr(checks, "free_memory", lambda device: need)
    serve(model, prompts, 4)
    monkeypatch.setattr(checks, "free_memory", lambda device: need - 1)
    model.decoder_layers()[0].register_forward_pre_hook(Explode(at=1))
    with pytest.raises(UserError, match="batch_size=8: .* GiB are free on cpu: choose a smaller one"):
        serve(model, prompts, 4)
    serve(model, prompts, 4, batch_size=4)
    assert list(serve(model, [], 4)) == []


# -----------------------------------------------------------------------------
# The command line


def written(outcome):
    assert outcome.code == 0 and outcome.err == "", outcome
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_results_are_those_of_single_runs_in_the_order_of_the_file(tiny_gpt, tmp_path):
    prompts = ["the", "the cat 😀 sat", "a", "dog.", "the dog ate the hat and", "you好"]
    (tmp_path / "prompts.txt").write_text("\r\n".join(prompts[:3]) + "\n" + "\n".join(prompts[3:]) + "\n")
    model = "--model", tiny_gpt.path
    single = [written(call(program.main, *model, "--prompt", p, "--max-new-tokens", 20, "--json"))[0] for p in prompts]
    for flags in [], ["--batch-size", 1], ["--batch_size", 3, "--json"], ["--batch-size", 1024]:
        found = call(program.main, *model, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 20, *flags)
        assert written(found) == single


def test_texts_end_at_stops_and_with_a_seed_each_is_drawn_by_its_number(tiny_gpt, tmp_path):
    (tmp_path / "prompts.txt").write_text("the\nthe cat sat\na\n")
    flags = "--max-new-tokens", 30, "--stop", "at", "--stop", "e "
    model, many = ("--model", tiny_gpt.path), ("--prompts", tmp_path / "prompts.txt", "--batch-size", 2)
    single = [written(call(program.main, *model, "--prompt", p, *flags, "--json"))[0] for p in ("the", "the cat sat", "a")]
    assert written(call(program.main, *model, *many, *flags)) == single
    assert not any(stop in one["text"] for one in single for stop in ("at", "e ")) and any(len(one["ids"]) < 30 for one in single)
    ids = [tiny_gpt.tokenizer.encode(p) for p in ("the", "the cat sat", "a", "dog")]
    drawn = generate(tiny_gpt.model, ids, 12, temperature=1.0, seed=3)
    for size in (1, 2, 4):
        assert [text for _, text in sorted(serve(tiny_gpt.model, ids, 12, batch_size=size, temperature=1.0, seed=3))] == drawn


def test_a_line_may_say_more_than_its_prompt(tiny_gpt, tiny_bart, tmp_path):
    lines = [{"prompt": "abc"}, {"prompt": "dcba", "decoder_prompt": "ab"}, {"prompt": "ab", "max_new_tokens": 1}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for flags in [], ["--max-new-tokens", 4], ["--max-new-tokens", 4, "--decoder-prompt", "b"]:
        single = []
        for line in lines:
            options = dict(zip(flags[::2], flags[1::2])) | {f"--{k.replace('_', '-')}": v for k, v in line.items()}
            words = [str(word) for pair in options.items() for word in pair]
            single += written(call(program.main, "--model", tiny_bart.path, *words, "--json"))
        many = "--prompts", tmp_path / "prompts.jsonl", "--batch-size", 2
        assert written(call(program.main, "--model", tiny_bart.path, *many, *flags)) == single
    assert_refused(outcome := call(program.main, "--model", tiny_gpt.path, "--prompts", tmp_path / "prompts.jsonl"))
    assert "prompts.jsonl, line 2: --decoder-prompt" in outcome.err


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_file_with_beams_gives_what_each_prompt_alone_gives(kind, tiny_gpt, tiny_bart, tmp_path):
    """Beams typed, with every line's own limit and decoder prompt; then those that the publishers ask for."""
    tiny = {"gpt": tiny_gpt, "bart": tiny_bart}[kind]
    save_pretrained(tmp_path, tiny.model, tiny.tokenizer)
    lines = [{"prompt": "abc"}, {"prompt": "dcba", "max_new_tokens": 3}, {"prompt": "a"}, {"prompt": "cab"},
             {"prompt": "aabb", "max_new_tokens": 7}]
    lines[3] |= {"decoder_prompt": "ab"} if kind == "bart" else {}
    many, flags = tmp_path / "prompts.jsonl", ["--beams", 3, "--length-penalty", 0.5, "--max-new-tokens", 8]
    many.write_text("\n".join(map(json.dumps, lines)))
    run = lambda *words: written(call(program.main, "--model", tmp_path, "--dtype", "float64", *words))
    for flags in flags, []:
        single = []
        for line in lines:
            own = dict(zip(flags[::2], flags[1::2])) | {f"--{k.replace('_', '-')}": v for k, v in line.items()}
            single += run("--json", *[word for pair in own.items() for word in pair])
        assert all("score" in one for one in single) and len({len(one["ids"]) for one in single}) > 2
        for size in ([], ["--batch-size", 2], ["--batch-size", 1]):
            found = run("--prompts", many, *flags, *size)
            assert [one.pop("score") for one in found] == pytest.approx([one["score"] for one in single], abs=1e-10)
            assert found == [{key: one[key] for key in ("prompt", "text", "ids")} for one in single]
        (tmp_path / "generation_config.json").write_text('{"num_beams": 4, "early_stopping": true, "max_new_tokens": 12}')


BAD = {  # the file, its flags, and what the line on stderr must name
    "empty.txt": ("", "", "empty.txt, line 1: the prompt is empty"),
    "blank.txt": ("a\n\nb\n", "", "blank.txt, line 2: the prompt is empty"),
    "last.txt": ("a\n\n", "", "last.txt, line 2: the prompt is empty"),
    "long.txt": ("a\n" + 70 * "b", "", "long.txt, line 2: 70 tokens and max_new_tokens=1 do not fit block_size=64"),
    "sum.txt": ("a\nabcde", "--max-new-tokens 60", "sum.txt, line 2: 5 tokens and max_new_tokens=60"),
    "new.txt": ("a\nb", "--max-new-tokens 0", "new.txt, line 1: max_new_tokens=0"),
    "json.jsonl": ('{"prompt": "a"}\n{"prompt": }', "", "json.jsonl, line 2 is not valid JSON"),
    "blank.jsonl": ('{"prompt": "a"}\n\n{"prompt": "b"}', "", "blank.jsonl, line 2 is not valid JSON"),
    "list.jsonl": ('["a"]', "", "list.jsonl, line 1 holds a JSON list"),
    "twice.jsonl": ('{"prompt": "a", "prompt": "b"}', "", "twice.jsonl, line 1 holds the key 'prompt' twice"),
    "deep.jsonl": ("[" * 100_000, "", "deep.jsonl, line 1 is nested too deeply"),
    "none.jsonl": ('{"prompt": "a"}\n{}', "", "none.jsonl, line 2: it has no prompt"),
    "type.jsonl": ('{"prompt": 3}', "", "type.jsonl, line 1: prompt=3 must be a text"),
    "null.jsonl": ('{"prompt": "a", "decoder_prompt": null}', "", "line 1: decoder_prompt=None must be a text"),
    "bool.jsonl": ('{"prompt": "a", "max_new_tokens": true}', "", "line 1: max_new_tokens=True must be a whole number"),
    "least.jsonl": ('{"prompt": "a", "max_new_tokens": -1}', "", "least.jsonl, line 1: max_new_tokens=-1"),
    "key.jsonl": ('{"prompt": "a", "temprature": 1}', "", "line 1: 'temprature' is not one of prompt, decoder_p"),
    "surrogate.jsonl": (r'{"prompt": "\ud800"}', "", "surrogate.jsonl, line 1: --prompt is not UTF-8"),
    "zero.txt": ("a", "--batch-size 0", "--batch-size 0 must be from 1 to 1024"),
    "huge.txt": ("a", "--batch-size 1000000000", "--batch-size 1000000000 must be from 1 to 1024"),
    "real.txt": ("a", "--batch-size 1e9", "whole number value: '1e9'"),
    "samples.txt": ("a", "--temperature 1 --num-samples 2", "--num-samples 2 and --prompts do not go"),
    "naive.txt": ("a", "--strategy naive", "--strategy naive and --prompts do not go"),
    "stats.txt": ("a", "--stats", "--stats and --prompts do not go"),
    "rule.txt": ("a", "--temperature 1 --top-k 0", "top_k=0"),
    "drawn.txt": ("a", "--beams 2 --temperature 1", "drawn.txt, line 1: --temperature 1.0 does not go with --beams 2"),
    "stop.txt": ("a", "--beams 2 --stop e", "stop.txt, line 1: a stop ['e'] does not go with --beams 2"),
    "wide.txt": ("a", "--beams 1000", "wide.txt, line 1: --beams 1000 are more than the 257 tokens"),
    "steep.txt": ("a", "--beams 2 --length-penalty nan", "length_penalty=nan"),
    "beam.txt": ("a\n" + 70 * "b", "--beams 2", "beam.txt, line 2: 70 tokens and max_new_tokens=1 do not fit"),
    "both.txt": ("a", "--prompt b", "one prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_is_wrong_is_refused_by_its_line_before_anything_is_computed(name, tiny_gpt, tmp_path, monkeypatch):
    text, flags, named = BAD[name]
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(GPT, "features", Explode(at=1))
    monkeypatch.chdir(tmp_path)
    assert_refused(outcome := call(program.main, "--model", tiny_gpt.path, "--prompts", name, *flags.split()))
    assert named in outcome.err


@pytest.mark.parametrize("words, named", [(["--prompts", "none.txt"], "none.txt"), (["--prompts", ""], "cannot read"),
                                          (["--prompt", "a", "--batch-size", 4], "with --prompts FILE")])
def test_what_goes_with_no_file_is_refused(words, named, tiny_gpt):
    assert_refused(outcome := call(program.main, "--model", tiny_gpt.path, *words))
    assert named in outcome.err


def test_lengths_that_publishers_ask_for_must_be_one_for_all_lines(tiny_gpt, tmp_path):
    save_pretrained(tmp_path, tiny_gpt.model, tiny_gpt.tokenizer)
    (tmp_path / "generation_config.json").write_text('{"min_new_tokens": 2}')
    for text, code in (("ab\ncd", 0), ("ab\nabc", 2)):
        (tmp_path / "prompts.txt").write_text(text)
        outcome = call(program.main, "--model", tmp_path, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 3)
        assert outcome.code == code, outcome
    assert "prompts.txt, line 2: min_new_tokens" in outcome.err and "min_length=5" in outcome.err


def test_a_result_waits_only_for_those_before_it_and_control_c_leaves_what_is_printed(tiny_gpt, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    printed = []

    def serve(*args, **options):
        for r in (1, 2, 0, 3):
            printed.append(sys.stdout.buffer.getvalue().count(b"\n"))
            if r == 3:
                raise KeyboardInterrupt
            yield r, [97 + r]

    monkeypatch.setattr(further.serve, "serve", serve)
    outcome = call(program.main, "--model", tiny_gpt.path, "--prompts", tmp_path / "prompts.txt")
    assert printed == [0, 0, 0, 3] and outcome.code == 130 and outcome.err == "interrupted\n"
    assert [json.loads(line)["prompt"] for line in outcome.out.splitlines()] == ["a", "b", "c"]


def test_control_c_in_a_real_process(tiny_gpt, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\n" * 5000)
    process = shell("generate.py", "--model", tiny_gpt.path, "--prompts", tmp_path / "prompts.txt")
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome.code == 130 and outcome.err == "interrupted\n"
    assert all(json.loads(line)["prompt"] == "the cat" for line in [first, *outcome.out.splitlines()])


def test_the_bar_counts_prompts_that_have_ended(tiny_gpt, tmp_path, monkeypatch):
    counted = []

    class Bar(further.serve.tqdm):
        def update(self, n=1):
            counted.append((n, self.total))

    monkeypatch.setattr(further.serve, "tqdm", Bar)
    (tmp_path / "prompts.txt").write_text("the\nthe cat\na\n")
    found = call(program.main, "--model", tiny_gpt.path, "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 3)
    assert found.code == 0 and counted == [(1, 3)] * 3
