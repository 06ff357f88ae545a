"""From samples to ragged batches: rows, the order they come in, and padding.

    samples = read_samples("train.jsonl")
    dataset = VideoDataset(samples, tokenizer, FeatureSource(store), num_tokens=lambda frames: 50)
    sampler = LengthGroupedBatchSampler(dataset.lengths, batch_size=32, seed=0)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=partial(collate, pad_id=0))

Text, images, videos and several of them share one batch. With `share_prefix`, all conversations
about one visual share one row: its tokens are computed once, each conversation sees them and
itself only (`segment_ids`), and its positions go on where the shared part ends.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dataset.conversation import IGNORED, ConversationError, Encoded, encode, truncate
from dataset.samples import Sample, Samples, resolve_under
from dataset.video import read_frames

# ------------------------------------------------------------------------------------- sources


class VisualSource(Protocol):
    kind: str  # the name under which the model takes them: visual_features or pixel_values

    def load(self, relative: str) -> torch.Tensor: ...


@dataclass
class FeatureSource:
    """Features that extract_features.py wrote: (F, P, D) a visual."""

    store: object  # a FeatureStore
    kind = "visual_features"

    def load(self, relative: str) -> torch.Tensor:
        return self.store.read(relative)


@dataclass
class VideoSource:
    """Videos and images decoded on the fly: (F, 3, S, S) a visual."""

    root: str
    transform: Callable[[np.ndarray], torch.Tensor]
    num_frames: int = 8
    sampling: str = "uniform"
    fps: float | None = None
    backend: str = "pyav"
    kind = "pixel_values"

    def load(self, relative: str) -> torch.Tensor:
        path = resolve_under(self.root, relative)
        clip = read_frames(path, self.num_frames, self.sampling, self.fps, self.backend)
        return self.transform(clip.frames)


# ---------------------------------------------------------------------------------------- rows


@dataclass(slots=True)
class Row:
    """One row of a batch, not padded yet; without ids when its samples were bad."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    visual_mask: list[bool] = field(default_factory=list)
    segment_ids: list[int] = field(default_factory=list)  # 0 shared, 1… the conversations
    position_ids: list[int] = field(default_factory=list)
    sample_ids: list[str] = field(default_factory=list)
    visuals: list[torch.Tensor] = field(default_factory=list)
    kind: str = ""
    bad: list[dict] = field(default_factory=list)


