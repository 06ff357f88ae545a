"""Flags: what a command line or a YAML file gives, and what is said about a wrong one."""

from dataclasses import dataclass
from typing import Literal

import pytest

from cli import Flags, FrameFlags, flag, parse_flags


@dataclass
class RunFlags(Flags):
    """Run"""

    epochs: int = flag(1, "passes over the data", at_least=1)
    optimizer: Literal["adamw", "muon"] = flag("adamw", "which optimizer")
    freeze: Literal[0, 1, 2] = flag(0, "how much is frozen")
    out_dir: str = flag("out", "folder to write", "--save_dir")


@dataclass
class ScriptFlags(FrameFlags, RunFlags):
    """Script"""

    files: list[str] = flag([], "files to read")
    rate: float | None = flag(None, "learning rate; none: no learning")
    shared: bool = flag(True, "share rows")
    log: bool = flag(False, "log elsewhere too")


def parse(line="", **defaults):
    return parse_flags(ScriptFlags, "What it does.", line.split(), **defaults)


def refusal(line, **defaults):
    with pytest.raises(ValueError) as failure:
        parse(line, **defaults)
    return str(failure.value)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("", {"epochs": 1, "files": [], "rate": None, "shared": True, "log": False, "fps": None}),
        ("--epochs 2 --rate 1e-3 --freeze 2", {"epochs": 2, "rate": 1e-3, "freeze": 2}),
        ("--files a b --optimizer=muon", {"files": ["a", "b"], "optimizer": "muon"}),
        ("--no-shared --log", {"shared": False, "log": True}),
        ("--shared --no-log --log 1", {"shared": True, "log": True}),
        ("--save_dir there --num-frames 3", {"out_dir": "there", "num_frames": 3}),
    ],
)
def test_values_of_a_command_line(line, values):
    given = vars(parse(line))
    assert {name: given[name] for name in values} == values


def test_defaults_of_a_script_replace_those_of_the_fields():
    assert parse(epochs=7).epochs == 7 and parse("--epochs 2", epochs=7).epochs == 2


def test_a_config_file_gives_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "# comment\nepochs: 3\nrate: 1e-3\nshared: false\nfiles: [a, b]\nsave_dir: x\nnum_frames:\n"
    )
    given = parse(f"--config {file} --epochs 2 --files c")
    assert (given.epochs, given.rate, given.shared) == (2, 1e-3, False)
    assert (given.files, given.out_dir, given.num_frames) == (["c"], "x", 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epoch: 3\nhalp: 1",
            "{}: unknown flag --epoch; did you mean --epochs?\nunknown flag --halp",
        ),
        ("epochs: many", "{}: argument --epochs: invalid int value: 'many'"),
        ("optimizer: sgd", "{}: argument --optimizer: invalid choice: 'sgd'"),
        ("help: 1", "{}: argument -h/--help: ignored explicit argument '1'"),
        ("shared: [1, 2]", "{}: '2' belongs to no flag"),
        ("epochs: 0", "--epochs is 0: give 1 or more"),
        ("- epochs", "{}: write one `flag: value` a line"),
        ("a: [", "{}: not YAML"),
        (None, "{}: can't be read"),
    ],
)
def test_a_mistake_in_a_config_file_is_named_with_the_file(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    assert message.format(f"--config {file}") in refusal(f"--config {file}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epoch 3", "unknown flag --epoch; did you mean --epochs?\n'3' belongs to no flag"),
        ("--zzz", "unknown flag --zzz"),
        ("--epochs x", "argument --epochs: invalid int value: 'x'"),
        ("--freeze 3", "argument --freeze: invalid choice: '3'"),
        ("--epochs 0 --fps 2", "--epochs is 0: give 1 or more\n--sampling fps and --fps above 0"),
        ("--sampling fps --fps nan", "--sampling fps and --fps above 0 go together"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(line, message):
    assert message in refusal(line)


def test_help_has_a_heading_for_each_group_and_shows_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help", epochs=7)
    text = " ".join(capsys.readouterr().out.split())
    headings = ["What it does.", "Script:", "Frames:", "Run:"]
    assert sorted(headings, key=text.index) == headings
    assert "--epochs INT passes over the data (default: 7)" in text
    assert "--shared, --no-shared share rows (default: True)" in text
    assert "--freeze {0,1,2}" in text and "save_dir" not in text and "num-frames" not in text
