#!/usr/bin/env python
"""The weight-tuning systems on the miniature: each learns breeds that the model never saw, and is judged by its pictures.

    python -m reproduction.weight_tuning                                   # the rows below, three breeds
    python -m reproduction.weight_tuning --grid --breeds furmix nedme      # 1/3, 1 and 3 times their rates, other breeds

A run is the trainer itself, in this process; then pictures of each prompt are drawn with the identifier, 25 steps, guidance
5, and one of each with the class word alone, which an untouched model fills with varied critters and a leaking one with the
subject (drift). The miniature's classifier reads them. Writes results.json, after each run, and sheet.png.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image

from miniature.classifier import AttributeClassifier, load_classifier
from miniature.critters import breed_by_name
from miniature.make_subject import make_subject
from zoodip.arguments import flags_for
from zoodip.errors import quiet_libraries
from zoodip.files import write_image, write_json
from zoodip.pictures import Drawer, picture_sheet
from zoodip.quantize import frozen_format
from zoodip.records import ROOT, environment
from zoodip.weight_tuning import Tuning, encode_texts, plain_prompts, prepare

PROMPTS = {  # those of DreamBooth's for live subjects that the miniature has words for, and what they ask for
    "a {} in the jungle": ("scene", "forest"), "a {} in the snow": ("scene", "snow"), "a {} on the beach": ("scene", "beach"),
    "a {} on a cobblestone street": ("scene", "cobblestone street"), "a {} on top of pink fabric": ("scene", "pink fabric"),
    "a {} on top of a wooden floor": ("scene", "wooden floor"), "a {} with a city in the background": ("scene", "city"),
    "a {} with a mountain in the background": ("scene", "mountain"),
    "a {} with a blue house in the background": ("scene", "blue house"), "a {} wearing a red hat": ("accessory", "red hat"),
    "a {} wearing a santa hat": ("accessory", "santa hat"), "a {} wearing a rainbow scarf": ("accessory", "rainbow scarf"),
    "a {} wearing pink glasses": ("accessory", "pink glasses"), "a {} wearing a yellow shirt": ("accessory", "yellow shirt"),
}  # fmt: skip
ON_SHEET = ("a {} in the snow", "a {} on the beach", "a {} wearing a santa hat", "a {} wearing pink glasses")

# {row: (trainer, class, its flags)}. The published rates are 3 to 20 times smaller: too few steps for so small a model.
ROWS: dict[str, tuple[str, str, dict]] = {
    "DreamBooth": ("dreambooth", "DreamBooth", dict(learning_rate=5e-5)),
    "QLoRA r = 2": ("qlora", "QLoRA", dict(learning_rate=2e-3)),
    "DiffuseKronA (4, 16)": ("diffusekrona", "DiffuseKronA", dict(learning_rate=2e-3, a1=4, a2=16)),
    "PEQA int8": ("tuneqdm", "TuneQDM", dict(learning_rate=1e-5, experts=1, no_scale_in=True)),
    "PEQA int4": ("tuneqdm", "TuneQDM", dict(learning_rate=1.7e-4, experts=1, no_scale_in=True, bits=4)),
    "TuneQDM int8, N = 1": ("tuneqdm", "TuneQDM", dict(learning_rate=1e-5, experts=1)),
    "TuneQDM int8, N = 4": ("tuneqdm", "TuneQDM", dict(learning_rate=1e-5, experts=4)),
    "S1 [500, 900), interval": ("tuneqdm", "TuneQDM", dict(learning_rate=1e-5, experts=1, train_interval=[500, 900])),
}
PUBLISHED = {
    "DreamBooth": 5e-6,
    "QLoRA r = 2": 1e-4,
    "DiffuseKronA (4, 16)": 5e-4,
    "PEQA int8": 3e-6,
    "TuneQDM int8, N = 4": 3e-6,
}
UNTUNED = "untuned"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--breeds", nargs="+", default=["vaxmo", "mexti", "runma"], help="held-out breeds")
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="systems")
    add("--grid", action="store_true", help="a third and three times the rates too")
    add("--published", action="store_true", help="the published rates instead")
    add("--captions", action="store_true", help="train with captions (--use_cc)")
    add("--images", type=int, default=2, help="pictures a prompt")
    add("--seed", type=int, default=0, help="of training")
    add("--output", type=Path, default=ROOT / "reproduction" / "weight_tuning", help="folder for results.json and sheet.png")
    return parser.parse_args(argv)


def trainer_flags(module, breed: str, folder: Path, own: dict, captions: bool, seed: int) -> dict:
    """The trainer's flags for one breed, its photographs and captions made in `folder`."""
    if not (folder / "cc.json").exists():
        write_json(folder / "cc.json", {breed: make_subject(breed, folder / breed)})
    argv = ["--pretrained_model_name_or_path", str(ROOT / "miniature" / "model"), "--train_data_dir", str(folder / breed)]
    argv += ["--class_word", "critter", "--cc_file", str(folder / "cc.json"), "--output_dir", str(folder / "run"), "--cpu"]
    argv += ["--eval_steps", "0", "--checkpointing_steps", "0", *(["--use_cc"] if captions else [])]
    flags = {**vars(module.parse_args(argv)), **own, "seed": seed}
    return flags


