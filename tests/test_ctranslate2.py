"""
Three engines, one text: what we train is decoded alike here, in transformers, and in CTranslate2, which is written in
C++, keeps a cache of its own and shares no code with PyTorch.

    pip install -r tests/requirements-ctranslate2.txt
    python -m pytest -m ctranslate2

The models are really trained: a random one soon repeats one token, in any engine.
"""

import json
from statistics import median

import pytest
import torch
import transformers

from conftest import ROOT, train_run
from generate import generate
from model import BART, GPT
from plumbing.manifests import newest
from plumbing.data import DataConfig, make_pairs
from plumbing.weights import load_pretrained, save_pretrained

ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not here: tests/requirements-ctranslate2.txt")
pytestmark = pytest.mark.ctranslate2
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = ["--model.n_embd=64", "--train.batch_size=16", "--train.warmup_steps=20", "--train.eval_every=1000",
         "--train.eval_batches=2", "--train.device=cpu"]
GPT_PROMPTS = ["The if statement", "The for statement", "A class", "def f(x):", "In Python,", "Changed in version 3",
               "The following", "import", "Objects are", "Raises", "An expression list", "x = [1, 2, 3]\n"]


def opened(directory):
    """The model and the tokenizer that transformers makes of a directory, without a key that does not fit."""
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(directory, output_loading_info=True)
    assert kind in ("GPT2LMHeadModel", "BartForConditionalGeneration") and not any(info.values()), info
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


def theirs(model, row, n, force):
    """transformers' greedy tokens: up to the end, or exactly n of them if forced."""
    more = dict(min_new_tokens=n) if force else {}
    with torch.no_grad():
        out = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long),
                             max_new_tokens=n, num_beams=1, do_sample=False, **more)
    return out[0, 1 if model.config.is_encoder_decoder else len(row):].tolist()


def cpp(directory, folder, tokenizer, rows, n, force):
    """CTranslate2's, in fp32, all rows in one batch."""
    ctranslate2.converters.TransformersConverter(str(directory)).convert(str(folder), force=True)
    rows, least = [tokenizer.convert_ids_to_tokens(row) for row in rows], n if force else 0
    if "gpt2" in json.loads((directory / "config.json").read_text())["model_type"]:
        results = ctranslate2.Generator(str(folder), compute_type="float32", intra_threads=1).generate_batch(
            rows, max_length=n, min_length=least, include_prompt_in_result=False)
        return [result.sequences_ids[0] for result in results]
    results = ctranslate2.Translator(str(folder), compute_type="float32", intra_threads=1).translate_batch(
        rows, max_decoding_length=n, min_decoding_length=least, beam_size=1, return_end_token=True)
    return [tokenizer.convert_tokens_to_ids(result.hypotheses[0]) for result in results]


def agree(directory, folder, texts, n, force):
    """Check that the three give the same tokens for every text, and return them."""
    ours, tokenizer = load_pretrained(directory)
    model, their_tokenizer = opened(directory)
    rows = [tokenizer.encode(text) for text in texts]
    assert rows == [their_tokenizer.encode(text) for text in texts]
    bart = isinstance(ours, BART)
    new = [generate(ours, [row], n, min_length=(1 if bart else len(row)) + n if force else 0)[0] for row in rows]
    assert new == generate(ours, rows, n, min_length=1 + n if force and bart else 0)  # also as one ragged batch
    assert new == [theirs(model, row, n, force) for row in rows]
    assert new == cpp(directory, folder, their_tokenizer, rows, n, force)
    return new


def test_a_trained_gpt_writes_the_same_text_in_three_engines(tmp_path):
    train_run(tmp_path, (ROOT / "configs/gpt-tiny.toml").read_text(), "--model.n_layer=2", "--data.vocab_size=512",
              "--train.steps=300", *SMALL)
    new = agree(newest(tmp_path / "out"), tmp_path / "ct2", GPT_PROMPTS, 30, force=True)
    assert all(len(row) == 30 for row in new) and len({tuple(row) for row in new}) == len(new)
    assert median(len(set(row)) for row in new) > 10, "these are texts, not one repeated token"


def test_a_trained_bart_writes_the_same_headlines_in_three_engines(tmp_path):
    train_run(tmp_path, (ROOT / "configs/bart-headline.toml").read_text(), "--model.n_encoder_layer=1",
              "--data.n_train=8000", "--train.steps=400", *SMALL)
    articles = [article for article, _ in make_pairs(DataConfig(source="headline", n_train=1, n_val=12))[1]]
    directory = newest(tmp_path / "out")
    headlines = agree(directory, tmp_path / "ct2", articles, 60, force=False)
    assert all(row[-1] == 2 for row in headlines) and median(len(set(row)) for row in headlines) > 5
    new = agree(directory, tmp_path / "ct2", articles, 30, force=True)
    assert all(len(row) == 30 for row in new) and len({tuple(row) for row in new}) > 6
    assert median(len(set(row)) for row in new) > 8


def test_byte_and_character_vocabularies_are_read_as_well(tiny_gpt, tiny_bart, tmp_path):
    agree(newest(tiny_gpt.path), tmp_path / "gpt", ["the cat", "你好 said", "the dog ate"], 30, force=True)
    agree(newest(tiny_bart.path), tmp_path / "bart", ["abc", "zebra", "q", "hello"], 10, force=False)


@pytest.mark.parametrize("cls", [GPT, BART])
def test_what_they_cannot_express_they_refuse_by_its_name(cls, tmp_path):
    config = cls.get_default_config()
    config.n_head, config.n_kv_head, config.n_embd, config.vocab_size, config.block_size = 4, 2, 16, 9, 5
    save_pretrained(tmp_path / "grouped", cls(config))
    with pytest.raises(ValueError, match=f"mindecode-{cls.__name__.lower()}"):
        ctranslate2.converters.TransformersConverter(str(tmp_path / "grouped")).convert(str(tmp_path / "ct2"))
