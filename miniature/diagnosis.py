"""Why do some words not reach the picture? One figure for each suspected cause, measured on a model folder.

    python -m miniature.diagnosis                  # writes miniature/diagnosis.json; 4 minutes on one CPU core

captions      how often a training caption words an attribute, and at which token
text_encoder  whether a linear map can read the value off the final states, at the attribute's noun and at the end of the text
area          what changes when only this attribute changes: share of the pixels, cells of 16 x 16 and 8 x 8 latents
vae           the classifier's accuracy before and after a round trip: the ceiling of every picture score
loss          how much the loss grows, by timestep, when the caption words only this attribute wrongly
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from miniature.captions import class_caption, describe, sample_caption
from miniature.classifier import load_classifier, truth
from miniature.critters import random_critter
from miniature.diffusion import snr_weights
from miniature.measures import to_pixels
from miniature.rendering import training_spec
from miniature.words import ACCESSORIES, SCENES, SHAPES
from miniature.world import ATTRIBUTES, SceneSpec, random_spec, scene_spec, swapped
from zoodip.records import environment

HERE = Path(__file__).resolve().parent
SEED = 31
NOUNS = {"ears": "ears", "tail": "tail", "eyes": "eyes", "shape": "critter", "colour": "critter"}
PARTS = ("captions", "text_encoder", "area", "vae", "loss")
TIMESTEPS = (100, 300, 500, 600, 700, 800, 900)


def words_attribute(caption: str, spec: SceneSpec, name: str) -> int | None:
    """The index of the word of `caption` at which attribute `name` of `spec` is worded; None if it is not."""
    words = caption.replace(",", " ,").split()
    if name in ("ears", "tail", "eyes"):
        return words.index(name) if name in words else None
    if name == "pattern":
        found = [word for word in ("spots", "stripes", "patches", spec.critter.pattern) if word in words]
        return words.index(found[0]) if found else None
    value = getattr(spec.critter, name)
    return words.index(value) if value in words else None


def caption_report(count: int = 20000) -> dict:
    """{attribute: share of the captions that word it, mean place of the word}; breed names are counted separately."""
    rng = np.random.default_rng(SEED)
    pairs = [(spec := training_spec(index), sample_caption(spec, rng)) for index in range(count)]
    report = {}
    for name in ("shape", "colour", "pattern", "ears", "tail", "eyes"):
        places = [place for spec, caption in pairs if (place := words_attribute(caption, spec, name)) is not None]
        report[name] = {"share": round(len(places) / count, 4), "mean_place": round(float(np.mean(places)), 1)}
    named = [spec.breed is not None and spec.breed in caption.split() for spec, caption in pairs]
    return report | {"breed_name": {"share": round(float(np.mean(named)), 4)}}


def described(spec: SceneSpec) -> str:
    """The caption that words all attributes."""
    return class_caption(spec, describe(spec.critter))


def unseen_specs(count: int) -> list[SceneSpec]:
    """Pictures of random critters, none of which was trained on."""
    rng = np.random.default_rng([SEED, 1])
    return [scene_spec(random_critter(rng), str(rng.choice(SCENES)), str(rng.choice(ACCESSORIES)), rng=rng) for _ in range(count)]


@torch.no_grad()
def text_report(pipeline: StableDiffusionPipeline, count: int = 3000) -> dict:
    """{attribute: accuracy of a ridge regression from the final states, tested on an unseen third of the captions}."""
    specs = unseen_specs(count)
    captions = [described(spec) for spec in specs]
    ids = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = torch.cat([pipeline.text_encoder(chunk).last_hidden_state for chunk in ids.split(250)])  # [N, 32, d]
    end = (ids == pipeline.tokenizer.eos_token_id).int().argmax(1)
    report = {}
    for name in ("shape", "colour", "pattern", "ears", "tail", "eyes"):
        values = torch.tensor([ATTRIBUTES[name].index(getattr(spec.critter, name)) for spec in specs])
        places = {"end_of_text": end}
        if name in NOUNS:
            noun = pipeline.tokenizer.convert_tokens_to_ids(NOUNS[name] + "</w>")
            places["noun"] = (ids == noun).int().argmax(1)
        report[name] = {
            place: round(linear_probe(states[torch.arange(count), index], values), 4) for place, index in places.items()
        }
    return report


def linear_probe(features: Tensor, values: Tensor) -> float:
    """Accuracy on the last third of a ridge regression fitted to the first two thirds; features [N, d], values [N]."""
    features = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    split = 2 * len(features) // 3
    train, targets = features[:split], torch.nn.functional.one_hot(values[:split]).double()
    ridge = 1e-3 * split * torch.eye(features.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(train.T @ train + ridge, train.T @ targets)
    return float(((features[split:] @ weights).argmax(1) == values[split:]).double().mean())


@torch.no_grad()
def area_report(pipeline: StableDiffusionPipeline, count: int = 128) -> dict:
    """{attribute: share of pixels that differ by 0.1 of the range, cells in which the latents differ by half a std}."""
    rng = np.random.default_rng([SEED, 2])
    specs = unseen_specs(count)
    before = to_pixels(specs)
    latents = pipeline.vae.encode(before).latent_dist.mean
    report = {}
    for name in ATTRIBUTES:
        after = to_pixels([swapped(spec, rng, name) for spec in specs])
        change = (pipeline.vae.encode(after).latent_dist.mean - latents).abs().amax(1, keepdim=True)  # [N, 1, 16, 16]
        report[name] = {
            "pixels": round(float(((after - before).abs().amax(1) > 0.2).float().mean()), 4),
            "cells_of_256": round(float((change > 0.5).float().sum((1, 2, 3)).mean()), 1),
            "cells_of_64": round(float((torch.nn.functional.avg_pool2d(change, 2) > 0.5).float().sum((1, 2, 3)).mean()), 1),
        }
    return report


@torch.no_grad()
def vae_report(pipeline: StableDiffusionPipeline, count: int = 1000) -> dict:
    """{attribute: the classifier's accuracy on renders and on round trips}, and for the tail also by shape."""
    specs = [random_spec(np.random.default_rng([SEED, 3, index]), held_out=True) for index in range(count)]
    renders = to_pixels(specs)
    trips = torch.cat(
        [pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) for x in renders.split(50)]
    )
    classifier = load_classifier(HERE / "classifier")
    right = {}
    for label, images in (("renders", renders), ("round_trips", trips)):
        readings = [reading for chunk in images.split(100) for reading in classifier.read(chunk)]
        right[label] = [
            {name: value == truth(spec)[name] for name, value in reading.items()}
            for reading, spec in zip(readings, specs, strict=True)
        ]
    report = {
        name: {label: round(float(np.mean([row[name] for row in rows])), 4) for label, rows in right.items()}
        for name in ATTRIBUTES
    }
    report["tail_on_renders_by_shape"] = {
        shape: round(
            float(
                np.mean([row["tail"] for row, spec in zip(right["renders"], specs, strict=True) if spec.critter.shape == shape])
            ),
            4,
        )
        for shape in SHAPES
    }
    return report


