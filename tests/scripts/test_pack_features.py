"""A packed store reads as the one that it was made from."""

import pickle

import numpy as np
import pytest
import torch

from dataset.feature_store import FeatureStore
from scripts import pack_features

SETTINGS = {"tower": "abc", "num_frames": 8, "dtype": "float16"}
SETTINGS |= {"tokens_per_frame": 5, "hidden_size": 4}
FRAMES = {"clips/a.mp4": 8, "clips/b.mp4": 3, "c.png": 1, "d.mp4": 8}


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path / "features")
    store.begin(SETTINGS)
    for seed, (name, frames) in enumerate(FRAMES.items()):
        generator = torch.Generator().manual_seed(seed)
        store.write(name, torch.randn(frames, 5, 4, generator=generator))
        store.record(name, {"size": 1, "frames": frames})
    store.record("e.mp4", {"reason": "corrupt", "detail": "cut"})
    store.finish(*store.recorded())
    return store


def pack(store, *more) -> FeatureStore:
    packed = store.directory.with_name("packed")
    paths = ("--features_path", str(store.directory), "--packed_path", str(packed))
    pack_features.main([*paths, *more])
    return FeatureStore(packed)


def test_the_same_features_in_fewer_files(store, capsys):
    eleven_frames = str(11 * 5 * 4 * 2 / 2**30)
    packed = pack(store, "--shard_gib", eleven_frames)
    assert "4 visuals in 2 files" in capsys.readouterr().out
    names = {path.name for path in packed.directory.iterdir()}
    assert names == {"features-00000.npy", "features-00001.npy", "manifest.json"}
    for name, frames in FRAMES.items():
        assert torch.equal(packed.read(name), store.read(name))
        assert torch.equal(packed.read(name, [frames - 1, 0]), store.read(name)[[frames - 1, 0]])
    packed.check(SETTINGS)  # training accepts it as it accepts the original
    with pytest.raises(ValueError, match="e.mp4: its extraction failed .cut"):
        packed.read("e.mp4")
    with pytest.raises(ValueError, match="no features of f.mp4"):
        packed.read("f.mp4")


def test_a_loader_worker_maps_the_files_itself(store):
    packed = pack(store)
    expected = {name: packed.read(name) for name in FRAMES}  # maps the file here, too
    pickled = pickle.dumps(packed)
    assert len(pickled) < 5000  # no feature in it
    copy = pickle.loads(pickled)
    assert all(torch.equal(copy.read(name), expected[name]) for name in FRAMES)


def test_float16_is_packed_as_int8(store):
    packed = pack(store, "--features_dtype", "int8")
    assert packed.manifest["dtype"] == "int8"
    torch.testing.assert_close(packed.read("d.mp4"), store.read("d.mp4"), atol=0.02, rtol=0.02)
    assert torch.equal(packed.read("d.mp4", [6]), packed.read("d.mp4")[[6]])


def test_what_can_not_be_packed(store):
    unfinished = FeatureStore(store.directory.with_name("unfinished"))
    with pytest.raises(ValueError, match="absent or unfinished"):
        pack(unfinished)
    np.save(store.path("d.mp4"), np.zeros((2, 5, 4), np.float16))
    with pytest.raises(ValueError, match="d.mp4.npy: 2 frames, not 8"):
        pack(store)
    store.begin(SETTINGS)
    store.write("d.mp4", torch.zeros(8, 5, 4))
    store.finish(*store.recorded())
    packed = pack(store)
    with pytest.raises(ValueError, match="is a feature store already"):
        pack(store)
    with pytest.raises(ValueError, match="it is packed, and can only be read"):
        FeatureStore(packed.directory).begin(SETTINGS)
    packed.shard_path(0).write_bytes(packed.shard_path(0).read_bytes()[:-1])  # a copy cut short
    with pytest.raises(ValueError, match="features-00000.npy: damaged"):
        FeatureStore(packed.directory).read("d.mp4")
