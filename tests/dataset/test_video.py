"""The right frames, upright, or a typed error: on clips made here and on the shared collection."""

import multiprocessing
import os
import pickle
import signal
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dataset import decoding, transforms, video
from dataset.video import (
    FrameTransform,
    VideoError,
    fps_indices,
    read_frames,
    uniform_indices,
)

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "clips"


def draw_number(number: int, height: int, width: int) -> np.ndarray:
    """A grey picture with the number as 16 blocks across its top, least significant bit left."""
    picture = np.full((height, width, 3), 90, np.uint8)
    for bit in range(16):
        left, right = bit * width // 16, (bit + 1) * width // 16
        picture[: height // 8, left:right] = 235 if number >> bit & 1 else 16
    return picture


def read_number(frame: np.ndarray, bar: float = 1 / 8) -> int:
    height, width = frame.shape[:2]
    row = frame[int(height * bar / 2)].mean(axis=-1)
    return sum(int(row[int((bit + 0.5) * width / 16)] > 128) << bit for bit in range(16))


def make_clip(
    path, total, codec="libx264", size=(64, 128), pix_fmt="yuv420p", noise=0, **options
) -> Path:
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
        for number in range(total):
            picture = draw_number(number, *size)
            below = picture[size[0] // 8 :]
            below += random.integers(0, noise + 1, below.shape, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip, bar: float = 1 / 8) -> list[int]:
    return [read_number(frame, bar) for frame in clip.frames]


# ------------------------------------------------------------------------------ which frames


def test_uniform_takes_the_middle_of_equal_parts():
    assert uniform_indices(24, 8).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert uniform_indices(300, 4).tolist() == [37, 112, 187, 262]
    assert uniform_indices(5, 8).tolist() == [0, 1, 2, 3, 4]


def test_fps_takes_the_frame_nearest_to_each_moment_once():
    at_10_fps = np.arange(31) / 10
    assert fps_indices(at_10_fps, 1).tolist() == [0, 10, 20, 30]
    assert fps_indices(at_10_fps, 100).tolist() == list(range(31))
    with_a_gap = np.array([0.0, 0.1, 0.2, 3.0])
    assert fps_indices(with_a_gap, 1).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": "3", "g": "12"}),
        ("mp4", "libx264", {"bf": "3", "g": "8", "x264-params": "open-gop=1:keyint=8"}),
        ("mkv", "libx264", {"g": "5"}),
        ("avi", "mpeg4", {"bf": "2", "g": "12"}),
        ("ts", "libx264", {"bf": "3", "g": "10"}),
        ("ts", "mpeg2video", {"bf": "2", "g": "10", "b": "2000k"}),
        ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "8", "b": "1000k"}),
        ("webm", "libvpx-vp9", {"lag-in-frames": "8", "cpu-used": "8"}),
        ("mov", "mjpeg", {"pix_fmt": "yuvj420p"}),
    ],
)
@pytest.mark.parametrize("held_bytes", [1 << 24, 0], ids=["held", "seek"])
def test_exactly_the_asked_frames_in_many_formats(
    tmp_path, monkeypatch, suffix, codec, options, held_bytes
):
    monkeypatch.setattr(decoding, "HELD_BYTES", held_bytes)
    monkeypatch.setattr(decoding, "_read_in_order", None)  # the slow way isn't needed for these
    path = make_clip(tmp_path / f"clip.{suffix}", 50, codec, **options)
    for num_frames in (1, 3, 8, 50, 99):
        clip = read_frames(path, num_frames, timeout=None)
        assert clip.num_frames_total == 50
        assert numbers(clip) == uniform_indices(50, num_frames).tolist()
        assert clip.frames.shape[1:] == (64, 128, 3) and clip.frames.dtype == np.uint8
        assert clip.timestamps == pytest.approx(uniform_indices(50, num_frames) / 10, abs=0.002)


