"""The real scripts in the order of the quickstart, on a world small enough for a test: what a user
types has to work, resume, and leave the files that the README promises."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from inference.summary import read_results
from tests import commands

EXAMPLES = commands.ROOT / "demo/examples"


run = partial(commands.run, sys.executable, OMP_NUM_THREADS="2", TOKENIZERS_PARALLELISM="false")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tower) -> Path:
    """data → features → pretrain → SFT → eval → report, each by its own command."""
    out = tmp_path_factory.mktemp("world")
    run("-m", "demo.world", "--clips", 16, "--workers", 1, "--out", out / "train")
    run(
        *("extract_features.py", "--data_path", out / "train/captions.jsonl"),
        *("--images_path", out / "train", "--vision_path", tiny_tower),
        *("--features_path", out / "features", "--num_frames", 4, "--num_workers", 0),
    )
    for script, data, start in (
        ("pretrain", "captions", ["--from_scratch", "--freeze_llm", 0, "--embedding_std", 0.4]),
        ("sft", "questions", ["--load_from", out / "pretrain.pth"]),
    ):
        run(
            *(f"train_{script}.py", "--out_dir", out, "--run_name", script, *start),
            *("--dim", 32, "--n_layers", 1, "--n_heads", 2, "--n_kv_heads", 1, "--num_frames", 4),
            *("--use_feature", "--features_path", out / "features", "--num_workers", 0),
            *("--data_path", out / f"train/{data}.jsonl"),
            *("--val_path", out / f"train/{data}.jsonl", "--log_interval", 1),
            *("--batch_size", 8, "--epochs", 8, "--learning_rate", 1e-2, "--dtype", "float32"),
        )
    run(
        *("eval.py", "--load_from", out / "sft.pth", "--vision_path", tiny_tower, "--controls"),
        *("--data_path", EXAMPLES / "questions.jsonl", "--images_path", EXAMPLES),
        *("--max_new_tokens", 8, "--output", out / "eval.json"),
    )
    run("-m", "demo.report", "--dir", out)
    return out


def metrics(world: Path, run_name: str) -> list[dict]:
    lines = (world / run_name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_loss_falls(world, stage):
    rows = metrics(world, stage)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert rows[-1]["val_loss"] < rows[0]["loss"]


def test_each_stage_leaves_its_files(world):
    for name in ("pretrain.pth", "pretrain.json", "sft.pth", "sft.json", "features/manifest.json"):
        assert (world / name).is_file(), name
    for name in ("report.md", "loss_curves.png", "test_frames.png"):
        assert (world / name).stat().st_size > 500, name


def test_the_report_says_what_the_evaluation_found(world):
    evaluation = json.loads((world / "eval.json").read_text())
    counts = evaluation["accuracy"]["counts"]
    report = (world / "report.md").read_text()
    assert f"{counts['questions']} questions and {counts['captions']} captions" in report
    for control in ("normal", "reversed", "shuffled", "first frame", "no video"):
        assert control in evaluation["controls"] and control in report
    # Every turn of every line was answered.
    lines = map(json.loads, (EXAMPLES / "questions.jsonl").read_text().splitlines())
    answers = read_results(world / "eval.answers.jsonl").others["normal"]
    assert len(answers) == sum(len(line["scoring"]) for line in lines)
