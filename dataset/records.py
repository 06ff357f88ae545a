"""One record at a time out of a jsonl, a JSON array of any size, or a parquet.

    for number, record in read_records("train.json"):
        ...

Nothing is read whole: a JSON array of gigabytes takes the memory of its largest item. What a
record means is said by `parse_sample` in dataset/video_dataset.py.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, TextIO

from dataset import parquet

CHUNK = 1 << 20
MAX_RECORD = 64 << 20  # bytes of a line, characters of an item: what is longer isn't one record
WHITE = " \t\n\r"  # JSON's
NOT_DATA = {  # what a file begins with that is no data yet → what to do about it
    b"PK\x03\x04": "a zip archive; unpack it and name the file inside",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run `git lfs pull`",
}

Advance = Callable[[int], object]  # is told how many bytes more were read


def read_records(path, advance: Advance = lambda size: None) -> Iterator[tuple[int, object]]:
    """(number, record): the line of a jsonl or the item of an array from 1, the row from 0.

    A record that can't be parsed comes as the ValueError that says why, so that a caller may go on
    with the next one; ValueError is raised where there is no going on, with the file's name.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64).removeprefix(b"\xef\xbb\xbf")
            for start, what in NOT_DATA.items():
                if head.startswith(start):
                    raise ValueError(f"{path}: this is {what}")
            if head.startswith(parquet.MAGIC):
                yield from parquet.read_rows(path, advance=advance)
                return
            file.seek(0)
            while head and not head.strip():
                head = file.read(CHUNK)
            file.seek(0)
            if not head.lstrip().startswith(b"["):
                yield from _lines(file, advance)
                return
        with open(path, encoding="utf-8-sig") as file:
            try:
                yield from enumerate(_Array(file, advance), 1)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: the JSON array is broken: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); mend the path") from error


def _lines(file: BinaryIO, advance: Advance) -> Iterator[tuple[int, object]]:
    line = 0
    while text := file.readline(MAX_RECORD + 1):
        line += 1
        advance(len(text))
        if len(text) > MAX_RECORD:
            while text and not text.endswith(b"\n"):
                text = file.readline(MAX_RECORD)
                advance(len(text))
            yield line, ValueError(f"longer than {MAX_RECORD >> 20} MiB; write one object a line")
            continue
        text = text.removeprefix(b"\xef\xbb\xbf")  # files may have been joined
        if text.strip():
            try:
                record = json.loads(text.decode())
            except (ValueError, RecursionError) as error:
                reason = f"not JSON in UTF-8 ({error}); write one object a line"
                record = ValueError(reason)
            yield line, record


class _Array:
    """Items of a JSON array, parsed one by one out of a window that moves over the file.

    The standard library's decoder does the parsing, so that an array is read just as a jsonl is.
    (ijson 3.6 was measured no faster, and it turns half of a surrogate pair into a "?" silently.)
    """

    def __init__(self, file: TextIO, advance: Advance):
        self.file, self.advance = file, advance
        self.text, self.at, self.ended = "", 0, False
        self.told = 0  # bytes that `advance` knows of

    def grow(self) -> None:
        """Drop what was parsed and double what wasn't: a long item costs linear time."""
        rest = self.text[self.at :]
        more = self.file.read(max(CHUNK, len(rest)))
        self.text, self.at, self.ended = rest + more, 0, not more
        told = self.file.buffer.tell()
        self.advance(told - self.told)
        self.told = told

    def peek(self) -> str:
        """The next character that isn't white, or "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in WHITE:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.grow()

    def __iter__(self) -> Iterator[object]:
        decode, number = json.JSONDecoder().raw_decode, 0
        assert self.peek() == "["
        self.at += 1
        if self.peek() != "]":
            while True:
                self.peek()
                number += 1
                while True:
                    try:
                        record, end = decode(self.text, self.at)
                        # Where the window ends, a number may go on.
                        if end < len(self.text) or self.ended:
                            break
                    except ValueError as error:
                        if self.ended or len(self.text) - self.at > MAX_RECORD:
                            near = self.text[max(self.at, error.pos - 20) : error.pos + 20]
                            reason = f"item {number}: {error.msg} near {near!r}"
                            raise ValueError(reason) from None
                    self.grow()
                self.at = end
                yield record
                mark = self.peek()
                if mark == "]":
                    break
                if mark != ",":
                    raise ValueError(f"item {number} must be followed by ',' or ']', not {mark!r}")
                self.at += 1
        self.at += 1
        if self.peek():
            raise ValueError(f"text follows its end: {self.text[self.at : self.at + 20]!r}")
