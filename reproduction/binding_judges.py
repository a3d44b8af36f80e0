"""What the miniature's classifier and a network that counts creatures read off a picture's halves; and the scores from it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from miniature.classifier import AttributeClassifier, truth
from miniature.drawing import render
from miniature.rendering import to_float
from miniature.words import ACCESSORIES
from miniature.world import SceneSpec, random_spec
from reproduction.binding_sets import SEED, Task
from reproduction.worlds import classifier, pixels_of
from zoodip.files import write_json
from zoodip.model import load_pipeline
from zoodip.records import ROOT

MODEL = ROOT / "miniature" / "model"
SIDE = 64  # pixels: of a half, and of what the judges read
COUNTS = {"count": ("0", "1", "2")}
EXPECTED = (0.1, 0.8, 0.1)  # for drawn halves, about as in COUNTED: 6 without a creature, 98 with one, 4 with two
COUNTED = ROOT / "reproduction" / "binding_development" / "counted.png"
EPOCHS, BATCH = 6, 48
Of = TypeVar("Of")


# ----------------------------------------------------------------------------------------------------- renders to learn from


def pair_specs(rng: np.random.Generator) -> tuple[SceneSpec, SceneSpec]:
    """Specifications of two pictures whose scenes are the same in every detail."""
    first = random_spec(rng, held_out=True)
    return first, dataclasses.replace(random_spec(rng, held_out=True), scene=first.scene, seed=first.seed)


def counted_picture(index: int) -> tuple[Image.Image, tuple[int, int]]:
    """A wide render with 0 to 4 creatures, and how many of them have their middle in each half; 2 stands for two or more.

    A scene beside its mirror image has no seam. Creatures are cut out of renders and put anywhere, also across the middle, as
    they are in drawn pictures. A creature that is split in two has its middle in one half.
    """
    rng, creatures = np.random.default_rng([SEED, index]), index % 5
    first = random_spec(rng, held_out=True)
    scene = render(dataclasses.replace(first, x=-2.0), SIDE)  # the creature is outside the picture
    wide = side_by_side(scene, scene)
    middles = middles_of(rng, creatures)
    for middle in middles:
        other = random_spec(rng, held_out=True)
        spec = dataclasses.replace(other, scene=first.scene, seed=first.seed, x=0.5, scale=float(rng.uniform(0.4, other.scale)))
        alone = render(spec, SIDE)
        cut = (np.asarray(alone) != np.asarray(scene)).any(2)
        wide.paste(alone, (middle - SIDE // 2, 0), Image.fromarray(cut))
    on_the_left = sum(middle < SIDE for middle in middles)
    return wide, (min(2, on_the_left), min(2, creatures - on_the_left))


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """A wide picture made from two of one scene; the second is mirrored, so that the scene continues without a seam."""
    wide = Image.new("RGB", (2 * SIDE, SIDE))
    wide.paste(left, (0, 0))
    wide.paste(ImageOps.mirror(right), (SIDE, 0))
    return wide


def middles_of(rng: np.random.Generator, count: int, apart: int = 20) -> list[int]:
    """`count` columns of a wide picture, each at least `apart` from the others and off the picture's middle."""
    found: list[int] = []
    while len(found) < count:
        middle = int(rng.integers(6, 2 * SIDE - 6))
        if abs(middle - SIDE) > 3 and all(abs(middle - other) >= apart for other in found):
            found.append(middle)
        elif rng.random() < 0.01:  # no room is left between them
            found.clear()
    return found


# ------------------------------------------------------------------------------------------------------------------ judges


def wide_pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """float [N, 3, 64, 128] in [-1, 1]."""
    return to_float(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))


@torch.inference_mode()
def through_vae(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels after the miniature's VAE: every drawn picture has passed its decoder, and no render has."""
    vae = load_pipeline(str(MODEL), "none").vae
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
             for part in tqdm(pixels.split(32), desc="through the VAE", leave=False)]  # fmt: skip
    return torch.cat(parts).clone()


def halves_of(wide: torch.Tensor) -> torch.Tensor:
    """[N, 3, 64, 128] -> [2 N, 3, 64, 64], the left halves first."""
    return torch.cat([wide[..., :SIDE], wide[..., SIDE:]])


