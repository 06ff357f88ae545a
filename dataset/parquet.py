"""Conversations and their pictures in a parquet, as MiniMind-V packs them since December 2025.

Columns: `conversations` (a JSON string, or a list of turns) and `image_bytes` (one file's bytes,
or a list of them); others are kept. A picture is named `<file>@<fingerprint>/<row>.<number>`, as
if the parquet were a folder. It stays there until needed, and is then read with its row group.

A row has as many visuals as tags. So a row without a tag is text, as in MiniMind-V's own loader,
which fills such rows with an 8×8 black picture.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from dataset.conversation import VISUAL_TAG, name_and_text

MAGIC = b"PAR1"
IMAGES = "image_bytes"
MAX_GROUP_BYTES = 128 << 20  # pictures of one row group: what reading a single one of them takes
WRITTEN_GROUP_BYTES = 4 << 20  # a picture is read in about 2 ms then
HELD_BYTES = 64 << 20  # pictures that a process keeps of a file: the groups used last


class RowImage(str):
    """The name of a picture in a parquet; `file` is where that lies."""

    __slots__ = ("file",)

    def locate(self) -> Path:
        """What `read_image` takes: the parquet's own path, and the picture's place in it."""
        return Path(self.file, self.rpartition("/")[2])


def read_rows(
    path: str, with_bytes: bool = False, advance: Callable[[int], object] = lambda size: None
) -> Iterator[tuple[int, object]]:
    """(row, record) from row 0 on; a record that can't be parsed comes as its ValueError.

    with_bytes: `image_bytes` is a list of pictures; else `image` names them (RowImage), and only
    row groups are accepted that training can read a picture of.
    """
    file = _open(path)
    schema = file.schema_arrow
    if "conversations" not in schema.names:
        raise ValueError(f"{path}: no column 'conversations', only {schema.names}")
    is_list = _is_list(schema)
    if not with_bytes and (largest := _largest_group(file)) > MAX_GROUP_BYTES:
        raise ValueError(
            f"{path}: a row group holds {largest >> 20} MiB of pictures, to be read for each of "
            f"them; rewrite it once: python -m scripts.convert.chinese_llava --data_path {path} "
            f"--output {Path(path).stem}_small.parquet"
        )
    wanted = [name for name in schema.names if name != IMAGES or with_bytes or is_list]
    size, name = os.path.getsize(path), f"{Path(path).name}@{fingerprint(path)}"
    row = told = 0
    # Few rows at a time: a batch of pictures is held whole.
    for batch in file.iter_batches(64 if IMAGES in wanted else 4096, columns=wanted):
        for record in batch.to_pylist():
            images = _as_list(record.pop(IMAGES, None))
            try:
                if isinstance(record["conversations"], str):
                    record["conversations"] = json.loads(record["conversations"])
            except (ValueError, RecursionError) as error:
                yield row, ValueError(f"'conversations' isn't JSON ({error})")
            else:
                if with_bytes:
                    record[IMAGES] = images
                elif IMAGES in schema.names:
                    tags = count_tags(record["conversations"])
                    count = len(images) if is_list and tags else min(tags, 1)
                    record["image"] = [_name_image(path, name, row, k) for k in range(count)]
                yield row, record
            row += 1
        part = size * row // file.metadata.num_rows
        advance(part - told)
        told = part


def has_images(path: Path) -> bool:
    """Whether it is a parquet with a column of pictures."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return False
    return IMAGES in _open(str(path)).schema_arrow.names


