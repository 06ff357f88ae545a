"""The field's datasets, in files that look as theirs do, through the commands that convert them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset.samples import Sample, Samples, read_samples
from scripts.convert import (
    llava_video_178k,
    minimind_v,
    sharegpt4video,
    to_jsonl,
    video_instruct_100k,
)

ROOT = Path(__file__).resolve().parents[2]


def human(*texts: str) -> list[dict]:
    """Turns in LLaVA's style, human and gpt by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def user(*texts: str) -> list[dict]:
    """Turns in MiniMind-V's style."""
    return [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate(texts)]


def write_json(path: Path, records: list, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False, **options), encoding="utf-8")
    return path


def write_jsonl(path: Path, records: list) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"media")
    return root


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


def dropped(tmp_path) -> list[tuple[int, str]]:
    lines = (tmp_path / "out/new.dropped.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["line"], line["reason"]) for line in map(json.loads, lines)]


def texts(sample: Sample) -> list[str]:
    return [message["content"] for message in sample.messages]


# ------------------------------------------------------------------------------ LLaVA-Video-178K

NEXTQA = {
    "id": "1006-8968804598",
    "conversations": human(
        "<image>\nWhy are the men sitting?\nA. resting.\nE. training.\nPlease provide your answer "
        "by stating the letter followed by the full option.",
        "E. training.",
    ),
    "data_source": "0_30_s_nextqa",
    "video": "NextQA/NExTVideo/1006/8968804598.mp4",
}
CHARADES = {
    "id": "RW587",
    "conversations": human("<image>\nDescribe.", "A man sits.", "And then?", "He stands up."),
    "data_source": "0_30_s_academic_v0_1",
    "video": "academic_source/Charades/RW587.mp4",
}


def test_llava_video(tmp_path, convert):
    data = tmp_path / "LLaVA-Video-178K"
    folder = data / "0_30_s_academic_v0_1"
    mc = write_json(data / "0_30_s_nextqa/0_30_s_nextqa_mc_qa_processed.json", [NEXTQA])
    again = CHARADES | {"conversations": human("<image>\nWho?", "A man.")}
    write_json(folder / "0_30_s_academic_v0_1_cap_processed.json", [CHARADES], indent=2)
    write_json(folder / "0_30_s_academic_v0_1_oe_v0_1_qa_processed.json", [again, again])
    # One subset was unpacked beside the annotations, the other into the dataset's own folder.
    touch(data, NEXTQA["video"], f"0_30_s_academic_v0_1/{CHARADES['video']}")

    (caption, question, nextqa), report = convert(llava_video_178k, data, images_path=data)
    assert (nextqa.id, nextqa.visuals) == (NEXTQA["id"], [NEXTQA["video"]])
    assert texts(nextqa)[0].startswith("<video>\nWhy are") and texts(nextqa)[1] == "E. training."
    assert caption.visuals == ["0_30_s_academic_v0_1/academic_source/Charades/RW587.mp4"]
    assert texts(caption) == ["<video>\nDescribe.", "A man sits.", "And then?", "He stands up."]
    assert (caption.id, question.id) == ("RW587", "RW587#2")  # one video, two questions
    assert "3 samples of 4 records" in report
    assert dropped(tmp_path) == [(2, "the same as an earlier record, word for word")]
    first = json.loads((tmp_path / "out/new.jsonl").read_text().splitlines()[0])
    assert list(first) == ["id", "video", "conversations", "data_source"]

    without_root, _ = convert(llava_video_178k, mc)
    assert without_root[0].visuals == [NEXTQA["video"]]  # as it stands, unchecked


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"video": "../../etc/passwd"}, "must be relative and without '..'"),
        ({"video": "/data/a.mp4"}, "must be relative"),
        ({"video": "C:\\a.mp4"}, "names a drive"),
        ({"video": "out/a.mp4"}, "is a link out of"),
        ({"video": "gone.mp4"}, "there is no file 'gone.mp4' under"),
        ({"video": "x/twice.mp4"}, "2 files end in 'twice.mp4'"),
        ({"video": "x" * 5000}, "name too long"),
        ({"video": None}, "no video is named"),
        ({"conversations": human("<image><image>", "x")}, "2 visual tags"),
        ({"conversations": human("<image>", "")}, "turn 2: the answer is empty"),
        ({"conversations": human("<image>", None)}, "turn 2: its text must be a string"),
        ({"conversations": human("<image>", "a", "b")}, "the last turn must be an answer"),
        ({"conversations": human("<image>", "a")[::-1]}, "turn 1 is assistant's, expected user's"),
        ({"conversations": human("<image>") * 2}, "turn 2 is user's, expected assistant's"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "role 'tool' isn't one of"),
        ({"conversations": [{"from": ["x"], "value": "x"}]}, r"role \['x'\] isn't one of"),
        ({"conversations": []}, "at least one turn"),
        ({"conversations": "none"}, "must be a list of turns"),
        ({"conversations": human("<image>", "\ud83d")}, "surrogates not allowed"),
        ({"id": [1]}, "'id' must be a string"),
    ],
)
def test_records_that_cannot_be_used_are_dropped_and_listed(tmp_path, convert, change, reason):
    root = touch(tmp_path / "videos", NEXTQA["video"], "a/twice.mp4", "b/twice.mp4")
    (tmp_path / "elsewhere").mkdir()
    touch(tmp_path / "elsewhere", "a.mp4")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([NEXTQA | change, NEXTQA]))  # escaped: half a pair can't be written
    samples, report = convert(llava_video_178k, data, images_path=root)
    assert len(samples) == 1
    ((line, said),) = dropped(tmp_path)
    assert line == 1
    pytest.raises(ValueError, raise_, said).match(reason)
    assert str(data) + ":1" in report


