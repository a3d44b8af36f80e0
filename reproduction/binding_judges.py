"""What is read off a picture's halves, by the miniature's classifier and by a network that counts creatures; and the scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from miniature.classifier import AttributeClassifier, truth
from miniature.drawing import render
from miniature.words import ACCESSORIES
from miniature.world import SceneSpec, random_spec
from reproduction.binding_sets import SEED, Task
from reproduction.worlds import classifier, pixels_of
from zoodip.files import write_json

SIDE = 64  # of a half, and of what the judges read
COUNTS = {"count": ("0", "1", "2")}
EPOCHS = 8


# ----------------------------------------------------------------------------------------------------- renders to learn from


def pair_specs(rng: np.random.Generator) -> tuple[SceneSpec, SceneSpec]:
    """Two pictures whose scenes are the same in every detail."""
    first = random_spec(rng, held_out=True)
    return first, dataclasses.replace(random_spec(rng, held_out=True), scene=first.scene, seed=first.seed)


def counted_picture(index: int) -> tuple[Image.Image, int]:
    """Half of a wide render with 0 to 4 creatures, and how many of them have their middle in it; 2 stands for more.

    A scene beside its mirror image has no seam. Creatures are cut out of renders and put anywhere, over the middle too: so do
    pictures that are drawn have them, and one that is split in two has its middle in one half.
    """
    rng, creatures = np.random.default_rng([SEED, index]), index % 5
    first = random_spec(rng, held_out=True)
    scene = render(dataclasses.replace(first, x=-2.0), SIDE)  # the creature is outside
    wide = Image.new("RGB", (2 * SIDE, SIDE))
    wide.paste(scene, (0, 0))
    wide.paste(ImageOps.mirror(scene), (SIDE, 0))
    middles = middles_of(rng, creatures)
    for middle in middles:
        other = random_spec(rng, held_out=True)
        spec = dataclasses.replace(other, scene=first.scene, seed=first.seed, x=0.5, scale=float(rng.uniform(0.4, other.scale)))
        alone = render(spec, SIDE)
        cut = (np.asarray(alone) != np.asarray(scene)).any(2)
        wide.paste(alone, (middle - SIDE // 2, 0), Image.fromarray(cut))
    left = SIDE * int(rng.integers(2))
    return wide.crop((left, 0, left + SIDE, SIDE)), min(2, sum(left <= middle < left + SIDE for middle in middles))


def middles_of(rng: np.random.Generator, count: int, apart: int = 20) -> list[int]:
    """So many columns of a wide picture, each `apart` from the others and off its middle."""
    found: list[int] = []
    while len(found) < count:
        middle = int(rng.integers(6, 2 * SIDE - 6))
        if abs(middle - SIDE) > 3 and all(abs(middle - other) >= apart for other in found):
            found.append(middle)
        elif rng.random() < 0.01:  # no room is left between them
            found.clear()
    return found


# ------------------------------------------------------------------------------------------------------------------ judges


def train_counter(folder: Path, pictures: int) -> None:
    """counter.safetensors, of the network that counts creatures in a half, and counter.json: its share right on fresh renders."""
    drawn = [counted_picture(i) for i in tqdm(range(pictures + max(30, pictures // 4)), desc="counter: renders", leave=False)]
    pixels, counts = pixels_of([picture for picture, _ in drawn]), torch.tensor([count for _, count in drawn])
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        counter = AttributeClassifier(COUNTS)
    optimizer = torch.optim.AdamW(counter.parameters(), lr=2e-3)
    for _ in tqdm(range(EPOCHS), desc="counter: epochs", leave=False):
        for chosen in torch.randperm(pictures, generator=generator).split(48):
            # a drawn picture is blurred and noisy beside a render
            clean = pixels[chosen].flip(-1) if torch.rand(1, generator=generator) < 0.5 else pixels[chosen]
            soft = F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, 1)
            blended = torch.lerp(clean, soft, torch.rand(1, generator=generator))
            noisy = blended + 0.05 * torch.randn(clean.shape, generator=generator)
            loss = F.cross_entropy(counter(noisy)["count"], counts[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    read = torch.tensor([int(each["count"]) for each in counter.eval().read(pixels[pictures:])])
    fresh = counts[pictures:]
    right = {str(count): (read == fresh)[fresh == count].float().mean().item() for count in range(3)}
    save_file(counter.state_dict(), folder / "counter.safetensors")
    write_json(folder / "counter.json", dict(pictures=pictures, fresh=len(fresh), right=right, classifier=classifier_on_pairs()))


def classifier_on_pairs(pairs: int = 100) -> dict[str, float]:
    """How often the classifier is right on halves as the test pictures should be: two renders of one scene, side by side."""
    specs = [spec for k in range(pairs) for spec in pair_specs(np.random.default_rng([SEED, 1, k]))]
    read = classifier().read(pixels_of([render(spec, SIDE) for spec in specs]))
    return {
        name: float(np.mean([each[name] == truth(spec)[name] for each, spec in zip(read, specs, strict=True)]))
        for name in ("colour", "accessory", "scene")
    }


def load_counter(folder: Path) -> tuple[AttributeClassifier, dict]:
    """The network of `train_counter`, and what is known of its accuracy."""
    counter = AttributeClassifier(COUNTS)
    counter.load_state_dict(load_file(folder / "counter.safetensors"))
    return counter.eval(), json.loads((folder / "counter.json").read_text())


def read_halves(picture: Image.Image, counter: AttributeClassifier) -> list[dict]:
    """Of each 64 x 64 part from left to right: its attributes, the chances of each accessory, and how many creatures it has."""
    halves = [picture.crop((left, 0, left + SIDE, SIDE)) for left in range(0, picture.width, SIDE)]
    pixels = pixels_of(halves)
    with torch.no_grad():
        chances = classifier()(pixels)["accessory"].softmax(1)
    read, counts = classifier().read(pixels), counter.read(pixels)
    return [
        dict(attributes, chances=[round(chance, 3) for chance in row.tolist()], count=int(counted["count"]))
        for attributes, row, counted in zip(read, chances, counts, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------------ scores


def score(task: Task, halves: Sequence[dict]) -> dict[str, float]:
    """Scores of one picture from what was read of its halves, each from 0 to 1; but `margin` from -1 to 1."""
    colours, wanted = [half["colour"] for half in halves], [each.colour for each in task.creatures]
    counts, asked = [half["count"] for half in halves], [each.accessory for each in task.creatures]
    scores: dict[str, float] = {}
    if len(wanted) == 2:
        scores |= dict(right=set(colours) == set(wanted), in_order=colours == wanted, leak=colours[0] == colours[1],
                       first=wanted[0] in colours, second=wanted[1] in colours)  # fmt: skip
    own = [
        halves[k]["chances"][ACCESSORIES.index(each)] - halves[1 - k]["chances"][ACCESSORIES.index(each)]
        for k, each in enumerate(asked)
        if each
    ]
    if own:  # the judge has one label for a creature, so each accessory is compared between the halves
        scores |= dict(owner=np.mean([value > 0 for value in own]), margin=np.mean(own))
    first = task.creatures[0]
    if first.looks:
        scores["looks"] = np.mean([halves[0][name] == value for name, value in first.looks])
    if first.breed:
        pattern = dict(first.looks)["pattern"]
        scores |= dict(other=colours[1] == wanted[1], pattern_leak=halves[1]["pattern"] == pattern != "plain")
    uninvited = [half["accessory"] not in ("nothing", *asked) for half in halves]
    scores |= dict(scene=all(half["scene"] == task.scene for half in halves), uninvited=np.mean(uninvited),
                   empty=np.mean([count == 0 for count in counts]), one_each=counts == [1] * len(counts),
                   several=np.mean([count == 2 for count in counts]))  # fmt: skip
    return {name: float(value) for name, value in scores.items()}
