"""The 48 things of the demo world: six shapes in six colours and twelve drawn icons.

Each thing is drawn once as a large RGBA sprite; a clip scales, turns and pastes it, so that a frame
costs microseconds. Names stand in English and Chinese side by side: the world speaks both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

SPRITE_SIZE = 128  # sprites are drawn at this size and scaled down, which smooths their edges

COLOURS = {
    "red": ("红色", (222, 42, 38)),
    "yellow": ("黄色", (248, 208, 32)),
    "green": ("绿色", (38, 160, 66)),
    "blue": ("蓝色", (44, 84, 222)),
    "purple": ("紫色", (152, 52, 190)),
    "white": ("白色", (252, 252, 252)),
}
SHAPES = {
    "circle": "圆形",
    "square": "方块",
    "triangle": "三角形",
    "star": "星星",
    "heart": "爱心",
    "ring": "圆环",
}
ICONS = {
    "house": "房子",
    "tree": "树",
    "car": "汽车",
    "fish": "鱼",
    "flower": "花",
    "boat": "船",
    "mushroom": "蘑菇",
    "rocket": "火箭",
    "cup": "杯子",
    "key": "钥匙",
    "moon": "月亮",
    "umbrella": "雨伞",
}
# Turning a thing by 360° / order gives the same picture; 0 means that turning never shows.
ROTATION_ORDER = {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "flower": 6}


@dataclass(frozen=True)
class Thing:
    """One kind of object: a coloured shape, or an icon (whose colour is part of its drawing)."""

    shape: str
    colour: str | None = None

    @property
    def rotation_order(self) -> int:
        return ROTATION_ORDER.get(self.shape, 1)


THINGS = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
THINGS += [Thing(icon) for icon in ICONS]


@cache
def sprite(thing: Thing) -> Image.Image:
    """The thing as a `SPRITE_SIZE` square RGBA picture, filled up to a small margin."""
    picture = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE), (0, 0, 0, 0))
    draw = Pen(ImageDraw.Draw(picture))
    fill = COLOURS[thing.colour][1] if thing.colour else None
    DRAWINGS[thing.shape](draw, fill)
    return picture


class Pen:
    """Draws in coordinates from -1 to 1 (y downwards), which keep the drawings below readable."""

    def __init__(self, draw: ImageDraw.ImageDraw):
        self.draw = draw

    @staticmethod
    def _pixel(point) -> tuple[float, float]:
        half = SPRITE_SIZE / 2
        return (half + 0.94 * half * point[0], half + 0.94 * half * point[1])

    def polygon(self, points, fill) -> None:
        self.draw.polygon(
            [self._pixel(p) for p in points], fill=fill, outline=(30, 30, 30), width=3
        )

    def ellipse(self, left, top, right, bottom, fill) -> None:
        box = [self._pixel((left, top)), self._pixel((right, bottom))]
        self.draw.ellipse(box, fill=fill, outline=(30, 30, 30), width=3)

    def box(self, left, top, right, bottom, fill) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def erase(self, left, top, right, bottom) -> None:
        box = [self._pixel((left, top)), self._pixel((right, bottom))]
        self.draw.ellipse(box, fill=(0, 0, 0, 0), outline=(30, 30, 30), width=3)


def _regular(corners: int, inner: float | None = None, start: float = -90.0):
    """Corners of a regular polygon, or of a star with `inner` as the radius between its points."""
    count = corners * (2 if inner else 1)
    radii = [1.0, inner] if inner else [1.0]
    for i in range(count):
        angle = math.radians(start + 360 * i / count)
        radius = radii[i % len(radii)]
        yield (radius * math.cos(angle), radius * math.sin(angle))


def _circle(pen, fill):
    pen.ellipse(-0.9, -0.9, 0.9, 0.9, fill)


def _square(pen, fill):
    pen.box(-0.8, -0.8, 0.8, 0.8, fill)


def _triangle(pen, fill):
    pen.polygon(list(_regular(3)), fill)


def _star(pen, fill):
    pen.polygon(list(_regular(5, inner=0.42)), fill)


def _heart(pen, fill):
    curve = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        curve.append((16 * math.sin(t) ** 3 / 17, -(y + 2.5) / 16))
    pen.polygon(curve, fill)


def _ring(pen, fill):
    pen.ellipse(-0.95, -0.95, 0.95, 0.95, fill)
    pen.erase(-0.45, -0.45, 0.45, 0.45)


def _house(pen, _):
    pen.box(-0.7, -0.1, 0.7, 0.95, (238, 208, 160))
    pen.polygon([(-1, -0.1), (0, -0.95), (1, -0.1)], (170, 60, 40))
    pen.box(-0.2, 0.35, 0.2, 0.95, (110, 70, 40))


def _tree(pen, _):
    pen.box(-0.15, 0.3, 0.15, 0.98, (120, 80, 45))
    pen.polygon([(-0.85, 0.45), (0, -0.35), (0.85, 0.45)], (30, 120, 60))
    pen.polygon([(-0.65, -0.1), (0, -0.98), (0.65, -0.1)], (40, 145, 70))


def _car(pen, _):
    pen.polygon([(-0.5, -0.05), (-0.3, -0.5), (0.35, -0.5), (0.6, -0.05)], (160, 210, 235))
    pen.box(-0.98, -0.05, 0.98, 0.4, (235, 120, 30))
    pen.ellipse(-0.75, 0.15, -0.25, 0.65, (40, 40, 45))
    pen.ellipse(0.25, 0.15, 0.75, 0.65, (40, 40, 45))


def _fish(pen, _):
    pen.polygon([(0.45, 0), (0.98, -0.5), (0.98, 0.5)], (30, 150, 170))
    pen.ellipse(-0.98, -0.5, 0.65, 0.5, (60, 195, 205))
    pen.ellipse(-0.7, -0.22, -0.45, 0.03, (20, 20, 30))


def _flower(pen, _):
    for x, y in _regular(6):
        pen.ellipse(0.6 * x - 0.36, 0.6 * y - 0.36, 0.6 * x + 0.36, 0.6 * y + 0.36, (245, 130, 180))
    pen.ellipse(-0.32, -0.32, 0.32, 0.32, (250, 215, 60))


def _boat(pen, _):
    pen.polygon([(-0.95, 0.4), (0.95, 0.4), (0.55, 0.9), (-0.55, 0.9)], (120, 75, 45))
    pen.box(-0.06, -0.95, 0.06, 0.4, (90, 60, 40))
    pen.polygon([(0.1, -0.9), (0.85, 0.25), (0.1, 0.25)], (245, 245, 235))
    pen.polygon([(-0.1, -0.7), (-0.7, 0.25), (-0.1, 0.25)], (225, 90, 80))


def _mushroom(pen, _):
    pen.box(-0.28, 0.0, 0.28, 0.92, (240, 228, 205))
    cap = [(math.cos(math.radians(a)), 0.1 - math.sin(math.radians(a))) for a in range(0, 181, 6)]
    pen.polygon(cap, (200, 40, 60))
    for x, y in ((-0.5, -0.25), (0.05, -0.6), (0.5, -0.2)):
        pen.ellipse(x - 0.16, y - 0.16, x + 0.16, y + 0.16, (250, 245, 240))


def _rocket(pen, _):
    pen.polygon([(-0.3, 0.5), (0.3, 0.5), (0.0, 0.98)], (250, 170, 40))
    pen.polygon([(-0.7, 0.65), (-0.3, 0.0), (0.3, 0.0), (0.7, 0.65)], (70, 90, 120))
    pen.polygon(
        [(-0.32, 0.5), (-0.32, -0.45), (0, -0.98), (0.32, -0.45), (0.32, 0.5)], (205, 212, 222)
    )
    pen.ellipse(-0.17, -0.37, 0.17, -0.03, (60, 130, 210))


def _cup(pen, _):
    pen.ellipse(0.25, -0.35, 0.95, 0.45, (60, 70, 90))
    pen.erase(0.42, -0.18, 0.78, 0.28)
    pen.polygon([(-0.85, -0.75), (0.6, -0.75), (0.42, 0.9), (-0.67, 0.9)], (95, 110, 140))
    pen.ellipse(-0.8, -0.9, 0.55, -0.6, (80, 45, 25))


def _key(pen, _):
    gold = (205, 150, 40)
    pen.box(-0.25, -0.13, 0.95, 0.13, gold)
    pen.box(0.45, 0.1, 0.6, 0.5, gold)
    pen.box(0.75, 0.1, 0.9, 0.6, gold)
    pen.ellipse(-0.98, -0.5, 0.02, 0.5, gold)
    pen.erase(-0.68, -0.2, -0.28, 0.2)


def _moon(pen, _):
    outer = [
        (0.95 * math.cos(a), 0.95 * math.sin(a))
        for a in (math.radians(d) for d in range(50, 311, 6))
    ]
    inner = [
        (0.45 + 0.75 * math.cos(a), 0.75 * math.sin(a))
        for a in (math.radians(d) for d in range(285, 74, -6))
    ]
    pen.polygon(outer + inner, (250, 232, 150))


def _umbrella(pen, _):
    pen.box(-0.06, -0.1, 0.06, 0.8, (80, 60, 50))
    pen.box(-0.4, 0.7, 0.06, 0.85, (80, 60, 50))
    dome = [
        (0.98 * math.cos(a), 0.1 - 0.95 * math.sin(a))
        for a in (math.radians(d) for d in range(0, 181, 6))
    ]
    pen.polygon(dome, (30, 60, 120))
    pen.polygon([(-0.35, 0.1), (0, -0.85), (0.35, 0.1)], (240, 200, 70))


DRAWINGS = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "house": _house,
    "tree": _tree,
    "car": _car,
    "fish": _fish,
    "flower": _flower,
    "boat": _boat,
    "mushroom": _mushroom,
    "rocket": _rocket,
    "cup": _cup,
    "key": _key,
    "moon": _moon,
    "umbrella": _umbrella,
}
