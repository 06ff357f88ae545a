"""Training settings: a dataclass whose fields are the command line's flags.

A field carries its help text, so the flag, its default and its reason stand on one line. The same
names are the keys of a YAML file that `--config` reads; what stands on the command line wins.
"""

import argparse
import dataclasses
import difflib
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml


def flag(default: Any, help: str, **about: Any) -> Any:
    """A field that becomes a flag. Its value shapes the result, so a resumed run must share it."""
    return dataclasses.field(default=default, metadata={"help": help, **about})


def side_flag(default: Any, help: str, **about: Any) -> Any:
    """A flag that may change when a run is resumed: where things lie, how often is logged."""
    return flag(default, help, side=True, **about)


def local_flag(default: Any, help: str) -> Any:
    """A side flag that may differ from process to process, as each machine has its own folders."""
    return side_flag(default, help, local=True)


@dataclass
class TrainConfig:
    """What the engine needs to know. What is trained on what stands in the stage's own config."""

    out_dir: str = side_flag("out", "folder of weights and run folders", also="save_dir")
    run_name: str = side_flag("run", "OUT_DIR/RUN_NAME.pth are the weights, OUT_DIR/RUN_NAME logs")
    epochs: int = flag(1, "passes over the training data")
    max_steps: int = flag(0, "stop after so many updates; 0: after the last epoch")
    batch_size: int = flag(16, "rows a process and micro-batch")
    tokens_per_batch: int = flag(0, "tokens a process and micro-batch instead, about; 0: rows")
    accumulation_steps: int = flag(1, "micro-batches an update")
    optimizer: Literal["adamw", "muon"] = flag("adamw", "muon: it takes the hidden matrices only")
    learning_rate: float = flag(4e-4, "peak rate of AdamW")
    projector_learning_rate: float = flag(0.0, "the same for projector and summary; 0: no other")
    muon_learning_rate: float = flag(0.02, "peak rate of Muon")
    schedule: Literal["cosine", "linear"] = flag("cosine", "how the rates fall to 0 after warm-up")
    warmup_iters: int = flag(0, "updates over which the rates rise to their peak")
    weight_decay: float = flag(0.01, "decoupled decay of tensors of two or more dimensions")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "autocast of the forward; auto: what the device is fastest in"
    )
    device: str = local_flag("auto", "auto, cpu, cuda, cuda:1, ...")
    num_workers: int = local_flag(1, "processes that load data; 0: load in the training process")
    timeout: int = side_flag(900, "seconds that a process waits for another before it gives up")
    seed: int = flag(42, "of weights, data order and dropout")
    log_interval: int = side_flag(10, "updates between lines of metrics.jsonl")
    patience: int = flag(
        0, "stop after so many validations without a lower val_loss, keep the best; 0: never"
    )
    eval_interval: int = side_flag(0, "updates between validations; 0: at the end only")
    save_interval: int = side_flag(500, "updates between checkpoints; 0: at the end only")
    keep_last: int = side_flag(2, "states kept, the newest; a damaged one falls back to another")
    max_bad: float = side_flag(0.05, "stop when a larger share of the samples can't be decoded")
    tracker: Literal["none", "wandb", "swanlab", "trackio", "tensorboard"] = side_flag(
        "none", "log there too"
    )
    use_wandb: bool = side_flag(False, "the same as --tracker wandb")
    tracker_offline: bool = side_flag(False, "keep its log on this machine, without an account")
    wandb_project: str = side_flag("Cinego", "the tracker's name of the project")
    resume: str = side_flag("auto", "auto: go on from the run's last state; never; or a state file")

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, one sentence each."""
        at_least = {
            1: ("epochs", "batch_size", "accumulation_steps", "log_interval", "timeout")
            + ("keep_last",),
            0: ("max_steps", "warmup_iters", "weight_decay", "grad_clip", "num_workers", "seed")
            + (
                "eval_interval",
                "save_interval",
                "max_bad",
                "tokens_per_batch",
                "patience",
            ),
        }
        found = [
            f"--{name} is {getattr(self, name)}: give {low} or more"
            for low, names in at_least.items()
            for name in names
            if not getattr(self, name) >= low  # so written, NaN is a problem too
        ]
        for name in ("learning_rate", "muon_learning_rate", "projector_learning_rate"):
            none_given = name == "projector_learning_rate" and getattr(self, name) == 0
            if not (0 < getattr(self, name) < float("inf") or none_given):
                found.append(f"--{name} is {getattr(self, name)}: give a positive number")
        if self.patience and not self.eval_interval:
            found.append("--patience counts validations: give --eval_interval too")
        if not self.run_name or "/" in self.run_name or self.run_name in (".", ".."):
            found.append(f"--run_name is {self.run_name!r}: give a plain file name")
        if self.use_wandb and self.tracker not in ("none", "wandb"):
            found.append(f"--use_wandb and --tracker {self.tracker}: give one of them")
        return found

    def validate(self) -> None:
        """Raises ValueError that lists all problems at once."""
        if found := self.problems():
            raise ValueError("\n".join(found))

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the run it continues."""
        return self._without("side")

    def shared(self) -> dict[str, Any]:
        """The settings that all processes of a run must share."""
        return self._without("local")

    def _without(self, mark: str) -> dict[str, Any]:
        fields = [f for f in dataclasses.fields(self) if not f.metadata.get(mark)]
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
        # What MiniMind-V calls it, where that is another name.
        names = [field.name, *filter(None, [field.metadata.get("also")])]
        parser.add_argument(*(f"--{name}" for name in names), dest=field.name, **options)


def read_config(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML file's keys and values as the flags that they stand for, in the file's order.

    They go through the same parser as the command line, so both know the same names, types and
    choices. ValueError names the file, and the nearest name of an unknown key.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: write one `flag: value` a line")
    actions = {name: action for action in parser._actions for name in action.option_strings}
    known = [name[2:] for name in actions if name not in ("--config", "--help", "-h")]
    words = []
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"--config {path}: unknown key {key!r}{nearest(str(key), known)}")
        if isinstance(actions[f"--{key}"], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                raise ValueError(f"--config {path}: {key} is {value!r}; give true or false")
            words.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif value is not None:  # an empty value leaves the default
            words.append(f"--{key}={value}")
    return words


def nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def parse(
    cls: type, description: str | None = None, argv: list[str] | None = None, **defaults: Any
):
    """Command line → validated config; a bad value ends the program with all problems named."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--lr` must not quietly mean something
    )
    parser.add_argument("--config", help="YAML file of `flag: value` lines; flags given here win")
    add_arguments(parser, cls, **defaults)
    argv = sys.argv[1:] if argv is None else argv
    given, unknown = parser.parse_known_args(argv)
    try:
        if unknown:
            names = [name for action in parser._actions for name in action.option_strings]
            hints = [word + nearest(word.split("=")[0], names) for word in unknown]
            raise ValueError("unrecognized arguments: " + ", ".join(hints))
        if given.config:
            given = parser.parse_args(read_config(given.config, parser) + argv)
        del given.config
        config = cls(**vars(given))
        config.validate()
    except ValueError as error:
        parser.error(str(error))
    return config
