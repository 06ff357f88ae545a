"""The demo world: short mp4 clips of moving objects, with questions and exact answers.

    python -m demo.world --split test --seed 777 --clips 300 --out out/fresh_test

writes `clips/*.mp4`, `captions.jsonl` (pretraining) and `questions.jsonl` (fine-tuning, evaluation)
in the data format of docs/data.md. Four types of scene:

    single     one object moves left, right, up, down, grows, shrinks, spins, blinks or stays
    two_step   one object does two of these one after the other
    order      one object moves, then another one does
    count      one to four objects, of one class or mixed, stay still or move together

No training clip holds a combination of the test set (demo/scene.py). Every test clip that tells
time is followed by its twin, the same frames played backwards, with the answers that change: a
model that can't tell forwards from backwards gets at most one of such a pair right.
"""

import json
import math
import os
from collections import namedtuple
from dataclasses import MISSING, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from cli import Flags, flag, launch, parse_flags
from demo.language import make_captions, make_questions
from demo.objects import Object, sprite_of
from demo.scene import SPLITS, VECTORS, Actor, Scene, sample_scene
from files import whole_file

FRAME_SIZE = 112  # pixels; the stand-in tower's own size, so that nothing is resized
NUM_FRAMES = 24
FRAMES_PER_SECOND = 8

# ---- pictures


# An actor in every frame: centre and diameter (pixels), angle (degrees), visible or not.
Track = namedtuple("Track", "x y diameter angle visible")


def _track(rng: np.random.Generator, actor: Actor, diameter: float) -> Track:
    """The path in time of one actor that starts at (0, 0)."""
    frames = np.arange(NUM_FRAMES)
    x, y = np.zeros(NUM_FRAMES), np.zeros(NUM_FRAMES)
    # Growth starts small and shrinking starts large, so that both end inside the picture.
    scale = 0.7 if "grow" in actor.steps else 1.45 if "shrink" in actor.steps else 1.0
    scale = np.full(NUM_FRAMES, scale)
    visible = np.full(NUM_FRAMES, True)
    angle = np.full(NUM_FRAMES, rng.uniform(-15, 15))
    num_steps = len(actor.steps)
    for i, step in enumerate(actor.steps):
        progress = np.clip(frames / (NUM_FRAMES - 1) * num_steps - i, 0, 1)
        if step in VECTORS:
            distance = rng.uniform(42, 58) if num_steps == 1 else rng.uniform(30, 42)
            x += VECTORS[step][0] * distance * progress
            y += VECTORS[step][1] * distance * progress
        elif step in ("grow", "shrink"):
            scale *= np.exp((1 if step == "grow" else -1) * math.log(2.1) * progress)
        elif step == "spin":
            # 20 to 38 degrees between two sampled frames: never a whole turn of its own symmetry.
            angle += rng.choice([-1, 1]) * rng.uniform(155, 290) * progress
        elif step == "blink":
            half_period = rng.integers(3, 5)
            visible = (frames + rng.integers(2 * half_period)) // half_period % 2 == 0
    return Track(x, y, diameter * scale, angle, visible)


def place(rng: np.random.Generator, scene: Scene) -> list[Track]:
    """Tracks for all actors that stay inside the picture and never touch each other."""
    largest = {1: 34, 2: 30, 3: 27, 4: 26}[len(scene.actors)]
    while True:
        # Those who move together keep pace.
        shared_seed = rng.integers(2**31) if scene.type == "count" else None
        tracks: list[Track] = []
        for actor in scene.actors:
            pace_rng = rng if shared_seed is None else np.random.default_rng(shared_seed)
            track = _track(pace_rng, actor, rng.uniform(22, largest))
            shifted = (_shift_inside(rng, track) for _ in range(30))
            fits = (it for it in shifted if all(_apart(it, other) for other in tracks))
            if (fitting := next(fits, None)) is None:
                break  # it fits nowhere: start the whole scene again
            tracks.append(fitting)
        else:
            return tracks


def _shift_inside(rng: np.random.Generator, track: Track) -> Track:
    radius = track.diameter / 2

    def shift(path: np.ndarray) -> np.ndarray:
        low, high = (radius - path).max() + 1, (FRAME_SIZE - radius - path).min() - 1
        return path + rng.uniform(low, max(low, high))

    return track._replace(x=shift(track.x), y=shift(track.y))


def _apart(a: Track, b: Track) -> bool:
    distance = np.hypot(a.x - b.x, a.y - b.y)
    return bool((distance > (a.diameter + b.diameter) / 2 + 3).all())


def background(rng: np.random.Generator) -> Image.Image:
    """A soft gradient of muted colours, half of the time with faint clutter."""
    corners = rng.uniform(95, 185, size=(2, 2, 1)) + rng.uniform(-22, 22, size=(2, 2, 3))
    picture = Image.fromarray(corners.astype(np.uint8))
    picture = picture.resize((FRAME_SIZE, FRAME_SIZE), Image.BICUBIC)
    if rng.random() < 0.5:
        return picture
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 12)):
        x, y = rng.integers(0, FRAME_SIZE, 2)
        here = np.array(picture.getpixel((int(x), int(y))))
        colour = tuple(int(c) for c in np.clip(here + rng.uniform(-24, 24, 3), 0, 255))
        width, height = rng.integers(4, 40, 2)
        box = [int(x - width / 2), int(y - height / 2), int(x + width / 2), int(y + height / 2)]
        form = (draw.ellipse, draw.rectangle, draw.line)[rng.integers(3)]
        form(box, fill=colour, width=int(rng.integers(2, 6)) if form == draw.line else 1)
    return picture.filter(ImageFilter.BoxBlur(1))


