"""Settings of the training loop: flags of both stages' command lines."""

import dataclasses
import os
from argparse import ArgumentTypeError
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from cli import Flags, flag

# May change when a run is resumed: where things lie, how often is logged.
run_flag = partial(flag, scope="run")


class Workers(int):
    """A number, or "auto": a core each, where one is left for the training process; at most 8.
    argparse.ArgumentTypeError for another word."""

    def __new__(cls, text: int | str) -> "Workers":
        if text == "auto":
            usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
            cores = len(usable) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            text = min(max(1, cores - 1), 8)
        try:
            return super().__new__(cls, text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


@dataclass
class OptimFlags(Flags):
    """Optimization"""

    epochs: int = flag(1, "passes over the training data", at_least=1)
    max_steps: int = flag(0, "stop after so many steps; 0: after the last epoch", at_least=0)
    batch_size: int = flag(16, "rows of a micro-batch of one process", at_least=1)
    tokens_per_batch: int = flag(
        0, "about so many tokens in a micro-batch instead of --batch_size; 0: rows", at_least=0
    )
    accumulation_steps: int = flag(1, "micro-batches of an optimizer step", at_least=1)
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "muon: Muon for the hidden matrices, AdamW for the rest"
    )
    learning_rate: float = flag(4e-4, "peak learning rate of AdamW", at_least=0)
    projector_learning_rate: float = flag(
        0.0, "peak learning rate of projector and summary; 0: --learning_rate", at_least=0
    )
    muon_learning_rate: float = flag(0.02, "peak learning rate of Muon", at_least=0)
    schedule: Literal["cosine", "linear"] = flag("cosine", "decay to 0 after the warm-up")
    warmup_iters: int = flag(0, "steps of linear warm-up to the peak learning rate", at_least=0)
    weight_decay: float = flag(
        0.01, "decoupled weight decay of tensors of two or more dimensions", at_least=0
    )
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping", at_least=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "autocast of the forward; auto: what the device is fastest in"
    )
    seed: int = flag(42, "of weights, data order and dropout", at_least=0)
    patience: int = flag(
        0,
        "stop after so many validations without a lower val_loss, keep the best; 0: never",
        at_least=0,
    )


@dataclass
class RunFlags(Flags):
    """Run, checkpoints and logs"""

    out_dir: str = run_flag("out", "folder of weights and run folders", "--save_dir")
    run_name: str = run_flag("run", "weights: OUT_DIR/RUN_NAME.pth; run folder: OUT_DIR/RUN_NAME")
    resume: Literal["auto", "never"] = run_flag("auto", "auto: from the run's last state")
    log_interval: int = run_flag(10, "steps between lines of metrics.jsonl", at_least=1)
    eval_interval: int = run_flag(0, "steps between validations; 0: at the end only", at_least=0)
    save_interval: int = run_flag(500, "steps between checkpoints; 0: at the end only", at_least=0)
    keep_last: int = run_flag(
        2, "newest states kept; a damaged one falls back to the one before", at_least=1
    )
    max_skipped_fraction: float = run_flag(
        0.05,
        "stop when a larger fraction of the samples can't be decoded",
        "--max_bad",
        at_least=0,
    )
    tracker: Literal["none", "wandb", "swanlab", "trackio"] = run_flag(
        "none", "experiment tracker to log to as well"
    )
    use_wandb: bool = run_flag(False, "the same as --tracker wandb")
    wandb_project: str = run_flag("Cinego", "the tracker's name of the project")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", scope="process")
    num_workers: Workers = flag(
        "auto",
        "processes that load data; 0: the training process does; auto: one a core but one, 1 to 8",
        scope="process",
        at_least=0,
    )
    timeout: int = run_flag(
        900, "seconds that a process waits for another before it gives up", at_least=1
    )


@dataclass
class TrainConfig(OptimFlags, RunFlags):
    """What the training loop needs to know; model and data have their own flags."""

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it continues."""
        return self._of_scope("result")

    def shared(self) -> dict[str, Any]:
        """The settings that all processes of a run must share."""
        return self._of_scope("result", "run")

    def _of_scope(self, *scopes: str) -> dict[str, Any]:
        fields = [f for f in dataclasses.fields(self) if f.metadata["scope"] in scopes]
        return {f.name: getattr(self, f.name) for f in fields}
