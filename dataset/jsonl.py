"""Lines of a jsonl, and an index of them that is made once and mapped into memory after that.

    for line, text, offset in read_lines("train.jsonl"):
        ...
    columns, sha256 = load_index("train.jsonl", fields, describe)

The index lies beside the data as `train.jsonl.index` (safetensors), or in ~/.cache/cinego where
that folder can't be written. It is made again when the data's size or time of change differ.
"""

import hashlib
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from files import whole_file
from lock import hold_lock

KEPT_FROM = 8 << 20  # bytes; a smaller file is indexed in a second and leaves nothing behind
MAX_REPORTED = 10  # bad lines in one message
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # also within the file: it may have been joined of several
CONVERT = "convert it to jsonl: python -m scripts.convert.to_jsonl --data_path {path}"
NOT_JSONL = {  # how a file begins that is no jsonl → what to do about it
    b"[": f"a JSON array; {CONVERT} --output {{output}}",
    b"PAR1": f"a parquet; {CONVERT} --images_path dataset/videos --output {{output}}",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run `git lfs pull`",
}


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes, int]]:
    """(line as an editor counts, its text, its first byte) of each line that isn't blank.

    ValueError, with what to do about it, for a file that can't be read or is no jsonl.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
            for start, what in NOT_JSONL.items():
                if head.startswith(start):
                    name, suffix = os.path.splitext(path)
                    output = f"{name}_lines.jsonl" if suffix == ".jsonl" else f"{name}.jsonl"
                    names = {"path": shlex.quote(str(path)), "output": shlex.quote(output)}
                    raise ValueError(f"{path}: this is {what.format(**names)}")
            file.seek(0)
            offset = 0
            for line, text in enumerate(file, 1):
                if record := clean_line(text):
                    yield line, record, offset
                offset += len(text)
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); fix the path") from error


def clean_line(text: bytes) -> bytes:
    """The text without what surrounds the record."""
    return text.strip().removeprefix(BYTE_ORDER_MARK).strip()


def parse_json(text: bytes) -> object:
    """The JSON in a line; ValueError says what is wrong with it."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error}); write one object a line") from None


def load_index(
    path: str, fields: np.dtype, describe: Callable[[bytes, int], tuple], version: str
) -> tuple[dict[str, np.ndarray], str]:
    """What `describe` says of each line, as one array a field, and the file's SHA-256.

    fields: `offset`, `line` and those that `describe(text, line)` returns, which raises ValueError
    for a bad line. version: of both; an index of another version is made again. One process of
    a machine makes an index, the others wait for it. Raises ValueError with all bad lines, up to
    MAX_REPORTED, and as `read_lines` does.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror}); fix the path") from error
    identity = {"version": version, "size": str(stat.st_size), "mtime_ns": str(stat.st_mtime_ns)}
    if stat.st_size < KEPT_FROM:
        return _make_index(path, fields, describe)
    places = _places(path)
    if found := _find_index(places, identity):
        return found
    # Not beside the data: network disks may know no locks.
    lock = Path(tempfile.gettempdir(), f"cinego-{os.getuid()}-{_short_hash(path)}.lock")
    release = hold_lock(lock, "indexing", wait=True)
    try:
        if found := _find_index(places, identity):  # another process has made it meanwhile
            return found
        columns, sha256 = _make_index(path, fields, describe)
        if os.stat(path).st_mtime_ns != stat.st_mtime_ns:
            raise ValueError(f"{path}: changes while it is read; start again when it's complete")
        _save_index(places, columns, identity | {"sha256": sha256})
        return _find_index(places, identity) or (columns, sha256)
    finally:
        release()


def _make_index(path: str, fields: np.dtype, describe: Callable) -> tuple[dict, str]:
    lines = np.fromiter(_describe_lines(path, describe), fields)
    if not len(lines):
        raise ValueError(f"{path}: holds no sample; write one JSON object a line")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: np.ascontiguousarray(lines[name]) for name in fields.names}, sha256


def _describe_lines(path: str, describe: Callable) -> Iterator[tuple]:
    bad, size = [], os.path.getsize(path)
    bar = tqdm(total=size, unit="B", unit_scale=True, disable=size < KEPT_FROM, mininterval=1)
    bar.set_description(f"index of {Path(path).name}")
    with bar:
        for line, text, offset in read_lines(path):
            try:
                yield offset, line, *describe(text, line)
            except ValueError as error:
                bad.append(f"{path}:{line}: {error}")
                if len(bad) == MAX_REPORTED:
                    break
            if line % 4096 == 0:
                bar.update(offset - bar.n)
    if bad:
        raise ValueError("\n".join(bad))


def _save_index(places: list[Path], columns: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Into the first of `places` that can be written; where none can, memory has to do."""
    for place in places:
        with suppress(OSError, SafetensorError):
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(place) as file:
                save_file(columns, file.name, about)
            return


def _places(path: str) -> list[Path]:
    beside = Path(f"{os.path.realpath(path)}.index")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [beside, Path(cache, "cinego", f"{_short_hash(path)}.index")]


def _short_hash(path: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def _find_index(places: list[Path], identity: dict) -> tuple[dict[str, np.ndarray], str] | None:
    for place in places:
        try:
            with safe_open(place, "pt") as file:  # torch's tensors are mapped, numpy's are copied
                made = file.metadata() or {}
                if identity.items() <= made.items():
                    columns = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
                    return columns, made["sha256"]
        except (OSError, SafetensorError):
            continue
    return None
