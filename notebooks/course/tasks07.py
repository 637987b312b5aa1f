"""The exercises of lesson 7."""

import torch

from attention import Causal, CausalSelfAttention, dense
from cost import count
from course import Task
from generate import generate, loop
from model import BART, BARTConfig, GPTConfig

B, N, H, D = 2, 11, 3, 8  # rows, tokens of the source, heads, numbers of a head: those of the page
C, M, K = H * D, 40, 5    # width, decoder calls, and the call that is looked at
T = 6                     # tokens of the teacher-forced pass


def shapes(queries, keys, scores=None, out=None, head=D):
    return dict(q=(B, H, queries, head), k=(B, H, keys, head), v=(B, H, keys, head),
                scores=scores or (B, H, queries, keys), out=out or (B, H, queries, head))


FIXED = ["self c_attn", "self c_proj", "cross c_q", "cross qk", "cross pv", "cross c_proj", "mlp c_fc", "mlp c_proj"]
GROWS = ["self qk", "self pv"]


def told(*growing):
    """The table of the page: what each product does from one decode step to the next."""
    return {name: "grows" if name in growing else "fixed" for name in FIXED + GROWS}


def growing(records, sizes=("left", "right", "out"), phases=("step",), kinds=("GEMM", "BGEMM")):
    seen = {}
    for r in records:
        if r["phase"] in phases and r["kind"] in kinds:
            seen.setdefault((r["attention"], r["name"]), set()).add(str([r[size] for size in sizes]))
    return {product for product, found in seen.items() if len(found) > 1}


def records(strategy, **options):
    torch.manual_seed(0)
    bart = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=1, n_head=2, n_embd=8, vocab_size=13, block_size=16))
    with count(bart) as cost:
        generate(bart, [[3] * 5], 4, strategy=strategy, ignore_eos=True, **options)
    return cost.records


def layer(seed, n_head):
    torch.manual_seed(seed)
    return CausalSelfAttention(GPTConfig(n_head=n_head, n_embd=6)).eval(), torch.randn(2, 1, 6)


def column(attn, x, part):
    """c_proj of one third of what c_attn makes."""
    return attn.c_proj(attn.c_attn(x).chunk(3, -1)[part])


def decode(step, ids, end, most):
    for [new] in loop(lambda rows, which: [[step(row[-1], len(row) - 1)] for row in rows], [ids], [most],
                      lambda _, row: row[-1] == end):
        ids = ids + new
    return ids


def asks_first(step, ids, end, most):
    while ids[-1] != end and len(ids) < most:
        ids = [*ids, step(ids[-1], len(ids) - 1)]
    return ids


def one_too_many(step, ids, end, most):
    return decode(step, ids, end, len(ids) + most)


def drops_the_end(step, ids, end, most):
    ids = decode(step, ids, end, most)
    return ids[:-1] if ids[-1] == end else ids


def stands_still(step, ids, end, most):
    return decode(lambda i, position: step(i, 0), ids, end, most)


def never_ends(step, ids, end, most):
    return decode(step, ids, None, most)


pairs = int(dense(Causal.allows, torch.arange(T), torch.arange(T)).sum())  # of a query and a key that it may see

