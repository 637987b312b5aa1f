"""The exercises of lesson 5: three loops that write the same text, and what each lets through the model."""

from dataclasses import dataclass

import torch

from cost import FORMULAS, count
from generate import generate, loop

from . import Task
from .little import little_bart


def tokens(N, M):
    """What enters encoder and decoder in M calls, naive, hoisted and cached, by the project's own closed forms."""
    return [encoder + decoder for encoder, _, decoder, _ in (form(N, 1, M) for form in FORMULAS.values())]


def decode(answer, N, M):
    """What a loop makes of a little BART and a source of N: the ids, and what entered encoder and decoder."""
    bart = little_bart(seed=5, block_size=64).double()  # in fp64 no two strategies can part by rounding
    source = torch.randint(3, 100, (1, N))
    with torch.no_grad(), count(bart) as cost:
        ids = answer(bart, source, M)
    return [ids, cost.encoder_tokens, cost.decoder_tokens]


def ours(strategy):
    return lambda bart, source, M: generate(bart, source.tolist(), M, strategy=strategy, ignore_eos=True)[0]


def mistaken(encode_each_time=False, feed=lambda ids: ids, place=lambda ids: None, last=-1, drop=1):
    """A loop that goes wrong in one way or another. place: where a cached call begins; None without a cache."""
    def write(bart, source, M):
        ids, encoded = [bart.config.start_id], bart.encode(source)
        for k in range(M):
            encoded = bart.encode(source) if encode_each_time and k else encoded
            at, fed = place(ids), torch.tensor([feed(ids)])
            logits = bart.decode(fed, encoded) if at is None else bart.decode(
                fed, encoded, use_kv_cache=True, start_pos=at)
            ids.append(logits[0, last].argmax().item())
        return ids[drop:]
    return write


def everywhere(bart, source, M):
    ids = [bart.config.start_id]
    for _ in range(M):
        ids.append(bart.decode(torch.tensor([ids]), bart.encode(source)).argmax().item())
    return ids[1:]


newest = lambda ids: ids[-1:]
behind = lambda ids: len(ids) - 1
CASES = [(12, 9), (5, 14)]


@dataclass
class Script:
    """A step that knows its text by heart: called with all ids so far, it returns the next."""

    text: list

    def __call__(self, ids):
        return self.text[(len(ids) - 1) % len(self.text)]


def until_end(step, start, end, most):
    found = loop(lambda rows, which: [[step(rows[0])]], [[start]], [1 + most], lambda r, row: row[-1] == end)
    return [i for [ids] in found for i in ids]


def while_not_end(step, start, end, most):
    ids = [start]
    while ids[-1] != end and len(ids) <= most:
        ids.append(step(ids))
    return ids[1:]


def without_its_end(step, start, end, most):
    ids = until_end(step, start, end, most)
    return ids[:-1] if ids[-1] == end else ids


def start_counts(step, start, end, most):
    return until_end(step, start, end, max(1, most - 1))


