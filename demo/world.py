"""The demo world: short clips of moving things as real mp4 files, with questions and exact answers.

    python -m demo.world --split test --seed 777 --clips 300 --out out/fresh_test

writes `clips/*.mp4`, `captions.jsonl` (pretraining) and `questions.jsonl` (fine-tuning, evaluation)
in the data format of the README. Four kinds of scene:

    single     one thing moves left, right, up or down, grows, shrinks, spins, blinks or stays still
    two_step   one thing does two of these one after the other
    order      one thing moves, then another one does
    count      one to four things, of one kind or mixed, stay still or move together

The splits differ by *combination*, not by seed alone. A combination is thing × motion axis, thing ×
two-step (tied with its reverse), an unordered pair, or thing × count; a hash sends 15 % of all to
the test set and 5 % to validation, and no training clip holds any of these. A model that learned
"the red star always moves left" scores below chance here. Every test clip that tells time is
followed by its twin, the same frames played backwards, with the answers that change: a model that
can't tell forwards from backwards gets at most one of such a pair right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from demo.language import ask, caption
from demo.objects import THINGS, Thing, sprite

FRAME_SIZE = 112  # pixels; the stand-in tower's own size, so that nothing is resized
NUM_FRAMES = 24
FRAMES_PER_SECOND = 8

VECTORS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
AXES = {
    "horizontal": ("left", "right"),
    "vertical": ("up", "down"),
    "size": ("grow", "shrink"),
    "spin": ("spin",),
    "blink": ("blink",),
    "stay": ("stay",),
}
AXIS_OF = {motion: axis for axis, motions in AXES.items() for motion in motions}
REVERSE_OF = {"left": "right", "up": "down", "grow": "shrink"}
REVERSE_OF |= {backwards: motion for motion, backwards in REVERSE_OF.items()}

KINDS = ("single", "two_step", "order", "count")
# Who does what, and how many there are, is learnt last: training shows such scenes more often.
TRAINING_SHARES = (0.10, 0.12, 0.34, 0.44)
LOOK_ALIKE = 0.3  # share of training's pairs that have the same colour, or are both icons
ONE_KIND = 0.4  # share of training's counts of two and more that are of one kind
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Actor:
    """A thing and what it does: one motion for the whole clip, or one for each half."""

    thing: Thing
    steps: tuple[str, ...]

    def backwards(self) -> Actor:
        return replace(
            self, steps=tuple(REVERSE_OF.get(step, step) for step in reversed(self.steps))
        )


@dataclass(frozen=True)
class Scene:
    """What happens in a clip, without where: all that questions and captions speak about."""

    kind: str
    actors: tuple[Actor, ...]

    def backwards(self) -> Scene:
        return replace(self, actors=tuple(actor.backwards() for actor in self.actors))

    def combinations(self) -> list[tuple]:
        """Keys that decide the split; the first one is what the scene is about."""
        keys = []
        first = self.actors[0]
        if self.kind == "two_step":
            tied = min(first.steps, first.backwards().steps)
            keys.append(("two_step", first.thing, tied))
        elif self.kind == "order":
            keys.append(("pair", tuple(sorted(str(actor.thing) for actor in self.actors))))
        elif self.kind == "count":
            things = Counter(actor.thing for actor in self.actors)  # the most numerous comes first
            keys += [("count", thing, number) for thing, number in things.items()]
            # If three boats are held out, training must not show "two boats and a key" either: it
            # would teach that three with boats in front are never all boats.
            most, total = max(things.values()), len(self.actors)
            keys += [("count", thing, total) for thing, number in things.items() if number == most]
        for actor in self.actors:
            waits = self.kind == "order"  # standing still until it is one's turn isn't "stay"
            for step in actor.steps:
                if not (waits and step == "stay"):
                    keys.append(("axis", actor.thing, AXIS_OF[step]))
        return keys


def split_of(combination: tuple) -> str:
    """The split that owns a combination, by a hash that no seed changes."""
    bucket = int(hashlib.sha256(repr(combination).encode()).hexdigest(), 16) % 100
    return "test" if bucket < 15 else "val" if bucket < 20 else "train"


def belongs(scene: Scene, split: str) -> bool:
    """Training scenes hold training combinations only; others are about one of their split."""
    splits = [split_of(key) for key in scene.combinations()]
    return all(s == "train" for s in splits) if split == "train" else splits[0] == split


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A random scene of the split; motions are drawn evenly, combinations by rejection."""
    kind = rng.choice(KINDS, p=TRAINING_SHARES if split == "train" else None)
    while True:
        scene = Scene(kind, tuple(_sample_actors(rng, kind, training=split == "train")))
        # A circle that turns looks like one that stays: such a question would have no answer.
        if any("spin" in actor.steps and not actor.thing.rotation_order for actor in scene.actors):
            continue
        if belongs(scene, split):
            return scene


