"""The files that records mean, and pictures that stand in the records themselves."""

import hashlib
import io
import os
from collections import Counter
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image

from dataset.conversation import VISUAL_TAG
from dataset.images import FORMATS
from dataset.samples import check_relative, resolve_under
from files import whole_file

PICTURES = ("image_bytes", "image", "images")  # columns of a parquet that may hold some


class Media:
    """Finds files under `root` (--images_path), or without one takes paths as they stand."""

    def __init__(self, root: str | None):
        self.root = root
        self.pictures: dict[str, bytes] = {}  # of the present record, by the path they'll have
        self.notes: Counter[str] = Counter()
        self.find = lru_cache(maxsize=4096)(self._find)  # many records are about one video

    def _find(self, *candidates: str) -> str:
        """The first candidate that is a file under the root, or the only file with its name.

        Releases unpack into folders that the annotations don't know, so that the longest end of
        the path decides. ValueError where a path leaves the root, or where no file or several fit.
        """
        for path in candidates:
            check_relative(path)
        paths = [PurePosixPath(path) for path in candidates]  # "./a//b" is "a/b"
        if self.root is None or candidates[0] in self.pictures:
            return str(paths[0])
        try:
            found = next((p for p in paths if resolve_under(self.root, str(p)).is_file()), None)
        except OSError as error:
            raise ValueError(f"'{candidates[0][:80]}': {error.strerror}") from error
        if found:
            return str(found)
        for parts in (path.parts for path in paths):
            named = self._by_name.get(parts[-1].lower(), [])
            for length in range(len(parts), 0, -1):
                fitting = [p for p in named if p.parts[-length:-1] == parts[-length:-1]]
                if len(fitting) > 1:
                    raise ValueError(f"{len(fitting)} files end in '{'/'.join(parts[-length:])}'")
                if fitting:
                    resolve_under(self.root, str(fitting[0]))
                    self.notes["a file found under another path"] += 1
                    return str(fitting[0])
        raise ValueError(f"there is no file '{paths[0]}' under {self.root}")

    @cached_property
    def _by_name(self) -> dict[str, list[PurePosixPath]]:
        """All files under the root, by their names in lower case."""
        files: dict[str, list[PurePosixPath]] = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = PurePosixPath(Path(folder, name).relative_to(self.root).as_posix())
                files.setdefault(name.lower(), []).append(path)
        return files

    def take_pictures(self, record: dict, folder: str) -> None:
        """Put paths in place of the pictures in a record; `save` writes them once it is accepted.

        A name comes from the bytes: a picture that stands in many rows is one file. A row without
        a tag is text, as in MiniMind-V's own loader. ValueError for bytes that are no picture.
        """
        self.pictures = {}
        column = next((name for name in PICTURES if _bytes_in(record.get(name))), None)
        pictures = _bytes_in(record.pop(column)) if column else []
        record.pop("image_bytes", None)
        if pictures and self.root is None:
            raise OSError("--images_path is missing: the folder to write the pictures into")
        if not pictures:
            return
        digests = [hashlib.blake2b(data, digest_size=12).hexdigest() for data in pictures]
        paths = [
            f"{folder}/{d[:2]}/{d}.{_suffix_of(data)}"
            for d, data in zip(digests, pictures, strict=True)
        ]
        self.pictures = dict(zip(paths, pictures, strict=True))
        is_text = not VISUAL_TAG.search(str(record.get("conversations")))
        record["image"] = [] if is_text else paths

    def save(self, visuals: list[str]) -> None:
        """Write those pictures of the record that the sample shows."""
        for name in visuals:
            if name in self.pictures and not (path := resolve_under(self.root, name)).is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as file:
                    file.write(self.pictures[name])


def _bytes_in(value: object) -> list[bytes]:
    """Bytes, a list of them, or what the library `datasets` writes: {"bytes": …, "path": …}."""
    values = value if isinstance(value, list) else [value]
    values = [v.get("bytes") if isinstance(v, dict) else v for v in values]
    return values if all(isinstance(v, bytes) for v in values) else []


def _suffix_of(data: bytes) -> str:
    """From the head alone: training decodes the rest."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            suffix = image.format.lower()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"its picture can't be read ({len(data)} bytes)") from error
    return {"jpeg": "jpg", "mpo": "jpg"}.get(suffix, suffix)
