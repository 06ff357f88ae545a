"""The training state on disk: written whole or not at all, and resumed only by the same run.

A run's states are `state-<step>-<checksum>.pt` in its folder, the newest `--keep_last` of them.
The checksum stands in the name, so that one rename makes a state and what vouches for it appear
together; a file that no longer fits its name is passed over for the one before.
"""

import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Writes the state after `step`, then drops all but the last `keep` ones.

    Raises OSError (torch.save: RuntimeError, for a full disk) if it can't be written; the states
    before it stand as they were.
    """
    temporary = folder / "state.tmp"  # one name: a kill in mid-write leaves one such file, not many
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"state-{step:08d}-{checksum(temporary)}.pt")
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # else a power cut could take the rename back
    finally:
        os.close(descriptor)
    for path in list_states(folder)[keep:]:
        path.unlink()


def find_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest state that is whole; None where there is no state at all.

    `identity` names what the run is (settings, data, first weights). A state of another run raises
    ValueError that lists the differences: to resume it would train something that neither command
    line describes. So does a run whose states are all damaged.
    """
    paths = list_states(folder)
    for path in paths:
        if path.stem.endswith(checksum(path)):
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


def remove_leftovers(folder: Path, weights_path: Path, step: int) -> None:
    """Removes the states after `step`, as the run starts over or resumes from an earlier one, and
    what a kill in mid-write left of the weights."""
    for path in list_states(folder):
        if int(path.name.split("-")[1]) > step:
            path.unlink()
    for suffix in ("pth", "json"):
        for path in weights_path.parent.glob(f".{weights_path.stem}.{suffix}.*"):
            path.unlink()


def list_states(folder: Path) -> list[Path]:
    """A run's states, the newest first."""
    return sorted(folder.glob("state-*-*.pt"), reverse=True)


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
