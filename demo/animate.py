"""Draw the README's picture: a clip and the same clip backwards, one question, two answers.

    python -m demo.animate

The answers are those that the model that ships gives to these two files.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import Flags, flag, launch, parse_flags
from dataset.video import read_frames
from inference import DEMO_MODEL, ChatModel

EXAMPLES = DEMO_MODEL.parent.parent / "examples"
QUESTION = "Which one is the first to move?"
SIDE, GAP, LINE = 288, 24, 34  # pixels: a clip, between the clips, a line of text
INK, PAPER = "#1f2328", "white"
SECONDS_HELD = 1.5  # the last frame stays before the picture begins again


def draw(clips: list[np.ndarray], titles: list[str], answers: list[str]) -> list[Image.Image]:
    """Frames of the picture. clips: (F, H, W, 3) uint8 each, of equal length."""
    font = ImageFont.load_default(18)
    pictures = []
    for number in range(len(clips[0])):
        picture = Image.new("RGB", (2 * SIDE + 3 * GAP, SIDE + 3 * LINE + GAP), PAPER)
        text = ImageDraw.Draw(picture)
        for column, (clip, title, answer) in enumerate(zip(clips, titles, answers, strict=True)):
            left = GAP + column * (SIDE + GAP)
            text.text((left, 8), title, INK, font)
            frame = Image.fromarray(clip[number]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            picture.paste(frame, (left, LINE))
            text.text((left, LINE + SIDE + 8), QUESTION, INK, font)
            text.text((left, 2 * LINE + SIDE + 4), answer, "#0969da", ImageFont.load_default(20))
        pictures.append(picture)
    return pictures


@dataclass
class AnimateFlags(Flags):
    """Picture"""

    output: Path = flag(Path("docs/reversed.gif"), "file to write")
    fps: float = flag(8.0, "frames a second")


def main() -> None:
    flags = parse_flags(AnimateFlags, __doc__)
    files = [EXAMPLES / "order.mp4", EXAMPLES / "order-reversed.mp4"]
    model = ChatModel.load(DEMO_MODEL)
    messages = [{"role": "user", "content": f"<video>\n{QUESTION}"}]
    answers = model.generate(
        [model.make_request(messages, [model.encode_video(file)]) for file in files]
    )
    clips = [read_frames(file, num_frames=10_000).frames for file in files]
    pictures = draw(clips, ["a clip", "the same clip, backwards"], answers)
    times = [round(1000 / flags.fps)] * len(pictures)
    times[-1] = round(1000 * SECONDS_HELD)
    pictures[0].save(
        flags.output, save_all=True, append_images=pictures[1:], duration=times, loop=0
    )
    print(f"{flags.output}: {len(pictures)} frames, {answers}")


if __name__ == "__main__":
    launch(main)
