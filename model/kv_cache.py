"""Keys and values of what was read, so that a step of generation computes a new token only.

Shapes: B batch, L tokens of this call, T tokens in all, H heads of keys and values, E channels a
head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Keys and values of the tokens read so far: (2, B, H, capacity, E) for each layer.

    A new token is written into its place, and nothing is copied until the capacity is used up.
    """

    def __init__(self, layers: list[Tensor] | None = None, length: int = 0):
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
            self.layers.append(torch.stack([keys[:, :, :0], values[:, :, :0]]))
        if self.layers[layer_idx].shape[3] < end:
            self.layers[layer_idx] = self._pad(self.layers[layer_idx], start, 0, end)
        layer = self.layers[layer_idx].narrow(3, 0, end)
        all_keys, all_values = layer[0], layer[1]
        all_keys.narrow(2, start, end - start).copy_(keys)
        all_values.narrow(2, start, end - start).copy_(values)
        return all_keys, all_values

    def crop(self, length: int) -> None:
        """Forgets all tokens after the first `length`."""
        self.length = min(self.length, length)

    def keep_rows(self, rows: Tensor) -> "KVCache":
        """A copy with these rows of the batch only (ids, which may repeat)."""
        return KVCache([layer[:, rows] for layer in self.layers], self.length)

    def select(self, columns_T: Tensor) -> "KVCache":
        """A copy with only the tokens where `columns_T` is True."""
        ids = columns_T.nonzero()[:, 0]
        return KVCache([layer[:, :, :, ids] for layer in self.layers], len(ids))

    def join(self, below: "KVCache") -> "KVCache":
        """Both batches as one; the shorter gets zeros on its left, which attention must not see."""
        length = max(self.length, below.length)
        parts = [
            [self._pad(layer, len(cache), length - len(cache), length) for layer in cache.layers]
            for cache in (self, below)
        ]
        return KVCache([torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)], length)

    @staticmethod
    def _pad(layer: Tensor, used: int, left: int, length: int) -> Tensor:
        """The first `used` tokens after `left` zeros, with memory for `length` and more to come."""
        capacity = length + max(length // 2, 64)
        return F.pad(layer[:, :, :, :used], (0, 0, left, capacity - left - used))
