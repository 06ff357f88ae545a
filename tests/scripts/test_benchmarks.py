"""The field's benchmarks in files of exactly their published form, through their converters."""

import json
import re
from pathlib import Path

import pytest

from dataset.samples import read_samples
from demo.export_benchmarks import export
from scripts.convert.benchmarks import BENCHMARKS, main
from scripts.convert.common import one_turn
from tests.scripts.test_convert import write

MVBENCH = {
    "video": "166583.webm",
    "question": "What is the action performed by the person in the video?",
    "candidates": ["Not sure", "Scattering something down", "Piling something up"],
    "answer": "Piling something up",
}
PILING = MVBENCH["question"], MVBENCH["answer"]
BOUNDED = {**MVBENCH, "video": "ZS9XR.mp4", "start": 9.2, "end": 18.1}
VITATECS = {
    **{"src_dataset": "VATEX", "video_name": "i0ccSYMl0vo_000027_000037.mp4"},
    **{"caption": "A woman is placing a strip on a leg.", "aspect": "Direction"},
    "counterfactual": "A woman is removing a strip from a leg.",
}
VINOGROUND = {
    **{"index": "0", "major": "action", "minor": "interaction;cyclical"},
    "pos_cap": "the man eats before he watches TV",
    "neg_cap": "the man watches TV before he eats",
}
NEXTQA = {
    **{"video": "4010069381", "frame_count": 369, "width": 640, "height": 480},
    **{"question": "how do the two men play the instrument", "answer": 0, "qid": 6, "type": "CH"},
    **{"a0": "roll the handle", "a1": "tap their feet", "a2": "strum", "a3": "hit", "a4": "pat"},
}
EGOSCHEMA = {
    **{"q_uid": "0074f737-11cb-497d-8d07-77c3a8127391", "google_drive_id": "1"},
    "question": "What is C doing?",
    **{f"option {i}": f"C does thing {i}." for i in range(5)},
}
MSVD = {"id": 3, "video_id": 1301, "question": "what is a man doing?", "answer": "sing"}
MSRVTT = {
    "answer": "couch",
    "category_id": 14,
    "id": 2,
    "question": "what hangs?",
    "video_id": 6513,
}
ANET_Q = {"video_name": "1QIUV7WYKXg", "question": "is he sad", "question_id": "v_1QIUV7WYKXg_3"}
ANET_A = {"answer": "no", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}
VATEX = {"videoID": "G9zN5TTuGO4_000179_000189", "enCap": ["A man reads.", "He reads a book."]}
CHARADES = "3MSZA 24.3 30.4##person turn a light on.\n"
VIDEOMME = {
    **{"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity"},
    **{"url": "https://example.org", "videoID": "fFjv93ACGo8", "question_id": "001-1"},
    **{"task_type": "Counting Problem", "question": "When?", "answer": "C"},
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three are alike."],
}
MLVU = {
    **{"video": "movie101_66.mp4", "duration": 246, "question": "What color is he?"},
    **{"candidates": ["Yellow", "Red"], "answer": "Yellow", "question_type": "plotQA"},
}
SUMMARY = {
    **{"video": "217.mp4", "duration": 480.0, "question": "Please summarize this video."},
    **{"answer": "Waves lap.", "question_type": "summary"},
}
LONGVIDEO = {
    **{"question": "In the video, who comes?", "question_category": "T2E"},
    **{"candidates": ["a dog", "a cat"], "correct_choice": 1, "position": [1], "level": "L1-Event"},
    **{"id": "86CxyhFV9MI_0", "video_path": "86CxyhFV9MI.mp4", "duration_group": 15},
}


TASKS = {
    "multi-choice": ("What is he doing?\nA. dunking\nB. passing", "B. passing"),
    "yes_no": ("Is he dunking?", "no"),
    "caption_matching": (
        "Which caption matches better?\nCaption A: He dunks.\nCaption B: He sits.",
        "Caption A: He dunks.",
    ),
    "captioning": ("Information A: {}\nGenerated Caption:", "B. dunking"),
}
TEMPCOMPASS = {
    f"questions/{task}.json": {"1034419625": {"action": [{"question": text, "answer": answer}]}}
    for task, (text, answer) in TASKS.items()
}

