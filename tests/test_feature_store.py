"""A store says what it holds, is whole or absent, and refuses to be mixed up."""

import numpy as np
import pytest
import torch

from dataset.feature_store import FeatureStore

SETTINGS = {"tower": "abc", "num_frames": 8, "mean": (0.5, 0.5)}


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "features")


def test_written_features_are_read_back_in_half_precision(store):
    features = torch.randn(3, 5, 4)
    store.write("clips/a.mp4", features)
    assert store.has("clips/a.mp4") and not store.has("clips/a")
    assert [path.name for path in (store.directory / "clips").iterdir()] == ["a.mp4.npy"]
    assert torch.equal(store.read("clips/a.mp4"), features.half())


@pytest.mark.parametrize("path", ["/etc/passwd", "../a.mp4", "a/../../b.mp4", "", "a\0.mp4"])
def test_no_path_leaves_the_folder(store, path):
    with pytest.raises(ValueError, match="relative"):
        store.write(path, torch.zeros(1, 1, 1))


def test_the_manifest_comes_last_and_carries_everything(store):
    store.begin(SETTINGS)
    with pytest.raises(ValueError, match="unfinished"):
        _ = store.manifest
    store.finish({"a.mp4": {"size": 1}}, {"b.mp4": {"reason": "corrupt", "detail": "cut"}})
    assert store.manifest["sources"] == {"a.mp4": {"size": 1}}
    assert store.manifest["tower"] == "abc"
    assert [path.name for path in store.directory.iterdir()] == ["manifest.json"]
    with pytest.raises(ValueError, match="b.mp4: its extraction failed .cut"):
        store.read("b.mp4")


def test_beginning_again_knows_the_earlier_records_but_is_unfinished(store):
    assert store.begin(SETTINGS) == ({}, {})
    recorded = {"a.mp4": {"size": 1}}, {"b.mp4": {"reason": "corrupt", "detail": "cut"}}
    store.finish(*recorded)
    assert store.begin(SETTINGS) == recorded  # and is killed
    with pytest.raises(ValueError, match="unfinished"):
        _ = FeatureStore(store.directory).manifest
    assert store.begin(SETTINGS) == recorded


def test_features_of_two_kinds_never_share_a_folder(store):
    store.begin(SETTINGS)
    with pytest.raises(ValueError, match="tower is 'abc', 'xyz' is needed; num_frames is 8, 4 is"):
        store.begin({**SETTINGS, "tower": "xyz", "num_frames": 4})


def test_a_folder_with_files_of_unknown_origin_is_refused(store):
    store.write("a.mp4", torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="no manifest"):
        store.begin(SETTINGS)


def test_check_names_every_value_that_does_not_fit(store):
    store.begin(SETTINGS)
    store.finish({}, {})
    store.check({"tower": "abc", "mean": (0.5, 0.5)})
    with pytest.raises(ValueError, match="tower is 'abc', 'xyz' is needed; sampling is None"):
        store.check({"tower": "xyz", "num_frames": 8, "sampling": "uniform"})


def test_a_file_that_is_not_features_is_named(store):
    store.begin(SETTINGS)
    store.finish({}, {})
    with pytest.raises(ValueError, match="a.mp4.npy: no features of a.mp4: run extract"):
        store.read("a.mp4")
    store.path("a.mp4").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(ValueError, match="a.mp4.npy: damaged"):
        store.read("a.mp4")
    np.save(store.path("a.mp4"), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"float64 \(2, 3\) where float16"):
        store.read("a.mp4")
