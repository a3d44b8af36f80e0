"""The animals of the miniature's world: critters, and the breeds that names stand for.

Twelve of the breeds are held out of all diffusion training, pictures and names: they are the subjects to personalise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from miniature.words import COLOURS, CONFUSING_PAIRS, EARS, EYES, PATTERNS, SHAPES, TAILS, Rgb, caption_words

BREED_COUNT = 252
HELD_OUT_COUNT = 12
# One number fixes the breeds. Changing it changes what every name means: the model must then be retrained.
BREED_SEED = 20240
SPARE_COUNT, SPARE_SEED = 6, 20241


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
        """The combination that a held-out breed must not share with anything trained."""
        pattern_colour = "" if self.pattern == "plain" else self.pattern_colour
        return (self.shape, self.colour, self.pattern, pattern_colour, self.ears)


@dataclass(frozen=True)
class Breed:
    """A name that means exactly one critter."""

    name: str
    critter: Critter
    held_out: bool


def jitter_rgb(rgb: Rgb, rng: np.random.Generator, amount: int = 10) -> Rgb:
    """`rgb` with each channel moved by at most `amount`: small enough that its name stays unambiguous."""
    # White, grey and black get a third of it: more would give them a hue.
    amount = amount if max(rgb) - min(rgb) > 20 else amount // 3
    moved = np.clip(np.asarray(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255)
    return int(moved[0]), int(moved[1]), int(moved[2])


def _contrasting_colours(colour: str) -> list[str]:
    """Colours far enough from `colour` to be seen as a pattern on it at 64 px."""
    base = np.asarray(COLOURS[colour], float)
    return [name for name, rgb in COLOURS.items() if np.linalg.norm(base - rgb) > 160 and {colour, name} not in CONFUSING_PAIRS]


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
    """Twelve critters that together cover every shape, pattern and kind of ears, and eleven colours."""
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


@lru_cache(maxsize=1)
def spare_breeds() -> tuple[Breed, ...]:
    """Six more, whose names no model has seen: for choosing settings, so that results on the held-out ones stay clean.

    Unlike the held-out ones, they may share their main attributes with training pictures.
    """
    rng = np.random.default_rng(SPARE_SEED)
    known = {breed.name for breed in all_breeds()}
    names = [name for name in _breed_names(rng, 2 * SPARE_COUNT) if name not in known][:SPARE_COUNT]
    return tuple(Breed(name, random_critter(rng), held_out=False) for name in names)


def breed_by_name(name: str) -> Breed:
    """The breed called `name`; `ValueError` if there is none."""
    for breed in (*all_breeds(), *spare_breeds()):
        if breed.name == name:
            return breed
    raise ValueError(f"no breed is called {name!r}; all_breeds() lists them")
