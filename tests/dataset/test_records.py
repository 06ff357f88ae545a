"""Records out of jsonl, JSON arrays and parquets: what is read, with how much memory."""

import io
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataset import parquet, records
from dataset.records import read_records
from dataset.samples import read_samples, resolve_under

ROOT = Path(__file__).resolve().parents[2]


def turns(question: str, answer: str = "A cat.") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def picture(color, size=(16, 12), format="JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format, **options)
    return file.getvalue()


BLACK = picture("black", (8, 8))  # what MiniMind-V fills the image column of text with


# ---------------------------------------------------------------------------------- JSON arrays


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_an_array_is_the_same_wherever_the_window_ends(tmp_path, monkeypatch, chunk):
    items = [
        *({"id": 1, "text": '"],}[{ 一只猫 \u2028 😀 \\'}, {}, [], "x", 12, -1.5e3, True, None),
        *([[[]]], {"a": {"b": ["c"]}}, "long " * 50),
    ]
    path = tmp_path / "data.json"
    monkeypatch.setattr(records, "CHUNK", chunk)
    for text in (json.dumps(items), json.dumps(items, ensure_ascii=False, indent=1) + "\n\n"):
        path.write_text("\ufeff \r\n\t" + text, encoding="utf-8")
        assert list(read_records(path)) == list(enumerate(items, 1))
    path.write_text(" [ ] ")
    assert list(read_records(path)) == []


@pytest.mark.parametrize(
    ("text", "items", "reason"),
    [
        ('[{"a": 1}, {"a": }]', 1, "item 2: Expecting value near"),
        ('[{"a": 1}', 1, "item 1 must be followed by"),
        ("[1 2]", 1, "must be followed by ',' or ']', not '2'"),
        ("[1, ]", 1, "item 2: Expecting value"),
        ("[1", 1, "item 1 must be followed by"),
        ("[1] [2]", 1, "text follows its end"),
        ('["\xff"]', 0, "codec can't decode"),
        ("[" * 100_000, 0, "recursion"),
        ('["' + "x" * 5000, 0, "item 1: Unterminated string"),
    ],
)
def test_a_broken_array_gives_what_precedes_the_break(tmp_path, monkeypatch, text, items, reason):
    path = tmp_path / "data.json"
    path.write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(records, "MAX_RECORD", 2000)
    monkeypatch.setattr(records, "CHUNK", 64)
    read = []
    with pytest.raises(ValueError, match=rf"data\.json: the JSON array is broken: .*{reason}"):
        for _, item in read_records(path):
            read.append(item)
    assert len(read) == items


def test_an_array_is_never_held_whole(tmp_path):
    path = tmp_path / "large.json"
    item = json.dumps({"conversations": turns("x" * 2000)})
    with path.open("w") as file:
        file.write("[" + (item + ",\n") * 10_000 + item + "]")
    sizes = []
    tracemalloc.start()
    count = sum(1 for _ in read_records(path, sizes.append))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_001
    assert sum(sizes) == path.stat().st_size > 20_000_000 and len(sizes) > 10
    assert peak < 8_000_000  # a window of 1 MiB, once as bytes and twice as text


# ---------------------------------------------------------------------------------------- jsonl


def test_lines_as_other_systems_write_them(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    text = '\ufeff{"a": "\u2028\x85 一"}\r\n\r\n  \n'
    text += '\ufeff{"a": 2}\r\nnot json\n["list"]\n' + "[" * 9999
    path.write_bytes(text.encode())
    read = dict(read_records(path))
    assert list(read) == [1, 4, 5, 6, 7]  # the editor's numbers; U+2028 ends no line
    assert read[1] == {"a": "\u2028\x85 一"} and read[4] == {"a": 2} and read[6] == ["list"]
    assert isinstance(read[5], ValueError) and isinstance(read[7], ValueError)

    monkeypatch.setattr(records, "MAX_RECORD", 100)
    path.write_text(json.dumps("x" * 300) + "\n" + json.dumps({"a": 3}) + "\n")
    (one, long), (two, short) = read_records(path)
    assert (one, two, short) == (1, 2, {"a": 3}) and "longer than" in str(long)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"PK\x03\x04", "a zip archive; unpack it"),
        (b"\x1f\x8b\x08", "compressed with gzip"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PAR1 but no more", "not a parquet that can be read"),
    ],
)
def test_what_is_no_data_yet_is_said_to_be(tmp_path, head, reason):
    (tmp_path / "data.jsonl").write_bytes(head)
    with pytest.raises(ValueError, match=f"data.jsonl: .*{reason}"):
        list(read_records(tmp_path / "data.jsonl"))


# -------------------------------------------------------------------------------------- parquet


