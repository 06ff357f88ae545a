"""From decoded frames of any size to the vision tower's normalised input."""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

Resize = Literal["crop", "squash", "pad"]


@dataclass(frozen=True)
class FrameTransform:
    """Frames of any size → the tower's normalised input, as its `preprocessor_config.json` says.

    resize="crop" is CLIP's rule (shortest edge to image_size, then the centre), "squash" that of
    SigLIP and MiniMind-V (both edges, whatever the aspect), "pad" keeps the whole frame in shape
    between bars of the mean colour, as LLaVA does. Pillow does the resampling, because CLIP and
    SigLIP were trained on its antialiased bicubic, rounding included; frames already of the
    tower's size pass through untouched.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "crop"
    rescale: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self):
        if self.resize not in get_args(Resize):
            raise ValueError(
                f"resize {self.resize!r} isn't known; choose one of {get_args(Resize)}"
            )

    @classmethod
    def from_pretrained(
        cls, directory, resize: Resize | Literal["tower"] = "tower"
    ) -> "FrameTransform":
        """Reads `preprocessor_config.json` beside the tower's weights, or, where a whole processor
        was saved instead, the image processor in `processor_config.json`. `resize` replaces the
        rule that stands there; "tower" keeps it."""
        file = Path(directory) / "preprocessor_config.json"
        whole = Path(directory) / "processor_config.json"
        if whole.is_file() and not file.is_file():
            file = whole
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(
                f"{file}: missing; it says how frames are resized and normalised. Copy it from "
                "where the vision tower came from"
            ) from error
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}; download it again") from error
        return cls.from_config(config, file, resize)

    @classmethod
    def from_config(
        cls, config: dict, source, resize: Resize | Literal["tower"] = "tower"
    ) -> "FrameTransform":
        """The settings of an image processor of transformers; `source` is named in errors."""
        try:
            config = config.get("image_processor", config)
            config = {name: value for name, value in config.items() if value is not None}
            size, crop = _edges(config["size"]), _edges(config.get("crop_size", config["size"]))
            is_crop = config.get("do_center_crop", "crop_size" in config)
            edges = {*size, *crop} if is_crop else {*size}
            if len(edges) > 1:
                raise ValueError(f"size {size} and crop_size {crop} differ")
            if resize == "tower":
                resize = "crop" if is_crop else "squash"
            return cls(
                image_size=edges.pop(),
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
                resize=resize,
                rescale=config.get("rescale_factor", 1 / 255),
                resample=config.get("resample", Image.Resampling.BICUBIC),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source}: {error!r}; what is needed is one square size, image_mean and image_std"
            ) from error

    def describe(self) -> dict:
        """As JSON keeps it, for the feature store's manifest."""
        return json.loads(json.dumps(asdict(self)))

    def resize_frames(self, frames: np.ndarray) -> np.ndarray:
        """(F, H, W, 3) uint8 → (F, S, S, 3) uint8, S the tower's size."""
        size, (num_frames, height, width) = self.image_size, frames.shape[:3]
        if height == width == size:
            return frames
        edge = max(height, width) if self.resize == "pad" else min(height, width)
        # int() as transformers rounds; a line one pixel wide stays one.
        new_height, new_width = max(1, int(size * height / edge)), max(1, int(size * width / edge))
        if self.resize == "squash":
            new_height = new_width = size
        # What is shown of the picture, and where: everywhere, or between bars.
        cut = _middle(new_height, size), _middle(new_width, size)
        place = _middle(size, new_height), _middle(size, new_width)
        resized = np.empty((num_frames, size, size, 3), np.uint8)
        if self.resize == "pad":
            resized[:] = [min(255, max(0, round(mean / self.rescale))) for mean in self.mean]
        for target, frame in zip(resized, frames, strict=True):
            image = Image.fromarray(frame).resize((new_width, new_height), self.resample)
            target[place] = np.asarray(image)[cut]
        return resized

    def normalize(self, frames):
        """(F, S, S, 3) uint8 → (F, 3, S, S) float32, both tensors: (frame · rescale − mean) / std.

        torch is imported where it's needed: decoding processes resize, and start several times
        faster without it.
        """
        # A row of S·3 values at a time: three times faster than planes, and a convolution takes the
        # channels-last result as it is.
        num_frames, size = frames.shape[:2]
        scale, shift = _scale_and_shift(self, frames.device)
        pixels = frames.reshape(num_frames, size, size * 3).float().mul_(scale).sub_(shift)
        return pixels.view(num_frames, size, size, 3).permute(0, 3, 1, 2)

    def __call__(self, frames: np.ndarray):
        """(F, H, W, 3) uint8 RGB → (F, 3, S, S) float32 tensor."""
        import torch

        return self.normalize(torch.from_numpy(np.ascontiguousarray(self.resize_frames(frames))))


@lru_cache(maxsize=8)  # copied to a device once: each copy would wait for it
def _scale_and_shift(transform: FrameTransform, device) -> tuple:
    """What a row's S·3 values are multiplied by, and what is then taken off."""
    import torch

    values = torch.tensor([transform.mean, transform.std], device=device)
    mean, std = values.repeat(1, transform.image_size)
    return transform.rescale / std, mean / std


def _middle(length: int, part: int) -> slice:
    """The `part` in the middle of `length`; all of it where `part` is longer."""
    start = max(0, (length - part) // 2)
    return slice(start, start + min(part, length))


def _edges(size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"]