def _sample_actors(rng: np.random.Generator, kind: str, training: bool) -> list[Actor]:
    """Who does what. Training shows what is easily mixed up more often than chance would."""

    def pick(options):  # rng.choice is slow, and makes arrays of tuples
        return options[rng.integers(len(options))]

    if kind == "single":
        return [Actor(pick(THINGS), (pick(AXES[pick(list(AXES))]),))]
    if kind == "two_step":
        axes = rng.permutation(["horizontal", "vertical", "size"])[:2]
        return [Actor(pick(THINGS), tuple(pick(AXES[axis]) for axis in axes))]
    if kind == "order":
        first, second = (THINGS[i] for i in rng.permutation(len(THINGS))[:2])
        if training and rng.random() < LOOK_ALIKE:
            second = pick([t for t in THINGS if t.colour == first.colour and t != first])
        directions = list(VECTORS)
        return [Actor(first, (pick(directions), "stay")), Actor(second, ("stay", pick(directions)))]
    # Counting to one is easy, and not what other numbers are learnt from.
    total = pick([1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4] if training else [1, 2, 3, 4])
    steps = ("stay",) if rng.random() < 0.5 else (pick(list(VECTORS)),)
    # Mixed scenes part the number from the object: the same picture answers several counts.
    if rng.random() < (ONE_KIND if training else 0.3) or total == 1:
        majority = total
    else:
        majority = int(rng.integers((total + 1) // 2, total + (0 if training else 1)))
    kinds = [THINGS[i] for i in rng.permutation(len(THINGS))[:3]]
    things = [kinds[0]] * majority + sorted(
        (kinds[1 + rng.integers(2)] for _ in range(total - majority)), key=str
    )
    return [Actor(thing, steps) for thing in things]


# ------------------------------ pictures


@dataclass
class Track:
    """An actor in every frame: centre and diameter (pixels), angle (degrees), visible or not."""

    x: np.ndarray
    y: np.ndarray
    diameter: np.ndarray
    angle: np.ndarray
    visible: np.ndarray


def _track(rng: np.random.Generator, actor: Actor, diameter: float) -> Track:
    """Time course of one actor that starts at (0, 0)."""
    time = np.arange(NUM_FRAMES) / (NUM_FRAMES - 1)
    x, y, angle = (np.zeros(NUM_FRAMES) for _ in range(3))
    # Growth starts small and shrinking starts large, so that both end inside the picture.
    scale = np.full(
        NUM_FRAMES, 0.7 if "grow" in actor.steps else 1.45 if "shrink" in actor.steps else 1.0
    )
    visible = np.full(NUM_FRAMES, True)
    angle += rng.uniform(-15, 15)
    halves = len(actor.steps)
    for i, step in enumerate(actor.steps):
        progress = np.clip(time * halves - i, 0, 1)
        if step in VECTORS:
            distance = rng.uniform(42, 58) if halves == 1 else rng.uniform(30, 42)
            x += VECTORS[step][0] * distance * progress
            y += VECTORS[step][1] * distance * progress
        elif step == "grow":
            scale *= np.exp(math.log(2.1) * progress)
        elif step == "shrink":
            scale *= np.exp(-math.log(2.1) * progress)
        elif step == "spin":
            # 20 to 38 degrees between two sampled frames: never a whole turn of its own symmetry.
            angle += rng.choice([-1, 1]) * rng.uniform(155, 290) * progress
        elif step == "blink":
            half_period = rng.integers(3, 5)
            visible = (
                np.arange(NUM_FRAMES) + rng.integers(2 * half_period)
            ) // half_period % 2 == 0
    return Track(x, y, diameter * scale, angle, visible)


def place(rng: np.random.Generator, scene: Scene) -> list[Track]:
    """Tracks for all actors that stay inside the picture and never touch each other."""
    while True:
        largest = {1: 34, 2: 30, 3: 27, 4: 26}[len(scene.actors)]
        together = (
            rng.integers(2**31) if scene.kind == "count" else None
        )  # those who move together keep pace
        tracks: list[Track] = []
        for actor in scene.actors:
            pace = np.random.default_rng(together) if together is not None else rng
            track = _track(pace, actor, rng.uniform(22, largest))
            for _ in range(30):
                moved = _shift_inside(rng, track)
                if all(_apart(moved, other) for other in tracks):
                    tracks.append(moved)
                    break
            else:
                break  # no room: start the whole scene again
        if len(tracks) == len(scene.actors):
            return tracks


def _shift_inside(rng: np.random.Generator, track: Track) -> Track:
    radius = track.diameter / 2

    def shift(path: np.ndarray) -> np.ndarray:
        low, high = (radius - path).max() + 1, (FRAME_SIZE - radius - path).min() - 1
        return path + rng.uniform(low, max(low, high))

    return replace(track, x=shift(track.x), y=shift(track.y))


def _apart(a: Track, b: Track) -> bool:
    distance = np.hypot(a.x - b.x, a.y - b.y)
    return bool((distance > (a.diameter + b.diameter) / 2 + 3).all())


def background(rng: np.random.Generator) -> Image.Image:
    """A soft gradient of muted colours, half of the time with faint clutter."""
    corners = rng.uniform(95, 185, size=(2, 2, 1)) + rng.uniform(-22, 22, size=(2, 2, 3))
    picture = Image.fromarray(corners.astype(np.uint8)).resize(
        (FRAME_SIZE, FRAME_SIZE), Image.BICUBIC
    )
    if rng.random() < 0.5:
        return picture
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 12)):
        x, y = rng.integers(0, FRAME_SIZE, 2)
        here = np.array(picture.getpixel((int(x), int(y))))
        colour = tuple(int(c) for c in np.clip(here + rng.uniform(-24, 24, 3), 0, 255))
        width, height = rng.integers(4, 40, 2)
        box = [int(x - width / 2), int(y - height / 2), int(x + width / 2), int(y + height / 2)]
        form = rng.integers(3)
        if form == 0:
            draw.ellipse(box, fill=colour)
        elif form == 1:
            draw.rectangle(box, fill=colour)
        else:
            draw.line(box, fill=colour, width=int(rng.integers(2, 6)))
    return picture.filter(ImageFilter.BoxBlur(1))