# benchmark → its files, and of each line: video, question, answer, what `scoring` holds at least.
CASES = {
    "tvbench": ({"json/action_antonym.json": [MVBENCH], "json/action_sequence.json": [BOUNDED]},
        [("action_antonym/166583.webm", *PILING, {"metric": "choice", "type": "action_antonym",
          "options": MVBENCH["candidates"], "right": 2}),
         ("action_sequence/ZS9XR.mp4", *PILING, {"right": 2})]),
    "mvbench": ({"json/action_antonym.json": [MVBENCH],
         "json/episodic_reasoning.json": [MVBENCH | {"video": "friends_s01"}]},
        [("ssv2_video/166583.webm", *PILING, {"type": "action_antonym"}),
         ("tvqa/frames_fps3_hq/friends_s01.mp4", *PILING, {})]),
    "vitatecs": ({"data/Direction.jsonl": [VITATECS]},
        [("VATEX/i0ccSYMl0vo_000027_000037.mp4", "Describe the video.",
          VITATECS["caption"], {"type": "Direction", "subsets": ["VATEX"]})]),
    "vinoground": ({"vinoground.csv": [VINOGROUND]},
        [(f"vinoground_videos/0_{side}.mp4", "Describe the video.", VINOGROUND[f"{side}_cap"],
          {"group": "0", "right": right, "subsets": ["action", "interaction", "cyclical"]})
         for right, side in enumerate(("pos", "neg"))]),
    "tempcompass": (TEMPCOMPASS,
        [("1034419625.mp4", "Which caption matches better?", "He dunks.",
          {"type": "caption_matching", "options": ["He dunks.", "He sits."],
           "subsets": ["action"]}),
         ("1034419625.mp4", "Information A: {}\nGenerated Caption:", "B. dunking",
          {"metric": "judge", "file": "captioning.json"}),
         ("1034419625.mp4", "What is he doing?", "passing",
          {"options": ["dunking", "passing"], "right": 1}),
         ("1034419625.mp4", "Is he dunking?", "no", {"options": ["yes", "no"], "right": 1})]),
    "nextqa": (
        {"val.csv": [NEXTQA, NEXTQA | {"type": "TP", "answer": 4}], "atp-hard-ct4.txt": "1\n"},
        [("4010069381.mp4", "how do the two men play the instrument?", "roll the handle",
          {"type": "CH", "subsets": ["C"], "right": 0}),
         ("4010069381.mp4", "how do the two men play the instrument?", "pat",
          {"type": "TN", "subsets": ["T", "atp_hard"], "right": 4})]),
    "egoschema": ({"questions.json": [EGOSCHEMA, {**EGOSCHEMA, "q_uid": "hidden"}],
        "subset_answers.json": {EGOSCHEMA["q_uid"]: 3}},
        [(f"{EGOSCHEMA['q_uid']}.mp4", "What is C doing?", "C does thing 3.", {"right": 3})]),
    "egoschema_full": ({"questions.json": [EGOSCHEMA]},
        [(f"{EGOSCHEMA['q_uid']}.mp4", "What is C doing?", "-",
          {"metric": "judge", "record": {EGOSCHEMA["q_uid"]: None}, "labels": [0, 1, 2, 3, 4]})]),
    "msvd_qa": ({"test_qa.json": [MSVD],
        "youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1\n7NNg0_n-bS8_21_30 vid1301\n"},
        [("7NNg0_n-bS8_21_30.mp4", MSVD["question"], "sing", {"metric": "match", "type": "what"})]),
    "msrvtt_qa": ({"test_qa.json": [MSRVTT]},
        [("video6513.mp4", "what hangs?", "couch", {"metric": "match"})]),
    "activitynet_qa": ({"test_q.json": [ANET_Q], "test_a.json": [ANET_A]},
        [("v_1QIUV7WYKXg.mp4", "is he sad?", "no", {"metric": "match", "type": "yes/no"})]),
    "vatex_en": ({"vatex_public_test_english_v1.1.json": [VATEX]},
        [("G9zN5TTuGO4_000179_000189.mp4", "Describe this video in one sentence.", "A man reads.",
          {"metric": "cider", "references": VATEX["enCap"]})]),
    "vatex_zh": ({"vatex_validation_v1.0.json": [{**VATEX, "chCap": ["一个男人在看书。"]}]},
        [("G9zN5TTuGO4_000179_000189.mp4", "用一句话描述这个视频。", "一个男人在看书。",
          {"metric": "cider"})]),
    "charades_sta": ({"charades_sta_test.txt": CHARADES},
        [("3MSZA.mp4",
        'When does this happen: "person turn a light on"? Give its start and end in seconds.',
          "24.3 - 30.4", {"metric": "span", "seconds": [24.3, 30.4]})]),
    "videomme": ({"test-00000-of-00001.parquet": [VIDEOMME]},
        [("fFjv93ACGo8.mp4", "When?", "Berries.",
          {"type": "Counting Problem", "right": 2, "subsets": ["short", "Knowledge"]})]),
    "mlvu": ({"json/1_plotQA.json": [MLVU], "json/9_summary.json": [SUMMARY]},
        [("1_plotQA/movie101_66.mp4", "What color is he?", "Yellow",
          {"type": "plotQA", "right": 0}),
         ("9_summary/217.mp4", "Please summarize this video.", "Waves lap.",
          {"metric": "judge", "file": "summary_all.json", "record": [{"video_name": "217.mp4",
           "Q": "Please summarize this video.", "A": "Waves lap.", "pred": None}]})]),
    "longvideobench": ({"lvb_val.json": [LONGVIDEO]},
        [("86CxyhFV9MI.mp4", "In the video, who comes?", "a cat",
          {"type": "T2E", "right": 1, "subsets": ["15 s"]})]),
    "longvideobench_test": ({"lvb_test_wo_gt.json": [LONGVIDEO]},
        [("86CxyhFV9MI.mp4", "In the video, who comes?", "-", {"metric": "judge",
          "options": LONGVIDEO["candidates"], "record": {LONGVIDEO["id"]: None}})]),
}  # fmt: skip

