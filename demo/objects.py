"""The 48 objects of the demo world: six shapes in six colours, and twelve drawn icons.

Each object is drawn once as a large RGBA sprite; a clip scales, turns and pastes it, so that a
frame costs microseconds. Names stand in English and Chinese side by side: the world speaks both.
"""

import math
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

SPRITE_SIZE = 128  # sprites are drawn at this size and scaled down, which smooths their edges
OUTLINE, TRANSPARENT = (30, 30, 30), (0, 0, 0, 0)

COLOURS = {
    "red": ("红色", (222, 42, 38)),
    "yellow": ("黄色", (248, 208, 32)),
    "green": ("绿色", (38, 160, 66)),
    "blue": ("蓝色", (44, 84, 222)),
    "purple": ("紫色", (152, 52, 190)),
    "white": ("白色", (252, 252, 252)),
}
SHAPES = {"circle": "圆形", "square": "方块", "triangle": "三角形", "star": "星星", "heart": "爱心"}
SHAPES |= {"ring": "圆环"}
ICONS = {"house": "房子", "tree": "树", "car": "汽车", "fish": "鱼", "flower": "花", "boat": "船"}
ICONS |= {"mushroom": "蘑菇", "rocket": "火箭", "cup": "杯子", "key": "钥匙", "moon": "月亮"}
ICONS |= {"umbrella": "雨伞"}
# Turning an object by 360° / order gives the same picture; 0 means that turning never shows.
ROTATION_ORDER = {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "flower": 6}


@dataclass(frozen=True)
class Object:
    """A class of objects: a coloured shape, or an icon (whose colour is part of its drawing)."""

    shape: str
    colour: str | None = None

    @property
    def rotation_order(self) -> int:
        return ROTATION_ORDER.get(self.shape, 1)

    def __repr__(self) -> str:
        # The splits are a hash of this text (`demo.scene.split_of`): it stays as it always was.
        return f"Thing(shape={self.shape!r}, colour={self.colour!r})"


OBJECTS = [Object(shape, colour) for shape in SHAPES for colour in COLOURS]
OBJECTS += [Object(icon) for icon in ICONS]

# ---- drawings: parts from back to front, each a form and its fill (None: the object's colour).
# A form is a list of the corners of a polygon, or an ellipse's left, top, right and bottom, from -1
# to 1 with y downwards.

Point = tuple[float, float]


def _disc(x: float, y: float, radius: float) -> tuple:
    return x - radius, y - radius, x + radius, y + radius


