"""Made-up news for the summarisation lesson: an article, and the headline that its facts determine.

A headline says who did what, where, on which day, and a number. The article gives these facts in varied words
and order, among sentences about other companies, places, days and numbers. Only meaning tells those apart
("last year", "a rival plan"), so a model has to read. Some pairs of company and event never occur in
training: a model that recites what it has seen fails on them.
"""

COMPANIES = ("Orbita", "Northwind Rail", "Velora", "Kestrel Foods", "Tamarin", "Blue Harbour", "Sundal",
             "Ironbridge", "Pellucid", "Marlow Steel", "Quillon", "Redwood Air", "Astera", "Copperline",
             "Fenwick", "Granite Bank", "Halcyon", "Juniper Labs", "Lumen Gas", "Mirabel")
PLACES = ("Lisbon", "Oslo", "Turin", "Bremen", "Cardiff", "Gdansk", "Leeds", "Malmo", "Porto", "Riga",
          "Seville", "Tampere", "Utrecht", "Vienna", "Zagreb", "Nantes")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

# (in the headline, two ways to say it in the article, what it is, what the number counts)
EVENTS = (
    ("opens plant", ("opened a plant", "started work at a new plant"), "plant", "jobs"),
    ("buys shipyard", ("bought a shipyard", "took over a shipyard"), "shipyard", "workers"),
    ("closes mine", ("closed a mine", "shut the last mine"), "mine", "miners"),
    ("sells hotel", ("sold a hotel", "parted with a hotel"), "hotel", "rooms"),
    ("builds bridge", ("built a bridge", "finished a bridge"), "bridge", "metres"),
    ("loses appeal", ("lost an appeal", "was defeated in an appeal"), "appeal", "claims"),
    ("recalls cars", ("recalled cars", "called back cars"), "recall", "cars"),
    ("plants forest", ("planted a forest", "set out a young forest"), "forest", "trees"),
    ("tests ferry", ("tested a ferry", "sent a ferry on trial"), "ferry", "seats"),
    ("wins contract", ("won a contract", "was given a contract"), "contract", "buses"),
    ("cuts prices", ("cut prices", "made its goods cheaper"), "cut", "products"),
    ("hires engineers", ("hired engineers", "took on engineers"), "hiring", "engineers"),
    ("delays launch", ("delayed a launch", "put off a launch"), "delay", "orders"),
    ("repairs dam", ("repaired a dam", "mended an old dam"), "dam", "homes"),
    ("funds clinic", ("funded a clinic", "paid for a clinic"), "clinic", "beds"),
    ("moves office", ("moved an office", "set up its office anew"), "office", "desks"),
)

DID = ("{who} {did} in {place} on {day}.", "On {day} {who} {did} in {place}.",
       "In {place}, {who} {did} on {day}.", "It was in {place} that {who} {did} on {day}.")
COUNTED = ("The {thing} concerns {n} {unit}.", "In all, {n} {unit} are part of the {thing}.",
           "Officials put the {thing} at {n} {unit}.")
ASIDES = ("Last year {other} {did} in {place}.", "A spokesman for {other} declined to comment on {day}.",
          "A rival plan by {other} would have meant {n} {unit}.",
          "Elsewhere, {other} was expected in {place} on {day}.",
          "Analysts at {other} had guessed {n} {unit} at most.", "Rain fell in {place} for most of {day}.",
          "Two years ago the same {thing} would have meant {n} {unit}.")


def held(who, event):
    """Is this pair kept from training? One in ten is, and every company and event has some."""
    return (who + 3 * event) % 10 == 0


def pair(rng, config, held_out):
    """One (article, headline) from a random.Random, about a held-out pair or one that is not."""
    who, event = draw(rng, held_out)
    headline, ways, thing, unit = EVENTS[event]
    place, day, n = rng.choice(PLACES), rng.choice(DAYS), rng.randint(11, 99)
    sentences = [rng.choice(DID).format(who=COMPANIES[who], did=rng.choice(ways), place=place, day=day),
                 rng.choice(COUNTED).format(thing=thing, n=n, unit=unit)]
    for aside in rng.sample(ASIDES, rng.randint(3, 5)):
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
