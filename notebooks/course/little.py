"""Random models of the lessons: small, and with weights so large that whatever goes wrong shows in the text."""

import torch

from model import BART


def little_bart(seed=0, **sizes):
    """A BART that has learnt nothing, with one layer on each side, whose greedy text is not one token repeated."""
    config = BART.get_default_config()
    sizes = dict(n_encoder_layer=1, n_decoder_layer=1, n_head=2, n_embd=64, vocab_size=100) | sizes
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    bart = BART(config).eval()
    with torch.no_grad():
        for name, p in bart.named_parameters():
            p.normal_(mean=1.0 if "ln" in name and name.endswith("weight") else 0.0, std=0.3)
        bart.decoder_wpe.weight.normal_(std=2.0)  # else it finds one token, and goes on finding it
    return bart
