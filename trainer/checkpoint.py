"""The training state on disk: written whole or not at all, and continued only by the same run.

A run's states are `state-<update>-<checksum>.pt` in its folder, the newest `--keep_last` of them.
The checksum stands in the name, so that one rename makes a state and what vouches for it appear
together; a file that no longer fits its name is passed over for the one before.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"state-(\d{8})-([0-9a-f]{16})\.pt")


class _Sink:
    """A file that hashes what is written to it, and remembers why a write failed: torch.save tells
    of a full disk by a RuntimeError about positions."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def save_state(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Writes the state of update `state["step"]`, then drops all but the last `keep` ones.

    Raises OSError if it can't be written; the states before it stand as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.tmp"  # one name: a kill in mid-write leaves one such file, not many
    try:
        with open(temporary, "wb") as file:
            sink = _Sink(file)
            try:
                torch.save(state, sink)
            except RuntimeError:
                raise sink.error or OSError(f"{temporary}: can't be written") from None
            file.flush()
            os.fsync(file.fileno())
        name = f"state-{state['step']:08d}-{sink.digest.hexdigest()[:16]}.pt"
        os.replace(temporary, folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(folder)  # else a power cut could take the rename back
    forget_after(folder, state["step"] - 1, but=folder / name)
    for path in list_states(folder)[keep:]:
        path.unlink()
    return folder / name


def forget_after(folder: Path, step: int, but: Path | None = None) -> None:
    """Removes the states after update `step`: the run started over, or from an earlier one."""
    for path in list_states(folder):
        if step_of(path) > step and path != but:
            path.unlink()


def list_states(folder: Path) -> list[Path]:
    """A run's states, the newest first."""
    paths = folder.glob("state-*.pt") if folder.is_dir() else []
    return sorted((path for path in paths if NAME.fullmatch(path.name)), reverse=True)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def is_whole(path: Path) -> bool:
    """Whether the contents are those that the name vouches for; True where it has no checksum."""
    named = NAME.fullmatch(path.name)
    if not named:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(named[2])


def find_state(folder: Path, resume: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state that `--resume` asks for; None to start from the beginning.

    `identity` names what the run is (settings, data, first weights). A state of another run raises
    ValueError that lists the differences: going on silently would train something that neither
    command line describes. So does a run whose states are all damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        paths = [Path(resume)]
        if not paths[0].is_file():
            raise ValueError(f"--resume {resume}: no such file; give auto, never or a state-….pt")
    else:
        paths = list_states(folder)
    for path in paths:
        if is_whole(path):
            break
        warning = f"{path} is damaged (its checksum doesn't fit); looking for an earlier state"
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    else:
        if paths:
            raise ValueError(f"{paths[0]}: damaged, and no earlier one is whole; --resume never")
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    before = state["identity"]
    differences = [
        f"  {key}: {before.get(key)!r} then, {identity.get(key)!r} now"
        for key in sorted(before.keys() | identity.keys())
        if before.get(key) != identity.get(key)
    ]
    if differences:
        raise ValueError(
            f"{path} belongs to another run:\n" + "\n".join(differences) + "\n"
            "Give the same settings to go on, --resume never to start over, or another --run_name."
        )
    return state


def sync_folder(folder: Path) -> None:
    """Has the folder's names written to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
