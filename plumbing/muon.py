"""
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) that is as quick on a CPU as on a GPU.

torch's own multiplies in bfloat16, which most processors emulate at a fiftieth of their speed in float32: on one with
AVX2 alone that was 0.98 s of a step's 1.37.
"""

import torch

from plumbing import ranks


class Muon(torch.optim.Muon):
    """torch's Muon, its settings and its state, that orthogonalises in bfloat16 on a GPU only and else in float32."""

    @torch.no_grad()
    def step(self, closure=None):  # which torch passes and nobody has
        for group in self.param_groups:
            alike = {}  # matrices of one shape, as layers have them: together they take as many calls as one
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            for shape, those in alike.items():
                x = torch.stack([self.ahead(p, group["momentum"]) for p in those])
                directions = orthogonal(x, group["ns_coefficients"], group["ns_steps"])
                rms = 0.2 * max(shape)**0.5  # makes the root mean square of an update 0.2, about that of AdamW's
                for p, direction in zip(those, directions):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(ranks.part(direction, p), alpha=-group["lr"] * rms)

    def ahead(self, p, rate):
        """The momentum as Nesterov has it, of the whole matrix: of a sharded one a rank has rows, as of its update."""
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momentum = self.state[p]["momentum_buffer"]
        momentum.lerp_(p.grad, 1 - rate)
        ahead = ranks.whole(p.grad.lerp(momentum, rate))
        return ahead.bfloat16() if p.is_cuda else ahead


def orthogonal(x, coefficients, steps):
    """
    Of matrices (n, N, M) those with the same singular vectors and singular values near one, most between 0.7 and 1.2.
    By Newton-Schulz iteration, products of matrices without a decomposition: a step maps every singular value s to
    as + bs^3 + cs^5, and five bring most of those in (0, 1] close to one.
    """
    a, b, c = coefficients
    wide = x.shape[1] <= x.shape[2]  # the smaller product x x^T
    x = (x if wide else x.mT) / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above one
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
