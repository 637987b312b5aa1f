"""Promises about noise: as much is masked as the paper says, in spans of Poisson's lengths, and what is to be written is clean."""

import math
from collections import Counter
from itertools import permutations

import pytest
import torch
from conftest import BART_TOML, call, train_run

import train
from further.denoise import MASKED, SPAN, DenoiseData, infill, permute, span_lengths
from plumbing.data import IGNORE, DataConfig, generator, load_data
from plumbing.errors import UserError
from plumbing.tokenizers import BPETokenizer, train_tokenizer
from plumbing.weights import load_pretrained

MASK = -7
TEXT = "".join(f"Sentence {n} says {n * n}. " for n in range(400))
SHAPE = dict(batch_size=5, block_size=48)


def denoise_data(noise="infill", text=TEXT, tokenizer=None, **more):
    cut = int(0.9 * len(text))
    tokenizer = tokenizer or train_tokenizer("bpe", text, 300, seq2seq=True)
    return DenoiseData("a text", text[:cut], text[cut:], tokenizer, noise=noise, **{"seed": 1} | more), tokenizer


def rows(batch):
    """Source and target of each row of a batch, as lists of ids without padding."""
    (source, _, lengths), labels = batch
    return [(s[:n].tolist(), y[y != IGNORE].tolist()) for s, n, y in zip(source, lengths, labels)]


def is_subsequence(short, long):
    rest = iter(long)
    return all(i in rest for i in short)


def poisson(k):
    return math.exp(-SPAN) * SPAN**k / math.factorial(k)


# -----------------------------------------------------------------------------
# Infilling


def test_the_paper_masks_three_tenths_in_spans_of_three():
    assert (MASKED, SPAN) == (0.3, 3.0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20, 126, 1000])
def test_three_tenths_of_the_ids_are_masked_no_text_grows_and_nothing_vanishes_without_a_mask(n):
    """Read from the noisy text alone: every id says where it stood, so what lies between two that stayed was masked."""
    inserted = 0
    for seed in range(200):
        noisy = infill(torch.arange(n), MASK, generator(seed)).tolist()
        stayed = [i for i in noisy if i != MASK]
        assert len(stayed) == n - round(0.3 * n) and stayed == sorted(set(stayed)) and len(noisy) <= n
        last, masks = -1, 0
        for i in [*noisy, n]:
            if i == MASK:
                masks += 1
                continue
            missing = i - last - 1
            assert masks or not missing
            inserted += masks > missing
            last, masks = i, 0
    assert inserted or n < 100  # spans of no length: a mask where nothing is missing


def test_lengths_of_spans_follow_poissons_law():
    found = Counter(span_lengths(300_000, generator("law")).tolist())
    n = sum(found.values())
    assert sum(k * count for k, count in found.items()) == 300_000
    for k in range(12):
        sigma = math.sqrt(n * poisson(k) * (1 - poisson(k)))
        assert abs(found[k] - n * poisson(k)) < 5 * sigma + 1, k  # + 1: the last one is cut


def test_every_span_is_one_mask():
    """100,000 ids that stay, and between them as many masks as spans: a tenth of all ids, since spans have three."""
    noisy = infill(torch.arange(140_000), MASK, generator("spans"))
    spans = (noisy == MASK).sum().item()
    assert abs(spans - 14_000) < 5 * math.sqrt(42_000 * SPAN / SPAN**3)
    single = Counter()  # how much is missing where one mask stands between two ids that stayed
    for before, mask, after in zip(noisy.tolist(), noisy[1:].tolist(), noisy[2:].tolist()):
        if mask == MASK and before != MASK and after != MASK:
            single[after - before - 1] += 1
    n = sum(single.values())
    for k in range(9):
        assert abs(single[k] - n * poisson(k)) < 5 * math.sqrt(n * poisson(k)), k


