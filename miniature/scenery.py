"""The twelve scenes, painted on a supersampled canvas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from miniature.critters import jitter_rgb
from miniature.words import Rgb


class Painter:
    """Draws on a supersampled canvas in units of the image side, or of a critter's frame (see `frame`)."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.image = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.image)
        self.origin = (0.0, 0.0)
        self.unit = 1.0
        self.sign = 1.0

    def frame(self, x: float, y: float, unit: float, flip: bool) -> None:
        """Makes later coordinates relative to (x, y), in `unit`s, mirrored if `flip`."""
        self.origin, self.unit, self.sign = (x, y), unit, -1.0 if flip else 1.0

    def point(self, x: float, y: float) -> tuple[float, float]:
        return ((self.origin[0] + self.sign * x * self.unit) * self.side, (self.origin[1] + y * self.unit) * self.side)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (left, top), (right, bottom) = self.point(x0, y0), self.point(x1, y1)
        return min(left, right), top, max(left, right), bottom

    def width(self, width: float) -> int:
        return max(1, round(width * self.unit * self.side))

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Rgb) -> None:
        self.draw.ellipse(self.box(x - rx, y - ry, x + rx, y + ry), fill=fill)

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb, radius: float = 0.0) -> None:
        box = self.box(x0, y0, x1, y1)
        if radius:
            self.draw.rounded_rectangle(box, radius=radius * self.unit * self.side, fill=fill)
        else:
            self.draw.rectangle(box, fill=fill)

    def polygon(self, points: list[tuple[float, float]], fill: Rgb) -> None:
        self.draw.polygon([self.point(*point) for point in points], fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Rgb, width: float) -> None:
        self.draw.line([self.point(*point) for point in points], fill=fill, width=self.width(width), joint="curve")


def shade(rgb: Rgb, factor: float) -> Rgb:
    """`rgb` made darker (factor < 1) or lighter (factor > 1, towards white)."""
    if factor <= 1:
        return int(rgb[0] * factor), int(rgb[1] * factor), int(rgb[2] * factor)
    mix = min(factor - 1, 1.0)
    return tuple(int(c + (255 - c) * mix) for c in rgb)  # type: ignore[return-value]


def _sky(p: Painter, rng: np.random.Generator, rgb: Rgb) -> None:
    sky = jitter_rgb(rgb, rng)
    for band in range(6):
        p.rect(0, band * 0.11, 1, 1, shade(sky, 1 + 0.07 * band))


def _grass(p: Painter, rng: np.random.Generator) -> None:
    _sky(p, rng, (120, 190, 245))
    horizon = rng.uniform(0.28, 0.4)
    green = jitter_rgb((100, 196, 70), rng)
    p.rect(0, horizon, 1, 1, green)
    for _ in range(26):
        x, y, h = rng.random(), rng.uniform(horizon + 0.04, 1.0), rng.uniform(0.06, 0.1)
        p.polygon([(x - 0.02, y), (x + 0.02, y), (x + rng.uniform(-0.02, 0.02), y - h)], shade(green, 0.72))
    for _ in range(6):
        x, y = rng.random(), rng.uniform(horizon + 0.05, 1.0)
        p.ellipse(x, y, 0.025, 0.025, (255, 255, 255))
        p.ellipse(x, y, 0.011, 0.011, (250, 200, 30))


def _snow(p: Painter, rng: np.random.Generator) -> None:
    _sky(p, rng, (132, 160, 196))
    horizon = rng.uniform(0.42, 0.52)
    for x in (rng.uniform(0.02, 0.16), rng.uniform(0.84, 0.98)):
        for step in range(3):
            y = horizon - 0.3 + step * 0.12
            half = 0.07 + 0.035 * step
            p.polygon([(x - half, y + 0.12), (x + half, y + 0.12), (x, y - 0.06)], (70, 110, 110))
            p.polygon([(x - half * 0.6, y + 0.02), (x + half * 0.6, y + 0.02), (x, y - 0.06)], (250, 252, 255))
    p.rect(0, horizon, 1, 1, (232, 240, 250))
    p.ellipse(rng.uniform(0.1, 0.3), horizon + 0.06, 0.4, 0.1, (244, 248, 255))
    p.ellipse(rng.uniform(0.6, 0.9), horizon + 0.2, 0.5, 0.14, (250, 252, 255))
    for _ in range(26):
        r = rng.uniform(0.012, 0.022)
        p.ellipse(rng.random(), rng.uniform(0, horizon), r, r, (255, 255, 255))


