"""Guessing changes how many passes a text takes, and nothing else: not its logits, its ids, or what is drawn how often."""

import copy
import os
import random
import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

import bench
import generate as program
from compare import compare, first_difference, measure
from conftest import GPT_TOML, call, train_run
from cost import count
from further import speculate
from further.speculate import GUESSES, examples_draft, find, given, look_up, lookup, lookup_draft, speculative
from generate import cached, find_strategy, generate, loop, stream
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.checks import prepare
from plumbing.errors import NonFiniteError, UserError
from plumbing.examples import Examples
from plumbing.report import comparison_table
from plumbing.weights import save_pretrained
from sampling import Choice, Chooser
from test_model import random_sizes, rough
from test_schedules import random_pattern

# -----------------------------------------------------------------------------
# The same text


def random_model(rng, kind, **sizes):
    """Rough, in fp64; where positions say little, it soon repeats itself."""
    if kind == "gpt":
        model = GPT(GPTConfig(n_layer=rng.randint(1, 2), eos_id=1, **sizes))
    else:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=rng.randint(1, 2), **sizes))
    return varied(model, rng.choice([0.0, 2.0]))


def varied(model, noise=2.0):
    model = rough(model)
    for name, p in model.named_parameters():
        if name in ("wpe.weight", "decoder_wpe.weight"):
            torch.nn.init.normal_(p, std=noise)
    return model


def oracle(texts, right, rng, V):
    """A draft that knows what will be written, row by row, and guesses right with that probability, else never."""
    def make(sources, B, room, choose):
        def draft(rows, which, k):
            true = [texts[r][len(row) : len(row) + k] + [0] * (len(row) + k - len(texts[r])) for r, row in zip(which, rows)]
            guess = lambda i: i if rng.random() < right else (i + rng.randrange(1, V)) % V
            return [row + list(map(guess, ids)) for row, ids in zip(rows, true)], [None] * k
        return draft
    return make


def random_case(seed, kind):
    """A model, prompts, M, and the options of a request with rules; the model may see a part of its past alone."""
    rng = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    sizes = random_sizes(rng) | {"block_size": rng.randint(8, 28), "vocab_size": rng.randint(5, 30)}
    if rng.random() < 0.4:
        sizes["pattern"] = random_pattern(rng, sizes)
    model, V = random_model(rng, kind, **sizes), sizes["vocab_size"]
    ids = lambda least: [rng.randrange(V) for _ in range(rng.randint(least, 6))]
    prompts = [ids(1) for _ in range(rng.randint(1, 4))]
    options = {"ignore_eos": rng.random() < 0.3, "min_length": rng.choice([0, 0, rng.randint(1, 20)]),
               "no_repeat_ngram": rng.choice([None, None, 1, 2, 3]), "n_vocab": rng.choice([None, V - 1]),
               "forced_last": rng.choice([None, 1]), "forced_first": rng.choice([None, 3]) if kind == "bart" else None}
    if kind == "bart" and rng.random() < 0.5:
        options["decoder_prompts"] = [ids(0) for _ in prompts]
    M = rng.randint(1, model.config.block_size - max(map(len, options.get("decoder_prompts", prompts))) - (kind == "bart"))
    return rng, model, prompts, M, options, {**sizes, "block_size": sizes["block_size"] + rng.randint(0, 3)}


