"""
Choosing the next token from its logits: greedily, or by chance among the likely ones.

This file knows logits and the texts so far, and nothing of where they come from.
"""

from dataclasses import dataclass

import torch

from plumbing.errors import NonFiniteError, UserError


@dataclass(slots=True)
class Choice:
    """
    How a token is chosen from its logits. The default is greedy: the most likely one, the lowest id among equals.
    First the rules that a model's publishers may set, then the filters top_k, top_p and min_p, each on what the one
    before it left.
    """

    temperature: float = 0.0            # logits are divided by this; 0 = greedy
    top_k: int | None = None            # keep the k most likely tokens
    top_p: float | None = None          # keep the most likely ones until they have probability p (Holtzman et al. 2019)
    min_p: float | None = None          # keep those at least this fraction as likely as the most likely one
    seed: int | None = None             # of the draws; None = different every time
    n_vocab: int | None = None          # ids from here on are never chosen: a model's vocabulary may be padded
    min_length: int = 0                 # no end before a text has this many tokens, the decoder's start included
    no_repeat_ngram: int | None = None  # no sequence of this many tokens may occur twice in a text
    forced_first: int | None = None     # the id that must follow the decoder's start token
    forced_last: int | None = None      # the id that must come last if a text is as long as allowed

    def validate(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a finite number, 0 (greedy) or above")
        for name, least in (("top_k", 1), ("no_repeat_ngram", 1), ("n_vocab", 1), ("seed", 0), ("min_length", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**63:
                raise UserError(f"{name}={value} must be at least {least}; leave it out for no such rule")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}={value} is a probability: choose it from 0 to 1")

    def chooser(self, device, eos_id):
        """A function (logits (B, V), texts so far, whether it is the last step) -> ids (B,), with its own generator."""
        self.validate()
        generator = torch.Generator(device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)

        def choose(logits, texts, is_last):
            logits = logits[:, : self.n_vocab].to(torch.promote_types(logits.dtype, torch.float32))
            if self.min_length or self.no_repeat_ngram or self.forced_first is not None or self.forced_last is not None:
                logits = self.rule(logits.clone(), texts, is_last, eos_id)
            if not logits.amax(-1).isfinite().all():
                raise NonFiniteError("no token can be chosen from these logits: the weights are damaged, their dtype "
                                     "overflows, or the rules forbid every token")
            return logits.argmax(-1) if self.temperature == 0 else self.draw(logits, generator)

        return choose

    def rule(self, logits, texts, is_last, eos_id):
        """Put what the rules forbid at minus infinity, in logits (B, V). texts: B lists of ids."""
        for row, text in zip(logits, texts):
            if n := self.no_repeat_ngram:
                newest = text[len(text) + 1 - n :]  # n - 1 ids: whatever followed them before is forbidden now
                for i in range(len(text) + 1 - n):
                    if text[i : i + n - 1] == newest:
                        row[text[i + n - 1]] = -torch.inf
            if len(text) < self.min_length and eos_id is not None:
                row[eos_id] = -torch.inf
            for now, forced in ((len(text) == 1, self.forced_first), (is_last, self.forced_last)):
                if now and forced is not None:
                    row[:] = -torch.inf
                    row[forced] = 0.0
        return logits

    def draw(self, logits, generator):
        """Sample ids (B,) from logits (B, V) after the filters."""
        most = logits.amax(-1, keepdim=True)  # relative to it nothing overflows, however small the temperature
        probs = ((logits - most) / max(self.temperature, 1e-30)).softmax(-1)
        probs, ids = probs.topk(min(self.top_k or probs.size(-1), probs.size(-1)))  # the most likely first
        probs = probs / probs.sum(-1, keepdim=True)
        if self.top_p is not None:
            keep = probs.cumsum(-1) - probs < self.top_p  # what is more likely has not reached p yet
            keep[:, 0] = True
            probs = probs * keep
        if self.min_p is not None:
            probs = probs * (probs >= self.min_p * probs[:, :1])
        return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]
