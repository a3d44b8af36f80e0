"""Prompts with the pictures that they describe, on which the miniature is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miniature.captions import class_caption, describe, pattern_phrase
from miniature.critters import Breed, Critter, held_out_breeds, random_critter, trained_breeds
from miniature.words import ACCESSORIES, CLASS_NOUN, SCENES
from miniature.world import SceneSpec, scene_spec

TEST_SEED = 23


@dataclass(frozen=True)
class Prompt:
    """A prompt and the picture that it describes."""

    text: str
    spec: SceneSpec


def test_spec(subject: Critter | Breed, index: int, rng: np.random.Generator) -> SceneSpec:
    """Scenes and accessories in turn, so that each is asked for equally often."""
    scene = SCENES[index % len(SCENES)]
    accessory = ACCESSORIES[(index + index // len(SCENES)) % len(ACCESSORIES)]
    return scene_spec(subject, scene, accessory, rng=rng)


def description_prompts(count: int) -> list[Prompt]:
    """Prompts such as "a tall blue critter with white spots and floppy ears in the snow wearing a red hat".

    The critters are of no breed. The judged attributes are worded; tail and eyes are not.
    """
    rng = np.random.default_rng([TEST_SEED, 0])
    specs = [test_spec(random_critter(rng), index, rng) for index in range(count)]
    return [Prompt(class_caption(spec, judged_description(spec.critter)), spec) for spec in specs]


def judged_description(critter: Critter) -> str:
    """Shape, colour, pattern and ears of a critter, without an article."""
    if critter.pattern == "plain":
        return f"{critter.shape} plain {critter.colour} {CLASS_NOUN} with {critter.ears} ears"
    return f"{critter.shape} {critter.colour} {CLASS_NOUN} with {pattern_phrase(critter)} and {critter.ears} ears"


def whole_description_prompts(count: int) -> list[Prompt]:
    """Like `description_prompts`, with other critters and all attributes worded."""
    rng = np.random.default_rng([TEST_SEED, 4])
    specs = [test_spec(random_critter(rng), index, rng) for index in range(count)]
    return [Prompt(class_caption(spec, describe(spec.critter)), spec) for spec in specs]


def breed_prompts(count: int) -> list[Prompt]:
    """Prompts such as "a bofdun on the beach wearing pink glasses", for the trained breeds in turn."""
    rng = np.random.default_rng([TEST_SEED, 1])
    breeds = trained_breeds()
    specs = [test_spec(breeds[index % len(breeds)], index, rng) for index in range(count)]
    return [Prompt(class_caption(spec, str(spec.breed)), spec) for spec in specs]


def held_out_prompts() -> list[Prompt]:
    """Every held-out breed by its full description, in 4 scenes."""
    rng = np.random.default_rng([TEST_SEED, 2])
    specs = [test_spec(breed, 5 * index + 3 * turn, rng) for index, breed in enumerate(held_out_breeds())
             for turn in range(4)]  # fmt: skip
    return [Prompt(class_caption(spec, describe(spec.critter)), spec) for spec in specs]
