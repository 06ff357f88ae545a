"""The training state on disk: written whole or not at all, and resumed only by the same run.

A run's states are `state-<step>-<checksum>.pt` in its folder, the newest `--keep_last` of them.
The checksum stands in the name, so that one rename makes a state and what vouches for it appear
together; a file that no longer fits its name is passed over for the one before.
"""

import hashlib
import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"state-(\d{8})-([0-9a-f]{16})\.pt")


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the state after `step`, then drops all but the last `keep` ones.

    Raises OSError if it can't be written; the states before it stand as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "state.tmp"  # one name: a kill in mid-write leaves one such file, not many
    try:
        with explain_failed_write(temporary), open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"state-{step:08d}-{checksum(temporary)}.pt"
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # else a power cut could take the rename back
    finally:
        os.close(descriptor)
    for other in list_states(folder):
        if step_of(other) >= step and other != path:
            other.unlink()
    for other in list_states(folder)[keep:]:
        other.unlink()
    return path


@contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """OSError for what torch.save makes of a full disk: a RuntimeError about positions in a file,
    with the reason behind it."""
    try:
        yield
    except RuntimeError as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} can't be written: {reason}") from error


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def remove_leftovers(folder: Path, weights_path: Path, step: int) -> None:
    """Removes the states after `step`, as the run starts over or resumes from an earlier one, and
    what a kill in mid-write left of the weights."""
    for path in list_states(folder):
        if step_of(path) > step:
            path.unlink()
    for suffix in ("pth", "json"):
        for path in weights_path.parent.glob(f".{weights_path.stem}.{suffix}.*"):
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
    return named is None or checksum(path) == named[2]


def find_state(folder: Path, resume: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state that `--resume` asks for; None to start from the beginning.

    `identity` names what the run is (settings, data, first weights). A state of another run raises
    ValueError that lists the differences: to resume it would train something that neither command
    line describes. So does a run whose states are all damaged.
    """
    if resume == "never":
        return None
    paths = list_states(folder) if resume == "auto" else [Path(resume)]
    if resume != "auto" and not paths[0].is_file():
        raise ValueError(f"--resume {resume}: no such file; give auto, never or a state-….pt")
    for path in paths:
        if is_whole(path):
            break
        warning = f"{path} is damaged (its checksum doesn't fit); looking for an earlier state"
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    else:
        if paths:
            raise ValueError(f"{paths[0]}: damaged, and no earlier one is whole; --resume never")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} isn't a training state: {error}") from None
    before = state["identity"]
    differences = [
        f"  {key}: {before.get(key)!r} then, {identity.get(key)!r} now"
        for key in sorted(before.keys() | identity.keys())
        if before.get(key) != identity.get(key)
    ]
    if differences:
        raise ValueError(
            f"{path} belongs to another run:\n" + "\n".join(differences) + "\n"
            "Give the same settings to resume it, --resume never to start over, or another "
            "--run_name."
        )
    return state
