"""Draw what the temporal (DCT) filters of `--summary dct` see of a clip and of its reverse.

    python -m demo.filters_figure

Of all places and features of the clip it takes the one that the second filter answers most.
docs/tutorial.md explains the picture.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.patches import Rectangle

from cli import Flags, flag, launch, parse_flags
from dataset.transforms import FrameTransform
from dataset.video import read_frames
from inference import ROOT
from model.video_summary import temporal_filters
from model.vision_tower import VisionTower

NUM_FRAMES, NUM_FILTERS = 8, 8
FORWARDS, BACKWARDS = "#0969da", "#cf222e"


@dataclass
class FigureFlags(Flags):
    """Figure"""

    video: Path = flag(ROOT / "demo/examples/order.mp4", "clip to look at")
    vision_path: Path = flag(ROOT / "demo/tower", "vision tower with a CLS token")
    output: Path = flag(Path("docs/filters.png"), "file to write")


def draw(frames, features_FPD: torch.Tensor, grid: int) -> pyplot.Figure:
    """frames: (F, S, S, 3) uint8; features_FPD: what the tower makes of them, CLS first."""
    times = (torch.arange(len(frames)) + 0.5) / len(frames)
    filters_KF = temporal_filters(torch.tensor([len(frames)]), NUM_FILTERS, len(frames))[0]
    tokens_FPD = F.layer_norm(features_FPD, features_FPD.shape[-1:])[:, 1:]  # places alone
    coefficients_KPD = torch.einsum("kf,fpd->kpd", filters_KF, tokens_FPD)
    place, feature = divmod(int(coefficients_KPD[1].abs().argmax()), tokens_FPD.shape[-1])
    course_F, coefficients_K = tokens_FPD[:, place, feature], coefficients_KPD[:, place, feature]

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
    left.set_title("the first four filters", fontsize=10)
    left.set_ylim(-1.6, 2.2)
    left.legend(fontsize=8, ncols=2, loc="upper center")
    middle.plot(times, course_F, "o-", color=FORWARDS, label="forwards")
    middle.plot(times, course_F.flip(0), "o--", color=BACKWARDS, label="backwards")
    middle.set_title(f"feature {feature} at the marked place", fontsize=10)
    middle.legend(fontsize=8)
    for axes in (left, middle):
        axes.set_xlabel("time in the clip", fontsize=9)
    orders_K = torch.arange(NUM_FILTERS)
    backwards_K = filters_KF @ course_F.flip(0)
    right.bar(orders_K - 0.2, coefficients_K, 0.4, color=FORWARDS, label="forwards")
    right.bar(orders_K + 0.2, backwards_K, 0.4, color=BACKWARDS, label="backwards")
    right.axhline(0, color="black", linewidth=0.8)
    right.set_title("its coefficients", fontsize=10)
    right.set_xlabel("k", fontsize=9)
    right.set_xticks(orders_K)
    right.legend(fontsize=8)
    return figure


def main() -> None:
    flags = parse_flags(FigureFlags, __doc__)
    matplotlib.use("Agg")
    transform = FrameTransform.from_pretrained(flags.vision_path)
    tower = VisionTower.from_pretrained(flags.vision_path)
    frames = transform.resize_frames(read_frames(flags.video, NUM_FRAMES).frames)
    figure = draw(frames, tower(transform(frames)), tower.grid)
    figure.savefig(flags.output, dpi=100, metadata={"Software": None})
    print(f"{flags.output}: {flags.output.stat().st_size // 1024} kB")


if __name__ == "__main__":
    launch(main)
