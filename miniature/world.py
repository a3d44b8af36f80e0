"""A procedural world of cartoon animals ("critters") with captions, for training the miniature model.

A picture is described by a `SceneSpec`: one `Critter` (shape, colour, pattern, ears, tail, eyes) in one of
12 scenes, with one of 5 accessories or none. `render(spec, size)` draws it, anti-aliased, at any size; the
same spec always gives the same picture. `sample_caption` words it in many ways.

About 250 invented breed names each mean one fixed critter. Twelve breeds are held out of all diffusion
training, pictures and names: they are the subjects to personalise.

    from miniature.world import held_out_breeds, scene_spec, render, full_description, class_caption
    breed = held_out_breeds()[0]
    spec = scene_spec(breed.critter, scene="snow", accessory="red hat", rng=np.random.default_rng(0))
    image = render(spec, size=256)
    print(full_description(breed), "|", class_caption(spec))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

Rgb = tuple[int, int, int]

CLASS_NOUN = "critter"
SUPERSAMPLE = 4
BREED_COUNT = 252
HELD_OUT_COUNT = 12
# One number fixes the breeds. Changing it changes what every name means: the model must then be retrained.
BREED_SEED = 20240

SHAPES = ("chubby", "boxy", "tall", "stretched")
COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (246, 132, 24),
    "yellow": (250, 216, 48),
    "green": (58, 168, 66),
    "blue": (46, 96, 222),
    "purple": (134, 58, 188),
    "pink": (252, 150, 192),
    "brown": (126, 76, 40),
    "grey": (142, 144, 150),
    "white": (245, 245, 242),
    "black": (44, 44, 50),
}
# Far apart in RGB, yet hard to tell apart as a pattern and its ground at 64 px.
CONFUSING_PAIRS = ({"red", "purple"}, {"grey", "black"})
PATTERNS = ("plain", "spotted", "striped", "patched")
EARS = ("pointed", "floppy", "round", "long")
TAILS = ("no", "bushy", "thin", "puffy")
EYES: dict[str, Rgb] = {
    "black": (24, 24, 28),
    "blue": (40, 130, 255),
    "green": (30, 190, 70),
    "amber": (255, 150, 0),
}
ACCESSORIES = ("nothing", "red hat", "santa hat", "rainbow scarf", "pink glasses", "yellow shirt")
SCENE_PHRASES: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "in the grass", "on green grass"),
    "snow": ("in the snow",),
    "beach": ("on the beach", "on a beach"),
    "forest": ("in the forest", "in a forest", "in the jungle"),
    "wooden floor": ("on top of a wooden floor", "on a wooden floor"),
    "pink fabric": ("on top of pink fabric", "on pink fabric"),
    "purple rug": ("on top of a purple rug", "on a purple rug"),
    "blue house": ("with a blue house in the background",),
    "city": (
        "with a city at night in the background",
        "with a city in the background",
        "in the city at night",
    ),
    "mountain": ("with a mountain in the background",),
    "desert": ("in the desert",),
    "cobblestone street": ("on a cobblestone street", "on top of a cobblestone street"),
}
SCENES = tuple(SCENE_PHRASES)
ACCESSORY_PHRASES: dict[str, tuple[str, ...]] = {
    "nothing": ("",),
    "red hat": ("wearing a red hat", "with a red hat"),
    "santa hat": ("wearing a santa hat", "with a santa hat"),
    "rainbow scarf": ("wearing a rainbow scarf", "with a rainbow scarf"),
    "pink glasses": ("wearing pink glasses", "with pink glasses"),
    "yellow shirt": ("wearing a yellow shirt", "in a yellow shirt"),
}
# The object templates of textual inversion (Gal et al. 2022), so that the words of its prompts are known.
TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
    "a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}",
    "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}",
    "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}",
    "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}",
    "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}", "a picture of a {}",
    "an image of a {}",
)  # fmt: skip


@dataclass(frozen=True)
class Critter:
    """One animal. `body_rgb` and `pattern_rgb` are the exact colours that the two names stand for."""

    shape: str
    colour: str
    body_rgb: Rgb
    pattern: str
    pattern_colour: str
    pattern_rgb: Rgb
    ears: str
    tail: str
    eyes: str

    def main_attributes(self) -> tuple[str, str, str, str, str]:
        """What must not coincide between a held-out breed and anything trained."""
        pattern_colour = "" if self.pattern == "plain" else self.pattern_colour
        return (self.shape, self.colour, self.pattern, pattern_colour, self.ears)


@dataclass(frozen=True)
class Breed:
    """A name that means exactly one critter."""

    name: str
    critter: Critter
    held_out: bool


@dataclass(frozen=True)
class SceneSpec:
    """A whole picture: `x`, `y` of the feet and `scale` (body height) in image sides; `seed` of details."""

    critter: Critter
    scene: str
    accessory: str
    x: float
    y: float
    scale: float
    flip: bool
    seed: int
    breed: str | None = None


# --------------------------------------------------------------------------------------------------- sampling


def jitter_rgb(rgb: Rgb, rng: np.random.Generator, amount: int = 10) -> Rgb:
    """`rgb` with each channel moved by at most `amount`: small enough that its name stays unambiguous."""
    # White, grey and black take a third of it: more would give them a hue.
    amount = amount if max(rgb) - min(rgb) > 20 else amount // 3
    moved = np.clip(np.asarray(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(moved[0]), int(moved[1]), int(moved[2])


def _contrasting_colours(colour: str) -> list[str]:
    """Colours far enough from `colour` to be seen as a pattern on it at 64 px."""
    base = np.asarray(COLOURS[colour], float)
    return [
        name
        for name, rgb in COLOURS.items()
        if np.linalg.norm(base - rgb) > 160 and {colour, name} not in CONFUSING_PAIRS
    ]


def _draw_critter(rng: np.random.Generator) -> Critter:
    colour = str(rng.choice(list(COLOURS)))
    pattern_colour = str(rng.choice(_contrasting_colours(colour)))
    return Critter(
        shape=str(rng.choice(SHAPES)),
        colour=colour,
        body_rgb=jitter_rgb(COLOURS[colour], rng),
        pattern=str(rng.choice(PATTERNS)),
        pattern_colour=pattern_colour,
        pattern_rgb=jitter_rgb(COLOURS[pattern_colour], rng),
        ears=str(rng.choice(EARS)),
        tail=str(rng.choice(TAILS)),
        eyes=str(rng.choice(list(EYES))),
    )


def random_critter(rng: np.random.Generator) -> Critter:
    """A critter of no breed, never with the main attributes of a held-out breed."""
    forbidden = {breed.critter.main_attributes() for breed in held_out_breeds()}
    while True:
        critter = _draw_critter(rng)
        if critter.main_attributes() not in forbidden:
            return critter


def _breed_names(rng: np.random.Generator, count: int) -> list[str]:
    """`count` different two-syllable names, such as "bofdun", none of which is a word of the captions."""
    taken = set(caption_words())
    names: list[str] = []
    while len(names) < count:
        parts = [rng.choice(list("bdfgklmnprtvz")), rng.choice(list("aeiou")), rng.choice(list("lmnrkdfpx"))]
        parts += [rng.choice(list("bdfgkmptvz")), rng.choice(list("aeiou"))]
        if rng.random() < 0.5:
            parts.append(rng.choice(list("klmnrx")))
        name = "".join(str(part) for part in parts)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


def _held_out_critters(rng: np.random.Generator) -> list[Critter]:
    """Twelve critters that between them have every shape, pattern and kind of ears, and eleven colours."""
    critters = []
    for index in range(HELD_OUT_COUNT):
        wanted = (SHAPES[index % 4], list(COLOURS)[index % 11], PATTERNS[(index + index // 4 + 1) % 4],
                  EARS[(index * 3 + index // 4 + 2) % 4])  # fmt: skip
        while True:
            critter = _draw_critter(rng)
            if (critter.shape, critter.colour, critter.pattern, critter.ears) == wanted:
                critters.append(critter)
                break
    return critters


@lru_cache(maxsize=1)
def all_breeds() -> tuple[Breed, ...]:
    """Every breed, held-out ones last; their main attributes are all different."""
    rng = np.random.default_rng(BREED_SEED)
    total = BREED_COUNT + HELD_OUT_COUNT
    held_out = {critter.main_attributes(): critter for critter in _held_out_critters(rng)}
    trained: dict[tuple[str, ...], Critter] = {}
    while len(trained) < BREED_COUNT:
        critter = _draw_critter(rng)
        if critter.main_attributes() not in held_out:
            trained.setdefault(critter.main_attributes(), critter)
    names = _breed_names(rng, total)
    critters = [*trained.values(), *held_out.values()]
    return tuple(
        Breed(name, critter, held_out=index >= BREED_COUNT)
        for index, (name, critter) in enumerate(zip(names, critters, strict=True))
    )


@lru_cache(maxsize=1)
def held_out_breeds() -> tuple[Breed, ...]:
    """The 12 breeds of which the model has seen neither picture nor name."""
    return tuple(breed for breed in all_breeds() if breed.held_out)


@lru_cache(maxsize=1)
def trained_breeds() -> tuple[Breed, ...]:
    """The breeds whose names the model knows."""
    return tuple(breed for breed in all_breeds() if not breed.held_out)


def breed_by_name(name: str) -> Breed:
    """The breed called `name`; `ValueError` if there is none."""
    for breed in all_breeds():
        if breed.name == name:
            return breed
    raise ValueError(f"no breed is called {name!r}; all_breeds() lists them")


def scene_spec(
    critter: Critter | Breed,
    scene: str,
    accessory: str = "nothing",
    *,
    rng: np.random.Generator,
) -> SceneSpec:
    """`critter` (or a breed's) in `scene` with `accessory`; place, size and small variations from `rng`."""
    if scene not in SCENES:
        raise ValueError(f"unknown scene {scene!r}; one of {SCENES}")
    if accessory not in ACCESSORIES:
        raise ValueError(f"unknown accessory {accessory!r}; one of {ACCESSORIES}")
    breed_name = critter.name if isinstance(critter, Breed) else None
    body = critter.critter if isinstance(critter, Breed) else critter
    # A stretched critter is wider than the others: smaller and in the middle, its head and tail stay inside.
    wide = body.shape == "stretched"
    return SceneSpec(
        critter=body,
        scene=scene,
        accessory=accessory,
        x=float(rng.uniform(0.46, 0.54) if wide else rng.uniform(0.4, 0.6)),
        y=float(rng.uniform(0.9, 0.96)),
        scale=float(rng.uniform(0.48, 0.56) if wide else rng.uniform(0.52, 0.65)),
        flip=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
        breed=breed_name,
    )


def random_spec(rng: np.random.Generator, *, breed_share: float = 0.75, held_out: bool = False) -> SceneSpec:
    """A random picture. `breed_share`: how many show a breed; `held_out`: may held-out breeds appear."""
    breeds = all_breeds() if held_out else trained_breeds()
    critter: Critter | Breed
    if rng.random() < breed_share:
        critter = breeds[int(rng.integers(len(breeds)))]
    else:
        critter = random_critter(rng)
    scene = str(rng.choice(SCENES))
    accessory = "nothing" if rng.random() < 0.35 else str(rng.choice(ACCESSORIES[1:]))
    return scene_spec(critter, scene, accessory, rng=rng)


# --------------------------------------------------------------------------------------------------- captions


def _pattern_phrase(critter: Critter) -> str:
    nouns = {"plain": "", "spotted": "spots", "striped": "stripes", "patched": "patches"}
    return f"{critter.pattern_colour} {nouns[critter.pattern]}" if critter.pattern != "plain" else ""


def _join(parts: list[str]) -> str:
    """["a", "b", "c"] to "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _tail_phrase(critter: Critter) -> str:
    return "no tail" if critter.tail == "no" else f"a {critter.tail} tail"


def describe(critter: Critter, noun: str = CLASS_NOUN) -> str:
    """All attributes, without an article: "tall blue critter with white spots, ... and green eyes"."""
    plain = "plain " if critter.pattern == "plain" else ""
    features = [
        _pattern_phrase(critter),
        f"{critter.ears} ears",
        _tail_phrase(critter),
        f"{critter.eyes} eyes",
    ]
    return f"{critter.shape} {plain}{critter.colour} {noun} with {_join([part for part in features if part])}"


def full_description(breed: Breed, noun: str = CLASS_NOUN) -> str:
    """The true descriptive phrase of a breed, with its article ("a tall blue critter with ...")."""
    return with_article(describe(breed.critter, noun))


def with_article(phrase: str) -> str:
    """`phrase` after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def class_caption(spec: SceneSpec, noun: str = CLASS_NOUN) -> str:
    """Such as "a critter in the snow wearing a red hat"; `noun`: class noun, breed or placeholder token."""
    return compose(noun, SCENE_PHRASES[spec.scene][0], ACCESSORY_PHRASES[spec.accessory][0])


def compose(noun_phrase: str, *phrases: str, template: str = "a {}") -> str:
    """`template` filled with `noun_phrase`, then the phrases that are not empty."""
    head = with_article(noun_phrase) if template == "a {}" else template.format(noun_phrase)
    return " ".join([head, *[phrase for phrase in phrases if phrase]])


def _partial_description(critter: Critter, rng: np.random.Generator) -> str:
    """A phrase with a random subset of the attributes in one of several word orders."""
    keep = dict(zip(("shape", "colour", "pattern", "ears", "tail", "eyes"), rng.random(6), strict=True))
    adjectives = [critter.shape] if keep["shape"] < 0.5 else []
    if keep["pattern"] < 0.7 and critter.pattern == "plain":
        adjectives.append("plain")
    elif keep["pattern"] < 0.15:
        adjectives.append(critter.pattern)
    if keep["colour"] < 0.9:
        adjectives.append(critter.colour)
    features = []
    if 0.15 <= keep["pattern"] < 0.85 and critter.pattern != "plain":
        features.append(_pattern_phrase(critter))
    if keep["ears"] < 0.6:
        features.append(f"{critter.ears} ears")
    if keep["tail"] < 0.3:
        features.append(_tail_phrase(critter))
    if keep["eyes"] < 0.4:
        features.append(f"{critter.eyes} eyes")
    rng.shuffle(features)
    phrase = " ".join([*adjectives, CLASS_NOUN])
    return f"{phrase} with {_join(features)}" if features else phrase


def sample_caption(spec: SceneSpec, rng: np.random.Generator, *, dropout: float = 0.1) -> str:
    """One of many true captions of `spec`; "" with probability `dropout`.

    A picture of a breed names it four times in five: with `random_spec`'s 75 % of breeds, 60 % of all
    captions. Scene and accessory are worded nearly always: leaving them out shall not come to mean a mixture.
    """
    if rng.random() < dropout:
        return ""
    kind = rng.random()
    if spec.breed is not None and kind < 0.8:
        noun_phrase = spec.breed if rng.random() < 0.75 else f"{spec.breed} {CLASS_NOUN}"
    elif kind > 0.94:
        noun_phrase = CLASS_NOUN
    elif kind > 0.86:
        noun_phrase = describe(spec.critter)
    else:
        noun_phrase = _partial_description(spec.critter, rng)
    phrases = []
    if rng.random() < 0.93:
        phrases.append(str(rng.choice(SCENE_PHRASES[spec.scene])))
    if rng.random() < 0.95:
        phrases.append(str(rng.choice(ACCESSORY_PHRASES[spec.accessory])))
    rng.shuffle(phrases)
    template = "a {}" if rng.random() < 0.45 else str(rng.choice(TEMPLATES))
    caption = compose(noun_phrase, *phrases, template=template)
    # The tokenizer keeps 30 tokens, a word or comma each: rather no template than a scene cut off.
    if len(caption.replace(",", " ,").replace("-", " - ").split()) > 30:
        caption = compose(noun_phrase, *phrases)
    return caption


@lru_cache(maxsize=1)
def caption_words() -> tuple[str, ...]:
    """Every word that captions use, breed names excepted, sorted."""
    texts = [phrase for phrases in SCENE_PHRASES.values() for phrase in phrases]
    texts += [phrase for phrases in ACCESSORY_PHRASES.values() for phrase in phrases]
    texts += [template.replace("{}", " ") for template in TEMPLATES]
    texts += [*SHAPES, *COLOURS, *PATTERNS, *EARS, *TAILS, *EYES, CLASS_NOUN]
    texts.append("spots stripes patches ears tail eyes and with critters an animal")
    return tuple(sorted({word for text in texts for word in text.replace("-", " ").split()}))


def vocabulary() -> tuple[str, ...]:
    """The words that are one token each: those of the captions and the names of the trained breeds."""
    return (*caption_words(), *(breed.name for breed in trained_breeds()))


# ---------------------------------------------------------------------------------------------------- drawing


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
        """Later coordinates are relative to (x, y), in `unit`s, mirrored if `flip`."""
        self.origin, self.unit, self.sign = (x, y), unit, -1.0 if flip else 1.0

    def point(self, x: float, y: float) -> tuple[float, float]:
        return (
            (self.origin[0] + self.sign * x * self.unit) * self.side,
            (self.origin[1] + y * self.unit) * self.side,
        )

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
        self.draw.line(
            [self.point(*point) for point in points], fill=fill, width=self.width(width), joint="curve"
        )


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
            p.polygon(
                [(x - half * 0.6, y + 0.02), (x + half * 0.6, y + 0.02), (x, y - 0.06)], (250, 252, 255)
            )
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
        p.ellipse(
            rng.random(), rng.uniform(-0.05, 0.16), rng.uniform(0.1, 0.16), rng.uniform(0.07, 0.12), green
        )
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
            (x + half * cap * k, top + height * (cap + (0.1 if i % 2 else -0.03)))
            for i, k in enumerate((1, 0.5, 0, -0.5, -1))
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
            p.rect(
                x, y, x + width - 0.026, y + height - 0.024, (grey, grey - 2, grey - 8), radius=height * 0.3
            )
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


@dataclass(frozen=True)
class Anatomy:
    """Where things sit on a shape, in its frame (feet at (0, 0), 1 = body height, y downwards)."""

    head: tuple[float, float, float, float]  # x, y, half width, half height of the head
    face: tuple[float, float, float]  # x and y between the eyes, half the distance of the eyes
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

# Where the pattern lies, in units of the half axes of the part that it covers.
SPOTS = ((-0.62, -0.42), (0.0, -0.78), (0.64, -0.36), (-0.8, 0.2), (-0.3, 0.42), (0.3, 0.24), (0.78, 0.3),
         (0.08, 0.84), (-0.5, 0.84), (0.56, 0.8))  # fmt: skip
OUTLINE = 0.032


def _outline(critter: Critter) -> Rgb:
    # A dark line would vanish on a black critter against a dark scene, so there it is lighter than the body.
    return (120, 120, 132) if critter.colour == "black" else shade(critter.body_rgb, 0.42)


def _part_mask(
    p: Painter, shape: str, part: tuple[float, float, float, float], grow: float = 0.0
) -> Image.Image:
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


def _paint_pattern(
    p: Painter, critter: Critter, part: tuple[float, float, float, float], mask: Image.Image
) -> None:
    """Paints the pattern of `critter` where `mask` allows it."""
    if critter.pattern == "plain":
        return
    x, y, rx, ry = part
    layer = Image.new("L", (p.side, p.side))
    draw = ImageDraw.Draw(layer)
    if critter.pattern == "spotted":
        # The same size of spot everywhere, so that few fit on a small part and many on a large one.
        radius = 0.085
        spots = SPOTS if rx * ry > 0.1 else SPOTS[::2]
        for dx, dy in spots:
            draw.ellipse(
                p.box(x + dx * rx - radius, y + dy * ry - radius, x + dx * rx + radius, y + dy * ry + radius),
                fill=255,
            )
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
        p.ellipse(
            x + 0.17,
            y - 0.25,
            0.085,
            0.1,
            critter.pattern_rgb if critter.pattern != "plain" else shade(body, 1.6),
        )
    elif critter.tail == "thin":
        curve = [
            (x - 0.05, y + 0.05),
            (x + 0.12, y + 0.06),
            (x + 0.22, y - 0.04),
            (x + 0.2, y - 0.2),
            (x + 0.27, y - 0.32),
        ]
        p.line(curve, dark, 0.12)
        p.line(curve, body, 0.065)
    elif critter.tail == "puffy":
        for grow, fill in ((OUTLINE, dark), (0.0, shade(body, 1.5))):
            p.ellipse(x + 0.07, y, 0.12 + grow, 0.12 + grow, fill)


def _paint_ears(p: Painter, critter: Critter, anatomy: Anatomy, front: bool) -> None:
    """Ears behind the head, or (floppy ones) before it."""
    if (critter.ears == "floppy") != front:
        return
    x, y, rx, ry = anatomy.head
    rx, dark, body = min(rx, 0.38), _outline(critter), critter.body_rgb
    inner = (255, 176, 176) if critter.colour != "pink" else (226, 96, 140)
    for side in (-1, 1):
        if critter.ears == "pointed":
            base, top = y - ry * 0.5, y - ry - 0.22
            outer = [
                (x + side * rx * 0.18, base),
                (x + side * rx * 1.05, base + 0.06),
                (x + side * rx * 0.98, top),
            ]
            p.polygon(outer, body)
            p.line([outer[0], outer[2], outer[1]], dark, OUTLINE)
            p.polygon(
                [(x + side * rx * 0.5, base), (x + side * rx * 0.9, base), (x + side * rx * 0.88, top + 0.1)],
                inner,
            )
        elif critter.ears == "round":
            for radius, fill in ((0.17 + OUTLINE, dark), (0.17, body), (0.095, inner)):
                p.ellipse(x + side * rx * 0.86, y - ry * 0.86, radius, radius, fill)
        elif critter.ears == "long":
            for grow, fill in ((OUTLINE, dark), (0.0, body), (-0.045, inner)):
                p.ellipse(x + side * rx * 0.56, y - ry - 0.14, 0.095 + grow, 0.27 + grow, fill)
        else:
            for grow, fill in (
                (OUTLINE, dark),
                (0.0, shade(body, 0.8) if critter.colour != "black" else shade(body, 1.15)),
            ):
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
                p.box(eye - gap * 1.12, y - gap * 1.05, eye + gap * 1.12, y + gap * 1.05),
                outline=frame,
                width=p.width(0.062),
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


RAINBOW: tuple[Rgb, ...] = (
    (228, 30, 40),
    (255, 140, 10),
    (255, 232, 40),
    (40, 180, 70),
    (40, 110, 230),
    (150, 50, 190),
)


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
