"""A jsonl with every kind of mistake: each is named with its line, and the rest is written out."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import check_data

TOKENIZER = str(Path(__file__).resolve().parents[2] / "model/text_tokenizer")


def sample(question, answer="That.", **fields) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"conversations": turns, **fields})


LINES = [
    sample("What is it?", id="text"),
    sample("<image>\nWhat is it?", id="good", image="a.png"),
    sample("<image><image>\nWhich?", id="two", image=["a.png", "b.png"]),
    sample("<image><image>\nWhich?", id="tags", image="a.png"),
    sample("<video>\nWhat happens?", id="gone", video="gone.mp4"),
    sample("<video>\nWhat happens?", id="cut", video="cut.mp4"),
    sample("What?", id="outside", image="../a.png"),
    '{"conversations": [',
    sample("word " * 100, answer="late", id="no room for an answer"),
    sample("What?", answer="word " * 100, id="long answer"),
]
BAD = {
    4: ("tags", "conversation", "2 visual tags"),
    5: ("gone", "missing", "no such file"),
    6: ("cut", "unreadable", ""),
    7: ("outside", "malformed", "relative"),
    8: (None, "malformed", "not JSON"),
    9: ("no room for an answer", "too_long", "leaves no token of an answer"),
}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(name)
    Path("cut.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    Path("data.jsonl").write_text("\n".join(LINES), encoding="utf-8")


def check(*more, code=0):
    flags = ["--data_path", "data.jsonl", "--images_path", ".", "--tokenizer_path", TOKENIZER]
    flags += ["--max_seq_len", "64", "--visual_tokens", "10", "--out_dir", "out", *more]
    with pytest.raises(SystemExit, match=f"^{code}$") if code else nullcontext():
        check_data.main(flags)


def problems() -> dict[int, dict]:
    lines = Path("out/problems.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["line"]: record for record in map(json.loads, lines)}


def test_every_mistake_is_named_and_the_rest_is_clean(capsys):
    check("--num_workers", "2", code=3)
    found = problems()
    assert set(found) == set(BAD)
    for line, (name, reason, detail) in BAD.items():
        assert (found[line]["id"], found[line]["reason"]) == (name, reason)
        assert detail in found[line]["detail"]
    report = json.loads(Path("out/report.json").read_text())
    assert (report["samples"], report["good"], report["visuals"]) == (10, 4, 4)
    assert report["visuals_a_sample"] == {"0": 3, "1": 3, "2": 1}
    assert report["truncated_share"] == pytest.approx(2 / 7)  # of those that have a length
    said = capsys.readouterr().out
    assert "data.jsonl:5: missing: " in said and "4 good, 6 bad" in said

    # What it wrote is clean, in the order and words of the original.
    clean = Path("out/data.clean.jsonl")
    good = [line for number, line in enumerate(LINES, 1) if number not in BAD]
    assert [json.loads(x) for x in clean.read_text().splitlines()] == list(map(json.loads, good))
    clean.rename("data.jsonl")
    check("--num_workers", "0")
    assert problems() == {}


def test_what_is_held_out_may_not_be_trained_on():
    Path("data.jsonl").write_text("\n".join(LINES[:2]))
    other = LINES[0].replace("text", "another id")
    Path("val.jsonl").write_text("\n".join([sample("Which?"), LINES[2], other]))
    check("--val_path", "val.jsonl", code=3)
    ((line, found),) = problems().items()
    assert (line, found["file"], found["reason"]) == (3, "val.jsonl", "in_training_data")
    assert len(Path("out/val.clean.jsonl").read_text().splitlines()) == 2


def test_what_can_not_be_checked():
    for text, reason in (("", "no sample in it"), (f"[{LINES[0]}]", "this is a JSON array")):
        Path("data.jsonl").write_text(text)
        with pytest.raises(ValueError, match=f"data.jsonl: {reason}"):
            check()
    with pytest.raises(ValueError, match="the same name"):
        check("--val_path", "data.jsonl")