def raise_(text: str):
    raise ValueError(text)


def test_a_file_in_another_folder_is_found_by_its_name(tmp_path, convert):
    record = NEXTQA | {"video": "./NextQA//NExTVideo/1006/8968804598.mp4"}
    root = touch(tmp_path / "videos", "unpacked/1006/8968804598.mp4", "copy/8968804598.mp4")
    (sample,), report = convert(
        llava_video_178k, write_json(tmp_path / "a.json", [record]), images_path=root
    )
    assert sample.visuals == ["unpacked/1006/8968804598.mp4"]
    assert "1 × a file found under another path" in report


# ---------------------------------------------------------------------------- VideoInstruct-100K


def test_video_instruct(tmp_path, convert):
    asked = [
        {"video_id": "v_k_ZXmr8pmrs", "q": "What is the main activity?", "a": "Canoeing."},
        {"video_id": "v_k_ZXmr8pmrs", "q": "Where?", "a": "On a river."},
        {"video_id": "v_missing", "q": "Where?", "a": "Nowhere."},
        {"video_id": "v_2", "q": "Who?", "a": None},
        {"video_id": "v_2", "q": None, "a": "Somebody."},
        {"video_id": "v_2", "q": "Who?", "a": "Somebody."},
    ]
    root = touch(tmp_path / "videos", "train/v_k_ZXmr8pmrs.mkv", "v_2.MP4", "v_2.webm", "v_2.pkl")
    data = write_json(tmp_path / "VideoInstruct100K.json", asked)
    samples, report = convert(video_instruct_100k, data, images_path=root)
    assert [s.id for s in samples] == ["v_k_ZXmr8pmrs", "v_k_ZXmr8pmrs#2", "v_2"]
    paths = [["train/v_k_ZXmr8pmrs.mkv"]] * 2 + [["v_2.webm"]]
    assert [s.visuals for s in samples] == paths
    assert texts(samples[1]) == ["<video>\nWhere?", "On a river."]
    assert [line for line, _ in dropped(tmp_path)] == [3, 4, 5]
    assert "there is no file 'v_missing.mp4'" in report
    assert convert(video_instruct_100k, data)[0][0].visuals == ["v_k_ZXmr8pmrs.mp4"]


def test_video_instruct_as_its_own_converter_leaves_it(tmp_path, convert):
    trained = [
        {"id": "v_1", "video": "v_1.pkl", "conversations": human("What?\n<video>", "A.")},
        {"id": "v_1", "video": "v_1.pkl", "conversations": human("<video>\nWho?", "B.")},
    ]
    data = write_json(tmp_path / "video_chatgpt_training.json", trained)
    root = touch(tmp_path / "videos", "v_1.mp4")
    samples, _ = convert(video_instruct_100k, data, images_path=root)
    assert [(s.visuals, texts(s)[0]) for s in samples] == [
        (["v_1.mp4"], "What?\n<video>"),
        (["v_1.mp4"], "<video>\nWho?"),
    ]


