"""The right frames, upright, or a typed error: on clips that are made here."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dataset import decoding
from dataset.clip import fps_indices, uniform_indices
from dataset.transforms import FrameTransform
from dataset.video import MAX_PIXELS, VideoError, read_frames, reading_in_threads
from tests.clips import damage_packet, draw_number, make_numbered_clip, numbers, remux
from tests.stress.fuzz_decode import fuzz

NO_SCENES = {"sc_threshold": "0"}  # keyframes where "g" says, and nowhere else


# ------------------------------------------------------------------------------ which frames


def test_which_frames(tmp_path):
    assert uniform_indices(24, 8).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert uniform_indices(300, 4).tolist() == [37, 112, 187, 262]
    assert uniform_indices(5, 8).tolist() == [0, 1, 2, 3, 4]
    at_10_fps, with_a_gap = np.arange(31) / 10, np.array([0.0, 0.1, 0.2, 3.0])
    assert fps_indices(at_10_fps, 1).tolist() == [0, 10, 20, 30]
    assert fps_indices(at_10_fps, 100).tolist() == list(range(31))
    assert fps_indices(with_a_gap, 1).tolist() == [0, 2, 3]
    path = make_numbered_clip(tmp_path / "clip.mp4", 50)
    assert numbers(read_frames(path, 8, sampling="fps", fps=1)) == [0, 10, 20, 30, 40]
    above_the_cap = read_frames(path, 4, sampling="fps", fps=1)
    assert numbers(above_the_cap) == uniform_indices(50, 4).tolist()


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": "3", "g": "12"}),
        ("mp4", "libx264", {"bf": "3", "g": "8", "x264-params": "open-gop=1:keyint=8"}),
        ("mp4", "libx264", {"g": "5", "bf": "0", **NO_SCENES}),
        ("mp4", "libx264", {"size": (66, 130), "pix_fmt": "yuv444p"}),
        ("mp4", "libx264", {"pix_fmt": "gray"}),
        ("mkv", "libx264", {"g": "5"}),
        ("avi", "mpeg4", {"bf": "2", "g": "12"}),
        ("ts", "libx264", {"bf": "3", "g": "10"}),
        ("ts", "mpeg2video", {"bf": "2", "g": "10", "b": "2000k"}),
        ("mpg", "mpeg2video", {"bf": "2", "g": "10", "b": "2000k"}),
        ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "8", "b": "1000k"}),
        ("webm", "libvpx-vp9", {"lag-in-frames": "8", "cpu-used": "8"}),
        ("mov", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ],
)
def test_exactly_the_asked_frames_in_many_formats(tmp_path, monkeypatch, suffix, codec, options):
    path = make_numbered_clip(tmp_path / f"clip.{suffix}", 50, codec, **options)
    # Where a container doesn't mark the end of its last picture, it is left out: of two in a
    # program stream, the one shown before is in its packet.
    shown, size = {"ts": 49, "mpg": 49}.get(suffix, 50), options.get("size", (64, 128))
    for num_frames, on_damage in ((1, "error"), (8, "error"), (99, "error"), (8, "keep")):
        for held_bytes in (1 << 24, 0):  # from memory, or by seeking in the file
            monkeypatch.setattr(decoding, "HELD_BYTES", held_bytes)
            clip = read_frames(path, num_frames, timeout=None, on_damage=on_damage)
            chosen = uniform_indices(shown, num_frames)
            assert (clip.num_frames_total, clip.damaged) == (shown, [])
            assert numbers(clip) == chosen.tolist()
            assert clip.frames.shape[1:] == (*size, 3) and clip.frames.dtype == np.uint8
            assert clip.timestamps == pytest.approx(chosen / 10, abs=0.002)


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_times_come_from_the_packets(tmp_path, backend):
    if backend == "decord":
        pytest.importorskip("decord")
    gaps = np.random.default_rng(0).choice([1, 2, 5, 30], 40)
    times = np.cumsum(gaps).tolist()
    path = make_numbered_clip(tmp_path / "clip.mp4", 40, times=times, bf="2")
    clip = read_frames(path, 8, backend=backend)
    assert numbers(clip) == uniform_indices(40, 8).tolist()
    expected = (np.array(times) - times[0])[uniform_indices(40, 8)] / 10
    assert clip.timestamps == pytest.approx(expected, abs=2e-3)


# ------------------------------------------------------------------------- files as they come


def from_packet(first: int):
    return lambda packet, number: packet if number >= first else None


def start_later(packet, number):
    """At 3.1 s: the file holds the frames from the keyframe before, and an edit list."""
    later = round(3.1 / packet.time_base)
    packet.pts, packet.dts = packet.pts - later, packet.dts - later
    return packet if number >= 25 else None


def forget_times(packet, number):
    """As an AVI with B-frames packed in one: packets have no time of their own."""
    packet.pts = None
    return packet


def claim_keyframe(packet, number):
    packet.is_keyframe = True
    return packet


OPEN_GROUPS = "log-level=none:pools=none:keyint=10:min-keyint=10:scenecut=0:bframes=3:open-gop=1"


@pytest.mark.parametrize(
    ("whole", "suffix", "change", "shown"),
    [
        ({"bf": "2", "g": "25", **NO_SCENES}, "mp4", start_later, range(31, 100)),
        ({"codec": "mpeg4", "g": "40"}, "avi", forget_times, range(100)),
        ({"codec": "mpeg4", "g": "100", "b": "2000k"}, "mkv", claim_keyframe, range(100)),
        # A recording that begins between keyframes.
        ({"bf": "0", "g": "10", **NO_SCENES}, "mp4", from_packet(4), range(10, 100)),
        ({"bf": "0", "g": "10", **NO_SCENES}, "mkv", from_packet(4), range(10, 100)),
        ({"bf": "0", "g": "10", **NO_SCENES}, "ts", from_packet(4), range(10, 99)),
        # What an open group shows before its keyframe leans on a group that was cut away.
        ({"codec": "libx265", "x265-params": OPEN_GROUPS}, "mkv", from_packet(5), range(10, 100)),
    ],
)
def test_what_a_player_shows_is_counted(tmp_path, whole, suffix, change, shown):
    source = make_numbered_clip(tmp_path / f"whole.{suffix}", 100, **whole)
    path = remux(source, tmp_path / f"clip.{suffix}", change)
    for num_frames, on_damage in ((200, "error"), (3, "error"), (3, "keep")):
        clip = read_frames(path, num_frames, timeout=None, on_damage=on_damage)
        assert numbers(clip) == [shown[i] for i in uniform_indices(len(shown), num_frames)]
        assert num_frames == 3 or clip.timestamps[0] == 0


TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
FLIPS = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("a, b, c, d", TURNS + FLIPS)
def test_every_turn_and_flip_comes_upright(tmp_path, a, b, c, d):
    path = make_numbered_clip(tmp_path / "clip.mp4", 3)
    lying = read_frames(path, 1, timeout=None).frames[0]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[matrix : matrix + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)
    clip = read_frames(path, 1, timeout=None)
    height, width = lying.shape[:2]
    y, x = np.mgrid[:height, :width]
    to_x, to_y = a * x + c * y, b * x + d * y
    upright = np.empty_like(clip.frames[0])
    upright[to_y - to_y.min(), to_x - to_x.min()] = lying
    np.testing.assert_array_equal(clip.frames[0], upright)
    info = clip.info  # as stored
    stored = (info.height, info.width, info.codec, info.fps, info.pixel_aspect)
    assert stored == (height, width, "h264", 10, 1)
    assert info.seconds == pytest.approx(0.3, abs=0.05)


def test_any_name_will_do(tmp_path):
    path = make_numbered_clip(tmp_path / "clip.mp4", 3)
    odd = ("видео 视频 😀.mp4", "100%d, a#b?*.mp4", "concat:x|y.mp4", "-i.mp4", b"\xff.mp4", "a")
    for name in odd:
        path = path.rename(tmp_path / os.fsdecode(name))
        assert numbers(read_frames(path, 3)) == [0, 1, 2]
        assert numbers(read_frames(os.fsencode(path), 3, timeout=None)) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "mpeg2.ts", "mpeg2.mpg", "mpeg4.avi"])
def test_a_cut_file_gives_what_came_before_the_cut(tmp_path, kind):
    codec, _, suffix = kind.rpartition(".")
    codec = {"": "libx264", "mpeg2": "mpeg2video"}.get(codec, codec)
    noise = 0 if suffix == "avi" else 60  # FFmpeg finds few frames in a large AVI without its end
    path = make_numbered_clip(tmp_path / f"clip.{suffix}", 40, codec, noise=noise, g="4")
    if suffix == "mp4":  # with its index at the front
        path = remux(path, tmp_path / "front.mp4", movflags="faststart")
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    data = path.read_bytes()
    packets = [(1 - 188 * number / len(data), 5) for number in range(1, 10)] * (suffix == "ts")
    for left, fewest in ((0.77, 5), (0.97, 20), (1 - 1 / len(data), 38), *packets):
        path.write_bytes(data[: round(len(data) * left)])
        try:
            clip = read_frames(path, 40, timeout=None)
        except VideoError as error:  # two frames may share a packet, of which the first is whole
            assert error.reason == "corrupt" and suffix == "mpg"
            continue
        assert fewest <= clip.num_frames_total <= 40
        for frame, number in zip(clip.frames, numbers(clip), strict=True):
            np.testing.assert_array_equal(frame, whole[number])  # right to the last bit


@pytest.mark.parametrize("matrix", [1, 5, 9], ids=["BT.709", "BT.601", "BT.2020"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colours_follow_the_tags_of_the_stream(tmp_path, matrix, full):
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    path, colour = tmp_path / "clip.mkv", np.array([20, 160, 230])
    r, g, b = colour / 255
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    limited = [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]
    scale = [255 * y, 255 * u + 128, 255 * v + 128] if full else limited
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full
        frame = av.VideoFrame(64, 64, "yuv444p")
        frame.colorspace, frame.color_range = matrix, 1 + full
        for plane, value in zip(frame.planes, scale, strict=True):
            plane.update(bytes([round(value)]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    shown = read_frames(path, 1).frames[0].astype(int)
    assert abs(shown - colour).max() <= 2


# ----------------------------------------------------------------------------------- damage


def test_damage_is_an_error_unless_it_is_asked_for(tmp_path):
    options = {"x264-params": "bframes=3:b-adapt=0:b-pyramid=none:keyint=60:scenecut=0"}
    path = make_numbered_clip(tmp_path / "clip.mp4", 60, noise=40, **options)
    filmed = read_frames(path, 60).frames
    assert damage_packet(path, lambda packets: packets[2]) == 0.1  # a B-frame
    with pytest.raises(VideoError, match="corrupt: the data of the frame at 0.100 s is damaged"):
        read_frames(path, 8)
    clip = read_frames(path, 60, on_damage="keep")
    assert (clip.num_frames_total, clip.damaged) == (60, [0.1])
    assert clip.timestamps == pytest.approx(np.arange(60) / 10)
    differs = (clip.frames != filmed).any(axis=(1, 2, 3))
    assert np.flatnonzero(differs).tolist() == [1]
    few = read_frames(path, 4, on_damage="keep")
    assert numbers(few) == uniform_indices(60, 4).tolist() and few.damaged == [0.1]


@pytest.mark.parametrize("on_damage", ["error", "keep"])
def test_broken_files_give_frames_or_an_error(tmp_path, on_damage):
    outcomes, harmful = fuzz(range(40), 1, tmp_path, on_damage)
    assert outcomes.total() == 40 and not harmful
    assert outcomes["frames"]
    assert (outcomes["frames, damaged"] > 0) == (on_damage == "keep")


# ----------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", ["clip.webp", "clip.png", "clip.gif"])
def test_an_animated_picture_is_a_clip(tmp_path, name):
    first, *others = (Image.fromarray(draw_number(i, 32, 64)) for i in range(12))
    about = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=others, duration=250, **about)
    clip = read_frames(tmp_path / name, 4)
    assert numbers(clip) == [1, 4, 7, 10] and clip.num_frames_total == 12
    assert clip.timestamps == pytest.approx([0.25, 1, 1.75, 2.5])
    assert numbers(read_frames(tmp_path / name, 8, sampling="fps", fps=1)) == [0, 4, 8]


def test_images_come_upright_and_in_8_bit_rgb_whatever_their_name(tmp_path):
    picture = Image.fromarray(draw_number(77, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me 90 degrees clockwise"
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.mp4", format="PNG", exif=exif)
    clip = read_frames(tmp_path / "turned.mp4")
    np.testing.assert_array_equal(clip.frames[0], picture)
    assert clip.num_frames_total == 1 and clip.timestamps.tolist() == [0]

    deep = np.array([[0, 255 * 256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_frames(tmp_path / "deep.png").frames[0, 0, :, 0].tolist() == [0, 255, 255]

    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_frames(tmp_path / "clear.png").frames == 255).all()

    picture.convert("CMYK").save(tmp_path / "print.jpg")
    assert read_frames(tmp_path / "print.jpg").frames.shape == (1, 32, 64, 3)


# ----------------------------------------------------------------------------------- errors


def test_arguments_that_make_no_sense(tmp_path):
    wrong = [("num_frames", 0), ("sampling", "random"), ("sampling", "fps"), ("backend", "cv2")]
    for argument, value in [*wrong, ("timeout", 0), ("on_damage", "hide")]:
        with pytest.raises(ValueError, match=argument):
            read_frames(tmp_path / "a.mp4", **{argument: value})


def test_what_is_no_video_is_one_typed_error_that_survives_pickling(tmp_path):
    whole = make_numbered_clip(tmp_path / "whole.mp4", 20).read_bytes()
    files = {  # each with the reason in its name
        "empty.unreadable.mp4": b"",
        "page.unreadable.mp4": b"<!DOCTYPE html><html>404</html>",
        "random.unreadable.mp4": np.random.default_rng(0).bytes(100_000),
        "no-index.unreadable.mp4": whole[: whole.index(b"moov") - 4],
        "others.unreadable.mp4": b"ffconcat version 1.0\nfile whole.mp4\n",
        "bare.unreadable.mjpeg": b"\xff\xd8\xff\xe0",
        "half.corrupt.png": b"\x89PNG\r\n\x1a\n nothing more",
        "photo.unreadable.heic": b"\0\0\0\x18ftypheic",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with av.open(str(tmp_path / "sound.no_video.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    # Black, 60 kB in the file, 4 GB a second when it plays.
    size = (MAX_PIXELS // 8192, 8208)
    make_numbered_clip(tmp_path / "bomb.too_large.mp4", 1, size=size, preset="ultrafast")
    for path in [*tmp_path.glob("*.*.*"), tmp_path / "gone.missing.mp4"]:
        reason = path.name.split(".")[1]
        for on_damage in ("error", "keep"):
            with pytest.raises(VideoError, match=f"{path.name}: {reason}") as caught:
                read_frames(path, on_damage=on_damage)
            copy = pickle.loads(pickle.dumps(caught.value))
            assert (copy.reason, copy.path) == (reason, str(path))


def test_budgets_are_checked_before_decoding(tmp_path):
    path = make_numbered_clip(tmp_path / "clip.mp4", 31)  # the last one begins after 3 s
    Image.new("RGB", (128, 64)).save(tmp_path / "image.png")
    for file in (path, tmp_path / "image.png"):
        with pytest.raises(VideoError, match="too_large: frames of 128×64"):
            read_frames(file, max_pixels=128 * 64 - 1)
        assert len(read_frames(file, max_pixels=128 * 64).frames)
    with pytest.raises(VideoError, match="too_long: 3 s are above the limit of 2.5 s"):
        read_frames(path, max_seconds=2.5)
    assert len(read_frames(path, max_seconds=3).frames) == 8
    with pytest.raises(VideoError, match="too_large: 20 frames of 128×64"):
        read_frames(path, 20, max_bytes=19 * 128 * 64 * 3)
    assert len(read_frames(path, 19, max_bytes=19 * 128 * 64 * 3).frames) == 19


def test_what_is_no_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")  # to open it would wait for who writes to it
    os.symlink("fifo.mp4", tmp_path / "link.mp4")
    os.symlink("loop.mp4", tmp_path / "loop.mp4")
    names = "fifo.mp4 link.mp4 loop.mp4 a\0b.mp4 /dev/zero /dev/stdin . http://127.0.0.1/a.mp4"
    for name in names.split(" "):
        for timeout in (60, None):
            with pytest.raises(VideoError, match="missing"):
                read_frames(tmp_path / name, timeout=timeout)


# ------------------------------------------------------------------- the process that decodes


@pytest.mark.parametrize("timeout", [60, None])
def test_frames_are_resized_where_they_are_decoded(tmp_path, timeout):
    make_numbered_clip(tmp_path / "clip.mp4", 5)
    Image.fromarray(draw_number(77, 90, 64)).save(tmp_path / "image.png")
    transform = FrameTransform(48, (0.5, 0.5, 0.5), (0.3, 0.3, 0.3), resize="pad")
    for name in ("clip.mp4", "image.png"):
        whole = read_frames(tmp_path / name)
        clip = read_frames(tmp_path / name, timeout=timeout, transform=transform)
        np.testing.assert_array_equal(clip.frames, transform.resize_frames(whole.frames))
        assert (clip.info, clip.num_frames_total) == (whole.info, whole.num_frames_total)


@pytest.fixture
def hanging(tmp_path_factory) -> Path:
    """decord 0.6 never comes back from this valid file, and holds Python's lock meanwhile."""
    pytest.importorskip("decord")
    with reading_in_threads(len, [], 0):  # ends the processes of other tests
        pass
    return make_numbered_clip(tmp_path_factory.mktemp("hanging") / "clip.ts", 301)


