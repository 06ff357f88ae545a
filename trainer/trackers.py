"""Where the lines of metrics go besides the run's own folder: `--tracker`.

Each tracker is imported when it is chosen and not before; none but wandb is in requirements.txt.
A run keeps one id for the tracker (in tracker.json), so that a resumed run goes on in the same
curve there.
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
    told: int = 0  # the last update that it has heard of
    alive: bool = True

    def log(self, row: dict[str, Any]) -> None:
        """One line, once: a line that is made again after a kill was told before."""
        if row["step"] > self.told:
            figures = {name: value for name, value in row.items() if value is not None}
            self._try(self.log_row, figures, row["step"])
            self.told = row["step"]

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
    name: str,
    folder: Path,
    run_name: str,
    project: str,
    settings: dict[str, Any],
    offline: bool,
    first_step: int,
    told: int,
) -> Tracker:
    """The tracker's run for a training that begins (0) or goes on at update `first_step`.

    told: the last update whose line it got, before a kill perhaps. ValueError, with the command
    that mends it, if the tracker isn't installed.
    """
    run_id = _run_id(folder / "tracker.json", name, keep=told > 0)
    shared = {"project": project, "config": settings, "id": run_id, "resume": "allow"}
    if name == "wandb":
        mode = "offline" if offline else None  # None: as WANDB_MODE says
        run = _import("wandb").init(name=run_name, dir=folder, mode=mode, **shared)
        return Tracker(name, lambda row, step: run.log(row, step=step), run.finish, told)
    if name == "swanlab":
        swanlab = _import("swanlab")
        mode = "offline" if offline else None
        logs = str(folder / "swanlab")
        swanlab.init(experiment_name=run_name, logdir=logs, mode=mode, **shared)
        return Tracker(name, lambda row, step: swanlab.log(row, step=step), swanlab.finish, told)
    if name == "trackio":  # local always; its dashboard is `trackio show`
        trackio = _import("trackio")
        trackio.init(project=project, name=f"{run_name}-{run_id}", config=settings, resume="allow")
        return Tracker(name, lambda row, step: trackio.log(row, step=step), trackio.finish, told)
    assert name == "tensorboard", name
    writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(
        str(folder / "tensorboard"), purge_step=first_step + 1 if told else None
    )

    def log_row(row: dict[str, float], step: int) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Tracker(name, log_row, writer.close, told=first_step)  # what was purged is told anew


def _run_id(path: Path, name: str, keep: bool) -> str:
    """The id that the run has had with this tracker; a new one for a run that begins."""
    ids = json.loads(path.read_text(encoding="utf-8")) if keep and path.is_file() else {}
    if name not in ids:
        ids[name] = secrets.token_hex(4)
        path.write_text(json.dumps(ids), encoding="utf-8")
    return ids[name]


def _import(module: str, package: str | None = None):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module
        raise ValueError(
            f"--tracker {package} needs a package that isn't here: pip install {package} ({error})"
        ) from None