@torch.no_grad()
def loss_report(pipeline: StableDiffusionPipeline, count: int = 192) -> dict:
    """{"mse": by timestep, attribute: growth of the mse by timestep with this one attribute worded wrongly}.

    "share_per_cent" is the growth, averaged over the timesteps with the training's min-SNR weights, in per cent of the loss.
    """
    rng = np.random.default_rng([SEED, 4])
    generator = torch.Generator().manual_seed(SEED)
    specs = unseen_specs(count)
    latents = pipeline.vae.encode(to_pixels(specs)).latent_dist.mean * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    texts = {"mse": [described(spec) for spec in specs]}
    texts |= {name: [described(swapped(spec, rng, name)) for spec in specs] for name in ATTRIBUTES}
    states = {name: encode(pipeline, captions) for name, captions in texts.items()}
    losses: dict[str, list[float]] = {name: [] for name in texts}
    for timestep in TIMESTEPS:
        alpha = pipeline.scheduler.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        for name, hidden in states.items():
            with torch.autocast("cpu", torch.bfloat16):
                chunks = zip(noisy.split(48), hidden.split(48), strict=True)
                noise_pred = torch.cat([pipeline.unet(x, timestep, h).sample.float() for x, h in chunks])
            losses[name].append(float((noise_pred - noise).square().mean()))
    weights = snr_weights(pipeline.scheduler)[list(TIMESTEPS)].tolist()
    base = losses.pop("mse")
    report: dict = {"timesteps": list(TIMESTEPS), "mse": [round(value, 5) for value in base]}
    total = sum(weight * value for weight, value in zip(weights, base, strict=True))
    for name, values in losses.items():
        growth = [value - true for value, true in zip(values, base, strict=True)]
        share = sum(weight * value for weight, value in zip(weights, growth, strict=True)) / total
        report[name] = {"growth": [round(value, 5) for value in growth], "share_per_cent": round(100 * share, 2)}
    return report


def encode(pipeline: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """Final text states [N, 32, d]."""
    ids = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids).last_hidden_state


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model", help="Stable Diffusion folder (default: miniature/model)")
    parser.add_argument("--output", type=Path, default=HERE / "diagnosis.json", help="file (default: miniature/diagnosis.json)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which figures (default: all)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(args.model)
    parts = {
        "captions": caption_report,
        "text_encoder": lambda: text_report(pipeline),
        "area": lambda: area_report(pipeline),
        "vae": lambda: vae_report(pipeline),
        "loss": lambda: loss_report(pipeline),
    }
    report = {name: parts[name]() for name in args.parts} | {"environment": environment()}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(parse_args())
