"""Features of frozen towers on disk: compute once, train from them many times.

One `.npy` of F frames for each source file, under its own relative path with its suffix kept
(`clips/a.mp4` → `clips/a.mp4.npy`); `scripts/pack_features.py` joins them into a few large files.
`manifest.json` comes last: it says which tower, frames and shapes these are, and its presence means
that the store is complete. Until then `manifest.parts/` keeps a journal for each process that
writes: a line a source, added once its features are in place, so that a run which was killed at any
point goes on where it was, and any number of processes may work at the same store.

    store = FeatureStore(out)
    sources, failures = store.begin(settings)    # refuses a folder made with other settings
    store.write("clips/a.mp4", features)
    store.record("clips/a.mp4", {"size": …})
    store.finish(*store.recorded())
"""

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

MANIFEST, PARTS = "manifest.json", "manifest.parts"
FLOAT16, INT8 = "float16", "int8"
NPY_HEADER = 128  # bytes before the rows, at least


class FeatureStore:
    """Reads and writes one folder of features."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self._settings, self._header = {}, {}
        self._journal = None  # opened by the first write
        self._own = {}  # what this process recorded
        self._merged = []  # the files that `recorded` read: `finish` removes these, no others
        self._shards = {}  # open memory maps of a packed store

    def __getstate__(self):
        return {**self.__dict__, "_shards": {}, "_journal": None}  # loader workers open their own

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
        """As stored, a row a frame: (F, P, D) float16, or (F,) records of int8 and their scales."""
        path, mode = self.path(rel_path), None if frames is None else "r"
        place = self.manifest["sources"].get(rel_path, {}) if self._is_packed else {}
        if self._is_packed and "shard" in place:
            path = self.shard_path(place["shard"])
        try:
            if not self._is_packed:
                rows = np.load(path, mode, allow_pickle=False)
            elif "shard" not in place:
                raise FileNotFoundError
            else:
                if place["shard"] not in self._shards:
                    self._shards[place["shard"]] = np.load(path, "r", allow_pickle=False)
                rows = self._shards[place["shard"]][place["row"] : place["row"] + place["frames"]]
        except FileNotFoundError as error:
            reason = self.manifest.get("failures", {}).get(rel_path, {}).get("detail")
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

    @cached_property
    def manifest(self) -> dict:
        """What these features are; ValueError when the extraction didn't come to its end."""
        path = self.directory / MANIFEST
        try:
            return self._parse(path, path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: missing, {self._what_is_missing()}") from error

    def _parse(self, path: Path, text: str) -> dict:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"{path}: not JSON ({error}); delete the folder and extract again"
            ) from error

    @cached_property
    def _is_packed(self) -> bool:
        # A store that is still being written has files of its own for each source.
        return (self.directory / MANIFEST).is_file() and "packed" in self.manifest

    @property
    def is_complete(self) -> bool:
        return (self.directory / MANIFEST).is_file() and not (self.directory / PARTS).exists()

    def _what_is_missing(self) -> str:
        sources, failures = self.recorded()
        known = [header for header in self._headers if header.get("command")]
        if not known:
            return (
                "so the features are absent or unfinished; run (again) "
                f"extract_features.py --features_path {self.directory}"
            )
        return (
            f"so the features are unfinished: {len(sources) + len(failures)} of "
            f"{known[-1]['visuals']} visuals are done. What is missing is made by\n"
            f"  {known[-1]['command']}"
        )

    def check(self, expected: dict) -> None:
        """Stop before training on features that don't fit, e.g. check({"num_frames": 8})."""
        problems = _differences(self.manifest, expected)
        if problems:
            raise ValueError(
                f"{self.directory / MANIFEST}: the features don't fit: {'; '.join(problems)}. "
                "Extract them again, or change the flags"
            )

    # ------------------------------------------------------------------------------------ writing

    def begin(self, settings: dict, **header) -> tuple[dict, dict]:
        """Returns what earlier runs recorded, (sources, failures), and changes nothing yet.

        From the first write or record until `finish` the store doesn't count as complete. `header`:
        `command` and `visuals`, for whoever finds it so. Raises ValueError when the folder holds
        features made with other settings: the two would be mixed up.
        """
        if self.directory.is_dir():
            names = {path.name for path in self.directory.iterdir()}
            if names and not names & {MANIFEST, PARTS}:
                raise ValueError(
                    f"{self.directory} holds files but no manifest that says what they are; choose "
                    "another --features_path, or delete the folder"
                )
        self._settings = json.loads(json.dumps(settings))
        self._header = {"settings": self._settings, **header}
        return self.recorded()

    def write(self, rel_path: str, features: Tensor) -> None:
        """Store (F, P, D) as the settings' dtype; the file is whole or absent, whatever happens."""
        assert features.ndim == 3, f"features are (F, P, D), not {tuple(features.shape)}"
        rows = features.to(torch.float16).cpu().numpy()
        if self._settings.get("dtype") == INT8:
            rows = quantize(rows)
        self._open_journal()
        path, unfinished = self.path(rel_path), Path(self._journal.name).with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.save(file, rows, allow_pickle=False)
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
        self._own[rel_path] = record
        self._journal.write(json.dumps({"path": rel_path, **record}) + "\n")
        self._journal.flush()

    def _open_journal(self) -> None:
        if self._journal is not None:
            return
        parts = self.directory / PARTS
        parts.mkdir(parents=True, exist_ok=True)
        # The number puts later runs after those that they have read; processes that begin together
        # may share it, since no two of them work at the same source.
        numbers = [int(path.name[:6]) for path in parts.glob("[0-9]" * 6 + ".*")]
        stem = f"{max(numbers, default=0) + 1:06d}"
        # Not complete any more: the manifest becomes a part of the next one.
        with suppress(FileNotFoundError):
            os.replace(self.directory / MANIFEST, parts / f"{stem}.base.{uuid.uuid4().hex}.json")
        self.__dict__.pop("manifest", None)
        self._journal = open(  # noqa: SIM115 - it lives as long as the run
            parts / f"{stem}.journal.{uuid.uuid4().hex}.jsonl", "w", encoding="utf-8"
        )
        self._journal.write(json.dumps(self._header) + "\n")
        self._journal.flush()

    def recorded(self) -> tuple[dict, dict]:
        """(sources, failures) as all processes recorded them so far, this one and the others.

        Raises ValueError where one of them works with other settings than this one's.
        """
        path = self.directory / MANIFEST
        while True:
            was_complete = path.is_file()
            found = [path, *sorted((self.directory / PARTS).glob("[0-9]*.json*"))]
            records, self._headers, self._merged = {}, [], []
            for part in found:
                try:
                    text = part.read_text(encoding="utf-8")
                except FileNotFoundError:
                    continue
                if part.suffix == ".json":
                    header = self._parse(part, text)
                    records |= header.pop("sources") | header.pop("failures")
                    settings = header
                else:
                    header, lines = _whole_lines(text)
                    records |= {line.pop("path"): line for line in lines}
                    settings = header.get("settings", {})
                    self._headers.append(header)
                if settings:
                    self._check_settings(settings)
                if part != path:
                    self._merged.append(part)
            # Another process may have joined the parts and removed them while they were read.
            if path.is_file() == was_complete:
                break
        records |= self._own
        failures = {rel for rel, record in records.items() if "reason" in record}
        sources = {rel: record for rel, record in records.items() if rel not in failures}
        return sources, {rel: records[rel] for rel in failures}

    def _check_settings(self, found: dict) -> None:
        problems = _differences(found, self._settings)
        if "packed" in found and self._settings:
            problems = ["it is packed, and can only be read"]
        if problems:
            raise ValueError(
                f"{self.directory} holds features of another kind: {'; '.join(problems)}. "
                "Choose another --features_path, or delete the folder"
            )

    def finish(self, sources: dict, failures: dict) -> None:
        """Write the manifest: the store is complete.

        Several processes may do so at once, since all of them write the same.
        """
        parts = self.directory / PARTS
        parts.mkdir(parents=True, exist_ok=True)
        unfinished = parts / f"{uuid.uuid4().hex}.tmp"
        content = {**self._settings, "sources": sources, "failures": failures}
        unfinished.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(unfinished, self.directory / MANIFEST)
        if self._journal is not None:
            self._journal.close()
            self._merged.append(Path(self._journal.name))
            self._journal, self._own = None, {}
        for part in {*self._merged, *parts.glob("*.tmp")}:
            part.unlink(missing_ok=True)
        with suppress(OSError):  # another process adds to the store again, or was faster
            parts.rmdir()
        self._merged = []
        self.__dict__.pop("manifest", None)


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
    if rows.dtype.names is None:
        return rows if rows.flags.writeable else np.array(rows)  # torch takes writable memory
    values = rows["values"].astype(np.float32)
    return (values * rows["scale"].astype(np.float32)[:, None]).astype(np.float16)


def relative_error(exact: Tensor, stored: Tensor) -> tuple[float, float]:
    """(squared error, squared norm), to be summed; the root of their ratio is the relative error"""
    exact, stored = exact.float(), stored.float()
    return float((stored - exact).square().sum()), float(exact.square().sum())


# ------------------------------------------------------------------------------------- files


def _whole_lines(text: str) -> tuple[dict, list[dict]]:
    """A journal's header and records; a line that a kill cut short doesn't count."""
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return (lines[0], lines[1:]) if lines else ({}, [])


def _differences(found: dict, expected: dict) -> list[str]:
    expected = json.loads(json.dumps(expected))  # a tuple is a list in JSON
    return [
        f"{key} is {found.get(key)!r}, {value!r} is needed"
        for key, value in expected.items()
        if found.get(key) != value
    ]
