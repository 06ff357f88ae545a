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
    """Buffers (B, H, T, E) that a step writes at `column_1` (1,), a number on the device."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]], column_1: Tensor):
        super().__init__(layers, length=layers[0][0].shape[2] - 1)  # the last step that may come
        self.column_1 = column_1

    def extend(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, H, 1, E) and returns all columns: the caller's mask hides those to come."""
        for buffer, new in zip(self.layers[layer_idx], (keys, values), strict=True):
            buffer.index_copy_(2, self.column_1, new)
        return self.layers[layer_idx]


class StaticStep:
    """One token of each row: `step.cache` is what the rows have read, `step(tokens_B1)` reads on.

    On CUDA a graph, elsewhere the same operators one by one. Fewer rows than it was made for may be
    in it. Raises RuntimeError where CUDA can't capture it.
    """

    def __init__(self, model: nn.Module, like: KVCache, rows: int, capacity: int):
        """like: a cache of the same model, for types and shapes."""
        self.model, self.rows, self.capacity, self.cache = model, rows, capacity, None
        device = like.layers[0][0].device
        with torch.inference_mode():
            self.tokens_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.padding_B1 = torch.zeros_like(self.tokens_B1)
            self.is_real_BT = torch.ones(rows, capacity, dtype=torch.bool, device=device)
            self.columns_T = torch.arange(capacity, device=device)
            self.column_1 = torch.zeros_like(self.columns_T[:1])
            # Zeros: a column that is masked still counts, times zero, and NaN would spread.
            layers = [
                tuple(part.new_zeros(rows, part.shape[1], capacity, part.shape[3]) for part in pair)
                for pair in like.layers
            ]
            self.buffers = StaticCache(layers, self.column_1)
            self._run = self._captured() if device.type == "cuda" else self._forward

    def load(self, cache: KVCache, mask: Tensor | None) -> KVCache:
        """Takes what up to B rows have read, and their mask as in `DecodingBatch`. Returns
        `step.cache`, which looks at the buffers."""
        rows, length = len(cache.layers[0][0]), len(cache)
        with torch.inference_mode():
            for buffers, parts in zip(self.buffers.layers, cache.layers, strict=True):
                for buffer, part in zip(buffers, parts, strict=True):
                    buffer.zero_()[:rows, :, :length] = part[:, :, :length]
            self.is_real_BT.fill_(True)
            if mask is not None:
                self.is_real_BT[:rows, :length] = mask[:, :length]
            torch.sum(~self.is_real_BT, -1, keepdim=True, out=self.padding_B1)
            self.column_1.fill_(length)
            views = [(keys[:rows], values[:rows]) for keys, values in self.buffers.layers]
        self.cache = KVCache(views, length)
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
