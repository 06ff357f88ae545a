"""Test sets asked of an untrained model: controls, likelihoods, resuming, and what is reported."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from inference.likelihood import answer_ids, log_likelihoods
from inference.parts import ROOT
from inference.test_set import read_answers
from model.generate import Sampling

CHOICE = {"benchmark": "b", "metric": "choice", "type": "t", "options": ["left", "to the right"]}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six short animations."""
    random = np.random.default_rng(0)
    for name in "abcdef":
        frames = [Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)) for _ in "1234"]
        frames[0].save(
            tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:], duration=100
        )
    return tmp_path


def line(video: str, question: str, answer: str, scoring: dict | None = None, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    scored = {"scoring": [scoring]} if scoring else {}
    return {"video": video, "conversations": turns, "language": "en", **scored, **more}


@pytest.fixture
def evaluate(folder, run):
    """Runs eval.py on the lines; its figures and its answers, and what it printed."""

    def evaluate(lines: list[dict], *flags, name: str = "eval") -> tuple:
        (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        printed = run(*arguments(folder, name), *flags)
        figures = json.loads((folder / f"{name}.json").read_text())
        return figures, list(read_answers(folder / f"{name}.answers.jsonl"))[1:], printed

    return evaluate


def arguments(folder: Path, name: str) -> list:
    files = ["--data_path", folder / "test.jsonl", "--images_path", folder]
    return [*files, "--output", folder / f"{name}.json"]


# ---- likelihood


def test_the_likelihood_is_that_of_reading_prompt_and_option_alone(chat_model, folder):
    clips = [chat_model.encode_video(folder / f"{name}.gif") for name in "ab"]
    asked = [("<video>\nWhere?", [clips[0]]), ("<video>\nWhat is it, then?", [clips[0]])]
    asked += [("<video>\nWhere?", [clips[1]]), ("Hello?", [])]
    options = [["left", "to the right, and up", "left"], ["a"]]
    options += [["一个红色的圆", "b c d"], ["x", "y"]]
    turns = [([{"role": "user", "content": text}], visuals) for text, visuals in asked]
    requests = [chat_model.make_request(*each) for each in turns]
    found = log_likelihoods(chat_model, requests, options)
    for request, texts, scores in zip(requests, options, found, strict=True):
        for text, (score, count) in zip(texts, scores, strict=True):
            ids = answer_ids(chat_model.tokenizer, text)
            inputs = chat_model.engine()._inputs([request.prompt], request.visuals)
            both = torch.cat([inputs["input_ids"], torch.tensor([ids])], dim=1)
            mask = torch.nn.functional.pad(inputs["visual_mask"], (0, len(ids)))
            features = {k: inputs[k] for k in inputs if k.startswith(("visual_f", "frames"))}
            logits = chat_model.model(both, visual_mask=mask, **features).logits
            logits = logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            each = logits.gather(1, torch.tensor(ids)[:, None])
            assert count == len(ids) and ids[-1] == chat_model.tokenizer.eos_token_id
            assert score == pytest.approx(float(each.detach().sum()), abs=1e-3)


def test_a_question_too_long_for_the_model_is_named(evaluate, folder):
    options = {**CHOICE, "options": ["left", "word " * 40_000], "right": 0}
    with pytest.raises(SystemExit, match=r"test\.jsonl:2: .*the model has positions for"):
        evaluate([line("a.gif", "Hello?", "x"), line("a.gif", "Where?", "left", options)])


# ---- scoring


def test_each_turn_is_scored_and_what_can_not_be_read_is_left_out(evaluate, folder, chat_model):
    clip, other = (chat_model.encode_video(folder / f"{name}.gif") for name in "ab")
    reverse = replace(clip, features=clip.features.flip(0))

    def answer(visual, *said: str) -> str:
        roles = ("user", "assistant", "user")[: len(said)]
        turns = [{"role": role, "content": x} for role, x in zip(roles, said, strict=True)]
        return chat_model.generate([chat_model.make_request(turns, [visual], Sampling(6))])[0]

    forward, backward = (answer(visual, "What moves?") for visual in (clip, reverse))
    assert forward != backward
    (folder / "broken.mp4").write_text("not a video")
    turns = line("b.gif", "What is it?", "never said")
    turns["conversations"] += line("b.gif", "And now?", "nor this")["conversations"]
    lines = [
        line("a.gif", "What moves?", forward, {"type": "object"}),
        line("a.gif", "What moves?", backward, {"type": "object"}, reverse=True),
        turns,
        line("broken.mp4", "What is it?", "lost"),
    ]
    figures, answers, printed = evaluate(lines, "--controls", "--batch_size", 2)
    assert figures["accuracy"]["by_type"] == {"answer": 0, "object": 1}
    assert figures["controls"]["reversed"]["by_type"]["object"] == 0
    assert figures["samples"] == 3 and figures["num_frames"] == 4
    assert list(figures["left_out"]) == ["broken.mp4"] and 0 < figures["interval"]["low"] < 0.5
    assert "1 samples were left out" in printed.out and "broken.mp4" in printed.err
    assert re.search(r"all questions +4 ", printed.out)
    # A later turn is asked after the model's own answer, not after the true one.
    (turns,) = (each["turns"] for each in answers if each["visuals"] == ["b.gif"])
    own = [turn["answers"]["normal"] for turn in turns]
    assert own[1] == answer(other, "What is it?", own[0] or "-", "And now?")


def test_each_metric_from_file_to_figures(evaluate, folder):
    """What the model says and prefers is read from a first run, and made the truth of a second."""

    def lines(choice: int, said: str) -> list[dict]:
        group = {**CHOICE, "benchmark": "pairs", "options": ["up", "down"]}
        match, span = ({"benchmark": n, "metric": n, "type": "t"} for n in ("match", "span"))
        judge = {"benchmark": "b", "metric": "judge", "type": "s"}
        listed = {"file": "list.json", "record": [{"Q": "Sum up.", "pred": None}]}
        nested = {"file": "nested.json", "record": {"v": {"order": [{"prediction": None}]}}}
        ranked = {"file": "server.json", "options": ["up", "down"], "labels": [0, 1]}
        captions = {"benchmark": "captions", "metric": "cider", "type": "c"}
        return [
            line("a.gif", "Where?", "left", {**CHOICE, "right": choice, "subsets": ["short"]}),
            line("gone.gif", "Where?", "left", {**CHOICE, "right": choice}, missing=True),
            line("b.gif", "Where?", "up", {**group, "right": 0, "group": "0"}),
            line("c.gif", "Where?", "down", {**group, "right": 1, "group": "0"}),
            line("a.gif", "What is it?", said, match),
            line("a.gif", "When?", "1 - 2", {**span, "seconds": [1, 2]}),
            line("a.gif", "Describe.", "x", {**captions, "references": [said, "other words"]}),
            line("b.gif", "Describe.", "x", {**captions, "references": ["a dog runs"]}),
            line("a.gif", "Sum up.", "x", judge | listed),
            *[line("a.gif", "Sum up.", "x", judge | nested)] * 2,
            line("b.gif", "Where?", "-", judge | ranked | {"record": {"uid": None}}),
            line("gone.gif", "Where?", "-", judge | ranked | {"record": {"gone": None}}),
            line("a.gif", "?", "-", {"benchmark": "b", "metric": "faulty", "type": "faulty"}),
        ]

    _, answers, _ = evaluate(lines(0, "?"), name="first")
    first = {answer["turns"][0]["question"]: answer["turns"][0] for answer in answers}
    where = next(a for a in answers if a["visuals"] == ["a.gif"] and "tokens" in a["turns"][0])
    sums = where["turns"][0]["logprobs"]["normal"]
    said = first["What is it?"]["answers"]["normal"]
    figures, _, printed = evaluate(lines(int(np.argmax(sums)), said), "--controls")
    b = figures["benchmarks"]["b"]
    assert (b["questions"], b["missing"], b["judged"], b["headline"]) == (3, 2, 5, "likelihood")
    row = b["rows"]["likelihood"]
    assert row["score"] == pytest.approx(1 / 3) and row["answered"] == 1 and row["n"] == 3
    assert set(row["controls"]) == {"no video", "first frame", "shuffled", "reversed"}
    assert row["floors"]["chance"] == 0.5  # of the questions that have options
    assert "  of short" in b["rows"] and b["parsed"] == 0
    pairs = figures["benchmarks"]["pairs"]
    assert pairs["headline"] == "group" and pairs["rows"]["text"]["n"] == 1
    assert figures["benchmarks"]["match"]["rows"]["exact match"]["score"] == 1
    assert figures["benchmarks"]["span"]["rows"]["mean IoU"]["score"] == 0
    assert figures["benchmarks"]["captions"]["rows"]["CIDEr"]["score"] >= 0
    said, files = first["Sum up."]["answers"]["normal"], ("list", "nested", "server")
    listed, nested, ranked = (json.loads((folder / f"{file}.json").read_text()) for file in files)
    assert listed == [{"Q": "Sum up.", "pred": said}]
    assert nested == {"v": {"order": [{"prediction": said}] * 2}}
    pair = next(a["turns"][0] for a in answers if a["turns"][0]["answer"] == "up")
    # None for the missing video.
    assert ranked == {"uid": int(np.argmax(pair["logprobs"]["normal"]))}
    assert "2 (66.7%) COULD NOT BE ASKED and count as wrong" in printed.out


def test_a_generated_text_is_the_option_that_it_is_closest_to(evaluate):
    _, (answer,), _ = evaluate(
        [line("a.gif", "Where?", "left", {**CHOICE, "right": 0})], "--generate", "text"
    )
    options = [answer["turns"][0]["text"], "quite another"]
    again = line("a.gif", "Where?", options[0], {**CHOICE, "options": options, "right": 0})
    figures, *_ = evaluate([again], "--generate", "text", name="again")
    assert figures["benchmarks"]["b"]["rows"]["generated text"]["score"] == 1


def test_a_question_about_a_part_of_its_video_gets_that_part(chat_model, folder, evaluate):
    """The middle half of a second of four frames: its second and third."""
    part = chat_model.decode_frames(folder / "a.gif", bounds=(0.1, 0.2))
    whole = chat_model.decode_frames(folder / "a.gif")
    assert whole.timestamps.tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert np.array_equal(part.frames, whole.frames[1:3])
    assert len(chat_model.decode_frames(folder / "a.gif", bounds=(0.11, 0.12)).frames) == 1
    scoring = {**CHOICE, "right": 0}
    bounds = [{}, {"start": 0.1, "end": 0.2}, {"start": 0, "end": 9}]
    lines = [line("a.gif", "Where?", "left", scoring, id=str(i), **b) for i, b in enumerate(bounds)]
    _, answers, _ = evaluate(lines)
    scores = {a["id"]: a["turns"][0]["logprobs"]["normal"] for a in answers}
    assert scores["0"] == scores["2"] != scores["1"]
    with pytest.raises(SystemExit, match=r"test.jsonl:1: 'start' and 'end' must be seconds"):
        evaluate([line("a.gif", "Where?", "left", scoring, start=2, end=1)])


# ---- resuming and comparing


def many(count: int) -> list[dict]:
    scoring = {**CHOICE, "right": 0}
    return [
        line("abcdef"[i % 6] + ".gif", f"Question {i}?", "left", scoring, id=f"q{i}")
        for i in range(count)
    ]


def test_a_killed_run_continues_and_asks_nothing_twice(
    evaluate, folder, tiny_checkpoint, tiny_tower
):
    lines, flags = many(150), ["--batch_size", "4", "--generate", "none"]
    whole, *_ = evaluate(lines, *flags, name="whole")
    path = folder / "killed.answers.jsonl"
    parts = ["--load_from", tiny_checkpoint, "--vision_path", tiny_tower, "--device", "cpu"]
    command = ["eval.py", *parts, "--max_new_tokens", 6, *arguments(folder, "killed"), *flags]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (path.is_file() and path.read_bytes().count(b"\n") > 16) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    held = path.read_bytes()
    assert 16 < held.count(b"\n") < 151
    path.write_bytes(held + b'{"id": "q1", "cut o')  # as a kill in the midst of a line leaves it
    resumed, answers, _ = evaluate(lines, *flags, name="killed")
    assert path.read_bytes().startswith(held)  # what was there was neither asked again nor changed
    assert sorted(answer["id"] for answer in answers) == sorted(line["id"] for line in lines)
    assert resumed["benchmarks"] == whole["benchmarks"]

    *_, printed = evaluate(lines, "--limit", "3", name="killed")
    assert "held another run's answers (generate, limit)" in printed.err
    assert (folder / "killed.answers.old.jsonl").read_bytes().startswith(held)


def test_two_runs_are_compared_over_the_questions_that_both_answered(evaluate, folder):
    evaluate(many(40), name="theirs")
    figures, _, printed = evaluate(many(60), "--against", folder / "theirs.json", name="ours")
    found = figures["against"]["b"]
    assert found["n"] == 40 and found["ours"] == found["theirs"] and found["difference"] == 0
    assert "no difference shown" in printed.out
    for lines, against, reason in (
        (many(1), "none.json", "eval.py --output writes them"),
        # The same ids, other questions.
        ([line("a.gif", "What?", "x", id="q0")], "ours.json", "answers to other questions"),
        ([line("a.gif", "What?", "left", many(1)[0]["scoring"][0], id="q0")], "ours.json", "other"),
    ):
        with pytest.raises(SystemExit, match=reason):
            evaluate(lines, "--against", folder / against, name="other")
        assert not (folder / "other.answers.jsonl").exists()  # nothing was asked
