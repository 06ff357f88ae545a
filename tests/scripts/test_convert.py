"""The field's datasets, in files of their formats, through the commands that convert them."""

import csv
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset.samples import Sample, Samples, read_samples
from scripts.convert import llava_video_178k as llava
from scripts.convert import minimind_v, sharegpt4video, to_jsonl, video_instruct_100k
from tests.commands import run


def human(*texts: str) -> list[dict]:
    """Turns in LLaVA's style, human and gpt by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def user(*texts: str) -> list[dict]:
    """Turns in MiniMind-V's style."""
    return [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(texts)]


def write(path: Path, *records) -> Path:
    """Records in the form that the suffix names: jsonl, parquet, csv, or a JSON array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    return path


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def picture(color, size=(16, 12), format="JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


@pytest.fixture
def convert(tmp_path, capsys):
    """Runs a converter; what it wrote, read as training reads it, and its report."""

    def convert(module, *data, images_path=None) -> tuple[Samples, str]:
        output = tmp_path / "out/new.jsonl"
        arguments = ["--data_path", *map(str, data), "--output", str(output)]
        arguments += ["--images_path", str(images_path)] if images_path else []
        module.main("", module.convert, arguments)
        return read_samples(output), capsys.readouterr().out

    return convert


def dropped(tmp_path) -> dict[int, str]:
    with (tmp_path / "out/new.dropped.jsonl").open(encoding="utf-8") as file:
        return {line["line"]: line["reason"] for line in map(json.loads, file)}


def texts(sample: Sample) -> list[str]:
    return [message["content"] for message in sample.messages]


def pixel(sample: Sample, root: Path, number=0) -> tuple:
    return Image.open(sample.files(root)[number]).convert("RGB").getpixel((5, 5))


NEXTQA = {
    "id": "1006-8968804598",
    "conversations": human("<image>\nWhy are the men sitting?\nA. resting.", "E. training."),
    "data_source": "0_30_s_nextqa",
    "video": "NextQA/NExTVideo/1006/8968804598.mp4",
}


def test_llava_video_178k(tmp_path, convert):
    data = tmp_path / "LLaVA-Video-178K"
    write(data / "0_30_s_nextqa/0_30_s_nextqa_mc_qa_processed.json", NEXTQA)
    source, video = "0_30_s_academic_v0_1", "academic_source/Charades/RW587.mp4"
    turns = human("<image>\nDescribe.", "A man sits.", "And then?", "He stands up.")
    caption = {"id": "RW587", "conversations": turns, "data_source": source, "video": video}
    question = caption | {"conversations": human("<image>\nWho?", "A man.")}
    write(data / source / f"{source}_cap_processed.json", caption)
    write(data / source / f"{source}_oe_v0_1_qa_processed.json", question, question)
    # One subset was unpacked beside the annotations, the other into the dataset's own folder.
    touch(data, NEXTQA["video"], f"{source}/{video}")

    (one, two, nextqa), report = convert(llava, data, images_path=data)
    assert (nextqa.id, nextqa.visuals) == (NEXTQA["id"], [NEXTQA["video"]])
    assert texts(nextqa)[0].startswith("<video>\nWhy are") and texts(nextqa)[1] == "E. training."
    assert one.visuals == [f"{source}/{video}"]
    assert texts(one) == ["<video>\nDescribe.", "A man sits.", "And then?", "He stands up."]
    assert (one.id, two.id) == ("RW587", "RW587#2")  # one video, two questions
    assert dropped(tmp_path) == {2: "the same as an earlier record, word for word"}
    assert "3 samples of 4 records\ndropped 1" in report


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"video": "../../etc/passwd"}, "must be relative and without '..'"),
        ({"video": "out/a.mp4"}, "is a link out of"),
        ({"video": "gone.mp4"}, "there is no file 'gone.mp4' under"),
        ({"video": "x/twice.mp4"}, "2 files end in 'twice.mp4'"),
        ({"video": "x" * 5000}, "name too long"),
        ({"video": None}, "no video is named"),
        ({"conversations": human("<image><image>", "x")}, "2 visual tags"),
        ({"conversations": human("<image>", None)}, "turn 2: its text must be a string"),
        ({"conversations": human("<image>", "a", "b")}, "the last turn must be an answer"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, "role ['x'] isn't one of"),
        ({"conversations": "none"}, "must be a list of turns"),
        ({"conversations": human("<image>", "\ud83d")}, "surrogates not allowed"),
    ],
)
def test_records_that_cannot_be_used_are_dropped_and_listed(tmp_path, convert, change, reason):
    root = touch(tmp_path / "videos", NEXTQA["video"], "a/twice.mp4", "b/twice.mp4")
    (root / "out").symlink_to(touch(tmp_path / "elsewhere", "a.mp4"))
    data = write(tmp_path / "data.json", NEXTQA | change, NEXTQA)
    samples, report = convert(llava, data, images_path=root)
    assert len(samples) == 1 and reason in dropped(tmp_path)[1]
    assert f"{data}:1: " in report


def test_a_file_in_another_folder_is_found_by_its_name(tmp_path, convert):
    record = NEXTQA | {"video": "./NextQA//NExTVideo/1006/8968804598.mp4"}
    root = touch(tmp_path / "videos", "unpacked/1006/8968804598.mp4", "copy/8968804598.mp4")
    data = write(tmp_path / "a.json", record)
    (sample,), report = convert(llava, data, images_path=root)
    assert sample.visuals == ["unpacked/1006/8968804598.mp4"]
    assert "1 × a file found under another path" in report
    (sample,), _ = convert(llava, data)  # without a root: as it stands, unchecked
    assert sample.visuals == [NEXTQA["video"]]


def test_held_out_samples_are_of_videos_that_training_never_sees(tmp_path, convert):
    def record(video: int, question: int) -> dict:
        turns = human(f"<image>\nQuestion {question}?", "An answer.")
        return {"id": f"{video}", "video": f"{video}.mp4", "conversations": turns}

    data = [record(video, question) for video in range(200) for question in range(2)]
    path, val = write(tmp_path / "a.json", *data), tmp_path / "out/val.jsonl"
    samples, report = convert(llava, path, "--val_output", val, "--val_share", "0.1")
    train, held_out = ({s.visuals[0] for s in part} for part in (samples, read_samples(val)))
    assert not train & held_out and len(train | held_out) == 200 and 8 <= len(held_out) <= 32
    assert f"val.jsonl: {2 * len(held_out)} held-out samples" in report


def test_video_instruct_100k(tmp_path, convert):
    asked = [
        {"video_id": "v_k_ZXmr8pmrs", "q": "What is the main activity?", "a": "Canoeing."},
        {"video_id": "v_k_ZXmr8pmrs", "q": "Where?", "a": "On a river."},
        {"video_id": "v_missing", "q": "Where?", "a": "Nowhere."},
        {"video_id": "v_2", "q": "Who?", "a": None},
        {"video_id": "v_2", "q": None, "a": "Somebody."},
        {"video_id": "v_2", "q": "Who?", "a": "Somebody."},
        # As Video-ChatGPT's own converter leaves it.
        {"id": "v_1", "video": "v_1.pkl", "conversations": human("What?\n<video>", "A.")},
    ]
    root = touch(tmp_path / "videos", "train/v_k_ZXmr8pmrs.mkv", "v_2.webm", "v_2.pkl", "v_1.MP4")
    data = write(tmp_path / "VideoInstruct100K.json", *asked)
    samples, _ = convert(video_instruct_100k, data, images_path=root)
    assert [(s.id, *s.visuals) for s in samples] == [
        ("v_k_ZXmr8pmrs", "train/v_k_ZXmr8pmrs.mkv"),
        ("v_k_ZXmr8pmrs#2", "train/v_k_ZXmr8pmrs.mkv"),
        ("v_2", "v_2.webm"),
        ("v_1", "v_1.MP4"),
    ]
    assert texts(samples[1]) == ["<video>\nWhere?", "On a river."]
    assert texts(samples[3])[0] == "What?\n<video>"
    assert list(dropped(tmp_path)) == [3, 4, 5]
    assert convert(video_instruct_100k, data)[0][0].visuals == ["v_k_ZXmr8pmrs.mp4"]


def test_minimind_v_of_2024_and_2025(tmp_path, convert):
    turns = human("<image>\n下山还是越野?", "越野滑雪。", "为什么？", "小径。")
    old = [
        {"id": "000000334872", "image": "000000334872.jpg", "conversations": turns},
        {"id": "x", "image": "GCC_1.jpg", "conversations": human("<image>", "")},
    ]
    new = [
        {"conversations": user("有什么影响？<image>", "床头柜..."), "image": "train_0_0.jpg"},
        {"conversations": user("你好", "你好！")},
        {"conversations": [{"content": "<image>谁"}, {"content": "猫"}], "image": "a/1.jpg"},
    ]
    turns = human("Source: <image> Target: <image> What?", "Take.")
    several = [
        {"id": "000000000000", "image": "0.jpg, 1.jpg", "conversations": turns},
        {"image": "0.jpg, 1.jpg", "conversations": human("<image>\n<image>\n<image>", "False")},
        {"image": "0.jpg, ", "conversations": human("<image> <image>", "False")},
    ]
    images = ["COCO_train2014_000000334872.jpg", "GCC_1.jpg", "train_0_0.jpg"]
    images += ["a/COCO_train2014_1.jpg", "0.jpg", "1.jpg"]
    root = touch(tmp_path / "images", *images)
    data = [write(tmp_path / "230k.json", *old), write(tmp_path / "sft.jsonl", *new)]
    samples, report = convert(minimind_v, *data, images_path=root)
    assert [(sample.id, *sample.visuals) for sample in samples] == [
        ("000000334872", "COCO_train2014_000000334872.jpg"),
        ("sft-1", "train_0_0.jpg"),
        ("sft-2",),
        ("sft-3", "a/COCO_train2014_1.jpg"),
    ]
    assert len(samples[0].messages) == 4 and samples[3].messages == user("<image>谁", "猫")
    assert "dropped 1," in report and "turn 2: the answer is empty" in report

    data = write(tmp_path / "output.json", *several)
    (sample,), _ = convert(minimind_v, data, images_path=root)
    assert (sample.id, sample.visuals) == ("000000000000", ["0.jpg", "1.jpg"])
    reasons = dropped(tmp_path)
    assert "3 visual tags (<image>, <video>) for 2 visuals" in reasons[2]
    assert "must be relative" in reasons[3]


def test_minimind_v_parquet(tmp_path, convert):
    rows = [
        (user("<image>\n请提供对图片的详细文字描述。", "红色。"), picture("red")),
        (user("什么颜色？<image>", "还是红色。"), picture("red")),
        (user("你好", "你好！"), picture("black", (8, 8))),
        (user("<image> <image>", "多了一个。"), picture("blue")),
        (user("<image>", "坏了。"), b"\xff\xd8\xff broken"),
        (user("没有标记", "这张图片没有位置。"), picture("blue")),
        (user("<image>", "没有图片。"), None),
        (user("<image>\n什么？", "蓝色。"), picture("blue", format="PNG")),
    ]
    records = [{"conversations": json.dumps(turns), "image_bytes": image} for turns, image in rows]
    data = write(tmp_path / "sft_i2t.parquet", *records)
    root = tmp_path / "pictures"
    samples, _ = convert(minimind_v, data, images_path=root)
    kept = (0, 1, 2, 5, 7)
    assert [s.id for s in samples] == [f"sft_i2t-{row}" for row in kept]
    assert [s.messages for s in samples] == [rows[row][0] for row in kept]
    assert [len(s.visuals) for s in samples] == [1, 1, 0, 0, 1]
    colours = [pixel(samples[i], root) for i in (0, 1, 4)]
    assert colours == [(254, 0, 0), (254, 0, 0), (0, 0, 255)]
    reasons = dropped(tmp_path)
    assert list(reasons) == [3, 4, 6]
    assert "2 visual tags" in reasons[3] and "can't be read" in reasons[4]
    assert "1 visual tags (<image>, <video>) for 0 visuals" in reasons[6]
    suffixes = sorted(path.suffix for path in root.rglob("*") if path.is_file())
    assert suffixes == [".jpg", ".png"]  # the red one once


def test_sharegpt4video(tmp_path, convert):
    def line(name, *captions, archive="panda_videos_1.zip"):
        captions = [{"idx": idx, "content": content} for idx, content in captions]
        about = {"video_id": name, "video_path": f"panda/{name}.mp4", "zip_folder": archive}
        return about | {"captions": captions, "timestamp": ["00:00:00.000", "00:00:06.000"]}

    data = write(
        tmp_path / "sharegpt4video_40k.jsonl",
        line("j5JqNXjGufw", ("1", "First."), ("2", "Then."), ("-1", "The whole of it.")),
        line("unpacked", (-1, "Of another archive."), archive="zips/bdd100k.zip"),
        line("parts", ("1", "First.")),
    )
    data.write_text(data.read_text() + "{broken\n")
    root = touch(tmp_path / "videos", "panda/j5JqNXjGufw.mp4", "bdd100k/unpacked.mp4")
    (one, two), _ = convert(sharegpt4video, data, images_path=root)
    assert (one.id, one.visuals) == ("j5JqNXjGufw", ["panda/j5JqNXjGufw.mp4"])
    assert texts(one)[0].startswith("<video>\n") and texts(one)[1] == "The whole of it."
    assert two.visuals == ["bdd100k/unpacked.mp4"]
    assert list(dropped(tmp_path)) == [3, 4]
    again, _ = convert(sharegpt4video, data, images_path=root)
    assert [s.messages for s in again] == [one.messages, two.messages]


def test_a_json_array_is_converted_by_the_command_that_training_names(tmp_path):
    records = [
        {"id": 1, "video": "a.mp4", "conversations": human("<video>?", "一只猫 \u2028 😀"), "x": 3},
        {"conversations": user("Hi", "Hello"), "scoring": [{"type": "x"}], "language": "en"},
    ]
    path = tmp_path / "my data.json"
    path.write_text("\ufeff \n" + json.dumps(records, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match="my data.json: this is a JSON array; convert it") as error:
        read_samples(path)
    command = f"{sys.executable} {str(error.value).partition('python ')[2]}"
    told = run("bash", "-c", command)
    output = tmp_path / "my data.jsonl"
    assert f"{output}: 2 samples of 2 records" in told.stdout
    assert "records/s" in told.stderr  # progress
    (video, text) = read_samples(output)
    assert (video.id, video.visuals, texts(video)[1]) == ("1", ["a.mp4"], "一只猫 \u2028 😀")
    assert (text.id, text.scoring, text.language) == ("my data-2", [{"type": "x"}], "en")
    assert json.loads(output.read_text().split("\n")[0])["x"] == 3


def test_parquets_of_several_pictures_of_paths_and_of_the_datasets_library(tmp_path, convert):
    struct = {"bytes": picture("blue"), "path": "x.jpg"}
    several, text = (
        json.dumps(turns) for turns in (user("<image><image>?", "Red."), user("", "Hi"))
    )
    tables = {
        "several": [{"conversations": several, "image_bytes": [picture("red"), picture("lime")]}],
        "paths": [{"conversations": user("<video>\nWhat?", "Up."), "video": "b.mp4", "id": 7}],
        "structs": [{"conversations": user("<image>?", "Blue."), "images": [struct]}],
        "text": [{"conversations": "{", "id": b"\xff"}, {"conversations": text}],
    }
    paths = [write(tmp_path / f"{name}.parquet", *rows) for name, rows in tables.items()]
    with pytest.raises(ValueError, match="a parquet; convert it.*to_jsonl.* --images_path"):
        read_samples(tmp_path / "paths.parquet")
    root = touch(tmp_path / "root", "b.mp4")
    (two, path, struct, text), _ = convert(to_jsonl, *paths, images_path=root)
    assert [pixel(two, root, i) for i in (0, 1)] == [(254, 0, 0), (0, 255, 1)]
    assert (path.id, path.visuals) == ("7", ["b.mp4"])
    assert pixel(struct, root) == (0, 0, 254) and text.visuals == []
    assert "not JSON" in dropped(tmp_path)[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["gone.json"], "gone.json: no such file or folder"),
        (["empty"], "no .json, .jsonl, .parquet in empty"),
        (["a.json", "--output", "x.json"], "must be a name that ends in .jsonl"),
        (["b.jsonl", "--output", "b.jsonl"], "b.jsonl is an input too"),
        (["a.json", "--images_path", "no"], "no such folder"),
        (["x.parquet"], "--images_path is missing"),
        (["z.parquet"], "not a parquet that can be read"),
        (["cut.json"], "cut.json: the JSON array is broken"),
        (["b.jsonl"], "none of 1 records can be used"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "a.json", NEXTQA)
    write(tmp_path / "b.jsonl", 3)
    (tmp_path / "cut.json").write_text(json.dumps([NEXTQA, NEXTQA])[:-20])
    (tmp_path / "z.parquet").write_bytes(b"PAR1 but no more")
    row = {"conversations": human("<image>", "Red."), "image_bytes": picture("red")}
    write(tmp_path / "x.parquet", row)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=reason):
        to_jsonl.main("", to_jsonl.convert, ["--output", "x.jsonl", "--data_path", *arguments])
    assert sorted(tmp_path.rglob("*")) == before
