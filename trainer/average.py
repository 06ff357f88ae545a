"""A running mean of the weights (EMA), which is validated and saved in their place.

Late in training the weights wander about a minimum that their mean is nearer to. `in_place` shows
the mean to whoever looks at the model, and puts the weights back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Average:
    """Of `parameters`, with `decay` an update; with a decay of 0 there is none, and no cost."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.means = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after update `step` (from 0)."""
        if self.means:
            # At first a short memory, or the random start would stay in the mean for long.
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.means, self.parameters, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean's values inside of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, parameter in zip(self.means, self.parameters if self.means else (), strict=True):
            weight = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(weight)

    def state_dict(self) -> list[torch.Tensor]:
        return self.means

    def load_state_dict(self, means: list[torch.Tensor]) -> None:
        own = zip(means, self.means, strict=True)
        self.means = [mean.to(current.device) for mean, current in own]
