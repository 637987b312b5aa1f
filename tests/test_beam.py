"""
Beam search: exact where it is wide enough to be, transformers' elsewhere, and with the cache what it is without.

MINDECODE_CASES=120 for as many problems of each kind, and 30 models of either kind beside transformers'.
"""

import copy
import itertools
import json
import os
import random

import pytest
import torch

import further.beam as beam
import generate as program
from cache import KVCache
from conftest import call
from cost import count
from further.beam import beam_search
from generate import generate
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing import checks
from plumbing.errors import NonFiniteError, UserError
from plumbing.products import fastest
from plumbing.weights import save_pretrained
from test_model import rough

CASES = int(os.environ.get("MINDECODE_CASES", 16))
EARLY = [True, False, "never"]


def lively(seed, vocab_size=None, heads_share=True):
    """A random tiny model in float64 whose texts vary, every second one a BART, with one end, several, or none."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    V, H = vocab_size or rng.randint(12, 30), rng.choice([1, 2])
    sizes = dict(n_head=H, n_embd=8 * H, vocab_size=V, block_size=24, n_kv_head=rng.choice([None, 1]) if heads_share else None)
    ends = rng.choice([2, [2, 3], *2 * [list(range(2, 2 + V // 2))]])  # with half of the vocabulary most texts end
    if seed % 2:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=2, eos_id=ends, **sizes))
    else:
        model = GPT(GPTConfig(n_layer=2, eos_id=rng.choice([ends, ends, ends, None]), **sizes))
    model = rough(model)
    for name, p in model.named_parameters():
        p.data *= 4 if "wpe" in name else 2 if p.dim() == 2 else 1
    return model, rng


def prompts(model, rng, n):
    return [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, 9))] for _ in range(n)]


def settings(rng):
    """Arguments of beam_search() that are often used."""
    return dict(beams=rng.randint(2, 5), length_penalty=rng.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
                early_stopping=rng.choice(EARLY))


def rules(rng):
    """Fields of Choice."""
    return dict(no_repeat_ngram=rng.choice([None, 3]), min_length=rng.choice([0, 6]), forced_last=rng.choice([None, 2]))


def differ(texts, others):
    """How much the scores differ of texts of one prompt; infinite where the ids do, unless the scores are equal there."""
    if len(texts) != len(others):
        return float("inf")
    tied = lambda score: sum(abs(score - other) < 1e-9 for other, _ in texts) > 1
    same = all(ids == mine or tied(score) for (score, ids), (_, mine) in zip(texts, others))
    return max(abs(a - b) for (a, _), (b, _) in zip(texts, others)) if same else float("inf")


# -----------------------------------------------------------------------------
# What is found


def every_text(model, prompt, longest, length_penalty):
    """All texts that there are behind one prompt, the best first: (score, new ids)."""
    config = model.config
    row, source = ([config.start_id], [torch.tensor([prompt])]) if config.is_encoder_decoder else (prompt, [])
    texts = {}
    for ids in itertools.product(range(config.vocab_size), repeat=longest):
        cut = next((n + 1 for n, i in enumerate(ids) if i in config.end_ids), longest)
        texts[ids[:cut]] = None
    found = []
    for length, group in itertools.groupby(sorted(texts, key=len), len):
        group = list(group)
        idx = torch.tensor([row + list(ids) for ids in group])
        with torch.no_grad():
            logits = model(*(x.expand(len(idx), -1) for x in source), idx)[:, len(row) - 1 : -1]
        totals = logits.log_softmax(-1).gather(-1, idx[:, len(row) :, None]).sum((1, 2))
        found += [(total / length**length_penalty, list(ids)) for total, ids in zip(totals.tolist(), group)]
    return sorted(found, key=lambda text: -text[0])


@pytest.mark.parametrize("seed", range(CASES))
def test_where_it_is_wide_enough_it_finds_the_best_of_all_texts(seed):
    """Wide enough for all of them to run: then it finds all, in order. As many as can run before the last step: the best."""
    V, longest = 4 + seed % 4 // 2, 3 + seed % 3 % 2
    model, rng = lively(seed, V)
    rows, length_penalty = prompts(model, rng, 2), rng.choice([-1.0, 0.0, 0.7, 1.0, 2.0])
    options = dict(length_penalty=length_penalty, early_stopping="never")
    everything = beam_search(model, rows, longest, beams=V**longest, **options)
    enough = beam_search(model, rows, longest, beams=V ** (longest - 1), **options)
    for row, texts, some in zip(rows, everything, enough):
        best = every_text(model, row, longest, length_penalty)
        assert differ(best, texts) <= 1e-10
        assert differ(best[:1], some[:1]) <= 1e-10


@pytest.mark.parametrize("seed", range(CASES))
def test_one_beam_is_greedy(seed):
    model, rng = lively(seed)
    rows, choice = prompts(model, rng, 3), rules(rng)
    found = beam_search(model, rows, 12, **settings(rng) | dict(beams=1, early_stopping=seed % 3 == 0), **choice)
    assert [[ids for _, ids in texts] for texts in found] == [[ids] for ids in generate(model, rows, 12, **choice)]


@pytest.mark.parametrize("seed", range(min(CASES // 4, 30) * 2))
def test_texts_and_scores_are_those_of_transformers(seed, tmp_path):
    """In fp64, but for the log-probabilities, which transformers computes in fp32 whatever the model."""
    transformers = pytest.importorskip("transformers")
    model, rng = lively(seed, heads_share=False)
    save_pretrained(tmp_path, model)
    architecture = "BartForConditionalGeneration" if seed % 2 else "GPT2LMHeadModel"
    theirs = getattr(transformers, architecture).from_pretrained(tmp_path, dtype=torch.float64).eval()
    ends, looked = model.config.end_ids, set()
    every = list(itertools.product(range(2, 6), (0.5, 1.0, 2.0), EARLY))
    for beams, length_penalty, early_stopping in rng.sample(every, min(CASES // 2, len(every))):
        [row] = prompts(model, rng, 1)
        start, M = 1 if seed % 2 else len(row), rng.randint(4, 14)
        ngram, least, last = rng.choice([0, 3]), rng.choice([0, start + 4]), rng.choice([None, 2])
        first = rng.choice([None, model.config.vocab_size - 1]) if seed % 2 else None
        with torch.no_grad():
            found = theirs.generate(
                torch.tensor([row]), attention_mask=torch.ones(1, len(row)), num_beams=beams, num_return_sequences=beams,
                length_penalty=length_penalty, early_stopping=early_stopping, max_new_tokens=M, do_sample=False,
                no_repeat_ngram_size=ngram, min_length=least, forced_bos_token_id=first, forced_eos_token_id=last,
                eos_token_id=ends or None, pad_token_id=1, return_dict_in_generate=True, output_scores=True)
        expected = [(score, new[: next((n + 1 for n, i in enumerate(new) if i in ends), M)]) for score, new in zip(
            found.sequences_scores.tolist(), (text[start:] for text in found.sequences.tolist()))]
        [texts] = beam_search(model, [row], M, beams=beams, length_penalty=length_penalty, early_stopping=early_stopping,
                              no_repeat_ngram=ngram or None, min_length=least, forced_first=first, forced_last=last)
        assert [ids for _, ids in texts] == [ids for _, ids in expected]
        assert max(abs(a - b) for (a, _), (b, _) in zip(texts, expected)) <= 1e-5
        looked |= {tuple(ids) for _, ids in texts}
    assert len(looked) > CASES / 3  # or all of this would say little


def test_every_setting_makes_a_difference():
    changes = [dict(beams=4), dict(length_penalty=2.0), dict(length_penalty=0.0), dict(early_stopping=True),
               dict(early_stopping="never"), dict(no_repeat_ngram=2), dict(min_length=12), dict(ignore_eos=True)]
    different = [0] * len(changes)
    for seed in range(40):
        model, rng = lively(seed)
        rows = prompts(model, rng, 1)
        plain = beam_search(model, rows, 10, beams=2)
        for n, change in enumerate(changes):
            found = beam_search(model, rows, 10, **{"beams": 2} | change)
            different[n] += {tuple(ids) for _, ids in found[0][:2]} != {tuple(ids) for _, ids in plain[0]}
    assert min(different) >= 4, different


# -----------------------------------------------------------------------------
# What it takes


@pytest.fixture
def moves(monkeypatch):
    """How many rows of a cache became another of their prompt, in each step of a search in which no prompt leaves."""
    moved, original = [], KVCache.reorder

    def reorder(self, rows, since=0):
        if len(rows) == len(self.filled):
            moved.append(sum(i != row for i, row in enumerate(rows)))
        original(self, rows, since)

    monkeypatch.setattr(KVCache, "reorder", reorder)
    return moved


@pytest.mark.parametrize("block", range(4))
def test_a_cache_changes_no_score_and_its_rows_do_move(block, moves):
    greedy = 0
    for seed in range(block * CASES, block * CASES + CASES):
        model, rng = lively(seed)
        rows = prompts(model, rng, rng.randint(2, 4))
        choice = rules(rng) | {"min_length": 20}
        options = settings(rng) | {"beams": rng.randint(3, 5)} | choice
        moves.clear()
        cached = beam_search(model, rows, 12, **options)
        assert sum(moves) > 0, f"seed {seed}"
        uncached = beam_search(model, rows, 12, use_cache=False, **options)
        assert max(map(differ, uncached, cached)) <= 1e-10, f"seed {seed}"
        greedy += generate(model, rows, 12, **choice) == [texts[0][1] for texts in cached]
    assert greedy <= 0.7 * CASES


@pytest.mark.parametrize("seed", range(CASES))
def test_batches_of_ragged_prompts_with_limits_of_their_own_find_what_each_finds_alone(seed):
    model, rng = lively(seed)
    rows, options = prompts(model, rng, 4), settings(rng) | rules(rng)
    most, batch_size = [rng.randint(1, 10) for _ in rows], rng.choice([None, 1, 3])
    starts = [[rng.randrange(12) for _ in range(rng.randint(0, 4))] for _ in rows] if seed % 2 else [None] * 4
    given = lambda starts: dict(options, decoder_prompts=starts) if seed % 2 else options
    together = beam_search(model, rows, most, batch_size=batch_size, **given(starts))
    for row, start, n, texts in zip(rows, starts, most, together, strict=True):
        assert differ(beam_search(model, [row], n, **given([start]))[0], texts) <= 1e-10


@pytest.mark.parametrize("pattern", ["local:3", "strided:3", "topk:2,2"])
def test_sparse_patterns_are_searched_as_well(pattern):
    torch.manual_seed(0)
    model = rough(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=24, pattern=pattern, eos_id=2)))
    rows = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
    cached, uncached = (beam_search(model, rows, 12, beams=3, use_cache=use) for use in (True, False))
    assert max(map(differ, uncached, cached)) <= 1e-10


@pytest.mark.parametrize("seed", [2, 3])
def test_a_prompt_enters_once_and_a_step_of_n_beams_is_n_positions(seed):
    model, rng = lively(seed)
    [row] = prompts(model, rng, 1)
    with count(model) as cost:
        [texts] = beam_search(model, [row], 9, beams=4, ignore_eos=True)
    assert [len(ids) for _, ids in texts] == [9] * 4
    assert cost.encoder_tokens == (len(row) if seed % 2 else 0)
    assert list(cost.decoder.values()) == [1 if seed % 2 else len(row)] + [4] * 8
    assert not seed % 2 or cost.linear_rows["decoder.0.cross.c_kv"] == len(row)


def test_beams_ask_one_memory_which_is_neither_copied_nor_moved(monkeypatch):
    model, rng = lively(3)
    seen, features = [], model.features

    def watched(idx, cache, start_pos, memory):
        seen.append((len(idx), memory.nbytes, cache.nbytes, [x.data_ptr() for kv in memory.kv for x in kv]))
        return features(idx, cache=cache, start_pos=start_pos, memory=memory)

    monkeypatch.setattr(model, "features", watched)
    beam_search(model, [[4, 5, 6, 7, 8]], 9, beams=4, ignore_eos=True)
    config, [(one, source, _, place), *later] = model.config, seen
    assert one == 1 and source == 2 * 2 * 5 * config.of("cross").kv_width * 8  # k and v, layers, tokens, bytes of a number
    own = 2 * 2 * 4 * 10 * config.of("decoder").kv_width * 8
    assert later == [(4, source, own, place)] * 8


def test_sources_that_are_done_leave_the_batch():
    model, rng = lively(3)
    rows = prompts(model, rng, 5)
    with count(model) as cost:
        together = beam_search(model, rows, 12, beams=2)
    steps = []
    for row in rows:
        with count(model) as alone:
            beam_search(model, [row], 12, beams=2)
        steps.append(alone.steps)
    assert len(set(steps)) > 2 and all(len(texts) == 2 for texts in together)
    assert list(cost.decoder.values())[1:] == [2 * sum(n > step for n in steps) for step in range(1, max(steps))]


def test_rows_that_are_alike_up_to_a_position_are_reordered_from_there():
    cache = KVCache(3, 5)
    cache.begin([0, 0, 0], 5)
    cache.update(0, torch.arange(5), torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4))
    cache.filled, (k, v) = [5, 5, 5], (cache.k[0].clone(), cache.v[0].clone())
    cache.reorder([2, 1, 0], since=3)
    for now, was in ((cache.k[0], k), (cache.v[0], v)):
        assert torch.equal(now[:, :, :3], was[:, :, :3]) and torch.equal(now[:, :, 3:], was[[2, 1, 0], :, 3:])


# -----------------------------------------------------------------------------
# The command line, and refusals


def test_the_command_line_prints_the_best_text(tiny_gpt, tiny_bart):
    for (model, tokenizer, path), shown in (tiny_gpt, "the "), (tiny_bart, ""):
        def line(*args):
            outcome = call(program.main, "--model", path, "--prompt", prompt, "--max-new-tokens", 8, "--device", "cpu", *args)
            assert outcome.code == 0, outcome
            return outcome

        prompt, model = shown or "abcd", fastest(copy.deepcopy(model))  # as the command has it, whose sums round alike
        [[(score, ids), *_]] = beam_search(model, [tokenizer.encode(prompt)], 8, beams=3, length_penalty=0.5,
                                           early_stopping=True)
        flags = ["--beams", 3, "--length-penalty", 0.5, "--early-stopping", "true"]
        text = tokenizer.decode(ids)
        assert line(*flags).out == shown + text + "\n"
        assert json.loads(line(*flags, "--json").out) == {"prompt": prompt, "text": text, "ids": ids, "score": score}
        assert line("--beams", 1) == line()
        told = line(*flags, "--stats")
        assert told.out == shown + text + "\n" and told.err.count("\n") == 1
        assert f"{len(ids)} new tokens, the best of 3 beams" in told.err
        assert len(json.loads(line("--beams", 2, "--ignore-eos", "--json").out)["ids"]) == 8


@pytest.mark.parametrize("options", [
    dict(beams=0), dict(beams=-1), dict(beams=2.0), dict(beams=True), dict(beams=2**31), dict(length_penalty=float("nan")),
    dict(length_penalty=float("inf")), dict(length_penalty=33), dict(length_penalty="1"), dict(length_penalty=True),
    dict(early_stopping=1), dict(early_stopping=None), dict(early_stopping="true"), dict(temperature=0.5),
    dict(temperature=-1.0), dict(max_new_tokens=24), dict(forced_last=99), dict(no_repeat_ngram=0),
    dict(max_new_tokens=0), dict(batch_size=0), dict(batch_size=-1), dict(batch_size=2.0)], ids=str)
def test_what_makes_no_sense_is_refused_with_its_name_and_value(options):
    model, _ = lively(2)
    (name, value), = options.items()
    name = {"forced_last": "id"}.get(name, name)
    with pytest.raises(UserError, match=f"{name}[= ]{value!r}"), count(model) as cost:
        beam_search(model, [[1, 2]], **{"max_new_tokens": 5, "beams": 2} | options)
    assert cost.steps == 0


def test_caches_that_do_not_fit_the_memory_are_refused_before_anything_is_computed(monkeypatch):
    model, rng = lively(3)
    bytes_needed = 2 * 2 * (3 * 2) * 10 * model.config.of("decoder").kv_width * 8
    for free in (bytes_needed - 1, bytes_needed):
        monkeypatch.setattr(checks, "free_memory", lambda device: free)
        with count(model) as cost:
            if free < bytes_needed:
                with pytest.raises(UserError, match="6 beams of 10 positions need .* GiB"):
                    beam_search(model, [[4, 5], [6]], 9, beams=3)
                assert cost.steps == 0
            else:
                assert len(beam_search(model, [[4, 5], [6]], 9, beams=3)) == 2
                with pytest.raises(UserError, match="3 beams of 23 positions"):  # of the last batch
                    beam.beam_stream(model, [[4, 5], [6], [7]], [9, 9, 22], beams=3, batch_size=2)


def test_a_batch_is_searched_when_its_first_text_is_asked_for():
    model, rng = lively(3)
    with count(model) as cost:
        found = beam.beam_stream(model, [[4], [5], [6], [7], [8]], 9, beams=3, batch_size=2)
        entered = [(len(next(found)), cost.encoder_tokens) for _ in range(5)]
    assert entered == [(3, 2), (3, 2), (3, 4), (3, 4), (3, 5)] and list(found) == []


def test_padding_of_a_vocabulary_is_never_found():
    model, rng = lively(8)
    rows = prompts(model, rng, 3)
    texts = [text for own in beam_search(model, rows, 9, beams=4, n_vocab=9) for text in own]
    assert {i for _, ids in texts for i in ids} <= set(range(9)) and len(texts) == 12
    plain = [ids for own in beam_search(model, rows, 9, beams=4) for _, ids in own]
    assert max(max(ids) for ids in plain) >= 9


def test_no_prompts_have_no_texts_and_numbers_that_are_none_are_an_error():
    model, _ = lively(2)
    assert beam_search(model, [], 5, beams=3) == []
    model.wte.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError):
        beam_search(model, [[1, 2]], 5, beams=3)
