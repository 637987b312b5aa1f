"""The exercises of lesson 4."""

import torch

from attention import CausalSelfAttention
from cost import count, predict
from course import Task
from course.tasks03 import small_gpt
from model import BARTConfig, GPTConfig

# -----------------------------------------------------------------------------
# A walk through one layer


def walk(mha, x, P):
    pieces = [mha(x[:, :P], use_kv_cache=True, start_pos=0)]
    for i in range(P, x.size(1)):
        pieces.append(mha(x[:, i : i + 1], use_kv_cache=True, start_pos=i))
    return torch.cat(pieces, 1)


def afresh(mha, x, P):
    return torch.cat([mha(x[:, :P], use_kv_cache=True), *(mha(x[:, i : i + 1]) for i in range(P, x.size(1)))], 1)


def all_again(mha, x, P):
    return torch.cat([mha(x[:, :P]), *(mha(x[:, : i + 1])[:, -1:] for i in range(P, x.size(1)))], 1)


def steps_only(mha, x, P):
    return walk(mha, x, P)[:, P:]


def last_missing(mha, x, P):
    return walk(mha, x[:, :-1], P)


def at_once(mha, x, P):
    return mha(x, use_kv_cache=True)


def no_prefill(mha, x, P):
    return walk(mha, x, 1)


def walked(answer, x, P):
    """What a walk returned, and how many positions each of its calls sent through the layer."""
    with torch.no_grad():
        mha, sent = CausalSelfAttention(GPTConfig(n_head=2, n_embd=8)).double().eval(), []
        mha.c_attn.register_forward_hook(lambda module, args, out: sent.append(args[0].size(1)))
        return answer(mha, x, P), sent


# -----------------------------------------------------------------------------
# A walk through a GPT


def greedy(gpt, ids, n):
    new = [gpt(ids, use_kv_cache=True)[:, -1:].argmax(-1)]
    while len(new) < n:
        new.append(gpt(new[-1], use_kv_cache=True, start_pos=ids.size(1) + len(new) - 1)[:, -1:].argmax(-1))
    return torch.cat(new, 1)


def without_cache(gpt, ids, n):
    P = ids.size(1)
    for _ in range(n):
        ids = torch.cat((ids, gpt(ids)[:, -1:].argmax(-1)), 1)
    return ids[:, P:]


def fed_to_the_end(gpt, ids, n):
    new = greedy(gpt, ids, n)
    gpt(new[:, -1:], use_kv_cache=True, start_pos=ids.size(1) + n - 1)
    return new


def last_again(gpt, ids, n):
    gpt(ids, use_kv_cache=True)
    new = [ids[:, -1:]]
    for i in range(n):
        new.append(gpt(new[-1], use_kv_cache=True, start_pos=ids.size(1) + i)[:, -1:].argmax(-1))
    return torch.cat(new[1:], 1)


def first_row(gpt, ids, n):
    new = [gpt(ids, use_kv_cache=True)[:, :1].argmax(-1)]
    while len(new) < n:
        new.append(gpt(new[-1], use_kv_cache=True, start_pos=ids.size(1) + len(new) - 1)[:, -1:].argmax(-1))
    return torch.cat(new, 1)


def prompt_too(gpt, ids, n):
    return torch.cat((ids, greedy(gpt, ids, n)), 1)


def wrote(answer, B, P, n):
    """The ids that an answer wrote, and how many positions entered the model for it."""
    with torch.no_grad():
        gpt, ids = small_gpt(n_layer=2, n_head=2, n_embd=16), torch.randint(97, (B, P))
        with count(gpt) as cost:
            new = answer(gpt, ids, n)
        return new, cost.decoder_tokens


# -----------------------------------------------------------------------------

HEADS = GPTConfig(n_head=8, n_kv_head=2, n_embd=128, block_size=64)
NAIVE, CACHED = (int(predict(GPTConfig(), strategy, 5, 20)["linear_rows"]["h.0.attn.c_attn"]) for strategy in
                 ("naive", "cached"))
CROSS = tuple(predict(BARTConfig(), strategy, 12, 10)["linear_rows"]["decoder.0.cross.c_kv"]
              for strategy in ("naive", "hoisted", "cached"))

