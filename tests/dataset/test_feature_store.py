"""A store says what it holds, is whole or absent, and refuses to be mixed up."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.feature_store import FeatureStore

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"tower": "abc", "num_frames": 8, "mean": (0.5, 0.5)}
SHAPE = {"dtype": "float16", "tokens_per_frame": 5, "hidden_size": 4}
FAILED = {"reason": "corrupt", "detail": "cut"}


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "features")


def test_written_features_are_read_back_in_half_precision(store):
    features = torch.randn(6, 5, 4)
    store.begin(SETTINGS | SHAPE)
    store.write("clips/a.mp4", features)
    assert store.has("clips/a.mp4", 6) and not store.has("clips/a", 6)
    assert not store.has("clips/a.mp4", 7)  # cut short
    assert [path.name for path in (store.directory / "clips").iterdir()] == ["a.mp4.npy"]
    assert torch.equal(store.read("clips/a.mp4"), features.half())
    assert torch.equal(store.read("clips/a.mp4", [4, 0]), features.half()[[4, 0]])


@pytest.mark.parametrize("path", ["/etc/passwd", "../a.mp4", "a/../../b.mp4", "", "a\0.mp4"])
def test_no_path_leaves_the_folder(store, path):
    with pytest.raises(ValueError, match="relative"):
        store.write(path, torch.zeros(1, 1, 1))


def test_the_manifest_comes_last_and_carries_everything(store):
    store.begin(SETTINGS)
    with pytest.raises(ValueError, match="absent or unfinished"):
        _ = store.manifest
    store.finish({"a.mp4": {"size": 1}}, {"b.mp4": FAILED})
    assert store.manifest["sources"] == {"a.mp4": {"size": 1}}
    assert store.manifest["tower"] == "abc"
    assert [path.name for path in store.directory.iterdir()] == ["manifest.json"]
    with pytest.raises(ValueError, match="b.mp4: its extraction failed .cut"):
        store.read("b.mp4")


def test_records_outlive_a_process_that_is_killed(store):
    assert store.begin(SETTINGS, visuals=3, command="extract it") == ({}, {})
    store.record("a.mp4", {"size": 1})
    store.record("b.mp4", FAILED)
    (journal,) = (store.directory / "manifest.parts").iterdir()
    with journal.open("a") as file:
        file.write('{"path": "c.mp4", "si')  # as a kill leaves it
    store.close()

    later = FeatureStore(store.directory)
    assert later.begin(SETTINGS) == ({"a.mp4": {"size": 1}}, {"b.mp4": FAILED})
    with pytest.raises(ValueError, match="2 of 3 visuals are done.*\n  extract it"):
        _ = later.manifest
    later.record("b.mp4", {"size": 2})  # what failed before
    later.close()
    later = FeatureStore(store.directory)
    later.begin(SETTINGS, shard=(1, 3))  # divided in another way: the later record counts
    later.record("a.mp4", FAILED)
    assert FeatureStore(store.directory).recorded() == ({"b.mp4": {"size": 2}}, {"a.mp4": FAILED})
    later.finish(*later.recorded())
    assert [path.name for path in store.directory.iterdir()] == ["manifest.json"]
    # Complete until something is added.
    again = FeatureStore(store.directory)
    assert again.begin(SETTINGS) == ({"b.mp4": {"size": 2}}, {"a.mp4": FAILED})
    assert again.is_complete
    again.record("c.mp4", {"size": 3})
    assert not again.is_complete and set(again.recorded()[0]) == {"b.mp4", "c.mp4"}


def test_two_processes_finish_at_once(store):
    """One joins the journals while the other still writes to its own."""
    first, second = store, FeatureStore(store.directory)
    first.begin(SETTINGS, shard=(0, 2))
    second.begin(SETTINGS, shard=(1, 2))
    first.record("a.mp4", {"size": 1})
    second.record("b.mp4", {"size": 2})
    first.finish(*first.recorded())
    with pytest.raises(ValueError, match="unfinished"):
        _ = FeatureStore(store.directory).manifest
    second.record("c.mp4", {"size": 3})
    second.finish(*second.recorded())
    manifest = FeatureStore(store.directory).manifest
    assert set(manifest["sources"]) == {"a.mp4", "b.mp4", "c.mp4"}
    assert [path.name for path in store.directory.iterdir()] == ["manifest.json"]


def test_a_shard_is_locked_as_long_as_its_process_lives(store):
    code = (
        "import sys, time; from dataset.feature_store import FeatureStore;"
        "store = FeatureStore(sys.argv[1]); store.begin({'num_frames': 8});"
        "print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(store.directory)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    first.stdout.readline()
    with pytest.raises(ValueError, match=f"process {first.pid} on {os.uname().nodename} is extrac"):
        store.begin({"num_frames": 8})
    FeatureStore(store.directory).begin({"num_frames": 8}, shard=(1, 2))  # works beside it
    first.kill()
    first.communicate()
    store.begin({"num_frames": 8})


def test_a_full_disk_is_named_and_the_store_stays_as_it_was(store):
    store.begin(SETTINGS | SHAPE)
    store.write("a.mp4", torch.ones(1, 5, 4))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"b\.mp4\.npy: can't be written .* the same command resumes"
        ):
            store.write("b.mp4", torch.ones(99, 50, 40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.has("a.mp4") and not store.has("b.mp4")


def test_features_of_two_kinds_never_share_a_folder(store):
    store.begin(SETTINGS)
    store.record("a.mp4", {"size": 1})
    other = {**SETTINGS, "tower": "xyz", "num_frames": 4}
    with pytest.raises(ValueError, match="tower is 'abc', 'xyz' is needed; num_frames is 8, 4 is"):
        FeatureStore(store.directory).begin(other)
    store.finish(*store.recorded())
    store.check({"tower": "abc", "mean": (0.5, 0.5)})
    with pytest.raises(ValueError, match="tower is 'abc', 'xyz' is needed; sampling is None"):
        store.check({"tower": "xyz", "num_frames": 8, "sampling": "uniform"})
    (store.directory / "manifest.json").rename(store.directory / "of-unknown-origin")
    with pytest.raises(ValueError, match="no manifest"):
        store.begin(SETTINGS)


def test_a_file_that_is_not_features_is_named(store):
    store.begin(SETTINGS)
    store.finish({}, {})
    with pytest.raises(ValueError, match="a.mp4.npy: no features of a.mp4: run extract"):
        store.read("a.mp4")
    for content in (b"\x93NUMPY cut", b""):  # empty: as a power cut leaves it
        store.path("a.mp4").write_bytes(content)
        with pytest.raises(ValueError, match="a.mp4.npy: damaged"):
            store.read("a.mp4")
    np.save(store.path("a.mp4"), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"float64 \(2, 3\) where float16"):
        store.read("a.mp4")


def test_int8_keeps_each_channel_of_each_frame_to_a_127th_of_its_largest_value(store):
    store.begin({**SETTINGS, "dtype": "int8"})
    features = torch.randn(3, 50, 4) * torch.tensor([0.05, 1.0, 100.0, 0.0])
    store.write("a.mp4", features)
    error = (store.read("a.mp4").float() - features).abs()
    assert (error <= features.abs().amax(1, keepdim=True) / 127 * 0.6).all()
