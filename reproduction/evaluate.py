#!/usr/bin/env python
"""Scores of learned tokens or tuned weights: CLIP-T, CLIP-I, DINO and DINO_inter (see scores.py), as in the paper's Section 4.

    python -m reproduction.evaluate --embeddings results/learned_embeds.safetensors --references dataset/dog6 \\
        --prompts dataset/prompts_and_classes.txt --quantization int8
    python -m reproduction.evaluate --tuned results/qlora/pytorch_lora_weights.safetensors --references dataset/dog6 \\
        --prompts dataset/prompts_and_classes.txt

For every embedding, --images pictures of every prompt are drawn without the class word ("a <sks> in the jungle"), by the model
quantised as --quantization says (a line warns if the token was learned on another), and compared with the folder of references
at the same place in the list. For the output of a weight-tuning trainer, --tuned, they are drawn with the class word ("a sks dog
in the jungle"), by the model quantised as in training. A scorer that is not available is left out with a line that says so.
Pictures are kept under --output, one file per (what was learned, prompt, seed, settings), and never drawn twice. Writes
scores.csv and scores.json (per subject, and their mean) and a contact sheet per subject. The paper's setting is --images 5, the
default. Further flags are those of train_zoodip.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import train_zoodip
from reproduction.prompts import read_prompts
from reproduction.scores import (
    INTER_PROMPT,
    PictureCache,
    Token,
    Words,
    contact_sheet,
    digest_of,
    load_scorer,
    score_diversity,
    score_pictures,
)
from reproduction.worlds import CLIP, DINO
from zoodip.arguments import DEFAULT_WORD, flags_for, new_parser, settings_of
from zoodip.diffusion import FrozenModel, forbid_tf32, settle_flags
from zoodip.errors import InputError, notice, run_script
from zoodip.files import write_atomically, write_image, write_json
from zoodip.folder import resolve_model
from zoodip.model import SCHEDULERS, load_text_encoder, load_unet
from zoodip.pictures import Drawer
from zoodip.process import make_accelerator
from zoodip.prompts import read_embedding
from zoodip.quantize import DTYPES
from zoodip.records import environment, plain_arguments
from zoodip.run import move_aside
from zoodip.subject import find_images, open_image
from zoodip.tuned_files import load_tuned_unet, tuned_settings
from zoodip.tuned_model import TunedModel


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(f"{__doc__.splitlines()[0]} Flags of train_zoodip.py that name the model are taken too.")
    add = parser.add_argument
    add("--embeddings", type=Path, nargs="+", default=[], help="learned_embeds.safetensors of each subject")
    add("--tuned", type=Path, nargs="+", default=[], help="instead: each subject's file of tuned weights, or DreamBooth's folder")
    add("--references", type=Path, nargs="+", required=True, help="folder of each subject's pictures, in the same order")
    add("--prompts", type=Path, required=True, help="DreamBooth's prompts_and_classes.txt, or a list with one {} per line")
    add("--class_word", default=None, help="word for the subject in CLIP-T's text; default: from DreamBooth's file")
    add("--images", type=int, default=5, help="pictures per prompt")
    add("--inter_images", type=int, default=0, help=f"pictures of {INTER_PROMPT!r} for DINO_inter (50 in the paper); 0: none")
    add("--scheduler", default="pndm", choices=SCHEDULERS, help="scheduler to draw with; the default is the paper's")
    add("--inference_steps", type=int, default=50, help="denoising steps per picture")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance scale")
    add("--batch_size", type=int, default=4, help="pictures drawn at once")
    add("--clip", default=CLIP, help="CLIP scorer: hub name or folder")
    add("--dino", default=DINO, help="DINOv2 scorer: hub name or folder")
    add("--output", type=Path, default=Path("results/evaluation"), help="folder for pictures, scores and sheets")
    args, rest = parser.parse_known_args(argv)
    if bool(args.embeddings) == bool(args.tuned):
        parser.error("--embeddings or --tuned is required, one of them")
    if len(args.embeddings or args.tuned) != len(args.references):
        what = f"{len(args.embeddings)} embeddings" if args.embeddings else f"{len(args.tuned)} of --tuned"
        parser.error(f"--references: {len(args.references)} folders for {what}; give one for each")
    for name, least in (("images", 1), ("inter_images", 0), ("inference_steps", 1), ("batch_size", 1), ("guidance", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.inter_images == 1:
        parser.error("--inter_images must be 0 (none) or at least 2, as pairs of pictures are compared, got 1")
    args.zoodip = train_zoodip.parse_args(["--train_data_dir", "x", "--initializer_token", "x", *rest])
    return args


@dataclass
class Evaluated:
    """What is judged, and what it is judged by."""

    name: str
    what: torch.Tensor | Path  # a token [V, d], or tuned weights
    settings: dict  # of the run that learned it
    references: list[Image.Image]
    class_word: str
    prompts: list[str]


def read_learned(args: argparse.Namespace) -> list[Evaluated]:
    """The tokens or tuned weights named on the command line, read before a model is loaded. Raises InputError."""
    flags, learned = args.zoodip, []
    for path, folder in zip(args.embeddings or args.tuned, args.references, strict=True):
        if args.tuned:
            what, settings = path, tuned_settings(path)
        else:
            word = flags.placeholder_token if flags.placeholder_token != DEFAULT_WORD else None  # the file says its own
            what, settings = read_embedding(path, word)
            what = what.float()
        name = folder.resolve().name
        references = [open_image(path) for path in find_images(folder, "references")]
        learned.append(Evaluated(name, what, settings, references, *read_prompts(args.prompts, name, args.class_word)))
    if len({one.name for one in learned}) < len(learned):
        raise InputError("--references: two folders have the same name; name each after its subject")
    if len({one.what.shape for one in learned if isinstance(one.what, torch.Tensor)}) > 1:
        raise InputError("--embeddings: the tokens have different numbers of vectors; evaluate them in separate commands")
    return learned


def load_drawer(
    flags: argparse.Namespace,
    device: torch.device,
    steps: int,
    guidance: float,
    batch_size: int,
    scheduler: str,
    tuned: Path | None = None,
) -> Drawer:
    """A drawer with the model given by train_zoodip.py's `flags`, whose open defaults are filled in. Raises InputError."""
    name, revision = flags.pretrained_model_name_or_path, flags.revision
    folder, variant = resolve_model(name, revision, flags.variant, flags.model_config)  # another variant has another digest
    vars(flags).update(settle_flags(folder, variant, device, **flags_for(settle_flags, vars(flags))))
    dtype = DTYPES[flags.mixed_precision]
    forbid_tf32()  # as in training
    if tuned is None:
        options = (flags.variant, flags.quantization, dtype, device)
        model = FrozenModel(load_unet(folder, *options), load_text_encoder(folder, *options), torch.zeros(0, device=device))
    else:
        unet, flags.quantization = load_tuned_unet(folder, flags.variant, tuned, dtype, device)
        model = TunedModel(unet, torch.zeros(0, device=device), None)
    return Drawer(model, folder, flags.variant, flags.quantization, flags.resolution, steps, guidance, batch_size, scheduler)


