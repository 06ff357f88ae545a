"""Training settings: a dataclass whose fields are the command line's flags.

A field carries its help text, so the flag, its default and its reason stand on one line.
"""

import argparse
import dataclasses
import types
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


def flag(default: Any, help: str, **about: Any) -> Any:
    """A field that becomes a flag. Its value shapes the result, so a resumed run must share it."""
    return dataclasses.field(default=default, metadata={"help": help, **about})


def side_flag(default: Any, help: str) -> Any:
    """A flag that may change when a run is resumed: where things lie, how often is logged."""
    return flag(default, help, side=True)


@dataclass
class TrainConfig:
    """What the engine needs to know. What is trained on what stands in the stage's own config."""

    out_dir: str = side_flag("out", "folder of weights and run folders")
    run_name: str = side_flag("run", "OUT_DIR/RUN_NAME.pth are the weights, OUT_DIR/RUN_NAME logs")
    epochs: int = flag(1, "passes over the training data")
    max_steps: int = flag(0, "stop after so many updates; 0: after the last epoch")
    batch_size: int = flag(16, "rows a process and micro-batch")
    accumulation_steps: int = flag(1, "micro-batches an update")
    optimizer: Literal["adamw", "muon"] = flag("adamw", "muon: it takes the hidden matrices only")
    learning_rate: float = flag(4e-4, "peak rate of AdamW")
    muon_learning_rate: float = flag(0.02, "peak rate of Muon")
    schedule: Literal["cosine", "linear"] = flag("cosine", "how the rates fall to 0 after warm-up")
    warmup_iters: int = flag(0, "updates over which the rates rise to their peak")
    weight_decay: float = flag(0.01, "decoupled decay of tensors of two or more dimensions")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "autocast of the forward; auto: what the device is fastest in"
    )
    device: str = side_flag("auto", "auto, cpu, cuda, cuda:1, ...")
    num_workers: int = side_flag(1, "processes that load data; 0: load in the training process")
    seed: int = flag(42, "of weights, data order and dropout")
    log_interval: int = side_flag(10, "updates between lines of metrics.jsonl")
    eval_interval: int = side_flag(0, "updates between validations; 0: at the end only")
    save_interval: int = side_flag(0, "updates between checkpoints; 0: at the end only")
    max_bad: float = side_flag(0.05, "stop when a larger share of the samples can't be decoded")
    use_wandb: bool = side_flag(False, "log to Weights & Biases too (WANDB_MODE=offline works)")
    wandb_project: str = side_flag("Cinego", "its project name")
    resume: str = side_flag("auto", "auto: go on from the run's state.pt; never; or a state file")

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, one sentence each."""
        at_least = {
            1: ("epochs", "batch_size", "accumulation_steps", "log_interval"),
            0: ("max_steps", "warmup_iters", "weight_decay", "grad_clip", "num_workers", "seed")
            + ("eval_interval", "save_interval", "max_bad"),
        }
        found = [
            f"--{name} is {getattr(self, name)}: give {low} or more"
            for low, names in at_least.items()
            for name in names
            if not getattr(self, name) >= low  # so written, NaN is a problem too
        ]
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"--{name} is {getattr(self, name)}: give a positive number")
        if not self.run_name or "/" in self.run_name or self.run_name in (".", ".."):
            found.append(f"--run_name is {self.run_name!r}: give a plain file name")
        return found

    def validate(self) -> None:
        """Raises ValueError that lists all problems at once."""
        if found := self.problems():
            raise ValueError("\n".join(found))

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it continues."""
        fields = [f for f in dataclasses.fields(self) if not f.metadata.get("side")]
        return {f.name: getattr(self, f.name) for f in fields}


def add_arguments(parser: argparse.ArgumentParser, cls: type, **defaults: Any) -> None:
    """One flag a field of the dataclass `cls`; `defaults` replace the fields' own."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = defaults.get(field.name, field.default)
        options = {"default": default, "help": field.metadata["help"] + " (default: %(default)s)"}
        hint = hints[field.name]
        if get_origin(hint) is types.UnionType:  # `str | None`: None is only the default
            hint = get_args(hint)[0]
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is Literal:
            options |= {"choices": get_args(hint), "type": type(get_args(hint)[0])}
        elif get_origin(hint) is list:
            options |= {"nargs": "+", "type": get_args(hint)[0]}
        else:
            options["type"] = hint
        parser.add_argument(f"--{field.name}", **options)


def parse(
    cls: type, description: str | None = None, argv: list[str] | None = None, **defaults: Any
):
    """Command line → validated config; a bad value ends the program with all problems named."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--lr` must not quietly mean something
    )
    add_arguments(parser, cls, **defaults)
    config = cls(**vars(parser.parse_args(argv)))
    try:
        config.validate()
    except ValueError as error:
        parser.error(str(error))
    return config
