"""Choosing a token: what the filters leave is what transformers' leave, and draws follow the probabilities."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing.errors import NonFiniteError, UserError
import sampling
from sampling import Choice, Chooser

V = 13


def choose(logits, texts=None, is_last=False, eos_id=None, **fields):
    """Ids chosen from logits (B, V) at once."""
    logits, ends = torch.as_tensor(logits), [] if eos_id is None else [eos_id]
    texts = texts or [[]] * len(logits)
    limits = [len(text) + 1 if is_last else 10**6 for text in texts]
    return [i for [i] in Chooser(Choice(**fields), "cpu", ends, limits)(logits, texts, range(len(texts)))]


def ruled(logits, texts, is_last=False, eos_id=None, **fields):
    """What the rules leave of logits (B, V)."""
    limits = [len(text) + 1 if is_last else 10**6 for text in texts]
    chooser = Chooser(Choice(**fields), "cpu", [] if eos_id is None else [eos_id], limits)
    return chooser.scores(logits, texts, range(len(texts)))


def possible(row, **fields):
    """The set of ids that 2,000 draws from logits (V,) choose, at a temperature at which all that are left occur."""
    rows = torch.as_tensor(row).expand(2000, -1)
    return set(choose(rows, temperature=fields.pop("temperature", 1.0), seed=0, **fields))


def left_by(warper, row):
    """The set of ids that a logits processor of transformers leaves in logits (V,)."""
    return set(warper(torch.zeros(1, 1, dtype=torch.long), row[None].clone()).isfinite()[0].nonzero()[:, 0].tolist())


def rows(seed, n=20, spread=1.0):
    """n rows of random logits with a spread small enough for every id to occur in 2,000 draws."""
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * spread


# -----------------------------------------------------------------------------
# Greedy


def test_greedy_is_the_lowest_id_among_equals():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert choose(torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0] * 4, [-5.0, -6.0, -5.0, -5.0]], dtype=dtype)) == [1, 0, 0]


def test_greedy_compares_float64_logits_as_they_are():
    assert choose(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)) == [1]


def test_a_tiny_temperature_is_greedy_and_nothing_overflows():
    logits = rows(0) * 1e4
    for temperature in (1e-3, 1e-20, 1e-45, 5e-324):
        assert choose(logits, temperature=temperature, seed=0) == logits.argmax(-1).tolist()
    assert choose([[3e38, -3e38, 0.0]], temperature=1e-30, seed=0) == [0]


def test_top_k_of_one_and_top_p_of_nothing_are_greedy():
    logits = rows(1)
    for fields in (dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0)):
        assert choose(logits, temperature=2.0, seed=0, **fields) == logits.argmax(-1).tolist()


# -----------------------------------------------------------------------------
# The filters, against transformers'


@pytest.mark.parametrize("k", [1, 3, V - 1, V, V + 1, 10**9])
def test_top_k_keeps_what_transformers_keeps(k):
    from transformers import TopKLogitsWarper
    for row in rows(2, n=5):
        assert possible(row, top_k=k) == left_by(TopKLogitsWarper(k), row)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p_keeps_what_transformers_keeps(p):
    from transformers import TopPLogitsWarper
    for row in rows(3, n=10):
        assert possible(row, top_p=p) == left_by(TopPLogitsWarper(p), row)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.9])
def test_min_p_keeps_what_transformers_keeps(p):
    from transformers import MinPLogitsWarper
    for row in rows(4, n=10):
        assert possible(row, min_p=p) == left_by(MinPLogitsWarper(p), row)


def test_temperature_comes_before_the_filters_and_each_filter_sees_what_the_one_before_left():
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    warpers = LogitsProcessorList([TemperatureLogitsWarper(1.7), TopKLogitsWarper(8), TopPLogitsWarper(0.8)])
    for row in rows(5, n=10, spread=2.0):
        assert possible(row, temperature=1.7, top_k=8, top_p=0.8) == left_by(warpers, row)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(8), MinPLogitsWarper(0.2)])
    for row in rows(6, n=10):
        assert possible(row, temperature=0.7, top_k=8, min_p=0.2) == left_by(warpers, row)


def test_k_equal_logits_of_many_give_k_ids():
    """A threshold in place of a count keeps all that tie with the k-th."""
    drawn = choose(torch.zeros(10_000, V), temperature=1.0, top_k=3, seed=0)
    assert len(set(drawn)) == 3


# -----------------------------------------------------------------------------
# The rules, against transformers'


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.integers(1, 3).flatmap(lambda B: st.integers(1, 9).flatmap(lambda T: st.lists(
           st.lists(st.integers(0, 3), min_size=T, max_size=T), min_size=B, max_size=B))),
       n=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_no_sequence_occurs_twice_as_in_transformers(texts, n, seed):
    from transformers import NoRepeatNGramLogitsProcessor
    logits = rows(seed, n=len(texts))
    ours = ruled(logits, texts, no_repeat_ngram=n)
    assert torch.equal(ours, NoRepeatNGramLogitsProcessor(n)(torch.tensor(texts), logits.clone()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), min_size=1, max_size=4),
       penalty=st.floats(0.05, 20.0), n=st.sampled_from([None, 1, 2, 3]), least=st.integers(0, 9),
       seed=st.integers(0, 10**6))
def test_rules_together_on_ragged_rows_are_transformers_on_each_row_alone(texts, penalty, n, least, seed):
    from transformers import (LogitsProcessorList, MinLengthLogitsProcessor, NoRepeatNGramLogitsProcessor,
                              RepetitionPenaltyLogitsProcessor)
    logits = rows(seed, n=len(texts)).double()
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty),
                                      *([NoRepeatNGramLogitsProcessor(n)] if n else []),
                                      MinLengthLogitsProcessor(least, 2)])
    ours = ruled(logits, texts, eos_id=2, repetition_penalty=penalty, no_repeat_ngram=n, min_length=least)
    for text, row, own in zip(texts, logits, ours):
        assert torch.equal(processors(torch.tensor([text]), row[None].clone())[0], own)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_lengths_and_forced_ids_as_in_transformers(length, is_last):
    from transformers import (ForcedBOSTokenLogitsProcessor, ForcedEOSTokenLogitsProcessor, LogitsProcessorList,
                              MinLengthLogitsProcessor)
    texts, logits = [[3] * length] * 2, rows(length, n=2)
    for least in range(length + 3):
        for first, last in ((5, None), (None, 2), (None, None), (5, 2)):
            processors = [MinLengthLogitsProcessor(least, 2)]
            processors += [] if first is None else [ForcedBOSTokenLogitsProcessor(first)]
            processors += [] if last is None else [ForcedEOSTokenLogitsProcessor(length + 1 if is_last else 99, last)]
            theirs = LogitsProcessorList(processors)(torch.tensor(texts), logits.clone())
            ours = ruled(logits, texts, is_last, 2, min_length=least, forced_first=first, forced_last=last)
            assert torch.equal(ours, theirs), (least, first, last)


def test_rules_leave_the_logits_they_are_given_as_they_were():
    logits = rows(7)
    before = logits.clone()
    choose(logits, [[1, 2, 1]] * 20, eos_id=2, min_length=9, no_repeat_ngram=2, forced_last=3)
    assert torch.equal(logits, before)


def test_a_rule_for_the_end_means_nothing_where_there_is_no_end():
    assert choose([[0.0, 5.0]], [[1]], eos_id=1, min_length=3) == [0]
    assert choose([[0.0, 5.0]], [[1]], eos_id=None, min_length=3) == [1]


def test_no_end_of_several_comes_before_its_time():
    chooser = Chooser(Choice(min_length=2), "cpu", [1, 2], [9, 9])
    logits = torch.tensor([[0.0, 5.0, 4.0, 3.0]]).repeat(2, 1)
    assert chooser(logits, [[0], [0, 0]], [0, 1]) == [[3], [1]]


def test_the_limit_is_that_of_the_rows_number_in_the_request():
    chooser = Chooser(Choice(forced_last=3), "cpu", [], [4, 9, 2])
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0]]).repeat(2, 1)
    assert chooser(logits, [[0], [0]], [1, 2]) == [[0], [3]]  # row 0 has left


def test_a_rule_and_a_filter_are_one_entry_in_a_table_each(monkeypatch):
    """What a student adds: a field of Choice, and an entry of its name."""
    @dataclass(slots=True)
    class Wider(Choice):
        banned: int | None = None
        coin: float | None = None

    def banned(scores, id, texts):
        scores[:, id] = -torch.inf

    monkeypatch.setitem(sampling.RULES, "banned", banned)
    monkeypatch.setitem(sampling.FILTERS, "coin", lambda probs, least: probs > least)
    monkeypatch.setattr(sampling, "Choice", Wider)
    logits = torch.tensor([[3.0, 2.9, 2.8, -5.0]]).expand(500, -1)
    found = Chooser(Wider(banned=0, coin=0.2, temperature=1.0, seed=0))(logits, [[]] * 500, range(500))
    assert {i for [i] in found} == {1, 2}
    assert Chooser(Wider())(logits, [[]] * 500, range(500)) == [[0]] * 500


# -----------------------------------------------------------------------------
# Draws


def test_draws_follow_the_probabilities():
    """Chi-square at 20,000 seeded draws; 36.1 is passed by chance once in 5,000 times at 12 degrees of freedom."""
    for seed, fields in enumerate([{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}]):
        row, n = rows(10 + seed, n=1)[0], 20_000
        drawn = torch.tensor(choose(row.expand(n, -1), **({"temperature": 1.0, "seed": seed} | fields)))
        count = torch.bincount(drawn, minlength=V).double()
        probs = (row.double() / fields.get("temperature", 1.0)).softmax(-1) * (count > 0)
        expected = n * probs / probs.sum()
        kept = count > 0
        assert ((count - expected)[kept] ** 2 / expected[kept]).sum() < 36.1, fields


def test_a_seed_repeats_its_draws_and_no_seed_does_not():
    logits = torch.zeros(200, V)
    draw = lambda seed: choose(logits, temperature=1.0, seed=seed)
    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_seed_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    choose(torch.zeros(3, V), temperature=1.0, seed=1)
    choose(torch.zeros(3, V), temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_step_draws_anew():
    choose = Chooser(Choice(temperature=1.0, seed=0))
    assert choose(torch.zeros(50, V), [[]] * 50, range(50)) != choose(torch.zeros(50, V), [[]] * 50, range(50))


def test_a_row_draws_the_same_whoever_is_beside_it():
    """Alone, in a batch in any order, and when others have left it: its number and the seed decide, nothing else."""
    logits = rows(8, n=5).double()
    for fields in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        chooser = lambda: Chooser(Choice(temperature=1.0, seed=3, **fields))
        together, drawn = chooser(), {r: [] for r in range(5)}
        for step in range(40):
            which = [r for r in range(5) if step < 8 * (r + 1)]  # the first leaves first
            for r, ids in zip(which, together(logits[which], [[]] * len(which), which)):
                drawn[r] += ids
        backwards = chooser()
        turned = [backwards(logits.flip(0), [[]] * 5, [4, 3, 2, 1, 0]) for _ in range(8)]
        for r in range(5):
            alone = chooser()
            assert [alone(logits[r : r + 1], [[]], [r])[0][0] for _ in range(8 * (r + 1))] == drawn[r]
            assert [step[4 - r][0] for step in turned] == drawn[r][:8]
        other = Chooser(Choice(temperature=1.0, seed=3, **fields))
        assert [other(logits[:1], [[]], [1])[0][0] for _ in range(8)] != drawn[0]  # another number


@pytest.mark.parametrize("seed", range(3))
def test_the_draws_of_one_row_follow_the_probabilities_and_those_of_two_are_independent(seed):
    """Chi-square over the steps of a row, and over pairs of two rows; each bound is passed by chance once in 5,000."""
    chooser, row, n = Chooser(Choice(temperature=1.0, seed=seed)), rows(20 + seed, n=1)[0][:4], 8_000
    pairs = torch.tensor([[i for [i] in chooser(row.expand(2, -1), [[]] * 2, [0, 1])] for _ in range(n)])
    probs = row.double().softmax(-1)
    joint = n * (probs[:, None] * probs).flatten()
    for count, expected, bound in ((torch.bincount(pairs[:, 0], minlength=4), n * probs, 19.7),
                                   (torch.bincount(4 * pairs[:, 0] + pairs[:, 1], minlength=16), joint, 40.8)):
        assert ((count - expected) ** 2 / expected).sum() < bound


def test_what_is_impossible_is_not_drawn_at_the_ends_of_the_interval(monkeypatch):
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])  # of speculation, not in falling order
    for number, likely, first, place in ((0.0, 1, 2, 3), (0.2, 1, 2, 3), (0.3, 2, 2, 3), (0.6, 2, 2, 1), (0.8, 2, 1, 1),
                                         (1 - 2**-53, 2, 1, 1)):
        monkeypatch.setattr(sampling, "Random", lambda seed: type("", (), {"random": lambda self: number})())
        assert choose(logits, temperature=1.0, seed=0, top_k=4) == [likely]  # the most likely come first
        assert choose(logits, temperature=1.0, seed=0) == [first]           # the lowest ids do
        chooser = sampling.Chooser(sampling.Choice(temperature=1.0, seed=0), "cpu", [], None)
        assert chooser.sample(probs, [[chooser.part(0)]]).tolist() == [[place]]
        assert chooser.sample(probs.double(), [[chooser.part(0)]]).tolist() == [[place]]


def test_each_row_gets_its_own_logits():
    peaks = [4, 0, 12, 7, 7]
    logits = torch.nn.functional.one_hot(torch.tensor(peaks), V).float() * 100
    for fields in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.9}):
        assert choose(logits, **fields) == peaks


def test_padding_of_a_vocabulary_is_never_chosen():
    logits = torch.zeros(2000, V)
    logits[:, 9:] = 50.0
    assert set(choose(logits, n_vocab=9)) == {0}
    assert set(choose(logits, n_vocab=9, temperature=1.0, seed=0)) == set(range(9))
    assert set(choose(logits, n_vocab=9, temperature=1.0, top_k=10**6, seed=0)) == set(range(9))


# -----------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad, temperature):
    logits = torch.zeros(3, V)
    logits[1, 4] = bad
    with pytest.raises(NonFiniteError):
        choose(logits, temperature=temperature)
    with pytest.raises(NonFiniteError):  # nothing is possible
        choose(torch.full((1, V), -math.inf), temperature=temperature)


def test_one_impossible_token_is_no_error():
    logits = torch.zeros(500, 3)
    logits[:, 1] = -math.inf
    assert set(choose(logits, temperature=1.0, seed=0)) == {0, 2}


@pytest.mark.parametrize("fields", [
    dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0), dict(top_k=-3),
    dict(top_p=1.5), dict(top_p=-0.1), dict(top_p=math.nan), dict(min_p=2), dict(min_p=math.nan), dict(seed=-1),
    dict(seed=2**64), dict(n_vocab=0), dict(no_repeat_ngram=0), dict(min_length=-1), dict(repetition_penalty=0.0),
    dict(repetition_penalty=-1), dict(repetition_penalty=math.nan), dict(repetition_penalty=math.inf),
    dict(repetition_penalty=None), dict(repetition_penalty=10**30)], ids=str)
def test_what_makes_no_sense_is_refused_with_its_name_and_value(fields):
    (name, value), = fields.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        choose(torch.zeros(1, V), **fields)
