"""Features of frozen towers on disk: compute once, train from them many times.

One `.npy` of F frames for each source file, under its own relative path with its suffix kept
(`clips/a.mp4` → `clips/a.mp4.npy`); `scripts/pack_features.py` joins them into a few large files.
`manifest.json` comes last: it says which tower, frames and shapes these are. Until then
`manifest.parts/` keeps a journal for each shard of the work: a line a source, added once its
features are in place, so that a run which was killed at any point resumes, and any number of
processes, each with a shard of its own, may work at the same store.

    store = FeatureStore(out)
    sources, failures = store.begin(settings)    # refuses a folder made with other settings
    store.write("clips/a.mp4", features)
    store.record("clips/a.mp4", {"size": …})
    store.finish(*store.recorded())
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from files import whole_file
from lock import hold_lock

MANIFEST, PARTS = "manifest.json", "manifest.parts"
FLOAT16, INT8 = "float16", "int8"
NPY_HEADER = 128  # bytes before the rows, at least


class FeatureStore:
    """Reads and writes one folder of features."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.parts = self.directory / PARTS
        self._settings = {}  # of who writes
        self._release = self._journal = None
        self._shards = {}  # open memory maps of a packed store

    def __getstate__(self):  # loader workers open their own
        return {**self.__dict__, "_shards": {}, "_journal": None, "_release": None}

    # ------------------------------------------------------------------------------------ reading

    def path(self, rel_path: str) -> Path:
        """The file of a source's features; ValueError for a path that leaves the folder."""
        parts = PurePosixPath(rel_path).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in rel_path:
            raise ValueError(f"{rel_path!r} must be a relative path without '..'")
        return self.directory.joinpath(*parts[:-1], parts[-1] + ".npy")

    def shard_path(self, number: int) -> Path:
        """A file of a packed store; its name comes from the number, never from the manifest."""
        return self.directory / f"features-{number:05d}.npy"

    def read(self, rel_path: str, frames: Sequence[int] | None = None) -> Tensor:
        """(F, P, D) float16 of all frames, or of those with these numbers, without reading others.

        ValueError, naming the file, when the features are absent or damaged.
        """
        return torch.from_numpy(as_half(self.rows(rel_path, frames)))

    def rows(self, rel_path: str, frames: Sequence[int] | None = None) -> np.ndarray:
        """As stored, a row a frame: (F, P, D) float16, or (F,) records of int8 and their scales.

        ValueError, naming the file, when the features are absent or damaged.
        """
        path, manifest = self.path(rel_path), {} if self._settings else self.manifest
        try:
            if "packed" in manifest:
                if "shard" not in (place := manifest["sources"].get(rel_path, {})):
                    raise FileNotFoundError
                path = self.shard_path(place["shard"])
                if place["shard"] not in self._shards:
                    self._shards[place["shard"]] = np.load(path, "r", allow_pickle=False)
                rows = self._shards[place["shard"]][place["row"] : place["row"] + place["frames"]]
            else:
                rows = np.load(path, "r" if frames is not None else None, allow_pickle=False)
        except FileNotFoundError as error:
            reason = manifest.get("failures", {}).get(rel_path, {}).get("detail")
            reason = f"its extraction failed ({reason})" if reason else "run extract_features.py"
            raise ValueError(f"{path}: no features of {rel_path}: {reason}") from error
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it and extract again") from error
        is_int8 = rows.ndim == 1 and rows.dtype.names == ("values", "scale")
        if not is_int8 and (rows.ndim != 3 or rows.dtype != np.float16):
            raise ValueError(
                f"{path}: {rows.dtype} {rows.shape} where float16 (F, P, D) should be; "
                "delete it and extract again"
            )
        return rows if frames is None else rows[frames]

    @property
    def is_complete(self) -> bool:
        return (self.directory / MANIFEST).is_file() and not self.parts.exists()

    @cached_property
    def manifest(self) -> dict:
        """What these features are; ValueError when the extraction didn't come to its end."""
        if self.is_complete:
            return self._read_manifest()
        sources, failures = self.recorded()
        reason = (
            "so the features are absent or unfinished; run (again) "
            f"extract_features.py --features_path {self.directory}"
        )
        if known := [header for header in self._headers if header.get("command")]:
            reason = (
                f"so the features are unfinished: {len(sources) + len(failures)} of "
                f"{known[-1]['visuals']} visuals are done. What is missing is made by\n"
                f"  {known[-1]['command']}"
            )
        raise ValueError(f"{self.directory / MANIFEST}: missing or not up to date, {reason}")

    def _read_manifest(self) -> dict:
        path = self.directory / MANIFEST
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(
                f"{path}: not JSON ({error}); delete the folder and extract again"
            ) from error

    def check(self, expected: dict) -> None:
        """Stop before training on features that don't fit, e.g. check({"num_frames": 8}).

        ValueError names every value that differs, or says how an unfinished store is finished.
        """
        if problems := _differences(self.manifest, expected):
            raise ValueError(
                f"{self.directory / MANIFEST}: the features don't fit: {'; '.join(problems)}. "
                "Extract them again, or change the flags"
            )

    # ------------------------------------------------------------------------------------ writing

    def begin(self, settings: dict, shard: tuple[int, int] = (0, 1), **header) -> tuple[dict, dict]:
        """Returns what earlier runs recorded, (sources, failures), and locks this shard (i, n).

        From the first write or record until `finish` the store doesn't count as complete. `header`:
        `command` and `visuals`, for whoever finds it so. Raises ValueError when the folder holds
        features made with other settings, which would be mixed up, or when another process works at
        the same shard.
        """
        self._settings = json.loads(json.dumps(settings))
        self._header, self._stem = {"settings": self._settings, **header}, "{}-of-{}".format(*shard)
        if self.directory.is_dir():
            names = {path.name for path in self.directory.iterdir()}
            if not names & {MANIFEST, PARTS} and any(not name.endswith(".lock") for name in names):
                raise ValueError(
                    f"{self.directory} holds files but no manifest that says what they are; choose "
                    "another --features_path, or delete the folder"
                )
        recorded = self.recorded()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._release = self._hold(self._stem)
        return recorded

    def _hold(self, stem: str):
        purpose = f"extracting shard {stem.replace('-of-', '/')}"
        return hold_lock(self.directory / f".{stem}.lock", purpose)

    def write(self, rel_path: str, features: Tensor) -> None:
        """Store (F, P, D) as the settings' dtype; the file is whole or absent, whatever happens.

        ValueError for a path that leaves the folder; OSError, with the file, for a full disk.
        """
        assert features.ndim == 3, f"features are (F, P, D), not {tuple(features.shape)}"
        path = self.path(rel_path)
        rows = features.to(torch.float16).cpu().numpy()
        if self._settings.get("dtype") == INT8:
            rows = quantize(rows)
        self._open_journal()
        unfinished = self.parts / f"{self._stem}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                np.save(file, rows, allow_pickle=False)
        except OSError as error:
            raise OSError(
                f"{path}: can't be written ({error}); the same command resumes once it can"
            ) from error
        os.replace(unfinished, path)

    def has(self, rel_path: str, num_frames: int = 1) -> bool:
        """Whether the features are there in full length: a power cut can leave an empty file."""
        try:
            size = self.path(rel_path).stat().st_size
        except OSError:
            return False
        about = self._settings or self.manifest
        row = row_type(about["dtype"], about["tokens_per_frame"], about["hidden_size"])
        return size >= NPY_HEADER + num_frames * row.itemsize

    def record(self, rel_path: str, record: dict) -> None:
        """Say what became of a source: its size and hash, or the `reason` why it has no features.

        Comes after `write`: a process that is killed between the two makes the features again.
        """
        self._open_journal()
        self._write_line({"path": rel_path, "time": time.time_ns(), **record})

    def _open_journal(self) -> None:
        if self._journal is None:
            self.parts.mkdir(parents=True, exist_ok=True)
            self.__dict__.pop("manifest", None)
            journal = self.parts / f"{self._stem}.jsonl"
            self._journal = journal.open("a", encoding="utf-8")
            self._journal.write("\n")  # a kill may have left half a line
            self._write_line(self._header)

    def _write_line(self, content: dict) -> None:
        self._journal.write(json.dumps(content) + "\n")
        self._journal.flush()

    def recorded(self) -> tuple[dict, dict]:
        """(sources, failures) as all processes recorded them so far, this one and the others.

        Raises ValueError where one of them works with other settings than this one's.
        """
        lines, self._headers = [], []
        # Journals first: whoever finishes meanwhile removes them only once the manifest has them.
        for journal in sorted(self.parts.glob("*.jsonl")):
            with suppress(FileNotFoundError):
                for line in _whole_lines(journal.read_text(encoding="utf-8")):
                    (lines if "path" in line else self._headers).append(line)
        manifest = self._read_manifest()
        records = manifest.pop("sources", {}) | manifest.pop("failures", {})
        for line in sorted(lines, key=lambda line: line.pop("time", 0)):  # 0: before November 2026
            records[line.pop("path")] = line
        for settings in (manifest, *(header.get("settings", {}) for header in self._headers)):
            self._check_settings(settings)
        failures = {rel: record for rel, record in records.items() if "reason" in record}
        sources = {rel: record for rel, record in records.items() if rel not in failures}
        return sources, failures

    def _check_settings(self, found: dict) -> None:
        problems = _differences(found, self._settings) if found else []
        if "packed" in found and self._settings:
            problems = ["it is packed, and can only be read"]
        if problems:
            raise ValueError(
                f"{self.directory} holds features of another kind: {'; '.join(problems)}. "
                "Choose another --features_path, or delete the folder"
            )

    def finish(self, sources: dict, failures: dict) -> None:
        """Write the manifest: the store is complete once no other process writes to it any more.

        Several processes may do so at once, since all of them write the same.
        """
        content = {**self._settings, "sources": sources, "failures": failures}
        with whole_file(self.directory / MANIFEST) as file:
            file.write(json.dumps(content, indent=1, sort_keys=True).encode())
        self.close()
        for stem in {path.stem for path in self.parts.glob("*")}:
            with suppress(ValueError):  # whoever still writes keeps its journal
                release = self._hold(stem)
                for file in self.parts.glob(f"{stem}.*"):
                    file.unlink(missing_ok=True)
                release()
        with suppress(OSError):
            self.parts.rmdir()
        self.__dict__.pop("manifest", None)

    def close(self) -> None:
        """Ends this process's part of the work; another one may take its shard."""
        if self._journal is not None:
            self._journal.close()
        if self._release is not None:
            self._release()
        self._journal = self._release = None
        self._settings = {}


