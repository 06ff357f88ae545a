"""A store says what it holds, is whole or absent, and refuses to be mixed up."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.feature_store import LINE, FeatureStore
from scripts import pack_features

SETTINGS = {"tower": "abc", "num_frames": 8, "mean": (0.5, 0.5)}
SETTINGS |= {"dtype": "float16", "tokens_per_frame": 5, "hidden_size": 4}
FAILED = {"reason": "corrupt", "detail": "cut"}
FRAMES = {"clips/a.mp4": 8, "clips/b.mp4": 3, "c.png": 1, "视频.mp4": 8}


def features_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(FRAMES.get(name, 2), 5, 4, generator=generator).half()


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "features")


@pytest.fixture
def full(store):
    """A complete store, of two shards."""
    for shard in range(2):
        store.begin(SETTINGS, (shard, 2))
        for name in [*FRAMES][shard::2]:
            store.write(name, features_of(name), size=1)
        if shard == 0:
            store.record("bad.mp4", FAILED)
            assert store.finish([*FRAMES, "bad.mp4"]) == ["clips/b.mp4", "视频.mp4"]
            store.close()
    assert store.finish([*FRAMES, "bad.mp4"]) == []
    return store


def assert_same_features(store, names=FRAMES, tolerance=0):
    for name in names:
        expected = features_of(name)
        torch.testing.assert_close(store.read(name), expected, atol=tolerance, rtol=tolerance)


def test_what_was_written_is_read_back(full):
    assert {*FRAMES, "bad.mp4"} == {*full.paths()}
    assert_same_features(full)
    assert full.manifest["tower"] == "abc" and full.find("c.png")["size"] == 1
    with pytest.raises(ValueError, match="no features of bad.mp4: its extraction failed .cut"):
        full.read("bad.mp4")
    with pytest.raises(ValueError, match="no features of clips/a: run extract_features.py"):
        full.read("clips/a")
    assert len(pickle.dumps(full)) < 500  # what a spawned worker gets
    assert_same_features(pickle.loads(pickle.dumps(full)))


def test_an_index_that_does_not_fit_is_not_believed(full):
    (index,) = full.directory.glob("index-*.npy")
    for damage in (Path.unlink, lambda path: path.write_bytes(b"\x93NUMPY cut")):
        damage(index)
        assert_same_features(FeatureStore(full.directory))


@pytest.mark.parametrize(("column", "value"), [("shard", 9), ("row", -5), ("frames", 10**9)])
def test_a_hostile_index_reads_nothing_else(full, column, value):
    (index,) = full.directory.glob("index-*.npy")
    lines = np.load(index)
    assert lines.dtype == LINE
    lines[column] = value
    np.save(index, lines)
    with pytest.raises(ValueError, match="index is damaged|cut short"):
        FeatureStore(full.directory).read("c.png")


def test_what_a_killed_process_wrote_counts(store):
    store.begin(SETTINGS, visuals=3, command="extract it")
    store.write("a.mp4", features_of("a.mp4"))
    store.record("b.mp4", FAILED)
    store.close()
    with (store.directory / "0-of-1.features").open("ab") as file:
        file.write(b"half a row")
    with (store.directory / "0-of-1.jsonl").open("ab") as file:
        file.write(b'{"path": "c.mp4", "si')
    with pytest.raises(ValueError, match="2 of 3 visuals are done.*: extract it"):
        _ = store.manifest

    later = FeatureStore(store.directory)
    later.begin(SETTINGS)
    assert later.find("a.mp4")["frames"] == 2 and later.find("c.mp4") is None
    later.write("b.mp4", features_of("b.mp4"))  # what failed before
    later.close()
    later.begin(SETTINGS, shard=(1, 3))  # divided in another way: the later record counts
    later.record("a.mp4", {**later.find("a.mp4"), "size": 2})  # another date, the same features
    later.finish()
    assert later.is_complete and later.find("a.mp4")["size"] == 2
    assert_same_features(later, ["a.mp4", "b.mp4"])
    later.begin(SETTINGS)  # complete until something is added
    assert later.is_complete
    later.record("c.mp4", FAILED)
    assert not later.is_complete and not FeatureStore(store.directory).is_complete


def test_rows_that_were_cut_off_are_made_again(full):
    path = full.directory / "0-of-2.features"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="0-of-2.features: cut short before c.png"):
        full.read("c.png")
    again = FeatureStore(full.directory)
    again.begin(SETTINGS, (0, 2))
    assert again.find("c.png") is None and again.find("clips/a.mp4")
    again.write("new.mp4", features_of("new.mp4"))  # now stands where c.png was
    again.close()
    again.begin(SETTINGS)
    assert "frames" not in again.find("c.png")
    again.write("c.png", features_of("c.png"))
    again.finish()
    assert_same_features(again, [*FRAMES, "new.mp4"])


def test_two_processes_finish_at_once(store):
    """One completes the store while the other still writes to it."""
    first, second = store, FeatureStore(store.directory)
    first.begin(SETTINGS, shard=(0, 2))
    second.begin(SETTINGS, shard=(1, 2))
    first.write("a.mp4", features_of("a.mp4"))
    second.write("b.mp4", features_of("b.mp4"))
    first.finish(["a.mp4", "b.mp4"])
    assert FeatureStore(store.directory).is_complete
    second.write("c.mp4", features_of("c.mp4"))
    with pytest.raises(ValueError, match="unfinished"):
        _ = FeatureStore(store.directory).manifest
    second.finish()
    assert_same_features(FeatureStore(store.directory), ["a.mp4", "b.mp4", "c.mp4"])


def test_shards_of_two_machines_are_joined_by_copying_their_files(store, tmp_path):
    names = ["a.mp4", "b.mp4"]
    for shard, name in enumerate(names):
        own = FeatureStore(tmp_path / name)
        own.begin(SETTINGS, (shard, 2))
        own.write(name, features_of(name))
        assert own.finish(names)  # the other's is lacking
        own.close()
        shutil.copytree(own.directory, store.directory, dirs_exist_ok=True)
    store.begin(SETTINGS)
    assert store.finish(names) == []
    assert_same_features(store, names)


def test_a_shard_is_locked_as_long_as_its_process_lives(store):
    receiver, sender = multiprocessing.Pipe()

    def hold():
        store.begin(SETTINGS)
        sender.send("held")
        time.sleep(60)

    first = multiprocessing.get_context("fork").Process(target=hold)
    first.start()
    assert receiver.poll(30)
    with pytest.raises(ValueError, match=f"process {first.pid} on {os.uname().nodename} is extrac"):
        store.begin(SETTINGS)
    FeatureStore(store.directory).begin(SETTINGS, shard=(1, 2))  # works beside it
    first.kill()
    first.join()
    store.begin(SETTINGS)


def test_a_full_disk_is_named_and_the_store_stays_as_it_was(store):
    store.begin(SETTINGS)
    store.write("c.png", features_of("c.png"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"can't be written .* the same command resumes"):
            store.write("b.mp4", torch.ones(999, 5, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.finish(["c.png", "b.mp4"]) == ["b.mp4"]
    store.write("clips/b.mp4", features_of("clips/b.mp4"))
    store.finish()
    assert_same_features(store, ["c.png", "clips/b.mp4"])


def test_features_of_two_kinds_never_share_a_folder(store):
    store.begin(SETTINGS)
    store.write("c.png", features_of("c.png"))
    other = {**SETTINGS, "tower": "xyz", "num_frames": 4}
    with pytest.raises(ValueError, match="tower is 'abc', 'xyz' is needed; num_frames is 8, 4 is"):
        FeatureStore(store.directory).begin(other)
    store.finish()
    with pytest.raises(ValueError, match="features of another kind"):
        FeatureStore(store.directory).begin(other)
    store.check({"tower": "abc", "mean": (0.5, 0.5)})
    with pytest.raises(ValueError, match="tower is 'abc', 'xyz' is needed; sampling is None"):
        store.check({"tower": "xyz", "num_frames": 8, "sampling": "uniform"})
    for path in store.directory.glob("*.json*"):
        path.rename(path.with_suffix(".unknown"))
    with pytest.raises(ValueError, match="no manifest"):
        store.begin(SETTINGS)


def test_a_store_without_features_is_never_complete(store):
    with pytest.raises(ValueError, match="manifest.json: missing .* absent or unfinished"):
        store.read("a.mp4")
    store.begin(SETTINGS)
    store.record("a.mp4", FAILED)
    with pytest.raises(ValueError, match="no source has features"):
        store.finish(["a.mp4"])


# ----------------------------------------------------------------------- int8, copies, old stores


def test_int8_keeps_each_channel_of_each_frame_to_a_127th_of_its_largest_value(store):
    store.begin({**SETTINGS, "dtype": "int8", "tokens_per_frame": 50})
    features = torch.randn(3, 50, 4) * torch.tensor([0.05, 1.0, 100.0, 0.0])
    store.write("a.mp4", features)
    store.finish()
    error = (store.read("a.mp4").float() - features).abs()
    assert (error <= features.abs().amax(1, keepdim=True) / 127 * 0.6).all()


def pack(store, *more, to="packed") -> FeatureStore:
    packed = store.directory.with_name(to)
    pack_features.main([f"--features_path={store.directory}", f"--packed_path={packed}", *more])
    return FeatureStore(packed)


@pytest.fixture(params=["a file a source", "packed"])
def old(request, store):
    """A complete store as it was written until November 2026."""
    folder, sources, row = store.directory, {}, 0
    (folder / "clips").mkdir(parents=True)
    manifest = {**SETTINGS, "sources": sources, "failures": {"bad.mp4": FAILED}}
    for name, frames in FRAMES.items():
        sources[name] = {"size": 1, "frames": frames}
        if request.param == "packed":
            sources[name] |= {"shard": 0, "row": row}
            row += frames
        else:
            np.save(folder / f"{name}.npy", features_of(name).numpy())
    if request.param == "packed":
        np.save(folder / "features-00000.npy", torch.cat([*map(features_of, FRAMES)]).numpy())
        manifest["packed"] = 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return store


def test_an_old_store_is_read_and_packed(old):
    old.check(SETTINGS)
    assert not pack(old, "--shard", "1/2").is_complete
    packed = pack(old, "--shard", "0/2")
    for store in (old, packed):
        assert_same_features(store)
        with pytest.raises(ValueError, match="no features of bad.mp4: its extraction failed .cut"):
            store.read("bad.mp4")
        with pytest.raises(ValueError, match="no features of f.mp4"):
            store.read("f.mp4")
    packed.check(SETTINGS)  # training accepts it as it accepts the original
    with pytest.raises(ValueError, match="only read.* python -m scripts.pack_features"):
        old.begin(SETTINGS)


def test_a_file_of_an_old_store_that_is_not_features_is_named(old):
    path = next(path for path in old.directory.rglob("*.npy") if path.stem != "c.png")
    name = str(path.relative_to(old.directory))
    name = name.removesuffix(".npy") if "mp4" in name else "clips/b.mp4"
    for content in (b"\x93NUMPY cut", b""):  # empty: as a power cut leaves it
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name}: missing or damaged"):
            old.read(name)
    np.save(path, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="float64 .* where float16"):
        old.read(name)
    with pytest.raises(ValueError, match="relative path without"):
        old.read("../c.png")


def test_float16_becomes_int8_and_never_back(full):
    half = pack(full, "--features_dtype", "int8")
    assert half.manifest["dtype"] == "int8"
    assert_same_features(half, tolerance=0.03)
    again = pack(half, to="again")
    assert all((again.rows(name) == half.rows(name)).all() for name in FRAMES)
    with pytest.raises(ValueError, match="don't become float16 again"):
        pack(half, "--features_dtype", "float16", to="whole")
    (full.directory / "manifest.json").unlink()
    with pytest.raises(ValueError, match="unfinished"):
        pack(FeatureStore(full.directory), to="other")
