"""The quickstart's accountant: what it records, when it skips, and what it does not trust."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Stages:
    def __init__(self, root: Path):
        self.root = root

    def command(self, name: str, code: str) -> list[str]:
        stage = [sys.executable, ROOT / "scripts/run_stage.py", "--dir", self.root, "--name", name]
        stage += ["--makes", self.root / name, "--", sys.executable, "-c", code]
        return [str(part) for part in stage]

    def run(self, name: str, code: str = "") -> int:
        """A stage that adds a line to the file that it makes, then runs `code`."""
        return subprocess.run(self.command(name, self.adding(name) + code)).returncode

    def adding(self, name: str) -> str:
        return f"file = open({str(self.root / name)!r}, 'a'); file.write('x'); file.close()\n"

    def runs(self, name: str) -> int:
        return len((self.root / name).read_text())

    def record(self, name: str) -> dict:
        return json.loads((self.root / "stages.json").read_text())[name]


@pytest.fixture
def stages(tmp_path) -> Stages:
    return Stages(tmp_path)


def test_a_finished_stage_is_not_done_again(stages):
    assert stages.run("a") == 0 and stages.run("a") == 0
    assert stages.runs("a") == 1


def test_what_a_stage_made_is_made_again_if_it_was_deleted(stages):
    stages.run("a")
    (stages.root / "a").unlink()
    stages.run("a")
    assert stages.runs("a") == 1


def test_a_failed_stage_keeps_what_it_made_and_goes_on(stages):
    first_time_only = "import sys; sys.exit(3 if len(open(file.name).read()) == 1 else 0)"
    assert stages.run("a", first_time_only) == 3
    assert stages.record("a")["returncode"] == 3
    assert stages.run("a", first_time_only) == 0
    assert stages.runs("a") == 2  # the second attempt found the first one's file


def test_a_changed_command_starts_afresh_and_so_do_the_stages_after_it(stages):
    for name in ("a", "b"):
        stages.run(name)
    stages.run("a", "pass")
    assert stages.runs("a") == 1  # what the old command made was removed
    stages.run("b")
    assert stages.runs("b") == 1 and not stages.record("b")["stale"]


def test_time_and_memory_are_those_of_the_whole_process_tree(stages):
    work = """
import subprocess, sys, time
child = "import time; block = bytearray(150 << 20); end = time.process_time() + 0.6\\n"
child += "while time.process_time() < end: pass\\ntime.sleep(1)"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    stages.run("a", work)
    record = stages.record("a")
    assert 0.6 <= record["cpu_seconds"] < 5
    assert record["seconds"] >= 1.5
    assert record["peak_memory_mb"] >= 150


def test_an_interrupt_ends_the_command_and_is_recorded(stages):
    code = stages.adding("a") + "import time; time.sleep(60)"
    process = subprocess.Popen(
        stages.command("a", code),
        start_new_session=True,
        # As in a terminal: what runs behind a shell's `&` inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (stages.root / "a").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: the whole group gets it
    assert process.wait(20) != 0
    assert stages.record("a")["returncode"] not in (0, None)


def test_nothing_outside_of_the_folder_is_removed(stages, tmp_path_factory):
    precious = tmp_path_factory.mktemp("elsewhere") / "precious"
    precious.touch()
    command = stages.command("a", "")
    command[command.index("--makes") + 1] = str(precious)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "has to lie inside" in result.stderr
    assert precious.exists()