TASKS = {
    "shape": Task(
        (64, 1, 8, 6),
        wrong=[((2, 1, 8, 6), "That is what we brought. How many rows is there room for?"),
               ((64, 1, 3, 6), "That is what was stored. How many positions is there room for?"),
               ((64, 8, 1, 6),
                "Heads come before positions: each head's keys lie together, as the product with q wants them."),
               ((64, 1, 8, 18),
                "Queries, keys and values have a third of those columns each, and these are keys alone.")],
        hint="Rows, heads of keys, positions, numbers of a head."),
    "rely": Task(
        "b",
        wrong=[("a", "A product with one row may add its terms in another order than one with eight."),
               ("c",
                "The one call does the very same products with the same shapes; it merely stores something besides."),
               ("d", "The formula is the same: where could anything larger than rounding come from?")],
        hint="Answer with one of the letters a to d.",
        praise="Equal bits are a gift of doing the very same thing. Everything else is compared with a tolerance."),
    "walk": Task(
        walk,
        wrong=[(afresh,
                "Behind the prefill every token is alone: a step has to read the cache, and to say where it stands."),
               (all_again, "The rows are right, and far too many positions were sent: bring only what is not stored."),
               (steps_only, "The rows of the prefill are missing: they are outputs like the others."),
               (at_once, "The rows are right. But while decoding, later tokens are not known: they come one by one."),
               (no_prefill, "The rows are right. But the first P tokens are known, and may enter in one call."),
               (last_missing, "The last position never enters: where does the range end?")],
        cases=[(torch.linspace(-1, 1, 96, dtype=torch.float64).view(2, 6, 8).sin(), 3),
               (torch.linspace(-2, 2, 56, dtype=torch.float64).view(1, 7, 8).cos(), 1)], run=walked,
        hint="x[:, i : i + 1] is one token; before it stand i. Put the pieces together along axis 1."),
    "sent": Task(
        (64, sum(range(3, 65))),
        wrong=[((62, sum(range(3, 65))), "62 is the number of calls. How many positions do they bring together?"),
               ((64, sum(range(1, 65))), "The first call brings three at once: the sum begins with 3."),
               ((64, sum(range(3, 64))), "The last call brings all 64."),
               ((64, 62 * 64), "Not every call brings 64: the first brings 3.")],
        hint="Add up what each call brings: with the cache 3, 1, 1, ...; without it 3, 4, 5, ..."),
    "ratio": Task(
        "c",
        wrong=[("a", "Both make 62 calls: a prefill and 61 steps."),
               ("b", "Look at the right panel: the cached step grows with the past as well, but hardly."),
               ("d", "Both build the layer once, and it takes less than a millisecond.")],
        hint="Answer with one of the letters a to d.",
        praise="As the past grows, the price of computing takes over: see the right panel at 512 tokens."),
    "speaks": Task(
        [2, 3],
        wrong=[([1, 2, 3], "Test 1 has a prefill and single steps. Do these reach the line that was changed?"),
               ([3], "Test 2 cuts a sequence into chunks of all sizes: which of them come behind a prefix?"),
               ([2], "Test 3: its rows stand at different places. Is that one of the easy cases of the line above?"),
               ([],
                "The kernel counts from the top left. What does the first token of a chunk behind a prefix see?"),
               ([1], "A prefill is a square, and a single step sees everything: these go through the line above.")],
        hint="A list of the numbers 1, 2, 3, in order: those that fail.",
        praise="The general case has two kinds of call: a chunk behind a prefix, and rows at different places."),
    "heads": Task(
        ((HEADS.max_batch_size, HEADS.n_kv_head, HEADS.block_size, HEADS.n_embd // HEADS.n_head),
         HEADS.n_embd + 2 * HEADS.kv_width),
        wrong=[(((64, 8, 64, 16), 192), "Shared heads are stored once, not once for each query head."),
               (((64, 2, 64, 16), 384),
                "c_attn has columns for 8 heads of queries, but how many for keys and for values?"),
               (((64, 2, 64, 16), 160), "Keys and values have two heads each."),
               (((64, 2, 64, 64), 192), "A head has the width it had: C / H, and H is the number of query heads.")],
        hint="D = 128 / 8. The columns of c_attn: 8 heads of queries, then those of keys, then those of values."),
    "greedy": Task(
        greedy,
        wrong=[(without_cache,
                "The ids are right, and the whole text entered every time: bring only the newest token."),
               (fed_to_the_end, "The ids are right. But one position too many entered: the last id need not be fed."),
               (last_again,
                "The last id of the prompt is stored twice: the prefill's last row already says the first new id."),
               (first_row, "The prefill returns a row for each id of the prompt. Which one speaks of what comes next?"),
               (prompt_too, "Only the new ids are asked for: (B, n), without the prompt.")],
        cases=[(1, 5, 8), (3, 4, 6)], run=wrote,
        hint="The prefill gives the first id. Each further one: feed the newest id, at the number of ids before it."),
    "tokens": Task(
        (NAIVE, CACHED),
        wrong=[((NAIVE, 25), "The last of the 20 is written and never read."),
               ((NAIVE, 20), "With the cache: a call for the whole prompt, and then 19 of one token."),
               ((5 * 20 + 20 * 21 // 2, CACHED), "Without: the first call brings 5, the last one 5 + 19."),
               ((25 * 20, CACHED), "The text grows: not every call brings all of it.")],
        hint="20 new ids are 20 calls. Add up what each brings."),
    "cross": Task(
        CROSS,
        wrong=[((CROSS[0], CROSS[2], CROSS[2]),
                "Hoisting keeps the encoder's output. From it the decoder's layers project keys "
                                                "and values, call by call."),
               ((CROSS[0], CROSS[1], 10), "What is projected is the source, not the text that is written."),
               ((CROSS[0], CROSS[1], 1), "Once is right. But how many rows does the source have?"),
               ((CROSS[2],) * 3, "Only the cached strategy keeps what it has projected.")],
        hint="Rows: the tokens of the source, times how often they are projected."),
}
