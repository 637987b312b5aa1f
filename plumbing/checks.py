"""What a request for texts may hold: refused here, before anything is computed."""

from cost import predict
from plumbing.errors import UserError
from plumbing.models import free_memory


def check_ids(what, rows, vocab_size, least=1):
    """Raise UserError unless every row is a list of at least `least` ids of the vocabulary."""
    for r, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise UserError(f"{what} {r} is {row!r:.60}: it must be a list of ids (of a tensor, its tolist())")
        if len(row) < least:
            raise UserError(f"{what} {r} is empty: it needs at least {least} token")
        for i in row:
            if type(i) is not int or not 0 <= i < vocab_size:
                raise UserError(f"{what} {r} has the id {i!r}: ids are integers from 0 to {vocab_size - 1}")


def check_forced(choice, config):
    """Raise UserError unless the ids that fields of Choice force are of the vocabulary."""
    forced = [choice[key] for key in ("forced_first", "forced_last") if choice.get(key) is not None]
    check_ids("the list of forced ids", [forced], choice.get("n_vocab") or config.vocab_size, least=0)


def check_count(name, value):
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"{name}={value!r:.60} must be a whole number, at least 1 and less than 2**31")


def check_room(choose, room):
    """Raise UserError where a text outgrows its room: how it slides is known to the strategies of generate.py alone."""
    longest = max(getattr(choose, "limits", None) or [0])
    if longest > room:
        raise UserError(f"a text of {longest} tokens does not fit {room}, and this strategy does not let it slide: "
                        f"leave out overflow, or the strategy")


def check_caches(what, remedy, model, rows, room, source=0):
    """Raise UserError unless `rows` rows of `room` positions, with sources of so many tokens, fit the free memory."""
    weight, device = model.wte.weight, str(model.wte.weight.device)
    predicted = predict(model.config, "cached", source or 1, 1, rows, weight.element_size(), begun=room - 2)
    need = predicted["self_cache_bytes"] + (predicted["cross_cache_bytes"] if source else 0)
    have = free_memory(device)
    if need > have:
        raise UserError(f"{what} need {need / 2**30:,.1f} GiB and {have / 2**30:,.1f} GiB are free on {device}: "
                        f"{remedy}")


def for_each(max_new_tokens, rows):
    """max_new_tokens as a list of one per row. Raises UserError on a list of another length."""
    most = max_new_tokens if isinstance(max_new_tokens, list | tuple) else [max_new_tokens] * len(rows)
    if len(most) != len(rows):
        raise UserError(f"{len(most)} numbers max_new_tokens for {len(rows)} prompts: give one, or one for each")
    return most


def prepare(model, prompts, max_new_tokens, decoder_prompts, overflow="refuse"):
    """Check a request and sort it into sources (None for a GPT) and the B rows that the decoder continues."""
    prompts = list(prompts)  # a generator gives them once
    config, sources, rows = model.config, None, prompts
    check_ids("prompt", prompts, config.vocab_size)
    if config.is_encoder_decoder:
        sources, longest = prompts, max(map(len, prompts), default=0)
        if longest > config.block_size:
            raise UserError(f"a source of {longest} tokens does not fit block_size={config.block_size}: shorten it")
        starts = [[]] * len(prompts) if decoder_prompts is None else list(decoder_prompts)
        check_ids("decoder prompt", starts, config.vocab_size, least=0)
        rows = [[config.start_id, *start] for start in starts]
    elif decoder_prompts is not None:
        raise UserError("decoder_prompts are for an encoder-decoder: a GPT continues its prompts themselves")
    if len(rows) != len(prompts):
        raise UserError(f"{len(rows)} decoder prompts for {len(prompts)} sources: give one for each")
    most = for_each(max_new_tokens, rows)
    for n in most:
        check_count("max_new_tokens", n)
    if overflow not in ("refuse", "slide"):
        raise UserError(f"overflow={overflow!r:.60} must be 'refuse' or 'slide'")
    for row, n in zip(rows, most):
        if overflow == "refuse" and len(row) + n > config.block_size:
            raise UserError(f"{len(row)} tokens and max_new_tokens={n} do not fit block_size={config.block_size}: "
                            f"shorten the prompt or ask for fewer (a single text may slide: --overflow slide)")
    return sources, rows
