"""Which rows come together, and when: the order of an epoch, shared by all processes."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class LengthGroupedBatchSampler(Sampler[list[int]]):
    """Batches of rows of like length, in random order; every row once an epoch.

    All ranks get equally many batches, and at one step rows of like length. The order depends on
    seed and epoch alone, so that a resumed run skips exactly what it has seen. `len` counts the
    whole epoch, skipped batches too, and is that of every epoch.

    tokens_per_batch: a batch holds about so many tokens a rank, many short rows or few long ones,
    in place of `batch_size` rows: memory and time of a step then hardly depend on the lengths.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        tokens_per_batch: int = 0,
    ):
        if shuffle and len(lengths) < world_size:
            raise ValueError(
                f"{len(lengths)} rows are too few for {world_size} processes: each needs one. Add "
                "samples (of other videos, where those of one share a row) or start fewer processes"
            )
        self.lengths = np.asarray(lengths)
        # What a batch holds so much of: rows, each of which weighs 1, or tokens.
        self.budget, self.weights = batch_size, np.broadcast_to(1, self.lengths.shape)
        if tokens_per_batch:
            self.budget, self.weights = tokens_per_batch, self.lengths
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self.epoch = self.skipped = 0
        self.planned = world_size

    def plan_for(self, processes: int) -> int:
        """Give the batches of that many processes, on however many there are now.

        Returns how many of this rank's batches make one of the plan: what two processes were to
        take at once, one process takes in two.
        """
        self.planned = processes
        return -(-processes // self.world_size)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The epoch of the next passes; the first leaves out `skip` of this rank's batches."""
        self.epoch, self.skipped = epoch, skip

    def __len__(self) -> int:
        return self._steps() * self.plan_for(self.planned)

    def _steps(self) -> int:
        """Batches of all ranks together, in an epoch."""
        # Where rows don't go up evenly, a batch holds one more rather than a rank having none.
        total, most = int(self.weights.sum()), int(self.weights.max())
        wanted = -(-total // (self.budget * self.planned))
        return max(1, min(wanted, total // (self.planned * most)))

    def __iter__(self) -> Iterator[list[int]]:
        start, self.skipped = self.skipped, 0
        parts = self.plan_for(self.planned)
        order, bounds, steps = self._plan_epoch()
        for step in steps[start // parts :]:
            # More processes than rows: some may have no row, which is a batch of none.
            batch = order[bounds[step] : bounds[step + 1]][self.rank :: self.world_size]
            for part in np.array_split(batch, parts):
                yield part.tolist()

    def _plan_epoch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All ranks' rows: their order, where each step's begin and end in it, and the steps'."""
        count = self._steps()
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")[::-1]  # out of memory shows at once
            return order, self._cut(order, count), np.arange(count)
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        # Sorted within windows only: the same rows must not meet in a batch every epoch. Every
        # other window falls, so that a batch across two of them has like lengths as well.
        rows = self.budget * self.planned
        if self.weights is self.lengths:
            rows = -(-len(order) // count)
        window = min(rows * 32, -(-len(order) // 4))
        for number, first in enumerate(range(0, len(order), window)):
            part = order[first : first + window]
            part[:] = part[np.argsort(self.lengths[part])][:: (-1) ** number]
        return order, self._cut(order, count), rng.permutation(count)

    def _cut(self, order: np.ndarray, count: int) -> np.ndarray:
        """Bounds of near-equal parts, by rows or by tokens: no last batch of a few rows."""
        if self.weights is not self.lengths:
            size, larger = divmod(len(order), count)
            return np.arange(count + 1) * size + np.minimum(np.arange(count + 1), larger)
        tokens = np.cumsum(self.lengths[order])
        shares = tokens[-1] * np.arange(1, count) / count
        return np.concatenate([[0], np.searchsorted(tokens, shares, side="right"), [len(order)]])