def write_parquet(path, rows: list[tuple], image_type=None, **options) -> Path:
    """rows: (conversations, image_bytes); as MiniMind-V's: JSON strings beside bytes."""
    image_type = image_type or pa.binary()
    table = {
        "conversations": pa.array([json.dumps(c, ensure_ascii=False) for c, _ in rows]),
        "image_bytes": pa.array([images for _, images in rows], image_type),
    }
    pq.write_table(pa.table(table), path, **options)
    return path


ROWS = [
    (turns("<image>\n请提供对图片的详细文字描述。", "红色。"), picture("red")),
    (turns("根据图片推断这个场景的大致时间？<image>", "夜晚。"), picture("navy", format="PNG")),
    (turns("你好", "你好！"), BLACK),
    (turns("<image>\nWhat colour?", "Green."), picture((0, 200, 0))),
]


def colour(path) -> list[int]:
    picture = Image.open(io.BytesIO(parquet.read_image(path)))
    return list(picture.convert("RGB").getpixel((5, 5)))


def test_a_parquet_is_a_data_set(tmp_path):
    path = write_parquet(tmp_path / "sft.parquet", ROWS, row_group_size=2)
    samples = read_samples(path)
    assert [sample.id for sample in samples] == ["sft-0", "sft-1", "sft-2", "sft-3"]
    assert [len(sample.visuals) for sample in samples] == [
        1,
        1,
        0,
        1,
    ]  # the black one stands for text
    assert samples[2].messages == ROWS[2][0] and samples[3].where == f"{path}:3"
    seen = [colour(sample.files("elsewhere")[0]) for sample in samples if sample.visuals]
    assert abs(seen[0][0] - 254) < 3 and seen[1] == [0, 0, 128] and abs(seen[2][1] - 200) < 3

    # What names a picture is a string like any other, and survives the way to a worker.
    name = samples[1].visuals[0]
    assert name == f"sft.parquet@{parquet.fingerprint(str(path))}/1.0"
    assert resolve_under("x", pickle.loads(pickle.dumps(name))) == path / "1.0"


def test_several_pictures_a_row(tmp_path):
    rows = [
        (turns("Source: <image> Target: <image> Which?"), [picture("red"), picture("blue")]),
        (turns("Hello"), [BLACK]),
        (turns("<image>"), [picture("white")]),
    ]
    path = write_parquet(tmp_path / "multi.parquet", rows, pa.list_(pa.binary()))
    two, text, one = read_samples(path)
    assert [colour(file) for file in two.files("")] == [[254, 0, 0], [0, 0, 254]]
    assert (text.visuals, len(one.visuals)) == ([], 1)

    stray = [(turns("<image> <image> <image>"), [picture("red"), picture("blue")])]
    path = write_parquet(tmp_path / "stray.parquet", stray, pa.list_(pa.binary()))
    with pytest.raises(ValueError, match=r"stray\.parquet:0: 3 visual tags .* for 2 visuals"):
        read_samples(path)


def test_a_parquet_of_paths(tmp_path):
    table = {"conversations": [turns("<video>\nWhat?")], "video": ["a/b.mp4"], "id": [7]}
    pq.write_table(pa.table(table), tmp_path / "paths.parquet")
    (sample,) = read_samples(tmp_path / "paths.parquet")
    assert (sample.id, sample.visuals) == ("7", ["a/b.mp4"])
    assert sample.messages == turns("<video>\nWhat?")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"text": ["x"]}, r"no column 'conversations', only \['text'\]"),
        ({"conversations": ["{"]}, "'conversations' isn't JSON"),
        ({"conversations": [None]}, "must be a list"),
        ({"conversations": ["[3]"], "image_bytes": [b""]}, "turn 1 must be an object"),
    ],
)
def test_a_parquet_that_is_no_data_set(tmp_path, table, reason):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=rf"x\.parquet.*{reason}"):
        read_samples(tmp_path / "x.parquet")


def test_row_groups_too_large_to_read_pictures_from_are_refused(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "large.parquet", ROWS)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(ValueError, match="row group .* scripts.convert.chinese_llava"):
        read_samples(path)


def test_few_row_groups_are_held(tmp_path, monkeypatch):
    rows = [(turns("<image>"), os.urandom(1000)) for _ in range(40)]
    path = write_parquet(tmp_path / "x.parquet", rows, row_group_size=4)
    monkeypatch.setattr(parquet, "HELD_BYTES", 10_000)
    column = parquet._column(str(path), 0, 0)
    for row in [*range(40), 3, 39, 0]:
        assert parquet._as_list(rows[row][1]) == column.row(row)
        assert len(column.held) <= 2
    assert list(column.held) == [9, 0]


def test_a_changed_parquet_is_another(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", ROWS)
    (before,) = {sample.visuals[0].partition("/")[0] for sample in read_samples(path)[:1]}
    first = colour(path / "0.0")
    write_parquet(path, ROWS[::-1])
    os.utime(path, ns=(1, 1))
    parquet.fingerprint.cache_clear()
    assert not read_samples(path)[0].visuals[0].startswith(before)
    assert colour(path / "0.0") != first