class Writer:
    """Rows into a parquet whose row groups are small enough to read one picture at a time.

    like: the parquet whose type of `image_bytes` (bytes, or a list of them) is kept.
    """

    def __init__(self, file, like: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        kind = _open(str(like)).schema_arrow.field(IMAGES).type
        fields = {"id": pa.string(), "conversations": pa.string(), IMAGES: kind}
        self.schema = pa.schema(fields.items())
        self.is_list, self.rows, self.size = _is_list(self.schema), [], 0
        # Pictures are compressed already, and their least and greatest bytes tell nothing.
        self.writer = pq.ParquetWriter(
            *(file, self.schema),
            compression={"id": "zstd", "conversations": "zstd", IMAGES: "none"},
            use_dictionary=False,
            write_statistics=False,
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self._flush()
        self.writer.close()

    def write(self, sample: dict, images: list[bytes]) -> None:
        conversations = json.dumps(sample["conversations"], ensure_ascii=False)
        kept = images if self.is_list else images[0] if images else None
        self.rows.append({"id": sample["id"], "conversations": conversations, IMAGES: kept})
        self.size += sum(map(len, images)) + len(conversations)
        if self.size > WRITTEN_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows, self.size = [], 0


def count_tags(turns: object) -> int:
    """Tags of visuals in what the assistant is told."""
    if not isinstance(turns, list):
        return 0
    said = (name_and_text(turn) for turn in turns if isinstance(turn, dict))
    told = (text for name, text in said if name not in ("assistant", "gpt"))
    return sum(len(VISUAL_TAG.findall(text)) for text in told if isinstance(text, str))


def is_image(path: Path) -> bool:
    """Whether `path` names a picture in a parquet."""
    return path.parent.suffix == ".parquet" and path.parent.is_file()


def read_image(path: Path) -> bytes:
    """The bytes of a picture that RowImage.locate() names; ValueError where there is none."""
    row, _, number = path.name.partition(".")
    file = path.parent
    try:
        images = _column(str(file), file.stat().st_mtime_ns, os.getpid()).row(int(row))
        return images[int(number)]
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{file}: no picture {number} in row {row} ({error})") from error


@lru_cache(maxsize=64)
def fingerprint(path: str) -> str:
    """8 hex digits of the footer, which knows sizes and places of all columns: features that were
    made from one parquet are never taken for those of another of the same name."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        footer = 8 + int.from_bytes(file.read(4), "little")
        file.seek(-footer, os.SEEK_END)
        return hashlib.blake2b(file.read(), digest_size=4).hexdigest()


def _name_image(path: str, name: str, row: int, number: int) -> RowImage:
    image = RowImage(f"{name}/{row}.{number}")
    image.file = path
    return image


def _as_list(images) -> list[bytes]:
    if images is None:
        return []
    return images if isinstance(images, list) else [images]


def _open(path: str):
    import pyarrow as pa  # slow to import, and most data is jsonl
    import pyarrow.parquet as pq

    try:
        # Through a buffer: without one, the first batch would read its whole row group.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet that can be read ({error})") from error


def _is_list(schema) -> bool:
    return IMAGES in schema.names and "list" in str(schema.field(IMAGES).type)


def _largest_group(file) -> int:
    groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(group.num_columns))
    sizes = (c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == IMAGES)
    return max(sizes, default=0)


@lru_cache(maxsize=8)
def _column(path: str, mtime_ns: int, process: int) -> "_ImageColumn":
    # A file that changed is another one, and a file handle isn't shared across a fork.
    return _ImageColumn(path)


class _ImageColumn:
    """The pictures of one file; row groups are read when first needed, the last used are held."""

    def __init__(self, path: str):
        self.file = _open(path)
        metadata = self.file.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.ends = np.cumsum(rows)
        self.held: OrderedDict[int, object] = OrderedDict()

    def row(self, row: int) -> list[bytes]:
        group = int(np.searchsorted(self.ends, row, side="right"))
        if row < 0 or group == len(self.ends):
            raise IndexError(f"it has {self.ends[-1] if len(self.ends) else 0} rows")
        if group not in self.held:
            table = self.file.read_row_group(group, columns=[IMAGES], use_threads=False)
            self.held[group] = table.column(IMAGES)
            while len(self.held) > 1 and sum(c.nbytes for c in self.held.values()) > HELD_BYTES:
                self.held.popitem(last=False)
        self.held.move_to_end(group)
        column = self.held[group]
        return _as_list(column[row - int(self.ends[group]) + len(column)].as_py())
