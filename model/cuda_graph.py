"""Decoding on CUDA: a step over buffers of fixed shape and address, replayed as one graph.

A step of a small model is some 200 kernels of microseconds each: starting them one by one takes far
longer than running them. A CUDA graph starts all at once, if nothing but the buffers' contents
differs from step to step. After vLLM's and gpt-fast's decoding.

Shapes: B rows of the buffers, T their columns, the capacity; V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.kv_cache import KVCache


class StaticCache(KVCache):
    """Buffers (2, B, H, T, E) that a step writes at `column_1` (1,), a number on the device."""

    def __init__(self, layers: list[Tensor], column_1: Tensor):
        super().__init__(layers, length=layers[0].shape[3] - 1)  # before the last possible step
        self.column_1 = column_1

    def extend(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, H, 1, E) and returns all columns: the caller's mask hides those to come."""
        layer = self.layers[layer_idx]
        all_keys, all_values = layer[0], layer[1]
        all_keys.index_copy_(2, self.column_1, keys)
        all_values.index_copy_(2, self.column_1, values)
        return all_keys, all_values


class StaticStep:
    """One token of each row: `step.cache` is what the rows have read, `step(tokens_B1)` reads on.

    On CUDA a graph, elsewhere the same operators one by one. Fewer rows than it was made for may be
    in it. Raises RuntimeError where CUDA can't capture it.
    """

    def __init__(self, model: nn.Module, like: KVCache, rows: int, capacity: int):
        """like: a cache of the same model, for types and shapes."""
        self.model, self.rows, self.capacity, self.cache = model, rows, capacity, None
        device = like.layers[0].device
        with torch.inference_mode():
            self.tokens_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.padding_B1 = torch.zeros_like(self.tokens_B1)
            self.is_real_BT = torch.ones(rows, capacity, dtype=torch.bool, device=device)
            self.columns_T = torch.arange(capacity, device=device)
            self.column_1 = torch.zeros_like(self.columns_T[:1])
            # Zeros: a column that is masked still counts, times zero, and NaN would spread.
            _, _, heads, _, head_dim = like.layers[0].shape
            shape = (2, rows, heads, capacity, head_dim)
            self.buffers = StaticCache([x.new_zeros(shape) for x in like.layers], self.column_1)
            self._run = self._captured() if device.type == "cuda" else self._forward

    def load(self, cache: KVCache, mask: Tensor | None) -> KVCache:
        """Takes what up to B rows have read, and their mask as in `DecodingBatch`. Returns
        `step.cache`, which looks at the buffers."""
        rows, length = cache.layers[0].shape[1], len(cache)
        with torch.inference_mode():
            for buffer, layer in zip(self.buffers.layers, cache.layers, strict=True):
                buffer.zero_()[:, :rows, :, :length] = layer[:, :, :, :length]
            self.is_real_BT.fill_(True)
            if mask is not None:
                self.is_real_BT[:rows, :length] = mask[:, :length]
            torch.sum(~self.is_real_BT, -1, keepdim=True, out=self.padding_B1)
            self.column_1.fill_(length)
            self.cache = KVCache([buffer[:, :rows] for buffer in self.buffers.layers], length)
        return self.cache

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        """(B, V), the next logits of as many rows as were loaded."""
        rows = len(tokens_B1)
        with torch.inference_mode():
            self.tokens_B1[:rows] = tokens_B1
            self.cache.length += 1
            return self._run()[:rows].clone()  # the next step writes where these lie

    def _forward(self) -> Tensor:
        logits_B1V = self.model(
            input_ids=self.tokens_B1,
            position_ids=self.column_1 - self.padding_B1,
            attention_mask=self.is_real_BT & (self.columns_T <= self.column_1),
            past_key_values=self.buffers,
        ).logits
        self.column_1.add_(1)
        return logits_B1V[:, 0].float()

    def _captured(self) -> Callable[[], Tensor]:
        """The forward as a graph. What its first runs write is overwritten by `load`."""
        with torch.cuda.device(self.column_1.device):
            stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(stream)
            with torch.cuda.stream(side):  # libraries allocate what they need when first called
                for _ in range(3):
                    self._forward()
            stream.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Other threads, which encode videos, may use the device meanwhile. Where this fails,
            # torch leaves the graph's stream current: the first context takes that back.
            capture = torch.cuda.graph(graph, capture_error_mode="thread_local")
            with torch.cuda.stream(stream), capture:
                logits_BV = self._forward()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay
