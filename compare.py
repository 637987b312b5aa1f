"""
Two ways to decode should give the same logits. Where they do not: is it a bug, or rounding?

    python bench.py compare --model out/gpt-tiny --prompt "The if statement"

compare() runs every strategy on the same input and puts counts, times and tokens beside each other. Where anything
differs it decodes again in fp64, with the tokens of the first strategy forced: a difference that is rounding falls by
many orders of magnitude, one that is a bug stays. A bug is then looked for: at the first step that is wrong, what
enters and leaves every attention is held against one uncached pass over that row alone, layer by layer.

It works for a changed model and for strategies of one's own: that is what it is for.
"""

import copy
import time
from contextlib import contextmanager
from itertools import islice
from statistics import mean

import torch

from cost import FORMULAS, count, hooks, predict, rows_through, watch
from generate import naive, stream
from plumbing.checks import prepare

FALLS = 1e6   # so many times smaller is a difference in fp64 if it is rounding ...
TINY = 1e-10  # ... or smaller than this, relative to the largest number beside it

# -----------------------------------------------------------------------------
# Side by side


def measure(model, make, given, *request, **options):
    """Count a run to its end: its Cost, of each of B rows the ids and the logits (V,) of each, and seconds per step."""
    seen, rows, seconds = {}, given[1], []
    ids, logits = [[] for _ in rows], [[] for _ in rows]

    def look(scores, texts, which):  # at guesses that are wrong, too: what is found later stands in their place
        seen.update({(r, len(text)): own for r, text, own in zip(which, texts, scores.detach().double().cpu())})

    def watched(model, sources, B, room, choose):
        choose.watch = look
        return make(model, sources, B, room, choose)

    with count(model) as cost:
        begun = time.perf_counter()
        for found in stream(model, *request, strategy=watched, **options):
            seconds.append(time.perf_counter() - begun)
            begun += seconds[-1]
            for r, new in enumerate(found):
                start = len(rows[r]) + len(ids[r])
                ids[r] += new
                logits[r] += [seen[r, start + k] for k in range(len(new))]
            seen.clear()
    return cost, ids, logits, seconds


def first_difference(ids, logits, other_ids, other_logits):
    """
    How far another run is from the first: (largest logit difference, None or the first step where the tokens differ).
    Each row counts up to its own first difference, since after that the two continue different texts; None is the token
    of a row that has ended. `difference` is that of the logits there, `gap` how much the first run's prefer its token.
    """
    largest, found = 0.0, []
    for row, (ours, theirs) in enumerate(zip(ids, other_ids)):
        for k in range(max(len(ours), len(theirs))):
            a, b = ours[k : k + 1], theirs[k : k + 1]
            if a and b:
                difference = (logits[row][k] - other_logits[row][k]).abs().max().item()
                largest = max(largest, difference)
            if a != b:
                gap = (logits[row][k][a[0]] - logits[row][k][b[0]]).item() if a and b else float("inf")
                found.append(dict(step=k + 1, row=row, tokens=[*(a or [None]), *(b or [None])], gap=gap,
                                  difference=difference))
                break
    return largest, min(found, key=lambda one: one["step"], default=None)


