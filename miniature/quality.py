"""Measures the miniature model: does a picture show what its caption says?

    python -m miniature.quality                    # quality.json, three grids (samples, samples_nf4, held_out), README's table

Pictures are generated from four kinds of prompts: descriptions of unseen critters without and with tail and eyes, names of
trained breeds, and full descriptions of the held-out breeds. The classifier from `train.py` reads them; its own
accuracy on fresh renders is reported beside the results. Everything is measured twice with the same noise: with
the weights as they are, and with all Linear and Conv2d weights of the UNet and text encoder (except the UNet's
`conv_in` and `conv_out`) rounded to NF4.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from miniature.classifier import AttributeClassifier, load_classifier
from miniature.drawing import render
from miniature.measures import Scorer, clip_image_report, clip_report, fresh_renders, generate, judge, shares, vae_report
from miniature.prompts import Prompt, breed_prompts, description_prompts, held_out_prompts, whole_description_prompts
from miniature.schedulers import SCHEDULERS
from zoodip.model import is_quantized
from zoodip.pictures import picture_sheet
from zoodip.quantize import pack_weight, quantized_layer
from zoodip.records import environment, table, write_between

HERE = Path(__file__).resolve().parent


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=384, help="pictures from descriptions (default: 384)")
    parser.add_argument("--breed-images", type=int, default=192, help="pictures from breed names (default: 192)")
    parser.add_argument("--steps", type=int, default=15, help="denoising steps (default: 15)")
    parser.add_argument("--guidance", type=float, default=None, help="guidance scale (default: the best of a sweep)")
    parser.add_argument("--sweep", type=float, nargs="+", default=[2.0, 3.5, 5.0], help="guidance scales to try")
    parser.add_argument("--sweep-images", type=int, default=64, help="pictures for each scale (default: 64)")
    parser.add_argument("--batch", type=int, default=32, help="pictures drawn at once (default: 32)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="compute in bf16: faster on CPUs that have it")
    parser.add_argument("--no-nf4", action="store_true", help="leave out the NF4 half")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="DPM-Solver++", help="scheduler (default: DPM-Solver++)")
    parser.add_argument("--model", type=Path, default=HERE / "model", help="Stable Diffusion folder (default: miniature/model)")
    parser.add_argument("--judges", type=Path, default=HERE, help="folder with classifier and clip (default: miniature)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for quality.json and the grids (default: miniature)")
    return parser.parse_args(argv)


def round_weights_to_nf4(pipeline: StableDiffusionPipeline) -> int:
    """Rounds the weights of UNet and text encoder to NF4 in place, exactly those that training packs; returns how many."""
    count = 0
    for part in ("unet", "text_encoder"):
        for name, layer in getattr(pipeline, part).named_modules():
            if is_quantized(part, name, layer):
                weight = layer.weight.data
                packed = quantized_layer(layer, pack_weight(weight, "nf4"))
                layer.weight.data = packed.dequantize(dtype=weight.dtype).contiguous()
                count += weight.numel()
    return count


def to_pil(image: Tensor) -> Image.Image:
    """float [3, H, W] in [-1, 1] to a picture."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


def choose_guidance(
    args: argparse.Namespace, pipeline: StableDiffusionPipeline, classifier: AttributeClassifier
) -> dict[str, dict[str, float]]:
    """`shares` for each guidance scale of the sweep."""
    # Prompts other than those of the results: the sweep must not choose on what is reported.
    prompts = description_prompts(args.images + args.sweep_images)[args.images :]
    table_of = {}
    for guidance in args.sweep:
        images = generate(pipeline, prompts, steps=args.steps, guidance=guidance, batch=args.batch, bf16=args.bf16,
                          label=f"g={guidance}")  # fmt: skip
        table_of[str(guidance)] = judge(classifier, images, prompts)
    return table_of


def prompts_by_kind(args: argparse.Namespace) -> dict[str, list[Prompt]]:
    return {
        "descriptions": description_prompts(args.images),
        "whole_descriptions": whole_description_prompts(args.images),
        "breed_names": breed_prompts(args.breed_images),
        "held_out_descriptions": held_out_prompts(),
    }


def measure(
    args: argparse.Namespace, pipeline: StableDiffusionPipeline, classifier: AttributeClassifier, label: str
) -> tuple[dict, dict[str, Tensor]]:
    """Generates and judges pictures for all kinds of prompts; returns the shares and the pictures by kind."""
    settings = {"steps": args.steps, "guidance": args.guidance, "batch": args.batch, "bf16": args.bf16}
    kinds = prompts_by_kind(args)
    images = {kind: generate(pipeline, prompts, label=f"{label}: {kind}", **settings) for kind, prompts in kinds.items()}
    return {kind: judge(classifier, images[kind], prompts) for kind, prompts in kinds.items()}, images


def save_samples(args: argparse.Namespace, images: dict[str, Tensor], path: Path) -> None:
    """Saves the first pictures of each kind (for held-out breeds, every eighth) with their prompts."""
    blocks = []
    for kind, prompts in prompts_by_kind(args).items():
        rows = range(0, len(prompts), 8)[:6] if kind.startswith("held_out") else range(min(len(prompts), 9))
        blocks += [([to_pil(images[kind][row])], prompts[row].text) for row in rows]
    picture_sheet(blocks, columns=6, cell=192).save(path, optimize=True)


