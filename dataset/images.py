"""Pictures, and animated ones as clips, by Pillow: upright, 8-bit RGB, transparency on white."""

import numpy as np
from PIL import Image, ImageOps

from dataset.clip import ContainerInfo, Frames, Request, VideoError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # an MPO opens as a JPEG
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
# Apple's HEIC is a grid of tiles, of which FFmpeg hands over one as if it were the picture.
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_image(path: str) -> bool:
    """By content, since a name may lie. VideoError for what can't be opened, and for HEIC."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise VideoError(path, "unreadable", str(error)) from error
    if head[4:8] == b"ftyp" and head[8:] in HEIC:
        raise VideoError(path, "unreadable", "HEIC pictures aren't read; convert them to JPEG")
    if path.lower().endswith((".mjpeg", ".mjpg")):
        return False  # one JPEG after another, as some cameras record
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return True
    return head.startswith(MAGIC) or (head[4:8] == b"ftyp" and head[8:] in (b"avif", b"avis"))


def decode_image(request: Request) -> Frames:
    """The picture in the file, or the clip that it is when animated."""
    with Image.open(request.path, formats=FORMATS) as image:
        request.check_picture(image.width, image.height)
        count = getattr(image, "n_frames", 1)
        if count == 1 or image.format in ("MPO", "TIFF"):  # further pictures aren't later frames
            frame = to_rgb(request.path, ImageOps.exif_transpose(image))
            return Frames(frame[None], np.zeros(1), 1, _info(image))
        return _decode_animation(request, image, count)


def _decode_animation(request: Request, image: Image.Image, count: int) -> Frames:
    # An animated PNG may begin with a picture for programs that can't play it.
    numbers = range(int(getattr(image, "default_image", False)), count)
    starts, end = [], 0.0
    for number in numbers:  # how long a frame lasts is known when it is decoded, not before
        image.seek(number)
        image.load()
        starts.append(end)
        end += image.info.get("duration", 0) / 1000
    if not end:
        starts = [number / 10 for number in range(len(numbers))]  # as browsers play them
    request.check_length(end)
    seconds = np.array(starts)
    indices = request.choose(seconds)
    request.check_output(len(indices), image.width, image.height)
    frames = []
    for index in indices:
        image.seek(numbers[index])
        frames.append(to_rgb(request.path, image))
    info = _info(image, len(numbers) / end if end else None, end or None)
    return Frames(np.stack(frames), seconds[indices], len(numbers), info)


def to_rgb(path, image: Image.Image) -> np.ndarray:
    """→ (H, W, 3) uint8 RGB, in memory of its own."""
    if image.mode == "F":
        raise VideoError(path, "unreadable", "floating-point samples have no set range")
    if image.mode.startswith("I"):  # 16 bits a sample; Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def on_white(image: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 RGBA → (H, W, 3): what lies under full transparency is arbitrary."""
    colour, alpha = image[..., :3].astype(np.uint16), image[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _info(image: Image.Image, fps: float | None = None, seconds: float | None = None):
    width, height = image.size
    return ContainerInfo(image.format.lower(), width, height, fps=fps, seconds=seconds)