def outcome(model, prompts, M, passes, strategy="cached", speculate=None, **options):
    """Ids and their logits, or the error that ended it; what each pass found is appended to passes."""
    def make(*request):
        step = (find(model, speculate) if speculate else find_strategy(model, strategy))(*request)

        def noted(rows, which):
            passes.append([[] for _ in rows])
            kept = lambda own, ids: (own.append(i) or i for i in ids)
            return list(map(kept, passes[-1], step(rows, which)))

        return noted

    try:
        given = prepare(model, prompts, M, options.get("decoder_prompts"))
        return measure(model, make, given, prompts, M, **options)[1:3]
    except NonFiniteError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_the_text_is_that_of_plain_greedy_decoding(kind):
    """Whoever guesses, whatever the rules and the pattern. MINDECODE_CASES=500 for a long run, of each kind."""
    several = refused = 0
    for seed in range(int(os.environ.get("MINDECODE_CASES", 14))):
        rng, model, prompts, M, options, sizes = random_case(seed, kind)
        plain = outcome(model, prompts, M, [], **options)
        drafts = {"lookup": dict(speculate="lookup"), "itself": dict(speculate=copy.deepcopy(model)),
                  "small": dict(speculate=random_model(rng, kind, **sizes)),
                  "examples": dict(speculate=Examples(
                      [[rng.randrange(sizes["vocab_size"] - 1) for _ in range(n)] for n in (0, 9, 60)]))}
        if isinstance(plain, tuple):
            begun = [[2, *row] for row in options.get("decoder_prompts", [[]] * len(prompts))] if kind == "bart" else prompts
            texts = [row + new for row, new in zip(begun, plain[0])]
            for right in 0.0, 0.7:
                make = oracle(texts, right, rng, model.config.vocab_size)
                drafts[f"right {right}"] = dict(strategy=partial(speculative, make_draft=make))
        for name, draft in drafts.items():
            found = outcome(model, prompts, M, passes := [], **options, **draft)
            if isinstance(plain, str):
                assert found == plain, (seed, name)
                refused += 1
                continue
            largest, first = first_difference(*plain, *found)
            assert largest <= 1e-10 and first is None, (seed, name, model.config.pattern)
            several += any(len({len(row) for row in rows if row}) > 1 for rows in passes)
            assert name != "right 0.0" or all(len(row) <= 1 for rows in passes for row in rows)
    assert several > 5  # of a pass, rows accepted different numbers
    assert refused > 0 or "MINDECODE_CASES" not in os.environ


SIZES = dict(n_head=4, n_embd=16, vocab_size=11, block_size=40, tie_weights=False)


def tiny(kind, seed=0, **sizes):
    torch.manual_seed(seed)
    depth = dict(n_layer=2) if kind == "gpt" else dict(n_encoder_layer=1, n_decoder_layer=2)
    cls = GPT if kind == "gpt" else BART
    return varied(cls(cls.config_class(**depth, **SIZES | sizes)))