CANDIDATES = ("tvbench", "mvbench", "mlvu", "longvideobench", "longvideobench_test")


def publish(folder: Path, files: dict) -> None:
    for name, content in files.items():
        if isinstance(content, list):
            write(folder / name, *content)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content, indent=4)
            (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture
def convert(tmp_path):
    def convert(name: str, files: dict, *flags: str) -> list[dict]:
        publish(tmp_path / "data", files)
        output = tmp_path / "out.jsonl"
        main([name, "--data_path", str(tmp_path / "data"), "--output", str(output), *flags])
        assert len(list(read_samples(output)))  # as eval.py reads it
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    return convert


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_files_become_a_test_set(name, convert):
    files, expected = CASES[name]
    lines = convert(name, files)
    assert len(lines) == len(expected)
    for line, (video, question, answer, scoring) in zip(lines, expected, strict=True):
        asked, told = (turn["value"] for turn in line["conversations"])
        assert (line["video"], asked, told) == (video, f"<video>\n{question}", answer)
        assert scoring.items() <= line["scoring"][0].items()
        assert line["scoring"][0]["benchmark"] == name
        part = (9.2, 18.1) if video == "action_sequence/ZS9XR.mp4" else (None, None)
        assert (line.get("start"), line.get("end")) == part
        if line["scoring"][0]["metric"] == "choice":
            assert line["scoring"][0]["options"][line["scoring"][0]["right"]] == answer


def test_the_true_caption_of_a_pair_is_not_always_the_first(convert):
    pairs = [{**VITATECS, "caption": f"Caption {i}."} for i in range(100)]
    lines = convert("vitatecs", {"data/Direction.jsonl": pairs})
    assert 30 < sum(line["scoring"][0]["right"] for line in lines) < 70


def test_missing_videos_stay_and_are_reported(tmp_path, convert, capsys):
    publish(tmp_path / "videos", {"unpacked/4010069381.mp4": ""})
    rows = [NEXTQA, *[NEXTQA | {"video": "1"}] * 2]
    here, *gone = convert("nextqa", {"val.csv": rows}, "--images_path", str(tmp_path / "videos"))
    assert here["video"] == "unpacked/4010069381.mp4" and "missing" not in here
    assert [line["missing"] for line in gone] == [True, True]
    assert "MISSING: 1 videos of 2 questions (66.7%)" in capsys.readouterr().out
    assert (tmp_path / "out.missing.txt").read_text().startswith("1.mp4\t")


def first_record(name: str) -> tuple[dict, str, int | str, dict]:
    """A benchmark's files, and the name, the place and the content of the first record there."""
    files = dict(CASES[name][0])
    file, content = next(iter(files.items()))
    place = 0 if isinstance(content, list) else next(iter(content))
    return files, file, place, content[place]


@pytest.mark.parametrize("name", sorted(set(BENCHMARKS) - {"charades_sta", "tempcompass"}))
def test_a_missing_key_is_named_with_its_record(name, convert, tmp_path):
    files, file, _, record = first_record(name)
    named = 0
    for key in record:
        content = [{k: v for k, v in record.items() if k != key}]
        try:
            convert(name, {**files, file: content})
        except ValueError as error:
            assert f"the key '{key}' is missing" in str(error) and "download" in str(error)
            assert re.search(rf"{file}:[012]: ", str(error))
            named += 1
            assert not (tmp_path / "out.jsonl").exists()
        else:  # nobody needs it
            (tmp_path / "out.jsonl").unlink()
    assert named >= 2


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        *((name, {"candidates": []}, "its list of options is empty") for name in CANDIDATES),
        *((name, {"candidates": ["a", " "]}, "one of its options is empty") for name in CANDIDATES),
        ("tvbench", {"answer": "Dancing"}, "'Dancing' isn't one of its options"),
        ("mvbench", {"video": "../x.webm"}, "must be relative"),
        ("mlvu", {"answer": "Blue"}, "'Blue' isn't one of its options"),
        ("longvideobench", {"correct_choice": 2}, "its answer is number 2, its options are 0 to 1"),
        ("vitatecs", {"caption": " "}, "one of its options is empty"),
        ("vinoground", {"neg_cap": ""}, "one of its options is empty"),
        (
            "tempcompass",
            {"action": [{"question": "?", "answer": "z"}]},
            "action 1: its list of options is empty",
        ),
        ("tempcompass", {"action": [{"question": "Is it?"}]}, "the key 'answer' is missing"),
        ("tempcompass", {"action": [{"answer": "yes"}]}, "the key 'question' is missing"),
        ("nextqa", {"answer": 5}, "its answer is number 5, its options are 0 to 4"),
        ("nextqa", {"a1": ""}, "one of its options is empty"),
        ("egoschema", {"option 2": ""}, "one of its options is empty"),
        ("egoschema_full", {"option 2": ""}, "one of its options is empty"),
        ("videomme", {"answer": "E"}, "its answer is number 4"),
        ("videomme", {"options": []}, "its list of options is empty"),
        ("msvd_qa", {"video_id": 9}, "doesn't name vid9"),
        ("msvd_qa", {"answer": ""}, "answer is empty"),
        ("msrvtt_qa", {"answer": ""}, "answer is empty"),
        ("activitynet_qa", {"question_id": "x"}, "test_a.json has no answer to x"),
        ("vatex_en", {"enCap": []}, "its list of captions is empty"),
        ("vatex_zh", {"chCap": []}, "its list of captions is empty"),
    ],
)
def test_a_wrong_record_is_named_with_its_fix(name, change, reason, convert, tmp_path):
    files, file, place, record = first_record(name)
    content = files[file]
    files[file] = [record | change] if place == 0 else {**content, place: record | change}
    with pytest.raises(ValueError, match="download the annotations again, correct these") as error:
        convert(name, files)
    assert f"{file}:" in str(error.value) and reason in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        ("charades_sta", {"charades_sta_test.txt": CHARADES + "3MSZA 5##x\n"}, ":2: it isn't"),
        ("charades_sta", {"charades_sta_test.txt": "3MSZA 9 5##x\n"}, "but starts at 9.0 s"),
        ("egoschema", {"questions.json": [EGOSCHEMA]}, "there is no subset_answers.json"),
        ("longvideobench", {"lvb_val.json": "[{"}, "lvb_val.json: not JSON"),
        ("longvideobench", {"lvb_val.json": "[3]"}, "lvb_val.json:1: not a JSON object"),
        ("longvideobench", {"other.json": "[]"}, "there is no lvb_val.json"),
        ("longvideobench", {"lvb_val.json": "[]"}, "no question of longvideobench; see docs"),
    ],
)
def test_a_broken_or_missing_file_is_named(name, files, reason, convert):
    with pytest.raises(ValueError, match=re.escape(reason)):
        convert(name, files)