def _beach(p: Painter, rng: np.random.Generator) -> None:
    _sky(p, rng, (140, 208, 250))
    p.ellipse(rng.choice([0.14, 0.86]), 0.14, 0.09, 0.09, (255, 240, 120))
    horizon, shore = rng.uniform(0.26, 0.34), rng.uniform(0.52, 0.62)
    p.rect(0, horizon, 1, 1, jitter_rgb((20, 130, 205), rng))
    for _ in range(5):
        x, y = rng.uniform(0, 0.9), rng.uniform(horizon + 0.03, shore - 0.08)
        p.rect(x, y, x + 0.13, y + 0.016, (120, 200, 240))
    wave = [(x / 8, shore + 0.02 * math.sin(x * 1.9 + shore * 40)) for x in range(9)]
    p.polygon([(x, y - 0.04) for x, y in wave] + [(1, 1), (0, 1)], (245, 252, 255))
    p.polygon([*wave, (1, 1), (0, 1)], jitter_rgb((244, 222, 160), rng))
    for _ in range(5):
        x, y = rng.random(), rng.uniform(shore + 0.08, 0.98)
        p.ellipse(x, y, 0.03, 0.014, (214, 184, 118))


def _forest(p: Painter, rng: np.random.Generator) -> None:
    p.rect(0, 0, 1, 1, jitter_rgb((34, 84, 48), rng))
    ground = rng.uniform(0.6, 0.7)
    for index in range(6):
        x, half = index * 0.19 + rng.uniform(-0.04, 0.08), rng.uniform(0.03, 0.05)
        trunk = jitter_rgb((96, 62, 36), rng)
        p.rect(x - half, 0, x + half, ground + 0.05, trunk)
        p.rect(x - half, 0, x - half * 0.4, ground + 0.05, shade(trunk, 0.7))
    for _ in range(13):
        green = jitter_rgb((24, 110, 44), rng, 22)
        p.ellipse(rng.random(), rng.uniform(-0.05, 0.16), rng.uniform(0.1, 0.16), rng.uniform(0.07, 0.12), green)
    p.rect(0, ground, 1, 1, jitter_rgb((74, 84, 40), rng))
    for _ in range(8):
        x = rng.random()
        p.ellipse(x, ground, rng.uniform(0.06, 0.11), 0.06, jitter_rgb((30, 120, 50), rng, 16))


def _wooden_floor(p: Painter, rng: np.random.Generator) -> None:
    p.rect(0, 0, 1, 1, jitter_rgb((236, 230, 214), rng, 8))
    top = rng.uniform(0.2, 0.3)
    p.rect(0, top - 0.06, 1, top, (255, 255, 255))
    wood = jitter_rgb((190, 126, 66), rng)
    p.rect(0, top, 1, 1, wood)
    # Planks run away from the viewer to a point above the wall; rows of bricks would read as a wall.
    vanish, phase = rng.uniform(0.4, 0.6), rng.uniform(0, 0.2)
    far = 0.36
    for index in range(-8, 9):
        near = [0.5 + (index + k) * 0.2 + phase for k in (0, 1)]
        a, b = [(vanish + (x - vanish) * far, top) for x in near]
        if index % 2:
            p.polygon([a, b, (near[1], 1), (near[0], 1)], shade(wood, 1.16))
        p.line([a, (near[0], 1)], shade(wood, 0.55), 0.014)
        t = rng.uniform(0.3, 0.9)
        ends = [(f[0] + (x - f[0]) * t, f[1] + (1 - f[1]) * t) for f, x in zip((a, b), near, strict=True)]
        p.line(ends, shade(wood, 0.55), 0.014)