class VideoDataset(Dataset):
    """Rows of one conversation, or of all conversations about the same visuals.

    num_tokens: placeholder tokens of a visual with that many frames.
    lengths: each row's estimated tokens, for the sampler.

    Row r holds the samples `order[starts[r]:ends[r]]`. Arrays, since lists of lists would take
    gigabytes for millions of samples, and workers would copy them bit by bit.

    Raises ValueError, with file and line, for a sample without an answer to learn from.
    """

    def __init__(
        self,
        samples: Samples,
        tokenizer,
        source: VisualSource | None,
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
        if source is None and visuals.any():
            first = samples[int((visuals > 0).argmax())]
            raise ValueError(f"{first.where}: names {first.visuals}, but no source is given")
        groups = samples.column("group") if share_prefix else np.zeros_like(visuals)
        self.order, self.starts, self.ends, self.lengths = plan_rows(
            samples.column("tokens"), visuals * num_tokens(1), groups, max_length
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
                visual = self.source.load(relative)
            except (ValueError, OSError) as error:
                return [Row(bad=[_bad(sample, relative, error) for sample in samples])]
            visuals.append(visual.flip(0) if first.reverse else visual)

        visual_lengths = [self.num_tokens(len(visual)) for visual in visuals]
        encoded, names, bad = [], [], []
        for sample in samples:
            try:
                conversation = encode(self.tokenizer, sample.messages, visual_lengths)
                encoded.append(_without_tail(truncate(conversation, self.max_length)))
                names.append(sample.id)
            except ConversationError as error:
                bad.append(_bad(sample, None, error))
        rows = _share_prefix(encoded, names, self.max_length)
        for packed in rows:
            packed.visuals, packed.kind = visuals, self.source.kind if visuals else ""
        return [*rows, Row(bad=bad)] if bad else rows


def plan_rows(
    tokens: np.ndarray, visual_tokens: np.ndarray, groups: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which samples share a row: those of a group, in their order, up to `max_length` tokens.

    tokens, visual_tokens, groups: one of each a sample; group 0 is no group.
    Returns `order`, `starts`, `ends` (row r holds the samples `order[starts[r]:ends[r]]`) and each
    row's tokens. Rows come in the order of their first samples.
    """
    order = np.argsort(groups, kind="stable").astype(np.int32)
    sorted_groups = groups[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (sorted_groups[1:] != sorted_groups[:-1]) | (sorted_groups[1:] == 0)
    open_starts = np.flatnonzero(is_first)  # where a row starts that isn't planned yet
    group_ends = np.append(open_starts[1:], len(order))
    text = np.concatenate([[0], np.cumsum(tokens[order])])  # tokens before each place of `order`
    starts, ends = [], []
    while len(open_starts):  # one row of each group at a time
        capacity = max_length - visual_tokens[order[open_starts]]
        fitting = np.searchsorted(text, text[open_starts] + capacity, side="right") - 1
        row_ends = np.clip(fitting, open_starts + 1, group_ends)
        starts.append(open_starts)
        ends.append(row_ends)
        is_left = row_ends < group_ends
        open_starts, group_ends = row_ends[is_left], group_ends[is_left]
    starts, ends = np.concatenate(starts), np.concatenate(ends)
    rows = np.argsort(order[starts])
    starts, ends = starts[rows].astype(np.int32), ends[rows].astype(np.int32)
    lengths = visual_tokens[order[starts]] + (text[ends] - text[starts]).astype(np.int32)
    return order, starts, ends, lengths


def _bad(sample: Sample, visual: str | None, error: Exception) -> dict:
    reason = str(error) or type(error).__name__
    record = {"id": sample.id, "path": visual, "file": sample.path, "line": sample.line}
    return record | {"reason": reason}


def _without_tail(encoded: Encoded) -> Encoded:
    """Drop what follows the last supervised token: nothing is learned from it."""
    end = len(encoded.labels)
    while encoded.labels[end - 1] == IGNORED:
        end -= 1
    return Encoded(encoded.input_ids[:end], encoded.labels[:end], encoded.visual_mask[:end])


def _share_prefix(encoded: list[Encoded], names: list[str], max_length: int) -> list[Row]:
    """Pack conversations that begin alike into rows of at most `max_length` tokens."""
    if not encoded:
        return []
    # The token that predicts an answer's first one must belong to its own conversation.
    shortest = min(next(i for i, x in enumerate(e.labels) if x != IGNORED) for e in encoded) - 1
    prefix = len(os.path.commonprefix([e.input_ids[:shortest] for e in encoded]))
    assert len(encoded) == 1 or not any(any(e.visual_mask[prefix:]) for e in encoded), (
        f"{names} share a row, but not all of their visuals"
    )
    rows: list[Row] = []
    for one, name in zip(encoded, names, strict=True):
        length = len(one.input_ids)
        row = rows[-1] if rows else None
        if row is None or len(row.input_ids) + length - prefix > max_length:
            # Alone in its row until another joins: the whole of it is segment 0, plain causal.
            rows.append(Row(one.input_ids, one.labels, one.visual_mask))
            rows[-1].segment_ids = [0] * length
            rows[-1].position_ids = list(range(length))
            rows[-1].sample_ids = [name]
            continue
        if len(row.sample_ids) == 1:
            row.segment_ids[prefix:] = [1] * (len(row.input_ids) - prefix)
        row.sample_ids.append(name)
        row.input_ids += one.input_ids[prefix:]
        row.labels += one.labels[prefix:]
        row.visual_mask += one.visual_mask[prefix:]
        row.segment_ids += [len(row.sample_ids)] * (length - prefix)
        row.position_ids += range(prefix, length)
    return rows


# ------------------------------------------------------------------------------------- batches


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
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} and rank {rank} of {world_size} don't work")
        if shuffle and len(lengths) < world_size:
            raise ValueError(
                f"{len(lengths)} rows are too few for {world_size} processes: each needs one. Add "
                "samples (of other videos, where those of one share a row) or start fewer processes"
            )
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size, self.tokens_per_batch = rank, world_size, tokens_per_batch
        self.epoch = self.skipped = 0
        self.planned = world_size

    def plan_for(self, processes: int) -> int:
        """Give the batches of that many processes, on however many there are now.

        Returns how many of this rank's batches make one of the plan: what two processes were to
        take at once, one process takes in two.
        """
        self.planned = processes
        return -(-processes // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.skipped = epoch, 0

    def skip(self, num_batches: int) -> None:
        """Leave out this rank's first batches of the next pass, once."""
        self.skipped = num_batches

    def __len__(self) -> int:
        return self._steps() * self.plan_for(self.planned)

    def _steps(self) -> int:
        """Batches of all ranks together, in an epoch."""
        # Where rows don't go up evenly, a batch holds one more rather than a rank having none.
        if self.tokens_per_batch:
            total, most = int(self.lengths.sum()), self.planned * int(self.lengths.max())
            wanted = -(-total // (self.tokens_per_batch * self.planned))
            return max(1, min(wanted, total // most))
        wanted = -(-len(self.lengths) // (self.batch_size * self.planned))
        return max(1, min(wanted, len(self.lengths) // self.planned))

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
        rows = -(-len(order) // count) if self.tokens_per_batch else self.batch_size * self.planned
        window = min(rows * 32, -(-len(order) // 4))
        for number, first in enumerate(range(0, len(order), window)):
            part = order[first : first + window]
            part[:] = part[np.argsort(self.lengths[part])][:: (-1) ** number]
        return order, self._cut(order, count), rng.permutation(count)

    def _cut(self, order: np.ndarray, count: int) -> np.ndarray:
        """Bounds of near-equal parts, by rows or by tokens: no last batch of a few rows."""
        if not self.tokens_per_batch:
            size, larger = divmod(len(order), count)
            return np.arange(count + 1) * size + np.minimum(np.arange(count + 1), larger)
        tokens = np.cumsum(self.lengths[order])
        shares = tokens[-1] * np.arange(1, count) / count
        return np.concatenate([[0], np.searchsorted(tokens, shares, side="right"), [len(order)]])


def collate(rows: list[list[Row]], pad_id: int) -> dict:
    """Pad rows to the longest of them and join their visuals, in order of the placeholders.

    Returns `inputs` (what the model's forward takes; empty when every row was bad), `sample_ids`,
    `supervised_tokens`, `real_tokens`, `padded_tokens`, and `bad`: the samples left out, and why.
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
    batch["inputs"] = inputs
    batch["supervised_tokens"] = int((inputs["labels"] != IGNORED).sum())
    batch["real_tokens"], batch["padded_tokens"] = int(lengths.sum()), real.numel()
    return batch
