"""
Beam search: run with the n most likely texts instead of one, and let those that have ended compete.

    python generate.py --model facebook/bart-large-cnn --prompt-file article.txt
    python generate.py --model out/bart-headline --prompts articles.txt --beams 4 --length-penalty 2

A step extends each of the n texts by every token, and the n best extensions run on. Several may descend from one text,
and others die out, so rows of the cache become others, in place (KVCache.reorder). The source stands still: n beams are
n neighbouring rows, which to its Memory are n more queries (CrossAttention.forward).

The score of a text is its log-probability / length ** length_penalty, in nats; its length counts the new ids, the end
included. Which texts may end, and when the search does, is as in transformers (generation/utils.py, _beam_search), so
that a published model writes what its publishers saw it write. Shapes: S prompts that are still searched, n beams (1 in
the first step), V vocabulary.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field

import torch

from generate import advance, encode, project
from plumbing.checks import check_caches, check_count, check_forced, for_each, prepare
from plumbing.errors import UserError
from sampling import Choice, Chooser

STEEPEST = 32  # length ** length_penalty is a float for whatever length


@dataclass
class Finished:
    """The texts of one prompt that have ended, the best first: (score, new ids), at most `beams`."""

    beams: int
    longest: int
    length_penalty: float
    early_stopping: bool | str
    texts: list = field(default_factory=list)

    def add(self, total, ids):
        self.texts.append((total / len(ids) ** self.length_penalty, ids))
        self.texts = sorted(self.texts, key=lambda text: -text[0])[: self.beams]  # stable: the earlier of equals

    def complete(self, total, length):
        """Whether to stop here. total: the log-probability of the best text that runs on, which is `length` long."""
        if len(self.texts) < self.beams or self.early_stopping is True:
            return len(self.texts) == self.beams
        if self.early_stopping == "never" and self.length_penalty > 0:  # what it would be if nothing more were lost
            length = self.longest
        return total / length**self.length_penalty <= self.texts[-1][0]


def beam_search(model, prompts, max_new_tokens, **options):
    """
    The best texts of each prompt: B lists of (score, new ids), the best first, at most `beams` of them.

    The arguments are those of generate(), but for temperature and filters: nothing is drawn. beams=1 is greedy, though
    with "never" it may look on behind the end of a text.
    length_penalty: above 0 it favours long texts, for log-probabilities are negative. early_stopping: True, to stop
    when `beams` texts have ended; False, when besides none that runs on would beat the worst of them by ending here;
    "never", when none could at any length. Raises UserError if the request is not possible, before anything is
    computed; NonFiniteError if the logits are no numbers, or the rules leave some text no token.
    """
    return list(beam_stream(model, prompts, max_new_tokens, **options))


def beam_stream(model, prompts, max_new_tokens, *, beams, length_penalty=1.0, early_stopping=False, use_cache=True,
                decoder_prompts=None, ignore_eos=False, batch_size=None, **choice):
    """
    beam_search(), batch_size prompts at a time, None for all: an iterator of the texts of each prompt. Whatever is
    wrong with the request is found out here, before anything is computed.
    """
    check_count("beams", beams)
    if type(length_penalty) not in (int, float) or not abs(length_penalty) <= STEEPEST:
        raise UserError(f"length_penalty={length_penalty!r:.60} must be a number from {-STEEPEST} to {STEEPEST}, and "
                        f"is usually between 0 and 2")
    if early_stopping not in (True, False, "never") or type(early_stopping) not in (bool, str):
        raise UserError(f"early_stopping={early_stopping!r:.60} must be true, false or never")
    sources, rows = prepare(model, prompts, max_new_tokens, decoder_prompts)
    check_forced(choice, model.config)
    width = len(rows) or 1 if batch_size is None else batch_size
    check_count("batch_size", width)
    choice, most = Choice(**choice), for_each(max_new_tokens, rows)
    choice.validate()
    if choice.temperature:
        raise UserError(f"temperature={choice.temperature} draws, and beam search does not: leave it out, or call "
                        f"generate()")
    ends, limits = [] if ignore_eos else model.config.end_ids, [len(row) + n for row, n in zip(rows, most)]
    batches = [slice(i, i + width) for i in range(0, len(rows), width)]
    for batch in batches:
        B, room = beams * len(rows[batch]), max(limits[batch])
        check_caches(f"{B} beams of {room} positions", "ask for fewer at a time, or shorter ones", model, B, room)

    def texts(batch):
        choose = Chooser(choice, model.wte.weight.device, ends, limits[batch])
        found = [Finished(beams, n, length_penalty, early_stopping) for n in most[batch]]
        search(model, sources and sources[batch], rows[batch], choose, found, use_cache)
        return [finished.texts for finished in found]

    return (own for batch in batches for own in texts(batch))


@torch.inference_mode()
def search(model, sources, rows, choose, found, use_cache):
    """The loop of beam_search(): it adds what ends to the Finished of each row."""
    alive, starts, beams = list(range(len(rows))), list(map(len, rows)), found[0].beams
    memory = project(model, *encode(model, sources))
    cache = model.new_cache(beams * len(rows), max(choose.limits)) if use_cache else None
    if cache:
        cache.reorder(alive)  # a prompt enters once, whose row then becomes those of its beams
    length, totals = 0, torch.zeros(len(rows), 1, device=model.wte.weight.device)  # (S, n): log-probabilities
    while alive:
        length, n = length + 1, totals.size(1)
        logits = advance(model, rows, cache, memory)[:, 0]
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        scores = choose.scores(scores, rows, [r for r in alive for _ in range(n)])  # (S n, V)
        V = scores.size(1)
        scores = (totals[..., None] + scores.view(-1, n, V)).flatten(1)  # (S, n V)
        best = scores.topk(min((1 + len(choose.ends)) * beams, n * V))  # enough to run on if all that can end do
        stay, running = [], []  # places in `alive`; (log-probability, row that it extends, id) of all beams
        for s, (r, *both) in enumerate(zip(alive, best.values.tolist(), best.indices.tolist())):
            ranked = [(total, s * n + at // V, at % V) for total, at in zip(*both) if total > -math.inf]
            ended = range(V) if length == found[r].longest else choose.ends
            for total, parent, i in ranked[:beams]:  # what is ranked lower may run on, and not end
                if i in ended:
                    found[r].add(total, rows[parent][starts[r] :] + [i])
            going = [one for one in ranked if one[2] not in ended][:beams]
            if going and not found[r].complete(going[0][0], length):
                stay.append(s)
                running += going + [(-math.inf, *going[0][1:])] * (beams - len(going))  # the last are no texts
        parents = [parent for _, parent, _ in running]
        if cache:  # beams of one prompt differ behind it only
            cache.reorder(parents, since=min(starts) if n == beams and len(stay) == len(alive) else 0)
        if len(stay) < len(alive):
            memory, alive = memory and memory.take(stay), [alive[s] for s in stay]
        rows = [rows[parent] + [i] for _, parent, i in running]
        totals = scores.new_tensor([total for total, _, _ in running]).view(-1, beams)


def command(request):
    """What generate.py does where beams are asked for: print the best text, which is not known before the end."""
    start = time.perf_counter()
    [[(score, ids), *_]] = beam_search(request.model, *request.batch(), **request.options)
    seconds, said = time.perf_counter() - start, request.said(ids, score)
    print(json.dumps(said) if request.json else request.shown + said["text"])
    if request.stats:
        print(f"{len(request.ids)} prompt tokens; {len(ids)} new tokens, the best of {request.options['beams']} beams, "
              f"after {1e3 * seconds:.1f} ms", file=sys.stderr)
