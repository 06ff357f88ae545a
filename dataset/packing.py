"""Which samples share a row, that row, and the rows of a batch without their padding.

Conversations about the same visual share a row: their common start, the visual's tokens in it, is
computed once. Each sees that start and itself only (`segment_ids`), and its positions continue
where the start ends: so each gets the logits that it would get alone.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import NamedTuple

import numpy as np
import torch

from dataset.conversation import IGNORED, VISUAL_MARK, Encoded, mark_visuals


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
    kind: str = ""  # under which the model takes them: visual_features or pixel_values
    bad: list[dict] = field(default_factory=list)  # the samples left out, and why


def estimate_tokens(messages: list[dict]) -> int:
    """About 4 ASCII letters a token and 1.5 Chinese characters, and what the template adds."""
    text = "".join(message["content"] for message in messages)
    wide = (len(text.encode()) - len(text)) // 2
    return (len(text) - wide) // 4 + wide * 2 // 3 + 6 * len(messages)


def prefix_group(messages: list[dict], visuals: list[str], reverse: bool) -> int:
    """A hash of what samples must have in common to share a row: the visuals, and all text up to
    the last of them. 0 where a visual is missing before the first answer: that row stands alone.
    """
    before = takewhile(lambda message: message["role"] != "assistant", messages)
    texts = [message["content"] for message in mark_visuals(messages, len(visuals))]
    text = json.dumps(texts[: len(list(before))], ensure_ascii=False)  # keeps the texts apart
    if not visuals or text.count(VISUAL_MARK) != len(visuals):
        return 0
    key = repr((visuals, reverse, text[: text.rindex(VISUAL_MARK)])).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True) or 1


def plan_rows(
    tokens: np.ndarray, visual_tokens: np.ndarray, groups: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which samples share a row: those of a group, in their order, up to `max_length` tokens.

    tokens, visual_tokens, groups: one of each a sample; group 0 is no group.
    Returns `order`, `starts`, `ends` (row r holds the samples `order[starts[r]:ends[r]]`) and each
    row's tokens. Rows come in the order of their first samples.
    """
    order = np.argsort(groups, kind="stable").astype(np.int32)  # 32 bits: there may be millions
    groups = groups[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (groups[1:] != groups[:-1]) | (groups[1:] == 0)
    del groups
    text = np.zeros(len(order) + 1, np.int64)  # tokens before each place of `order`
    np.cumsum(tokens[order], out=text[1:])
    open_starts = np.flatnonzero(is_first).astype(np.int32)  # of rows that aren't planned yet
    group_ends = np.append(open_starts[1:], np.int32(len(order)))
    starts, ends = [], []
    while len(open_starts):  # one row of each group at a time
        capacity = max_length - visual_tokens[order[open_starts]]
        fitting = np.searchsorted(text, text[open_starts] + capacity, side="right") - 1
        row_ends = np.clip(fitting, open_starts + 1, group_ends).astype(np.int32)
        starts.append(open_starts)
        ends.append(row_ends)
        is_left = row_ends < group_ends
        open_starts, group_ends = row_ends[is_left], group_ends[is_left]
    starts, ends = np.concatenate(starts), np.concatenate(ends)
    rows = np.argsort(order[starts])
    starts, ends = starts[rows], ends[rows]
    lengths = visual_tokens[order[starts]] + (text[ends] - text[starts]).astype(np.int32)
    return order, starts, ends, lengths


def pack_row(encoded: list[Encoded], names: list[str], max_length: int) -> list[Row]:
    """Conversations that start alike as one row, or more where it would exceed `max_length`.

    names: their samples' ids. Each row has at least one conversation; it holds no visuals yet.
    """
    if not encoded:
        return []
    encoded = [_without_tail(conversation) for conversation in encoded]
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


def _without_tail(encoded: Encoded) -> Encoded:
    """Drop what follows the last supervised token: nothing is learned from it."""
    end = len(encoded.labels)
    while encoded.labels[end - 1] == IGNORED:
        end -= 1
    return Encoded(encoded.input_ids[:end], encoded.labels[:end], encoded.visual_mask[:end])


class PackedBatch(NamedTuple):
    """A batch of B rows, padded to L, without its padding, and all that a forward pass would
    otherwise have to ask the device: made from lists on the CPU, while the device computes.

    The T real tokens, row after row, form S sequences: a whole row, or, where conversations share a
    row, their prefix and then each conversation's own tokens. A sequence attends causally to its
    keys: the prefix of its row, if that isn't itself, and then its own tokens. A named tuple, since
    torch's loader and trees know how to pin and move what is in one.
    """

    tokens_T: torch.Tensor  # places of the real tokens in the flattened (B·L) rows
    placeholders_R: torch.Tensor  # places of the visuals' tokens in the flattened (B·L) rows
    frames_V: torch.Tensor  # frames of each visual
    supervised_N: torch.Tensor  # which of the T tokens predict a supervised one
    targets_N: torch.Tensor  # the ids that they are to predict
    keys_K: torch.Tensor | None  # which of the T tokens are keys, sequence after sequence; None:
    # all of them, as no prefix is shared
    query_starts: torch.Tensor  # (S + 1) int32: where each sequence starts among the T tokens, and
    key_starts: torch.Tensor  # among the K keys; last, where all end
    query_lengths: list[int]  # S, the same as lengths
    key_lengths: list[int]
    max_length: int  # of a sequence's keys; rounded up, since compiled code sees it as a constant


def pack_batch(rows: list[Row]) -> PackedBatch:
    """The rows of a batch, in their order."""
    lengths = np.array([len(row.input_ids) for row in rows])
    starts = np.concatenate([[0], lengths.cumsum()])  # of the rows among the T tokens
    tokens = np.arange(starts[-1]) + np.repeat(
        np.arange(len(rows)) * lengths.max() - starts[:-1], lengths
    )
    labels = np.concatenate([row.labels for row in rows])
    labels[starts[:-1]] = IGNORED  # nothing stands before a row's first token
    (targets,) = np.nonzero(labels != IGNORED)
    (placeholders,) = np.nonzero(np.concatenate([row.visual_mask for row in rows]))

    queries, keys = [], []  # of each sequence: its first token and the one after its last
    for row, (start, end) in zip(rows, pairwise(starts.tolist()), strict=True):
        own = start + 1 + np.flatnonzero(np.diff(row.segment_ids))  # where conversations start
        bounds = [start, *own.tolist(), end]
        # Without a prefix (all segments above 0), each conversation sees itself alone.
        has_prefix = row.segment_ids[0] == 0
        for number, span in enumerate(pairwise(bounds)):
            queries.append(span)
            keys.append([(bounds[0], bounds[1]), span] if has_prefix and number else [span])
    query_lengths = [end - start for start, end in queries]
    key_lengths = [sum(end - start for start, end in spans) for spans in keys]
    gather = None
    if key_lengths != query_lengths:
        gather = np.concatenate([np.arange(*span) for spans in keys for span in spans])
        gather = torch.from_numpy(gather)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens),
        placeholders_R=torch.from_numpy(tokens[placeholders]),
        frames_V=torch.tensor([len(visual) for row in rows for visual in row.visuals]).long(),
        supervised_N=torch.from_numpy(targets - 1),
        targets_N=torch.from_numpy(labels[targets]),
        keys_K=gather,
        query_starts=torch.tensor([0, *np.cumsum(query_lengths)], dtype=torch.int32),
        key_starts=torch.tensor([0, *np.cumsum(key_lengths)], dtype=torch.int32),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        max_length=-(-max(key_lengths) // 128) * 128,
    )
