"""What is read off a picture's halves, by the miniature's classifier and by a network that counts creatures; and the scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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
    """A render with 0, 1 or 2 creatures. Two: the halves of two renders of one scene, which join without a seam."""
    rng, count = np.random.default_rng([SEED, index]), index % 3
    first, second = pair_specs(rng)
    if count < 2:
        x = float(rng.uniform(0.25, 0.75)) if count else -2.0  # outside
        return render(dataclasses.replace(first, x=x), SIDE), count
    left, right = (
        render(dataclasses.replace(spec, x=x, scale=float(rng.uniform(0.4, 0.52))), SIDE)
        for spec, x in ((first, 0.2), (second, 0.8))
    )
    left.paste(right.crop((SIDE // 2, 0, SIDE, SIDE)), (SIDE // 2, 0))
    return left, 2


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
