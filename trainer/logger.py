"""What a run reports: progress bar, metrics.jsonl, quarantine.jsonl, curves.png and, if asked, a
tracker. The curves of several runs beside each other:

    python -m trainer.logger out/sft_videolm_512 out/pretrain_videolm_512 --output curves.png
"""

import argparse
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from files import whole_file
from trainer.config import TrainConfig
from trainer.trackers import open_tracker


class MetricsLogger:
    """Counts on every process (the sums it is given are global), but only the main one writes.

    state: the `state_dict()` of the run that is resumed; None for one that starts. Raises OSError
    where a line can't be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        is_main: bool,
        first_step: int,
        total_steps: int,
        state: dict[str, Any] | None = None,
    ):
        self.config, self.is_main = config, is_main
        self.folder = Path(config.out_dir) / config.run_name
        self.metrics_path = self.folder / "metrics.jsonl"
        self.quarantine_path = self.folder / "quarantine.jsonl"
        self.sums = dict.fromkeys(("loss", "supervised", "real", "padded", "waited"), 0.0)
        self.earlier = dict.fromkeys(("window_seconds", "seconds", "cpu_seconds"), 0.0)
        if state:
            self.sums, self.earlier = dict(state["sums"]), dict(state["earlier"])
        self.quarantined: set[tuple] = set()
        self.tracker = None
        if is_main:
            last_logged = self._truncate_for_resume(first_step)
            name = "wandb" if config.use_wandb else config.tracker
            if name != "none":
                settings = dataclasses.asdict(config)
                self.tracker = open_tracker(name, self.folder, settings, first_step, last_logged)
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=config.run_name,
            disable=not is_main,
            mininterval=1,
        )
        self.started, self.cpu_started = time.perf_counter(), cpu_seconds()
        self.restart_window()

    def _truncate_for_resume(self, first_step: int) -> int:
        """Keeps what the steps before `first_step` wrote; returns the last step that any line was
        about, 0 if the run starts.

        An interrupted run may have logged more steps than its last checkpoint holds; those are
        trained again, so their lines go.
        """
        last_logged = 0
        for path in (self.metrics_path, self.quarantine_path):
            rows = read_rows(path)
            last_logged = max([last_logged, *(row.get("step", 0) for row in rows)])
            # An undecodable file is met again where it was met first: its line may stand.
            kept = [row for row in rows if first_step and row.get("step", 0) <= first_step]
            if path == self.quarantine_path:
                self.quarantined = {_key(record) for record in kept}
            if kept:
                with whole_file(path) as file:
                    file.write(_as_lines(kept))
            else:
                path.unlink(missing_ok=True)
        return last_logged if first_step else 0

    def restart_window(self) -> None:
        """The time of a validation or a save isn't taken for training time."""
        self.window_started = time.perf_counter()

    def count_step(self, stats: Any, waited: float) -> None:
        """Adds one step's StepStats and the seconds that it waited for data."""
        self.sums["loss"] += stats.loss * stats.supervised
        for name in ("supervised", "real", "padded"):
            self.sums[name] += getattr(stats, name)
        self.sums["waited"] += waited
        self.bar.update()

    def window_means(self) -> dict[str, float]:
        """Means over the window: the steps since the last line."""
        seconds, sums = self._elapsed()["window_seconds"], self.sums
        return {
            "loss": sums["loss"] / max(1, sums["supervised"]),
            "tokens_per_second": sums["real"] / seconds,
            "padding": 1 - sums["real"] / max(1, sums["padded"]),
            "data_wait": sums["waited"] / seconds,
        }

    def log(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the row with the run's time so far (resumed: in all), and returns it. A new
        window starts."""
        elapsed = self._elapsed()
        row = {**row, "seconds": elapsed["seconds"], "cpu_seconds": elapsed["cpu_seconds"]}
        # JSON has no NaN, and float16's scaler meets infinite gradients by design.
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        if self.is_main:
            _append(self.metrics_path, [row])
        if self.tracker:
            self.tracker.log(row)
        waiting = f", {row['data_wait']:.0%} waiting for data"
        self.bar.set_postfix_str(format_losses(row) + waiting, refresh=False)
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.earlier["window_seconds"] = 0.0
        return row

    def log_bad_samples(self, bad: list[dict[str, Any]]) -> None:
        """Names each undecodable sample once, however many epochs meet it."""
        fresh = {_key(record): record for record in bad if _key(record) not in self.quarantined}
        if self.is_main and fresh:
            _append(self.quarantine_path, fresh.values())
        self.quarantined.update(fresh)

    def state_dict(self) -> dict[str, Any]:
        """What the logger of a resumed run has to know, in the middle of a window too."""
        elapsed = self._elapsed()
        if not any(self.sums.values()):
            elapsed["window_seconds"] = 0.0
        return {"sums": dict(self.sums), "earlier": elapsed}

    def flush_to_disk(self) -> None:
        """Has the lines on the disk before a state that relies on them."""
        for path in (self.metrics_path, self.quarantine_path):
            if self.is_main and path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def draw_curves(self) -> None:
        if self.is_main:
            rows = read_rows(self.metrics_path)
            draw_curves({self.config.run_name: rows}, self.folder / "curves.png")

    def close(self) -> None:
        self.bar.close()
        if self.tracker:
            self.tracker.finish()

    def _elapsed(self) -> dict[str, float]:
        now = time.perf_counter()
        since = {"window_seconds": now - self.window_started, "seconds": now - self.started}
        since["cpu_seconds"] = cpu_seconds() - self.cpu_started
        return {name: value + self.earlier[name] for name, value in since.items()}


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
    """One panel a run, losses over steps, as PNG; replaced at once, so a viewer never meets half
    a picture."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of runs beside each other.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    draw_curves({run.name: read_rows(run / "metrics.jsonl") for run in args.runs}, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
