"""How well a training uses its machine: what it multiplies beside the best that a product reaches, and its memory."""

import torch

from cost import count
from plumbing import ranks
from plumbing.data import IGNORE
from plumbing.machine import most_memory
from plumbing.utils import DTYPES
from roofline import matmul_peak


def flops_per_token(model, batch):
    """
    FLOPs of training for each label of a micro-batch that counts: those of a forward pass, counted, and twice as many
    for the gradients by inputs and by weights. Its rows are of one width and so cost the same: the first one will do.
    """
    inputs, labels = batch
    with count(model) as cost, torch.no_grad():
        model(*(x[:1].to(model.wte.weight.device) for x in inputs))
    return 3 * len(labels) * (cost.flops("GEMM") + cost.flops("BGEMM")) / (labels != IGNORE).sum().item()


def meter(model, batch, config):
    """
    A function: tokens per second of all ranks -> what a line of log.jsonl says beside it. mfu: model FLOPs utilisation
    (Chowdhery et al. 2022, appendix B), of what all ranks' devices reach; memory: the most bytes until then, of rank 0.
    """
    flops, peak = flops_per_token(model, batch), matmul_peak(DTYPES[config.dtype], torch.device(config.device))
    if config.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(config.device)  # that of the products just measured
    return lambda speed: {"mfu": flops * speed / (peak * ranks.world()), "memory": most_memory(config.device)}
