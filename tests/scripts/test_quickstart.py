"""What quickstart.sh does again and what it doesn't, with a stand-in for Python that only makes the
files that each stage makes."""

import json
import shutil
from pathlib import Path

import pytest

from tests.commands import ROOT, run

SCRIPTS = ROOT / "scripts"
PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
fails=false
case "$*" in *${FAILS:-nothing}*) fails=true ;; esac
while [ $# -gt 1 ]; do
    case "$1" in
    --out | --features_path) mkdir -p "$2" ;;
    --output) touch "$2" ;;
    --run_name)
        mkdir -p out/quickstart/$2
        echo x >>out/quickstart/$2/metrics
        $fails || touch out/quickstart/$2.pth
        ;;
    esac
    shift
done
$fails && exit 3 || exit 0
"""


class Repository:
    def __init__(self, root: Path):
        self.root, self.quickstart = root, root / "scripts/quickstart.sh"
        self.quickstart.parent.mkdir()
        for name in ("quickstart.sh", "env.sh"):
            shutil.copy(SCRIPTS / name, self.quickstart.parent)
        for name in ("constraints.txt", "requirements.txt", "requirements-serve.txt"):
            (root / name).write_text("torch\n")
        python = root / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)

    def run(self, code: int = 0, **environment: str) -> list[str]:
        """The stages' scripts that were called, in order."""
        (self.root / "calls").write_text("")
        run("bash", self.quickstart, code=code, **environment)
        calls = (self.root / "calls").read_text().splitlines()
        return [call.removeprefix("-m ").split()[0] for call in calls if "pip" not in call]


@pytest.fixture
def repository(tmp_path) -> Repository:
    return Repository(tmp_path)


STAGES = ["demo.world"] * 3 + ["extract_features.py"] * 2
STAGES += ["train_pretrain.py", "train_sft.py", "eval.py"]
ALWAYS = ["demo.report", "eval.py"]


def test_a_second_run_only_reports_and_chats(repository):
    assert repository.run() == STAGES + ALWAYS
    cost = json.loads((repository.root / "out/quickstart/stages/sft.json").read_text())
    assert set(cost) == {"seconds", "user", "system"}
    assert repository.run() == ALWAYS
    (repository.root / "out/quickstart/sft.pth").unlink()
    assert repository.run() == ["train_sft.py", *ALWAYS]


def test_what_was_interrupted_resumes_with_what_it_has_made(repository):
    assert repository.run(3, FAILS="train_sft.py") == STAGES[:-1]
    assert repository.run() == STAGES[-2:] + ALWAYS
    assert (repository.root / "out/quickstart/sft/metrics").read_text() == "x\nx\n"


def test_a_changed_command_starts_afresh_and_so_do_the_stages_after_it(repository):
    repository.run()
    text = repository.quickstart.read_text()
    repository.quickstart.write_text(text.replace("--max_steps 60", "--max_steps 61"))
    assert repository.run() == STAGES[-3:] + ALWAYS
    assert (repository.root / "out/quickstart/sft/metrics").read_text() == "x\n"


def test_requirements_are_installed_once_and_again_when_they_change(repository):
    def installations() -> int:
        repository.run()
        return (repository.root / "calls").read_text().count("-m pip install")

    assert [installations(), installations()] == [2, 0]
    (repository.root / "requirements.txt").write_text("torch\nnumpy\n")
    assert installations() == 1
