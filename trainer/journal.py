"""What a run tells: progress bar, metrics.jsonl, quarantine.jsonl and, if asked, wandb."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config import TrainConfig


class Journal:
    """Counts on every process (the sums it is given are global), but only the main one writes."""

    def __init__(self, config: TrainConfig, active: bool, first_step: int, total_steps: int):
        self.active = active
        self.folder = Path(config.out_dir) / config.run_name
        self.metrics_path = self.folder / "metrics.jsonl"
        self.quarantine_path = self.folder / "quarantine.jsonl"
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=config.run_name,
            disable=not active,
            mininterval=1,
        )
        self.wandb = None
        self.quarantined: set[tuple] = set()
        self.seconds_before = self.cpu_before = 0.0
        if active:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_up(first_step)
            if config.use_wandb:
                self.wandb = _start_wandb(config, self.folder)
        self.started, self.cpu_started = time.perf_counter(), cpu_seconds()
        self.open_window()

    def _take_up(self, first_step: int) -> None:
        """Keeps what the updates before `first_step` wrote.

        An interrupted run may have logged more updates than its last checkpoint holds; those are
        trained again, so their lines go.
        """
        rows = [row for row in _rows(self.metrics_path) if row["step"] <= first_step]
        rows = rows if first_step else []
        self.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if rows:
            self.seconds_before, self.cpu_before = rows[-1]["seconds"], rows[-1]["cpu_seconds"]
        if first_step:
            self.quarantined = {_key(record) for record in _rows(self.quarantine_path)}
        else:
            self.quarantine_path.unlink(missing_ok=True)

    def open_window(self) -> None:
        """A line of metrics covers the updates of its window; it starts anew after each line, so
        that the time of a validation or a save isn't taken for training time."""
        self.window_began = time.perf_counter()
        self.sums = dict.fromkeys(("loss", "supervised", "real", "padded", "waited"), 0.0)

    def count(self, **values: float) -> None:
        """One update's sums of loss, tokens (supervised, real, with padding), seconds waited."""
        for name, value in values.items():
            self.sums[name] += value
        self.bar.update()

    def figures(self) -> dict[str, float]:
        """Means over the window."""
        seconds, sums = time.perf_counter() - self.window_began, self.sums
        return {
            "loss": sums["loss"] / max(1, sums["supervised"]),
            "tokens_per_second": sums["real"] / seconds,
            "padding": 1 - sums["real"] / max(1, sums["padded"]),
            "data_wait": sums["waited"] / seconds,
        }

    def log(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the row with the run's time so far (resumed: in all), and returns it."""
        row = {
            **row,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            "cpu_seconds": self.cpu_before + cpu_seconds() - self.cpu_started,
        }
        # JSON has no NaN, and float16's scaler meets infinite gradients by design.
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        if self.active:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        self.bar.set_postfix_str(losses_of(row), refresh=False)
        return row

    def quarantine(self, bad: list[dict[str, Any]]) -> None:
        """Names each undecodable sample once, however many epochs meet it."""
        fresh = {_key(record): record for record in bad if _key(record) not in self.quarantined}
        if self.active and fresh:
            with self.quarantine_path.open("a", encoding="utf-8") as file:
                for record in fresh.values():
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.quarantined.update(fresh)

    def close(self) -> None:
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


def losses_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]:.4f}" for name in ("loss", "val_loss") if row.get(name))


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children (loader workers count once they end)."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _start_wandb(config: TrainConfig, folder: Path):
    import wandb  # slow to import, and optional

    settings = dataclasses.asdict(config)
    return wandb.init(
        project=config.wandb_project, name=config.run_name, config=settings, dir=folder
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record.get(name) for name in ("file", "line", "id", "path"))
