"""One line of a jsonl or a parquet as a `Sample`: what it shows, what is said, and where it stands.

    for sample in read_samples("train.jsonl"):
        print(sample.where, sample.files("dataset/videos"), sample.messages)

Whatever is wrong with a line is a ValueError with file, line and mend. Paths stay under their root.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dataset.conversation import mark_visuals, normalise_messages
from dataset.parquet import RowImage
from dataset.records import read_records


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

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def files(self, root) -> list[Path]:
        """Its visuals under `root`; ValueError, with the line, if one leaves it."""
        try:
            return [resolve_under(root, visual) for visual in self.visuals]
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None


def read_samples(path) -> list[Sample]:
    """Read a jsonl, a JSON array or a parquet of conversations; ValueError names file, line, mend.

    Fields: `conversations`; `video` or `image` (a path, a list, or paths separated by commas;
    none is text only); optional `id`, `reverse`, `scoring`, `language`. Others are left alone. The
    pictures in a parquet (dataset/parquet.py) stay there until they are needed.
    """
    path = os.fspath(path)
    samples = []
    for line, record in read_records(path):
        try:
            samples.append(parse_sample(record, line, path))
        except ValueError as error:
            raise ValueError(f"{path}:{line}: {error}") from error
    if not samples:
        raise ValueError(f"{path}: holds no sample; write one JSON object a line")
    return samples


def parse_sample(record: object, line: int, path: str) -> Sample:
    """One record as a sample; ValueError says what is wrong with it."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a sample must be a JSON object, not {type(record).__name__}")
    if "conversations" not in record:
        raise ValueError("the key 'conversations' is missing")
    for plural in ("videos", "images"):  # others' name: its visuals would be dropped silently
        if record.get(plural):
            raise ValueError(f"the key is {plural[:-1]!r}, not {plural!r}, for a list of paths too")
    if record.get("video") and record.get("image"):
        raise ValueError("both 'video' and 'image'; put all paths into one, in order of the tags")
    visuals = record.get("video") or record.get("image") or []
    if isinstance(visuals, str):
        visuals = [part.strip() for part in visuals.split(",")]
    if not isinstance(visuals, list) or not all(isinstance(v, str) for v in visuals):
        raise ValueError("'video' or 'image' must be a path or a list of paths")
    for visual in visuals:
        check_relative(visual)

    messages = normalise_messages(record["conversations"])
    mark_visuals(messages, len(visuals))
    answers = sum(message["role"] == "assistant" for message in messages)
    reverse, scoring = record.get("reverse", False), record.get("scoring")
    language, sample_id = record.get("language"), record.get("id")
    if not isinstance(reverse, bool):
        raise ValueError(f"'reverse' must be true or false, not {reverse!r}")
    if scoring is not None and not (
        isinstance(scoring, list) and all(isinstance(entry, dict) for entry in scoring)
    ):
        raise ValueError("'scoring' must be a list of objects")
    if scoring is not None and len(scoring) != answers:
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
    return Sample(str(sample_id), visuals, messages, reverse, scoring, language, line, path)


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
    if isinstance(relative, RowImage):  # it lies in the data file that the user named
        return relative.locate()
    check_relative(relative)
    root = os.path.realpath(root)
    path = os.path.realpath(os.path.join(root, relative))
    if os.path.commonpath([root, path]) != root:
        raise ValueError(f"path {relative!r} is a link out of {root}; copy the file into it")
    return Path(path)