TASKS = {
    "self": Task(
        shapes(1, K),
        wrong=[(shapes(K, K), "That is a decoder without a cache. How many tokens enter at a decode step?"),
               (shapes(1, 1), "These are the keys and values of the new token alone. What has been stored before it?"),
               (shapes(1, K - 1), "Is the new token's own key stored before the query looks, or after?"),
               (shapes(1, N), "The source is asked by the cross-attention. Whom does self-attention ask?"),
               (shapes(1, K, head=C), "The heads are split by now: each has its part of the width."),
               (shapes(1, K, scores=(B, H, K, 1)), "Scores have a row for each query and a column for each key."),
               (shapes(1, K, out=(B, 1, C)), "The heads have not been merged yet where the output is looked at.")],
        hint="Which of the five have an axis that counts keys?"),
    "cross": Task(
        shapes(1, N),
        wrong=[(shapes(1, K), "That is self-attention again. Who provides the keys here?"),
               (shapes(N, N), "Nobody asks for the tokens of the source: who asks here?"),
               (shapes(1, N + K), "Source and target are asked by two attentions, each with a softmax of its own."),
               (shapes(K, N), "How many tokens enter the decoder at a decode step?")],
        hint="The queries come from the decoder, the keys and values from the encoder."),
    "changes": Task(
        told(*GROWS),
        wrong=[(told(*GROWS, "cross qk", "cross pv"), "Does the source become longer while the target is written?"),
               (told(), "Something must hold what has been written so far. Who looks at all of it?"),
               (told("self qk"), "Which other product has an axis that counts keys?"),
               (told(*GROWS, "self c_attn"), "How many rows pass through c_attn at a decode step?"),
               ({name: "grows" for name in FIXED + GROWS}, "Count the rows that enter a layer at a decode step.")],
        hint="Say \"fixed\" or \"grows\", and ask each product for the number of its rows and of its columns."),
    "growing": Task(
        growing,
        wrong=[(lambda records: growing(records, phases=("prefill", "step")),
                "Compare decode steps with each other. The first call, the prefill, is another matter."),
               (lambda records: growing(records, phases=("encode", "project", "prefill", "step")),
                "The encoder's products came in as well: look at the records of phase \"step\" alone."),
               (lambda records: growing(records, sizes=("right",)),
                "An operand may stay as it is while the other grows: compare left, right and out."),
               (lambda records: {(r["attention"], r["name"]) for r in records if r["kind"] == "BGEMM"},
                "These are all batched products, whether they grow or not.")],
        cases=[(records("cached"),), (records("hoisted"),), (records("cached", decoder_prompts=[[4, 5]]),)],
        hint="For each (attention, name), collect the shapes that it has had: more than one, and it grows."),
    "crossing": Task(
        C * 3 // 2,
        wrong=[(C * 3, "That is one of the two products that grow. Count the other one as well."),
               (C // 2, "c_attn makes queries, keys and values: it has three times C columns."),
               (H * C * 3 // 2, "Count the products of all heads together: H of them, each D wide."),
               (C, "Write both down: 2 B C 3C for c_attn, and for the two that grow 2 B H D k each.")],
        hint="Set the FLOPs of both sides equal. The batch does not matter."),
    "first_step": Task(
        lambda attn, x: attn(x),
        wrong=[(lambda attn, x: column(attn, x, 0), "That third of c_attn makes queries. What do weights multiply?"),
               (lambda attn, x: column(attn, x, 1), "That third of c_attn makes keys. What do the weights multiply?"),
               (lambda attn, x: attn.c_attn(x).chunk(3, -1)[2], "So far so good. Which matrix comes after the heads?"),
               (lambda attn, x: attn.c_proj(x), "The token itself is not its value: what makes a value of it?")],
        cases=[layer(1, 1), layer(2, 3)],
        hint="c_attn(x) is queries, keys and values side by side, C columns each."),
    "entering": Task(
        [5, 1, 1, 1],
        wrong=[([1, 1, 1, 1], "Then the four tokens of the prompt would never be read. When do they enter?"),
               ([4, 1, 1, 1], "The prompt stands behind the start token, which has to enter too."),
               ([1, 1, 1, 1, 1, 1, 1, 1], "That works, with four calls too many: what is known can enter at once."),
               ([5, 6, 7, 8], "That is a decoder without a cache, which reads everything again.")],
        hint="A list of four numbers: how many tokens of each row enter at call 1, 2, 3 and 4?"),
    "speaking": Task(
        "b",
        wrong=[("a", "It decodes from the start token alone: there the newest id is all that is not stored."),
               ("c", "One query in, one output out: whatever enters, this holds."),
               ("d", "Bytes are reserved for all positions when the first token enters, whoever follows.")],
        hint="Answer with a letter. Which of them begins with more than one token?"),
    "decode": Task(
        decode,
        wrong=[(asks_first, "BART's decoder starts from its end token. When may the end be asked for?"),
               (one_too_many, "`most` counts all ids of the list, those it began with too."),
               (drops_the_end, "The end token belongs to the list, as generate() keeps it."),
               (stands_still, "Every call is told the same position. Where does the newest id stand?"),
               (never_ends, "Nobody looks for the end token.")],
        cases=[(lambda i, position: i + 1, [5], 9, 20), (lambda i, position: i + 1, [5], 99, 8),
               (lambda i, position: 10 * position + i % 7, [3], 0, 6),
               (lambda i, position: [4, 7, 2][position], [2], 2, 9),
               (lambda i, position: i + position, [1, 2, 3], 8, 7)],
        hint="Append what step(newest id, its position) returns, then ask whether to stop."),
    "scores": Task(
        [T * T, pairs],
        wrong=[([pairs, pairs], "The pass of training computes the whole square, and the mask hides a part of it."),
               ([T * T, T * T], "At step k the new query meets k keys. Add that up."),
               ([T * T, T], "That counts queries. Each of them has a score for every key that it sees."),
               ([T * T, pairs - T], "A token sees itself: the diagonal counts.")],
        hint="Two numbers: in training, and over all decode steps."),
}
