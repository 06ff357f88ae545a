"""From samples to ragged batches: rows of conversations with their visuals, and padding.

    samples = read_samples("train.jsonl")
    dataset = VideoDataset(samples, tokenizer, FeatureStore(folder), num_tokens=lambda frames: 50)
    sampler = LengthGroupedBatchSampler(dataset.lengths, batch_size=32, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=partial(collate, pad_id=0))

Text, images, videos and several of them share one batch. With `share_prefix`, all conversations
about one visual share one row (dataset/packing.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset, get_worker_info

from dataset.conversation import IGNORED, ConversationError, encode, truncate
from dataset.feature_store import FeatureStore
from dataset.packing import Row, pack_batch, pack_row, plan_rows
from dataset.samples import Sample, Samples, resolve_under
from dataset.video import read_frames

# ------------------------------------------------------------------------------------- sources


@dataclass
class VideoSource:
    """In place of a FeatureStore, videos and images decoded on the fly: (F, S, S, 3) uint8 each.
    The tower normalises them where it runs: floats would be four times the bytes on their way."""

    root: str
    resize_frames: Callable[[np.ndarray], np.ndarray]
    num_frames: int = 8
    sampling: str = "uniform"
    fps: float | None = None
    backend: str = "pyav"
    kind = "pixel_values"

    def read(self, relative: str) -> torch.Tensor:
        path = resolve_under(self.root, relative)
        clip = read_frames(path, self.num_frames, self.sampling, self.fps, self.backend)
        return torch.from_numpy(np.ascontiguousarray(self.resize_frames(clip.frames)))


# ---------------------------------------------------------------------------------------- rows


class VideoDataset(Dataset):
    """Rows of one conversation, or of all conversations about the same visuals.

    num_tokens: placeholder tokens of a visual with that many frames.
    lengths: each row's estimated tokens, for the sampler.

    Row r holds the samples `order[starts[r]:ends[r]]`. Arrays, since lists of lists would take
    gigabytes for millions of samples, and workers would copy them bit by bit.

    Raises ValueError, with file and line, for a sample without an answer to learn from, or about a
    part of its video only: features are of whole videos.
    """

    def __init__(
        self,
        samples: Samples,
        tokenizer,
        source: FeatureStore | VideoSource,
        num_tokens: Callable[[int], int],
        max_length: int = 1024,
        share_prefix: bool = False,
    ):
        self.samples, self.tokenizer, self.source = samples, tokenizer, source
        self.num_tokens, self.max_length = num_tokens, max_length
        answered, visuals = samples.column("answered"), samples.column("visuals")
        if not answered.all():
            where = samples[int(answered.argmin())].where
            raise ValueError(f"{where}: the last turn must be an answer to learn from")
        if (bounded := samples.column("bounded")).any():
            raise ValueError(
                f"{samples[int(bounded.argmax())].where}: 'start' and 'end' are for eval.py's "
                "questions, training sees whole videos: cut the part out "
                "(ffmpeg -ss START -to END -i VIDEO CLIP), or delete both keys"
            )
        groups = samples.column("group") if share_prefix else np.zeros_like(visuals)
        visual_tokens = visuals.astype(np.int32) * num_tokens(1)
        self.order, self.starts, self.ends, self.lengths = plan_rows(
            samples.column("tokens"), visual_tokens, groups, max_length
        )

    def __len__(self) -> int:
        return len(self.starts)

    def samples_of(self, row: int) -> np.ndarray:
        """Numbers of the samples in a row."""
        return self.order[self.starts[row] : self.ends[row]]

    def __getitem__(self, row: int) -> list[Row]:
        """Usually one Row; more where the estimate was too low and the group has to be split."""
        samples = [self.samples[number] for number in self.samples_of(row)]
        visuals, first = [], samples[0]
        assert all((s.visuals, s.reverse) == (first.visuals, first.reverse) for s in samples), (
            f"{[sample.where for sample in samples]} share a row, but not their visuals"
        )
        for relative in first.visuals:
            try:
                visual = self.source.read(relative)
            except (ValueError, OSError) as error:
                return [Row(bad=[_bad(sample, relative, error) for sample in samples])]
            visuals.append(visual.flip(0) if first.reverse else visual)

        visual_lengths = [self.num_tokens(len(visual)) for visual in visuals]
        encoded, names, bad = [], [], []
        for sample in samples:
            try:
                conversation = encode(self.tokenizer, sample.messages, visual_lengths)
                encoded.append(truncate(conversation, self.max_length))
                names.append(sample.id)
            except ConversationError as error:
                bad.append(_bad(sample, None, error))
        rows = pack_row(encoded, names, self.max_length)
        for packed in rows:
            packed.visuals, packed.kind = visuals, self.source.kind if visuals else ""
        return [*rows, Row(bad=bad)] if bad else rows


def _bad(sample: Sample, visual: str | None, error: Exception) -> dict:
    reason = str(error) or type(error).__name__
    record = {"id": sample.id, "path": visual, "file": sample.path, "line": sample.line}
    return record | {"reason": reason}


# ------------------------------------------------------------------------------------- batches


def collate(rows: list[list[Row]], pad_id: int) -> dict:
    """Pad rows to the longest of them and join their visuals, in order of the placeholders.

    Returns `inputs` (what the model's forward takes, a PackedBatch as `packed` among it; empty when
    every row was bad), `sample_ids`, `supervised_tokens`, `real_tokens`, `padded_tokens`, and
    `bad`: the samples left out, and why.
    """
    flat = list(chain.from_iterable(rows))
    bad = [record for row in flat for record in row.bad]
    flat = [row for row in flat if row.input_ids]
    batch = {"inputs": {}, "sample_ids": list(chain.from_iterable(r.sample_ids for r in flat))}
    batch |= {"supervised_tokens": 0, "real_tokens": 0, "padded_tokens": 0, "bad": bad}
    if not flat:
        return batch

    lengths = torch.tensor([len(row.input_ids) for row in flat])
    real = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, L)

    def pad(name: str, value: int | bool) -> torch.Tensor:
        values = chain.from_iterable(getattr(row, name) for row in flat)
        # Nine times as fast as torch.tensor(list).
        values = torch.from_numpy(np.fromiter(values, bool if value is False else np.int64))
        return torch.full(real.shape, value, dtype=values.dtype).masked_scatter_(real, values)

    inputs = {"input_ids": pad("input_ids", pad_id), "labels": pad("labels", IGNORED)}
    inputs["visual_mask"] = pad("visual_mask", False)
    if any(len(row.sample_ids) > 1 for row in flat):
        inputs |= {"segment_ids": pad("segment_ids", -1), "position_ids": pad("position_ids", 0)}
    visuals = [visual for row in flat for visual in row.visuals]
    if visuals:
        kind = next(row.kind for row in flat if row.visuals)
        inputs[kind] = torch.cat(visuals)
        inputs["frames_per_visual"] = [len(visual) for visual in visuals]
    inputs["packed"] = pack_batch(flat)
    if get_worker_info():
        # A full /dev/shm has to fail here, where the training process hears of it: the thread that
        # would move the tensors there later prints the error only, and training waits for ever.
        tree_map_only(torch.Tensor, torch.Tensor.share_memory_, inputs)
    batch["inputs"] = inputs
    batch["supervised_tokens"] = len(inputs["packed"].targets_N)
    batch["real_tokens"], batch["padded_tokens"] = int(lengths.sum()), real.numel()
    return batch
