"""Draw two pictures of the documentation from the clips and the model that ship.

    python -m demo.figures

`reversed.gif` (README): a clip and the same clip backwards, one question, the model's two answers.
`filters.png` (docs/tutorial.md explains it): what the temporal (DCT) filters of `--summary dct` see
of the same clip, in the place and feature that the second filter answers most.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont

from cli import Flags, flag, launch, parse_flags
from dataset.transforms import FrameTransform
from dataset.video import read_frames
from inference.chat_model import ChatModel
from inference.parts import DEMO_MODEL, ROOT
from model.video_summary import temporal_filters
from model.vision_tower import VisionTower

CLIP, REVERSED_CLIP = ROOT / "demo/examples/order.mp4", ROOT / "demo/examples/order-reversed.mp4"
QUESTION = "Which one is the first to move?"
SIDE, GAP, LINE = 288, 24, 34  # pixels: a clip, between the clips, a line of text
NUM_FRAMES, NUM_FILTERS = 8, 8
FORWARDS, BACKWARDS = "#0969da", "#cf222e"


def draw_answers(clips: list[np.ndarray], answers: list[str]) -> list[Image.Image]:
    """Frames of the moving picture. clips: (F, H, W, 3) uint8, forwards and backwards."""
    pictures = []
    for number in range(len(clips[0])):
        picture = Image.new("RGB", (2 * SIDE + 3 * GAP, SIDE + 3 * LINE + GAP), "white")
        draw = ImageDraw.Draw(picture)
        for column, title in enumerate(("a clip", "the same clip, backwards")):
            left = GAP + column * (SIDE + GAP)
            frame = Image.fromarray(clips[column][number])
            picture.paste(frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, LINE))
            for top, text, colour, size in (
                (8, title, "#1f2328", 18),
                (LINE + SIDE + 8, QUESTION, "#1f2328", 18),
                (2 * LINE + SIDE + 4, answers[column], FORWARDS, 20),
            ):
                draw.text((left, top), text, colour, ImageFont.load_default(size))
        pictures.append(picture)
    return pictures


def draw_filters(frames: np.ndarray, features_FPD: torch.Tensor, grid: int) -> pyplot.Figure:
    """frames: (F, S, S, 3) uint8; features_FPD: what the tower makes of them, CLS first."""
    times = (torch.arange(len(frames)) + 0.5) / len(frames)
    filters_KF = temporal_filters(torch.tensor([len(frames)]), NUM_FILTERS, len(frames))[0]
    tokens_FPD = F.layer_norm(features_FPD, features_FPD.shape[-1:])[:, 1:]  # places alone
    coefficients_KPD = torch.einsum("kf,fpd->kpd", filters_KF, tokens_FPD)
    place, feature = divmod(int(coefficients_KPD[1].abs().argmax()), tokens_FPD.shape[-1])
    course_F = tokens_FPD[:, place, feature]

    figure = pyplot.figure(figsize=(10, 4.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2])
    side = frames.shape[1] / grid
    corner = (place % grid * side - 0.5, place // grid * side - 0.5)
    for number, axes in enumerate(above.subplots(1, len(frames))):
        axes.imshow(frames[number])
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=1.5))
        axes.set_title(f"t = {times[number]:.2f}", fontsize=9)
        axes.axis("off")

    left, middle, right = below.subplots(1, 3)
    for k in range(4):
        left.plot(times, filters_KF[k] * len(frames), "o-", markersize=3, label=f"k = {k}")
    left.set_ylim(-1.6, 2.2)
    orders_K = np.arange(NUM_FILTERS)
    for label, line, colour, shift, course in (
        ("forwards", "o-", FORWARDS, -0.2, course_F),
        ("backwards", "o--", BACKWARDS, 0.2, course_F.flip(0)),
    ):
        middle.plot(times, course, line, color=colour, label=label)
        right.bar(orders_K + shift, (filters_KF @ course).numpy(), 0.4, color=colour, label=label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(orders_K)
    for axes, title, label in (
        (left, "the first four filters", "time in the clip"),
        (middle, f"feature {feature} at the marked place", "time in the clip"),
        (right, "its coefficients", "k"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label, fontsize=9)
        axes.legend(fontsize=8, ncols=2 if axes is left else 1)
    return figure


@dataclass
class FigureFlags(Flags):
    """Figures"""

    out: Path = flag(ROOT / "docs", "folder to write reversed.gif and filters.png into")


def main(argv: list[str] | None = None) -> None:
    folder = parse_flags(FigureFlags, __doc__, argv).out
    model = ChatModel.load(DEMO_MODEL)
    messages = [{"role": "user", "content": f"<video>\n{QUESTION}"}]
    files = [CLIP, REVERSED_CLIP]
    requests = [model.make_request(messages, [model.encode_video(file)]) for file in files]
    answers = model.generate(requests)
    clips = [read_frames(file, num_frames=10_000).frames for file in files]
    first, *rest = draw_answers(clips, answers)
    times = [125] * len(rest) + [1500]  # the last frame stays before the picture begins again
    first.save(folder / "reversed.gif", save_all=True, append_images=rest, duration=times, loop=0)

    matplotlib.use("Agg")
    transform = FrameTransform.from_pretrained(ROOT / "demo/tower")
    tower = VisionTower.from_pretrained(ROOT / "demo/tower")
    frames = transform.resize_frames(read_frames(CLIP, NUM_FRAMES).frames)
    features_FPD = tower(transform(frames))
    figure = draw_filters(frames, features_FPD, math.isqrt(features_FPD.shape[1]))
    figure.savefig(folder / "filters.png", dpi=100, metadata={"Software": None})
    print(f"{folder}: {answers}")


if __name__ == "__main__":
    launch(main)