def workers() -> list[psutil.Process]:
    """This process's own; what is a zombie has no command line."""
    own = (p for p in psutil.process_iter(["ppid", "cmdline"]) if p.info["ppid"] == os.getpid())
    return [p for p in own if "dataset.decoding" in " ".join(p.info["cmdline"] or ())]


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_decode_that_hangs_or_crashes_takes_nothing_with_it(hanging):
    assert numbers(read_frames(hanging, 4)) == [37, 112, 187, 262]
    with pytest.raises(VideoError, match="timeout: not decoded within 1 seconds"):
        read_frames(hanging, 4, backend="decord", timeout=1)
    assert numbers(read_frames(hanging, 4)) == [37, 112, 187, 262]
    (worker,) = workers()
    threading.Timer(0.5, worker.send_signal, [signal.SIGSEGV]).start()
    with pytest.raises(VideoError, match="crashed: .* -11"):
        read_frames(hanging, 4, backend="decord")
    assert numbers(read_frames(hanging, 4)) == [37, 112, 187, 262]


def test_threads_and_forked_processes_read_side_by_side(tmp_path):
    paths = [make_numbered_clip(tmp_path / f"{total}.mp4", total) for total in range(8, 24)]

    def is_right(path):
        return numbers(read_frames(path, 2)) == uniform_indices(int(path.stem), 2).tolist()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, paths))
    assert all(DataLoader(paths, batch_size=None, num_workers=2, collate_fn=is_right))
    assert all(map(is_right, paths))  # the forked processes left this one's workers alone


