"""Muon, as torch.optim.Muon computes it, fast on a CPU too.

torch's own takes every matrix alone, and always in bfloat16, which a CPU without such instructions
emulates: its share of an update of the quickstart was 80 % there. Here matrices of one shape go
through the iteration together, in a type that the device has.

Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from device import choose_dtype

# Of the quintic a x + b x³ + c x⁵, which drives all singular values to about 1 in five rounds.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
MOMENTUM = 0.95


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, R, C) → the same shape: each matrix with all its singular values near 1 (0.7 to 1.2).

    Newton-Schulz iteration on the wide form, in the arithmetic that the device is fastest in:
    the result needs no more than bfloat16's three digits.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x.to(getattr(torch, choose_dtype("auto", matrices.device)))
    if x.dtype == torch.float16:  # squares of squares leave its range
        x = x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For the matrices between hidden states: momentum (Nesterov's), made orthogonal.

    A step moves a matrix of R rows and C columns by `lr · √max(1, R/C)` times a nearly orthogonal
    matrix, and shrinks it by `lr · weight_decay`.
    """

    def __init__(self, params: Iterable, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon is for matrices; one parameter has shape {p.shape}")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.device].append(p)
            for (shape, _), members in alike.items():
                updates = []
                for p in members:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - MOMENTUM)
                    updates.append(p.grad.lerp(momentum, MOMENTUM))
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(members, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-rate)
