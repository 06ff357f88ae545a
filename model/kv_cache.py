"""Keys and values of what was read, so that a step of generation computes a new token only.

Shapes: B batch, L tokens of this call, T tokens in all, H heads of keys and values, E channels a
head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of the tokens read so far: a pair of (B, H, capacity, E) for each layer.

    A new token is written into its place, and nothing is copied until the capacity is used up.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None, length: int = 0):
        self.layers, self.length = layers or [], length

    def __len__(self) -> int:
        return self.length

    def extend(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, L, E) of one layer, whose layers come in order; returns all T of it."""
        if layer_idx == 0:
            self.length += keys.shape[2]
        end = self.length
        start = end - keys.shape[2]
        if layer_idx == len(self.layers):
            self.layers.append((keys[:, :, :0], values[:, :, :0]))
        old_keys, old_values = self.layers[layer_idx]
        if old_keys.shape[2] < end:
            old_keys, old_values = _grow(old_keys, start, end), _grow(old_values, start, end)
            self.layers[layer_idx] = old_keys, old_values
        old_keys.narrow(2, start, end - start).copy_(keys)
        old_values.narrow(2, start, end - start).copy_(values)
        return old_keys.narrow(2, 0, end), old_values.narrow(2, 0, end)

    def crop(self, length: int) -> None:
        """Forgets all tokens after the first `length`."""
        self.length = min(self.length, length)

    def keep_rows(self, rows: Tensor) -> "KVCache":
        """A copy with these rows of the batch only (ids, which may repeat)."""
        return KVCache([(keys[rows], values[rows]) for keys, values in self.layers], self.length)

    def select(self, columns_T: Tensor) -> "KVCache":
        """Only the tokens where `columns_T` is True."""
        ids = columns_T.nonzero()[:, 0]
        return KVCache([(k[:, :, ids], v[:, :, ids]) for k, v in self.layers], len(ids))

    def join(self, below: "KVCache") -> "KVCache":
        """Both batches as one; the shorter gets zeros on its left, which attention must not see."""
        length = max(self.length, below.length)

        def stack(*parts: tuple[Tensor, int]) -> Tensor:
            spare = _capacity(length) - length
            return torch.cat(
                [F.pad(part[:, :, :n], (0, 0, length - n, spare)) for part, n in parts]
            )

        layers = [
            tuple(stack((a, self.length), (b, below.length)) for a, b in zip(*pair, strict=True))
            for pair in zip(self.layers, below.layers, strict=True)
        ]
        return KVCache(layers, length)


def _capacity(length: int) -> int:
    return length + max(length // 2, 64)


def _grow(old: Tensor, used: int, length: int) -> Tensor:
    """The first `used` tokens of (B, H, …, E) in memory for `length` tokens and more to come."""
    new = old.new_empty(*old.shape[:2], _capacity(length), old.shape[3])
    new[:, :, :used] = old[:, :, :used]
    return new
