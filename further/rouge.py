"""
How good summaries are: ROUGE of a model over held-out pairs, beside the first sentence of each source (lead-1).

    pip install rouge-score
    python -m further.rouge --model out/bart-summary [--beams 4]
    python -m further.rouge --model facebook/bart-large-cnn --source articles.jsonl --pairs 100

ROUGE-1 and -2 (Lin 2004) are the F1 of the words and pairs of words that a text shares with the target, ROUGE-L that
of their longest common subsequence; here in per cent, the mean over all pairs, words stemmed, as is usual. Scores come
from Google's package. The pairs are those that were held out when the model was trained; texts are what generate.py
writes, with the rules of the model's publishers.
"""

import re
from statistics import mean

from plumbing.errors import WHOLE, Parser, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

from further.serve import serve
from plumbing import cli
from plumbing.data import TASKS, is_pairs, make_pairs
from plumbing.report import aligned
from plumbing.runs import trained_on

METRICS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def scorer():
    """Of the texts of some pairs and their targets: name of the metric -> its mean, in per cent."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("ROUGE needs the package rouge-score: pip install rouge-score") from None
    rouge = RougeScorer(list(METRICS), use_stemmer=True)

    def scores(texts, targets):
        found = [rouge.score(target, text) for text, target in zip(texts, targets, strict=True)]
        return {metric: 100 * mean(one[metric].fmeasure for one in found) for metric in METRICS}

    return scores


def lead(text):
    """The first sentence: up to a full stop, question or exclamation mark before white space."""
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def held_out(model, source):
    """The (source, target) that the run in a directory has held out, or would have of another data.source."""
    config = trained_on(model, source)
    if config is None or not is_pairs(config.source):
        raise UserError(f"{model} was not trained on pairs by train.py, so that none were held out: name some with "
                        f"--source, {', '.join(TASKS)}, or a path of .jsonl")
    return make_pairs(config)[1]


def write(request, sources, batch_size):
    """What the model writes about each of these texts."""
    ids = list(map(request.tokenizer.encode, sources))
    written = {r: new for r, new, *_ in serve(request.model, ids, request.max_new_tokens, batch_size=batch_size,
                                              **request.options)}
    return [request.said(written[r])["text"] for r in range(len(ids))]


def main(args=None):
    parser = Parser(prog="further.rouge", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_NAME", required=True, help="a BART: a run, a Hugging Face directory, or a "
        "name on the hub")
    add("--source", help="data.source of pairs, e.g. a .jsonl file; default: what the run was trained on")
    add("--pairs", type=WHOLE, metavar="N", help="the first N of those held out; default: all")
    add("--beams", type=WHOLE, metavar="N", help="default: what generation_config.json says, or 1 = greedy")
    add("--batch-size", type=WHOLE, metavar="N", default=16, help="texts at a time; default: 16")
    args = parser.parse_args(args)
    scores = scorer()
    if args.pairs is not None and args.pairs < 1:
        raise UserError(f"--pairs {args.pairs} must be at least 1")
    sources, targets = zip(*held_out(args.model, args.source)[: args.pairs])
    beams = [] if args.beams is None else ["--beams", str(args.beams)]
    request = cli.read(cli.parse(__doc__, ["--model", args.model, "--prompt", sources[0], *beams]))
    if not request.model.config.is_encoder_decoder:
        raise UserError(f"{args.model} is a GPT, which summarises nothing: name a BART")
    texts = {args.model: write(request, sources, args.batch_size), "lead-1": map(lead, sources)}
    rows = [[name, *(f"{score:.2f}" for score in scores(list(own), targets).values())] for name, own in texts.items()]
    print(f"{len(targets):,} pairs\n" + aligned([["", *METRICS.values()], *rows]))


if __name__ == "__main__":
    run(main)
