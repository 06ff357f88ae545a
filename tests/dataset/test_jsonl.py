"""Lines as other systems write them, and the index of a large file: made once, never stale."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from dataset.jsonl import KEPT_FROM, read_lines
from dataset.samples import read_samples


def record(number: int) -> dict:
    turns = [{"role": "user", "content": f"<video>\nWhat is {number}? 一"}]
    turns += [{"role": "assistant", "content": "word " * 60}]
    return {"id": number, "video": f"{number // 3}.mp4", "conversations": turns}


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A jsonl that is worth an index on the disk, with blank lines and a byte order mark."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "data" / "large.jsonl"
    path.parent.mkdir()
    count = KEPT_FROM // 400
    lines = (json.dumps(record(i), ensure_ascii=i % 2 == 0) + "\n" for i in range(count))
    path.write_text("\ufeff\n" + "\r\n".join(lines), encoding="utf-8")
    assert path.stat().st_size > KEPT_FROM
    return path


def index_of(path):
    return path.with_name(path.name + ".index")


def test_an_index_finds_every_line_again(large):
    made, mapped = read_samples(large), read_samples(large)
    assert set(large.parent.iterdir()) == {large, index_of(large)}
    lines = [(line, json.loads(text)) for line, text, _ in read_lines(large)]
    assert len(made) == len(mapped) == len(lines)
    for samples in (made, mapped):
        for i in (0, 1, 2, len(lines) // 2, -2, -1):
            line, record = lines[i]
            assert (samples[i].line, samples[i].messages) == (line, record["conversations"])
    assert [s.id for s in mapped[3:6]] == ["3", "4", "5"]
    with pytest.raises(IndexError):
        mapped[len(mapped)]


def test_it_is_read_not_made_again_until_the_data_changes(large):
    before, made = read_samples(large), index_of(large).stat().st_mtime_ns
    assert read_samples(large).fingerprint == before.fingerprint
    assert index_of(large).stat().st_mtime_ns == made
    with open(large, "a") as file:
        file.write(json.dumps(record(-1)) + "\n")
    after = read_samples(large)
    assert after[-1].id == "-1" and after.fingerprint != before.fingerprint
    index_of(large).write_bytes(b"cut short")
    assert read_samples(large).fingerprint == after.fingerprint
    with open(large, "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="'conversations' is missing"):
        read_samples(large)


def test_a_folder_that_can_not_be_written(large, tmp_path):
    index_of(large).mkdir()
    first = read_samples(large)
    (elsewhere,) = (tmp_path / "cache").rglob("*.index")
    assert read_samples(large).fingerprint == first.fingerprint
    elsewhere.unlink()
    elsewhere.mkdir()
    assert len(read_samples(large)) == len(first)  # kept in memory


def test_a_line_that_changes_under_a_run_is_named(large):
    samples = read_samples(large)
    large.write_bytes(b"x" * large.stat().st_size)
    with pytest.raises(ValueError, match=r"large.jsonl:\d+: changed since the start"):
        samples[5]


def test_processes_share_one_index(large):
    small = large.with_name("small.jsonl")
    small.write_text("".join(json.dumps(record(i)) + "\n" for i in range(9)))
    samples = read_samples(small, large)
    assert len(samples) == 9 + KEPT_FROM // 400 and (samples[8].id, samples[9].id) == ("8", "0")
    index_of(large).unlink()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        there, seventh = pool.submit(read_samples, large), pool.submit(samples.__getitem__, 7)
        assert len(read_samples(large)) == len(there.result()) == KEPT_FROM // 400
        assert seventh.result().id == "7"
    assert not list(large.parent.glob("*.tmp"))


def test_lines_as_other_systems_write_them(tmp_path):
    path = tmp_path / "data.jsonl"
    text = '\ufeff{"a": "\u2028\x85 一"}\r\n\r\n  \n\ufeff\n'
    path.write_bytes((text + '\ufeff{"a": 2}\r\nnot json').encode())
    read = {line: text.decode() for line, text, _ in read_lines(path)}
    # The editor's numbers; U+2028 ends no line.
    assert read == {1: '{"a": "\u2028\x85 一"}', 5: '{"a": 2}', 6: "not json"}


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PAR1 and more", "a parquet; convert it to jsonl: python -m scripts.convert.to_jsonl"),
        (b"\n [\n", "a JSON array; .* --output .*data_lines.jsonl"),
    ],
)
def test_what_is_no_jsonl_is_refused_with_what_to_do(tmp_path, head, reason):
    (tmp_path / "data.jsonl").write_bytes(head)
    with pytest.raises(ValueError, match=f"data.jsonl.*{reason}"):
        list(read_lines(tmp_path / "data.jsonl"))


def test_a_file_without_samples(tmp_path):
    (tmp_path / "data.jsonl").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"data.jsonl: holds no sample"):
        read_samples(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="missing.jsonl: can't be read"):
        read_samples(tmp_path / "missing.jsonl")


def test_bad_lines_are_named_together(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}\n" + json.dumps(record(1)) + "\n3\n" * 20)
    with pytest.raises(ValueError) as error:
        read_samples(tmp_path / "data.jsonl")
    first, second, *others = str(error.value).splitlines()
    assert first.endswith("data.jsonl:1: the key 'conversations' is missing") and len(others) == 8
    assert second.endswith("data.jsonl:3: a sample must be a JSON object, not int")