def compare(model, makes, prompts, max_new_tokens, **options):
    """
    Run strategies on the same input, greedily, and put the counts, times and outputs beside each other.

    makes: name -> what makes its step, as strategies(model) has it; the first is the reference. prompts: B lists of
    ids; counts are held against closed forms where all are as long, decoder prompts too, or none ends before the
    others. options: further arguments of stream(). The counting hooks are in the timed runs: they cost microseconds,
    where a second run would cost the naive minutes. Returns a dict for JSON: N, M, batch_size, distinct (ids in the
    longest text), bug (whether there is one), and `strategies`, a list of dicts, each with a finding: see judge().
    Logits of all steps are kept while it runs: 16 bytes x M x B x V.
    """
    reference, exact, outcomes, N = None, None, [], max(map(len, prompts))
    first_make = next(iter(makes.values()))
    given = _, rows = prepare(model, prompts, max_new_tokens, options.get("decoder_prompts"))
    begun, sizes = max(map(len, rows)) - model.config.starts(N), {(len(a), len(b)) for a, b in zip(prompts, rows)}
    for name, make in makes.items():
        request = prompts, max_new_tokens
        for _ in islice(stream(model, *request, strategy=make, **options), None if model.wte.weight.is_cuda else 2):
            pass  # what is set up once is nobody's cost: on a GPU, kernels for every shape, so the whole run
        cost, ids, logits, seconds = measure(model, make, given, *request, **options)
        reference = reference or (ids, logits, sum(seconds))
        largest, first = first_difference(*reference[:2], ids, logits)
        known = name in FORMULAS and 1 in (len(sizes), len(set(map(len, ids))))  # else padding varies as rows leave
        closed = [predict(model.config, name, N, len(row), begun=begun) for row in ids if known]
        counts = [cost.encoder_tokens, cost.decoder_tokens]
        closed = [sum(c[f"{stack}_tokens"] for c in closed) for stack in ("encoder", "decoder")] if closed else None
        finding = dict(verdict="equal")
        if largest or first:
            exact = exact or in_fp64(model, given, reference[0])  # once for all strategies
            finding = judge(exact, make, given, reference[0], largest, first)
            itself = judge(exact, first_make, given, reference[0], largest, None, last_only=first_make is naive)
            outcomes[0]["finding"] = itself if itself["verdict"] == "bug" else outcomes[0]["finding"]
        if closed and counts != closed and finding["verdict"] != "bug":
            finding = dict(verdict="bug", kind="counts", step=None)
        outcomes.append(dict(
            strategy=name, identical=first is None, first_difference=first, logit_difference=largest, finding=finding,
            encoder_tokens=counts[0], decoder_tokens=counts[1], closed_form=closed,
            unseen=max(0, len(seconds) - cost.steps),  # calls that hooks saw nothing of: they were compiled
            prefill_tokens=cost.encoder[1] + cost.decoder[1], linear_rows=rows_through(cost.linear_rows),
            layer_rows={name.split(".", 2)[2]: rows for name, rows in cost.linear_rows.items()
                        if name.startswith(("h.0.", "decoder.0."))},
            linear_flops=cost.flops("GEMM"), attention_flops=cost.flops("BGEMM"),
            self_cache_bytes=cost.cache_bytes("self"), cross_cache_bytes=cost.cache_bytes("cross"),
            seconds=sum(seconds), first_seconds=seconds[0], token_seconds=mean(seconds[1:]) if seconds[1:] else None,
            speed=reference[2] / sum(seconds),
            products=[[*product, times] for product, times in cost.step(cost.steps // 2 + 1).items()],
            steps=[[cost.encoder[k + 1], cost.decoder[k + 1], s] for k, s in enumerate(seconds)], ids=ids))
    distinct = max(len(set(row)) for row in reference[0])
    return dict(N=N, M=max(map(len, reference[0])), batch_size=len(prompts), distinct=distinct,
                bug=any(s["finding"]["verdict"] == "bug" for s in outcomes), strategies=outcomes)


# -----------------------------------------------------------------------------
# Bug or rounding


def in_fp64(model, given, ids):
    """What judge() compares with: the model in fp64, and its uncached() passes over the rows with these ids."""
    exact = copy.deepcopy(model)
    exact = (exact.cpu() if model.wte.weight.device.type == "mps" else exact).double()  # which MPS does not have
    sources, rows = given
    return exact, [uncached(exact, sources and sources[r], row + ids[r][:-1]) for r, row in enumerate(rows)]


def judge(exact, make, given, ids, largest, first, last_only=False):
    """
    What a difference is: a dict with the verdict "rounding" or "bug". Of rounding, `falls` tells how many times smaller
    it is in fp64, and `flips` whether it explains the first token that differs. Of a bug there are step, row, layer,
    attention ("self", "cross" or None), kind ("positions", "keys", "values", "mask", "input", "head" or "choosing") and
    note.
    exact: see in_fp64(). given: sources and rows, as prepare() has them. last_only: look at the last step alone, the
    longest; it is for a strategy that keeps nothing between its steps.
    """
    (model, alone), (sources, rows) = exact, given
    worst, M = 0.0, max(map(len, ids))
    for r, k, logits, which, calls in replay(model, make, sources, rows, ids, M - 1 if last_only else 0):
        n = len(rows[r]) + k  # tokens that the next one is chosen from
        true, entered = alone[r]
        difference = (logits - true[n - 1]).abs().max().item()
        worst = max(worst, difference)
        if difference > max(largest / FALLS, TINY * max(1.0, true.abs().max().item())):
            where = locate(calls, entered, which.index(r), n, len(which))
            return dict(verdict="bug", step=k + 1, row=r, size=difference, **where)
    if first and not first["gap"] <= 2 * first["difference"]:  # the logits do not explain it
        return dict(verdict="bug", step=first["step"], row=first["row"], size=worst, kind="choosing", layer=None,
                    attention=None, note="its logits are right, and another token is chosen from them")
    falls = largest / worst if worst else None
    return dict(verdict="rounding", size=largest, exact=worst, falls=falls, flips=first is not None)


@contextmanager
def recorded(model):
    """In the block, the latest call of every attention: name -> (q, k, v, query_pos, key_pos, out, allows)."""
    calls = {}
    with hooks(watch(model, lambda name, pattern, *call: calls.update({name: (*call, pattern.allows)}))):
        yield calls


@torch.inference_mode()
def uncached(model, source, text):
    """One pass over one row: its logits (T, V), and what entered and left every attention."""
    device = model.wte.weight.device
    with recorded(model) as calls:
        return model(*(torch.tensor([ids], device=device) for ids in (source, text) if ids is not None))[0], calls


def replay(model, make, sources, rows, ids, first):
    """
    Decode with the tokens forced, from number `first` on. Yields, for each that a step finds, its row and number, the
    logits that it was chosen from, the rows of the step, and its calls; the first's begin with what stands before it.
    """
    seen, room = {}, max(len(row) + len(new) for row, new in zip(rows, ids))

    def choose(logits, texts, which):
        places = [(r, len(text) - len(rows[r])) for r, text in zip(which, texts)]
        seen.update(zip(places, logits))
        return [[*ids[r][k : k + 1], 0][:1] for r, k in places]

    with recorded(model) as calls:
        step, done = make(model, sources, len(rows), room, choose), [first] * len(rows)
        while which := [r for r, new in enumerate(ids) if done[r] < len(new)]:
            for r, new in zip(which, step([rows[r] + ids[r][: done[r]] for r in which], which)):
                for _ in islice(new, len(ids[r]) - done[r]):
                    yield r, done[r], seen[r, done[r]], which, calls
                    done[r] += 1
            calls.clear()
            seen.clear()


def locate(calls, entered, i, n, B):
    """
    Where row i of B, n tokens long, first leaves the uncached pass: in the order of the layers, by what enters and
    leaves each attention. calls: of the step; entered: of the pass over the row alone.
    """
    at = []  # (which query, its position) of the row's tokens that entered in this step
    for name, true in entered.items():
        if name not in calls:  # the encoder has worked already
            continue
        mine, attention = calls[name], "cross" if ".cross." in name else "self"
        if name.startswith("encoder"):
            found = look_at_encoder(mine, true, i)
        elif attention == "self":
            at, found = look_at_self(mine, true, i, n)
        else:
            found = look_at_cross(mine, true, i, at, B)
        if found:
            return dict(layer=int(name.split(".")[1]), attention=attention, kind=found[0], note=found[1])
    return dict(layer=None, attention=None, kind="head", note="every attention is right, and what comes after is not")


WRONG_INPUT = "input", "what enters is wrong already, and every attention before is right"


def look_at_encoder(mine, true, i):
    """None, or the kind and what is wrong, of one bidirectional attention."""
    N = true[0].size(2)
    if not same(mine[0][i, :, :N], true[0][0]):
        return WRONG_INPUT
    right = same(mine[5][i, :, :N], true[5][0])
    return None if right else ("mask", "in the encoder, a token sees more or less than its own source")


def look_at_self(mine, true, i, n):
    """The queries of the row as locate() has them, and None or the kind and what is wrong, of one causal attention."""
    q, k, v, query_pos, key_pos, out, allows = mine
    query_pos, key_pos = (pos if pos.dim() == 1 else pos[min(i, len(pos) - 1)] for pos in (query_pos, key_pos))
    at = [(t, p) for t, p in enumerate(query_pos.tolist()) if p < n]  # what lies behind is padding
    if not at or at[-1][1] != n - 1:
        return at, ("positions", f"the newest token stands at {query_pos.tolist()[-1]} instead of {n - 1}")
    if any(not same(q[i, :, t], true[0][0, :, p]) for t, p in at):
        return at, WRONG_INPUT
    where = torch.arange(n, device=key_pos.device)
    seen = allows(0, 0, torch.tensor([p for _, p in at], device=key_pos.device)[:, None], where).any(0)
    slots = {p: (key_pos == p).nonzero().flatten().tolist() for p in where[seen].tolist()}  # the others may be gone
    for p, found in slots.items():
        if len(found) != 1:
            right = k.size(2) >= n and same(k[i, :, :n], true[1][0, :, :n])  # only where they stand is wrong
            return at, ("positions" if right else "keys", f"{len(found)} keys stand at position {p}")
    for what, x, y in (("keys", k, true[1]), ("values", v, true[2])):
        for p, [slot] in slots.items():
            if not same(x[i, :, slot], y[0, :, p]):
                return at, (what, f"those of position {p} are wrong")
    for t, p in at:
        if not same(out[i, :, t], true[5][0, :, p]):
            return at, ("mask", f"the token at position {p} sees more or less than its past")
    return at, None


def look_at_cross(mine, true, i, at, B):
    """None, or the kind and what is wrong, of one cross-attention."""
    q, k, v, _, key_pos, out, _ = mine
    rows, N = B // len(k), true[1].size(2)  # rows that ask one source, which has N tokens
    source, before = i // rows, i % rows * (q.size(2) // rows)  # the queries of other rows that stand in front
    if any(not same(q[source, :, before + t], true[0][0, :, p]) for t, p in at):
        return WRONG_INPUT
    for what, x, y in (("keys", k, true[1]), ("values", v, true[2])):
        if x.size(2) < N or not same(x[source, :, :N], y[0]):
            return what, "those of the source are wrong"
    if any(not same(out[source, :, before + t], true[5][0, :, p]) for t, p in at):
        return "mask", "a token sees more or less than its source"
    return None


def same(a, b):
    return bool((a - b).abs().max() <= TINY * max(1.0, b.abs().max().item()))
