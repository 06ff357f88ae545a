"""Features of a frozen tower on disk: computed once, read in every epoch.

    0-of-1.features    the rows of all frames, one source after the other
    0-of-1.jsonl       its journal: a line a source says where its rows are, or why it has none
    index-….npy        the journals as an array in the order of the paths' hashes, to be mapped
    manifest.json      tower, frames, shapes; written last

Each shard of the work (here one, number 0) appends to two files of its own, a source's line after
its rows. So a run that was killed at any point resumes, any number of processes work at one store,
and no feature is moved when they are done. The store is complete while manifest and journals agree.

    store = FeatureStore(out)
    store.begin(settings)                     # refuses a folder made with other settings
    store.write("clips/a.mp4", features)      # (F, P, D)
    store.finish()
    store.read("clips/a.mp4")                 # (F, P, D) float16
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from files import whole_file
from lock import hold_lock

MANIFEST = "manifest.json"
FLOAT16, INT8 = "float16", "int8"
LINE = np.dtype(
    [
        ("path", "S32"),  # its hash
        ("time", np.int64),  # of two lines about one source, the later one counts
        ("journal", np.int32),  # its number, in the order of their names
        ("offset", np.int64),  # of the line in it
        ("shard", np.int32),  # whose features these are, numbered likewise
        ("row", np.int64),  # of the source's first frame in them
        ("frames", np.int32),  # 0: it has none
    ]
)
LOST = -1  # frames, where a power cut or a broken copy left the file shorter than its journal says


class FeatureStore:
    """Reads and writes one folder of features."""

    kind = "visual_features"  # under which the model takes what `read` gives

    def __init__(self, directory):
        self.directory = Path(directory)
        self._open_files = {}  # shard → its features, for reading
        self._release = self._journal = None  # of who writes

    def __reduce__(self):
        return FeatureStore, (self.directory,)  # a spawned worker maps the index itself

    # ------------------------------------------------------------------------------------ reading

    def read(self, rel_path: str) -> Tensor:
        """(F, P, D) float16 of a source. ValueError when its features are absent or damaged, with
        the reason and what to do about it."""
        return torch.from_numpy(as_half(self.rows(rel_path)))

    def rows(self, rel_path: str) -> np.ndarray:
        """As stored, a row a frame: (F, P, D) float16, or (F,) records of int8 and their scales.
        Raises as `read`."""
        if "sources" in self.manifest:
            return _old_rows(self.directory, rel_path, self.find(rel_path))
        line = self._find_line(rel_path)
        if line is None or line["frames"] <= 0:
            raise _absent(self.directory, rel_path, self.find(rel_path))
        shard, row_type = int(line["shard"]), _row_type(self.manifest)
        path = self._shard_file(shard, "features")
        if shard not in self._open_files:
            self._open_files[shard] = path.open("rb", buffering=0)
        file = self._open_files[shard].fileno()
        start, size = (int(line[name]) * row_type.itemsize for name in ("row", "frames"))
        if not 0 <= start <= os.fstat(file).st_size - size:
            raise ValueError(f"{path}: cut short before {rel_path}; run extract_features.py again")
        rows = np.empty(line["frames"], row_type)
        os.preadv(file, [rows.reshape(-1).view(np.uint8)], start)  # forks share no place in it
        return rows

    def find(self, rel_path: str) -> dict | None:
        """A source's record: with `frames`, or with the `reason` why it has none; or None."""
        if self._release is None and "sources" in self.manifest:
            return self.manifest["sources"].get(rel_path)
        line = self._find_line(rel_path)
        return None if line is None or line["frames"] == LOST else self._record(line)

    def paths(self) -> list[str]:
        """All sources that something became of."""
        if "sources" in self.manifest:
            return list(self.manifest["sources"])
        lines = np.sort(self._index, order=("journal", "offset"))
        return [self._record(line)["path"] for line in lines]

    def _find_line(self, rel_path: str) -> np.void | None:
        key, hashes = _hash(rel_path), self._index["path"]
        number = np.searchsorted(hashes, key)
        return self._index[number] if number < len(hashes) and hashes[number] == key else None

    def _record(self, line: np.void) -> dict:
        with self._shard_file(line["journal"], "jsonl").open("rb") as file:
            file.seek(line["offset"])
            return json.loads(file.readline())

    def _shard_file(self, shard: int, suffix: str) -> Path:
        if not 0 <= shard < len(self._journals):
            raise ValueError(f"{self.directory}: its index is damaged; delete index-*.npy")
        return self.directory / f"{self._journals[shard]}.{suffix}"

    @property
    def is_complete(self) -> bool:
        manifest = self._read_manifest()
        return "sources" in manifest or manifest.get("journals") == self._journal_sizes()

    @cached_property
    def manifest(self) -> dict:
        """What these features are; ValueError when the extraction didn't come to its end."""
        if self.is_complete:
            return self._read_manifest()
        index, headers, _ = self._read_journals()
        about = {"visuals": "?", "command": "python extract_features.py …"}
        about |= headers[-1] if headers else {}
        raise ValueError(
            f"{self.directory / MANIFEST}: missing or not up to date: the features are absent or "
            f"unfinished, {len(index)} of {about['visuals']} visuals are done. The others are made "
            f"by: {about['command']}"
        )

    def _read_manifest(self) -> dict:
        path = self.directory / MANIFEST
        try:
            manifest = dict(json.loads(path.read_text(encoding="utf-8")))
            if "sources" in manifest:  # of before December 2026
                manifest["sources"] |= manifest.pop("failures", {})
            return manifest
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error}); extract into a new folder") from error

    @cached_property
    def _index(self) -> np.ndarray:
        """LINE of each source's latest line, by its path's hash; all processes of a machine share
        the mapped file."""
        try:
            index = np.load(self._index_file(self.manifest["journals"]), "r", allow_pickle=False)
            if index.dtype == LINE and index.ndim == 1:
                return index
        except (OSError, ValueError, EOFError):
            pass
        return self._read_journals()[0]

    def _index_file(self, sizes: dict[str, int]) -> Path:
        """Of journals of these sizes: what is added to them gets another one."""
        return self.directory / f"index-{_hash(json.dumps(sizes))[:8].decode()}.npy"

    def check(self, expected: dict) -> None:
        """ValueError that names what in the manifest isn't as expected, e.g. {"num_frames": 8}, or
        how an unfinished store is finished."""
        if problems := _differences(self.manifest, expected):
            raise ValueError(
                f"{self.directory / MANIFEST}: the features don't fit: {'; '.join(problems)}. "
                "Extract them again, or change the flags"
            )

    # ----------------------------------------------------------------------------------- journals

    def _journal_sizes(self) -> dict[str, int]:
        journals = self.directory.glob("[0-9]*-of-[0-9]*.jsonl")
        return dict(sorted((path.stem, path.stat().st_size) for path in journals))

    @cached_property
    def _journals(self) -> list[str]:
        return list(self._journal_sizes())

    def _read_journals(self) -> tuple[np.ndarray, list[dict], dict[str, int]]:
        """What all processes recorded so far: (the index, the journals' headers, their sizes)."""
        headers, sizes = [], {}

        def parse() -> Iterator[tuple]:
            numbers = {stem: number for number, stem in enumerate(self._journals)}
            for stem, number in numbers.items():
                offset = 0
                with (self.directory / f"{stem}.jsonl").open("rb") as file:
                    for text in file:
                        start, offset = offset, offset + len(text)
                        with suppress(ValueError):  # of a line that a kill cut short
                            line = json.loads(text)
                            if "settings" in line:
                                headers.append(line)
                                continue
                            shard = numbers.get(line.get("shard"), number)
                            place = shard, line.get("row", 0), line.get("frames", 0)
                            yield _hash(line["path"]), line["time"], number, start, *place
                sizes[stem] = offset

        try:
            lines = np.fromiter(parse(), LINE)
        except (TypeError, LookupError, AttributeError, OverflowError) as error:
            raise ValueError(f"{self.directory}: its journals are damaged ({error!r})") from error
        for number, stem in enumerate(sizes if headers else ()):
            size = (self.directory / f"{stem}.features").stat().st_size
            ends = (lines["row"] + lines["frames"]) * _row_type(headers[0]["settings"]).itemsize
            is_lost = (lines["shard"] == number) & (lines["frames"] > 0) & (ends > size)
            lines["frames"][is_lost] = LOST
        lines = lines[np.lexsort((lines["time"], lines["path"]))]
        is_last = np.append(lines["path"][1:] != lines["path"][:-1], True)[: len(lines)]
        return lines[is_last], headers, sizes

    # ------------------------------------------------------------------------------------ writing

    def begin(self, settings: dict, shard: tuple[int, int] = (0, 1), **header) -> None:
        """Lock this shard (i, n); `find` then says what earlier runs did.

        From the first line until `finish` the store doesn't count as complete. `header`: `command`
        and `visuals`, for whoever finds it so. Raises ValueError when the folder holds features
        made with other settings, which would be mixed up, or when another process works at the
        same shard.
        """
        settings = json.loads(json.dumps(settings))  # a tuple is a list in JSON
        self._stem, self._row_type = "{}-of-{}".format(*shard), _row_type(settings)
        self._header = {"settings": settings, **header}
        self._forget()
        manifest = self._read_manifest()
        self._index, headers, _ = self._read_journals()
        known = [about for about in (manifest, *(h["settings"] for h in headers)) if about]
        problems = [problem for about in known for problem in _differences(about, settings)]
        if "sources" in manifest:
            problems = ["its format is only read; python -m scripts.pack_features converts it"]
        elif not known and any(path.suffix != ".lock" for path in self.directory.glob("*")):
            problems = ["no manifest says what these files are"]
        if problems:
            raise ValueError(
                f"{self.directory} holds features of another kind: "
                f"{'; '.join(dict.fromkeys(problems))}. Choose another --features_path, or delete "
                "the folder"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        purpose = f"extracting shard {shard[0]}/{shard[1]}"
        self._release = hold_lock(self.directory / f".{self._stem}.lock", purpose)

    def write(self, rel_path: str, features: Tensor | np.ndarray, **record) -> None:
        """Append (F, P, D), or rows of another store, as the settings' dtype; then the record.

        OSError, with the file, for a full disk: the store is as it was.
        """
        rows = features
        if isinstance(features, Tensor):
            rows = features.to(torch.float16).contiguous().cpu().numpy()
        if self._row_type.names and not rows.dtype.names:
            rows = quantize(rows)
        assert rows[0].nbytes == self._row_type.itemsize, f"{rows.dtype} {rows.shape}"
        self._open_journal()
        row, unwritten = self._num_rows, memoryview(rows.reshape(-1).view(np.uint8))
        try:
            while unwritten:
                unwritten = unwritten[self._features.write(unwritten) :]
        except OSError as error:
            self._features.truncate(row * self._row_type.itemsize)
            fix = f"can't be written ({error}); the same command resumes once it can"
            raise OSError(f"{self._features.name}: {fix}") from error
        self._num_rows += len(rows)
        place = {"shard": self._stem, "row": row, "frames": len(rows)}
        self.record(rel_path, {**record, **place})

    def record(self, rel_path: str, record: dict) -> None:
        """Say what became of a source: the `reason` why it has no features, or where they are."""
        self._open_journal()
        line = {**record, "path": rel_path, "time": time.time_ns()}
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()

    def _open_journal(self) -> None:
        if self._journal is not None:
            return
        self._features = (self.directory / f"{self._stem}.features").open("ab", buffering=0)
        # What a kill left of a row is filled up: no place is written twice.
        self._num_rows = -(-self._features.tell() // self._row_type.itemsize)
        self._features.truncate(self._num_rows * self._row_type.itemsize)
        self._journal = (self.directory / f"{self._stem}.jsonl").open("ab")
        # A kill may have left half a line.
        self._journal.write(b"\n" + json.dumps(self._header).encode() + b"\n")
        for line in self._index[self._index["frames"] == LOST]:  # before others take their places
            self.record(self._record(line)["path"], {"reason": "lost", "detail": "file cut short"})

    def finish(self, expected: Sequence[str] = ()) -> list[str]:
        """Write index and manifest, unless a source of `expected` has no record yet, by this
        process or another: returns those.

        ValueError where no source has features. Several processes may finish at once: the store is
        complete once the manifest of the last one is there.
        """
        self._forget()
        index, _, sizes = self._read_journals()
        hashes = np.array([*map(_hash, expected)], LINE["path"])
        done = np.isin(hashes, index["path"][index["frames"] != LOST])
        if not done.all():
            return [path for path, is_done in zip(expected, done, strict=True) if not is_done]
        if not (index["frames"] > 0).any():
            raise ValueError(f"{self.directory}: no source has features")
        path = self._index_file(sizes)
        with whole_file(path) as file:
            np.save(file, index, allow_pickle=False)
        for other in {*self.directory.glob("index-*.npy")} - {path}:
            other.unlink(missing_ok=True)
        about = {**self._header["settings"], "journals": sizes}
        with whole_file(self.directory / MANIFEST) as file:
            file.write(json.dumps(about, indent=1, sort_keys=True).encode())
        self.close()
        return []

    def close(self) -> None:
        """Ends this process's part of the work; another one may take its shard."""
        if self._journal is not None:
            for file in (self._features, self._journal):
                os.fsync(file.fileno())
                file.close()
        if self._release is not None:
            self._release()
        self._journal = self._release = None
        self._forget()

    def _forget(self) -> None:
        """What was read of the folder before it changed."""
        for name in ("manifest", "_index", "_journals"):
            self.__dict__.pop(name, None)


# -------------------------------------------------------------------------------------- rows


def _row_type(about: dict) -> np.dtype:
    """What one frame is on disk: (P, D) float16, or (P, D) int8 with a scale for each channel."""
    try:
        shape = int(about["tokens_per_frame"]), int(about["hidden_size"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"features of unknown shape: {error!r}") from error
    if about.get("dtype") != INT8:
        return np.dtype((np.float16, shape))
    return np.dtype([("values", np.int8, shape), ("scale", np.float16, shape[1:])])


def quantize(features: np.ndarray) -> np.ndarray:
    """(F, P, D) float16 → (F,) rows of int8: each channel of a frame by its largest value."""
    _, tokens, width = features.shape
    row_type = _row_type({"dtype": INT8, "tokens_per_frame": tokens, "hidden_size": width})
    rows, wide = np.empty(len(features), row_type), features.astype(np.float32)
    rows["scale"] = np.abs(wide).max(axis=1) / 127
    scale = rows["scale"].astype(np.float32)[:, None]  # as it is read, float16's rounding included
    values = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    rows["values"] = np.rint(values).clip(-127, 127)
    return rows


def as_half(rows: np.ndarray) -> np.ndarray:
    """Rows as stored → (F, P, D) float16."""
    if rows.dtype.names is None:
        return rows
    values = rows["values"].astype(np.float32)
    return (values * rows["scale"].astype(np.float32)[:, None]).astype(np.float16)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest().encode()


def _differences(found: dict, expected: dict) -> list[str]:
    expected = json.loads(json.dumps(expected))  # a tuple is a list in JSON
    return [
        f"{key} is {found.get(key)!r}, {value!r} is needed"
        for key, value in expected.items()
        if found.get(key) != value
    ]


def _absent(place: Path, rel_path: str, record: dict | None) -> ValueError:
    failed = record and f"its extraction failed ({record.get('detail')})"
    return ValueError(f"{place}: no features of {rel_path}: {failed or 'run extract_features.py'}")


def _old_rows(directory: Path, rel_path: str, place: dict | None) -> np.ndarray:
    """Rows of a store from before December 2026, whose manifest holds all records: one `.npy` a
    source, or a few with the places in the records. Raises as `FeatureStore.read`."""
    parts = PurePosixPath(rel_path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in rel_path:
        raise ValueError(f"{rel_path!r} must be a relative path without '..'")
    path = directory.joinpath(*parts[:-1], parts[-1] + ".npy")
    if place is None or "reason" in place:
        raise _absent(path, rel_path, place)
    try:
        if "shard" in place:
            shard, row, frames = place["shard"], place.get("row"), place.get("frames")
            if not all(isinstance(number, int) for number in (shard, row, frames)):
                path = directory / MANIFEST
                raise ValueError(f"the shard {shard!r}, row or frames of {rel_path} are no numbers")
            path = directory / f"features-{shard:05d}.npy"  # never a name from the manifest
            rows = np.load(path, "r", allow_pickle=False)
            rows = np.array(rows[row : row + frames])
        else:
            rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); extract again") from error
    if rows.dtype.names != ("values", "scale") and (rows.ndim != 3 or rows.dtype != np.float16):
        raise ValueError(f"{path}: {rows.dtype} {rows.shape} where float16 (F, P, D) should be")
    return rows