def test_every_place_but_those_near_the_ends_is_masked_equally_often():
    """A span lies in the text as a whole, so fewer of them reach its first id and its last, of either as many."""
    times = torch.zeros(100)
    for seed in range(4000):
        noisy = infill(torch.arange(100), MASK, generator(seed))
        times[noisy[noisy != MASK]] += 1
    masked, sigma = 1 - times / 4000, math.sqrt(0.3 * 0.7 / 4000)
    assert (masked[10:-10] - masked[10:-10].mean()).abs().max() < 5 * sigma and masked[10:-10].mean() > 0.3
    assert (masked - masked.flip(0)).abs().max() < 5 * math.sqrt(2) * sigma and masked[0] > 0.1


# -----------------------------------------------------------------------------
# Sentences


def test_sentences_stay_whole_and_every_order_is_as_likely():
    ids, ends = torch.arange(9), torch.tensor([0, 1, 0, 0, 0, 1, 0, 0]).bool()  # 2, 4 and 3 ids
    sentences = [(0, 1), (2, 3, 4, 5), (6, 7, 8)]
    found = Counter(tuple(permute(ids, ends, generator(seed)).tolist()) for seed in range(3000))
    assert set(found) == {sum(order, ()) for order in permutations(sentences)}
    assert all(abs(count - 500) < 5 * math.sqrt(3000 * 5 / 36) for count in found.values())


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_a_sentence_ends_at_a_full_stop_before_white_space(kind):
    text = "Call os.path.join in 3.11. It works!\nUse it... Then 2.\nEnd"
    found, tok = denoise_data("permute", tokenizer=train_tokenizer(kind, TEXT, 300, seq2seq=True))
    sentences = ["Call os.path.join in 3.11.", " It works!\nUse it...", " Then 2.", "\nEnd"]
    ids = torch.tensor(tok.encode_plain(text))
    said = {tok.decode(found.corrupt(ids, generator(seed)).tolist()) for seed in range(500)}
    assert said == {"".join(order) for order in permutations(sentences)}


def test_a_text_of_one_id_and_one_without_a_full_stop_stay_as_they_are():
    assert permute(torch.tensor([5]), torch.tensor([]).bool(), generator(0)).tolist() == [5]
    assert permute(torch.arange(6), torch.zeros(5).bool(), generator(0)).tolist() == list(range(6))


# -----------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("noise", ["infill", "permute", "infill+permute"])
def test_the_target_is_the_clean_text_and_the_source_what_the_noise_left(noise):
    found, tok = denoise_data(noise)
    text, changed = tok.decode(found.train.tolist()), 0
    for step in range(20):
        batch = found.batch_at(step, **SHAPE)
        (source, target, lengths), labels = batch
        assert source.dtype == target.dtype == lengths.dtype == labels.dtype == torch.int64
        assert source.shape[1] == lengths.max() <= labels.shape[1] == 48 and len(labels) == 5
        assert target.tolist() == [[tok.eos_id, *row[:-1]] for row in labels.tolist()]
        for (noisy, clean), padded in zip(rows(batch), source):
            assert (padded[len(noisy):] == tok.pad_id).all()
            assert clean[0] == noisy[0] == tok.bos_id and clean[-1] == noisy[-1] == tok.eos_id
            assert tok.decode(clean) in text and len(clean) == 48
            left = [i for i in noisy if i != found.mask_id]
            assert len(left) == len(clean) - (round(0.3 * 46) if "infill" in noise else 0)
            assert not Counter(left) - Counter(clean)
            assert ("infill" in noise) == (found.mask_id in noisy)
            if noise == "infill":
                assert is_subsequence(left, clean)
            else:
                changed += not is_subsequence(left, clean)
    assert changed > 50 or noise == "infill"


@pytest.mark.parametrize("noise", ["infill", "permute", "infill+permute"])
def test_noise_is_a_function_of_seed_and_step(noise):
    one, other = denoise_data(noise)[0], denoise_data(noise)[0]
    torch.manual_seed(0)
    there = [rows(one.batch_at(step, **SHAPE)) for step in range(12)]
    torch.manual_seed(1)
    back = [rows(other.batch_at(step, **SHAPE)) for step in reversed(range(12))]
    assert there == back[::-1] and len({str(batch) for batch in there}) == 12
    assert there[0] != rows(denoise_data(noise, seed=2)[0].batch_at(0, **SHAPE))


