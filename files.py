"""Files that appear whole: no reader, and no crash, ever meets half of one."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file beside `path` that takes its place once it is complete and on the disk.

    What wants a name in place of a file writes to `file.name`. Where the block raises, or the disk
    is full (OSError), what stood in `path` before still stands there, and nothing beside it.
    sync: wait for the disk, for what a power cut must not take; thousands of small files needn't.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