# --------------------------------------------------------------------- Chinese-LLaVA, MiniMind-V


def test_minimind_v_of_2024_and_2025(tmp_path, convert):
    old = [
        {
            "id": "000000334872",
            "image": "000000334872.jpg",
            "conversations": human("<image>\n下山还是越野?", "越野滑雪。", "为什么？", "小径。"),
        },
        {
            "id": "GCC_train_000644518",
            "image": "GCC_train_000644518.jpg",
            "conversations": human("写一篇简短的图片摘要.\n<image>", "加入盐水,慢动作fps"),
        },
        {"id": "x", "image": "GCC_train_000644518.jpg", "conversations": human("<image>", "")},
    ]
    new = [
        {
            "conversations": user("闹钟的位置有什么影响？<image>", "把闹钟放在床头柜..."),
            "image": "train-00000-of-00001_image_0_0.jpg",
        },
        {"conversations": user("你好", "你好！")},
        {"conversations": [{"content": "<image>谁"}, {"content": "猫"}], "image": "a/1.jpg"},
    ]
    root = touch(
        *(tmp_path / "images", "COCO_train2014_000000334872.jpg", "GCC_train_000644518.jpg"),
        *("train-00000-of-00001_image_0_0.jpg", "a/COCO_train2014_1.jpg"),
    )
    data = [write_json(tmp_path / "230k.json", old), write_jsonl(tmp_path / "sft.jsonl", new)]
    samples, report = convert(minimind_v, *data, images_path=root)
    assert [sample.id for sample in samples] == [
        *("000000334872", "GCC_train_000644518", "sft-1", "sft-2", "sft-3")
    ]
    assert [sample.visuals for sample in samples] == [
        ["COCO_train2014_000000334872.jpg"],
        ["GCC_train_000644518.jpg"],
        ["train-00000-of-00001_image_0_0.jpg"],
        [],
        ["a/COCO_train2014_1.jpg"],
    ]
    assert len(samples[0].messages) == 4 and texts(samples[1])[0].endswith(".\n<image>")
    assert samples[4].messages == user("<image>谁", "猫")
    assert "dropped 1," in report and "turn 2: the answer is empty" in report


