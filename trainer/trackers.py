"""Where the lines of metrics go besides the run's own folder: `--tracker`.

Each tracker is imported when it is chosen and not before. A run keeps one id for each of them (in
tracker.json), so that a resumed run continues the same curve there.
"""

import importlib
import json
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Tracker:
    """Two calls for all of them. A tracker that fails is left out with a warning: the lines stand
    in metrics.jsonl, and no training should end because somebody's server does."""

    name: str
    log_row: Callable[[dict[str, float], int], Any]
    finish_run: Callable[[], Any]
    last_logged: int = 0  # the last step that it has
    alive: bool = True

    def log(self, row: dict[str, Any]) -> None:
        """Each line once: one that is made again after a kill was sent before."""
        if row["step"] > self.last_logged:
            figures = {name: value for name, value in row.items() if value is not None}
            self._try(self.log_row, figures, row["step"])
            self.last_logged = row["step"]

    def finish(self) -> None:
        self._try(self.finish_run)

    def _try(self, call: Callable, *arguments: Any) -> None:
        if not self.alive:
            return
        try:
            call(*arguments)
        except Exception as error:
            self.alive = False
            warnings.warn(
                f"--tracker {self.name} failed and is left out from here: {error!r}", stacklevel=2
            )


def open_tracker(
    name: str, folder: Path, settings: dict[str, Any], first_step: int, last_logged: int
) -> Tracker:
    """The tracker's run for a training that starts, or resumes at `first_step`.

    settings: the training's flags; last_logged: the last step whose line it got, before a kill
    perhaps. Raises ValueError, with the command that fixes it, if the tracker isn't installed.
    """
    run_name, run_id = settings["run_name"], _run_id(folder, name, keep=last_logged > 0)
    shared = {"project": settings["wandb_project"], "config": settings, "resume": "allow"}
    # None: online, or as the tracker's own environment variable says.
    online = {"id": run_id, "mode": "offline" if settings["tracker_offline"] else None}
    module = _import("torch.utils.tensorboard" if name == "tensorboard" else name, name)
    if name == "wandb":
        run = module.init(name=run_name, dir=folder, **shared, **online)
        return Tracker(name, lambda row, step: run.log(row, step=step), run.finish, last_logged)
    if name == "swanlab":
        logs = str(folder / "swanlab")
        module.init(experiment_name=run_name, logdir=logs, **shared, **online)
    elif name == "trackio":  # local always; its dashboard is `trackio show`
        module.init(name=f"{run_name}-{run_id}", **shared)
    else:
        # What is purged is logged again: the steps after the one that the run resumes at.
        purge_step = first_step + 1 if last_logged else None
        writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

        def log_row(row: dict[str, float], step: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return Tracker(name, log_row, writer.close, first_step)
    return Tracker(name, lambda row, step: module.log(row, step=step), module.finish, last_logged)


def _run_id(folder: Path, name: str, keep: bool) -> str:
    """The id that the run has had with this tracker; a new one for a run that starts."""
    path = folder / "tracker.json"
    ids = json.loads(path.read_text(encoding="utf-8")) if keep and path.is_file() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        path.write_text(json.dumps(ids), encoding="utf-8")
    return ids[name]


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--tracker {package} needs a package that isn't here: pip install {package} ({error})"
        ) from None
