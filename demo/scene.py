"""What happens in a clip of the demo world, apart from how it looks, and which split it is in.

The splits differ by *combination*, not by seed alone. A combination is object × motion axis, object
× two-step (tied with its reverse), an unordered pair, or object × count; a hash sends 15 % of all
to the test set and 5 % to validation, and no training clip holds any of these. A model that learned
"the red star always moves left" scores below chance here.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from demo.objects import OBJECTS, Object

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

SPLITS = ("train", "val", "test")
SCENE_TYPES = ("single", "two_step", "order", "count")
# Who does what, and how many there are, is learnt last: training shows such scenes more often.
TRAINING_SHARES = (0.10, 0.12, 0.34, 0.44)
SAME_COLOUR = 0.3  # share of training's pairs that have the same colour, or are both icons
ONE_CLASS = 0.4  # share of training's counts of two and more that are of one class


@dataclass(frozen=True)
class Actor:
    """An object and what it does: one motion for the whole clip, or one for each half."""

    object: Object
    steps: tuple[str, ...]

    def backwards(self) -> "Actor":
        return replace(self, steps=tuple(REVERSE_OF.get(s, s) for s in reversed(self.steps)))

    @property
    def motion(self) -> str:
        """The first step that isn't waiting for one's turn."""
        return next((step for step in self.steps if step != "stay"), "stay")


@dataclass(frozen=True)
class Scene:
    """All that questions and captions speak about."""

    type: str
    actors: tuple[Actor, ...]

    def backwards(self) -> "Scene":
        return replace(self, actors=tuple(actor.backwards() for actor in self.actors))

    def in_order(self) -> list[Actor]:
        """The actors of an "order" scene, the one that moves first first."""
        return sorted(self.actors, key=lambda actor: actor.steps[0] == "stay")

    def counts(self) -> Counter[Object]:
        """How many there are of each class, in the order in which they are named."""
        return Counter(actor.object for actor in self.actors)

    def combinations(self) -> list[tuple]:
        """Keys that decide the split; the first one is what the scene is about."""
        keys = []
        first = self.actors[0]
        if self.type == "two_step":
            keys.append(("two_step", first.object, min(first.steps, first.backwards().steps)))
        elif self.type == "order":
            keys.append(("pair", tuple(sorted(str(actor.object) for actor in self.actors))))
        elif self.type == "count":
            counts = self.counts()  # the most numerous class comes first
            keys += [("count", item, number) for item, number in counts.items()]
            # If three boats are held out, training must not show "two boats and a key" either: it
            # would teach that three with boats in front are never all boats.
            most, total = max(counts.values()), len(self.actors)
            keys += [("count", item, total) for item, number in counts.items() if number == most]
        for actor in self.actors:
            waits = self.type == "order"  # standing still until it is one's turn isn't "stay"
            steps = [step for step in actor.steps if not (waits and step == "stay")]
            keys += [("axis", actor.object, AXIS_OF[step]) for step in steps]
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
    """A random scene of the split; motions are sampled evenly, combinations by rejection."""
    scene_type = rng.choice(SCENE_TYPES, p=TRAINING_SHARES if split == "train" else None)
    while True:
        scene = Scene(scene_type, tuple(_sample_actors(rng, scene_type, split == "train")))
        # A circle that turns looks like one that stays: such a question would have no answer.
        if any("spin" in actor.steps and not actor.object.rotation_order for actor in scene.actors):
            continue
        if belongs(scene, split):
            return scene


def _sample_actors(rng: np.random.Generator, scene_type: str, training: bool) -> list[Actor]:
    """Who does what. Training shows what is easily confused more often than chance would."""

    def pick(options):  # rng.choice is slow, and makes arrays of tuples
        return options[rng.integers(len(options))]

    directions = list(VECTORS)
    if scene_type == "single":
        return [Actor(pick(OBJECTS), (pick(AXES[pick(list(AXES))]),))]
    if scene_type == "two_step":
        axes = rng.permutation(["horizontal", "vertical", "size"])[:2]
        return [Actor(pick(OBJECTS), tuple(pick(AXES[axis]) for axis in axes))]
    if scene_type == "order":
        first, second = (OBJECTS[i] for i in rng.permutation(len(OBJECTS))[:2])
        if training and rng.random() < SAME_COLOUR:
            second = pick([o for o in OBJECTS if o.colour == first.colour and o != first])
        return [Actor(first, (pick(directions), "stay")), Actor(second, ("stay", pick(directions)))]
    # Counting to one is easy, and not what other numbers are learnt from.
    total = pick([1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4] if training else [1, 2, 3, 4])
    steps = ("stay",) if rng.random() < 0.5 else (pick(directions),)
    # Mixed scenes part the number from the object: the same picture answers several counts.
    if rng.random() < (ONE_CLASS if training else 0.3) or total == 1:
        majority = total
    else:
        majority = int(rng.integers((total + 1) // 2, total + (0 if training else 1)))
    classes = [OBJECTS[i] for i in rng.permutation(len(OBJECTS))[:3]]
    others = sorted((classes[1 + rng.integers(2)] for _ in range(total - majority)), key=str)
    return [Actor(item, steps) for item in [classes[0]] * majority + others]