def _pink_fabric(p: Painter, rng: np.random.Generator) -> None:
    pink = jitter_rgb((250, 130, 180), rng, 8)
    p.rect(0, 0, 1, 1, pink)
    slope, phase = rng.uniform(0.5, 1.0), rng.uniform(0, 0.25)
    for index in range(-3, 5):
        offset = index * 0.3 + phase
        curve = [(offset + slope * (y / 8) + 0.035 * math.sin(y * 1.3 + index), y / 8) for y in range(9)]
        p.line(curve, shade(pink, 0.84), 0.07)
        p.line([(x + 0.075, y) for x, y in curve], shade(pink, 1.35), 0.05)


def _purple_rug(p: Painter, rng: np.random.Generator) -> None:
    p.rect(0, 0, 1, 1, jitter_rgb((226, 214, 190), rng, 8))
    floor = rng.uniform(0.36, 0.44)
    p.rect(0, floor, 1, 1, jitter_rgb((180, 164, 146), rng, 8))
    p.rect(0, floor - 0.03, 1, floor, (250, 250, 250))
    purple = jitter_rgb((110, 40, 170), rng)
    y = floor + 0.36
    p.ellipse(0.5, y, 0.62, 0.33, shade(purple, 1.5))
    p.ellipse(0.5, y, 0.585, 0.295, purple)
    p.ellipse(0.5, y, 0.45, 0.215, shade(purple, 1.35))
    p.ellipse(0.5, y, 0.415, 0.185, purple)


def _blue_house(p: Painter, rng: np.random.Generator) -> None:
    _sky(p, rng, (186, 224, 248))
    ground = rng.uniform(0.62, 0.7)
    p.rect(0, ground, 1, 1, jitter_rgb((150, 200, 110), rng))
    centre, half = rng.uniform(0.42, 0.58), rng.uniform(0.38, 0.44)
    blue = jitter_rgb((40, 110, 210), rng)
    left, right = centre - half, centre + half
    p.rect(left, 0.27, right, ground + 0.03, blue)
    for y in np.arange(0.33, ground, 0.08):
        p.rect(left, y, right, y + 0.012, shade(blue, 0.75))
    p.polygon([(left - 0.06, 0.29), (right + 0.06, 0.29), (centre, 0.02)], jitter_rgb((150, 60, 50), rng))
    for x in (left + 0.03, right - 0.17):
        p.rect(x, 0.36, x + 0.14, 0.52, (255, 255, 255))
        p.rect(x + 0.025, 0.385, x + 0.115, 0.495, (255, 238, 150))
        p.rect(x + 0.06, 0.36, x + 0.08, 0.52, (255, 255, 255))


def _city(p: Painter, rng: np.random.Generator) -> None:
    p.rect(0, 0, 1, 1, jitter_rgb((18, 22, 66), rng, 6))
    p.ellipse(rng.uniform(0.1, 0.9), 0.1, 0.07, 0.07, (250, 246, 214))
    ground = 0.72
    edge = -0.04
    while edge < 1:
        width, top = rng.choice([0.16, 0.2]), rng.uniform(0.12, 0.36)
        p.rect(edge, top, edge + width - 0.012, ground, jitter_rgb((62, 64, 104), rng, 12))
        for y in np.arange(top + 0.04, ground - 0.04, 0.09):
            for x in (edge + 0.028, edge + width * 0.55):
                if rng.random() < 0.8:
                    p.rect(x, y, x + 0.045, y + 0.05, (255, 220, 90))
        edge += width
    p.rect(0, ground, 1, 1, jitter_rgb((96, 98, 116), rng, 6))
    p.rect(0, ground, 1, ground + 0.02, (150, 152, 170))
    for x in np.arange(rng.uniform(-0.1, 0.1), 1, 0.3):
        p.rect(x, 0.94, x + 0.16, 0.965, (240, 240, 220))