def save_held_out(images: Tensor, path: Path) -> None:
    """Saves eight held-out breeds: a render of what the prompt describes, beside what was drawn."""
    prompts = held_out_prompts()
    blocks = [([render(prompts[row].spec, 192), to_pil(images[row])], prompts[row].text) for row in range(0, 32, 4)]
    picture_sheet(blocks, columns=4, cell=160, headings=["true", "drawn"]).save(path, optimize=True)


ROWS = {
    "scene": "scene (12)", "accessory": "accessory (6, “nothing” included)", "colour": "body colour (11)",
    "pattern": "pattern (4)", "pattern_colour": "colour of the pattern (11)", "ears": "ears (4)", "shape": "shape (4)",
    "tail": "tail (4)", "eyes": "eyes (4)", "body": "colour, pattern, ears and shape all right",
    "all_six": "these and scene and accessory",
}  # fmt: skip
# What a description does not word says nothing about the model.
UNWORDED = {("descriptions", "tail"), ("descriptions", "eyes")}


def quality_table(report: dict) -> str:
    """The report as Markdown, in per cent: the classifier's own accuracy, then every kind of prompt, unrounded and in NF4."""
    columns = {(name, name): values for name, values in report["classifier"].items()}
    for kind in report["fp16"]:
        columns[kind, f"{kind.replace('_', ' ')} ({report['counts'][kind]})"] = report["fp16"][kind]
        if "nf4" in report:
            columns[kind, f"{kind} NF4"] = report["nf4"][kind]
    heads = ["NF4" if head.endswith("NF4") else head.replace("_", " ") for _, head in columns]
    rows = [[text, *("-" if (kind, name) in UNWORDED else f"{100 * values[name]:.1f}" for (kind, _), values in columns.items())]
            for name, text in ROWS.items()]  # fmt: skip
    vae, image = report["vae"], report["clip_image"]
    scorer = {name: f"{100 * value:.1f} %" for name, value in report["clip"].items()}
    figures = [
        f"VAE, on 1,000 fresh renders: PSNR {vae['psnr_db']:.1f} dB; hue error {vae['mean_hue_error_degrees']:.1f} degrees on "
        f"average (chroma above 0.25), median {vae['median_hue_error_degrees']:.1f}.",
        f"Scorer, on the same: right scene of 12 {scorer['scene_of_12']}, right accessory of 6 {scorer['accessory_of_6']}, own "
        f"full description of 12 {scorer['description_of_12']}; an accessory seen where there is none "
        f"{scorer['nothing_taken_for_an_accessory']}.",
        f"Scale of CLIP-I, on the held-out breeds: {image['ceiling']:.3f} for true renders (ceiling), {image['floor']:.3f} for "
        "those of another breed (floor). A true render scores above one of another breed in the same scene in "
        f"{100 * image['ordered']:.1f} %.",
    ]
    return table(["", *heads], rows) + "\n" + "\n".join(f"- {line}" for line in figures) + "\n"


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    pipeline = StableDiffusionPipeline.from_pretrained(args.model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = SCHEDULERS[args.scheduler].from_config(pipeline.scheduler.config)
    classifier, scorer = load_classifier(args.judges / "classifier"), Scorer(args.judges / "clip")
    renders, specs = fresh_renders(1000)
    vae, round_trips = vae_report(pipeline, renders)
    readings = {name: [r for chunk in images.split(128) for r in classifier.read(chunk)]
                for name, images in (("renders", renders), ("round_trips", round_trips))}  # fmt: skip
    report: dict = {
        "vae": vae,
        "classifier": {name: shares(reading, specs) for name, reading in readings.items()},
        "clip": clip_report(scorer, renders, specs),
        "clip_image": clip_image_report(scorer),
    }
    print(json.dumps(report, indent=1))
    if args.guidance is None:
        report["guidance_sweep"] = choose_guidance(args, pipeline, classifier)
        args.guidance = float(max(report["guidance_sweep"], key=lambda key: report["guidance_sweep"][key]["all_six"]))
    args.output.mkdir(parents=True, exist_ok=True)
    report["fp16"], images = measure(args, pipeline, classifier, "fp16")
    save_samples(args, images, args.output / "samples.png")
    save_held_out(images["held_out_descriptions"], args.output / "held_out.png")
    if not args.no_nf4:
        report["nf4_weights"] = round_weights_to_nf4(pipeline)
        report["nf4"], images = measure(args, pipeline, classifier, "nf4")
        save_samples(args, images, args.output / "samples_nf4.png")
    report["counts"] = {kind: len(prompts) for kind, prompts in prompts_by_kind(args).items()}
    folders = ("output", "model", "judges")
    report["arguments"] = {name: value for name, value in vars(args).items() if name not in folders}
    report["environment"], report["seconds"] = environment(args.device), round(time.monotonic() - started)
    (args.output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    print(quality_table(report))
    if args.output == HERE:
        write_between(HERE / "README.md", "quality", quality_table(report))


if __name__ == "__main__":
    main(parse_args())
