"""What a run tells: progress bar, metrics.jsonl, quarantine.jsonl, curves.png and, if asked, a
tracker."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import TrainConfig
from trainer.curves import draw_curves, read_rows
from trainer.trackers import open_tracker


class Journal:
    """Counts on every process (the sums it is given are global), but only the main one writes.

    before: the `state()` of the run that goes on here; None for one that begins.
    """

    def __init__(
        self,
        config: TrainConfig,
        active: bool,
        first_step: int,
        total_steps: int,
        before: dict[str, Any] | None = None,
    ):
        self.config, self.active = config, active
        self.folder = Path(config.out_dir) / config.run_name
        self.metrics_path = self.folder / "metrics.jsonl"
        self.quarantine_path = self.folder / "quarantine.jsonl"
        self.sums = dict.fromkeys(("loss", "supervised", "real", "padded", "waited"), 0.0)
        self.window_before = self.seconds_before = self.cpu_before = 0.0
        if before:
            self.sums = before["sums"]
            self.window_before = before["window_seconds"]
            self.seconds_before, self.cpu_before = before["seconds"], before["cpu_seconds"]
        self.quarantined: set[tuple] = set()
        self.tracker = None
        if active:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"--out_dir {config.out_dir}: {self.folder} can't be made ({error.strerror}); "
                    "give a folder that may be written"
                ) from None
            told = self._take_up(first_step)
            name = "wandb" if config.use_wandb else config.tracker
            if name != "none":
                self.tracker = open_tracker(
                    name,
                    self.folder,
                    config.run_name,
                    config.wandb_project,
                    dataclasses.asdict(config),
                    config.tracker_offline,
                    first_step,
                    told,
                )
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=config.run_name,
            disable=not active,
            mininterval=1,
        )
        self.started, self.cpu_started = time.perf_counter(), cpu_seconds()
        self.open_window()

    def _take_up(self, first_step: int) -> int:
        """Keeps what the updates before `first_step` wrote; returns the last update that any line
        was about, 0 if the run begins.

        An interrupted run may have logged more updates than its last checkpoint holds; those are
        trained again, so their lines go.
        """
        told = 0
        for path in (self.metrics_path, self.quarantine_path):
            rows = read_rows(path)
            told = max([told, *(row.get("step", 0) for row in rows)])
            # An undecodable file is met again where it was met first: its line may stand.
            kept = [row for row in rows if first_step and row.get("step", 0) <= first_step]
            _rewrite(path, kept)
            if path == self.quarantine_path:
                self.quarantined = {_key(record) for record in kept}
        return told if first_step else 0

    def open_window(self) -> None:
        """The time of a validation or a save isn't taken for training time."""
        self.window_began = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """What the journal of a resumed run has to know, in the middle of a window too."""
        return {
            "sums": dict(self.sums),
            "window_seconds": self._window_seconds() if any(self.sums.values()) else 0.0,
            "seconds": self._seconds(),
            "cpu_seconds": self._cpu_seconds(),
        }

    def sync(self) -> None:
        """Has the lines on the disk before a state that relies on them."""
        for path in (self.metrics_path, self.quarantine_path):
            if self.active and path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def count(self, **values: float) -> None:
        """One update's sums of loss, tokens (supervised, real, with padding), seconds waited."""
        for name, value in values.items():
            self.sums[name] += value
        self.bar.update()

    def figures(self) -> dict[str, float]:
        """Means over the window: the updates since the last line."""
        seconds, sums = self._window_seconds(), self.sums
        return {
            "loss": sums["loss"] / max(1, sums["supervised"]),
            "tokens_per_second": sums["real"] / seconds,
            "padding": 1 - sums["real"] / max(1, sums["padded"]),
            "data_wait": sums["waited"] / seconds,
        }

    def log(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the row with the run's time so far (resumed: in all), and returns it. A new
        window begins."""
        row = {**row, "seconds": self._seconds(), "cpu_seconds": self._cpu_seconds()}
        # JSON has no NaN, and float16's scaler meets infinite gradients by design.
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        if self.active:
            _append(self.metrics_path, [row])
        if self.tracker:
            self.tracker.log(row)
        waiting = f", {row['data_wait']:.0%} waiting for data"
        self.bar.set_postfix_str(losses_of(row) + waiting, refresh=False)
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.window_before = 0.0
        return row

    def draw(self) -> None:
        """Draws the curves anew."""
        if self.active:
            rows = read_rows(self.metrics_path)
            draw_curves({self.config.run_name: rows}, self.folder / "curves.png")

    def quarantine(self, bad: list[dict[str, Any]]) -> None:
        """Names each undecodable sample once, however many epochs meet it."""
        fresh = {_key(record): record for record in bad if _key(record) not in self.quarantined}
        if self.active and fresh:
            _append(self.quarantine_path, fresh.values())
        self.quarantined.update(fresh)

    def close(self) -> None:
        self.bar.close()
        if self.tracker:
            self.tracker.finish()

    def _window_seconds(self) -> float:
        return self.window_before + time.perf_counter() - self.window_began

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _cpu_seconds(self) -> float:
        return self.cpu_before + cpu_seconds() - self.cpu_started


def losses_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", "val_loss") if row.get(name))


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children (loader workers count once they end)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One write: a kill leaves all of the lines or a cut one, which the next start removes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:  # a full disk doesn't say for which file
        raise OSError(error.errno, error.strerror, str(path)) from None


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    _append(temporary, rows)
    os.replace(temporary, path)


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record.get(name) for name in ("file", "line", "id", "path"))