def learned_words(one: Evaluated, flags: argparse.Namespace, drawer: Drawer) -> Token | Words:
    """What replaces {} in its prompts. Raises InputError if a token belongs to another model than the drawer's."""
    if isinstance(one.what, Path):
        weights = one.what / "unet" if (one.what / "unet").is_dir() else one.what
        return Words(
            digest_of(weights), one.settings["identifier"], one.settings["class_word"], flags.variant, flags.quantization
        )
    width, wanted = one.what.shape[1], drawer.text_encoder.config.hidden_size
    if width != wanted:
        raise InputError(f"--embeddings: the one of {one.name} has {width} numbers, the model's tokens have {wanted}; give the "
                         "model that it was learned on")  # fmt: skip
    return Token(one.what, flags.placeholder_token, flags.variant)


def write_scores(folder: Path, scores: dict[str, dict[str, float]], record: dict) -> dict[str, float]:
    """Write scores.json and scores.csv, per subject and with their mean, which is returned."""
    columns = list(dict.fromkeys(name for row in scores.values() for name in row))
    means = {name: float(np.mean([row[name] for row in scores.values()])) for name in columns}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subject", *columns])
    for subject, row in [*scores.items(), ("mean", means)]:
        writer.writerow([subject, *[f"{row[name]:.6f}" for name in columns]])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "scores.csv", text.getvalue().encode())
    write_json(folder / "scores.json", dict(**record, subjects=scores, mean=means), indent=1)
    return means


def main(args: argparse.Namespace) -> None:
    """Raises InputError."""
    flags, learned = args.zoodip, read_learned(args)
    device = make_accelerator(1, **flags_for(make_accelerator, vars(flags))).device
    clip, dino = load_scorer(args.clip, device), load_scorer(args.dino, device)
    drawer, scores, sheets = None, {}, {}
    for one in tqdm(learned, unit="subject"):
        if drawer is None or args.tuned:  # tokens share a model
            tuned = one.what if isinstance(one.what, Path) else None
            drawer = load_drawer(flags, device, args.inference_steps, args.guidance, args.batch_size, args.scheduler, tuned)
        learned_with, drawn_with = one.settings.get("quantization", flags.quantization), flags.quantization
        if learned_with != drawn_with and not args.tuned:  # tuned weights bring their own
            notice(f"{one.name}: was learned with --quantization {learned_with}, its pictures are drawn with {drawn_with}")
        cache = PictureCache(drawer, args.output / one.name, learned_words(one, flags, drawer),
                             [flags.quantization, flags.mixed_precision, args.scheduler])  # fmt: skip
        pictures = cache.pictures(one.prompts, range(args.images))
        texts = [prompt.replace("{}", one.class_word) for prompt in one.prompts]
        scores[one.name] = score_pictures(pictures, one.references, texts, clip, dino)
        if args.inter_images:
            (row,) = cache.pictures([INTER_PROMPT], range(args.inter_images))
            scores[one.name].update(score_diversity(row, clip, dino))
        sheets[args.output / f"{one.name}.png"] = contact_sheet(one.references, pictures, one.prompts)
    written = [args.output / "scores.json", args.output / "scores.csv", *sheets]
    move_aside(args.output, [path for path in written if path.exists()])
    for path, sheet in sheets.items():
        write_image(path, sheet)
    own = {name: value for name, value in vars(args).items() if name != "zoodip"}
    arguments = plain_arguments(own) | {"zoodip": settings_of(vars(flags), train_zoodip.SETTINGS)}
    means = write_scores(args.output, scores, dict(arguments=arguments, **environment(device)))
    print(f"{args.output / 'scores.csv'}: mean of {len(scores)} subject{'s' * (len(scores) != 1)}: "
          + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
