"""A line as a sample: the forms that it may have, and what is wrong with the others."""

import hashlib
import json
import os

import pytest

from dataset.samples import read_samples, resolve_under


def line(question="What?", answer="A cat.", **fields) -> str:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns, **fields}) + "\n"


def test_the_forms_of_a_sample(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n"  # a blank line is no sample, but counts as a line
        + line(id=7, video="a.mp4", reverse=True, scoring=[{"type": "x"}], language="en", other=1)
        + line("<image><image>", image="a.jpg, b.png")
        + line("<image> <image>", image=["a.jpg", "b.png"])
        + line(image=None)
    )
    one, two, three, text = read_samples(path)
    assert (one.id, one.visuals, one.reverse) == ("7", ["a.mp4"], True)
    assert (one.scoring, one.language, one.where) == ([{"type": "x"}], "en", f"{path}:2")
    assert one.messages[1] == {"role": "assistant", "content": "A cat."}
    assert two.visuals == three.visuals == ["a.jpg", "b.png"]
    assert (text.visuals, text.reverse, text.scoring, text.id) == ([], False, None, "data-5")


def test_the_fingerprint_is_that_of_the_contents(tmp_path):
    digests = b""
    for name in ("a", "b"):
        (tmp_path / name).write_text(line(name))
        digests += hashlib.sha256(line(name).encode()).digest()
    expected = hashlib.sha256(digests).hexdigest()[:16]  # as checkpoints have recorded it
    assert read_samples(tmp_path / "a", tmp_path / "b").fingerprint == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"conversations": [}', "not JSON"),
        ("\xff", "not JSON in UTF-8"),
        ("[" * 99_999, "recursion"),
        ("[1, 2]", "must be a JSON object, not list"),
        ("{}", "'conversations' is missing"),
        (line(video=3), "must be a path or a list of paths"),
        (line(videos=["a.mp4"]), "the key is 'video', not 'videos'"),
        (line(video="a", image="b"), "both 'video' and 'image'"),
        (line("<video><video>", video="a"), "2 visual tags .* for 1 visuals"),
        (line(answer=" "), "the answer is empty"),
        (line(answer="\ud800"), "surrogates not allowed"),
        (line(video="\ud800.mp4"), "surrogates not allowed"),
        (line(reverse="no"), "'reverse' must be true or false"),
        (line(scoring=[{}, {}]), "2 entries for 1 answers; one for each"),
        (line(scoring="all"), "'scoring' must be a list"),
        (line(language=3), "'language' must be a string"),
        (line(id=float("nan")), "'id' must be a string or a whole number, not nan"),
        (line(id=True), "'id' must be a string"),
        (line(video="/etc/passwd"), "must be relative"),
        (line(video="a/../../b.mp4"), r"without '\.\.'"),
        (line(video="a\\..\\..\\b.mp4"), r"without '\.\.'"),
        (line(video="C:b.mp4"), "names a drive"),
        (line(video="a\0.mp4"), "must be relative"),
        (line("<video><video>", video="a.mp4,"), "must be relative"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, reason):
    (tmp_path / "data.jsonl").write_bytes(line().encode() + text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"data\.jsonl:2: .*{reason}"):
        read_samples(tmp_path / "data.jsonl")


def test_a_path_stays_under_its_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root_two"
    for folder in (root / "clips", outside):
        folder.mkdir(parents=True)
        (folder / "a.mp4").touch()
    os.symlink(outside / "a.mp4", root / "out.mp4")
    os.symlink(root / "clips", root / "in")
    assert resolve_under(root, "clips/a.mp4") == root / "clips" / "a.mp4"
    assert resolve_under(root, "in/a.mp4") == root / "clips" / "a.mp4"
    for relative in ("out.mp4", "../root_two/a.mp4", str(outside / "a.mp4"), ""):
        with pytest.raises(ValueError, match="path "):
            resolve_under(root, relative)
