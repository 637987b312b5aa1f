"""
Learn from any text: noise is done to it, and a BART writes what it was (Lewis et al. 2020, section 2.2).

    python train.py configs/bart-denoise.toml [--data.source=PATH]
    python train.py configs/bart-summary.toml --train.init_from=out/bart-denoise

data.noise chooses what is done to a window of the text: "infill", "permute", or "infill+permute" as in the paper:
sentences are shuffled first. Infilling puts one mask in the place of a span, so that a model must also find
out how much is missing. Here spans are of tokens and begin anywhere; the authors' program takes whole words.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing.data import IGNORE, TextData, generator, pair_batch
from plumbing.errors import UserError
from plumbing.tokenizers import MASK

MASKED = 0.3       # of the ids, as in the paper
SPAN = 3.0         # mean length of a span, as in the paper
MORE_DRAWS = 16    # draws of a span beyond one for each id to mask: that these fall short happens once in 10**20 times


class DenoiseData(TextData):
    """
    The windows of a text as pairs of what noise left and what was there, both <s> ... </s>: (source, target, lengths)
    and labels as PairData has them, none longer than block_size. Noise is a function of (seed, step), so it is
    another one in every epoch; that of the held-out part never changes.
    """

    def __init__(self, name, train, val, tokenizer, seed, noise):
        super().__init__(name, train, val, tokenizer, seed)
        if MASK not in tokenizer.specials:
            raise UserError(f"data.noise is {noise!a} and the tokenizer has no {MASK}; choose data.tokenizer bpe, byte "
                            f"or gpt2")
        self.noise, self.mask_id = noise.split("+"), tokenizer.specials[MASK]
        self.bos_id, self.pad_id, self.eos_id = tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id
        self.stops = torch.tensor([token.endswith(b".") for token in tokenizer.tokens])  # (V,)
        self.spaces = torch.tensor([token[:1].isspace() for token in tokenizer.tokens])  # (V,)

    def batch_at(self, step, *, batch_size, block_size):
        """((source (B, N), target (B, M), source_lengths (B,)), labels (B, M)), all int64; see the class."""
        _, rows = super().batch_at(step, batch_size=batch_size, block_size=inside(block_size))
        return self._batch(rows, generator("noise", self.seed, step))

    def val_batches(self, batch_size, block_size):
        """The same over the whole held-out part, in order."""
        for n, (_, rows) in enumerate(super().val_batches(batch_size, inside(block_size))):
            yield self._batch(rows, generator("held-out noise", self.seed, n))

    def _batch(self, rows, rng):
        clean = [row[row != IGNORE] for row in rows]
        sources = [self._framed(self.corrupt(ids, rng)) for ids in clean]
        return pair_batch(pad_sequence(sources, batch_first=True, padding_value=self.pad_id),
                          torch.tensor(list(map(len, sources))),
                          pad_sequence(list(map(self._framed, clean)), batch_first=True, padding_value=IGNORE),
                          self.pad_id, self.eos_id)

    def _framed(self, ids):
        return torch.cat([torch.tensor([self.bos_id]), ids, torch.tensor([self.eos_id])])

    def corrupt(self, ids, rng):
        """What the noise leaves of ids (n,): at most n ids."""
        if "permute" in self.noise:  # a sentence ends at a full stop before white space: 3.11 and os.path are none
            ids = permute(ids, self.stops[ids[:-1]] & self.spaces[ids[1:]], rng)
        return infill(ids, self.mask_id, rng) if "infill" in self.noise else ids


def inside(block_size):
    """The ids of a text that fit between <s> and </s>."""
    if block_size < 3:
        raise UserError(f"model.block_size={block_size} must be at least 3: <s>, one id of the text, and </s>")
    return block_size - 2


def permute(ids, ends, rng):
    """The sentences of ids (n,) in random order. ends (n - 1,): where a sentence ends; the last one does anyway."""
    sentence = torch.cat([torch.zeros(1, dtype=torch.long), ends.cumsum(0)])  # (n,): the number of each id's own
    place = torch.randperm(int(sentence[-1]) + 1, generator=rng)
    return ids[place[sentence].argsort(stable=True)]


def infill(ids, mask_id, rng):
    """Of ids (n,), round(0.3 n) in spans that do not overlap, each replaced by one mask; an empty span inserts one."""
    spans = span_lengths(round(MASKED * len(ids)), rng)
    sizes = torch.cat([spans, spans.new_ones(len(ids) - int(spans.sum()))])  # spans, and ids that stay, are pieces ...
    order = torch.randperm(len(sizes), generator=rng)                        # ... of which any order is as likely
    sizes = sizes[order]
    last = sizes.cumsum(0) - 1  # of each piece, where it ends in the text: an id that stays is there itself
    return ids[last].masked_fill(order < len(spans), mask_id)


def span_lengths(total, rng):
    """
    Lengths of spans that mask `total` ids, drawn from Poisson's law one after the other; the last is cut. At most
    `total` of them: of the empty ones only so many stay, which matters where total is small, that no text grows.
    """
    drawn = torch.poisson(torch.full((total + MORE_DRAWS,), SPAN), generator=rng).long()
    before = drawn.cumsum(0) - drawn
    spans = torch.minimum(drawn, total - before)[before < total]
    empty = spans == 0
    return spans[~empty | (empty.cumsum(0) <= total - (~empty).sum())]
