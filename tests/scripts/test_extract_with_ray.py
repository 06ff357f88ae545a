"""Two towers share the decoded clips, with Ray and without it: the bytes of extract_features.py."""

import sys

import pytest

import extract_features
from cli import parse_flags
from dataset.feature_store import FeatureStore
from dataset.transforms import FrameTransform
from scripts import extract_with_ray
from tests.clips import make_numbered_clip


@pytest.fixture
def command(tmp_path, tiny_tower):
    (tmp_path / "clips").mkdir()
    for number in range(5):
        make_numbered_clip(tmp_path / f"clips/{number}.mp4", 4 + 3 * number, noise=150)
    (tmp_path / "clips/broken.mp4").write_bytes(b"not a video")
    line = f"--videos {tmp_path}/clips --images_path {tmp_path} --vision_path {tiny_tower} "
    return (line + "--dtype float32 --batch_size 7 --num_workers 1 --features_path").split()


def share_by_hand(argv):
    flags = parse_flags(extract_with_ray.RayFlags, argv=argv)
    transform = FrameTransform.from_pretrained(flags.vision_path)
    names = [f"clips/{name}.mp4" for name in (0, 1, 2, 3, 4, "broken")]
    visuals = ({"path": name, "known": "{}"} for name in names)
    rows = [extract_with_ray.decode_row(visual, flags, transform) for visual in visuals]
    for i in range(2):
        extract_with_ray.run_tower(rows[i::2].__iter__, (i, 2), flags, {})
    store, *_ = extract_features.begin(flags, (0, 2), {})
    extract_features.finish(store, names, 2)


def share_by_ray(argv):
    import ray

    ray.init(num_cpus=3, include_dashboard=False)
    extract_with_ray.main([*argv, "--towers", "2"])
    ray.shutdown()


@pytest.mark.parametrize(
    "share",
    [share_by_hand, pytest.param(share_by_ray, marks=pytest.mark.slow)],  # pip install "ray[data]"
)
def test_two_towers_make_the_features_of_one_process(tmp_path, command, share):
    share([*command, str(tmp_path / "shared")])
    extract_features.main([*command, str(tmp_path / "alone")])
    shared, alone = (FeatureStore(tmp_path / name) for name in ("shared", "alone"))
    assert sorted(shared.paths()) == sorted(alone.paths())
    for path in alone.paths():
        theirs, ours = alone.find(path), shared.find(path)
        assert ours.get("sha256") == theirs.get("sha256")
        assert ours.get("reason") == theirs.get("reason")
        if "reason" not in ours:
            assert shared.rows(path).tobytes() == alone.rows(path).tobytes()
    assert shared.find("clips/broken.mp4")["reason"] == "unreadable"


def test_without_ray_the_script_says_how_to_get_it(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it fails, installed or not
    with pytest.raises(ValueError, match=r'pip install "ray\[data\]"'):
        extract_with_ray.main([*command, "features"])
