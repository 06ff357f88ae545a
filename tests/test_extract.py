"""The real script on real files: features, manifest, resuming, failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import extract_features
from dataset.feature_store import FeatureStore
from dataset.video import FrameTransform, read_frames
from model.vision_tower import VisionTower

ROOT = Path(__file__).resolve().parents[1]
FAST = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@pytest.fixture
def data(tmp_path):
    """Three clips of 12, 5 and 30 frames, an image, and a file that is no video."""
    (tmp_path / "clips").mkdir()
    rng = np.random.default_rng(0)
    for name, total, size in (("a.mp4", 12, 32), ("b.mp4", 5, 48), ("c.mkv", 30, 64)):
        with av.open(str(tmp_path / "clips" / name), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = size * 2, size, "yuv420p"
            for _ in range(total):
                picture = rng.integers(0, 256, (size, size * 2, 3), np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    Image.new("RGB", (40, 40), "red").save(tmp_path / "clips" / "d.png")
    (tmp_path / "clips" / "e.mp4").write_bytes(b"not a video")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    visuals = ["a.mp4", "b.mp4", "a.mp4", "c.mkv", "d.png", "e.mp4", "gone.mp4"]
    lines = [json.dumps({"video": f"clips/{name}", "conversations": turns}) for name in visuals]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


DATA = ("--data_path", "data.jsonl")


def flags(tiny_tower, *more) -> list[str]:
    where = ("--images_path", ".", "--features_path", "features", "--vision_path", tiny_tower)
    return [str(flag) for flag in (*where, *more)]


@pytest.fixture
def extract(data, tiny_tower, monkeypatch, capfd):
    """Run the script's main, whose start-up the tests needn't pay each time; what it printed."""
    monkeypatch.chdir(data)

    def run(*more) -> str:
        assert extract_features.main(flags(tiny_tower, *more)) == 0
        return capfd.readouterr().out

    return run


def check_features(data, tiny_tower, tolerance=2e-3) -> None:
    """What is stored is tower(transform(frames)), to half precision."""
    store = FeatureStore(data / "features")
    tower = VisionTower.from_pretrained(tiny_tower)
    transform = FrameTransform.from_pretrained(tiny_tower)
    for name, num_frames in (("a.mp4", 8), ("b.mp4", 5), ("c.mkv", 8), ("d.png", 1)):
        expected = tower(transform(read_frames(data / "clips" / name, 8).frames))
        stored = store.read(f"clips/{name}")
        assert stored.shape == (num_frames, 50, 32)
        torch.testing.assert_close(stored.float(), expected, atol=tolerance, rtol=tolerance)


def test_features_manifest_and_resuming(data, tiny_tower, extract):
    # The first time as a user runs it. 7 frames a batch: no clip begins where a batch does.
    script = [sys.executable, str(ROOT / "extract_features.py")]
    command = script + flags(tiny_tower, *DATA, "--batch_size", 7)
    done = subprocess.run(command, cwd=data, env=FAST, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "6 visuals, 6 to do" in said and "2 failed" in said
    assert "clips/e.mp4: unreadable" in said and "clips/gone.mp4: missing" in said
    check_features(data, tiny_tower)

    manifest = FeatureStore(data / "features").manifest
    assert set(manifest["sources"]) == {
        f"clips/{name}" for name in ("a.mp4", "b.mp4", "c.mkv", "d.png")
    }
    assert manifest["failures"]["clips/e.mp4"]["reason"] == "unreadable"
    assert manifest["tower"] == VisionTower.from_pretrained(tiny_tower).fingerprint()
    assert (manifest["num_frames"], manifest["tokens_per_frame"]) == (8, 50)

    # Again: only what failed is tried. A file that was lost and a clip that changed are redone.
    def state():
        files = (data / "features").rglob("*")
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_ino)
            for path in files
            if path.suffix == ".npy"
        }

    before = state()
    text = (data / "features" / "manifest.json").read_text()
    assert "6 visuals, 2 to do" in extract(*DATA)
    assert state() == before
    assert (data / "features" / "manifest.json").read_text() == text

    (data / "features" / "clips" / "a.mp4.npy").unlink()
    (data / "clips" / "b.mp4").write_bytes((data / "clips" / "a.mp4").read_bytes())
    (data / "clips" / "gone.mp4").write_bytes((data / "clips" / "c.mkv").read_bytes())
    assert "6 visuals, 4 to do" in extract(*DATA, "--num_workers", 0)
    store = FeatureStore(data / "features")
    assert torch.equal(store.read("clips/b.mp4"), store.read("clips/a.mp4"))
    torch.testing.assert_close(store.read("clips/gone.mp4"), store.read("clips/c.mkv"))
    assert set(store.manifest["failures"]) == {"clips/e.mp4"}

    # A clip that broke loses its old features; one that is gone keeps them.
    (data / "clips" / "a.mp4").write_bytes(b"overwritten")
    (data / "clips" / "c.mkv").unlink()
    assert "6 visuals, 2 to do" in extract(*DATA)
    store = FeatureStore(data / "features")
    assert set(store.manifest["failures"]) == {"clips/a.mp4", "clips/e.mp4"}
    assert not store.has("clips/a.mp4") and store.has("clips/c.mkv")

    # Other settings in the same folder would mix two kinds of features.
    with pytest.raises(ValueError, match="num_frames is 8, 4 is needed"):
        extract(*DATA, "--num_frames", 4)


def test_killed_runs_and_shards_end_in_the_same_store(data, tiny_tower, extract):
    (data / "clips" / "e.mp4").unlink()
    more = ("--videos", "clips", "--dtype", "bfloat16", "--num_workers", 1)
    for shard in ("0/2", "1/2"):
        assert f"2 to do in shard {shard}" in extract("--shard", shard, *more)
    assert not (data / "features" / "manifest.json").exists()
    # As after a kill: features without a record. They are recorded, not computed again.
    said = extract(*more)
    assert "4 to do" in said and " 0 frames" in said
    assert len(FeatureStore(data / "features").manifest["sources"]) == 4
    check_features(data, tiny_tower, tolerance=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*DATA, "--shard", "2/2"), "--shard 2/2"),
        ((*DATA, "--vision_path", "nowhere"), "nowhere"),
        (("--videos", "/dev/null"), "isn't under --images_path"),
        (("--videos", "clipz"), "clipz: there is no such file or folder"),
    ],
)
def test_wrong_arguments_are_named(data, extract, arguments, message):
    with pytest.raises(ValueError, match=message):
        extract(*arguments)
    assert not (data / "features").exists()