@pytest.mark.parametrize("num_workers", [0, 3])
def test_each_item_gets_its_result_and_no_more_is_taken_than_two_items_a_worker(num_workers):
    taken, made = [], []
    items = (taken.append(i) or i for i in range(20))
    with reading_in_threads(lambda item: item * 2, items, num_workers) as results:
        for item, result in results:
            assert result == 2 * item
            made.append(item)
            assert len(taken) <= len(made) + 2 * num_workers
    assert sorted(made) == list(range(20))


def test_what_is_slow_holds_nothing_up_and_a_mistake_ends_the_whole():
    gate, taken = threading.Event(), []

    def wait_or_fail(item):
        taken.append(item)
        return gate.wait(20) if item == 0 else 1 // (item - 50)

    with reading_in_threads(wait_or_fail, range(999), 2) as results:
        assert 0 not in {next(results)[0] for _ in range(9)}
        gate.set()
        with pytest.raises(ZeroDivisionError):
            list(results)
    assert len(taken) < 60


def test_no_process_outlives_the_block_that_ends_them(hanging):
    """However it ends: here one of its threads is in native code that hangs."""
    with pytest.raises(KeyboardInterrupt):
        backends = ["pyav", "decord"]
        read = lambda backend: read_frames(hanging, 4, backend=backend)  # noqa: E731
        with reading_in_threads(read, backends, 2) as results:
            assert numbers(next(results)[1]) == [37, 112, 187, 262]
            wait_until(lambda: len(workers()) == 2)
            raise KeyboardInterrupt
    wait_until(lambda: not workers())
    assert numbers(read_frames(hanging, 1)) == [150]


def test_no_process_outlives_a_parent_that_is_killed(hanging):
    receiver, sender = multiprocessing.Pipe()

    def parent():
        read_frames(hanging, 1)
        sender.send(workers()[0].pid)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    assert receiver.poll(30)
    worker = psutil.Process(receiver.recv())
    process.kill()
    process.join()
    with contextlib.suppress(psutil.NoSuchProcess):  # or none is left to reap it
        wait_until(lambda: worker.status() == psutil.STATUS_ZOMBIE)
