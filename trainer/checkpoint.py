"""The training state on disk: written whole or not at all, and continued only by the same run."""

import os
from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes beside `path` and renames: a run killed in mid-write keeps its last good state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def find_state(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state that `--resume` asks for; None to start from the beginning.

    `identity` names what the run is (settings, data, first weights, number of processes). A state
    of another run raises ValueError that lists the differences: going on silently would train
    something that neither command line describes.
    """
    if config.resume == "never":
        return None
    path = Path(config.out_dir) / config.run_name / "state.pt"
    if config.resume != "auto":
        path = Path(config.resume)
        if not path.is_file():
            raise ValueError(f"--resume {path}: no such file; give auto, never or a state.pt")
    if not path.is_file():
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