def test_faulty_records_count_where_asked_for(convert):
    files = {"1_plotQA.json": [MLVU, {**MLVU, "answer": "Blue"}]}
    right, wrong = convert("mlvu", files, "--keep_faulty")
    assert right["scoring"][0]["metric"] == "choice" and wrong["scoring"][0]["metric"] == "faulty"


def test_the_demo_world_in_published_forms(tmp_path):
    """What demo.export_benchmarks writes, through the converters: each clip against its reverse."""
    test, out, lines = tmp_path / "test", tmp_path / "out", []
    for name, answer in (("a", "left"), ("a-reversed", "right")):
        publish(test, {f"clips/{name}.mp4": ""})
        for question, text, scoring in (
            ("Where to?", answer, {"type": "direction", "pair": "a"}),
            ("Describe the video.", f"A moves {answer}.", {"type": "caption", "facts": [answer]}),
        ):
            about = {"video": f"clips/{name}.mp4", "language": "en", "scoring": [scoring]}
            lines.append(about | {"conversations": one_turn(question, text)})
    publish(test, {"questions.jsonl": lines, "captions.jsonl": []})
    assert export(test, out) == {"tvbench": 2, "vitatecs": 2, "vinoground": 1}
    for name in ("tvbench", "vitatecs", "vinoground"):
        output = str(out / f"{name}.jsonl")
        files = ["--data_path", str(out / name), "--images_path", str(out / "videos")]
        main([name, *files, "--output", output])
        for line in map(json.loads, Path(output).read_text().splitlines()):
            options = line["scoring"][0]["options"]
            assert len(options) == 2 and "missing" not in line
            assert ("right" in options[line["scoring"][0]["right"]]) == (
                "reversed" in line["video"] or "neg" in line["video"]
            )
