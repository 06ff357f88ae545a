"""The real script on real files: features, manifest, resuming, failures."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import extract_features
from dataset.feature_store import FeatureStore
from dataset.video import FrameTransform, read_frames
from device import choose_dtype
from model.vision_tower import VisionTower
from tests.clips import make_numbered_clip


@pytest.fixture
def data(tmp_path):
    """Three clips of 12, 5 and 30 frames, an image, and a file that is no video."""
    (tmp_path / "clips").mkdir()
    for name, total, size in (("a.mp4", 12, 32), ("b.mp4", 5, 48), ("c.mkv", 30, 64)):
        path = tmp_path / "clips" / name
        make_numbered_clip(path, total, size=(size, 2 * size), noise=150)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "clips" / "d.png")
    (tmp_path / "clips" / "e.mp4").write_bytes(b"not a video")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    visuals = ["a.mp4", "b.mp4", "a.mp4", "c.mkv", "d.png", "e.mp4", "gone.mp4"]
    lines = [json.dumps({"video": f"clips/{name}", "conversations": turns}) for name in visuals]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


CPU = torch.device("cpu")
DATA = ("--data_path", "data.jsonl")
EXACT = (*DATA, "--dtype", "float32")  # whatever is fastest on this machine


def flags(tiny_tower, *more) -> list[str]:
    where = ("--images_path", ".", "--features_path", "features", "--vision_path", tiny_tower)
    return [*map(str, where + more)]  # of a flag given twice, the last one counts


@pytest.fixture
def extract(data, tiny_tower, monkeypatch, capfd):
    """Run the script's main, whose start-up the tests needn't pay each time; what it printed."""
    monkeypatch.chdir(data)

    def run(*more) -> str:
        extract_features.main(flags(tiny_tower, *more))
        return capfd.readouterr().out

    return run


def relative_errors(data, tiny_tower) -> torch.Tensor:
    """Of what is stored, to tower(transform(frames)) in float32: a number for each token, the
    length of the difference over that of the token."""
    store, errors = FeatureStore(data / "features"), []
    tower = VisionTower.from_pretrained(tiny_tower)
    transform = FrameTransform.from_pretrained(tiny_tower)
    for name, num_frames in (("a.mp4", 8), ("b.mp4", 5), ("c.mkv", 8), ("d.png", 1)):
        expected = tower(transform(read_frames(data / "clips" / name, 8).frames))
        stored = store.read(f"clips/{name}").float()
        assert stored.shape == (num_frames, 50, 32)
        errors.append(((stored - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten())
    return torch.cat(errors)


def test_features_manifest_and_resuming(data, tiny_tower, extract):
    # The first time as a user runs it. 7 frames a batch: no clip begins where a batch does.
    command = [sys.executable, extract_features.__file__]
    command += flags(tiny_tower, *EXACT, "--batch_size", 7)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    output = subprocess.check_output(command, cwd=data, env=environment, text=True)
    assert "6 visuals, 6 to do" in output and "2 failed" in output
    assert "clips/e.mp4: unreadable" in output and "clips/gone.mp4: missing" in output
    assert relative_errors(data, tiny_tower).max() < torch.finfo(torch.float16).eps

    store = FeatureStore(data / "features")
    assert sources(store) == {"a.mp4", "b.mp4", "c.mkv", "d.png"}
    assert store.find("clips/e.mp4")["reason"] == "unreadable"
    assert store.manifest["tower"] == VisionTower.from_pretrained(tiny_tower).fingerprint()
    assert (store.manifest["num_frames"], store.manifest["tokens_per_frame"]) == (8, 50)

    # Again: only what failed is tried. A clip that changed is redone.
    before = contents(data / "features")
    assert "6 visuals, 2 to do" in extract(*EXACT)
    assert contents(data / "features") == before
    os.utime(data / "clips" / "a.mp4")  # another date, the same content: read, but not decoded
    output = extract(*EXACT)
    assert "6 visuals, 3 to do" in output and "1 visuals, 0 frames" in output
    assert "6 visuals, 2 to do" in extract(*EXACT)

    shutil.copy("clips/a.mp4", "clips/b.mp4")
    shutil.copy("clips/c.mkv", "clips/gone.mp4")
    assert "6 visuals, 3 to do" in extract(*EXACT, "--num_workers", 0)
    store = FeatureStore(data / "features")
    assert torch.equal(store.read("clips/b.mp4"), store.read("clips/a.mp4"))
    torch.testing.assert_close(store.read("clips/gone.mp4"), store.read("clips/c.mkv"))

    # A clip that broke loses its old features; one that is gone keeps them.
    (data / "clips" / "a.mp4").write_bytes(b"overwritten")
    (data / "clips" / "c.mkv").unlink()
    assert "6 visuals, 2 to do" in extract(*EXACT)
    store = FeatureStore(data / "features")
    assert sources(store) == {"b.mp4", "c.mkv", "d.png", "gone.mp4"}

    # Other settings in the same folder would mix two kinds of features.
    with pytest.raises(ValueError, match="num_frames is 8, 4 is needed"):
        extract(*EXACT, "--num_frames", 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_features_are_as_exact_as_their_type(data, tiny_tower, extract, dtype):
    """A chain of a dozen roundings in a type, each of eps / 2 at most and of either sign: a token
    is off by less than eps. And by more than float16's, or it wasn't computed in bfloat16."""
    extract(*DATA, "--num_workers", 0, "--dtype", dtype)
    computed_in = FeatureStore(data / "features").manifest["compute_dtype"]
    assert computed_in == choose_dtype(dtype, CPU)
    errors, half = relative_errors(data, tiny_tower), torch.finfo(torch.float16).eps
    if computed_in == "float32":
        assert errors.max() < half  # the one rounding of what is stored
    else:
        assert half < errors.max() < torch.finfo(torch.bfloat16).eps


def sources(store) -> set[str]:
    return {Path(path).name for path in store.paths() if "frames" in store.find(path)}


def features_in(folder) -> dict[str, bytes]:
    store = FeatureStore(folder)
    return {name: store.read(f"clips/{name}").numpy().tobytes() for name in sources(store)}


def contents(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_shards_in_any_order_make_the_store_that_one_process_makes(data, extract):
    output = extract(*DATA, "--shard", "2/3", "--num_workers", 1)
    assert "6 visuals, 2 to do in shard 2/3" in output
    assert "4 visuals aren't done, of shards 0/3, 1/3" in output
    with pytest.raises(ValueError, match=r"2 of 6 visuals are done.*: python extract_f.*--num_w"):
        FeatureStore(data / "features").check({"num_frames": 8})
    with pytest.raises(ValueError, match="features of another kind: num_frames is 8, 4 is needed"):
        extract(*DATA, "--shard", "0/3", "--num_frames", 4)
    assert "of shards 1/3" in extract(*DATA, "--shard", "0/3", "--num_workers", 1)
    assert "incomplete" not in extract(*DATA, "--shard", "1/3", "--num_workers", 0)
    alone = data / "alone"
    extract(*DATA, "--features_path", alone, "--num_workers", 0)
    assert features_in(alone) == features_in(data / "features")
    assert len(contents(alone)) == 4  # features and journal, index, manifest: no lock is left

    # With nothing to do, a complete store stays as it is, whichever shard is run again.
    (data / "clips" / "e.mp4").unlink()
    (data / "good.jsonl").write_text((data / "data.jsonl").read_text().rsplit("\n", 2)[0])
    before = contents(data / "features")
    assert "4 visuals, 0 to do" in extract("--data_path", "good.jsonl", "--shard", "0/1")
    assert contents(data / "features") == before


def test_torchrun_gives_each_process_its_shard(data, extract, monkeypatch):
    for rank in (1, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        assert f"3 to do in shard {rank}/2" in extract(*DATA, "--num_workers", 0)
    assert len(sources(FeatureStore(data / "features"))) == 4


def test_five_kills_leave_the_bytes_of_an_undisturbed_run(data, tiny_tower, extract):
    """SIGKILL at random: between clips, within a write, while the manifest is written."""
    for number in range(24):
        source = data / "clips" / ("a.mp4", "b.mp4", "c.mkv")[number % 3]
        shutil.copy(source, data / "clips" / f"{number}{source.suffix}")
    command = ("--videos", "clips", "--num_workers", 1, "--batch_size", 5)
    extract(*command, "--features_path", "undisturbed")

    def run():  # the interpreter has imported everything: what is left is the work itself
        torch.set_num_threads(1)
        extract_features.main(flags(tiny_tower, *command))

    journal = data / "features" / "0-of-1.jsonl"

    def lines() -> int:
        return journal.read_bytes().count(b"frames") if journal.exists() else 0

    for number in range(5):
        process = multiprocessing.get_context("fork").Process(target=run)
        before = lines()
        process.start()
        while process.is_alive() and lines() < before + 3:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.join()
        assert number or lines() < 28, "the first kill came too late to disturb anything"
    assert "0 failed" not in extract(*command)
    assert features_in(data / "features") == features_in(data / "undisturbed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_clips_features_do_not_depend_on_its_company(tiny_tower, dtype):
    """Bit for bit: alone, in another order, divided between batches, and after other clips."""
    rng = np.random.default_rng(0)
    clips = {f"{n}.mp4": rng.integers(0, 256, (n, 112, 112, 3), np.uint8) for n in (3, 8, 1, 7, 2)}
    transform = FrameTransform.from_pretrained(tiny_tower)

    def features(names) -> dict:
        tower = VisionTower.from_pretrained(tiny_tower)
        decoded = ((name, ({}, clips[name])) for name in names)
        with extract_features.TowerBatches(tower, transform, dtype, CPU, 4) as batches:
            return {name: made for name, _, made in batches.run(decoded)}

    together, backwards = features(clips), features(reversed(clips))
    for name in clips:
        assert together[name].dtype == torch.float16
        assert torch.equal(together[name], backwards[name])
        assert torch.equal(together[name], features([name])[name])


def test_int8_is_half_the_bytes(data, extract):
    for dtype in ("float16", "int8"):
        extract(*DATA, "--num_workers", 0, "--features_path", dtype, "--features_dtype", dtype)
    whole, half = FeatureStore(data / "float16"), FeatureStore(data / "int8")
    assert half.manifest["dtype"] == "int8"
    sizes = [(store.directory / "0-of-1.features").stat().st_size for store in (half, whole)]
    assert sizes[0] < 0.55 * sizes[1]
    frames = [store.read("clips/c.mkv") for store in (half, whole)]
    torch.testing.assert_close(*frames, atol=0.02, rtol=0.02)


def test_wrong_arguments_are_named(data, extract):
    for message, *arguments in (
        ("--shard 2/2", *DATA, "--shard", "2/2"),
        ("nowhere", *DATA, "--vision_path", "nowhere"),
        ("isn't under --images_path", "--videos", "/dev/null"),
        ("clipz: there is no such file or folder", "--videos", "clipz"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(*arguments)
    assert not (data / "features").exists()
