"""A procedural world of cartoon animals ("critters"), for training the miniature model: what a picture shows.

A picture is described by a `SceneSpec`: one `Critter` (shape, colour, pattern, ears, tail, eyes) in one of
12 scenes, with one of 5 accessories or none. `drawing.render(spec, size)` draws it: the same spec always gives
the same picture. `captions.sample_caption` words it in many ways.

    import numpy as np
    from miniature.captions import class_caption, full_description
    from miniature.critters import held_out_breeds
    from miniature.drawing import render
    from miniature.world import scene_spec
    breed = held_out_breeds()[0]
    spec = scene_spec(breed, scene="snow", accessory="red hat", rng=np.random.default_rng(0))
    image = render(spec, size=256)
    print(full_description(breed), "|", class_caption(spec))
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from miniature.critters import Breed, Critter, all_breeds, random_critter, trained_breeds
from miniature.words import ACCESSORIES, COLOURS, EARS, EYES, PATTERNS, SCENES, SHAPES, TAILS

# The attributes in which pictures can differ, with their values.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "scene": SCENES,
    "accessory": ACCESSORIES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "shape": SHAPES,
    "ears": EARS,
    "tail": TAILS,
    "eyes": tuple(EYES),
}


@dataclass(frozen=True)
class SceneSpec:
    """A whole picture: `x`, `y` of the feet and `scale` (body height) in image sides; `seed` for details."""

    critter: Critter
    scene: str
    accessory: str
    x: float
    y: float
    scale: float
    flip: bool
    seed: int
    breed: str | None = None


def scene_spec(critter: Critter | Breed, scene: str, accessory: str = "nothing", *, rng: np.random.Generator) -> SceneSpec:
    """`critter` (or a breed's) in `scene` with `accessory`; place, size and small variations from `rng`."""
    if scene not in SCENES:
        raise ValueError(f"unknown scene {scene!r}; one of {SCENES}")
    if accessory not in ACCESSORIES:
        raise ValueError(f"unknown accessory {accessory!r}; one of {ACCESSORIES}")
    breed_name = critter.name if isinstance(critter, Breed) else None
    body = critter.critter if isinstance(critter, Breed) else critter
    # A stretched critter is wider than the others: smaller and centred, its head and tail stay inside.
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
    """A random picture. `breed_share`: the probability of a breed; `held_out`: whether held-out breeds may appear."""
    breeds = all_breeds() if held_out else trained_breeds()
    critter: Critter | Breed
    if rng.random() < breed_share:
        critter = breeds[int(rng.integers(len(breeds)))]
    else:
        critter = random_critter(rng)
    scene = str(rng.choice(SCENES))
    accessory = "nothing" if rng.random() < 0.35 else str(rng.choice(ACCESSORIES[1:]))
    return scene_spec(critter, scene, accessory, rng=rng)


def swapped(spec: SceneSpec, rng: np.random.Generator, name: str | None = None) -> SceneSpec:
    """`spec` with another value of attribute `name` (None: a random one), all else the same. A changed critter is of no breed."""
    name = str(rng.choice(list(ATTRIBUTES))) if name is None else name
    owner = spec if name in ("scene", "accessory") else spec.critter
    value = str(rng.choice([value for value in ATTRIBUTES[name] if value != getattr(owner, name)]))
    if owner is spec:
        return dataclasses.replace(spec, **{name: value})
    colour = {"body_rgb": COLOURS[value]} if name == "colour" else {}
    return dataclasses.replace(spec, critter=dataclasses.replace(spec.critter, **{name: value}, **colour), breed=None)