def test_every_epoch_has_other_noise_and_the_held_out_part_always_the_same():
    """A text of one window, so that only the noise can differ between epochs."""
    text = TEXT[:60]
    tok = train_tokenizer("byte", "", seq2seq=True)
    found = DenoiseData("a text", text, text, tok, 1, "infill")
    epochs = [rows(found.batch_at(epoch, batch_size=1, block_size=61))[0] for epoch in range(20)]
    assert len({tuple(noisy) for noisy, _ in epochs}) == 20
    assert [rows(batch) for batch in found.val_batches(2, 32)] == [rows(batch) for batch in found.val_batches(2, 32)]
    noisy = [[i == found.mask_id for i in source] for batch in found.val_batches(1, 32) for source, _ in rows(batch)]
    assert len(noisy) == 2 and noisy[0] != noisy[1]


@pytest.mark.parametrize("block_size, batch_size", [(3, 7), (32, 4), (1000, 2)])
def test_every_held_out_id_is_to_be_restored_once(block_size, batch_size):
    found, _ = denoise_data("infill+permute")
    pairs = [pair for batch in found.val_batches(batch_size, block_size) for pair in rows(batch)]
    assert sum((clean[1:-1] for _, clean in pairs), []) == found.val.tolist()
    assert all(len(noisy) <= len(clean) <= block_size for noisy, clean in pairs)


def test_the_mask_is_the_vocabularys_own_wherever_it_stands():
    own = train_tokenizer("byte", "", seq2seq=True)
    assert denoise_data(tokenizer=own)[0].mask_id == own.n_vocab - 1  # the last, as in BART's: 50264 of 50265
    names = sorted(own.vocab, key=lambda name: (name != "<mask>", own.vocab[name]))
    found, tok = denoise_data(tokenizer=BPETokenizer([], {name: id for id, name in enumerate(names)}))
    assert found.mask_id == tok.specials["<mask>"] == 0
    assert all(0 in noisy for noisy, _ in rows(found.batch_at(0, **SHAPE)))


# -----------------------------------------------------------------------------
# From a configuration


@pytest.mark.parametrize("change, seq2seq, words", [
    (dict(noise="delete"), True, "data.noise is 'delete'; choose from infill, permute, infill+permute"),
    (dict(noise=""), True, "data.noise is ''"),
    (dict(noise="infill"), False, "data.noise is 'infill', and a GPT trains on a text as it is"),
    (dict(noise="infill", source="reverse"), True, "BART with data.noise trains on a text and data.source is 'reverse'"),
    (dict(noise="infill", source="nowhere"), True, "'nowhere', which is no file"),
    (dict(noise="permute", tokenizer="char"), True, "the tokenizer has no <mask>; choose data.tokenizer bpe"),
])
def test_mistakes_are_named_in_one_line(change, seq2seq, words):
    with pytest.raises(UserError) as caught:
        load_data(DataConfig(**change), seq2seq=seq2seq)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_too_small_for_its_frame_is_refused():
    found, _ = denoise_data()
    for batches in (lambda: found.batch_at(0, batch_size=2, block_size=2), lambda: next(found.val_batches(2, 2))):
        with pytest.raises(UserError, match="model.block_size=2 must be at least 3"):
            batches()


def test_a_model_is_trained_on_noise_then_on_pairs_and_a_run_keeps_its_noise(tmp_path):
    toml = BART_TOML.replace('"reverse"', '"{source}"').replace('"char"', '"byte"')
    small = ["--train.steps=3", "--train.eval_batches=2", "--train.warmup_steps=0"]
    train_run(tmp_path, toml, "--data.noise=infill+permute", *small)
    before, tok = load_pretrained(tmp_path / "out")
    assert "<mask>" in tok.specials
    other = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--data.noise=infill", *small,
                 "--train.resume=true", "--train.steps=4")
    assert other.code == 2 and "data.noise is 'infill', but the run" in other.err
    train_run(tmp_path / "fine", BART_TOML, f"--train.init_from={tmp_path / 'out'}", *small, "--train.steps=1", "--train.lr=0")
    after, _ = load_pretrained(tmp_path / "fine" / "out")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
