"""The table of several models' figures, and the check of this machine's speed."""

import json

import pytest

from scripts import leaderboard, speed_check


def result(score: float, blank: float) -> dict:
    row = {"score": score, "low": score - 0.02, "high": score + 0.02, "n": 1000}
    row |= {"floors": {"chance": 0.25, "answer table": 0.38}, "controls": {"no video": blank}}
    summary = {"headline": "likelihood", "missing": 12, "rows": {"likelihood": row}}
    about = {"checkpoint": f"out/{score}.pth", "data_path": ["b.jsonl"]}
    return about | {"benchmarks": {"mvbench": summary}}


def test_the_best_comes_first_and_only_what_is_above_its_floors_is_bold(tmp_path, capsys):
    for name, figures in {"a": (0.39, 0.3), "b": (0.55, 0.3), "c": (0.6, 0.61)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result(*figures)))
    files = sorted(map(str, tmp_path.glob("*.json")))
    leaderboard.main([*files, "--output", str(tmp_path / "board")])
    rows = [line for line in (tmp_path / "board.md").read_text().splitlines() if "pth" in line]
    assert [row.split(" | ")[2] for row in rows] == ["60.0", "**55.0**", "39.0"]
    assert "61.0 (no video)" in rows[0] and "38.0 (answer table)" in rows[1] and "| 12 |" in rows[0]
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")
    assert "board.md" in capsys.readouterr().out


OLD = '{"checkpoint": "a.pth", "benchmarks": {}, "interval": {"value": 1}, "controls": {}}'


@pytest.mark.parametrize("text", ["{", "{}", "[]", OLD])
def test_what_is_not_evals_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json: not what eval\.py --output writes"):
        leaderboard.main([str(tmp_path / "x.json")])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x\.json: No such file.*; eval\.py --output writes it"):
        leaderboard.main([str(tmp_path / "x.json")])


def test_the_speed_check_names_the_slowest_part_and_a_share_that_is_too_small():
    parts = {"decode": (40, None), "tower": (2, 2e11), "loader": (100, None), "step": (9, 2e10)}
    printed = speed_check.describe(parts, 2.5e11, "cpu")
    assert "Extracting features waits for: tower (2.0 videos/s)" in printed
    assert "Training on features waits for: step (9.0 videos/s)" in printed
    assert "NOT NORMAL: step (8%, usual is 40% or more)" in printed
    assert "ormal" not in speed_check.describe(parts, 2.5e11, "cuda")  # nothing was measured there
    assert "Normal" in speed_check.describe(parts | {"step": (9, 2e11)}, 2.5e11, "cpu")


def test_the_speed_check_measures_every_part(capsys):
    flags = {"dim": 64, "n_layers": 1, "num_frames": 2, "video_seconds": 1, "seconds": 0.1}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    speed_check.main([*words, "--device", "cpu"])
    printed = capsys.readouterr().out
    for part in ("decode", "tower", "loader", "step"):
        assert float(printed.split(f"\n{part}")[1].split()[0]) > 0
