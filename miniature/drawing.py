"""Draws a `SceneSpec`, anti-aliased, at any size: the scene, the critter in it, and what it wears."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from miniature.critters import Critter
from miniature.scenery import SCENE_PAINTERS, Painter, shade
from miniature.words import EYES, Rgb
from miniature.world import SceneSpec

SUPERSAMPLE = 4


@dataclass(frozen=True)
class Anatomy:
    """Where things sit on a shape, in its frame (feet at (0, 0), 1 = body height, y downwards)."""

    head: tuple[float, float, float, float]  # x, y, half width, half height of the head
    face: tuple[float, float, float]  # x and y between the eyes, half the distance between them
    eye: float  # radius of an eye
    body: tuple[float, float, float, float]  # x, y, half width, half height of the body
    neck: tuple[float, float, float]  # x, y, half width of a scarf
    shirt: tuple[float, float, float, float]  # x0, y0, x1, y1 of the part of the body that a shirt covers
    rump: tuple[float, float]  # where the tail begins
    feet: tuple[float, ...]  # x of each foot
    leg: float  # height at which the legs begin


ANATOMIES: dict[str, Anatomy] = {
    "chubby": Anatomy((0, -0.48, 0.46, 0.44), (0, -0.6, 0.17), 0.115, (0, -0.48, 0.46, 0.44), (0, -0.3, 0.44),
                      (-1, -0.36, 1, 0), (0.38, -0.28), (-0.2, 0.2), -0.1),
    "boxy": Anatomy((0, -0.5, 0.37, 0.44), (0, -0.66, 0.17), 0.115, (0, -0.5, 0.37, 0.44), (0, -0.36, 0.39),
                    (-1, -0.41, 1, 0), (0.34, -0.26), (-0.2, 0.2), -0.1),
    "tall": Anatomy((0, -0.74, 0.31, 0.27), (0, -0.75, 0.14), 0.105, (0, -0.3, 0.24, 0.3), (0, -0.47, 0.23),
                    (-1, -0.5, 1, -0.08), (0.18, -0.16), (-0.13, 0.13), -0.1),
    "stretched": Anatomy((-0.3, -0.66, 0.3, 0.27), (-0.33, -0.67, 0.135), 0.105, (0.14, -0.36, 0.52, 0.23),
                         (-0.25, -0.39, 0.24), (-0.12, -1, 0.42, -0.1), (0.6, -0.42),
                         (-0.26, -0.06, 0.34, 0.54), -0.3),
}  # fmt: skip
# Centres of the spots, in units of the half axes of the part that they cover.
SPOTS = ((-0.62, -0.42), (0.0, -0.78), (0.64, -0.36), (-0.8, 0.2), (-0.3, 0.42), (0.3, 0.24), (0.78, 0.3),
         (0.08, 0.84), (-0.5, 0.84), (0.56, 0.8))  # fmt: skip
OUTLINE = 0.032


def _outline(critter: Critter) -> Rgb:
    # A dark line would vanish on a black critter against a dark scene, so there it is lighter than the body.
    return (120, 120, 132) if critter.colour == "black" else shade(critter.body_rgb, 0.42)


def _part_mask(p: Painter, shape: str, part: tuple[float, float, float, float], grow: float = 0.0) -> Image.Image:
    """The silhouette of a body or head as an L image of the canvas size."""
    x, y, rx, ry = part
    mask = Image.new("L", (p.side, p.side))
    draw = ImageDraw.Draw(mask)
    box = p.box(x - rx - grow, y - ry - grow, x + rx + grow, y + ry + grow)
    if shape == "boxy":
        draw.rounded_rectangle(box, radius=(0.16 + grow) * p.unit * p.side, fill=255)
    else:
        draw.ellipse(box, fill=255)
    return mask


def _paint_pattern(p: Painter, critter: Critter, part: tuple[float, float, float, float], mask: Image.Image) -> None:
    """Paints the pattern of `critter` where `mask` allows it."""
    if critter.pattern == "plain":
        return
    x, y, rx, ry = part
    layer = Image.new("L", (p.side, p.side))
    draw = ImageDraw.Draw(layer)
    if critter.pattern == "spotted":
        # Spots have the same size everywhere, so that few fit on a small part and many on a large one.
        radius = 0.085
        spots = SPOTS if rx * ry > 0.1 else SPOTS[::2]
        for dx, dy in spots:
            draw.ellipse(p.box(x + dx * rx - radius, y + dy * ry - radius, x + dx * rx + radius, y + dy * ry + radius), fill=255)
    elif critter.pattern == "striped":
        step = 0.235
        for index in range(-3, 4):
            left = x + (index + 0.25) * step
            corners = [(left, y - ry), (left + 0.11, y - ry), (left + 0.11, y + ry), (left, y + ry)]
            draw.polygon([p.point(*corner) for corner in corners], fill=255)
    else:
        draw.ellipse(p.box(x - rx * 1.15, y - ry * 1.1, x - rx * 0.02, y + ry * 0.3), fill=255)
        draw.ellipse(p.box(x + rx * 0.12, y + ry * 0.05, x + rx * 1.2, y + ry * 1.2), fill=255)
    p.image.paste(critter.pattern_rgb, mask=ImageChops.multiply(layer, mask))


def _paint_part(p: Painter, critter: Critter, part: tuple[float, float, float, float]) -> Image.Image:
    """Outline, colour and pattern of one part; returns its mask."""
    mask = _part_mask(p, critter.shape, part)
    p.image.paste(_outline(critter), mask=_part_mask(p, critter.shape, part, OUTLINE))
    p.image.paste(critter.body_rgb, mask=mask)
    _paint_pattern(p, critter, part, mask)
    return mask


def _paint_tail(p: Painter, critter: Critter, anatomy: Anatomy) -> None:
    x, y = anatomy.rump
    dark, body = _outline(critter), critter.body_rgb
    if critter.tail == "bushy":
        for grow, fill in ((OUTLINE, dark), (0.0, body)):
            p.ellipse(x + 0.16, y - 0.12, 0.13 + grow, 0.24 + grow, fill)
        p.ellipse(x + 0.17, y - 0.25, 0.085, 0.1, critter.pattern_rgb if critter.pattern != "plain" else shade(body, 1.6))
    elif critter.tail == "thin":
        curve = [(x - 0.05, y + 0.05), (x + 0.12, y + 0.06), (x + 0.22, y - 0.04), (x + 0.2, y - 0.2), (x + 0.27, y - 0.32)]
        p.line(curve, dark, 0.12)
        p.line(curve, body, 0.065)
    elif critter.tail == "puffy":
        for grow, fill in ((OUTLINE, dark), (0.0, shade(body, 1.5))):
            p.ellipse(x + 0.07, y, 0.12 + grow, 0.12 + grow, fill)


def _paint_ears(p: Painter, critter: Critter, anatomy: Anatomy, front: bool) -> None:
    """Ears behind the head or, if floppy, in front of it."""
    if (critter.ears == "floppy") != front:
        return
    x, y, rx, ry = anatomy.head
    rx, dark, body = min(rx, 0.38), _outline(critter), critter.body_rgb
    inner = (255, 176, 176) if critter.colour != "pink" else (226, 96, 140)
    for side in (-1, 1):
        if critter.ears == "pointed":
            base, top = y - ry * 0.5, y - ry - 0.22
            outer = [(x + side * rx * 0.18, base), (x + side * rx * 1.05, base + 0.06), (x + side * rx * 0.98, top)]
            p.polygon(outer, body)
            p.line([outer[0], outer[2], outer[1]], dark, OUTLINE)
            p.polygon([(x + side * rx * 0.5, base), (x + side * rx * 0.9, base), (x + side * rx * 0.88, top + 0.1)], inner)
        elif critter.ears == "round":
            for radius, fill in ((0.17 + OUTLINE, dark), (0.17, body), (0.095, inner)):
                p.ellipse(x + side * rx * 0.86, y - ry * 0.86, radius, radius, fill)
        elif critter.ears == "long":
            for grow, fill in ((OUTLINE, dark), (0.0, body), (-0.045, inner)):
                p.ellipse(x + side * rx * 0.56, y - ry - 0.14, 0.095 + grow, 0.27 + grow, fill)
        else:
            for grow, fill in ((OUTLINE, dark), (0.0, shade(body, 0.8) if critter.colour != "black" else shade(body, 1.15))):
                p.ellipse(x + side * rx * 1.1, y - ry * 0.25, 0.105 + grow, 0.23 + grow, fill)


def _paint_face(p: Painter, critter: Critter, anatomy: Anatomy, accessory: str) -> None:
    x, y, gap = anatomy.face
    r = anatomy.eye
    iris = EYES[critter.eyes]
    for side in (-1, 1):
        eye = x + side * gap
        p.ellipse(eye, y, r + 0.02, r + 0.02, (30, 30, 34))
        p.ellipse(eye, y, r, r, (255, 255, 255))
        p.ellipse(eye, y + 0.01, r * 0.76, r * 0.76, iris)
        if critter.eyes != "black":
            p.ellipse(eye, y + 0.01, r * 0.34, r * 0.34, (10, 10, 14))
        p.ellipse(eye - 0.03, y - 0.035, r * 0.26, r * 0.26, (255, 255, 255))
    dark = (40, 24, 28) if critter.colour not in ("black", "brown") else (250, 170, 170)
    p.ellipse(x, y + r + 0.025, 0.045, 0.032, dark)
    if accessory == "pink glasses":
        frame = (255, 20, 147)
        for side in (-1, 1):
            eye = x + side * gap
            p.draw.ellipse(
                p.box(eye - gap * 1.12, y - gap * 1.05, eye + gap * 1.12, y + gap * 1.05), outline=frame, width=p.width(0.062)
            )
        p.line([(x - gap * 2.6, y - 0.04), (x - gap * 2, y - 0.01)], frame, 0.05)
        p.line([(x + gap * 2.6, y - 0.04), (x + gap * 2, y - 0.01)], frame, 0.05)


def _paint_hat(p: Painter, anatomy: Anatomy, accessory: str) -> None:
    x, y, _, ry = anatomy.head
    top, half = y - ry, 0.2
    if accessory == "red hat":
        for grow, fill in ((0.028, (70, 0, 0)), (0.0, (228, 20, 30))):
            p.rect(x - half - grow, top - 0.22 - grow, x + half + grow, top + 0.07, fill, radius=0.07)
        p.rect(x - half, top - 0.03, x + half, top + 0.035, (40, 10, 14))
        for grow, fill in ((0.028, (70, 0, 0)), (0.0, (228, 20, 30))):
            p.ellipse(x, top + 0.075, 0.34 + grow, 0.058 + grow, fill)
    elif accessory == "santa hat":
        cone = [(x - 0.25, top + 0.06), (x + 0.25, top + 0.06), (x + 0.26, top - 0.18), (x + 0.1, top - 0.3)]
        p.polygon(cone, (220, 16, 28))
        p.line([*cone, cone[0]], (90, 0, 6), 0.025)
        for grow, fill in ((0.024, (120, 120, 130)), (0.0, (255, 255, 255))):
            p.rect(x - 0.3 - grow, top - grow, x + 0.3 + grow, top + 0.1 + grow, fill, radius=0.05)
            p.ellipse(x + 0.33, top - 0.13, 0.085 + grow, 0.085 + grow, fill)


RAINBOW: tuple[Rgb, ...] = ((228, 30, 40), (255, 140, 10), (255, 232, 40), (40, 180, 70), (40, 110, 230), (150, 50, 190))


def _paint_scarf(p: Painter, anatomy: Anatomy) -> None:
    x, y, half = anatomy.neck
    p.rect(x - half - 0.03, y - 0.08, x + half + 0.03, y + 0.1, (40, 30, 40), radius=0.07)
    step = 2 * half / 6
    for index, colour in enumerate(RAINBOW):
        p.rect(x - half + index * step, y - 0.055, x - half + (index + 1) * step, y + 0.075, colour)
    left = x + half * 0.25
    p.rect(left - 0.025, y + 0.06, left + 0.185, y + 0.345, (40, 30, 40), radius=0.03)
    for index, colour in enumerate(RAINBOW):
        p.rect(left, y + 0.08 + index * 0.04, left + 0.16, y + 0.12 + index * 0.04, colour)


def _paint_shirt(p: Painter, anatomy: Anatomy, body_mask: Image.Image) -> None:
    area = Image.new("L", (p.side, p.side))
    ImageDraw.Draw(area).rectangle(p.box(*anatomy.shirt), fill=255)
    p.image.paste((255, 214, 0), mask=ImageChops.multiply(area, body_mask))
    x0, y0, x1, _ = anatomy.shirt
    middle = (x0 + x1) / 2
    y0 = max(y0, anatomy.body[1] - anatomy.body[3])
    edge = (176, 120, 0)
    if x0 > -0.9:
        for x in (x0, x1):
            p.rect(x - 0.018, y0 + 0.03, x + 0.018, anatomy.shirt[3] - 0.05, edge)
    else:
        half = anatomy.body[2] * 0.9
        p.rect(-half, y0 - 0.018, half, y0 + 0.018, edge)
    for y in (y0 + 0.11, y0 + 0.22):
        p.ellipse(middle, y, 0.028, 0.028, edge)


def _paint_legs(p: Painter, critter: Critter, anatomy: Anatomy) -> None:
    dark = _outline(critter)
    width = 0.085 if critter.shape == "stretched" else 0.11
    for grow, fill in ((OUTLINE, dark), (0.0, critter.body_rgb)):
        for x in anatomy.feet:
            p.rect(x - width - grow, anatomy.leg, x + width + grow, 0.02 + grow, fill, radius=0.07)


def _paint_critter(p: Painter, spec: SceneSpec) -> None:
    critter, anatomy = spec.critter, ANATOMIES[spec.critter.shape]
    p.frame(spec.x, spec.y, spec.scale, spec.flip)
    shadow = Image.new("L", (p.side, p.side))
    ImageDraw.Draw(shadow).ellipse(p.box(-0.5, -0.06, 0.5, 0.09), fill=70)
    p.image.paste((0, 0, 0), mask=shadow)
    _paint_tail(p, critter, anatomy)
    merged = anatomy.head == anatomy.body
    if merged:
        _paint_ears(p, critter, anatomy, front=False)
    _paint_legs(p, critter, anatomy)
    body_mask = _paint_part(p, critter, anatomy.body)
    if spec.accessory == "yellow shirt":
        _paint_shirt(p, anatomy, body_mask)
    if not merged:
        _paint_ears(p, critter, anatomy, front=False)
        _paint_part(p, critter, anatomy.head)
    _paint_ears(p, critter, anatomy, front=True)
    if spec.accessory == "rainbow scarf":
        _paint_scarf(p, anatomy)
    _paint_face(p, critter, anatomy, spec.accessory)
    _paint_hat(p, anatomy, spec.accessory)


def render(spec: SceneSpec, size: int = 64) -> Image.Image:
    """Draws `spec` as an RGB image of `size` x `size` pixels. The same spec gives the same picture."""
    painter = Painter(size * SUPERSAMPLE)
    SCENE_PAINTERS[spec.scene](painter, np.random.default_rng(spec.seed))
    _paint_critter(painter, spec)
    return painter.image.reduce(SUPERSAMPLE)