def draw(tuning: Tuning, prompts: list[str], images: int) -> list[list[Image.Image]]:
    """`images` pictures of each prompt by the model as it stands, 25 steps of PNDM, guidance 5, from the same noises."""
    folder, variant = tuning.outputs.inputs.folder, tuning.outputs.inputs.variant
    quantization = frozen_format(tuning.outputs.system.quantization)
    texts = plain_prompts(folder, variant, [*prompts, ""])
    states = encode_texts(folder, variant, texts, quantization, torch.float32, torch.device("cpu"))
    drawer = Drawer(tuning.model, folder, variant, quantization, 64, steps=25, guidance=5.0, batch_size=14, scheduler="pndm")
    pictures = list(drawer.draw_states(states, [(row, seed) for row in range(len(prompts)) for seed in range(images)]))
    return [pictures[first : first + images] for first in range(0, len(pictures), images)]


def shares(classifier: AttributeClassifier, breed: str, pictures: list[list[Image.Image]]) -> dict[str, float]:
    """Shares of pictures in which the classifier reads the breed's attributes, and the prompt's scene and accessory."""
    critter = breed_by_name(breed).critter
    names = [name for name in ("colour", "pattern", "pattern_colour", "ears", "shape", "tail", "eyes")
             if name != "pattern_colour" or critter.pattern != "plain"]  # fmt: skip
    right: dict[str, list[bool]] = {"attributes": [], "scene": [], "accessory": []}
    for (kind, wanted), row in zip(PROMPTS.values(), pictures, strict=True):
        images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1 for picture in row])
        for read in classifier.read(images):
            right["attributes"] += [read[name] == getattr(critter, name) for name in names]
            right[kind].append(read[kind] == wanted)
    return {name: mean(values) for name, values in right.items()}


def run_row(row: str, rate: float | None, breed: str, args: argparse.Namespace, classifier) -> tuple[dict, list[Image.Image]]:
    """Train one row on one breed and read its pictures -> (the record, the pictures for the sheet)."""
    script, class_name, own = ROWS[row if row != UNTUNED else "QLoRA r = 2"]
    module = importlib.import_module(f"trainers.{script}")
    own = own | ({} if rate is None else dict(learning_rate=rate))
    with tempfile.TemporaryDirectory() as folder:
        flags = trainer_flags(module, breed, Path(folder), own, args.captions, args.seed)
        system = getattr(module, class_name)
        tuning = prepare(system(**flags_for(system, flags)), flags, module.SETTINGS)
        steps = 0
        if row != UNTUNED:
            started = time.perf_counter()
            with tuning.run as run:
                for _ in run.steps(tuning.outputs):
                    run.note(*tuning.step())
            steps, seconds = run.progress.step, time.perf_counter() - started
    record = dict(row=row, breed=breed, captions=args.captions, seed=args.seed, steps=steps, **own)
    if row != UNTUNED:
        record |= dict(train_seconds=round(seconds, 1), smoothed_loss=round(run.progress.smoothed_loss, 5))
    with_word = draw(tuning, [prompt.replace("{}", "sks critter") for prompt in PROMPTS], args.images)
    alone = draw(tuning, [prompt.replace("{}", "critter") for prompt in PROMPTS], 1)
    record |= {name: round(value, 4) for name, value in shares(classifier, breed, with_word).items()}
    record["drift"] = round(shares(classifier, breed, alone)["attributes"], 4)
    chosen = [pictures[0] for prompt, pictures in zip(PROMPTS, with_word, strict=True) if prompt in ON_SHEET]
    return record, [*chosen, alone[1][0]]


def main(args: argparse.Namespace) -> None:
    quiet_libraries()
    classifier = load_classifier(ROOT / "miniature" / "classifier")
    args.output.mkdir(parents=True, exist_ok=True)
    records, blocks = [], []
    for breed in args.breeds:
        for row in [UNTUNED, *args.rows]:
            base = None if row == UNTUNED else PUBLISHED.get(row) if args.published else ROWS[row][2]["learning_rate"]
            if args.published and row != UNTUNED and base is None:
                continue
            for factor in (1 / 3, 1, 3) if args.grid and row != UNTUNED else (1,):
                record, pictures = run_row(row, None if base is None else base * factor, breed, args, classifier)
                records.append(record)
                blocks.append((pictures, f"{breed}: {row}" + (f", {record['learning_rate']:.2g}" if args.grid else "")))
                print(json.dumps(record), flush=True)
                write_json(args.output / "results.json", dict(environment(), records=records), indent=1)
                write_image(args.output / "sheet.png", picture_sheet(blocks, columns=len(args.breeds), cell=64))


if __name__ == "__main__":
    main(parse_args())
