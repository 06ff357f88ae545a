"""What a run reports: progress bar, metrics.jsonl, quarantine.jsonl, curves.png and, if asked, an
experiment tracker."""

import dataclasses
import importlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from files import whole_file
from trainer.config import TrainConfig
from trainer.distributed import World


class MetricsLogger:
    """Counts on every process, but only the main one writes.

    A run that resumes after `first_step` keeps the lines up to there. tracker_id: the run's own at
    the tracker, so that it continues the same curve. Raises OSError where a line can't be written,
    ValueError if the tracker isn't installed.
    """

    def __init__(
        self, config: TrainConfig, world: World, first_step: int, total_steps: int, tracker_id: str
    ):
        self.config, self.world = config, world
        self.folder = Path(config.out_dir) / config.run_name
        self.metrics_path = self.folder / "metrics.jsonl"
        self.quarantine_path = self.folder / "quarantine.jsonl"
        self.quarantined: set[tuple] = set()
        self.tracked_step = 0  # the last one whose line the tracker has
        self.tracker = None
        now, cpu_now = time.perf_counter(), cpu_seconds()
        if world.is_main:
            last = self._truncate_for_resume(first_step)
            now, cpu_now = now - last.get("seconds", 0), cpu_now - last.get("cpu_seconds", 0)
            name = "wandb" if config.use_wandb else config.tracker
            if name != "none":
                self.tracker = open_tracker(name, self.folder, config, tracker_id)
        self.started, self.cpu_started = now, cpu_now
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=config.run_name,
            disable=not world.is_main,
            mininterval=1,
        )
        self.restart_window()

    def _truncate_for_resume(self, first_step: int) -> dict[str, Any]:
        """Drops what was written after `first_step`: those steps are trained again. Returns the
        last line of metrics that stays."""
        metrics = read_rows(self.metrics_path)
        if first_step:
            self.tracked_step = max((row["step"] for row in metrics), default=0)
        metrics = [row for row in metrics if row["step"] <= first_step]
        bad = read_rows(self.quarantine_path) if first_step else []
        self.quarantined = {_key(record) for record in bad}
        for path, rows in ((self.metrics_path, metrics), (self.quarantine_path, bad)):
            if path.is_file():
                with whole_file(path) as file:
                    file.write(_as_lines(rows))
        return metrics[-1] if metrics else {}

    def restart_window(self) -> None:
        """Starts the next line's window. A validation or a save isn't taken for training time."""
        self.sums = dict.fromkeys(("loss", "supervised", "real", "padded", "waited"), 0.0)
        self.window_started = time.perf_counter()

    def count_step(self, stats: Any, waited: float) -> None:
        """Adds one step's StepStats and the seconds that it waited for data."""
        self.sums["loss"] = self.sums["loss"] + sum(stats.losses)  # stays on the device
        for name in ("supervised", "real", "padded"):
            self.sums[name] += getattr(stats, name)
        self.sums["waited"] += waited
        self.bar.update()

    def window_means(self) -> dict[str, float]:
        """Means over the window: the steps since the last line, or since the run was resumed."""
        (loss,) = self.world.all_reduce_sum(float(self.sums["loss"]))
        seconds, sums = time.perf_counter() - self.window_started, self.sums
        return {
            "loss": loss / max(1, sums["supervised"]),
            "tokens_per_second": sums["real"] / seconds,
            "padding": 1 - sums["real"] / max(1, sums["padded"]),
            "data_wait": sums["waited"] / seconds,
        }

    def log(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the row with the run's time up to it (resumed: in all), and returns it."""
        row["seconds"] = time.perf_counter() - self.started
        row["cpu_seconds"] = cpu_seconds() - self.cpu_started
        # JSON has no NaN, and float16's scaler meets infinite gradients by design.
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        if self.world.is_main:
            _append(self.metrics_path, [row])
        if self.tracker and row["step"] > self.tracked_step:
            try:
                known = {name: value for name, value in row.items() if value is not None}
                self.tracker.log(known, step=row["step"])
            except Exception as error:  # metrics.jsonl has the line, and a server may well be down
                message = f"the tracker failed and is left out from here: {error!r}"
                warnings.warn(message, stacklevel=2)
                self.tracker = None
        waiting = f", {row['data_wait']:.0%} waiting for data"
        self.bar.set_postfix_str(format_losses(row) + waiting, refresh=False)
        return row

    def log_bad_samples(self, bad: list[dict[str, Any]]) -> None:
        """Names each undecodable sample of all processes once, however many epochs meet it."""
        bad = self.world.gather_objects(bad)
        fresh = {_key(record): record for record in bad if _key(record) not in self.quarantined}
        if self.world.is_main and fresh:
            _append(self.quarantine_path, fresh.values())
        self.quarantined.update(fresh)

    def draw_curves(self) -> None:
        """Draws the losses so far to curves.png."""
        if self.world.is_main:
            rows = read_rows(self.metrics_path)
            draw_curves({self.config.run_name: rows}, self.folder / "curves.png")

    def close(self, progress: Any, weights_path: Path) -> None:
        """Ends the bar and the tracker's run, and prints what came out."""
        self.bar.close()
        if self.tracker:
            self.tracker.finish()
        name, best = self.config.run_name, progress.best_step if self.config.patience else 0
        if progress.step < self.bar.total:
            self.world.print_rank0(
                f"{name}: stopped, {progress.validations_since_best} validations without a "
                f"val_loss under {progress.best_loss:.4f}"
            )
        of = f" of step {best}" if best else ""
        where = f"; weights{of} in {weights_path}" if weights_path.is_file() else ""  # or a dry run
        self.world.print_rank0(f"{name}: {format_losses(progress.metrics)}{where}")


def open_tracker(name: str, folder: Path, config: TrainConfig, run_id: str) -> ModuleType:
    """The tracker's module with the run open: `log` and `finish` are the same for all of them.

    Raises ValueError, with the command that fixes it, if it isn't installed.
    """
    try:
        tracker = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"--tracker {name} needs a package that isn't here: pip install {name} ({error})"
        ) from None
    run = config.run_name
    own = {
        "wandb": {"name": run, "id": run_id, "dir": folder},
        "swanlab": {"experiment_name": run, "id": run_id, "logdir": f"{folder}/swanlab"},
        "trackio": {"name": f"{run}-{run_id}"},
    }
    settings = dataclasses.asdict(config)
    tracker.init(project=config.wandb_project, config=settings, resume="allow", **own[name])
    return tracker


def format_losses(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", "val_loss") if row.get(name))


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children (loader workers count once they end)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl that training wrote; a last one cut off by a kill is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def draw_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel a run, losses over steps, as PNG."""
    from matplotlib.figure import Figure  # slow to import; not pyplot: no window, no global state

    figure = Figure(figsize=(5.5 * len(curves), 3.6), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)
    for axis, (run, rows) in zip(axes[0], curves.items(), strict=True):
        for key, style in (("loss", {"linewidth": 1}), ("val_loss", {"marker": "o"})):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, **style)
        axis.set(title=run, xlabel="step", ylabel="loss a token")
        if axis.lines:
            axis.legend()
    with whole_file(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One write: a kill leaves all of the lines or a cut one, which the next start removes."""
    try:
        with path.open("ab") as file:
            file.write(_as_lines(rows))
    except OSError as error:  # a full disk doesn't say for which file
        raise OSError(error.errno, error.strerror, str(path)) from None


def _as_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record.get(name) for name in ("file", "line", "id", "path"))
