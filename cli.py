"""One way to declare, read and check a script's flags, and to end the script.

    @dataclass
    class ExtractFlags(FrameFlags):                     # groups that scripts share: below
        \"\"\"Extraction\"\"\"                              # its heading in --help
        out: str = flag("features", "folder to write", "--output")    # its old name: an alias
    def main(argv: list[str] | None = None) -> None:
        flags = parse_flags(ExtractFlags, __doc__, argv)
    if __name__ == "__main__":
        launch(main)

The types of the fields say what is read: `int`, `float | None`, `Literal["a", "b"]`, `list[str]`;
`bool` gives --name and --no-name. `--config FILE.yaml` reads the same names from a file. What is
wrong ends in one ValueError that names every problem.
"""

import argparse
import copy
import dataclasses
import difflib
import inspect
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml

VISION_PATH = "model/vision_model/clip-vit-base-patch32"
TOKENIZER_PATH = "model/text_tokenizer"
SECONDS_TO_REPORT = 10  # of torchrun's processes: one prints the error that all have


def flag(
    default: Any,
    help: str,
    *aliases: str,
    scope: Literal["result", "run", "process"] = "result",
    at_least: float | None = None,
) -> Any:
    """A dataclass field that becomes the flag `--name`, with its other names in `aliases`.

    scope says who must agree on the value in training. result: it shapes the result, a resumed run
    must share it; run: it may change on resume; process: it may differ even between the processes
    of a run, as each machine has its own folders. at_least: a smaller value is refused.
    """
    marks = {"help": help, "aliases": list(aliases), "scope": scope, "at_least": at_least}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=marks)
    return dataclasses.field(default=default, metadata=marks)


@dataclass
class Flags:
    """What all groups of flags can do. A group extends `problems` with what it refuses."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, one sentence each."""
        return [
            f"--{field.name} is {value}: give {low} or more"
            for field in dataclasses.fields(self)
            if (low := field.metadata.get("at_least")) is not None
            and (value := getattr(self, field.name)) is not None
            and not low <= value < math.inf  # so written, NaN is a problem too
        ]


@dataclass
class FrameFlags(Flags):
    """Frames"""

    num_frames: int | None = flag(8, "frames taken from a video, at most", at_least=1)
    sampling: Literal["uniform", "fps"] | None = flag(
        "uniform", "uniform: num_frames over the whole video; fps: so many a second, up to that"
    )
    fps: float | None = flag(None, "frames a second with --sampling fps")
    resize: Literal["tower", "crop", "squash", "pad"] = flag(
        "tower", "how a frame becomes square; tower: as its preprocessor_config.json says"
    )
    video_backend: Literal["pyav", "decord"] = flag("pyav", "library that decodes videos")

    def problems(self) -> list[str]:
        found = super().problems()
        is_fps, fps = self.sampling == "fps", self.fps
        if is_fps != (fps is not None) or (is_fps and not fps > 0):
            found.append("--sampling fps and --fps above 0 go together")
        return found


def parse_flags(
    cls: type["AnyFlags"],
    description: str | None = None,
    argv: list[str] | None = None,
    **defaults: Any,
) -> "AnyFlags":
    """The command line as a validated `cls`; `defaults` replace those of its fields.

    Flags given in `argv` (default: the process's) win over those of its `--config FILE.yaml`.
    Raises ValueError that names a wrong value, all unknown flags with the nearest known ones, or
    all values that don't go together.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = _build_parser(cls, description)
        parser.set_defaults(**defaults)
        values = _parse(parser, argv, cls)
        if values.config:
            values = _parse(parser, _read_config(values.config, parser, cls) + argv, cls)
        del values.config
        flags = cls(**vars(values))
        if found := flags.problems():
            raise ValueError("\n".join(found))
        return flags
    except ValueError as error:  # the same in all processes
        error.already_reported = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def launch(main: Callable[[], Any]) -> None:
    """Runs a script's `main`; what a user can fix ends it with the message alone.

    Of the processes that torchrun starts, one of a machine prints a message that all have.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if getattr(error, "already_reported", False) and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(SECONDS_TO_REPORT)  # torchrun ends all as soon as one has ended
            raise SystemExit(1) from None
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


AnyFlags = TypeVar("AnyFlags", bound=Flags)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows a flag by the name that it is declared by, not by the other spellings that are read."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.type:
            return super()._format_action_invocation(action)
        if action.const is True:
            return f"--{action.dest}" + f", --no-{action.dest}" * (action.default is True)
        return f"--{action.dest} {self._format_args(action, action.type.__name__.upper())}"


def _build_parser(cls: type[Flags], description: str | None) -> argparse.ArgumentParser:
    # Takes half a second, which spawned workers that only import a script can do without.
    from transformers.hf_argparser import HfArgumentParser

    hints, groups = get_type_hints(cls), {}
    for field in map(copy.copy, dataclasses.fields(cls)):
        help = field.metadata["help"]
        if field.default not in (None, dataclasses.MISSING):
            help += " (default: %(default)s)"
        field.metadata = {"help": help, "aliases": field.metadata["aliases"]}
        owner = next(base for base in cls.__mro__ if field.name in inspect.get_annotations(base))
        groups.setdefault(owner, []).append((field.name, hints[field.name], field))
    # One heading in --help for each class that declares flags, the script's own before shared ones.
    headed = [
        dataclasses.make_dataclass(
            owner.__name__,
            groups[owner],
            namespace={"_argument_group_name": inspect.getdoc(owner).splitlines()[0]},
        )
        for owner in cls.__mro__
        if owner in groups
    ]
    parser = HfArgumentParser(
        headed,
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,  # `--lr` must not quietly mean something
        conflict_handler="resolve",
    )
    for name in (name for name in hints if hints[name] is bool):
        spellings = {f"--no-{name}", f"--no_{name}", f"--no-{name.replace('_', '-')}"}
        parser.add_argument(*spellings, action="store_false", dest=name, help=argparse.SUPPRESS)
    parser.add_argument("--config", help="YAML file of `flag: value` lines; the command line wins")

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse  # argparse's own prints the usage of all flags, then exits
    return parser


def _parse(parser: argparse.ArgumentParser, words: list[str], cls: type[Flags]):
    """argparse's namespace. Raises ValueError that names a wrong value, or all unknown flags."""
    values, unknown = parser.parse_known_args(words)
    if unknown:
        raise ValueError("\n".join(_unknown_flag(word, cls) for word in unknown))
    return values


def _read_config(path: str, parser: argparse.ArgumentParser, cls: type[Flags]) -> list[str]:
    """A YAML file's keys and values as the words of a command line, in the file's order.

    They go through the same parser as the command line, so both know the same names, types and
    choices. Raises ValueError that names the file as well.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("write one `flag: value` a line")
        words = []
        for key, value in values.items():
            if isinstance(value, list):
                words += [f"--{key}", *map(str, value)]
            elif value is not None:  # an empty value leaves the default
                words.append(f"--{key}={value}")
        _parse(parser, words, cls)
        return words
    except OSError as error:
        raise ValueError(f"--config {path}: can't be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None


def _unknown_flag(word: str, cls: type[Flags]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag"
    name, fields = word.split("=")[0], dataclasses.fields(cls)
    known = [f"--{field.name}" for field in fields]
    known += [alias for field in fields for alias in field.metadata["aliases"]]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown flag {name}" + (f"; did you mean {nearest[0]}?" if nearest else "")