def picture(color, size=(16, 12), format="JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


def write_parquet(path, rows, image_type, **options) -> Path:
    conversations = [json.dumps(turns, ensure_ascii=False) for turns, _ in rows]
    images = pa.array([images for _, images in rows], image_type)
    pq.write_table(
        pa.table({"conversations": conversations, "image_bytes": images}), path, **options
    )
    return path


ROWS = [
    (user("<image>\n请提供对图片的详细文字描述。", "红色。"), picture("red")),
    (user("什么颜色？<image>", "还是红色。"), picture("red")),
    (user("你好", "你好！"), picture("black", (8, 8))),
    (user("<image> <image>", "多了一个。"), picture("blue")),
    (user("<image>", "坏了。"), b"\xff\xd8\xff broken"),
    (user("没有标记", "这张图片没有位置。"), picture("blue")),
    (user("<image>", "没有图片。"), None),
    (user("<image>\n什么？", "蓝色。"), picture("blue", format="PNG")),
]


def seen(sample, root) -> list[int]:
    return list(Image.open(sample.files(root)[0]).convert("RGB").getpixel((5, 5)))


def test_minimind_v_parquet(tmp_path, convert):
    data = write_parquet(tmp_path / "sft_i2t.parquet", ROWS, pa.binary())
    root = tmp_path / "pictures"
    samples, report = convert(minimind_v, data, images_path=root)
    assert [s.id for s in samples] == ([f"sft_i2t-{row}" for row in (0, 1, 2, 5, 7)])
    assert [texts(s)[1] for s in samples] == [ROWS[row][0][1]["content"] for row in (0, 1, 2, 5, 7)]
    assert [len(s.visuals) for s in samples] == [1, 1, 0, 0, 1]
    colours = [seen(samples[i], root) for i in (0, 1, 4)]
    assert colours == [[254, 0, 0], [254, 0, 0], [0, 0, 255]]
    reasons = dict(dropped(tmp_path))
    assert list(reasons) == [3, 4, 6]
    assert "2 visual tags" in reasons[3] and "can't be read" in reasons[4]
    assert "1 visual tags (<image>, <video>) for 0 visuals" in reasons[6]
    assert "1 × a picture without a tag was left out" in report

    files = sorted(path.suffix for path in root.rglob("*") if path.is_file())
    assert files == [".jpg", ".png"]  # the red one once
    times = [path.stat().st_mtime_ns for path in root.rglob("*.jpg")]
    convert(minimind_v, data, images_path=root)
    assert times == [path.stat().st_mtime_ns for path in root.rglob("*.jpg")]


def test_multi_image(tmp_path, convert):
    records = [
        {
            "id": "000000000000",
            "image": "0.jpg, 1.jpg",
            "conversations": human("Source Image: <image> Target Image: <image> What?", "Take."),
        },
        {
            "id": "000000013633",
            "image": "27266.jpg, 27267.jpg",
            "conversations": human("<image>\n<image>\n<image>\nSame?", "False"),
        },
        {"id": "3", "image": "0.jpg, ", "conversations": human("<image> <image>", "False")},
    ]
    root = touch(tmp_path / "images", "0.jpg", "1.jpg", "27266.jpg", "27267.jpg")
    data = write_json(tmp_path / "output.json", records)
    (sample,), _ = convert(minimind_v, data, images_path=root)
    assert (sample.id, sample.visuals) == ("000000000000", ["0.jpg", "1.jpg"])
    (stray, empty) = dropped(tmp_path)
    assert stray[0] == 2 and "3 visual tags (<image>, <video>) for 2 visuals" in stray[1]
    assert empty[0] == 3 and "must be relative" in empty[1]


# ------------------------------------------------------------------------- any array or parquet


def test_a_json_array_is_converted_by_the_command_that_training_names(tmp_path, monkeypatch):
    records = [
        {
            "id": 1,
            "video": "a.mp4",
            "conversations": human("<video>?", "一只猫 \u2028 😀"),
            "fps": 3,
        },
        {"conversations": user("Hi", "Hello"), "scoring": [{"type": "x"}], "language": "en"},
    ]
    path = tmp_path / "my data.json"
    path.write_text("\ufeff \n" + json.dumps(records, indent=1), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"my data.json: this is a JSON array; convert it"
    ) as error:
        read_samples(path)
    command = str(error.value).partition("python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=ROOT)
    (video, text) = read_samples(tmp_path / "my data.jsonl")
    assert (video.id, video.visuals, texts(video)[1]) == ("1", ["a.mp4"], "一只猫 \u2028 😀")
    assert (text.id, text.scoring, text.language) == ("my data-2", [{"type": "x"}], "en")
    assert json.loads((tmp_path / "my data.jsonl").read_text().split("\n")[0])["fps"] == 3


def test_parquets_of_several_pictures_of_paths_and_of_the_datasets_library(tmp_path, convert):
    two = {"bytes": picture("blue"), "path": "x.jpg"}
    tables = {
        "several": {
            "conversations": [json.dumps(user("<image> or <image>?", "Red."))],
            "image_bytes": [[picture("red"), picture("blue")]],
        },
        "paths": {"conversations": [user("<video>\nWhat?", "Up.")], "video": ["b.mp4"], "id": [7]},
        "structs": {"conversations": [user("<image>?", "Blue.")], "images": [[two]]},
        "text": {"conversations": ["{", json.dumps(human("Hi", "Hello"))], "id": [b"\xff", None]},
    }
    for name, table in tables.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="a parquet; convert it.*to_jsonl.* --images_path"):
        read_samples(tmp_path / "paths.parquet")
    root = touch(tmp_path / "root", "b.mp4")
    samples, _ = convert(
        to_jsonl, *(tmp_path / f"{name}.parquet" for name in tables), images_path=root
    )
    assert seen(samples[0], root) == [254, 0, 0] and len(samples[0].visuals) == 2
    assert (samples[1].id, samples[1].visuals) == ("7", ["b.mp4"])
    assert seen(samples[2], root) == [0, 0, 254] and samples[3].visuals == []
    ((row, reason),) = dropped(tmp_path)
    assert row == 0 and "not JSON" in reason


# -------------------------------------------------------------------------------- ShareGPT4Video


def test_sharegpt4video(tmp_path, convert):
    def line(name, captions, archive="panda_videos_1.zip"):
        path = f"panda/{name}.mp4"
        return {
            "video_id": name,
            "video_path": path,
            "zip_folder": archive,
            "captions": captions,
            "timestamp": ["00:00:00.000", "00:00:06.000"],
        }

    parts = [{"idx": "1", "content": "First."}, {"idx": "2", "content": "Then."}]
    lines = [
        line("j5JqNXjGufw", [*parts, {"idx": "-1", "content": "The whole of it."}]),
        line("unpacked", [{"idx": -1, "content": "Of another archive."}], "zips/bdd100k.zip"),
        line("parts", parts),
    ]
    root = touch(tmp_path / "videos", "panda/j5JqNXjGufw.mp4", "bdd100k/unpacked.mp4")
    data = write_jsonl(tmp_path / "sharegpt4video_40k.jsonl", lines)
    data.write_text(data.read_text() + "{broken\n")
    (one, two), report = convert(sharegpt4video, data, images_path=root)
    assert (one.id, one.visuals) == ("j5JqNXjGufw", ["panda/j5JqNXjGufw.mp4"])
    assert texts(one)[0].startswith("<video>\n") and texts(one)[1] == "The whole of it."
    assert two.visuals == ["bdd100k/unpacked.mp4"]
    assert [line for line, _ in dropped(tmp_path)] == [3, 4]
    again, _ = convert(sharegpt4video, data, images_path=root)
    assert [s.messages for s in again] == [one.messages, two.messages]
    assert "2 samples of 4 records" in report


# ---------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--data_path", "gone.json", "--output", "x.jsonl"], "gone.json: no such file or folder"),
        (["--data_path", "empty", "--output", "x.jsonl"], "no .json, .jsonl, .parquet in empty"),
        (["--data_path", "a.json", "--output", "x.json"], "must be a name that ends in .jsonl"),
        (["--data_path", "b.jsonl", "--output", "b.jsonl"], "b.jsonl is an input too"),
        (["--data_path", "a.json", "--output", "x.jsonl", "--images_path", "no"], "no such folder"),
        (["--data_path", "x.parquet", "--output", "x.jsonl"], "--images_path is missing"),
        (["--data_path", "cut.json", "--output", "x.jsonl"], "cut.json: the JSON array is broken"),
        (["--data_path", "b.jsonl", "--output", "x.jsonl"], "none of 1 records can be used"),
        (["--data_path", "z.parquet", "--output", "x.jsonl"], "not a parquet that can be read"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "a.json", [NEXTQA])
    write_jsonl(tmp_path / "b.jsonl", [3])
    (tmp_path / "cut.json").write_text(json.dumps([NEXTQA, NEXTQA])[:-20])
    (tmp_path / "z.parquet").write_bytes(b"PAR1 but no more")
    write_parquet(tmp_path / "x.parquet", ROWS, pa.binary())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=reason):
        llava_video_178k.main("", llava_video_178k.convert, arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command(tmp_path):
    data = write_json(tmp_path / "x_mc_qa_processed.json", [NEXTQA, CHARADES | {"video": "gone"}])
    root = touch(tmp_path / "videos", NEXTQA["video"])
    result = subprocess.run(
        [sys.executable, "-m", "scripts.convert.llava_video_178k", "--data_path", str(data)]
        + ["--images_path", str(root), "--output", str(tmp_path / "new.jsonl")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "new.jsonl: 1 samples of 2 records\ndropped 1, listed in" in result.stdout
    assert f"{data}:2: there is no file 'gone'" in result.stdout
    assert f"next: python -m scripts.check_data --data_path {tmp_path}/new.jsonl" in result.stdout
    assert "records/s" in result.stderr  # progress
    assert len(read_samples(tmp_path / "new.jsonl")) == 1


def test_ids_that_come_again_are_numbered(tmp_path, convert):
    names = ["7", "7", "7#2", "7", "7#2"]
    records = [NEXTQA | {"id": name, "video": f"{i}.mp4"} for i, name in enumerate(names)]
    samples, _ = convert(llava_video_178k, write_json(tmp_path / "a.json", records))
    assert [sample.id for sample in samples] == ["7", "7#2", "7#2#2", "7#3", "7#2#3"]