def paste(
    picture: Image.Image, thing: Thing, x: float, y: float, diameter: float, angle: float, ink=None
) -> None:
    """Draw a thing, centred at (x, y) pixels; with `ink`, its silhouette in that colour."""
    stamp = _stamp(thing, round(diameter), round(angle) % 360)
    left, top = round(x - stamp.width / 2), round(y - stamp.height / 2)
    if ink is None:
        picture.paste(stamp, (left, top), stamp)
    else:
        picture.paste(ink, (left, top, left + stamp.width, top + stamp.height), stamp)


_STAMPS: dict[tuple, Image.Image] = {}


def _stamp(thing: Thing, diameter: int, angle: int) -> Image.Image:
    key = (thing, diameter, angle)
    if key not in _STAMPS:
        if (
            len(_STAMPS) > 4096
        ):  # spinning fills this quickly; a small picture costs little to draw again
            _STAMPS.clear()
        # Half size first: turning 64 pixels is four times cheaper and looks the same at 30.
        small = sprite(thing).reduce(2)
        turned = small.rotate(angle, Image.BILINEAR) if angle else small
        _STAMPS[key] = turned.resize(
            (diameter, diameter), Image.BOX if diameter < 32 else Image.BILINEAR
        )
    return _STAMPS[key]


def render(rng: np.random.Generator, scene: Scene) -> list[Image.Image]:
    """The clip's frames, forwards."""
    ground, tracks = background(rng), place(rng, scene)
    frames = []
    for i in range(NUM_FRAMES):
        frame = ground.copy()
        for actor, track in zip(scene.actors, tracks, strict=True):
            if track.visible[i]:
                paste(frame, actor.thing, track.x[i], track.y[i], track.diameter[i], track.angle[i])
        frames.append(frame)
    return frames


