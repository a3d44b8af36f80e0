"""The prompts on which binding is judged, and what each asks for.

S1: two colours; S2: a learned breed and a colour; S3: S1 with one accessory; S4: S2 with an accessory on each; S5: one creature,
fully described (does a method do harm?). `development` prompts are for choosing settings, the 96 `test` prompts for one report;
no prompt is in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from miniature.captions import describe, with_article
from miniature.critters import Critter, held_out_breeds, random_critter
from miniature.words import ACCESSORIES, ACCESSORY_PHRASES, COLOURS, CONFUSING_PAIRS, SCENE_PHRASES, SCENES

SETS = ("S1", "S2", "S3", "S4", "S5")
SEED = 14  # of the order of prompts
TEST_PROMPTS = 96
DESCRIBED = ("colour", "pattern", "pattern_colour", "ears", "shape", "tail", "eyes")
OF_A_BREED = ("colour", "pattern", "ears", "shape")


@dataclass(frozen=True)
class Wanted:
    """One creature that a prompt asks for, as the judge reads it."""

    colour: str
    accessory: str | None = None
    breed: str | None = None  # its learned word is <breed>
    looks: tuple[tuple[str, str], ...] = ()  # (attribute, value) of what is scored besides the colour


@dataclass(frozen=True)
class Task:
    """A prompt, and what its picture's halves should show; S5's one creature has the square to itself."""

    prompt: str
    creatures: tuple[Wanted, ...]
    scene: str

    @property
    def unit(self) -> str:
        """The unit over which results are averaged first: a breed's prompts are not independent."""
        return self.creatures[0].breed or self.prompt


def tasks_of(name: str, split: str) -> list[Task]:
    """The prompts of one set, `test` or `development`."""
    tasks = all_tasks(name)
    return tasks[:TEST_PROMPTS] if split == "test" else tasks[TEST_PROMPTS:]


@lru_cache
def all_tasks(name: str) -> list[Task]:
    rng = np.random.default_rng([SEED, int(name[1])])
    if name == "S5":
        return [one_creature(random_critter(rng), SCENES[i % len(SCENES)]) for i in range(TEST_PROMPTS + 10)]
    if name in ("S1", "S3"):
        return [
            two_creatures(pair_of(pair, rng, worn=name == "S3"), SCENES[i % len(SCENES)]) for i, pair in enumerate(colour_pairs())
        ]
    # a breed's prompts, every twelfth one, go through the scenes
    return [
        two_creatures(with_breed(i % 12, rng, worn=name == "S4"), SCENES[(i + i // 12) % len(SCENES)])
        for i in range(TEST_PROMPTS + 12)
    ]


def colour_pairs() -> list[tuple[str, str]]:
    """All ordered pairs of colours that the classifier tells apart, in a fixed order."""
    pairs = [pair for pair in permutations(COLOURS, 2) if set(pair) not in CONFUSING_PAIRS]
    return [pairs[i] for i in np.random.default_rng(SEED).permutation(len(pairs))]


def looks_of(critter: Critter, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The visible attributes of a critter; the second colour of a plain one is not visible."""
    seen = [name for name in names if name != "pattern_colour" or critter.pattern != "plain"]
    return tuple((name, getattr(critter, name)) for name in seen)


def one_creature(critter: Critter, scene: str) -> Task:
    article, description = with_article(describe(critter)).split(" ", 1)
    marked = description.replace("critter", "critter*", 1)
    prompt = f"{article} [{marked}] {SCENE_PHRASES[scene][0]}"
    return Task(prompt, (Wanted(critter.colour, looks=looks_of(critter, DESCRIBED)),), scene)


def pair_of(colours: tuple[str, str], rng: np.random.Generator, worn: bool) -> tuple[Wanted, ...]:
    """Two colours; with `worn` an accessory on one of them."""
    accessory = str(rng.choice(ACCESSORIES[1:])) if worn else None
    on = int(rng.integers(2))
    return tuple(Wanted(colour, accessory if k == on else None) for k, colour in enumerate(colours))


def with_breed(k: int, rng: np.random.Generator, worn: bool) -> tuple[Wanted, ...]:
    """The k-th held-out breed and another colour; with `worn` an accessory on each."""
    breed = held_out_breeds()[k]
    own = breed.critter.colour
    colour = str(rng.choice([colour for colour in COLOURS if colour != own and {colour, own} not in CONFUSING_PAIRS]))
    first, second = (str(each) for each in rng.choice(ACCESSORIES[1:], 2, replace=False)) if worn else (None, None)
    return Wanted(own, first, breed.name, looks_of(breed.critter, OF_A_BREED)), Wanted(colour, second)


def two_creatures(creatures: tuple[Wanted, ...], scene: str) -> Task:
    groups = []
    for each in creatures:
        noun = f"<{each.breed}>" if each.breed else f"{each.colour} critter"
        article = "an" if noun[0] in "aeiou" else "a"
        wearing = f" {ACCESSORY_PHRASES[each.accessory][0]}" if each.accessory else ""
        groups.append(f"{article} [{noun}*{wearing}]")
    return Task(f"{' and '.join(groups)} {SCENE_PHRASES[scene][0]}", creatures, scene)
