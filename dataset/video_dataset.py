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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from dataset.conversation import (
    CONTENT_MARK,
    IGNORED,
    VISUAL_MARK,
    ConversationError,
    Encoded,
    encode,
    mark_visuals,
    truncate,
)
from dataset.samples import Sample, resolve_under
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
    lengths: each row's estimated tokens, for the sampler: nothing is tokenised up front.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer,
        source: VisualSource | None,
        num_tokens: Callable[[int], int],
        max_length: int = 1024,
        share_prefix: bool = False,
    ):
        self.samples, self.tokenizer, self.source = samples, tokenizer, source
        self.num_tokens, self.max_length = num_tokens, max_length
        for sample in samples:
            if sample.messages[-1]["role"] != "assistant":
                raise ValueError(f"{sample.where}: the last turn must be an answer to learn from")
            if sample.visuals and source is None:
                raise ValueError(f"{sample.where}: names {sample.visuals}, but no source is given")
        self.rows, self.lengths = self._plan(share_prefix)

    def _plan(self, share_prefix: bool) -> tuple[list[list[int]], list[int]]:
        rows, lengths, open_rows = [], [], {}
        for index, sample in enumerate(self.samples):
            tokens = _estimated_tokens(sample.messages)
            visual_tokens = len(sample.visuals) * self.num_tokens(1)
            key = _prefix_key(sample) if share_prefix else None
            row = open_rows.get(key) if key is not None else None
            if row is None or lengths[row] + tokens > self.max_length:
                row = len(rows)
                rows.append([])
                lengths.append(visual_tokens)
                open_rows[key] = row
            rows[row].append(index)
            lengths[row] += tokens
        return rows, lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Row]:
        """Usually one Row; more where the estimate was too low and the group has to be split."""
        samples = [self.samples[index] for index in self.rows[row]]
        visuals, first = [], samples[0]
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


def _bad(sample: Sample, visual: str | None, error: Exception) -> dict:
    reason = str(error) or type(error).__name__
    record = {"id": sample.id, "path": visual, "file": sample.path, "line": sample.line}
    return record | {"reason": reason}


def _estimated_tokens(messages: list[dict]) -> int:
    """About 4 ASCII letters a token and 1.5 Chinese characters, and what the template adds."""
    text = "".join(message["content"] for message in messages)
    wide = (len(text.encode("utf-8", "replace")) - len(text)) // 2
    return (len(text) - wide) // 4 + wide * 2 // 3 + 6 * len(messages)


def _prefix_key(sample: Sample) -> tuple | None:
    """What samples must have in common to share a row: the visuals and all text before their end.

    None where the visuals don't come before the first answer: that row stands alone.
    """
    if not sample.visuals:
        return None
    before = []
    for message in mark_visuals(sample.messages, len(sample.visuals)):
        if message["role"] == "assistant":
            break
        before.append(message["content"])
    text = CONTENT_MARK.join(before)  # which no text holds
    if text.count(VISUAL_MARK) != len(sample.visuals):
        return None
    return (*sample.visuals, sample.reverse, text[: text.rindex(VISUAL_MARK)])


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
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        tokens_per_batch: int = 0,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} and rank {rank} of {world_size} don't work")
        if len(lengths) < world_size:
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
        return min(wanted, len(self.lengths) // self.planned)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.skipped = self.skipped, 0
        parts = self.plan_for(self.planned)
        for batch in self._global_batches()[start // parts :]:
            # More processes than planned: some may have no row, which is a batch of none.
            for part in np.array_split(batch[self.rank :: self.world_size], parts):
                yield part.tolist()

    def _global_batches(self) -> list[np.ndarray]:
        """All ranks' rows, step by step, in near-equal parts: no last batch of a few rows."""
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")[::-1]  # out of memory shows at once
            return self._cut(order)
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        # Sorted within windows only: the same rows must not meet in a batch every epoch. Every
        # other window falls, so that a batch across two of them has like lengths as well.
        rows = self.batch_size * self.planned
        if self.tokens_per_batch:
            rows = -(-len(order) // self._steps())
        window = min(rows * 32, -(-len(order) // 4))
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        parts = [part[np.argsort(self.lengths[part])] for part in parts]
        order = np.concatenate([part[:: (-1) ** i] for i, part in enumerate(parts)])
        batches = self._cut(order)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        """Parts of about as many rows, or of about as many tokens."""
        steps = self._steps()
        if not self.tokens_per_batch:
            return np.array_split(order, steps)
        ends = self.lengths[order].cumsum()
        shares = ends[-1] * np.arange(1, steps) / steps
        return np.split(order, np.searchsorted(ends, shares, side="right"))


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
