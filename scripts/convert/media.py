"""Where the visuals of converted records are: files under --images_path, or bytes in a parquet."""

import hashlib
import io
import os
from functools import lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image

from dataset.images import FORMATS
from dataset.samples import check_relative, resolve_under
from dataset.video import MAX_PIXELS
from scripts.convert.report import Tally

# In order of preference where a name without a suffix fits several files.
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv")
VIDEO_SUFFIXES += (".wmv", ".3gp", ".ogv", ".gif")
FILLER = (8, 8)  # pixels of the black picture that MiniMind-V puts where text has none


class Media:
    """Finds the file that a record means, and writes pictures that stand in the records.

    root: `--images_path`; without one, paths are taken as they stand, unchecked.
    keep_bytes: pictures stay bytes, for a parquet as output; else they become files under root.
    """

    def __init__(self, root: str | None, keep_bytes: bool = False):
        self.root, self.keep_bytes = None if keep_bytes else root, keep_bytes
        self.offered: dict[str, bytes] = {}
        self.notes = Tally()
        self.find = lru_cache(maxsize=4096)(self._find)  # many records are about one video

    # --------------------------------------------------------------------------------- files

    def _find(self, *candidates: str) -> str:
        """The first candidate that is a file under the root, or the only file with its name.

        Releases unpack into folders that the annotations don't know; ValueError where a path
        leaves the root, or where no file or several have the name.
        """
        if candidates[0] in self.offered:
            return candidates[0]
        for path in candidates:
            check_relative(path)
        paths = [str(PurePosixPath(path)) for path in candidates]  # "./a//b" is "a/b"
        if self.root is None:
            return paths[0]
        for path in paths:
            if self._is_file(path):
                return path
        for path in paths:
            named = self._names.get(PurePosixPath(path).name, [])
            for tail in range(len(PurePosixPath(path).parts), 0, -1):
                end = PurePosixPath(path).parts[-tail:]
                fitting = [p for p in named if PurePosixPath(p).parts[-tail:] == end]
                if len(fitting) == 1:
                    resolve_under(self.root, fitting[0])
                    self.notes.add("found under another path", f"{path} is {fitting[0]}")
                    return fitting[0]
                if fitting:
                    raise ValueError(f"{len(fitting)} files end in '{'/'.join(end)}'")
        raise ValueError(f"there is no file '{paths[0]}' under {self.root}")

    def find_stem(self, stem: str, default_suffix: str) -> str:
        """The video called `stem` with whatever suffix it has."""
        check_relative(stem)
        if self.root is None:
            return stem + default_suffix
        if not (fitting := self._stems.get(PurePosixPath(stem).name)):
            raise ValueError(f"there is no video '{stem}' under {self.root}")
        resolve_under(self.root, fitting)
        return fitting

    def _is_file(self, path: str) -> bool:
        try:
            return resolve_under(self.root, path).is_file()
        except OSError as error:  # a name too long for the disk
            raise ValueError(f"'{path[:80]}': {error.strerror}") from error

    @property
    def _names(self) -> dict[str, list[str]]:
        if not hasattr(self, "_by_name"):
            self._by_name: dict[str, list[str]] = {}
            for folder, _, files in os.walk(self.root):
                for file in files:
                    path = Path(folder, file).relative_to(self.root).as_posix()
                    self._by_name.setdefault(file, []).append(path)
        return self._by_name

    @property
    def _stems(self) -> dict[str, str]:
        if not hasattr(self, "_by_stem"):
            ranked: dict[str, tuple[int, str]] = {}
            for name, paths in self._names.items():
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    rank = (VIDEO_SUFFIXES.index(suffix.lower()), min(paths))
                    ranked[stem] = min(ranked.get(stem, rank), rank)
            self._by_stem = {stem: path for stem, (_, path) in ranked.items()}
        return self._by_stem

    # ----------------------------------------------------------------- pictures in the records

    def offer(self, folder: str, where: str, images: list[bytes], is_text: bool) -> list[str]:
        """Names for a record's pictures; they are written once `save` asks for them.

        A name comes from the bytes: a picture that stands in many rows is one file, and what a
        run before has written is kept. ValueError for bytes that are no picture.
        """
        self.offered = {}
        sizes = [_size_of(data) for data in images]
        if is_text:
            if any(size != FILLER for size, _ in sizes):
                self.notes.add("a picture without a tag was left out", where)
            return []
        names = []
        for data, (_, suffix) in zip(images, sizes, strict=True):
            digest = hashlib.blake2b(data, digest_size=12).hexdigest()
            names.append(f"{folder}/{digest[:2]}/{digest}.{suffix}")
            self.offered[names[-1]] = data
        return names

    def save(self, visuals: list[str]) -> list[bytes]:
        """Write the offered pictures among `visuals`, or hand them over where they stay bytes."""
        images = [(name, self.offered[name]) for name in visuals if name in self.offered]
        if self.keep_bytes:
            return [data for _, data in images]
        for name, data in images:
            path = resolve_under(self.root, name)
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(".part")
                part.write_bytes(data)
                os.replace(part, path)
        return []


def _size_of(data: bytes) -> tuple[tuple[int, int], str]:
    """((width, height), suffix), from the head alone: training decodes the rest."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size, suffix = image.size, image.format.lower()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"its picture can't be read ({len(data)} bytes)") from error
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"its picture of {size[0]}×{size[1]} pixels is above {MAX_PIXELS}")
    return size, {"jpeg": "jpg", "mpo": "jpg"}.get(suffix, suffix)
