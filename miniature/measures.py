"""Measures of the miniature and its judges: what pictures show, and how well the VAE and the scorer do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from miniature.captions import describe
from miniature.classifier import AttributeClassifier, truth
from miniature.critters import Breed, held_out_breeds
from miniature.drawing import render
from miniature.make_subject import SCENES as REFERENCE_SCENES
from miniature.prompts import TEST_SEED, Prompt, test_spec
from miniature.rendering import to_float
from miniature.vae import psnr
from miniature.words import ACCESSORIES, ACCESSORY_PHRASES, CLASS_NOUN, SCENE_PHRASES, SCENES
from miniature.world import SceneSpec, random_spec, scene_spec

JUDGED = ("scene", "accessory", "colour", "pattern", "ears", "shape")
BODY = ("colour", "pattern", "ears", "shape")


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: list[Prompt],
    *,
    steps: int,
    guidance: float,
    batch: int,
    label: str,
    bf16: bool = False,
) -> Tensor:
    """float [N, 3, 64, 64] in [-1, 1]; the noise of picture i is seeded with i."""
    noise = torch.cat(
        [
            torch.randn(1, pipeline.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(i))
            for i in range(len(prompts))
        ]
    )
    images = []
    for first in tqdm(range(0, len(prompts), batch), desc=label):
        chunk = prompts[first : first + batch]
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bf16):
            output = pipeline(
                [prompt.text for prompt in chunk],
                num_inference_steps=steps,
                guidance_scale=guidance,
                latents=noise[first : first + batch].to(pipeline.device),
                output_type="pt",
            ).images
        images.append(output.float().cpu() * 2 - 1)
    return torch.cat(images)


def shares(readings: list[dict[str, str]], specs: list[SceneSpec]) -> dict[str, float]:
    """The share of pictures that match `specs` in each attribute, in the whole body, and in everything."""
    right = [{name: reading[name] == value for name, value in truth(spec).items()}
             for reading, spec in zip(readings, specs, strict=True)]  # fmt: skip
    result = {name: float(np.mean([row[name] for row in right])) for name in (*JUDGED, "tail", "eyes")}
    patterned = [row["pattern_colour"] for row, spec in zip(right, specs, strict=True) if spec.critter.pattern != "plain"]
    result["pattern_colour"] = float(np.mean(patterned))
    result["body"] = float(np.mean([all(row[name] for name in BODY) for row in right]))
    result["all_six"] = float(np.mean([all(row[name] for name in JUDGED) for row in right]))
    return {name: round(value, 4) for name, value in result.items()}


def judge(classifier: AttributeClassifier, images: Tensor, prompts: list[Prompt]) -> dict[str, float]:
    """`shares` of generated pictures, float [N, 3, 64, 64]."""
    readings = [reading for chunk in images.split(128) for reading in classifier.read(chunk)]
    return shares(readings, [prompt.spec for prompt in prompts])


def fresh_renders(count: int) -> tuple[Tensor, list[SceneSpec]]:
    """Renders that no model was trained on, float [count, 3, 64, 64] in [-1, 1]."""
    specs = [random_spec(np.random.default_rng([TEST_SEED, 3, index]), held_out=True) for index in range(count)]
    return to_pixels(specs), specs


def to_pixels(specs: list[SceneSpec]) -> Tensor:
    """Renders, float [N, 3, 64, 64] in [-1, 1]."""
    return to_float(torch.from_numpy(np.stack([np.asarray(render(spec)) for spec in specs])))


def hue_and_saturation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Hue in degrees and chroma (max - min, 0 to 1), [N, H, W] each, of images [N, 3, H, W] in [-1, 1]."""
    red, green, blue = ((images.clamp(-1, 1) + 1) / 2).unbind(1)
    hue = torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue).rad2deg()
    return hue, images.add(1).div(2).clamp(0, 1).amax(1) - images.add(1).div(2).clamp(0, 1).amin(1)


@torch.no_grad()
def vae_report(pipeline: StableDiffusionPipeline, images: Tensor) -> tuple[dict[str, float], Tensor]:
    """PSNR and hue error of round trips, and the round trips themselves."""
    vae = pipeline.vae
    outputs, latents = [], []
    for chunk in images.split(64):
        mean = vae.encode(chunk.to(vae.device)).latent_dist.mean
        latents.append(mean.cpu())
        outputs.append(vae.decode(mean).sample.cpu().clamp(-1, 1))
    output = torch.cat(outputs)
    hue, chroma = hue_and_saturation(images)
    error = (hue_and_saturation(output)[0] - hue + 180).remainder(360) - 180
    coloured = chroma > 0.25  # the hue of a nearly grey pixel means nothing
    report = {
        "psnr_db": psnr(output, images),
        "mean_hue_error_degrees": float(error[coloured].abs().mean()),
        "median_hue_error_degrees": float(error[coloured].abs().median()),
    }
    report |= {f"latent_std_{i}": float(std) for i, std in enumerate(torch.cat(latents).std((0, 2, 3)))}
    return {name: round(value, 3) for name, value in report.items()}, output