def test_only_the_groups_that_hold_a_chosen_frame_are_decoded(tmp_path, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4", 50, g="5", bf="0", sc_threshold="0")
    runs = []

    class Spy(decoding._Run):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            runs.append(self)

    monkeypatch.setattr(decoding, "_Run", Spy)
    assert numbers(read_frames(path, 2, timeout=None)) == [12, 37]
    assert [run.fed for run in runs] == [13, 38]  # from 10 to 12, and from 35 to 37


def test_a_clip_without_usable_timestamps_is_decoded_in_order(tmp_path, monkeypatch):
    path = make_clip(tmp_path / "clip.mp4", 20)

    def distrust(*_):
        raise decoding._UntrustedIndex

    monkeypatch.setattr(decoding, "_read_by_index", distrust)
    assert numbers(read_frames(path, 4, timeout=None)) == [2, 7, 12, 17]


def test_fps_falls_back_to_uniform_above_the_cap(tmp_path):
    path = make_clip(tmp_path / "clip.mp4", 50)
    assert numbers(read_frames(path, 8, sampling="fps", fps=1)) == [0, 10, 20, 30, 40]
    assert numbers(read_frames(path, 4, sampling="fps", fps=1)) == uniform_indices(50, 4).tolist()


def test_decord_gives_the_same_frames(tmp_path):
    pytest.importorskip("decord")
    path = make_clip(tmp_path / "clip.mp4", 30)
    ours, theirs = read_frames(path, 8), read_frames(path, 8, backend="decord")
    assert numbers(theirs) == numbers(ours)
    assert theirs.timestamps == pytest.approx(ours.timestamps, abs=1e-3)


# ------------------------------------------------------------------------- files as they come


TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
FLIPS = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("a, b, c, d", TURNS + FLIPS)
def test_every_turn_and_flip_comes_upright(tmp_path, a, b, c, d):
    path = make_clip(tmp_path / "clip.mp4", 3)
    lying = read_frames(path, 1).frames[0]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[matrix : matrix + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)
    clip = read_frames(path, 1)
    height, width = lying.shape[:2]
    y, x = np.mgrid[:height, :width]
    to_x, to_y = a * x + c * y, b * x + d * y
    upright = np.empty_like(clip.frames[0])
    upright[to_y - to_y.min(), to_x - to_x.min()] = lying
    np.testing.assert_array_equal(clip.frames[0], upright)
    assert (clip.info.height, clip.info.width) == (height, width)  # as stored


@pytest.mark.parametrize(
    "name",
    [
        "видео 视频 é 😀.mp4",
        "100%d, a#b?*.mp4",
        "concat:x|y.mp4",
        "-i.mp4",
        "new\nline.mp4",
        "x" * 251 + ".mp4",
        b"\xff.mp4",
        "none",
    ],
)
def test_any_name_will_do(tmp_path, name):
    path = make_clip(tmp_path / "clip.mp4", 3).rename(tmp_path / os.fsdecode(name))
    assert numbers(read_frames(path, 3)) == [0, 1, 2]
    assert numbers(read_frames(os.fsencode(path), 3, timeout=None)) == [0, 1, 2]


@pytest.mark.parametrize(("left", "fewest"), [(0.77, 5), (0.97, 20), (-1, 38)])
@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mkv", "libx264", "yuv420p"),
        ("ts", "libx264", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("mpg", "mpeg2video", "yuv420p"),
        ("flv", "flv", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_a_cut_file_gives_what_came_before_the_cut(tmp_path, suffix, codec, pix_fmt, left, fewest):
    path = make_clip(tmp_path / f"clip.{suffix}", 40, codec, pix_fmt=pix_fmt, g="4")
    if suffix == "mp4":  # with its index at the front
        path = remux(path, tmp_path / "front.mp4", movflags="faststart")
    whole = read_frames(path, 40)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left) if left > 0 else left])
    try:
        clip = read_frames(path, 40)
    except VideoError as error:  # two frames may share a packet, of which the first is whole
        assert error.reason == "corrupt" and suffix == "mpg"
        return
    assert fewest <= clip.num_frames_total <= 40
    # What is left is right to the last bit.
    for frame, seconds in zip(clip.frames, clip.timestamps, strict=True):
        same = np.flatnonzero(np.isclose(whole.timestamps, seconds, atol=1e-3))
        np.testing.assert_array_equal(frame, whole.frames[same[0]])


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("h264", "libx264", {"bf": "2"}),
        ("hevc", "libx265", {"x265-params": "log-level=none:keyint=8:pools=none"}),
        ("m2v", "mpeg2video", {"bf": "2", "b": "4000k"}),
        ("mjpeg", "mjpeg", {"pix_fmt": "yuvj420p", "b": "4000k"}),
    ],
)
def test_a_bare_stream_shows_no_half_picture(tmp_path, suffix, codec, options):
    """Nothing says where its last picture ends; some decoders go on as if it hadn't been cut."""
    path = make_clip(tmp_path / f"clip.{suffix}", 20, codec, noise=60, **options)
    whole, data = read_frames(path, 99), path.read_bytes()
    assert numbers(whole) == list(range(20))
    for left in (*range(-8, 0), -20, -40, -100, len(data) // 2):
        path.write_bytes(data[:left])
        clip = read_frames(path, 99)
        assert 5 <= len(clip.frames) <= 20 and (np.diff(clip.timestamps) > 0).all()
        for frame, number in zip(clip.frames, numbers(clip), strict=True):
            np.testing.assert_array_equal(frame, whole.frames[number])


@pytest.mark.parametrize(("options", "first"), [("open-gop=0:radl=2", 8), ("open-gop=1", 10)])
def test_what_is_shown_before_the_first_keyframe(tmp_path, options, first):
    """Two frames shown before the one that is cut at need nothing from before it, and HEVC says so;
    in an open group they do."""
    options = f"log-level=none:pools=none:keyint=10:min-keyint=10:scenecut=0:bframes=3:{options}"
    path = make_clip(tmp_path / "whole.mkv", 30, "libx265", **{"x265-params": options})
    with av.open(str(path)) as container:
        packets = list(container.demux(video=0))
    cut = next(n for n, packet in enumerate(packets) if packet.pts == 1000 and packet.is_keyframe)
    path = remux(path, tmp_path / "late.mkv", keep=lambda number: number >= cut)
    assert numbers(read_frames(path, 40)) == list(range(first, 30))
    assert numbers(read_frames(path, 2)) == [first + i for i in uniform_indices(30 - first, 2)]


def remux(source: Path, target: Path, keep=lambda number: True, every_key=False, **options) -> Path:
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.size and keep(number):
                packet.stream = stream
                packet.is_keyframe |= every_key
                new.mux(packet)
    return target


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_recording_that_begins_between_keyframes(tmp_path, suffix):
    whole = make_clip(tmp_path / "whole.mp4", 40, g="10", bf="0", sc_threshold="0")
    path = remux(whole, tmp_path / f"late.{suffix}", keep=lambda number: number >= 4)
    clip = read_frames(path, 40)
    assert numbers(clip) == list(range(10, 40)) and clip.timestamps[0] == 0


def test_false_keyframes_are_not_believed(tmp_path):
    whole = make_clip(tmp_path / "whole.mp4", 40, "mpeg4", g="40", b="2000k")
    path = remux(whole, tmp_path / "false.mkv", every_key=True)
    assert numbers(read_frames(path, 4)) == [5, 15, 25, 35]


@pytest.mark.parametrize("matrix", [1, 5, 9], ids=["BT.709", "BT.601", "BT.2020"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colours_follow_the_tags_of_the_stream(tmp_path, matrix, full):
    red, blue = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}[matrix]
    path, colour = tmp_path / "clip.mkv", np.array([20, 160, 230])
    r, g, b = colour / 255
    y = red * r + (1 - red - blue) * g + blue * b
    u, v = (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    scale = [255 * y, 255 * u + 128, 255 * v + 128]
    if not full:
        scale = [16 + 219 * y, 128 + 224 * u, 128 + 224 * v]
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


def test_what_the_container_says_travels_along(tmp_path):
    info = read_frames(make_clip(tmp_path / "clip.mp4", 12), 2).info
    assert (info.codec, info.width, info.height, info.pixel_format) == ("h264", 128, 64, "yuv420p")
    assert (info.fps, info.num_frames, info.pixel_aspect) == (10, 12, 1)
    assert info.seconds == pytest.approx(1.2, abs=0.05)


@pytest.mark.parametrize("name", ["clip.webp", "clip.png", "clip.gif"])
def test_an_animated_picture_is_a_clip(tmp_path, name):
    first, *others = (Image.fromarray(draw_number(i, 32, 64)) for i in range(12))
    about = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=others, duration=250, **about)
    clip = read_frames(tmp_path / name, 4)
    assert numbers(clip) == [1, 4, 7, 10] and clip.num_frames_total == 12
    assert clip.timestamps == pytest.approx([0.25, 1, 1.75, 2.5])
    assert numbers(read_frames(tmp_path / name, 8, sampling="fps", fps=1)) == [0, 4, 8]


def test_broken_files_give_frames_or_an_error(tmp_path):
    from tests.stress.fuzz_decode import fuzz

    report = fuzz(range(60), seed=1, timeout=20, folder=tmp_path)
    assert report.outcomes.total() == 60 and not report.harmful
    assert report.outcomes["frames"] and report.outcomes["corrupt"]


# ----------------------------------------------------------------------------------- images


def test_an_image_is_one_frame_whatever_its_name(tmp_path):
    picture = draw_number(77, 32, 64)
    Image.fromarray(picture).save(tmp_path / "a.mp4", format="PNG")
    clip = read_frames(tmp_path / "a.mp4")
    assert clip.num_frames_total == 1 and clip.timestamps.tolist() == [0]
    np.testing.assert_array_equal(clip.frames, picture[None])


def test_images_come_upright_and_in_8_bit_rgb(tmp_path):
    picture = Image.fromarray(draw_number(77, 32, 64))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me 90 degrees clockwise"
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_frames(tmp_path / "turned.png").frames[0], picture)

    deep = np.array([[0, 255 * 256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_frames(tmp_path / "deep.png").frames[0, 0, :, 0].tolist() == [0, 255, 255]

    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_frames(tmp_path / "clear.png").frames == 255).all()

    picture.convert("CMYK").save(tmp_path / "print.jpg")
    assert read_frames(tmp_path / "print.jpg").frames.shape == (1, 32, 64, 3)


# ----------------------------------------------------------------------------------- errors


def test_arguments_that_make_no_sense(tmp_path):
    for arguments in (
        {"num_frames": 0},
        {"sampling": "random"},
        {"sampling": "fps"},
        {"backend": "cv2"},
        {"timeout": 0},
    ):
        with pytest.raises(ValueError, match="|".join(arguments)):
            read_frames(tmp_path / "a.mp4", **arguments)


def test_an_error_names_file_and_reason_and_survives_pickling(tmp_path):
    with pytest.raises(VideoError, match="gone.mp4: missing") as caught:
        read_frames(tmp_path / "gone.mp4")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, copy.path) == ("missing", str(tmp_path / "gone.mp4"))

    make_clip(tmp_path / "whole.mp4", 5)
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    (tmp_path / "half.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:1000])
    for name in ("half.png", "half.mp4", "."):
        with pytest.raises(VideoError, match="corrupt|no_video|missing"):
            read_frames(tmp_path / name)


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    make_clip(tmp_path / "clip.mp4", 3)
    Image.new("RGB", (128, 64)).save(tmp_path / "image.png")
    for name in ("clip.mp4", "image.png"):
        with pytest.raises(VideoError, match="128×64 pixels"):
            read_frames(tmp_path / name, max_pixels=128 * 64 - 1)
        assert len(read_frames(tmp_path / name, max_pixels=128 * 64).frames)


def test_a_picture_that_announces_gigabytes(tmp_path):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(VideoError, match="too_large"):
        read_frames(tmp_path / "bomb.png")


def test_what_is_no_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")  # to open it would wait for who writes to it
    os.symlink("fifo.mp4", tmp_path / "link.mp4")
    os.symlink("loop.mp4", tmp_path / "loop.mp4")
    names = "fifo.mp4 link.mp4 loop.mp4 a\0b.mp4 /dev/zero /dev/stdin . http://127.0.0.1/a.mp4"
    for name in names.split(" "):
        for timeout in (60, None):
            with pytest.raises(VideoError, match="missing"):
                read_frames(tmp_path / name, timeout=timeout)


def test_too_long_a_clip_is_refused(tmp_path):
    make_clip(tmp_path / "clip.mp4", 31)  # at 10 frames a second, the last begins after 3 s
    with pytest.raises(VideoError, match="too_long: 3 s are above 2.5 s"):
        read_frames(tmp_path / "clip.mp4", max_seconds=2.5)
    assert len(read_frames(tmp_path / "clip.mp4", max_seconds=3).frames) == 8


# ------------------------------------------------------------------- the process that decodes


@pytest.fixture(scope="module")
def hanging(tmp_path_factory) -> Path:
    """decord 0.6 never comes back from this valid file, and holds Python's lock meanwhile."""
    pytest.importorskip("decord")
    return make_clip(tmp_path_factory.mktemp("hanging") / "clip.ts", 300)


def test_a_decode_that_hangs_in_native_code_is_ended(hanging):
    assert numbers(read_frames(hanging, 4)) == [37, 112, 187, 262]
    start = time.monotonic()
    with pytest.raises(VideoError, match="timeout: not decoded within 2 seconds"):
        read_frames(hanging, 4, backend="decord", timeout=2)
    assert time.monotonic() - start < 30  # with the start of a process on a busy machine
    assert numbers(read_frames(hanging, 4)) == [37, 112, 187, 262]


def test_a_decode_that_crashes_takes_nothing_with_it(hanging):
    read_frames(hanging, 1)
    worker = video._idle[-1].process.pid
    threading.Timer(0.5, os.kill, (worker, signal.SIGSEGV)).start()
    with pytest.raises(VideoError, match="crashed: .* -11"):
        read_frames(hanging, 4, backend="decord")
    assert numbers(read_frames(hanging, 4)) == [37, 112, 187, 262]


def test_threads_and_forked_processes_read_side_by_side(tmp_path):
    paths = [make_clip(tmp_path / f"{total}.mp4", total) for total in range(8, 24)]

    def read(path):
        return numbers(read_frames(path, 2)) == uniform_indices(int(path.stem), 2).tolist()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, paths))
    loader = torch.utils.data.DataLoader(Reads(paths), num_workers=2, batch_size=None)
    assert [int(numbers) for numbers in loader] == [uniform_indices(t, 1)[0] for t in range(8, 24)]
    assert all(map(read, paths))  # the forked processes left this one's workers alone


class Reads(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return numbers(read_frames(self.paths[index], 1))[0]


def test_no_process_outlives_the_block_that_ends_them(hanging):
    errors = []

    def read():
        with pytest.raises(VideoError) as caught:
            read_frames(hanging, 4, backend="decord")
        errors.append(caught.value.reason)

    thread = threading.Thread(target=read)
    with video.ending_workers():  # those of other tests
        pass
    with video.ending_workers():
        read_frames(hanging, 1)  # leaves an idle one, which the thread takes
        thread.start()
        deadline = time.monotonic() + 20
        while video._idle and time.monotonic() < deadline:
            time.sleep(0.01)
        read_frames(hanging, 1)
        workers = [worker.process.pid for worker in video._alive]
    thread.join()
    assert len(workers) == 2 and errors == ["crashed"] and not video._alive
    assert not any(map(is_running, workers))
    assert numbers(read_frames(hanging, 1)) == [150]


def test_no_process_outlives_a_parent_that_is_killed(hanging, tmp_path):
    def parent():
        read_frames(hanging, 1)
        (tmp_path / str(video._idle[-1].process.pid)).touch()
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    (worker,) = (int(path.name) for path in tmp_path.iterdir())
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # none may be left to reap it
    except psutil.NoSuchProcess:
        return False


def test_memory_beyond_the_budget_is_refused(tmp_path):
    path = make_clip(tmp_path / "clip.mp4", 20)
    with pytest.raises(VideoError, match="too_large: 20 frames of 128×64"):
        read_frames(path, 20, max_bytes=19 * 128 * 64 * 3)
    assert len(read_frames(path, 19, max_bytes=19 * 128 * 64 * 3).frames) == 19


# -------------------------------------------------------------------------- the shared clips

BAR = 24 / 360
# name: (number of visible frames, the number in its frame i)
NUMBERED = {
    "anim.gif": (30, lambda i: 1 + 3 * i),
    "fiveframes.mp4": (5, lambda i: i),
    "gray.mp4": (60, lambda i: i),
    "odd_321x181_444.mp4": (60, lambda i: i),
    "oneframe.mp4": (1, lambda i: i),
    "s10_editlist.mp4": (207, lambda i: 93 + i),
    "s10_h264.mkv": (300, lambda i: i),
    "s10_h264.mp4": (300, lambda i: i),
    "trunc.mkv": (224, lambda i: i),
    "vfr.mp4": (200, lambda i: i),
}
REAL = {
    "bigbuckbunny.mp4": (132, 720, 1280),
    "bikes.mp4": (250, 272, 640),
    "carphone_pristine.mp4": (120, 144, 176),
}
BROKEN = {
    "audioonly.mp4": "no_video",
    "bitflips.mp4": "corrupt",
    "bomb_16384x8192.mp4": "too_large",
    "concat_disguised.mp4": "unreadable",
    "empty.mp4": "unreadable",
    "fuzzmoov0.mp4": "corrupt",
    "html404.mp4": "unreadable",
    "nomoov.mp4": "unreadable",
    "random.mp4": "unreadable",
    "zeroframes.mp4": "no_video",
}


def shared(name: str) -> Path:
    if not CLIPS.is_dir():
        pytest.skip(f"{CLIPS} isn't there")
    return CLIPS / name


def test_every_shared_clip_is_tested():
    listed = {*NUMBERED, *REAL, *BROKEN, "s10_rot90.mp4", "INDEX.md"}
    assert {path.name for path in shared("").iterdir()} == listed


@pytest.mark.parametrize("name", NUMBERED)
@pytest.mark.parametrize("held_bytes", [1 << 24, 0], ids=["held", "seek"])
def test_shared_clips_show_the_right_numbers(name, held_bytes, monkeypatch):
    monkeypatch.setattr(decoding, "HELD_BYTES", held_bytes)
    total, number = NUMBERED[name]
    clip = read_frames(shared(name), 8, timeout=None)
    assert clip.num_frames_total == total
    assert numbers(clip, BAR) == [number(i) for i in uniform_indices(total, 8)]


def test_a_turned_clip_comes_upright():
    clip = read_frames(shared("s10_rot90.mp4"), 4)
    assert clip.frames.shape == (4, 640, 360, 3)
    # Its pictures are stored lying: turning them back clockwise shows the bar on top again.
    assert [read_number(np.rot90(frame, -1), BAR) for frame in clip.frames] == [37, 112, 187, 262]


@pytest.mark.parametrize("name", REAL)
def test_real_clips_equal_decoding_everything(name):
    total, height, width = REAL[name]
    clip = read_frames(shared(name), 4)
    assert (clip.num_frames_total, *clip.frames.shape) == (total, 4, height, width, 3)
    chosen = uniform_indices(total, 4)
    with av.open(str(shared(name))) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in chosen:
                expected = frame.to_ndarray(format="rgb24")
                np.testing.assert_array_equal(clip.frames[chosen.tolist().index(index)], expected)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_clips_are_one_typed_error(name):
    with pytest.raises(VideoError) as caught:
        read_frames(shared(name), 8)
    assert caught.value.reason == BROKEN[name]


# -------------------------------------------------------------------------------- transform

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.mark.parametrize("shape", [(90, 160), (160, 90), (61, 61), (33, 200), (48, 48)])
def test_crop_equals_the_clip_processor_of_transformers(shape):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    noise = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), np.uint8)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size=48, image_mean=MEAN, image_std=STD
    )
    expected = processor(list(noise), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(FrameTransform(48, MEAN, STD)(noise), expected, atol=1e-5, rtol=0)


def test_frames_of_the_towers_size_pass_untouched():
    noise = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    transform = FrameTransform(48, (0, 0, 0), (1, 1, 1))
    assert transform.resize_frames(noise) is noise
    expected = torch.from_numpy(noise).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(transform(noise), expected)


@pytest.mark.parametrize("timeout", [60, None])
def test_frames_are_resized_where_they_are_decoded(tmp_path, timeout):
    make_clip(tmp_path / "clip.mp4", 5)
    Image.fromarray(draw_number(77, 90, 64)).save(tmp_path / "image.png")
    transform = FrameTransform(48, MEAN, STD, resize="pad")
    for name in ("clip.mp4", "image.png"):
        whole = read_frames(tmp_path / name)
        clip = read_frames(tmp_path / name, timeout=timeout, transform=transform)
        np.testing.assert_array_equal(clip.frames, transform.resize_frames(whole.frames))
        assert (clip.info, clip.num_frames_total) == (whole.info, whole.num_frames_total)


def test_squash_keeps_the_whole_picture():
    halves = np.zeros((1, 40, 80, 3), np.uint8)
    halves[:, :, 40:] = 255
    squashed = FrameTransform(20, MEAN, STD, resize="squash").resize_frames(halves)
    assert squashed.shape == (1, 20, 20, 3)
    assert squashed[0, :, :7].max() == 0 and squashed[0, :, 13:].min() == 255


def test_pad_keeps_the_whole_picture_in_shape():
    halves = np.zeros((5, 40, 80, 3), np.uint8)
    halves[:, :, 40:] = 255
    padded = FrameTransform(20, MEAN, STD, resize="pad").resize_frames(halves)
    assert padded.shape == (5, 20, 20, 3)
    bars = np.concatenate([padded[:, :5], padded[:, 15:]], axis=1)
    assert (bars == np.round(np.array(MEAN) * 255)).all()  # near 0 for the tower
    picture = padded[:, 5:15]
    assert picture[:, :, :9].max() == 0 and picture[:, :, 11:].min() == 255
    upright = FrameTransform(20, MEAN, STD, resize="pad").resize_frames(halves.swapaxes(1, 2))
    np.testing.assert_array_equal(upright, padded.swapaxes(1, 2))


def test_many_frames_are_resized_like_each_alone(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (7, 50, 90, 3), np.uint8)
    for resize in ("crop", "squash", "pad"):
        transform = FrameTransform(48, MEAN, STD, resize=resize)
        alone = np.concatenate([transform.resize_frames(frame[None]) for frame in noise])
        np.testing.assert_array_equal(transform.resize_frames(noise), alone)
        monkeypatch.setattr(transforms, "CHUNK_BYTES", 3 * noise[0].nbytes)
        np.testing.assert_array_equal(transform.resize_frames(noise), alone)


def test_a_line_one_pixel_wide_has_a_size():
    for shape in ((1, 1), (1, 300), (300, 1)):
        for resize in ("crop", "squash", "pad"):
            transform = FrameTransform(16, MEAN, STD, resize=resize)
            assert transform(np.zeros((2, *shape, 3), np.uint8)).shape == (2, 3, 16, 16)


def test_transform_reads_the_towers_own_configuration(tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48).save_pretrained(tmp_path)
    transform = FrameTransform.from_pretrained(tmp_path)
    assert (transform.image_size, transform.resize, transform.resample) == (48, "crop", 3)
    assert transform.describe()["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])

    file = tmp_path / "preprocessor_config.json"
    file.write_text(
        '{"size": {"height": 64, "width": 64}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}'
    )
    assert FrameTransform.from_pretrained(tmp_path).resize == "squash"
    assert FrameTransform.from_pretrained(tmp_path, resize="pad").resize == "pad"
    for content in ("{", '{"size": 64}', "[]"):
        file.write_text(content)
        with pytest.raises(ValueError, match="preprocessor_config.json"):
            FrameTransform.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        FrameTransform.from_pretrained(tmp_path / "elsewhere")