def _mountain(p: Painter, rng: np.random.Generator) -> None:
    _sky(p, rng, (110, 176, 236))
    base = rng.uniform(0.62, 0.7)
    side = rng.choice([-1.0, 1.0])
    peaks = [(0.5 + side * 0.3, 0.2, 0.4, 0.82), (0.5 - side * rng.uniform(0.05, 0.2), 0.03, 0.52, 1.0)]
    for x, top, half, tone in peaks:
        rock = shade(jitter_rgb((122, 118, 132), rng), tone)
        height = base - top
        p.polygon([(x - half, base + 0.02), (x, top), (x + half, base + 0.02)], rock)
        p.polygon([(x, top), (x + half, base + 0.02), (x + half * 0.1, base + 0.02)], shade(rock, 0.78))
        cap = 0.42
        zigzag = [
            (x + half * cap * k, top + height * (cap + (0.1 if i % 2 else -0.03))) for i, k in enumerate((1, 0.5, 0, -0.5, -1))
        ]
        zigzag[0], zigzag[-1] = (x + half * cap, top + height * cap), (x - half * cap, top + height * cap)
        p.polygon([(x, top), *zigzag], (250, 252, 255))
    p.rect(0, base + 0.02, 1, 1, jitter_rgb((104, 158, 84), rng))


def _cactus(p: Painter, x: float, y: float, h: float) -> None:
    green = (52, 132, 62)
    p.rect(x - 0.035, y - h, x + 0.035, y, green, radius=0.035)
    for sign, level in ((-1, 0.45), (1, 0.6)):
        far = x + sign * 0.09
        p.rect(min(x, far), y - h * level - 0.02, max(x, far), y - h * level + 0.035, green)
        p.rect(far - 0.024, y - h * level - 0.12, far + 0.024, y - h * level + 0.035, green, radius=0.02)


def _desert(p: Painter, rng: np.random.Generator) -> None:
    _sky(p, rng, (252, 196, 110))
    p.ellipse(rng.uniform(0.3, 0.7), 0.15, 0.1, 0.1, (255, 250, 200))
    horizon = rng.uniform(0.42, 0.5)
    sand = jitter_rgb((222, 140, 62), rng)
    p.ellipse(0.15, horizon + 0.1, 0.45, 0.16, shade(sand, 0.85))
    p.ellipse(0.9, horizon + 0.12, 0.5, 0.2, shade(sand, 0.92))
    p.rect(0, horizon + 0.1, 1, 1, sand)
    for y in (0.72, 0.85, 0.97):
        x = rng.uniform(-0.2, 0.3)
        p.line([(x + k / 6, y + 0.015 * math.sin(k * 2.0)) for k in range(7)], shade(sand, 0.84), 0.022)
    _cactus(p, rng.uniform(0.08, 0.14), horizon + rng.uniform(0.16, 0.26), rng.uniform(0.3, 0.4))
    _cactus(p, rng.uniform(0.86, 0.92), horizon + rng.uniform(0.12, 0.26), rng.uniform(0.26, 0.4))


def _cobblestone(p: Painter, rng: np.random.Generator) -> None:
    wall = jitter_rgb((196, 120, 88), rng, 8)
    p.rect(0, 0, 1, 1, wall)
    for row, y in enumerate(np.arange(0, 0.3, 0.1)):
        p.rect(0, y, 1, y + 0.016, shade(wall, 1.35))
        for x in np.arange(0.05 + 0.13 * (row % 2), 1, 0.26):
            p.rect(x, y, x + 0.016, y + 0.1, shade(wall, 1.35))
    top = rng.uniform(0.24, 0.3)
    p.rect(0, top, 1, 1, (76, 76, 82))
    y, height, row = top + 0.015, 0.1, 0
    while y < 1:
        width = height * 1.5
        for x in np.arange(-width * (0.25 + 0.5 * (row % 2)), 1, width):
            grey = int(rng.integers(140, 190))
            p.rect(x, y, x + width - 0.026, y + height - 0.024, (grey, grey - 2, grey - 8), radius=height * 0.3)
        y, height, row = y + height, height * 1.14, row + 1


SCENE_PAINTERS: dict[str, Callable[[Painter, np.random.Generator], None]] = {
    "grass": _grass,
    "snow": _snow,
    "beach": _beach,
    "forest": _forest,
    "wooden floor": _wooden_floor,
    "pink fabric": _pink_fabric,
    "purple rug": _purple_rug,
    "blue house": _blue_house,
    "city": _city,
    "mountain": _mountain,
    "desert": _desert,
    "cobblestone street": _cobblestone,
}
