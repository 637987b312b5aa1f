"""Texts that show how others may go on."""

from collections import Counter, defaultdict

from plumbing.checks import check_ids

NEWEST = 2  # so many of the newest ids decide, if they occur; else fewer do


class Examples:
    """What followed the ids in rows of ids, one behind the other: counted once, for many decodings."""

    def __init__(self, rows):
        self.vocab_size = 1 + max((i for row in rows for i in row), default=-1)
        check_ids("example", rows, self.vocab_size, least=0)
        text, self.followed = [i for row in rows for i in row], defaultdict(Counter)
        for n in range(1, NEWEST + 1):
            for at in range(n, len(text)):
                self.followed[tuple(text[at - n : at])][text[at]] += 1

    def next(self, row, known):
        """Of what followed the newest ids of a row: one of those known if there is one, then the most frequent."""
        for n in range(NEWEST, 0, -1):
            if counts := self.followed.get(tuple(row[-n:])):
                return max(counts, key=lambda i: (i in known or i in row, counts[i]))
        return row[-1]
