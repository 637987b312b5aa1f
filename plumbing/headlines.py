"""
Made-up news for the summarisation lesson: an article, and the headline that its facts determine.

A headline says who did what, where, on which day, and a number. The article gives these facts in varied words and
order, among sentences about other companies, places, days and numbers. Only meaning tells those apart ("last year", "a
rival plan"), so a model has to read. Some pairs of company and event never occur in training: a model that recites what
it has seen fails on them.
"""

import tomllib
from pathlib import Path

WORDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
COMPANIES, PLACES, DAYS, EVENTS = (WORDS[key] for key in ("companies", "places", "days", "events"))


def held(who, event):
    """Is this pair kept from training? One in ten is, and every company and event has some."""
    return (who + 3 * event) % 10 == 0


def pair(rng, config, held_out):
    """One (article, headline) from a random.Random, about a held-out pair or one that is not."""
    who, event = draw(rng, held_out)
    headline, ways, thing, unit = EVENTS[event]
    place, day, n = rng.choice(PLACES), rng.choice(DAYS), rng.randint(11, 99)
    sentences = [rng.choice(WORDS["did"]).format(who=COMPANIES[who], did=rng.choice(ways), place=place, day=day),
                 rng.choice(WORDS["counted"]).format(thing=thing, n=n, unit=unit)]
    for aside in rng.sample(WORDS["asides"], rng.randint(3, 5)):
        other, theirs = draw(rng, False)  # an aside must not show a held-out pair either
        while other == who:
            other, theirs = draw(rng, False)
        sentences.append(aside.format(
            other=COMPANIES[other], did=rng.choice(EVENTS[theirs][1]), thing=thing, unit=unit,
            place=other_than(place, lambda: rng.choice(PLACES)),
            day=other_than(day, lambda: rng.choice(DAYS)), n=other_than(n, lambda: rng.randint(11, 99))))
    rng.shuffle(sentences)
    return " ".join(sentences), f"{COMPANIES[who]} {headline} in {place} on {day}: {n} {unit}"


def draw(rng, held_out):
    """The numbers of a company and of an event whose pair is, or is not, held out."""
    while True:
        who, event = rng.randrange(len(COMPANIES)), rng.randrange(len(EVENTS))
        if held(who, event) == held_out:
            return who, event


def other_than(value, draw_one):
    while (other := draw_one()) == value:
        pass
    return other