def _box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star(corners: int, inner: float = 1.0) -> list[Point]:
    """A star with `inner` as the radius between its points; 1: the regular polygon."""
    radii = ([1.0, inner] if inner < 1 else [1.0]) * corners
    angles = [math.radians(-90 + 360 * i / len(radii)) for i in range(len(radii))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _arc(x: float, y: float, wide: float, high: float, degrees: range) -> list[Point]:
    return [(x + wide * math.cos(a), y + high * math.sin(a)) for a in map(math.radians, degrees)]


def _heart() -> list[Point]:
    curve = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((16 * math.sin(t) ** 3 / 17, -(y + 2.5) / 16))
    return curve


BROWN, GOLD, BLUE_GREY, POLE = (120, 80, 45), (205, 150, 40), (60, 70, 90), (80, 60, 50)
SILVER, _OUTER, _INNER = (205, 212, 222), range(50, 311, 6), range(285, 74, -6)  # the moon's edges
DRAWINGS: dict[str, list[tuple]] = {
    "circle": [(_disc(0, 0, 0.9), None)],
    "square": [(_box(-0.8, -0.8, 0.8, 0.8), None)],
    "triangle": [(_star(3), None)],
    "star": [(_star(5, inner=0.42), None)],
    "heart": [(_heart(), None)],
    "ring": [(_disc(0, 0, 0.95), None), (_disc(0, 0, 0.45), TRANSPARENT)],
    "house": [
        (_box(-0.7, -0.1, 0.7, 0.95), (238, 208, 160)),
        ([(-1, -0.1), (0, -0.95), (1, -0.1)], (170, 60, 40)),
        (_box(-0.2, 0.35, 0.2, 0.95), (110, 70, 40)),
    ],
    "tree": [
        (_box(-0.15, 0.3, 0.15, 0.98), BROWN),
        ([(-0.85, 0.45), (0, -0.35), (0.85, 0.45)], (30, 120, 60)),
        ([(-0.65, -0.1), (0, -0.98), (0.65, -0.1)], (40, 145, 70)),
    ],
    "car": [
        ([(-0.5, -0.05), (-0.3, -0.5), (0.35, -0.5), (0.6, -0.05)], (160, 210, 235)),
        (_box(-0.98, -0.05, 0.98, 0.4), (235, 120, 30)),
        ((-0.75, 0.15, -0.25, 0.65), (40, 40, 45)),
        ((0.25, 0.15, 0.75, 0.65), (40, 40, 45)),
    ],
    "fish": [
        ([(0.45, 0), (0.98, -0.5), (0.98, 0.5)], (30, 150, 170)),
        ((-0.98, -0.5, 0.65, 0.5), (60, 195, 205)),
        ((-0.7, -0.22, -0.45, 0.03), (20, 20, 30)),
    ],
    "flower": [
        *((_disc(0.6 * x, 0.6 * y, 0.36), (245, 130, 180)) for x, y in _star(6)),
        (_disc(0, 0, 0.32), (250, 215, 60)),
    ],
    "boat": [
        ([(-0.95, 0.4), (0.95, 0.4), (0.55, 0.9), (-0.55, 0.9)], (120, 75, 45)),
        (_box(-0.06, -0.95, 0.06, 0.4), (90, 60, 40)),
        ([(0.1, -0.9), (0.85, 0.25), (0.1, 0.25)], (245, 245, 235)),
        ([(-0.1, -0.7), (-0.7, 0.25), (-0.1, 0.25)], (225, 90, 80)),
    ],
    "mushroom": [
        (_box(-0.28, 0.0, 0.28, 0.92), (240, 228, 205)),
        (_arc(0, 0.1, 1, -1, range(0, 181, 6)), (200, 40, 60)),
        (_disc(-0.5, -0.25, 0.16), (250, 245, 240)),
        (_disc(0.05, -0.6, 0.16), (250, 245, 240)),
        (_disc(0.5, -0.2, 0.16), (250, 245, 240)),
    ],
    "rocket": [
        ([(-0.3, 0.5), (0.3, 0.5), (0.0, 0.98)], (250, 170, 40)),
        ([(-0.7, 0.65), (-0.3, 0.0), (0.3, 0.0), (0.7, 0.65)], (70, 90, 120)),
        ([(-0.32, 0.5), (-0.32, -0.45), (0, -0.98), (0.32, -0.45), (0.32, 0.5)], SILVER),
        ((-0.17, -0.37, 0.17, -0.03), (60, 130, 210)),
    ],
    "cup": [
        ((0.25, -0.35, 0.95, 0.45), BLUE_GREY),
        ((0.42, -0.18, 0.78, 0.28), TRANSPARENT),
        ([(-0.85, -0.75), (0.6, -0.75), (0.42, 0.9), (-0.67, 0.9)], (95, 110, 140)),
        ((-0.8, -0.9, 0.55, -0.6), (80, 45, 25)),
    ],
    "key": [
        (_box(-0.25, -0.13, 0.95, 0.13), GOLD),
        (_box(0.45, 0.1, 0.6, 0.5), GOLD),
        (_box(0.75, 0.1, 0.9, 0.6), GOLD),
        ((-0.98, -0.5, 0.02, 0.5), GOLD),
        ((-0.68, -0.2, -0.28, 0.2), TRANSPARENT),
    ],
    "moon": [
        (_arc(0, 0, 0.95, 0.95, _OUTER) + _arc(0.45, 0, 0.75, 0.75, _INNER), (250, 232, 150)),
    ],
    "umbrella": [
        (_box(-0.06, -0.1, 0.06, 0.8), POLE),
        (_box(-0.4, 0.7, 0.06, 0.85), POLE),
        (_arc(0, 0.1, 0.98, -0.95, range(0, 181, 6)), (30, 60, 120)),
        ([(-0.35, 0.1), (0, -0.85), (0.35, 0.1)], (240, 200, 70)),
    ],
}


def draw_sprite(parts: list[tuple], colour: tuple[int, int, int] | None = None) -> Image.Image:
    """`parts` (see DRAWINGS) as a `SPRITE_SIZE` square RGBA picture, up to a small margin."""

    def pixel(x: float, y: float) -> Point:
        half = SPRITE_SIZE / 2
        return (half + 0.94 * half * x, half + 0.94 * half * y)

    picture = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE), TRANSPARENT)
    draw = ImageDraw.Draw(picture)
    for form, fill in parts:
        style = {"fill": fill or colour, "outline": OUTLINE, "width": 3}
        if isinstance(form, tuple):
            draw.ellipse([pixel(*form[:2]), pixel(*form[2:])], **style)
        else:
            draw.polygon([pixel(*corner) for corner in form], **style)
    return picture


@cache
def sprite_of(item: Object) -> Image.Image:
    """The object's sprite, drawn once."""
    return draw_sprite(DRAWINGS[item.shape], COLOURS[item.colour][1] if item.colour else None)
