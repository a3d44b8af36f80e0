"""Measures the miniature model: does a picture show what its caption says?

    python -m miniature.quality                    # writes miniature/quality.json and miniature/samples.png

Pictures are generated from three kinds of prompts: descriptions of unseen critters, names of trained
breeds, and full descriptions of the held-out breeds. The classifier of `train.py` reads them; its own
accuracy on fresh renders stands beside the results. Everything is measured twice with the same noise: with
the weights as they are, and with all Linear and Conv2d weights of UNet and text encoder (but the UNet's
`conv_in` and `conv_out`) rounded to NF4.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import textwrap
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from miniature.captions import class_caption, describe
from miniature.classifier import AttributeClassifier, load_classifier, truth
from miniature.critters import Critter, held_out_breeds, random_critter, trained_breeds
from miniature.drawing import render
from miniature.words import ACCESSORIES, ACCESSORY_PHRASES, CLASS_NOUN, SCENE_PHRASES, SCENES
from miniature.world import SceneSpec, random_spec, scene_spec
from zoodip.model import is_quantized
from zoodip.quantize import pack_weight, quantized_layer

HERE = Path(__file__).resolve().parent
JUDGED = ("scene", "accessory", "colour", "pattern", "ears", "shape")
BODY = ("colour", "pattern", "ears", "shape")
TEST_SEED = 23


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384, help="pictures from descriptions (default: 384)")
    parser.add_argument("--breed-images", type=int, default=192, help="pictures from breed names (default: 192)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default: 50)")
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the best of a sweep)")
    parser.add_argument("--sweep", type=float, nargs="+", default=[2.0, 3.5, 5.0], help="scales that are tried")
    parser.add_argument("--sweep-images", type=int, default=64, help="pictures for each scale (default: 64)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once (default: 32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16: faster on CPUs that have it")
    parser.add_argument("--no-nf4", action="store_true", help="leave the NF4 half out")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for quality.json and samples.png")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Prompt:
    """A prompt and the picture that it describes."""

    text: str
    spec: SceneSpec


def test_spec(subject, index: int, rng: np.random.Generator) -> SceneSpec:
    """Scenes and accessories in turn, so that each is asked for equally often."""
    scene = SCENES[index % len(SCENES)]
    accessory = ACCESSORIES[(index + index // len(SCENES)) % len(ACCESSORIES)]
    return scene_spec(subject, scene, accessory, rng=rng)


def description_prompts(count: int) -> list[Prompt]:
    """Such as "a tall blue critter with white spots and floppy ears in the snow wearing a red hat".

    The critters are of no breed. What is judged is worded, tail and eyes are not.
    """
    rng = np.random.default_rng([TEST_SEED, 0])
    specs = [test_spec(random_critter(rng), index, rng) for index in range(count)]
    return [Prompt(class_caption(spec, judged_description(spec.critter)), spec) for spec in specs]


def judged_description(critter: Critter) -> str:
    """Shape, colour, pattern and ears of a critter, without an article."""
    if critter.pattern == "plain":
        return f"{critter.shape} plain {critter.colour} {CLASS_NOUN} with {critter.ears} ears"
    pattern = {"spotted": "spots", "striped": "stripes", "patched": "patches"}[critter.pattern]
    markings = f"{critter.pattern_colour} {pattern} and {critter.ears} ears"
    return f"{critter.shape} {critter.colour} {CLASS_NOUN} with {markings}"


def breed_prompts(count: int) -> list[Prompt]:
    """Such as "a bofdun on the beach wearing pink glasses", trained breeds in turn."""
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


# ------------------------------------------------------------------------------------------------- generation


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


def round_weights_to_nf4(pipeline: StableDiffusionPipeline) -> int:
    """Rounds the weights of UNet and text encoder to NF4 in place, exactly those that training packs; returns how many."""
    count = 0
    for part in ("unet", "text_encoder"):
        for name, layer in getattr(pipeline, part).named_modules():
            if is_quantized(part, name, layer):
                weight = layer.weight.data
                packed = quantized_layer(layer, pack_weight(weight, "nf4"), weight.dtype)
                layer.weight.data = packed.dequantize().contiguous()
                count += weight.numel()
    return count


# ---------------------------------------------------------------------------------------------------- judging


def shares(readings: list[dict[str, str]], specs: list[SceneSpec]) -> dict[str, float]:
    """The share of pictures in which each attribute, the whole body and everything is as `specs` have it."""
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
    """Pictures that nothing was trained on, float [count, 3, 64, 64] in [-1, 1]."""
    specs = [random_spec(np.random.default_rng([TEST_SEED, 3, index]), held_out=True) for index in range(count)]
    pixels = torch.from_numpy(np.stack([np.asarray(render(spec)) for spec in specs]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, specs


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
    mse = (output - images).square().mean((1, 2, 3))
    hue, chroma = hue_and_saturation(images)
    error = (hue_and_saturation(output)[0] - hue + 180).remainder(360) - 180
    coloured = chroma > 0.25  # the hue of a nearly grey pixel means nothing
    report = {
        "psnr_db": float((10 * torch.log10(4 / mse)).mean()),
        "mean_hue_error_degrees": float(error[coloured].abs().mean()),
        "median_hue_error_degrees": float(error[coloured].abs().median()),
    }
    report |= {f"latent_std_{i}": float(std) for i, std in enumerate(torch.cat(latents).std((0, 2, 3)))}
    return {name: round(value, 3) for name, value in report.items()}, output


@torch.no_grad()
def clip_report(folder: Path, images: Tensor, specs: list[SceneSpec]) -> dict[str, float]:
    """How often the scorer prefers the true scene, accessory and breed description of fresh renders."""
    clip, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)

    def embed(texts: list[str]) -> Tensor:
        tokens = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return nn.functional.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)

    pictures = torch.cat([clip.get_image_features(pixel_values=chunk).pooler_output for chunk in images.split(128)])
    pictures = nn.functional.normalize(pictures, dim=-1)
    scenes = embed([f"a {CLASS_NOUN} {SCENE_PHRASES[scene][0]}" for scene in SCENES])
    accessories = embed([f"a {CLASS_NOUN} {ACCESSORY_PHRASES[name][0]}".strip() for name in ACCESSORIES])
    scene_right = (pictures @ scenes.T).argmax(1) == torch.tensor([SCENES.index(spec.scene) for spec in specs])
    worn = torch.tensor([ACCESSORIES.index(spec.accessory) for spec in specs])
    accessory_right = (pictures @ accessories.T).argmax(1) == worn
    own = embed([f"a {describe(spec.critter)}" for spec in specs])
    # Each picture's description against those of 11 other pictures.
    rivals = torch.stack([own.roll(shift, 0) for shift in range(12)], 1)  # [N, 12, d]
    body_right = torch.einsum("nd,nkd->nk", pictures, rivals).argmax(1) == 0
    named = {"scene_of_12": scene_right, "accessory_of_6": accessory_right, "description_of_12": body_right}
    return {name: round(float(right.float().mean()), 4) for name, right in named.items()}


# ----------------------------------------------------------------------------------------------------- report


def to_pil(image: Tensor) -> Image.Image:
    """float [3, H, W] in [-1, 1] to a picture."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def sample_grid(pictures: list[tuple[Image.Image, str]], columns: int = 6, side: int = 192) -> Image.Image:
    """The pictures enlarged, each with its prompt below."""
    text_height, pad = 92, 10
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (side + pad) + pad, rows * (side + text_height + pad) + pad), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=13)
    for index, (picture, text) in enumerate(pictures):
        left, top = (
            pad + (index % columns) * (side + pad),
            pad + (index // columns) * (side + text_height + pad),
        )
        grid.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        draw.multiline_text((left, top + side + 3), textwrap.fill(text, 30), fill="black", font=font, spacing=2)
    return grid


def hardware(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"


def choose_guidance(args: argparse.Namespace, pipeline: StableDiffusionPipeline, classifier: AttributeClassifier) -> dict:
    """The share of pictures with all six attributes right, for each guidance scale of the sweep."""
    # Other prompts than those of the result: the sweep must not choose on what is then reported.
    prompts = description_prompts(args.images + args.sweep_images)[args.images :]
    table = {}
    for guidance in args.sweep:
        images = generate(
            pipeline,
            prompts,
            steps=args.steps,
            guidance=guidance,
            batch=args.batch,
            bf16=args.bf16,
            label=f"g={guidance}",
        )
        table[str(guidance)] = judge(classifier, images, prompts)
    return table


def measure(
    args: argparse.Namespace, pipeline: StableDiffusionPipeline, classifier: AttributeClassifier, label: str
) -> tuple[dict, dict[str, Tensor]]:
    """Generates and judges all kinds of prompts; the shares and the pictures by kind."""
    kinds = {
        "descriptions": description_prompts(args.images),
        "breed_names": breed_prompts(args.breed_images),
        "held_out_descriptions": held_out_prompts(),
    }
    settings = {"steps": args.steps, "guidance": args.guidance, "batch": args.batch, "bf16": args.bf16}
    images = {kind: generate(pipeline, prompts, label=f"{label}: {kind}", **settings) for kind, prompts in kinds.items()}
    return {kind: judge(classifier, images[kind], prompts) for kind, prompts in kinds.items()}, images


def print_table(report: dict) -> None:
    """The report as a Markdown table, in per cent."""
    columns = {"classifier on renders": report["classifier"]["renders"]}
    for weights in ("fp16", "nf4"):
        for kind, values in report.get(weights, {}).items():
            columns[f"{kind} {weights}"] = values
    print("| |" + "|".join(columns) + "|\n|---|" + "---|" * len(columns))
    for name in (*JUDGED, "pattern_colour", "tail", "eyes", "body", "all_six"):
        print(f"| {name} |" + "|".join(f"{100 * values[name]:.1f}" for values in columns.values()) + "|")


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    pipeline = StableDiffusionPipeline.from_pretrained(HERE / "model").to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    classifier = load_classifier(HERE / "classifier")
    renders, specs = fresh_renders(1000)
    vae, round_trips = vae_report(pipeline, renders)
    readings = {name: [r for chunk in images.split(128) for r in classifier.read(chunk)]
                for name, images in (("renders", renders), ("round_trips", round_trips))}  # fmt: skip
    report: dict = {
        "vae": vae,
        "classifier": {name: shares(reading, specs) for name, reading in readings.items()},
    }
    print(json.dumps(report, indent=1))
    if args.guidance is None:
        report["guidance_sweep"] = choose_guidance(args, pipeline, classifier)
        args.guidance = float(max(report["guidance_sweep"], key=lambda key: report["guidance_sweep"][key]["all_six"]))
    report["fp16"], images = measure(args, pipeline, classifier, "fp16")
    save_samples(images, args.output / "samples.png")
    if not args.no_nf4:
        report["nf4_weights"] = round_weights_to_nf4(pipeline)
        report["nf4"], images = measure(args, pipeline, classifier, "nf4")
        save_samples(images, args.output / "samples_nf4.png")
    report["clip"] = clip_report(HERE / "clip", renders, specs)
    report["arguments"] = {name: value for name, value in vars(args).items() if name != "output"}
    report["versions"] = {name: version(name) for name in ("torch", "diffusers", "transformers", "bitsandbytes")}
    report["versions"]["python"] = platform.python_version()
    report["hardware"], report["seconds"] = hardware(args.device), round(time.monotonic() - started)
    (args.output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def save_samples(images: dict[str, Tensor], path: Path) -> None:
    """18 pictures from descriptions, 12 from breed names, 6 from descriptions of held-out breeds."""
    prompts = {
        "descriptions": description_prompts(18),
        "breed_names": breed_prompts(12),
        "held_out_descriptions": held_out_prompts()[::8],
    }
    stride = {"descriptions": 1, "breed_names": 1, "held_out_descriptions": 8}
    pictures = [
        (to_pil(image), prompt.text)
        for kind in prompts
        for image, prompt in zip(images[kind][:: stride[kind]], prompts[kind], strict=False)
    ]
    sample_grid(pictures).save(path, optimize=True)


if __name__ == "__main__":
    main(parse_args())