@lru_cache(4096)
def stamp_of(item: Object, diameter: int, angle: int) -> Image.Image:
    """The object's picture, `diameter` pixels wide, turned by `angle` degrees."""
    # Half size first: turning 64 pixels is four times cheaper and looks the same at 30.
    small = sprite_of(item).reduce(2)
    turned = small.rotate(angle, Image.BILINEAR) if angle else small
    return turned.resize((diameter, diameter), Image.BOX if diameter < 32 else Image.BILINEAR)


def render(rng: np.random.Generator, scene: Scene) -> list[Image.Image]:
    """The clip's frames, forwards."""
    ground, tracks = background(rng), place(rng, scene)
    frames = []
    for i in range(NUM_FRAMES):
        frame = ground.copy()
        for actor, track in zip(scene.actors, tracks, strict=True):
            if track.visible[i]:
                stamp = stamp_of(
                    actor.object, round(track.diameter[i]), round(track.angle[i]) % 360
                )
                corner = round(track.x[i] - stamp.width / 2), round(track.y[i] - stamp.height / 2)
                frame.paste(stamp, corner, stamp)
        frames.append(frame)
    return frames


def write_video(path: Path, frames: list[Image.Image]) -> None:
    """H.264 in mp4, renamed into place, so that a clip that exists is a whole one. The same frames
    are the same file, to the byte. Raises OSError where it can't be written."""
    with whole_file(path, sync=False) as file, av.open(file.name, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        # x264's macroblock tree gives pictures this narrow other bits now and then: one clip in 15
        # differed from run to run, and a seed would not mean the same world.
        stream.options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


# ---- the files


def make_clip(index: int, split: str, seed: int, out: Path) -> tuple[list[dict], list[dict]]:
    """Renders a clip (unless it is there) and returns its caption lines and question lines."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, split)
    # What is said doesn't depend on whether the pixels are there already.
    pixels_rng, words_rng = rng.spawn(2)
    words_seed = words_rng.integers(2**31)
    name = f"{split}-{seed}-{index:05d}"
    # A clip that tells time is asked about both ways: in the test set its twin is a file of its
    # own; elsewhere the frames are turned round when they are read, which costs nothing to render.
    directions = [False, True] if scene.backwards() != scene else [False]
    suffix = {False: "", True: "-reversed" if split == "test" else ""}
    files = {backwards: f"clips/{name}{suffix[backwards]}.mp4" for backwards in directions}
    if not all((out / file).exists() for file in files.values()):
        frames = render(pixels_rng, scene)
        for backwards, file in files.items():
            if not backwards or split == "test":
                write_video(out / file, frames[::-1] if backwards else frames)

    captions, questions = [], []
    for backwards, file in files.items():
        base = {"id": name + ("-reversed" if backwards else ""), "video": file}
        if backwards and split != "test":
            base["reverse"] = True
        reported = scene.backwards() if backwards else scene
        # Twins in the test set get the same questions in the same words, to be compared in pairs.
        reported_rng = np.random.default_rng([words_seed, backwards and split != "test"])
        conversations = make_captions(reported_rng, reported)
        captions += [_line(base, i, *c) for i, c in enumerate(conversations)]
        conversations = make_questions(reported_rng, reported, split == "train", name)
        for i, conversation in enumerate(conversations):
            changes = any("pair" in entry for entry in conversation[2])
            if changes or not (backwards and split == "test"):  # a twin is asked what changed
                questions.append(_line(base, i, *conversation))
    if split == "train":
        for line in captions + questions:
            del line["scoring"]
    return captions, questions


def _line(base: dict, number: int, language: str, turns: list, scoring: list[dict]) -> dict:
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": ("<video>\n" if i == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    line = {**base, "id": f"{base['id']}-{number}", "language": language}
    return {**line, "conversations": conversations, "scoring": scoring}


def make_split(split: str, seed: int, clips: int, out: Path, workers: int) -> None:
    """Renders a split into `out`; clips that exist are kept, the jsonl files are written last.
    Raises OSError where `out` can't be written."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    lines = {"captions": [], "questions": []}
    task = partial(make_clip, split=split, seed=seed, out=out)
    # "spawn": a forked child of a process with threads (tqdm has one) can hang on a lock.
    with get_context("spawn").Pool(workers) as pool:
        made = pool.imap(task, range(clips), chunksize=16)
        for captions, questions in tqdm(made, total=clips, desc=f"render {split}", unit="clip"):
            lines["captions"] += captions
            lines["questions"] += questions
    for name, some in lines.items():
        with whole_file(out / f"{name}.jsonl") as file:
            file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in some)
    captions, questions = map(len, lines.values())
    print(f"{out}: {clips} clips, {captions} captions, {questions} conversations")


@dataclass
class WorldFlags(Flags):
    """Clips"""

    out: Path = flag(MISSING, "folder to write clips/ and the jsonl files into")
    split: Literal["train", "val", "test"] = flag("train", "which combinations")
    seed: int = flag(0, "another seed gives other clips of the same split")
    clips: int = flag(1000, "number of clips, reversed twins not counted", at_least=1)
    workers: int = flag(os.cpu_count() or 1, "processes that render", at_least=1)


def main() -> None:
    flags = parse_flags(WorldFlags, __doc__)
    make_split(flags.split, flags.seed, flags.clips, flags.out, flags.workers)


if __name__ == "__main__":
    launch(main)