@pytest.mark.parametrize("pattern", ["full", "local:3", "sinks:1,3", "strided:4"])
@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_model_accepts_all_that_it_guesses_itself_and_one_that_is_always_wrong_nothing(kind, pattern):
    """Counted: the passes, and the positions that enter in each. Where positions share slots, too."""
    model, P = tiny(kind, pattern=pattern), 5 if kind == "gpt" else 1
    for M in 1, 2, 5, 6, 7, 24:
        [text] = generate(model, [[3, 9, 4, 2, 10]], M, ignore_eos=True)
        row = [[3, 9, 4, 2, 10] if kind == "gpt" else [2], text]
        wrong = partial(speculative, make_draft=oracle([row[0] + text], 0.0, random.Random(M), 11))
        for draft, each in (dict(speculate=copy.deepcopy(model)), GUESSES + 1), (dict(strategy=wrong), 1):
            with count(model) as cost:
                found = list(stream(model, [[3, 9, 4, 2, 10]], M, ignore_eos=True, **draft))
            lengths, left = [len(ids) for [ids] in found], M
            for step, n in enumerate(lengths, 1):
                k = min(GUESSES, left - 1)  # guesses of which one more is found
                assert n == min(each, k + 1) and cost.decoder[step] == k + 1 + (P - 1) * (step == 1)
                left -= n
            assert left == 0 and cost.steps == len(lengths) == -(-M // each) and sum(found, [])[0][:1] == text[:1]


@pytest.mark.parametrize("kind", ["gpt", "bart"])
@pytest.mark.parametrize("pattern", ["local:3", "sinks:1,2", "fixed:4,1", "full"])
def test_a_row_may_leave_while_another_is_taken_back(pattern, kind):
    """What a chunk of wrong guesses would evict of a ring is still there when rows have moved."""
    prompts, model = [[3, 9, 4, 2, 10], [5], [7, 7]], tiny(kind, pattern=pattern)
    whole = generate(model, prompts, 24, ignore_eos=True)
    lengths = lambda i: {(*row, i).index(i) for row in whole}
    model.config.eos_id = max(range(11), key=lambda i: (len(lengths(i)), min(lengths(i))))  # they end at different steps
    texts = generate(model, prompts, 24)
    rows = [(prompt if kind == "gpt" else [2]) + text for prompt, text in zip(prompts, texts)]
    assert len(set(map(len, texts))) == 3
    for seed in range(8):
        make = oracle(rows, 0.6, random.Random(seed), 11)
        assert generate(model, prompts, 24, strategy=partial(speculative, make_draft=make)) == texts


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_samples_of_one_prompt_are_neighbours_and_ask_its_source(kind):
    """A strategy is made for the prompts, and its loop may have several rows of each."""
    model, prompts = tiny(kind), [[3, 9, 4], [7], [5, 5, 2, 8]]
    begun = [prompt if kind == "gpt" else [2] for prompt in prompts]
    expected = [row for row in generate(model, prompts, 12) for _ in range(3)]
    for draft in "lookup", tiny(kind, seed=1), model:
        make = speculate.find(model, draft, "cached")
        rows, limits = [row for row in begun for _ in range(3)], [len(row) + 12 for row in begun for _ in range(3)]
        choose = Chooser(Choice(), "cpu", model.config.end_ids, limits)
        step = make(model, prompts if kind == "bart" else None, 3, max(limits), choose)
        found = loop(step, rows, limits, lambda r, row: row[-1] in model.config.end_ids)
        assert [sum(ids, []) for ids in zip(*found)] == expected


def test_what_followed_the_longest_match_is_guessed_the_newest_one_first_and_the_source_last():
    assert look_up([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3], 4) == [7, 9, 2, 3]  # three ids, not the nearer two
    assert look_up([5, 6, 1, 5, 6, 2, 5, 6], 2) == [2, 5]                 # the nearest of two
    assert look_up([4, 5, 4, 5, 4], 5) == [5, 4, 5, 4, 5]                 # round and round
    assert look_up([1, 2, 3], 3) == [3, 3, 3] and look_up([9], 1) == [9]  # nothing occurred before
    draft = lookup_draft([[7, 1, 2, 3, 4], [1, 5, 6]], 2, 99, None)
    assert draft([[2, 1, 2], [2, 8]], [0, 1], 2) == ([[2, 1, 2, 3, 4], [2, 8, 8, 8]], [None] * 2)
    assert draft([[2, 5]], [1], 1) == ([[2, 5, 6]], [None])  # row 0 has left


def test_of_what_followed_in_the_examples_what_the_source_says_is_guessed_then_the_most_frequent():
    draft = examples_draft(Examples([[1, 2, 8], [], [1, 2, 8, 1, 2], [9, 3, 2, 7, 3]]), [[7, 9], [8, 4, 7]], 2, 99, None)
    assert draft([[1, 2], [1, 2]], [0, 1], 1) == ([[1, 2, 9], [1, 2, 8]], [None])  # 8 followed twice, 9 behind a text's end
    assert draft([[3, 2], [2]], [0, 1], 2) == ([[3, 2, 7, 3], [2, 8, 1]], [None] * 2)  # two ids decide, where there are two
    assert draft([[5]], [1], 2) == ([[5, 5, 5]], [None] * 2)  # never seen
    assert examples_draft(Examples([[1, 2, 1, 3, 1, 3, 4]]), None, 1, 9, None)([[2, 1]], [0], 1) == ([[2, 1, 3]], [None])


# -----------------------------------------------------------------------------
# Sampling


def exact(model, prompt, M, choice):
    """text -> probability, of every text of M tokens, enumerated."""
    choose, bart, found = Chooser(choice), model.config.is_encoder_decoder, {}
    for text in product(range(model.config.vocab_size), repeat=M):
        row = [model.config.start_id if bart else prompt[0], *([] if bart else prompt[1:])]
        given = [torch.tensor([ids]) for ids in ([prompt] if bart else []) + [row + list(text)]]
        with torch.no_grad():
            scores = choose.scores(model(*given)[0, len(row) - 1 : -1], [[]] * M, range(M))
        found[text] = speculate.distribution(choose, scores).gather(1, torch.tensor(text)[:, None]).prod().item()
    assert abs(sum(found.values()) - 1) < 1e-9
    return found


@pytest.mark.parametrize("fields", [{}, dict(top_k=3), dict(top_p=0.8), dict(temperature=0.6, min_p=0.05)], ids=str)
@pytest.mark.parametrize("draft", ["lookup", "small"])
def test_texts_have_the_probabilities_of_plain_sampling(draft, fields):
    """Chi-square over all texts of three tokens; MINDECODE_DRAWS=20 takes twenty times as many."""
    kind = "bart" if "top_k" in fields else "gpt"
    fields = dict(temperature=1.0) | fields
    model, prompt, M = tiny(kind, 5, vocab_size=4), [3, 1, 2, 3], 3
    n = 1000 * int(os.environ.get("MINDECODE_DRAWS", 1))
    small = tiny(kind, 6, vocab_size=4)
    drawn = generate(model, [prompt] * n, M, ignore_eos=True, seed=1, **fields,
                     speculate=draft if draft == "lookup" else small)
    probs = exact(model, prompt, M, Choice(**fields))
    counts = {text: 0 for text in probs}
    for row in drawn:
        counts[tuple(row)] += 1
    assert all(counts[text] == 0 for text, p in probs.items() if p == 0)
    often = {text: p for text, p in probs.items() if n * p >= 5}
    rare = 1 - sum(often.values())
    cells = [(counts[text], n * p) for text, p in often.items()] + [(n - sum(counts[text] for text in often), n * rare)]
    cells = [(o, e) for o, e in cells if e > 1e-6]
    square, df = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    bound = df * (1 - 2 / (9 * df) + 3.72 * (2 / (9 * df)) ** 0.5) ** 3  # Wilson and Hilferty: by chance once in 10,000
    assert df > 4 and square < bound, (square, df)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_seed_draws_the_same_text_with_lookup_as_without(kind):
    """A guess that is certain costs no draw of its own."""
    model, texts = tiny(kind, 5, vocab_size=6), set()
    for seed in range(20):
        options = dict(temperature=0.8, top_p=0.9, seed=seed, ignore_eos=True)
        plain = generate(model, [[3, 1, 2]], 20, **options)
        assert generate(model, [[3, 1, 2]], 20, speculate="lookup", **options) == plain
        texts.add(tuple(plain[0]))
    assert len(texts) > 10


def test_what_is_drawn_given_a_guess_is_the_models_over_all_guesses():
    for seed in range(20):
        torch.manual_seed(seed)
        p, q = (3 * torch.randn(2, 7, dtype=torch.float64)).softmax(-1)
        p[seed % 3], q[seed % 2] = 0, 0
        p, q = p / p.sum(), q / q.sum()
        given_each = [given(p, q, x) for x in range(7) if q[x]]
        assert all((one >= 0).all() and abs(one.sum() - 1) < 1e-12 for one in given_each)
        assert (sum(q[x] * one for x, one in zip([x for x in range(7) if q[x]], given_each)) - p).abs().max() < 1e-12
        accepted = sum(q[x] * one[x] for x, one in zip([x for x in range(7) if q[x]], given_each))
        assert abs(accepted - torch.minimum(p, q).sum()) < 1e-12  # as many as any scheme can
        assert torch.equal(given(p, p, int(p.argmax())).argmax(), p.argmax()) and given(p, p, 3)[3] == 1


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_model_accepts_all_that_it_draws_itself(kind):
    model = tiny(kind, 5)
    for fields in {}, dict(top_k=3), dict(top_p=0.7):
        found = list(stream(model, [[3, 1, 2], [4]], 21, speculate=model, temperature=1.0, seed=3, ignore_eos=True, **fields))
        lengths = [[len(ids) for ids in row] for row in zip(*found)]
        assert all(n == GUESSES + 1 for row in lengths for n in row[: 20 // (GUESSES + 1)])


# -----------------------------------------------------------------------------
# Beside other strategies


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_compare_takes_a_strategy_of_several_tokens_a_pass(kind):
    def eager(*given):
        step = lookup(*given)
        return lambda rows, which: [list(ids) for ids in step(rows, which)]

    model, prompts = tiny(kind).float(), [[3, 9, 4], [7], [5, 5, 2, 8]]
    result = compare(model, {"cached": cached, "lookup": lookup, "eager": eager}, prompts, 20, ignore_eos=True)
    assert not result["bug"] and "lookup" in comparison_table(result)
    for s in result["strategies"][1:]:
        assert s["identical"] and s["finding"]["verdict"] == "rounding" and s["closed_form"] is None
        assert len(s["steps"]) < 20 and s["decoder_tokens"] > result["strategies"][0]["decoder_tokens"]


def test_compare_finds_a_bug_of_chunks_alone():
    model = tiny("gpt", n_kv_head=2).float()
    model.h[1].attn.pattern.register_forward_pre_hook(
        lambda module, args: (args[0], args[1], 2 * args[2], *args[3:]) if 1 < args[0].size(2) < args[1].size(2) else None)
    result = compare(model, {"cached": cached, "lookup": lookup}, [[3, 9, 4]], 20, ignore_eos=True)
    right, found = (s["finding"] for s in result["strategies"])
    assert right["verdict"] == "equal" and (found["verdict"], found["layer"], found["kind"]) == ("bug", 1, "values")
    first = len(next(iter(stream(model, [[3, 9, 4]], 20, strategy=lookup, ignore_eos=True)))[0])
    assert found["step"] == first + 1  # the prefill is one chunk that has nothing before it


def test_the_comparison_of_the_command_line_knows_it(tiny_gpt):
    args = "compare", "--model", tiny_gpt.path, "--prompt", "the cat", "--max-new-tokens", 30, "--device", "cpu"
    for names in "cached,further.speculate:lookup", "further.speculate:lookup":
        code, out, err = call(bench.main, *args, "--strategies", names)
        assert code == 0 and not err and "BUG" not in out and "DIFFER" not in out and "  -  " in out


# -----------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def draft(tiny_gpt, tmp_path_factory):
    """draft(vocabulary or sizes of its own) -> the directory of a random model with the tokenizer of tiny_gpt."""
    def make(**sizes):
        folder = tmp_path_factory.mktemp("draft")
        save_pretrained(folder, GPT(replace(tiny_gpt.model.config, n_layer=1, **sizes)), tiny_gpt.tokenizer)
        return folder
    return make


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """The path of a run with a tokenizer of its own that has learned two lines."""
    folder = tmp_path_factory.mktemp("parrot")
    (folder / "lines.txt").write_text("the cat sat on a mat.\nthe dog ate my hat.\n" * 100)
    train_run(folder, GPT_TOML, "--train.steps=80", "--train.eval_every=80", "--data.tokenizer=char",
              f"--data.source={folder / 'lines.txt'}")
    return folder / "out"


PROMPT = "the cat 😀 sat on the mat, the cat 😀 s"


def test_the_command_writes_the_same_and_tells_the_tokens_of_a_pass(tiny_gpt, draft):
    args = "--model", tiny_gpt.path, "--prompt", PROMPT, "--max-new-tokens", 20, "--device", "cpu"
    plain = call(program.main, *args)
    assert plain.code == 0 and not plain.err
    each = {}
    for name, guesser in ("lookup", "lookup"), ("itself", tiny_gpt.path), ("random", draft()):
        for more in [], ["--no-stream"], ["--json"]:
            done = call(program.main, *args, "--speculate", guesser, *more)
            assert done.code == 0 and (more == ["--json"] or done.out == plain.out), done
        found = re.fullmatch(r"20 new tokens in (\d+) passes: (\S+) each\n", done.err)
        assert found[2] == f"{20 / int(found[1]):.2f}"
        each[name] = 20 / int(found[1])
    assert each["itself"] == 5 and each["lookup"] > 1 and each["random"] < 1.5, each
    several = "--num-samples", 2, "--temperature", 1, "--seed", 1, "--speculate", tiny_gpt.path
    assert call(program.main, *args, *several).err == "40 new tokens in 8 passes: 5.00 each\n"


def test_a_text_that_repeats_is_written_in_few_passes(parrot):
    args = "--model", parrot, "--prompt", "the cat sat on a mat.\nthe ", "--device", "cpu"
    plain, done = call(program.main, *args), call(program.main, *args, "--speculate", "lookup")
    assert done.out == plain.out and "dog" in done.out
    assert float(done.err.split()[-2]) >= 1.5, done.err


def test_examples_are_a_file_of_texts_which_for_bart_are_lines(parrot, tiny_bart, tmp_path):
    """What is said elsewhere need not be found one by one."""
    args, passes = ("--model", parrot, "--prompt", "the dog", "--max-new-tokens", 20, "--device", "cpu"), {}
    for draft in "lookup", parrot.parent / "lines.txt":
        done = call(program.main, *args, "--speculate", draft)
        assert done.code == 0 and done.out == call(program.main, *args).out
        passes[draft] = int(done.err.split()[4])
    assert passes[parrot.parent / "lines.txt"] < passes["lookup"]

    args = "--model", tiny_bart.path, "--prompt", "abc", "--max-new-tokens", 11, "--device", "cpu", "--ignore-eos"
    written = tiny_bart.tokenizer.decode(generate(tiny_bart.model, [tiny_bart.tokenizer.encode("abc")], 11, ignore_eos=True)[0])
    (tmp_path / "lines.txt").write_text(f"abab\n{written}\n")
    done = call(program.main, *args, "--speculate", tmp_path / "lines.txt")
    assert done.code == 0 and done.out == call(program.main, *args).out and int(done.err.split()[4]) < 11, done
    (tmp_path / "lines.txt").write_bytes(b"\xff")
    done = call(program.main, *args, "--speculate", tmp_path / "lines.txt")
    assert done.code == 2 and "lines.txt is not UTF-8" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("flags, words", [
    (["--speculate", "lookup", "--strategy", "naive"], "--strategy naive and --speculate do not go"),
    (["--speculate", "{other}"], "does not have the tokenizer of --model"),
    (["--speculate", "{long}"], "vocab_size=300 of the draft is 257 in the model"),
    (["--speculate", "{short}"], "block_size=30 of the draft is less than the 33 tokens of a text"),
    (["--speculate", "/nowhere"], "/nowhere is not a directory"),
    (["--speculate", ""], "--speculate '' does not have the tokenizer"),
])
def test_what_cannot_be_a_draft_is_refused_by_name(flags, words, tiny_gpt, parrot, draft):
    places = {"{other}": parrot, "{long}": draft(vocab_size=300), "{short}": draft(block_size=30)}
    done = call(program.main, "--model", tiny_gpt.path, "--prompt", "the", "--max-new-tokens", 30, "--device", "cpu",
                *(places.get(flag, flag) for flag in flags))
    assert done.code == 2 and not done.out and words in done.err and done.err.count("\n") == 1, done


@pytest.mark.parametrize("given, words", [
    (3, "speculate=3 is not 'lookup', Examples or a model"), ("lookups", "speculate='lookups' is not 'lookup'"),
    (Examples([[3], [11]]), "the examples have the id 11, and vocab_size=11"),
    (tiny("bart"), "is_encoder_decoder=True of the draft is False"),
    (tiny("gpt", vocab_size=12), "vocab_size=12 of the draft is 11"),
    (tiny("gpt", block_size=9), "block_size=9 of the draft is less than the 10 tokens")],
                         ids=["number", "word", "examples", "kind", "vocabulary", "length"])
def test_a_request_is_refused_before_anything_is_computed(given, words):
    with pytest.raises(UserError, match=words):
        stream(tiny("gpt"), [[3, 4]], 8, speculate=given)
    with pytest.raises(UserError, match="does not go with speculate"):
        stream(tiny("gpt"), [[3, 4]], 8, speculate="lookup", strategy="naive")


def test_a_source_that_is_too_long_for_the_draft_is_refused():
    with pytest.raises(UserError, match="block_size=9 of the draft is less than the 12 tokens"):
        stream(tiny("bart"), [[3] * 12], 4, speculate=tiny("bart", block_size=9))
    assert generate(tiny("bart"), [[3] * 9], 4, speculate=tiny("bart", block_size=9)) == generate(tiny("bart"), [[3] * 9], 4)


def test_a_strategy_that_knows_no_sliding_refuses_it_by_name():
    from further.serve import continuous
    model = tiny("gpt", 1)
    M = model.config.block_size
    for strategy in (continuous, speculate.lookup):
        with pytest.raises(UserError, match=f"{M + 2} tokens does not fit {M}, and this strategy"):
            generate(model, [[1, 2]], M, strategy=strategy, overflow="slide")
        assert generate(model, [[1, 2]], M - 2, strategy=strategy) == generate(model, [[1, 2]], M - 2)
