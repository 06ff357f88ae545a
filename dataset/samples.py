"""jsonl → samples; each line is checked once, and parsed when its sample is asked for.

    samples = read_samples("train.jsonl")
    samples[3].where, samples[3].files("dataset/videos"), samples[3].messages

So millions of samples take hardly any memory: training plans its order from the columns of an
index (dataset/jsonl.py). Whatever is wrong with a line is a ValueError with file, line and fix.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from dataset.conversation import mark_visuals, normalise_messages
from dataset.jsonl import clean_line, load_index, parse_json
from dataset.packing import estimate_tokens, prefix_group

COLUMNS = np.dtype(
    [
        ("offset", np.int64),  # of the line's first byte
        ("line", np.int32),  # its number, from 1
        ("tokens", np.int32),  # of its text, estimated: nothing is tokenised up front
        ("visuals", np.int16),  # how many
        ("group", np.int64),  # samples of one group can share a row; 0: stands alone
        ("answered", np.bool_),  # the last turn is the assistant's
        ("bounded", np.bool_),  # about a part of its video
    ]
)
VERSION = "3"  # of COLUMNS and what is computed for them: an index of another is made again


@dataclass(slots=True)
class Sample:
    id: str
    visuals: list[str]  # relative paths, in order of the tags
    messages: list[dict]  # role and content, tags as written
    reverse: bool  # frames are played last to first
    scoring: list[dict] | None  # one entry an assistant turn; read by eval.py
    language: str | None
    line: int
    path: str  # of the jsonl
    bounds: tuple[float, float] | None = None  # seconds that eval.py takes frames from

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def files(self, root) -> list[Path]:
        """Its visuals under `root`; ValueError, with the line, if one leaves it."""
        try:
            return [resolve_under(root, visual) for visual in self.visuals]
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


class Samples(Sequence):
    """The samples of one or more jsonl files, one file after the other."""

    def __init__(self, paths: Sequence[str]):
        self.paths = [os.fspath(path) for path in paths]
        self._files = []  # (path, an open file, its columns)
        digests = b""
        for path in self.paths:
            columns, sha256 = load_index(path, COLUMNS, partial(_describe, path=path), VERSION)
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (used for life)
            self._files.append((path, file, columns))
            digests += bytes.fromhex(sha256)
        self._ends = np.cumsum([len(columns["line"]) for *_, columns in self._files])
        # 16 hex digits of the contents: a moved file is the same, a changed one another.
        self.fingerprint = hashlib.sha256(digests).hexdigest()[:16]

    def __reduce__(self):
        return Samples, (self.paths,)  # a spawned worker maps the index itself

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        """ValueError where the line isn't what was indexed any more."""
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        number = range(len(self))[number]
        which = int(np.searchsorted(self._ends, number, side="right"))
        path, file, columns = self._files[which]
        number -= int(self._ends[which]) - len(columns["line"])
        start, line = int(columns["offset"][number]), int(columns["line"][number])
        is_last = number + 1 == len(columns["offset"])
        end = os.fstat(file.fileno()).st_size if is_last else int(columns["offset"][number + 1])
        text = os.pread(file.fileno(), end - start, start)  # no place in the file is shared
        try:
            return parse_sample(clean_line(text.partition(b"\n")[0]), line, path)
        except ValueError as error:
            raise ValueError(f"{path}:{line}: changed since the start: {error}") from error

    def column(self, name: str) -> np.ndarray:
        """One of COLUMNS for all samples."""
        parts = [columns[name] for *_, columns in self._files]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_samples(*paths) -> Samples:
    """The samples of one or more jsonl files; ValueError names files, lines and fixes.

    Fields: `conversations`; `video` or `image` (a path, a list, or paths separated by commas;
    none is text only); optional `id`, `reverse`, `scoring`, `language`,
    `start` and `end` (seconds that a question of a test set is about). Others are left alone.
    """
    return Samples(paths)