# -------------------------------------------------------------------------------------- int8


def row_type(dtype: str, tokens_per_frame: int, hidden_size: int) -> np.dtype:
    """What one frame is on disk: (P, D) float16, or (P, D) int8 with a scale for each channel."""
    if dtype == INT8:
        values = ("values", np.int8, (tokens_per_frame, hidden_size))
        return np.dtype([values, ("scale", np.float16, (hidden_size,))])
    return np.dtype((np.float16, (tokens_per_frame, hidden_size)))


def quantize(features: np.ndarray) -> np.ndarray:
    """(F, P, D) float16 → (F,) rows of int8: each channel of a frame by its largest value."""
    rows = np.empty(len(features), row_type(INT8, *features.shape[1:]))
    wide = features.astype(np.float32)
    rows["scale"] = np.abs(wide).max(axis=1) / 127
    scale = rows["scale"].astype(np.float32)[:, None]  # as it is read, float16's rounding included
    values = np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0)
    rows["values"] = np.rint(values).clip(-127, 127)
    return rows


def as_half(rows: np.ndarray) -> np.ndarray:
    """Rows as stored → (F, P, D) float16 in writable memory, as torch takes it."""
    if rows.dtype.names is None:
        return rows if rows.flags.writeable else np.array(rows)
    values = rows["values"].astype(np.float32)
    return (values * rows["scale"].astype(np.float32)[:, None]).astype(np.float16)


# ------------------------------------------------------------------------------------- files


def _whole_lines(text: str) -> list[dict]:
    """A journal's lines; one that a kill cut short doesn't count."""
    lines = []
    for line in text.split("\n"):
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _differences(found: dict, expected: dict) -> list[str]:
    expected = json.loads(json.dumps(expected))  # a tuple is a list in JSON
    return [
        f"{key} is {found.get(key)!r}, {value!r} is needed"
        for key, value in expected.items()
        if found.get(key) != value
    ]
