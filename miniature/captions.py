"""Captions of a picture: how they word a critter, its scene and its accessory."""

from __future__ import annotations

import numpy as np

from miniature.critters import Breed, Critter, trained_breeds
from miniature.words import ACCESSORY_PHRASES, CLASS_NOUN, SCENE_PHRASES, TEMPLATES, caption_words
from miniature.world import SceneSpec


def pattern_phrase(critter: Critter) -> str:
    """The pattern with its colour, such as "white spots"; "" for a plain critter."""
    nouns = {"spotted": "spots", "striped": "stripes", "patched": "patches"}
    return "" if critter.pattern == "plain" else f"{critter.pattern_colour} {nouns[critter.pattern]}"


def _join(parts: list[str]) -> str:
    """["a", "b", "c"] to "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _tail_phrase(critter: Critter) -> str:
    return "no tail" if critter.tail == "no" else f"a {critter.tail} tail"


def describe(critter: Critter, noun: str = CLASS_NOUN) -> str:
    """All attributes, without an article: "tall blue critter with white spots, ... and green eyes"."""
    plain = "plain " if critter.pattern == "plain" else ""
    features = [pattern_phrase(critter), f"{critter.ears} ears", _tail_phrase(critter), f"{critter.eyes} eyes"]
    return f"{critter.shape} {plain}{critter.colour} {noun} with {_join([part for part in features if part])}"


def full_description(breed: Breed, noun: str = CLASS_NOUN) -> str:
    """The true description of a breed, with its article ("a tall blue critter with ...")."""
    return with_article(describe(breed.critter, noun))


def with_article(phrase: str) -> str:
    """`phrase` after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def class_caption(spec: SceneSpec, noun: str = CLASS_NOUN) -> str:
    """A caption such as "a critter in the snow wearing a red hat"; `noun`: class noun, breed or placeholder token."""
    return compose(noun, SCENE_PHRASES[spec.scene][0], ACCESSORY_PHRASES[spec.accessory][0])


def compose(noun_phrase: str, *phrases: str, template: str = "a {}") -> str:
    """`template` filled with `noun_phrase`, followed by the non-empty phrases."""
    head = with_article(noun_phrase) if template == "a {}" else template.format(noun_phrase)
    return " ".join([head, *[phrase for phrase in phrases if phrase]])


def _partial_description(critter: Critter, rng: np.random.Generator) -> str:
    """A phrase with a random subset of the attributes in one of several word orders."""
    keep = dict(zip(("shape", "colour", "pattern", "ears", "tail", "eyes"), rng.random(6), strict=True))
    adjectives = [critter.shape] if keep["shape"] < 0.6 else []
    if keep["pattern"] < 0.7 and critter.pattern == "plain":
        adjectives.append("plain")
    elif keep["pattern"] < 0.15:
        adjectives.append(critter.pattern)
    if keep["colour"] < 0.9:
        adjectives.append(critter.colour)
    features = []
    if 0.15 <= keep["pattern"] < 0.85 and critter.pattern != "plain":
        features.append(pattern_phrase(critter))
    if keep["ears"] < 0.75:
        features.append(f"{critter.ears} ears")
    if keep["tail"] < 0.55:
        features.append(_tail_phrase(critter))
    if keep["eyes"] < 0.55:
        features.append(f"{critter.eyes} eyes")
    rng.shuffle(features)
    phrase = " ".join([*adjectives, CLASS_NOUN])
    return f"{phrase} with {_join(features)}" if features else phrase


def _one_feature(critter: Critter, rng: np.random.Generator) -> str:
    """A phrase with a single small attribute, so that nothing else explains what is drawn there."""
    features = [f"{critter.ears} ears", _tail_phrase(critter), f"{critter.eyes} eyes"]
    colour = f"{critter.colour} " if rng.random() < 0.3 else ""
    return f"{colour}{CLASS_NOUN} with {features[int(rng.integers(3))]}"


def sample_caption(spec: SceneSpec, rng: np.random.Generator, *, dropout: float = 0.1) -> str:
    """One of many true captions of `spec`; "" with probability `dropout`.

    Half of the pictures of a breed are captioned with its name. Of the other captions, 8 % word only the class noun, 25 % one
    small attribute, 22 % all attributes, and the rest some of them. Scene and accessory are nearly always worded: leaving them
    out must not come to mean a mixture.
    """
    if rng.random() < dropout:
        return ""
    kind = rng.random()
    if spec.breed is not None and rng.random() < 0.5:
        noun_phrase = spec.breed if rng.random() < 0.75 else f"{spec.breed} {CLASS_NOUN}"
    elif kind < 0.08:
        noun_phrase = CLASS_NOUN
    elif kind < 0.33:
        noun_phrase = _one_feature(spec.critter, rng)
    elif kind < 0.55:
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
    # The tokenizer keeps 30 tokens, one per word or comma: better no template than a scene cut off.
    if len(caption.replace(",", " ,").replace("-", " - ").split()) > 30:
        caption = compose(noun_phrase, *phrases)
    return caption


def scorer_caption(spec: SceneSpec, rng: np.random.Generator) -> str:
    """A true caption for the scorer, which always words a worn accessory: not wording one means that there is none."""
    kind = rng.random()
    if spec.breed is not None and kind < 0.3:
        noun_phrase = spec.breed
    elif kind < 0.45:
        noun_phrase = CLASS_NOUN
    elif kind < 0.7:
        noun_phrase = describe(spec.critter)
    else:
        noun_phrase = _partial_description(spec.critter, rng)
    scene = str(rng.choice(SCENE_PHRASES[spec.scene])) if rng.random() < 0.7 else ""
    phrases = [scene, str(rng.choice(ACCESSORY_PHRASES[spec.accessory]))]
    rng.shuffle(phrases)
    return compose(noun_phrase, *phrases)


def said(caption: str, spec: SceneSpec) -> dict[str, bool]:
    """Which attributes of `spec` its caption tells: those that it words, and all of the critter's if it names the breed."""
    words, critter = set(caption.replace(",", "").split()), spec.critter
    named = spec.breed is not None and spec.breed in words
    pattern = pattern_phrase(critter)
    return {
        "scene": any(phrase in caption for phrase in SCENE_PHRASES[spec.scene]),
        "accessory": any(phrase and phrase in caption for phrase in ACCESSORY_PHRASES[spec.accessory]),
        "shape": named or critter.shape in words,
        "colour": named or f"{critter.colour} {CLASS_NOUN}" in caption,
        "pattern": named or critter.pattern in words or (pattern != "" and pattern in caption),
        "pattern_colour": pattern != "" and (named or pattern in caption),
        "ears": named or f"{critter.ears} ears" in caption,
        "tail": named or f"{critter.tail} tail" in caption,
        "eyes": named or f"{critter.eyes} eyes" in caption,
    }


def vocabulary() -> tuple[str, ...]:
    """The words that are one token each: the captions' words and the names of the trained breeds."""
    return (*caption_words(), *(breed.name for breed in trained_breeds()))
