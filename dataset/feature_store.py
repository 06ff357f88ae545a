"""Features of frozen towers on disk: compute once, train from them many times.

One float16 `.npy` (F, P, D) for each source file, under its own relative path with its suffix kept
(`clips/a.mp4` → `clips/a.mp4.npy`). Every file appears by rename, and `manifest.json` comes last:
it says which tower, frames and shapes these are, and its presence means that the store is complete.

    store = FeatureStore(out)
    sources, failures = store.begin(settings)    # refuses a folder made with other settings
    store.write("clips/a.mp4", features)
    store.finish(sources, failures)
"""

import json
import os
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

MANIFEST, UNFINISHED = "manifest.json", "manifest.unfinished.json"


class FeatureStore:
    """Reads and writes one folder of features."""

    def __init__(self, directory):
        self.directory = Path(directory)

    # ------------------------------------------------------------------------------------ reading

    def path(self, rel_path: str) -> Path:
        """The file of a source's features; ValueError for a path that leaves the folder."""
        parts = PurePosixPath(rel_path).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in rel_path:
            raise ValueError(f"{rel_path!r} must be a relative path without '..'")
        return self.directory.joinpath(*parts[:-1], parts[-1] + ".npy")

    def has(self, rel_path: str) -> bool:
        return self.path(rel_path).is_file()

    def read(self, rel_path: str) -> Tensor:
        """(F, P, D) float16; ValueError naming the file when it is absent or isn't that."""
        path = self.path(rel_path)
        try:
            features = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            reason = self.manifest.get("failures", {}).get(rel_path, {}).get("detail")
            reason = f"its extraction failed ({reason})" if reason else "run extract_features.py"
            raise ValueError(f"{path}: no features of {rel_path}: {reason}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it and extract again") from error
        if features.ndim != 3 or features.dtype != np.float16:
            raise ValueError(
                f"{path}: {features.dtype} {features.shape} where float16 (F, P, D) should be; "
                "delete it and extract again"
            )
        return torch.from_numpy(features)

    @cached_property
    def manifest(self) -> dict:
        """What these features are; ValueError when the extraction didn't come to its end."""
        path = self.directory / MANIFEST
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{path}: missing, so the features are absent or unfinished; run (again) "
                f"extract_features.py --features_path {self.directory}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{path}: not JSON ({error}); delete the folder and extract again"
            ) from error

    def check(self, expected: dict) -> None:
        """Stop before training on features that don't fit, e.g. check({"num_frames": 8})."""
        problems = _differences(self.manifest, expected)
        if problems:
            raise ValueError(
                f"{self.directory / MANIFEST}: the features don't fit: {'; '.join(problems)}. "
                "Extract them again, or change the flags"
            )

    # ------------------------------------------------------------------------------------ writing

    def begin(self, settings: dict) -> tuple[dict, dict]:
        """From now until `finish` the store doesn't count as complete.

        Returns what earlier runs recorded: (sources, failures). Raises ValueError when the folder
        holds features made with other settings: the two would be mixed up.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        finished, unfinished = self.directory / MANIFEST, self.directory / UNFINISHED
        entries = [path.name for path in self.directory.iterdir()]
        if entries and not any(name.startswith("manifest.") for name in entries):
            raise ValueError(
                f"{self.directory} holds files but no manifest that says what they are; choose "
                "another --features_path, or delete the folder"
            )
        sources, failures = {}, {}
        for path in (finished, unfinished):
            if path.is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
                sources |= record["sources"]
                failures |= record["failures"]
                problems = _differences(record, settings)
                if problems:
                    raise ValueError(
                        f"{self.directory} holds features of another kind: {'; '.join(problems)}. "
                        "Choose another --features_path, or delete the folder"
                    )
        self._settings = settings
        _write_json(unfinished, {**settings, "sources": sources, "failures": failures})
        finished.unlink(missing_ok=True)
        return sources, failures

    def write(self, rel_path: str, features: Tensor) -> None:
        """Store (F, P, D) as float16; the file is whole or absent, whenever the process dies."""
        assert features.ndim == 3, f"features are (F, P, D), not {tuple(features.shape)}"
        path = self.path(rel_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        with unfinished.open("wb") as file:
            np.save(file, features.to(torch.float16).cpu().numpy(), allow_pickle=False)
        os.replace(unfinished, path)

    def finish(self, sources: dict, failures: dict) -> None:
        """Write the manifest: the store is complete."""
        _write_json(
            self.directory / MANIFEST,
            {**self._settings, "sources": sources, "failures": failures},
        )
        (self.directory / UNFINISHED).unlink(missing_ok=True)
        self.__dict__.pop("manifest", None)


def _differences(found: dict, expected: dict) -> list[str]:
    expected = json.loads(json.dumps(expected))  # a tuple is a list in JSON
    return [
        f"{key} is {found.get(key)!r}, {value!r} is needed"
        for key, value in expected.items()
        if found.get(key) != value
    ]


def _write_json(path: Path, content: dict) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # shards may begin together
    unfinished.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(unfinished, path)