class Scorer:
    """The CLIP of `folder`: unit vectors of pictures and texts."""

    def __init__(self, folder: Path) -> None:
        self.clip = CLIPModel.from_pretrained(folder).eval()
        self.tokenizer = CLIPProcessor.from_pretrained(folder).tokenizer

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """float [N, d]."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return nn.functional.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1)

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """float [N, 3, 64, 64] in [-1, 1] to float [N, d]."""
        vectors = [self.clip.get_image_features(pixel_values=chunk).pooler_output for chunk in images.split(128)]
        return nn.functional.normalize(torch.cat(vectors), dim=-1)


def clip_report(scorer: Scorer, images: Tensor, specs: list[SceneSpec]) -> dict[str, float]:
    """How often the scorer prefers the true scene, accessory and breed description of fresh renders."""
    pictures = scorer.pictures(images)
    scenes = scorer.texts([f"a {CLASS_NOUN} {SCENE_PHRASES[scene][0]}" for scene in SCENES])
    accessories = scorer.texts([f"a {CLASS_NOUN} {ACCESSORY_PHRASES[name][0]}".strip() for name in ACCESSORIES])
    scene_right = (pictures @ scenes.T).argmax(1) == torch.tensor([SCENES.index(spec.scene) for spec in specs])
    worn = torch.tensor([ACCESSORIES.index(spec.accessory) for spec in specs])
    chosen = (pictures @ accessories.T).argmax(1)
    nothing = ACCESSORIES.index("nothing")
    own = scorer.texts([f"a {describe(spec.critter)}" for spec in specs])
    # Each picture's description against those of 11 other pictures.
    rivals = torch.stack([own.roll(shift, 0) for shift in range(12)], 1)  # [N, 12, d]
    body_right = torch.einsum("nd,nkd->nk", pictures, rivals).argmax(1) == 0
    named = {
        "scene_of_12": scene_right,
        "accessory_of_6": chosen == worn,
        "accessory_where_one_is_worn": (chosen == worn)[worn != nothing],
        "nothing_taken_for_an_accessory": (chosen != nothing)[worn == nothing],
        "description_of_12": body_right,
    }
    return {name: round(float(right.float().mean()), 4) for name, right in named.items()}


def renders_of(breed: Breed, scenes: list[tuple[str, str]], seed: int) -> Tensor:
    """`breed` in each (scene, accessory), float [N, 3, 64, 64] in [-1, 1]."""
    rng = np.random.default_rng([TEST_SEED, 5, seed])
    return to_pixels([scene_spec(breed, scene, accessory, rng=rng) for scene, accessory in scenes])


def clip_image_report(scorer: Scorer) -> dict[str, float]:
    """The scale of CLIP-I: the mean cosine of pictures in other scenes to a held-out breed's reference pictures.

    "ceiling": true renders of the breed; "floor": of the eleven others in the same scenes. "ordered": how often a true render
    scores above one of another breed in the same scene.
    """
    breeds = held_out_breeds()
    rng = np.random.default_rng([TEST_SEED, 6])
    wanted = [spec for index in range(24) if (spec := test_spec(breeds[0], index, rng)).scene not in REFERENCE_SCENES]
    scenes = [(spec.scene, spec.accessory) for spec in wanted]
    vectors = torch.stack([scorer.pictures(renders_of(breed, scenes, index)) for index, breed in enumerate(breeds)])  # [12, N, d]
    references = torch.stack(
        [scorer.pictures(renders_of(breed, [(scene, "nothing") for scene in REFERENCE_SCENES], 100 + index))
         for index, breed in enumerate(breeds)]
    )  # [12, 5, d]  # fmt: skip
    scores = torch.einsum("bnd,rkd->rbnk", vectors, references).mean(-1)  # [reference, breed, N]
    own = scores.diagonal(dim1=0, dim2=1).T  # [12, N]
    other = ~torch.eye(len(breeds), dtype=torch.bool)
    ordered = (own[:, None] > scores)[other].float().mean()
    report = {"ceiling": own.mean(), "floor": scores[other].mean(), "ordered": ordered}
    return {name: round(float(value), 4) for name, value in report.items()}