def parse_sample(record: object, line: int, path: str) -> Sample:
    """A line's text, or the object in it, as a sample; ValueError says what is wrong with it."""
    if isinstance(record, bytes):
        record = parse_json(record)
    if not isinstance(record, dict):
        raise ValueError(f"a sample must be a JSON object, not {type(record).__name__}")
    if "conversations" not in record:
        raise ValueError("the key 'conversations' is missing")
    for plural in ("videos", "images"):  # others' name: its visuals would be dropped silently
        if record.get(plural):
            raise ValueError(f"the key is {plural[:-1]!r}, not {plural!r}, for a list of paths too")
    if record.get("video") and record.get("image"):
        raise ValueError("both 'video' and 'image'; put all paths into one, in order of the tags")
    visuals = split_paths(record.get("video") or record.get("image") or [])
    for visual in visuals:
        check_relative(visual)
    messages = normalise_messages(record["conversations"])
    mark_visuals(messages, len(visuals))
    reverse, scoring = record.get("reverse", False), record.get("scoring")
    language, sample_id = record.get("language"), record.get("id")
    if not isinstance(reverse, bool):
        raise ValueError(f"'reverse' must be true or false, not {reverse!r}")
    if scoring is not None:
        if not isinstance(scoring, list) or not all(isinstance(entry, dict) for entry in scoring):
            raise ValueError("'scoring' must be a list of objects")
        answers = sum(message["role"] == "assistant" for message in messages)
        if len(scoring) != answers:
            raise ValueError(
                f"'scoring' has {len(scoring)} entries for {answers} answers; one for each"
            )
    if language is not None and not isinstance(language, str):
        raise ValueError(f"'language' must be a string, not {language!r}")
    if sample_id is None:
        sample_id = f"{Path(path).stem}-{line}"
    elif isinstance(sample_id, bool) or not isinstance(sample_id, str | int):  # a NaN, say
        raise ValueError(f"'id' must be a string or a whole number, not {sample_id!r}")
    texts = [message["content"] for message in messages] + visuals + [str(sample_id)]
    "".join(texts).encode()  # ValueError for half of a surrogate pair
    bounds = None
    if record.get("start") is not None or record.get("end") is not None:
        bounds = (record.get("start"), record.get("end"))
        if not all(isinstance(x, int | float) for x in bounds) or not 0 <= bounds[0] < bounds[1]:
            raise ValueError(f"'start' and 'end' must be seconds, one before the other: {bounds}")
    return Sample(str(sample_id), visuals, messages, reverse, scoring, language, line, path, bounds)


def split_paths(visuals: object) -> list[str]:
    """The value of `video` or `image` as a list of paths; ValueError if it is none."""
    if isinstance(visuals, str):
        visuals = [part.strip() for part in visuals.split(",")]
    if not isinstance(visuals, list) or not all(isinstance(visual, str) for visual in visuals):
        raise ValueError("'video' or 'image' must be a path or a list of paths")
    return visuals


def _describe(text: bytes, line: int, path: str) -> tuple[int, int, int, bool, bool]:
    """What COLUMNS keep of a line: tokens, visuals, group, answered, bounded."""
    sample = parse_sample(text, line, path)
    group = prefix_group(sample.messages, sample.visuals, sample.reverse)
    answered = sample.messages[-1]["role"] == "assistant"
    tokens, is_bounded = estimate_tokens(sample.messages), sample.bounds is not None
    return tokens, len(sample.visuals), group, answered, is_bounded


@lru_cache(maxsize=4096)
def check_relative(relative: str) -> None:
    """ValueError for a path that could leave the folder it is relative to, on any system."""
    parts = relative.replace("\\", "/").split("/")
    if not relative or "\0" in relative or parts[0] == "" or ".." in parts:
        raise ValueError(f"path {relative!r} must be relative and without '..'")
    if re.match("[A-Za-z]:", relative):
        raise ValueError(f"path {relative!r} names a drive; make it relative")


def resolve_under(root, relative: str) -> Path:
    """The file `relative` under `root`; ValueError if it leaves the root, by a link too."""
    check_relative(relative)
    root = os.path.realpath(root)
    path = os.path.realpath(os.path.join(root, relative))
    if os.path.commonpath([root, path]) != root:
        raise ValueError(f"path {relative!r} is a link out of {root}; copy the file into it")
    return Path(path)