TASKS = {
    "totals": Task(
        tokens(1024, 100),
        wrong=[
            (tokens(1024, 99), "You make 99 calls: is the start token one of the 100 that are generated? Here M counts "
                               "decoder calls, and each of them generates a token."),
            ([1024 * 100 + 100 * 99 // 2, 1024 + 100 * 99 // 2, 1124],
             "Nearly. What enters the decoder in call 1: nothing, or the start token?"),
            ([1024 * 100 + 100**2, 1024 + 100**2, 1124],
             "The decoder does not see 100 tokens in each call: it sees 1, then 2, then 3."),
            ([1024 * 100 + 100, 1024 + 100, 1124],
             "Without a cache the decoder is given its whole text again in every call, not the newest token alone."),
            ([1124 * 100, 6074, 1124], "The first loop: the encoder's share is right, but when does the decoder first "
                                       "see 100 tokens?"),
            ([107_450, 6_074, 100], "The last loop: a cache for the decoder spares nobody the reading of the source."),
        ],
        hint="Write down what enters in calls 1, 2 and 3, encoder and decoder apart, and add up.",
        praise="All three, before anything has run."),
    "naive": Task(
        ours("naive"), cases=CASES, run=decode,
        wrong=[
            (mistaken(),
             "The ids are right, and the encoder ran once: that is the next exercise already. Here it belongs into "
             "the loop."),
            (mistaken(True, drop=0), "Everything is computed as it should be. What is returned begins with the start "
                                     "token, which nobody generated."),
            (mistaken(True, last=0),
             "The counts are right and the ids are not. Logits come for every position: which of them has seen the "
             "whole text?"),
            (everywhere,
             "An IndexError: an id that is in no vocabulary. argmax() over all positions counts through all of them: "
             "take the last position first."),
            (mistaken(True, feed=newest),
             "The decoder was given the newest token alone. It has no memory yet: what it is not given, it does not "
             "know."),
        ],
        hint="Wanted are the M ids, and M runs of the encoder over N tokens, and of the decoder over 1, 2, .. M.",
        praise="Right, and as wasteful as it should be."),
    "hoisted": Task(
        ours("hoisted"), cases=CASES, run=decode,
        wrong=[
            (mistaken(True), "The ids are right, and the encoder still runs in every call."),
            (mistaken(feed=newest),
             "One thing changes at a time: the encoder leaves the loop, and the decoder is still given the whole "
             "text."),
            (mistaken(drop=0), "Everything is computed as it should be. What is returned begins with the start token, "
                               "which nobody generated."),
            (mistaken(feed=newest, place=behind), "The ids are right, and the decoder keeps a cache: that is the next "
                                                  "exercise already."),
        ],
        hint="Wanted are the M ids, one run of the encoder, and M of the decoder over 1, 2, .. M.",
        praise="One line moved, and most of the work is gone."),
    "cached": Task(
        ours("cached"), cases=CASES, run=decode,
        wrong=[
            (mistaken(), "The ids are right, but the whole text entered in every call. So nothing was kept, or it was "
                         "thrown away: start_pos=0 begins a new text."),
            (mistaken(feed=newest, place=lambda ids: 0),
             "The counts are right and the ids are not: every token began a text of its own. Was a cache asked for, "
             "and how many tokens stand before the newest?"),
            (mistaken(True, feed=newest, place=behind), "The ids are right, and the encoder is back in the loop."),
            (mistaken(feed=newest, place=len),
             "A ValueError, for which there are two usual reasons. In call 1 nothing precedes the start token: what is "
             "start_pos then? And the target is (1, T), a list in a list."),
            (mistaken(feed=lambda ids: ids[:1], place=behind),
             "The counts are right and the ids are not: which token has the decoder not seen yet, the first or the "
             "last?"),
        ],
        hint="Wanted are the M ids, one run of the encoder, and M of the decoder over one token each.",
        praise="One token in, one token out."),
    "figure": Task("b", wrong=[
        ("a",
         "All three counted exactly what happened. Look at the values after call 1 again: what has entered by then?"),
        ("c", "A logarithmic axis makes differences of small numbers larger, not smaller. And these are equal."),
        ("d", "Naive decoding runs the encoder in its first call too."),
    ], hint="Answer with a letter.",
        praise="The strategies differ in what they do again, and in call 1 nothing is done again."),
    "closed_form": Task(
        tokens, cases=[(1024, 100), (1, 1), (7, 3), (3, 50)],
        wrong=[
            (lambda N, M: tokens(N, M - 1), "This is what M - 1 calls cost."),
            (lambda N, M: [N * M + M * (M - 1) // 2, N + M * (M - 1) // 2, N + M],
             "Try M = 1: one token must enter the decoder."),
            (lambda N, M: [N * M + M * M, N + M * M, N + M], "1 + 2 + .. + M is not M times M."),
            (lambda N, M: tokens(N, M)[0], "Three numbers are wanted: naive, hoisted, cached."),
            (lambda N, M: [N * M + M * (M + 1) // 2, N * M + M, N + M], "Hoisted: it is the encoder that runs once."),
        ], hint="Wanted are three numbers, in the order naive, hoisted, cached."),
    "convention": Task(
        tokens(1024, 99),
        wrong=[
            (tokens(1024, 100), "These count 100 calls. How many ids of a list of 100 were appended to it?"),
            (tokens(1024, 101),
             "The list holds the start token besides the generated ones, so there are fewer calls than ids, not "
             "more."),
            ([each - 1 for each in tokens(1024, 100)],
             "One call less is not one token less, but for the last loop: what would have entered in the hundredth "
             "call?"),
        ], hint="Count the calls of a loop whose list begins as [start] and ends with 100 ids."),
    "until_end": Task(
        until_end, cases=[(Script([5, 7, 2, 9]), 2, 2, 10), (Script([5, 7, 9]), 0, 2, 3), (Script([2, 5]), 2, 2, 4),
                          (Script([4, 4, 2, 4]), 2, 2, 3), (Script([6]), 1, 2, 1)],
        wrong=[
            (while_not_end, "Your loop looks at the last id before it has generated any. BART starts from its own end "
                            "token: ask only after something has been appended."),
            (without_its_end, "The end is part of what was generated: it was computed, so it counts."),
            (lambda step, start, end, most: until_end(step, start, -1, most), "Your loop does not stop at the end."),
            (lambda step, start, end, most: [start, *until_end(step, start, end, most)],
             "What is returned begins with the start token, which nobody generated."),
            (start_counts, "At most `most` new ids: the start token is none of them."),
        ], hint="One call for each id, the end among them, and at most `most`.",
        praise="This is what generate.py's loop does for many rows at a time."),
    "ended": Task(
        tokens(1024, 40),
        wrong=[
            (tokens(1024, 100), "The loop left after 40 calls: what was allowed costs nothing."),
            (tokens(1024, 39), "To generate the end takes a call as well."),
            (tokens(1024, 41), "The end is never fed: the loop has left by then."),
        ], hint="How many decoder calls were made?"),
    "wasteful": Task(
        ["counts"],
        wrong=[
            (["counts", "tokens"], "Would the text change, if the same source is encoded again and again?"),
            (["tokens"], "The text: is the encoder's result another one the second time?"),
            ([], "One of the two counts what enters the encoder."),
        ], hint='Answer with a list: [], ["counts"], ["tokens"] or both.'),
}