def left_first(pairs: Sequence[Sequence[Of]]) -> list[Of]:
    """What is known of the halves of pictures, in the order of `halves_of`."""
    return [pair[k] for k in range(2) for pair in pairs]


def train_counter(folder: Path, pictures: int) -> None:
    """Train the network that counts creatures in a half, and write counter.safetensors and counter.json.

    The latter gives its accuracy on fresh renders passed through the VAE, and on drawn pictures that were counted by eye.
    """
    drawn = [counted_picture(i) for i in tqdm(range(pictures + max(30, pictures // 4)), desc="counter: renders", leave=False)]
    wide = wide_pixels([picture for picture, _ in drawn])
    wide_decoded = through_vae(wide)
    clean, decoded, fresh = halves_of(wide[:pictures]), halves_of(wide_decoded[:pictures]), halves_of(wide_decoded[pictures:])
    counts, fresh_counts = (torch.tensor(left_first([of for _, of in some])) for some in (drawn[:pictures], drawn[pictures:]))
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        counter = AttributeClassifier(COUNTS)
    batches = math.ceil(len(counts) / BATCH)
    optimizer = torch.optim.AdamW(counter.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=EPOCHS * batches)

    def share(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, 1, 1, 1, generator=generator)

    for _ in tqdm(range(EPOCHS), desc="counter: epochs", leave=False):
        for chosen in torch.randperm(len(counts), generator=generator).split(BATCH):
            # up to one and a half times as far from a render as the VAE leaves it: a drawn picture is rougher still
            seen = torch.lerp(clean[chosen], decoded[chosen], 1.5 * share(len(chosen)))
            soft = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
            seen = torch.lerp(seen, soft, share(len(chosen)))
            seen = seen.flip(-1) if share(1) < 0.5 else seen
            noisy = seen + 0.05 * torch.randn(seen.shape, generator=generator)
            loss = F.cross_entropy(counter(noisy)["count"], counts[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    read = counted(counter.eval(), fresh).argmax(1)
    right = {str(of): (read == fresh_counts)[fresh_counts == of].float().mean().item() for of in range(3)}
    save_file(counter.state_dict(), folder / "counter.safetensors")
    write_json(folder / "counter.json", dict(pictures=pictures, fresh=len(fresh), right=right, drawn=counter_on_drawn(counter),
                                             classifier=classifier_on_pairs(min(100, pictures))))  # fmt: skip


@torch.no_grad()
def counted(counter: AttributeClassifier, halves: torch.Tensor) -> torch.Tensor:
    """Probabilities [N, 3] of no creature, one and more in halves [N, 3, 64, 64].

    The renders from which the counter learned have equally many of each, whereas halves of drawn pictures nearly always have one:
    by Bayes's rule its probabilities are weighted with how often each count is to be expected.
    """
    chances = counter(halves)["count"].softmax(1) * torch.tensor(EXPECTED)
    return chances / chances.sum(1, keepdim=True)


def counter_on_drawn(counter: AttributeClassifier) -> dict[str, list[int]]:
    """{creatures in a half: [read right, halves]} of development pictures that were counted by eye.

    COUNTED is a grid of them; COUNTED.json says what the halves of each picture hold. It says "12" if that cannot be decided, for
    example for a creature in the middle, and that half is then left out.
    """
    labels = json.loads(COUNTED.with_suffix(".json").read_text())
    with Image.open(COUNTED) as grid:
        columns = grid.width // (2 * SIDE)
        boxes = [(2 * SIDE * (k % columns), SIDE * (k // columns)) for k in range(len(labels))]
        pictures = [grid.convert("RGB").crop((x, y, x + 2 * SIDE, y + SIDE)) for x, y in boxes]
    read = map(str, counted(counter, halves_of(wide_pixels(pictures))).argmax(1).tolist())
    found: dict[str, list[int]] = {}
    for label, count in zip(left_first(labels), read, strict=True):
        if len(label) == 1:
            of = found.setdefault(label, [0, 0])
            of[0] += label == count
            of[1] += 1
    return dict(sorted(found.items()))


def classifier_on_pairs(pairs: int) -> dict[str, float]:
    """How often the classifier is right on halves of the kind that test pictures should have.

    These are two renders of one scene side by side, passed through the VAE.
    """
    specs = [pair_specs(np.random.default_rng([SEED, 1, k])) for k in range(pairs)]
    wide = through_vae(wide_pixels([side_by_side(*(render(spec, SIDE) for spec in pair)) for pair in specs]))
    read = classifier().read(halves_of(wide))
    return {
        name: float(np.mean([each[name] == truth(spec)[name] for each, spec in zip(read, left_first(specs), strict=True)]))
        for name in ("colour", "accessory", "scene")
    }


def load_counter(folder: Path) -> tuple[AttributeClassifier, dict]:
    """The network of `train_counter`, and what is known of its accuracy."""
    counter = AttributeClassifier(COUNTS)
    counter.load_state_dict(load_file(folder / "counter.safetensors"))
    return counter.eval(), json.loads((folder / "counter.json").read_text())


def read_halves(picture: Image.Image, counter: AttributeClassifier) -> list[dict]:
    """For each 64 x 64 part, from left to right: its attributes, the log probabilities of all accessories, and its creatures.

    The probability of an accessory may be small in both halves. Creatures are given as a count and the probability of each count.
    """
    halves = [picture.crop((left, 0, left + SIDE, SIDE)) for left in range(0, picture.width, SIDE)]
    pixels = pixels_of(halves)
    with torch.no_grad():
        worn = classifier()(pixels)["accessory"].log_softmax(1)
    return [
        dict(attributes, log_chances=[round(value, 3) for value in logs.tolist()], count=int(counts.argmax()),
             counts=[round(value, 3) for value in counts.tolist()])
        for attributes, logs, counts in zip(classifier().read(pixels), worn, counted(counter, pixels), strict=True)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ scores


def score(task: Task, halves: Sequence[dict]) -> dict[str, float]:
    """Scores of one picture from what was read off its halves: each from 0 to 1, except `margin`, which is from -1 to 1."""
    colours, wanted = [half["colour"] for half in halves], [each.colour for each in task.creatures]
    counts, asked = [half["count"] for half in halves], [each.accessory for each in task.creatures]
    scores: dict[str, float] = {}
    if len(wanted) == 2:
        scores |= dict(right=set(colours) == set(wanted), in_order=colours == wanted, leak=colours[0] == colours[1],
                       first=wanted[0] in colours, second=wanted[1] in colours)  # fmt: skip
    logs = [[halves[side]["log_chances"][ACCESSORIES.index(each)] for side in (k, 1 - k)]
            for k, each in enumerate(asked) if each]  # fmt: skip
    if logs:  # the judge has one label per creature, so each accessory is compared between the halves; a tie counts half
        own, other = np.array(logs).T
        worn = [[halves[side]["accessory"] == each for side in (k, 1 - k)] for k, each in enumerate(asked) if each]
        scores |= dict(owner=np.mean((own > other) + 0.5 * (own == other)), margin=np.mean(np.exp(own) - np.exp(other)),
                       alone=np.mean([on_own and not on_other for on_own, on_other in worn]))  # fmt: skip
    first = task.creatures[0]
    if first.looks:
        scores["looks"] = np.mean([halves[0][name] == value for name, value in first.looks])
    if first.breed:
        pattern = dict(first.looks)["pattern"]
        scores["other"] = colours[1] == wanted[1]
        if pattern != "plain":  # else there is none to leak
            scores["pattern_leak"] = halves[1]["pattern"] == pattern
    uninvited = [half["accessory"] not in ("nothing", *asked) for half in halves]
    scores |= dict(scene=all(half["scene"] == task.scene for half in halves), uninvited=np.mean(uninvited),
                   empty=np.mean([count == 0 for count in counts]), one_each=counts == [1] * len(counts),
                   several=np.mean([count == 2 for count in counts]))  # fmt: skip
    if "right" in scores:
        scores |= dict(right_one_each=scores["right"] and scores["one_each"], empty_left=counts[0] == 0)
    return {name: float(value) for name, value in scores.items()}