def write_video(path: Path, frames: list[Image.Image]) -> None:
    """H.264 in mp4, renamed into place, so that a clip that exists is a whole one."""
    unfinished = path.with_suffix(".part.mp4")
    with av.open(str(unfinished), "w") as container:
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
    os.replace(unfinished, path)


# ------------------------------ the files


def make_clip(index: int, split: str, seed: int, out: Path) -> tuple[list[dict], list[dict]]:
    """Render a clip (unless it is there) and return its caption lines and question lines."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, split)
    name = f"{split}-{seed}-{index:05d}"
    pixels_rng, words_rng = rng.spawn(
        2
    )  # what is said doesn't depend on whether the pixels are there already
    changes = scene.backwards() != scene
    files = [(f"clips/{name}.mp4", False)]
    if split == "test" and changes:
        files.append((f"clips/{name}-reversed.mp4", True))
    if not all((out / file).exists() for file, _ in files):
        frames = render(pixels_rng, scene)
        for file, is_reversed in files:
            write_video(out / file, frames[::-1] if is_reversed else frames)

    captions, questions = [], []
    # Training plays a clip that tells time both ways: direction costs nothing more to render.
    directions = [False, True] if split != "test" and changes else [f[1] for f in files]
    words_seed = words_rng.integers(2**31)
    for backwards in directions:
        twin = split == "test" and backwards
        base = {
            "id": name + ("-reversed" if backwards else ""),
            "video": files[1 if twin else 0][0],
        }
        if backwards and not twin:
            base["reverse"] = True
        told = scene.backwards() if backwards else scene
        # Twins in the test set get the same questions in the same words, to be compared in pairs.
        told_rng = np.random.default_rng([words_seed, 0 if split == "test" else backwards])
        captions += [
            _line(base, i, *conversation) for i, conversation in enumerate(caption(told_rng, told))
        ]
        conversations = ask(told_rng, told, scored=split != "train", pair_name=name)
        for i, conversation in enumerate(conversations):
            if not twin or any(
                "pair" in turn for turn in conversation[2]
            ):  # a twin is asked what changed
                questions.append(_line(base, i, *conversation))
    if split == "train":
        for line in captions + questions:
            line.pop("scoring")
    return captions, questions


def _line(
    base: dict, number: int, language: str, turns: list[tuple[str, str]], scoring: list[dict]
) -> dict:
    conversations = []
    for i, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": ("<video>\n" if i == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    line = {**base, "id": f"{base['id']}-{number}", "language": language}
    return {**line, "conversations": conversations, "scoring": scoring}


def make_split(split: str, seed: int, clips: int, out: Path, workers: int) -> None:
    """Render a split into `out`; clips that exist are kept, the jsonl files are written last."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    task = partial(make_clip, split=split, seed=seed, out=out)
    captions, questions = [], []
    # "spawn": a forked child of a process with threads (tqdm has one) can hang on a lock.
    with get_context("spawn").Pool(workers) as pool:
        for some_captions, some_questions in tqdm(
            pool.imap(task, range(clips), chunksize=16),
            total=clips,
            desc=f"render {split}",
            unit="clip",
        ):
            captions += some_captions
            questions += some_questions
    for name, lines in (("captions", captions), ("questions", questions)):
        unfinished = out / f"{name}.jsonl.part"
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        os.replace(unfinished, out / f"{name}.jsonl")
    print(f"{out}: {clips} clips, {len(captions)} captions, {len(questions)} conversations")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="which combinations (default: train)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed gives other clips of the same split"
    )
    parser.add_argument(
        "--clips", type=int, default=1000, help="number of clips, reversed twins not counted"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write clips/ and the jsonl files into"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that render (default: all)"
    )
    args = parser.parse_args()
    if args.clips < 1 or args.workers < 1:
        parser.error("--clips and --workers must be at least 1")
    make_split(args.split, args.seed, args.clips, args.out, args.workers)


if __name__ == "__main__":
    main()
