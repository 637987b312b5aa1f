"""
Probes for the gallery: small checks, each of which asks for one promise of one function, and for no more. So each fails
for one exhibit and for no other, which table() shows.
"""

import torch

from attention import NOWHERE, Causal, CrossAttention, attend, attend_explicit, key_positions
from cache import KVCache, Memory, passing
from compare import same
from course.gallery import EXHIBITS, SCENES, broken
from generate import advance
from model import DecoderLayer
from sparse import Local


def stands_at(start, filled):
    cache = KVCache(len(filled), 8)
    cache.filled = filled
    with passing(cache, start, torch.zeros(len(filled), 1), 8) as pos:
        return pos.tolist()


def sees(*query_pos):
    """(T, 6): which of six keys the queries at these positions see."""
    T, q = len(query_pos), torch.zeros(1, 1, 6, 6)
    return Causal(0.0)(q[:, :, :T], q, torch.eye(6)[None, None], torch.tensor(query_pos), torch.arange(6))[0, 0] > 0


def stored(keys, values, pos=None):
    """A cache of rows whose keys and values are these numbers, at 2 positions, and what update() returned."""
    k, v = (torch.tensor(x)[:, None, None, None].expand(-1, 1, 2, 1) for x in (keys, values))
    cache = KVCache(len(keys), 8)
    cache.begin([0] * len(keys), 2)
    found = cache.update(0, torch.arange(2) if pos is None else pos, k, v)
    cache.filled = [2] * len(keys)
    return cache, *found


def firsts(x):
    return x[:, 0, 0, 0].tolist()


def moved(rows):
    cache, *_ = stored([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    cache.reorder(rows)
    return firsts(cache.k[0]), firsts(cache.v[0])


def fits(start, T):
    """Whether a cache of 4 takes so many positions behind start."""
    cache = KVCache(1, 4)
    cache.filled = [start]
    try:
        cache.check([start], 1, T)
    except ValueError:
        return False
    return True


def rewound():
    cache, *_ = stored([1.0], [1.0])
    cache.rewind(1)
    return cache.filled == [1]


def column():
    rows, [model, *_] = [[5], [6, 7, 8]], SCENES["plain"].truth
    return same(advance(model, rows)[0, 0], model(torch.tensor([[5, 0, 0], rows[1]]))[0, 0])


@torch.no_grad()
def sources_answer():
    model = SCENES["source"].truth[0]
    model.clear_kv_cache()
    for encoded in torch.zeros(1, 2, 16).double(), torch.ones(1, 3, 16).double():
        model.decode(torch.tensor([[2]]), encoded, use_kv_cache=True)
    return model.source[2].kv[0][0].shape[2] == 3


@torch.no_grad()
def own_memory():
    layer = DecoderLayer(SCENES["source"].truth[0].config, 1)
    x, others = torch.ones(1, 1, 16), [torch.zeros(1, 2, 3, 4), torch.rand(1, 2, 3, 4)]
    return not same(*(layer(x, torch.arange(1), None, Memory([(others[0],) * 2, (one,) * 2], torch.arange(3)))
                      for one in others))


@torch.no_grad()
def neighbours_differ():
    torch.manual_seed(0)
    cross, x = CrossAttention(SCENES["source"].truth[0].config), torch.rand(2, 1, 16)
    k, v = torch.rand(2, 2, 2, 3, 4)
    out = cross(torch.cat([x, x]), k, v, torch.arange(3))
    return not same(out[0], out[1])


def heads_agree():
    torch.manual_seed(0)
    q, k, v = torch.rand(1, 4, 1, 3).double(), *torch.rand(2, 1, 2, 5, 3).double()
    return same(attend(q, k, v), attend_explicit(q, k, v)[0])


def expanded():
    cache, *_ = stored([1.0, 2.0], [1.0, 2.0])
    cache.expand(2)
    return firsts(cache.k[0])


def forked():
    cache, *_ = stored([1.0], [1.0])
    cache.fork().k[0].fill_(7.0)
    return cache.k[0].max() == 1


PROBES = {  # cause -> what holds, and whether it does
    "top-left": ("a query behind a prefix sees all of the prefix", lambda: sees(3, 4)[0, :4].all()),
    "not-offset": ("behind four positions nothing stands at 0", lambda: stands_at(4, [4]) != [0]),
    "keys-only": ("values move with their keys", lambda: len(set(map(tuple, moved([2, 0, 1])))) == 1),
    "no-mask": ("no query sees what lies two behind it", lambda: not sees(2, 3)[0, 4:].any()),
    "first-row-only": ("the second row is stored too", lambda: firsts(stored([1.0, 2.0], [1.0, 2.0])[1])[1] == 2),
    "off-by-one": ("no token stands on the one before it", lambda: stands_at(4, [4]) != [3]),
    "stale": ("what is read ends where the text ends", lambda: len(stored([1.0], [1.0])[3]) == 2),
    "not-moved": ("a reordered row is another", lambda: moved([1, 1, 1])[0][0] != 1),
    "one-length": ("rows of 1 and 3 go on at different places", lambda: stands_at([1, 3], [1, 3])[0] != [3]),
    "own-future": ("the next position is not allowed", lambda: not Causal.allows(0, 0, 3, 4)),
    "last-column": ("the logits of a padded row are those of its own last letter", column),
    "old-source": ("a new text has the memory of its own source", sources_answer),
    "values-for-keys": ("ragged rows keep keys as keys",
                        lambda: firsts(stored([1.0, 1.0], [5.0, 5.0], torch.tensor([[0, 1]] * 2))[1]) == [1, 1]),
    "not-forgotten": ("a rewind lowers the count", rewound),
    "heads-regrouped": ("the two attention functions agree where heads are shared", heads_agree),
    "small-ring": ("a window has as many slots as it sees", lambda: Local(3).slots(8)[0].size == 3),
    "overflow": ("a cache takes what fits, and no more",
                 lambda: [fits(2, 2), fits(3, 2), fits(4, 1)] == [True, False, False]),
    "first-memory": ("layer 1 reads the memory of layer 1", own_memory),
    "memory-stays": ("the values of a source move with it",
                     lambda: Memory([(torch.zeros(2), torch.arange(2))], torch.arange(1)).take([1]).kv[0][1] == 1),
    "tiled": ("copies of a row are neighbours", lambda: expanded()[0] == expanded()[1]),
    "padding-counts": ("the first padded position is nowhere",
                       lambda: key_positions(torch.zeros(1, 3), torch.tensor([2]))[0, 2] == NOWHERE),
    "shared-fork": ("what a fork writes is not written here", forked),
    "crossed-beams": ("neighbours ask for themselves", neighbours_differ),
}


def passes(cause):
    """Whether a probe passes. One that fails with an error has failed."""
    try:
        return bool(PROBES[cause][1]())
    except Exception:
        return False


def table():
    """For every exhibit, in order, whether each probe passes: lists of bools. The last are those of the sound code."""
    found = []
    for exhibit in EXHIBITS:
        with broken(exhibit):
            found.append([passes(cause) for cause in PROBES])
    return [*found, [passes(cause) for cause in PROBES]]
