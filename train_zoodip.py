#!/usr/bin/env python
"""ZOODiP: teach a 4-bit, frozen Stable Diffusion one new word from a handful of photographs, by forward passes only.

Implements Seo, Jeong, Lee, Chun, "Efficient Personalization of Quantized Diffusion Model without Backpropagation"
(CVPR 2025, arXiv 2503.14868). Equations, algorithms and tables cited below are that paper's.

One training step, in the order of this file:

    image, flip, caption, timestep, noise  ->  n + 1 candidate tokens  ->  one batched UNet forward  ->  n + 1 losses
    ->  zeroth-order gradient (Eq. 3)  ->  Subspace Gradient projection (Eqs. 4-8)  ->  Adam  ->  the updated token

Everything but the token (3 KB) is quantised and frozen. Run it:

    python train_zoodip.py --train_data_dir dataset/dog6 --initializer_token dog --use_cc            # one GPU
    python train_zoodip.py --train_data_dir dataset/dog6 --initializer_token dog --use_cc \\
        --mixed_precision bf16                                                                      # a CPU
    accelerate launch --num_processes 3 train_zoodip.py ...              # the candidates of a step over three GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import errno
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # JPEG covers MPO. By content: EPS would go to Ghostscript
MAX_IMAGE_SIDE = 16384  # pixels; a header that promises more is refused before a byte of it is decoded
MAX_IMAGE_PIXELS = 128_000_000  # 0.4 GB as RGB; the largest ordinary photographs have 108 million
MAX_LAYERS = 100  # in a row; a damaged configuration that promises more would keep us building for hours
NUM_TRAIN_TIMESTEPS = 1000  # of every Stable Diffusion 1.x and 2.x

# The templates of the textual-inversion paper (Gal et al. 2022), used where no captions are given.
OBJECT_TEMPLATES = [
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
]  # fmt: skip
STYLE_TEMPLATES = [
    "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
    "the painting in the style of {}", "a clean painting in the style of {}", "a dirty painting in the style of {}",
    "a dark painting in the style of {}", "a picture in the style of {}", "a cool painting in the style of {}",
    "a close-up painting in the style of {}", "a bright painting in the style of {}",
    "a cropped painting in the style of {}", "a good painting in the style of {}",
    "a close-up painting in the style of {}", "a rendition in the style of {}", "a nice painting in the style of {}",
    "a small painting in the style of {}", "a weird painting in the style of {}", "a large painting in the style of {}",
]  # fmt: skip

CURVE_COLUMNS = ["step", "unet_forwards", "loss", "eval_loss", "token_norm"]  # of training_log.csv

# The settings that decide what is learned. A checkpoint records them, and resuming under others is refused.
SETTINGS = (
    "pretrained_model_name_or_path revision variant quantization mixed_precision placeholder_token initializer_token "
    "num_vectors learnable_property use_cc resolution center_crop n mu tau nu t_min t_max timestep_sampling estimator "
    "learning_rate train_batch_size seed"
).split()


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: the value, the place and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class OneLineArgumentParser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineArgumentParser(
        description="Learn one token embedding for a subject by forward passes through a quantised Stable Diffusion.",
        formatter_class=HelpFormatter,
    )

    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--pretrained_model_name_or_path", default=DEFAULT_MODEL, metavar="PATH_OR_NAME",
        help="folder in diffusers format, or hub name, of a Stable Diffusion 1.x or 2.x")
    add("--revision", default=None, help="branch, tag or commit of the hub repository")
    add("--variant", default=None, help="weight file variant, for example fp16 for *.fp16.safetensors")
    add("--quantization", default="nf4", choices=["nf4", "int8", "none"],
        help="storage of every Linear and Conv2d weight: 4-bit NormalFloat, 8-bit rows, or 16/32-bit")
    add("--mixed_precision", default=None, choices=["fp16", "bf16", "fp32"],
        help="precision of activations; the default is fp16 on a GPU and fp32 on a CPU")
    add("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    add("--compile", action="store_true",
        help="torch.compile the UNet: minutes at the start, needs a C++ compiler (CPU) or Triton (GPU)")
    add("--save_quantized", default=None, metavar="DIR",
        help="write the model, quantised, to DIR, to be given as --pretrained_model_name_or_path; without --train_data_dir "
        "that is all")

    group = parser.add_argument_group("token")
    add = group.add_argument
    add("--placeholder_token", default="<sks>", help="the new word, in <...>, lower case")
    add("--initializer_token", default=None, help="word(s) whose embedding the token starts from: the subject's class")
    add("--num_vectors", type=int, default=1, help="embedding vectors of the token, all of them trained")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_data_dir", default=None, help="folder of images of the subject")
    add("--use_cc", action=argparse.BooleanOptionalAction, default=False,
        help="use the comprehensive captions of --cc_file instead of templates")
    add("--cc_file", default="cc.json", help="captions: {folder name: {file name: caption with one {}}}")
    add("--learnable_property", default="object", choices=["object", "style"], help="which templates, without --use_cc")
    add("--resolution", type=int, default=None, help="side of the training images in pixels; default: the model's own")
    add("--center_crop", action="store_true", help="crop the middle square instead of squeezing the image into one")

    group = parser.add_argument_group("method (defaults are the paper's)")
    add = group.add_argument
    add("--n", type=int, default=2, help="random directions per gradient estimate")
    add("--mu", type=float, default=None,
        help="length of a perturbation along each direction; the default is 1e-3, and 1e-2 where activations are bf16")
    add("--tau", type=int, default=128, help="tokens in the Subspace Gradient buffer = steps between its refreshes")
    add("--nu", type=float, default=1e-3, help="share of the trajectory's variance to project out; 0: no projection")
    add("--t_min", type=int, default=500, help="smallest timestep drawn by puts (T_L)")
    add("--t_max", type=int, default=900, help="end of the timesteps drawn by puts (T_U), itself not drawn")
    add("--timestep_sampling", default="puts", choices=["puts", "uniform", "snr"],
        help="puts: uniform over [t_min, t_max); uniform: over all timesteps; snr: more the lower the SNR (TextBoost)")
    add("--estimator", default="rge", choices=["rge", "spsa", "one_point"], help="zeroth-order gradient estimator")
    add("--learning_rate", type=float, default=5e-3, help="of Adam (betas .9, .999, epsilon 1e-3), constant")
    add("--train_batch_size", type=int, default=1, help="images per step; all candidates share them")
    add("--max_train_steps", type=int, default=30000, help="steps to train")
    add("--candidates_per_forward", type=int, default=None,
        help="candidates per UNet forward; default: all at once. Less needs less memory and changes only rounding")
    add("--seed", type=int, default=0, help="seed of every random draw")

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", default="results", help="folder for the embedding, checkpoints, curves and pictures")
    add("--save_steps", type=int, default=0, help="steps between learned_embeds-steps-N.safetensors; 0: only at the end")
    add("--checkpointing_steps", type=int, default=500,
        help="steps between checkpoints, and one at the end; 0: only when interrupted")
    add("--checkpoints_total_limit", type=int, default=2, help="checkpoints kept, the newest; 0: all")
    add("--resume_from_checkpoint", default=None, metavar="PATH_OR_latest", help="checkpoint file to continue from")
    add("--eval_steps", type=int, default=250, help="steps between evaluations of the fixed set; 0: never")
    add("--num_eval_samples", type=int, default=16, help="(image, timestep, noise) triples in the fixed evaluation set")
    add("--validation_prompt", default=None, help="prompt with the token (or {}) to draw pictures of while training")
    add("--validation_steps", type=int, default=0, help="steps between those pictures; 0: only at the end")
    add("--num_validation_images", type=int, default=4, help="pictures a time")
    add("--validation_guidance", type=float, default=7.5, help="classifier-free guidance scale of those pictures")
    add("--report_to", default="none", choices=["none", "tensorboard", "wandb"], help="experiment tracker")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (`sys.argv` when `argv` is None); exits with code 2 and one line on an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_args(args)
    except InputError as error:
        parser.error(str(error))
    return args


def is_text(text: str) -> bool:
    """Whether a string is characters throughout: JSON can hold halves of them, which no tokenizer takes."""
    return not re.search("[\ud800-\udfff]", text)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can be refused without opening a file. Raises InputError."""

    def require(condition: bool, flag: str, rule: str):
        if not condition:
            raise InputError(f"--{flag} {rule}, got {getattr(args, flag)!r}")

    if args.save_quantized is not None:
        require(args.quantization != "none", "quantization", "must be nf4 or int8 with --save_quantized")
        if args.train_data_dir is None:
            return
    for flag in ("train_data_dir", "initializer_token"):
        require(getattr(args, flag) is not None, flag, "is required")
    require(args.n >= 1, "n", "must be at least 1")
    require(args.mu is None or 0 < args.mu < math.inf, "mu", "must be a positive number, for example 1e-3")
    require(args.tau >= 2, "tau", "must be at least 2 (a variance needs two tokens)")
    require(0 <= args.nu < 1, "nu", "must be in [0, 1)")
    require(0 <= args.t_min < NUM_TRAIN_TIMESTEPS, "t_min", f"must be in [0, {NUM_TRAIN_TIMESTEPS})")
    require(args.t_max <= NUM_TRAIN_TIMESTEPS, "t_max", f"must be at most {NUM_TRAIN_TIMESTEPS}")
    require(args.t_min < args.t_max, "t_min", f"must be below --t_max {args.t_max}")
    require(0 < args.learning_rate < 1e37, "learning_rate", "must be a positive number, for example 5e-3")  # fits fp32
    require(args.resolution is None or (args.resolution >= 8 and args.resolution % 8 == 0), "resolution",
            "must be a positive multiple of 8")
    require(args.candidates_per_forward is None or args.candidates_per_forward >= 1, "candidates_per_forward",
            "must be at least 1")
    for flag in ("num_vectors", "train_batch_size", "max_train_steps", "num_eval_samples", "num_validation_images"):
        require(getattr(args, flag) >= 1, flag, "must be at least 1")
    for flag in ("save_steps", "checkpointing_steps", "checkpoints_total_limit", "eval_steps", "validation_steps"):
        require(getattr(args, flag) >= 0, flag, "must not be negative")
    require(1 <= args.validation_guidance < math.inf, "validation_guidance", "must be at least 1 (no guidance)")
    require(0 <= args.seed < 2**63, "seed", "must be in [0, 2^63)")

    token = args.placeholder_token
    advice = f"choose a word in angle brackets, for example <{re.sub('[^a-z0-9]', '', token.lower()) or 'sks'}>"
    require(len(token) > 0 and not re.search(r"[\s{}]", token), "placeholder_token",
            f"must be one word without spaces or braces ({advice})")
    require(not (token[0].isalnum() or token[-1].isalnum()), "placeholder_token",
            f"must not begin or end with a letter or digit, as it would fire inside other words ({advice})")
    require(token == token.lower(), "placeholder_token",
            f"must be lower case, as the tokenizer lower-cases every prompt ({advice})")
    require(args.initializer_token.strip() != "", "initializer_token", "must be a word, for example dog")
    for flag in ("placeholder_token", "initializer_token", "validation_prompt"):
        require(is_text(getattr(args, flag) or ""), flag, "must be text in UTF-8")
    if args.validation_prompt is not None:
        require(token in args.validation_prompt or "{}" in args.validation_prompt, "validation_prompt",
                f"must contain the token {token} or {{}}")
    require(args.validation_steps == 0 or args.validation_prompt is not None, "validation_steps",
            "needs a --validation_prompt")


UNFINISHED: list[Path] = []  # folders that are no use before they are complete


def stop_at_once(number: int, frame) -> None:
    """SIGINT or SIGTERM outside the steps: what is to be saved has been saved, so say how to go on, and end.

    Without unwinding: an exception raised in the middle of an import may be swallowed or printed with a traceback.
    """
    for folder in UNFINISHED:
        shutil.rmtree(folder, ignore_errors=True)
    print("interrupted outside the training steps; the same command with --resume_from_checkpoint latest goes on from the last "
          "checkpoint, or starts anew where there is none", file=sys.stderr, flush=True)
    os._exit(128 + number)


# torch takes a second to import: --help and wrong arguments are answered before.
if __name__ == "__main__":
    ARGS = parse_args()
    # on Linux CPUs: large tensors on huge pages, which saves a tenth of the time (benchmarks/NOTES.md); read when torch starts
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # idle threads sleep, not spin: beside another busy program a small model is otherwise three times slower, or stands still
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_at_once)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn
from tqdm import tqdm

# diffusers, transformers, accelerate and bitsandbytes take longer still: the functions that need them import them.

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# ---------------------------------------------------------------------------------------------------------------------
# The subject: images and captions
# ---------------------------------------------------------------------------------------------------------------------


def find_images(folder: str | Path) -> list[Path]:
    """The image files of `folder` in name order; hidden, other and nested entries are skipped with one line.

    Raises InputError where the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--train_data_dir: there is no folder {str(folder)!r}; give a folder of images (dataset/README.md "
                         "says how to get the paper's)")
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    images = [path for path in entries
              if path.is_file() and not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES]
    skipped = [path.name for path in entries if path not in images]
    heic = any(name.lower().endswith((".heic", ".heif")) for name in skipped)
    hint = " (convert HEIC to JPEG to use it)" if heic else ""
    if skipped and images:
        print(f"{folder}: skipped {len(skipped)} that are not images: {', '.join(skipped[:5])}"
              f"{' ...' if len(skipped) > 5 else ''}{hint}", file=sys.stderr)
    if not images:
        raise InputError(f"--train_data_dir: no images in {str(folder)!r}; put JPEG, PNG or WebP files there{hint}")
    return images


def open_image(path: str | Path) -> Image.Image:
    """An image file as upright 8-bit RGB: EXIF orientation applied, transparency on white, first frame of several.

    Raises InputError naming the file where it cannot be read or is absurdly large.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > MAX_IMAGE_SIDE or image.width * image.height > MAX_IMAGE_PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} pixels is too large; make its longer side "
                                 f"at most {MAX_IMAGE_SIDE} and the whole at most {MAX_IMAGE_PIXELS // 10**6} million pixels")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit greyscale: Pillow's convert() clips it
                values = np.asarray(image).astype(np.float64)
                if not np.isfinite(values).all():
                    raise ValueError("it holds NaN or Inf")
                scale = 257.0 if image.mode.startswith("I;16") or values.max() > 255 else 1.0
                image = Image.fromarray((values / scale).clip(0, 255).round().astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # each decoder raises its own on a damaged file: struct.error, TypeError, MemoryError ...
        raise InputError(f"{path}: cannot be read as an image ({error}); remove it or save it anew") from error


def to_square(image: Image.Image, resolution: int, center_crop: bool) -> torch.Tensor:
    """RGB image -> [2, 3, resolution, resolution] in [-1, 1]: the picture and its mirror image."""
    if center_crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0
    return torch.stack([pixels, pixels.flip(-1)])


def load_captions(cc_file: str | Path, folder: str | Path, images: list[Path]) -> list[str]:
    """The caption of each image from `cc_file`. Raises InputError that prints the JSON to add where one is missing."""
    name = Path(folder).resolve().name
    try:
        captions = json.loads(Path(cc_file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        captions = {}
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5000 digits
        raise InputError(f"--cc_file {cc_file}: cannot be read as JSON ({error})") from error
    known = captions.get(name, {}) if isinstance(captions, dict) else {}
    known = known if isinstance(known, dict) else {}
    missing = [path.name for path in images if path.name not in known]
    if missing:
        example = json.dumps({name: {file: "a photo of {} ..." for file in missing}}, ensure_ascii=False)
        raise InputError(f"--use_cc: {cc_file} has no caption for {len(missing)} of the {len(images)} images of "
                         f"{name!r}; add {example} with everything in each picture but the subject, or drop --use_cc")
    for path in images:
        caption = known[path.name]
        if not isinstance(caption, str) or caption.count("{}") != 1 or not is_text(caption):
            example = json.dumps({name: {path.name: "a photo of {} ..."}}, ensure_ascii=False)
            raise InputError(f"--use_cc: the caption of {name}/{path.name} in {cc_file} must be a text with exactly "
                             f"one {{}} for the subject, got {caption!r:.200}; write it like {example}")
    return [known[path.name] for path in images]


@dataclass
class Subject:
    """What is known of the subject before any model is loaded."""

    paths: list[Path]
    captions: list[list[str]]  # per image, the texts (with one {}) to choose from
    fingerprint: str  # SHA-256 of pictures and captions


def load_subject(args: argparse.Namespace) -> Subject:
    """Read and check the images and captions the flags name. Raises InputError."""
    paths = find_images(args.train_data_dir)
    if args.use_cc:
        captions = [[caption] for caption in load_captions(args.cc_file, args.train_data_dir, paths)]
    else:
        captions = [OBJECT_TEMPLATES if args.learnable_property == "object" else STYLE_TEMPLATES] * len(paths)
    digest = hashlib.sha256(json.dumps(captions).encode())
    for path in paths:  # decoded now to find a broken one early, and again when encoded: a photograph can be 100 MB
        digest.update(open_image(path).tobytes())
    return Subject(paths, captions, digest.hexdigest())


# ---------------------------------------------------------------------------------------------------------------------
# Loading: a diffusers folder, read tensor by tensor into quantised layers
# ---------------------------------------------------------------------------------------------------------------------

WEIGHT_NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def find_model_folder(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a model, downloaded from the hub if need be. Raises InputError that says how to get it."""
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
            raise InputError(f"--pretrained_model_name_or_path: there is no folder {name!r}; give one in diffusers "
                             "format (with model_index.json) or a hub name")
        folder = download_model(name, revision, variant)
    for needed in ("model_index.json", "tokenizer", "scheduler/scheduler_config.json", "unet/config.json",
                   "vae/config.json", "text_encoder/config.json"):
        if not (folder / needed).exists():
            raise InputError(f"{folder}: {needed} is missing; a Stable Diffusion folder in diffusers format holds "
                             "model_index.json, tokenizer, scheduler, text_encoder, unet and vae")
    for part in WEIGHT_NAMES:
        find_weights(folder, part, variant)
    if (folder / "text_encoder_2").exists():
        raise InputError(f"{folder}: has two text encoders (SDXL); give a Stable Diffusion 1.x or 2.x")
    channels = read_json(folder / "unet" / "config.json").get("in_channels", 4)
    if channels != read_json(folder / "vae" / "config.json").get("latent_channels", 4):
        raise InputError(f"{folder}: the UNet takes {channels} channels (an inpainting or depth model?); give a plain "
                         "text-to-image Stable Diffusion")
    return folder


def read_json(path: Path) -> dict:
    """A JSON object of the model folder. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); download the folder again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object; download the folder again")
    return content


def config_number(path: Path, key: str, default: int) -> int:
    """A count in a configuration of the model folder. Raises InputError where it is none."""
    value = read_json(path).get(key, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{path}: {key} must be a positive whole number, got {value!r}; download the folder again")
    return value


def out_of_memory(error: Exception) -> bool:
    """Whether there was not enough memory: on a CPU torch says so in a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def from_folder(path: Path, load):
    """`load(path)` of a library, with whatever it raises on a damaged folder as one InputError."""
    try:
        return load(path)
    except InputError:
        raise
    except Exception as error:  # each class of each library raises its own
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be loaded ({reason}); download the folder again") from error


def download_model(name: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download

    suffix = f".{variant}" if variant else ""
    patterns = ["model_index.json", "tokenizer/*", "scheduler/*"]
    for part, stem in WEIGHT_NAMES.items():
        patterns += [f"{part}/config.json", f"{part}/{stem}{suffix}.safetensors",
                     f"{part}/{stem}{suffix}-*-of-*.safetensors", f"{part}/{stem}.safetensors.index{suffix}.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, spelling: many classes, one remedy
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--pretrained_model_name_or_path: {name!r} is neither a folder here nor to be had from the hub ({reason}); "
            f"where there is network run `hf download {name} --local-dir sd-model`, copy that folder here, give its path"
        ) from None


def find_weights(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors file, or shards, of one part of the model. Raises InputError; a pickle is never an answer."""
    stem = WEIGHT_NAMES[part] + (f".{variant}" if variant else "")
    whole = folder / part / f"{stem}.safetensors"
    index = folder / part / f"{WEIGHT_NAMES[part]}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
        shards = [folder / part / Path(name).name for name in sorted(names)]
        missing = [path.name for path in shards if not path.is_file()]
        if shards and not missing:
            return shards
        raise InputError(f"{folder / part}: the shards {', '.join(missing)} are missing; download the folder again")
    others = sorted(path.name for path in (folder / part).glob("*") if path.suffix in (".safetensors", ".bin", ".ckpt"))
    remedy = ("only safetensors is read, never a pickle: save the model with save_pretrained(safe_serialization=True)"
              if others and not any(name.endswith(".safetensors") for name in others)
              else "set or drop --variant" if others else "download the folder again")
    raise InputError(f"{folder / part}: {stem}.safetensors is missing (found: {', '.join(others) or 'nothing'}); "
                     f"{remedy}")


def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in the files, one at a time.

    The file is opened anew for each tensor: its memory map, and with it the pages that count as this process's
    memory, is then dropped together with the tensor.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                names = list(handle.keys())
            for name in names:
                with safe_open(path, framework="pt") as handle:
                    tensor = handle.get_tensor(name)
                yield name, tensor
        except (SafetensorError, OSError) as error:
            raise not_safetensors(path, error) from error


def is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save's or pickle's do, whatever its name. (safetensors begins with a length.)"""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        return False
    return start == b"PK\3\4" or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def why_unreadable(path: Path, error: Exception) -> str:
    """What to say of one of our own files that safetensors cannot read."""
    return "it is a pickle, which could run code, and is not read" if is_pickle(path) else str(error)


def not_safetensors(path: Path, error: Exception) -> InputError:
    """What to say of a weight file that safetensors cannot read."""
    if is_pickle(path):
        return InputError(f"{path}: is a pickle under another name, which could run code, and is not read; save the model with "
                          "save_pretrained(safe_serialization=True)")
    return InputError(f"{path}: is not a whole safetensors file ({error}); download it again")


def pack_weight(weight: torch.Tensor, quantization: str) -> dict[str, torch.Tensor]:
    """The tensors that stand for a Linear or Conv2d weight, as `QuantizedLayer` holds and --save_quantized writes them.

    nf4:  bitsandbytes NormalFloat4, blocks of 64, absmax itself quantised (Dettmers et al. 2023). The weight is packed
          flat, because the CPU kernel is slow or wrong for some shapes of more than one dimension, in slices, because
          quantising takes ten times a slice's memory, and a convolution's with the input channels last, as
          the convolution kernels read it.
    int8: one scale per output row (absolute maximum / 127), as in the paper's INT8 rows.
    """
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    rows = weight.reshape(len(weight), -1)
    if quantization == "int8":
        scale = rows.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
        return dict(int8=(rows / scale).round().to(torch.int8), scale=scale)
    from bitsandbytes import functional as bnb

    slices = [bnb.quantize_4bit(part.float(), blocksize=64, quant_type="nf4") for part in rows.flatten().split(1 << 21)]
    absmax = torch.cat([state.absmax for _, state in slices])
    offset = absmax.mean()
    quantized_absmax, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    return dict(nf4=torch.cat([packed.flatten() for packed, _ in slices]), absmax=quantized_absmax,
                absmax_scale=state.absmax, absmax_offset=offset)


@cache
def nf4_cpu_function(dtype: torch.dtype):
    """The C function behind bitsandbytes' operator on a CPU, or None where this build of the library has none.

    Reaching it through the torch operator takes longer than a small layer takes to be dequantised: for the miniature a
    tenth of a step. Arguments: packed, scales, output (addresses); block size, 1, number of weights.
    """
    from bitsandbytes.cextension import lib

    suffix = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    function = getattr(getattr(lib, "_lib", None), f"cdequantize_blockwise_cpu_nf4_{suffix}", None)
    if function is not None:
        function.argtypes, function.restype = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3, None
    return function


class QuantizedLayer(nn.Module):
    """A frozen Linear or Conv2d that holds its weight as `pack_weight` packed it, and dequantises it at the moment of use.

    A weight of more than AT_ONCE numbers is dequantised and applied in slices of output channels. Raises ValueError where
    the packed tensors are not of the layer's size, of another type or not finite.
    """

    AT_ONCE = 1 << 24

    def __init__(self, layer: nn.Linear | nn.Conv2d, packed: dict[str, torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self.shape, self.bias, self.dtype = layer.weight.shape, layer.bias, dtype
        self.quantization = "nf4" if "nf4" in packed else "int8"
        self.packed_shape = rows, columns = self.shape[0], math.prod(self.shape[1:])
        blocks = math.ceil(rows * columns / 64)
        expected = dict(int8=(rows * columns, torch.int8), scale=(rows, torch.float32))
        if self.quantization == "nf4":
            expected = dict(nf4=(math.ceil(rows * columns / 2), torch.uint8), absmax=(blocks, torch.uint8),
                            absmax_scale=(math.ceil(blocks / 256), torch.float32), absmax_offset=(1, torch.float32))
        found = {name: (tensor.numel(), tensor.dtype) for name, tensor in packed.items()}
        if found != expected:
            raise ValueError(f"{found} instead of {expected}")
        if not all(torch.isfinite(tensor).all() for tensor in packed.values() if tensor.is_floating_point()):
            raise ValueError("its scales are NaN or Inf")
        for name in expected:
            self.register_buffer(name, packed[name])
        if self.quantization == "nf4":
            from bitsandbytes.functional import create_dynamic_map

            self.register_buffer("absmax_code", create_dynamic_map().to(self.nf4.device))
            if blocks <= 1 << 14:  # up to 1 M weights: unpacking the scales as well would take half of the time
                self.absmax = self.block_scales()
                del self.absmax_scale, self.absmax_offset, self.absmax_code
        convolution = isinstance(layer, nn.Conv2d)
        self.convolution = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
                                groups=layer.groups) if convolution else None
        divisible = columns % 64 == 0 and not (convolution and layer.groups > 1)
        self.rows_at_once = max(1, self.AT_ONCE // columns) if rows * columns > self.AT_ONCE and divisible else rows

    def _apply(self, fn, recurse: bool = True):
        """Moves go through, casts do not: the scales stay fp32."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def block_scales(self) -> torch.Tensor:
        """absmax of every block of 64, fp32."""
        if self.absmax.dtype == torch.float32:
            return self.absmax
        operator = torch.ops.bitsandbytes.dequantize_blockwise.default
        return operator(self.absmax, self.absmax_scale, self.absmax_code, 256, torch.float32) + self.absmax_offset

    def dequantize(self, first: int = 0, last: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Output rows first .. last of the weight, in the layer's own shape (a convolution's in channels_last order)."""
        rows, columns = self.packed_shape
        last, dtype = rows if last is None else last, dtype or self.dtype
        shape = (last - first, *self.shape[1:])
        if self.quantization == "int8":
            return self.unpacked((self.int8[first:last] * self.scale[first:last]).to(dtype), shape)
        packed, scales = self.nf4, self.block_scales()
        if last - first < rows:
            packed = packed[first * columns // 2 : last * columns // 2]
            scales = scales[first * columns // 64 : last * columns // 64]
        count = shape[0] * columns
        direct = packed.device.type == "cpu" and count % 2 == 0 and not torch.compiler.is_compiling()
        function = nf4_cpu_function(dtype) if direct else None
        if function is None:
            operator = torch.ops.bitsandbytes.dequantize_4bit.default
            return self.unpacked(operator(packed, scales, 64, "nf4", [1, count], dtype), shape)
        order = torch.channels_last if self.convolution else torch.contiguous_format
        weight = torch.empty(shape, dtype=dtype, memory_format=order)
        function(packed.data_ptr(), scales.data_ptr(), weight.data_ptr(), 64, 1, count)
        return weight

    def unpacked(self, flat: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Numbers in the packed order -> the layer's own shape."""
        if not self.convolution:
            return flat.view(shape)
        rows, channels, height, width = shape
        return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)

    def product(self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.convolution is None:
            return F.linear(inputs, weight, bias)
        return F.conv2d(inputs, weight, bias, **self.convolution)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = self.shape[0]
        if self.rows_at_once == rows:
            return self.product(inputs, self.dequantize(dtype=inputs.dtype), self.bias)
        outputs = []
        for first in range(0, rows, self.rows_at_once):
            last = min(first + self.rows_at_once, rows)
            bias = None if self.bias is None else self.bias[first:last]
            outputs.append(self.product(inputs, self.dequantize(first, last, inputs.dtype), bias))
        return torch.cat(outputs, dim=-1 if self.convolution is None else 1)


def load_frozen(folder: Path, part: str, variant: str | None, quantization: str, dtype: torch.dtype,
                device: torch.device | str, skip: tuple[str, ...] = ()) -> nn.Module:
    """UNet, text encoder or VAE of a diffusers folder, frozen, in eval mode, Linear and Conv2d quantised.

    Tensors are read, quantised and dropped one by one, so that the 16-bit model never exists whole. A parameter whose
    name begins with an entry of `skip` is left empty. The UNet's conv_in and conv_out
    (0.003 % of SD v1.5's weights) stay in `dtype`: quantising them costs as much loss as all the rest
    (benchmarks/README.md). Raises InputError where file and configuration do not match.
    """
    model = build_model(folder, part)
    packed_layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(find_weights(folder, part, variant)):
        name = modern_name(name, part)
        module_name, _, leaf = name.rpartition(".")
        if name.endswith("position_ids"):
            continue  # a constant that older files hold
        if module_name.endswith(".weight"):  # written by --save_quantized
            pieces = packed_layers.setdefault(module_name.removesuffix(".weight"), {})
            if not name.startswith(skip):
                pieces[leaf] = tensor.to(device, copy=True)
            continue
        module = owner_of(name, model, folder / part)
        if name.startswith(skip):
            setattr(module, leaf, nn.Parameter(torch.empty(0), requires_grad=False))
            continue
        tensor = fitted(tensor, name, module, folder / part).to(device)
        if quantization != "none" and leaf == "weight" and is_quantized(part, module_name, module):
            model.set_submodule(module_name, QuantizedLayer(module, pack_weight(tensor, quantization), dtype))
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False))
    for module_name, packed in packed_layers.items():
        try:
            module = model.get_submodule(module_name)
            if not packed:  # of a module in `skip`
                module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
                continue
            model.set_submodule(module_name, QuantizedLayer(module, packed, dtype))
        except (AttributeError, KeyError, ValueError) as error:
            raise InputError(f"{folder / part}: the packed weight of {module_name} does not fit config.json ({error}); "
                             "write the folder again with --save_quantized") from None
        if quantization not in packed:
            raise InputError(f"{folder / part}: the weights are packed as {'nf4' if 'nf4' in packed else 'int8'}; use "
                             f"that as --quantization, or the model they were made from")
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InputError(f"{folder / part}: the weights lack {missing[0]!r} and {len(missing) - 1} more that "
                         "config.json describes; download the folder again")
    return model.to(device).eval().requires_grad_(False)


def owner_of(name: str, model: nn.Module, where: Path) -> nn.Module:
    """The module that the parameter `name` belongs to. Raises InputError where the model has no such parameter."""
    module_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        module.get_parameter(leaf)
    except AttributeError:
        raise InputError(f"{where}: the weights hold {name!r}, which config.json does not describe; configuration and weights "
                         "are of different models") from None
    return module


def fitted(tensor: torch.Tensor, name: str, module: nn.Module, where: Path) -> torch.Tensor:
    """A parameter of a weight file in the shape that its module has for it. Raises InputError where it is not such numbers."""
    expected = module.get_parameter(name.rpartition(".")[2]).shape
    if tensor.shape == (*expected, 1, 1):
        tensor = tensor.view(expected)  # older VAEs keep attention matrices as 1 x 1 convolutions
    if tensor.shape != expected:
        raise InputError(f"{where}: {name} is {tuple(tensor.shape)}, config.json says {tuple(expected)}; configuration and "
                         "weights are of different models")
    if not tensor.is_floating_point() or not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise InputError(f"{where}: {name} ({tensor.dtype}) is not finite floating-point numbers; download the folder again")
    return tensor


def is_quantized(part: str, name: str, module: nn.Module) -> bool:
    """Whether a module is one of those whose weight is packed: every Linear and Conv2d but the UNet's first and last."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) and not (part == "unet" and name in ("conv_in", "conv_out"))


def packed_tensors(folder: Path, part: str, variant: str | None, quantization: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one part of a model with the weights packed: what `load_frozen` makes of them, to be stored.

    As they are stay the VAE's encoder, which training uses unpacked, norms, biases, and what is packed already.
    """
    model = build_model(folder, part)
    for name, tensor in read_tensors(find_weights(folder, part, variant)):
        modern = modern_name(name, part)
        module_name, _, leaf = modern.rpartition(".")
        if module_name.endswith(".weight") or leaf == "position_ids":  # packed already, or a constant of older files
            yield name, tensor.clone()
            continue
        module = owner_of(modern, model, folder / part)
        tensor = fitted(tensor, modern, module, folder / part)
        encoder = part == "vae" and module_name.startswith(("encoder.", "quant_conv"))
        if leaf == "weight" and not encoder and is_quantized(part, module_name, module):
            for piece, packed in pack_weight(tensor, quantization).items():
                yield f"{name}.{piece}", packed
        else:
            yield name, tensor.clone()


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Safetensors files of about 64 MB and their index, so that a model is never in memory whole."""
    shard, weight_map = {}, {}

    def write() -> None:
        name = f"{stem}-{len(set(weight_map.values())) + 1:05}.safetensors"
        write_atomically(folder / name, serialize(shard, {"format": "pt"}))
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor
        if sum(each.nbytes for each in shard.values()) >= 64 << 20:
            write()
    if shard:
        write()
    index = json.dumps(dict(metadata={}, weight_map=weight_map), indent=1)
    write_atomically(folder / f"{stem}.safetensors.index.json", index.encode())


def save_quantized(args: argparse.Namespace) -> Path:
    """Write the model, packed, to the new folder --save_quantized. Loading either gives the same bits. Raises InputError."""
    target = Path(args.save_quantized)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"--save_quantized {str(target)!r}: is for one process, not {os.environ['WORLD_SIZE']}; start it with "
                         "python, and then train from that folder")
    if target.exists():
        raise InputError(f"--save_quantized: {str(target)!r} exists; give it as --pretrained_model_name_or_path, or write to "
                         "a new folder")
    folder = find_model_folder(args.pretrained_model_name_or_path, args.revision, args.variant)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    UNFINISHED.append(unfinished)
    try:
        for part in WEIGHT_NAMES:
            (unfinished / part).mkdir(parents=True)
            shutil.copy(folder / part / "config.json", unfinished / part)
            tensors = packed_tensors(folder, part, args.variant, args.quantization)
            write_shards(unfinished / part, WEIGHT_NAMES[part], tqdm(tensors, desc=f"packing {part}", unit="tensor"))
        shutil.copy(folder / "model_index.json", unfinished)
        for other in ("tokenizer", "scheduler"):
            shutil.copytree(folder / other, unfinished / other)
        unfinished.rename(target)
    except OSError as error:
        raise InputError(f"--save_quantized {str(target)!r}: cannot be written ({error.strerror}); choose another") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        UNFINISHED.remove(unfinished)
    size = sum(path.stat().st_size for path in target.rglob("*"))
    print(f"{target}: the model with {args.quantization} weights, {size / 1e9:.2f} GB")
    return target


def model_digest(folder: Path, variant: str | None) -> str:
    """SHA-256 over size, beginning and end of the weight files: enough to tell a retrained model, and quick."""
    digest = hashlib.sha256()
    for path in [path for part in WEIGHT_NAMES for path in find_weights(folder, part, variant)]:
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read() + str(size).encode())
    return digest.hexdigest()


def build_model(folder: Path, part: str) -> nn.Module:
    """The module that config.json describes. Its parameters are on the meta device: they have shapes and no memory."""
    from accelerate import init_empty_weights

    config = read_json(folder / part / "config.json")
    for key in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers"):
        counts = config[key] if isinstance(config.get(key), list) else [config.get(key)]
        if any(isinstance(count, int) and count > MAX_LAYERS for count in counts):
            raise InputError(f"{folder / part / 'config.json'}: {key} {config[key]!r} is of no Stable Diffusion; download the "
                             "folder again")
    if part == "text_encoder":
        from transformers import CLIPTextConfig, CLIPTextModel

        with init_empty_weights():
            return from_folder(folder / part, lambda path: CLIPTextModel(CLIPTextConfig.from_pretrained(path)))
    from diffusers import AutoencoderKL, UNet2DConditionModel

    model_class = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    with init_empty_weights():
        return from_folder(folder / part, lambda path: model_class.from_config(model_class.load_config(path)))


def modern_name(name: str, part: str) -> str:
    """A tensor's name in the installed libraries, from the name it was published under."""
    if part == "text_encoder":
        return name.removeprefix("text_model.")
    if part == "vae":
        for old, new in ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"):
            name = name.replace(f".{old}.", f".{new}.")
    return name


def load_pipeline(name: str, quantization: str = "nf4", dtype: torch.dtype = torch.float32,
                  device: torch.device | str = "cpu", revision: str | None = None, variant: str | None = None):
    """A `StableDiffusionPipeline` whose UNet, text encoder and VAE are quantised exactly as in training.

    `load_textual_inversion` works on it as on any other. Raises InputError where `name` cannot be loaded.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    folder = find_model_folder(name, revision, variant)
    parts = {part: load_frozen(folder, part, variant, quantization, dtype, device) for part in WEIGHT_NAMES}
    return StableDiffusionPipeline(
        **parts, tokenizer=from_folder(folder / "tokenizer", CLIPTokenizer.from_pretrained),
        scheduler=from_folder(folder / "scheduler", PNDMScheduler.from_pretrained),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


@torch.no_grad()
def encode_images(vae: nn.Module, paths: list[Path], resolution: int, center_crop: bool) -> torch.Tensor:
    """Image files -> [N, 2 (flips), 2 (mean, standard deviation), 4, h, w]: scaled latent distributions, fp32, on the CPU.

    The VAE is needed no more after this; every step still samples its own latent (z = vae(x) * scaling_factor, Eq. 1).
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    device = next(vae.parameters()).device
    vae.to(memory_format=torch.channels_last)  # the convolutions' own order: otherwise each copies its input and output
    latents = []
    for path in tqdm(paths, desc="encoding", unit="image", leave=False):
        flips = []
        for picture in to_square(open_image(path), resolution, center_crop):  # one at a time: they are the largest of the run
            moments = encoder_moments(vae, picture[None].to(device, vae.dtype, memory_format=torch.channels_last))
            distribution = DiagonalGaussianDistribution(moments)
            flips.append(torch.cat([distribution.mean, distribution.std]).float().cpu() * vae.config.scaling_factor)
        latents.append(torch.stack(flips).contiguous())
    return torch.stack(latents)


def encoder_moments(vae: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What vae.encode computes, [B, 8, h, w], with at most three activations of full size at a time.

    At 512 pixels one is 0.13 GB; the encoder's own forward holds six of them.
    """
    encoder = vae.encoder
    hidden = encoder.conv_in(hidden)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            shortcut = hidden if resnet.conv_shortcut is None else resnet.conv_shortcut(hidden)
            for layer in (resnet.norm1, resnet.nonlinearity, resnet.conv1, resnet.norm2, resnet.nonlinearity, resnet.conv2):
                hidden = layer(hidden)
            hidden = hidden.add_(shortcut)
        for downsampler in block.downsamplers or []:
            hidden = downsampler(hidden)
    hidden = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(hidden))))
    return hidden if vae.quant_conv is None else vae.quant_conv(hidden)


# ---------------------------------------------------------------------------------------------------------------------
# The token and the prompts it stands in
# ---------------------------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, placeholder_token: str, num_vectors: int):
    """The model's CLIPTokenizer with the placeholder added. Raises InputError where the token is taken."""
    from transformers import CLIPTokenizer

    tokenizer = from_folder(folder / "tokenizer", CLIPTokenizer.from_pretrained)
    vocabulary = tokenizer.get_vocab()
    names = [placeholder_token] + [f"{placeholder_token}_{i}" for i in range(1, num_vectors)]  # as diffusers names them
    taken = [word for name in names for word in (name, name + "</w>") if word in vocabulary]
    if taken:
        raise InputError(f"--placeholder_token: {taken[0]!r} is already a word of this tokenizer; choose another, for "
                         f"example <my-{re.sub('[^a-z0-9]', '', placeholder_token.lower()) or 'token'}>")
    tokenizer.add_tokens(placeholder_token)
    return tokenizer


def initializer_ids(tokenizer, initializer_token: str) -> list[int]:
    """Token ids of the initializer. Raises InputError where it is none the tokenizer knows."""
    ids = tokenizer(initializer_token, add_special_tokens=False).input_ids
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    if not ids or special & set(ids):
        raise InputError(f"--initializer_token: {initializer_token!r} is unknown to this tokenizer; use a plain word "
                         "for the subject's class, for example dog")
    return ids


def tokenize(tokenizer, text: str, placeholder_id: int, num_vectors: int, length: int) -> list[int]:
    """`length` token ids; the placeholder's become placeholder_id .. placeholder_id + num_vectors - 1.

    Raises InputError where the text is too long, rather than cut away the end of a caption unseen.
    """
    words = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = []
    for word in words:
        ids += range(placeholder_id, placeholder_id + num_vectors) if word == placeholder_id else [word]
    if len(ids) > length - 2:
        raise InputError(f"the caption {text!r:.500} is {len(ids)} tokens long, the text encoder takes {length - 2}; "
                         "shorten it")
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def read_embedding_rows(folder: Path, variant: str | None, ids: list[int]) -> torch.Tensor:
    """Rows `ids` of the token-embedding table, [len(ids), d] fp32, without reading the table (76 MB for SD v1.5)."""
    for path in find_weights(folder, "text_encoder", variant):
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():
                    if name.endswith("embeddings.token_embedding.weight"):
                        table = handle.get_slice(name)
                        shape = table.get_shape()
                        if len(shape) != 2 or max(ids) >= shape[0]:
                            raise InputError(f"{path}: {name} is {tuple(shape)}, the tokenizer needs row {max(ids)}; tokenizer "
                                             "and weights are of different models")
                        rows = torch.cat([table[i : i + 1] for i in ids])
                        if not rows.is_floating_point() or not torch.isfinite(rows.float()).all():
                            raise InputError(f"{path}: {name} ({rows.dtype}) is not finite floating-point numbers; download the "
                                             "folder again")
                        return rows.float()
        except (SafetensorError, OSError) as error:
            raise not_safetensors(path, error) from error
    raise InputError(f"{folder / 'text_encoder'}: the weights lack embeddings.token_embedding.weight; download them "
                     "again")


@dataclass
class Prompts:
    """Tokenised texts over a table of just the embedding rows they use, followed by the placeholder's vectors."""

    ids: torch.Tensor  # [P, L] int64 row numbers; len(rows) + v is vector v of the placeholder
    rows: torch.Tensor  # [R, d] fp32


def build_prompts(tokenizer, folder: Path, variant: str | None, texts: list[str], placeholder_token: str,
                  num_vectors: int) -> Prompts:
    """Tokenise `texts` (each with {} or the placeholder) and read the rows they need. Raises InputError."""
    placeholder_id = tokenizer.convert_tokens_to_ids(placeholder_token)
    length = config_number(folder / "text_encoder" / "config.json", "max_position_embeddings", 77)
    ids = torch.tensor([
        tokenize(tokenizer, text.replace("{}", placeholder_token), placeholder_id, num_vectors, length) for text in texts
    ])
    ordinary = ids[ids < placeholder_id].unique()  # sorted
    vectors = torch.arange(num_vectors) + placeholder_id
    local_ids = torch.searchsorted(torch.cat([ordinary, vectors]), ids)
    return Prompts(local_ids, read_embedding_rows(folder, variant, ordinary.tolist()))


def initial_token(rows: torch.Tensor, num_vectors: int) -> torch.Tensor:
    """Embeddings of the initializer's pieces [pieces, d] -> theta [num_vectors, d]: one each, or their mean."""
    return rows.clone() if len(rows) == num_vectors else rows.mean(0, keepdim=True).repeat(num_vectors, 1)


def encode_prompts(text_encoder: nn.Module, rows: torch.Tensor, ids: torch.Tensor,
                   tokens: torch.Tensor) -> torch.Tensor:
    """Text-encoder states of B prompts under each of C candidate tokens.

    rows [R, d], ids [B, L] as in `Prompts`, tokens [C, num_vectors, d] -> [C * B, L, d]. A pure function of `tokens`:
    no table is written, and gradients flow where they are wanted.
    """
    num_candidates, num_vectors, width = tokens.shape
    table = torch.cat([rows, tokens.reshape(-1, width)]).to(text_encoder.embeddings.position_embedding.weight.dtype)
    shift = num_vectors * torch.arange(num_candidates, device=ids.device)[:, None, None]
    ids = torch.where(ids >= len(rows), ids + shift, ids).flatten(0, 1)  # [C * B, L]
    override = {"embeddings.token_embedding.weight": table}
    return torch.func.functional_call(text_encoder, override, (ids,)).last_hidden_state


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def sample_timesteps(kind: str, batch_size: int, generator: torch.Generator, t_min: int, t_max: int,
                     alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """[batch_size] timesteps. `puts` is Partial Uniform Timestep Sampling (Eq. 9): uniform over [t_min, t_max).

    `uniform` covers all timesteps. `snr` draws t with probability proportional to log SNR(0) - log SNR(t), so that
    it grows as the signal-to-noise ratio falls (TextBoost, Park et al., arXiv 2409.08248; Table 5).
    """
    if kind == "puts":
        return torch.randint(t_min, t_max, (batch_size,), generator=generator)
    if kind == "uniform":
        return torch.randint(0, len(alphas_cumprod), (batch_size,), generator=generator)
    log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod)).double()
    return torch.multinomial(log_snr.max() - log_snr, batch_size, replacement=True, generator=generator)


@dataclass
class Batch:
    """What the candidates of one step share: common random numbers."""

    noisy_latents: torch.Tensor  # [B, 4, h, w]
    target: torch.Tensor  # [B, 4, h, w], the noise or the velocity
    timesteps: torch.Tensor  # [B]
    prompt_ids: torch.Tensor  # [B, L]

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def noise_batch(latents: torch.Tensor, timesteps: torch.Tensor, prompt_ids: torch.Tensor, scheduler,
                generator: torch.Generator) -> Batch:
    """Sample latents and noise and mix them at `timesteps` (Eq. 1). latents: [B, 2 (mean, std), 4, h, w]."""
    mean, std = latents.unbind(1)
    z = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z, noise, timesteps) if velocity else noise
    return Batch(scheduler.add_noise(z, noise, timesteps), target, timesteps, prompt_ids)


def draw_batch(latents: torch.Tensor, choices: list[list[int]], prompts: Prompts, scheduler, args: argparse.Namespace,
               generator: torch.Generator) -> Batch:
    """Draw image, flip, caption, timestep and noise of one step, all from `generator`.

    latents: [N, 2, 2, 4, h, w] of `encode_images`; choices: per image, the rows of `prompts.ids` that describe it.
    """
    size = args.train_batch_size
    images = torch.randint(len(latents), (size,), generator=generator)
    flips = torch.randint(2, (size,), generator=generator)
    draws = torch.rand(size, generator=generator)
    captions = [choices[i][int(u * len(choices[i]))] for i, u in zip(images.tolist(), draws.tolist(), strict=True)]
    timesteps = sample_timesteps(args.timestep_sampling, size, generator, args.t_min, args.t_max, scheduler.alphas_cumprod)
    return noise_batch(latents[images, flips], timesteps, prompts.ids[captions], scheduler, generator)


def evaluation_batches(latents: torch.Tensor, choices: list[list[int]], prompts: Prompts, scheduler,
                       args: argparse.Namespace) -> list[Batch]:
    """The fixed set of (image, timestep, noise) triples that learning curves are judged on.

    The same for every seed and sampler: timesteps spread evenly over [t_min, t_max), images and flips in turn.
    """
    generator = torch.Generator().manual_seed(0)
    count = args.num_eval_samples
    timesteps = (args.t_min + (torch.arange(count) + 0.5) * (args.t_max - args.t_min) / count).long()
    timesteps = timesteps[torch.randperm(count, generator=generator)]  # else image and timestep would go together
    batches = []
    for k in range(count):
        image, flip = k % len(latents), (k // len(latents)) % 2
        caption = choices[image][int(torch.randint(len(choices[image]), (1,), generator=generator))]
        batches.append(noise_batch(latents[image, flip][None], timesteps[k, None], prompts.ids[caption][None], scheduler,
                                   generator))
    return batches


def modules_before_text(unet: nn.Module) -> list[nn.Module]:
    """The layers of a UNet up to its first cross-attention: what they compute does not depend on the prompt."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if unet._compiled_call_impl is not None:  # hooks that come and go would have it compiled anew every step
        return []
    modules = [unet.conv_in]
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [])
        if not attentions:
            modules += [*block.resnets, *(block.downsamplers or [])]
            continue
        modules.append(block.resnets[0])
        first = attentions[0]
        if isinstance(first, Transformer2DModel) and not first.transformer_blocks[0].only_cross_attention:
            modules += [first.norm, first.proj_in, first.transformer_blocks[0].norm1, first.transformer_blocks[0].attn1]
        break
    return modules


@contextmanager
def computed_once(modules: list[nn.Module], count: int):
    """Within: the modules compute the first of `count` equal parts of their batch, and repeat it (5 % of SD v1.5's UNet).

    Only for modules whose inputs are equal in all the parts.
    """

    def first_part(module, args, kwargs):
        def cut(value):
            return value[: len(value) // count] if isinstance(value, torch.Tensor) else value

        return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}

    def repeated(module, args, output):
        return torch.cat([output] * count)

    hooks = []
    if count > 1:
        for module in modules:
            hooks += [module.register_forward_pre_hook(first_part, with_kwargs=True), module.register_forward_hook(repeated)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def denoising_losses(unet: nn.Module, text_encoder: nn.Module, rows: torch.Tensor, batch: Batch,
                     tokens: torch.Tensor) -> torch.Tensor:
    """L(theta) of Eq. 1 for C candidate tokens [C, num_vectors, d] on one batch -> [C], accumulated in fp32.

    One UNet forward over C * B latents: candidates differ only in their prompt, so the weights are dequantised once.
    """
    count = len(tokens)
    states = encode_prompts(text_encoder, rows, batch.prompt_ids, tokens)  # [C * B, L, d]
    dtype = unet.conv_in.weight.dtype
    noisy_latents = batch.noisy_latents.to(dtype).repeat(count, 1, 1, 1)  # [C * B, 4, h, w]
    noisy_latents = noisy_latents.to(memory_format=torch.channels_last)  # as the weights are packed
    timesteps = batch.timesteps.repeat(count)  # [C * B]
    with computed_once(modules_before_text(unet), count):
        prediction = unet(noisy_latents, timesteps, states.to(dtype), return_dict=False)[0].float()
    error = (prediction.unflatten(0, (count, -1)) - batch.target.float()).square()  # [C, B, 4, h, w]
    return error.flatten(1).mean(1)


def candidate_offsets(estimator: str, directions: torch.Tensor) -> torch.Tensor:
    """Where the loss is evaluated around theta, in units of mu. directions [n (one_point: n + 1), V, d] -> [C, V, d].

    rge: theta, then theta + mu u_i (n + 1 forwards). spsa: theta + mu u_i, then theta - mu u_i (2n).
    one_point: theta + mu u_i for n + 1 directions (n + 1).
    """
    if estimator == "rge":
        return torch.cat([torch.zeros_like(directions[:1]), directions])
    if estimator == "spsa":
        return torch.cat([directions, -directions])
    return directions


def num_directions(estimator: str, n: int) -> int:
    return n + 1 if estimator == "one_point" else n


def zeroth_order_gradient(estimator: str, directions: torch.Tensor, losses: torch.Tensor, mu: float,
                          effective_dim: int) -> torch.Tensor:
    """g = 1 / (n s) sum_i p_i u_i (Eq. 3), from the losses at `candidate_offsets` [C] -> [V, d].

    rge: p_i = (L(theta + mu u_i) - L(theta)) / mu. spsa: p_i = (L(theta + mu u_i) - L(theta - mu u_i)) / (2 mu).
    one_point: p_i = (L(theta + mu u_{i+1}) - L(theta + mu u_i)) / mu (Table S4), which here multiplies u_{i+1}: with
    u_i the expectation would be minus the gradient.
    s = sqrt((effective_dim + n - 1) / n) is the expected ratio of the estimate's norm to the true gradient's; dividing by
    it keeps Adam's large epsilon (1e-3) in proportion.
    """
    if estimator == "rge":
        slopes = (losses[1:] - losses[0]) / mu
    elif estimator == "spsa":
        plus, minus = losses.chunk(2)
        slopes = (plus - minus) / (2 * mu)
    else:
        slopes = (losses[1:] - losses[:-1]) / mu
        directions = directions[1:]
    n = len(directions)
    scale = math.sqrt((effective_dim + n - 1) / n)
    return torch.einsum("i,ivd->vd", slopes, directions) / (n * scale)


def low_variance_directions(history: torch.Tensor, nu: float) -> torch.Tensor:
    """Directions in which the tokens of `history` [tau, D] hardly moved -> orthonormal rows [k, D], k < tau (Eqs. 4-7).

    Columns are standardised; of the right singular vectors those are returned that follow the smallest number whose
    variances sum to more than 1 - nu of the whole. The last one is of variance 0, as centred data have rank tau - 1; Eq. 7
    includes it. Singular values in fp64: their squares span twelve decades.
    """
    history = history.double()
    centred = history - history.mean(0)
    deviation = centred.square().mean(0).sqrt()
    standardised = centred / torch.where(deviation > 0, deviation, 1.0)
    _, singular_values, right_vectors = torch.linalg.svd(standardised, full_matrices=False)
    explained = singular_values.square().cumsum(0)
    if explained[-1] == 0:  # the token never moved: no direction is known
        return history.new_zeros(0, history.shape[1]).float()
    enough = explained / explained[-1] > 1 - nu
    kept = int(enough.float().argmax()) + 1 if enough.any() else len(enough)  # i* of Eq. 6, 1-based
    return right_vectors[kept:].float().contiguous()  # as a checkpoint restores it: a layout changes the last bit


class SubspaceGradient:
    """Algorithm 2: every tau steps, find the directions along which the token hardly moved; then keep out of them."""

    def __init__(self, tau: int, nu: float, dim: int):
        self.tau, self.nu = tau, nu
        self.token_history = torch.zeros(0, dim)  # [< tau, D], D = num_vectors * d
        self.projection = torch.zeros(0, dim)  # [k, D], orthonormal rows

    def project(self, gradient: torch.Tensor) -> torch.Tensor:
        """g - g P^T P (Eq. 8)."""
        flat = gradient.flatten()
        return (flat - (flat @ self.projection.T) @ self.projection).view_as(gradient)

    def append(self, token: torch.Tensor) -> None:
        """Remember an updated token; with tau of them, refresh the projection and start over."""
        self.token_history = torch.cat([self.token_history, token.detach().reshape(1, -1)])
        if len(self.token_history) == self.tau:
            self.projection = low_variance_directions(self.token_history, self.nu)
            self.token_history = self.token_history[:0]


class ZOAdam:
    """theta and everything that moves it, fp32 on the CPU (a few KB): Adam with epsilon 1e-3 on the projected estimate."""

    def __init__(self, token: torch.Tensor, args: argparse.Namespace):
        self.args = args
        self.theta = nn.Parameter(token.detach().clone().float())  # [V, d]
        self.optimizer = torch.optim.Adam([self.theta], lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-3)
        self.subspace = SubspaceGradient(args.tau, args.nu, self.theta.numel())
        self.skipped_in_a_row = 0
        self.norm_limit = 10 * self.norm()

    def norm(self) -> float:
        """Mean length of the token's vectors."""
        return self.theta.detach().norm(dim=1).mean().item()

    def candidates(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the directions [n, V, d] and place the candidates [C, V, d]: new tensors, theta is never perturbed."""
        count = num_directions(self.args.estimator, self.args.n)
        directions = torch.randn(count, *self.theta.shape, generator=generator)
        return directions, self.theta.detach() + self.args.mu * candidate_offsets(self.args.estimator, directions)

    def step(self, directions: torch.Tensor, losses: torch.Tensor) -> bool:
        """Update theta from the candidates' losses [C]; a step with a loss that is not finite is skipped (False)."""
        if not torch.isfinite(losses).all():
            self.skipped_in_a_row += 1
            return False
        self.skipped_in_a_row = 0
        effective_dim = self.theta.numel() - len(self.subspace.projection)
        gradient = zeroth_order_gradient(self.args.estimator, directions, losses, self.args.mu, effective_dim)
        self.theta.grad = self.subspace.project(gradient)
        self.optimizer.step()
        self.subspace.append(self.theta)
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Saving and resuming: whole files or none, safetensors only
# ---------------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: `path` is the old file or the whole new one. Raises InputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a file system that has become read-only this fails too
            temporary.unlink(missing_ok=True)
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another folder"
        raise InputError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error


def write_image(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG")
    write_atomically(path, content.getvalue())


def serialize(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with a sorted header: the library's order of metadata differs from process to process."""
    content = safetensors_bytes({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def prepare_output(args: argparse.Namespace, fresh: bool = True):
    """Make the output folder, lock it, prove that it takes a file; before a fresh run set an earlier one's results aside.

    Returns the lock, to be kept until the run ends. Raises InputError.
    """
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {args.output_dir!r} cannot be made ({error.strerror}); choose another") from error
    lock = lock_output(folder)
    write_atomically(folder / ".probe", bytes(4 << 20))  # the size of the largest checkpoints
    (folder / ".probe").unlink()
    try:
        set_aside(args, folder, fresh)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be moved or removed ({error.strerror}); choose another "
                         "--output_dir") from error
    return lock


def set_aside(args: argparse.Namespace, folder: Path, fresh: bool) -> None:
    """Remove what a killed run left half written, and before a fresh run move an earlier one's results to previous-N."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    patterns = ("learned_embeds*.safetensors", "checkpoint-*.safetensors", "training_log.csv", "run.json",
                "validation-*.png", f"{file_stem(args.placeholder_token)}.safetensors")
    earlier = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if earlier and fresh:
        number = 1
        while (folder / f"previous-{number}").exists():
            number += 1
        (folder / f"previous-{number}").mkdir()
        for path in earlier:
            path.rename(folder / f"previous-{number}" / path.name)
        print(f"{folder}: moved the {len(earlier)} files of an earlier run to {folder / f'previous-{number}'}", file=sys.stderr)


def lock_output(folder: Path):
    """Hold the output folder for this process alone, until it ends. Raises InputError where another run holds it."""
    try:
        lock = open(folder / ".lock", "a")
    except OSError as error:
        raise InputError(f"--output_dir {str(folder)!r} cannot be written ({error.strerror}); choose another") from error
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"--output_dir {str(folder)!r} is in use by another run; choose another") from None
    return lock


def file_stem(token: str) -> str:
    """The token as a file name: AUTOMATIC1111 and ComfyUI use the file's name as the word for the prompt."""
    stem = re.sub(r"[^a-z0-9_-]", "", token.lower()) or "token"
    return f"token-{stem}" if stem.startswith(("checkpoint-", "learned_embeds")) else stem  # our own names


def run_settings(args: argparse.Namespace) -> dict:
    """The settings that decide what is learned; of a local model only the folder's name, which gives nothing away."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    if Path(args.pretrained_model_name_or_path).is_dir():
        settings["pretrained_model_name_or_path"] = Path(args.pretrained_model_name_or_path).resolve().name
    return settings


def package_versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "safetensors")
    return {name: version(name) for name in names}


def embedding_metadata(args: argparse.Namespace, step: int, prediction_type: str, width: int) -> dict[str, str]:
    """Header of the embedding file (ModelSpec 1.0.0 and our own keys). The same run gives the same header."""
    architecture = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(width, "stable-diffusion-other")
    settings = run_settings(args)
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/textual-inversion",
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{args.placeholder_token} ({args.initializer_token})",
        "modelspec.trigger_phrase": args.placeholder_token,
        "modelspec.resolution": f"{args.resolution}x{args.resolution}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "zoodip.base_model": str(settings["pretrained_model_name_or_path"]),
        "zoodip.step": str(step),
        "zoodip.settings": json.dumps(settings, sort_keys=True),
        "zoodip.versions": json.dumps(package_versions(), sort_keys=True),
    }


def save_embedding(path: Path, args: argparse.Namespace, theta: torch.Tensor, metadata: dict[str, str]) -> None:
    """One tensor, key = the placeholder token, [num_vectors, d] fp32: what diffusers, A1111 and ComfyUI read."""
    write_atomically(path, serialize({args.placeholder_token: theta}, metadata))


@dataclass
class Progress:
    """Where a run stands: with ZOAdam and the generator, all that a checkpoint holds."""

    step: int = 0
    forwards: int = 0  # UNet forwards of one batch, evaluation not counted
    skipped: int = 0  # steps whose loss was not finite
    smoothed_loss: float | None = None  # exponential mean of the unperturbed loss, horizon about 100 steps
    curve: list[dict] | None = None  # rows of training_log.csv


def state_digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all that a checkpoint holds: a flipped bit in a number is still a number, and no other check sees it."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def check_state(state: dict[str, torch.Tensor], progress: Progress, skipped_in_a_row: int, shape: torch.Size, tau: int) -> None:
    """Raise ValueError where a checkpoint's values are none that a run of this shape can have written."""
    dim = shape.numel()
    most = {"subspace.token_history": tau - 1, "subspace.projection": min(tau, dim) - 1}  # rows
    for name in ("theta", "adam.step", "adam.exp_avg", "adam.exp_avg_sq", *most):
        tensor = state[name]
        expected = (len(tensor), dim) if name in most else () if name == "adam.step" else tuple(shape)
        if tensor.dtype != torch.float32 or tensor.shape != expected or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite 32-bit numbers of shape {expected}")
        if len(tensor.shape) == 2 and len(tensor) > most.get(name, len(tensor)):
            raise ValueError(f"{name} has {len(tensor)} rows, more than {most[name]}")
    if state["adam.step"] < 0 or (state["adam.exp_avg_sq"] < 0).any():
        raise ValueError("adam.step or adam.exp_avg_sq is negative")
    counts = (progress.step, progress.forwards, progress.skipped, skipped_in_a_row)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"step, forwards or skipped is no count: {counts}")
    numbers = [progress.smoothed_loss, *(value for row in progress.curve for value in row.values())]
    if not all(value is None or type(value) in (int, float) for value in numbers):
        raise ValueError("the curve or the loss holds something else than numbers")
    if not all(set(row) == set(CURVE_COLUMNS) for row in progress.curve):
        raise ValueError(f"the curve has other columns than {', '.join(CURVE_COLUMNS)}")


def save_checkpoint(path: Path, args: argparse.Namespace, fingerprint: dict, zo: ZOAdam, generator: torch.Generator,
                    progress: Progress) -> None:
    adam = zo.optimizer.state.get(zo.theta) or dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(zo.theta),
                                                    exp_avg_sq=torch.zeros_like(zo.theta))
    tensors = {
        "theta": zo.theta, "adam.step": adam["step"], "adam.exp_avg": adam["exp_avg"],
        "adam.exp_avg_sq": adam["exp_avg_sq"], "generator": generator.get_state(),
        "subspace.token_history": zo.subspace.token_history, "subspace.projection": zo.subspace.projection,
    }  # fmt: skip
    header = json.dumps(dict(settings=run_settings(args), fingerprint=fingerprint, progress=vars(progress),
                             skipped_in_a_row=zo.skipped_in_a_row), sort_keys=True)
    metadata = {"format": "pt", "zoodip.checkpoint": header, "zoodip.sha256": state_digest(header, tensors)}
    write_atomically(path, serialize(tensors, metadata))


def load_checkpoint(path: Path, args: argparse.Namespace, fingerprint: dict, zo: ZOAdam,
                    generator: torch.Generator) -> Progress:
    """Put a checkpoint's state into `zo` and `generator`. Raises InputError where it is broken or of another run."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
            state = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # off the memory map
        if metadata["zoodip.sha256"] != state_digest(metadata["zoodip.checkpoint"], state):
            raise ValueError("its contents do not match its checksum")
        header = json.loads(metadata["zoodip.checkpoint"])
        progress = Progress(**header["progress"])
        saved, ours = header["settings"], run_settings(args)
        different = [f"--{name} was {saved[name]!r}, is {ours[name]!r}" for name in SETTINGS if saved[name] != ours[name]]
        if different:
            raise InputError(f"--resume_from_checkpoint {path}: is of another run ({'; '.join(different)}); use the same "
                             "settings, or start anew without --resume_from_checkpoint")
        for what, digest in fingerprint.items():
            if header["fingerprint"][what] != digest:
                raise InputError(f"--resume_from_checkpoint {path}: the {what} have changed since it was saved; restore "
                                 "them, or start anew without --resume_from_checkpoint")
        check_state(state, progress, header["skipped_in_a_row"], zo.theta.shape, args.tau)
        adam = dict(step=state["adam.step"], exp_avg=state["adam.exp_avg"], exp_avg_sq=state["adam.exp_avg_sq"])
        generator.set_state(state["generator"])
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"--resume_from_checkpoint: there is no file {str(path)!r}; give a checkpoint-N.safetensors or "
                         "latest") from None
    except (SafetensorError, OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise InputError(f"--resume_from_checkpoint {path}: is not a whole checkpoint ({why_unreadable(path, error)}); use an "
                         "older one") from error
    zo.theta.data.copy_(state["theta"])
    zo.optimizer.state[zo.theta] = adam
    zo.subspace.token_history, zo.subspace.projection = state["subspace.token_history"], state["subspace.projection"]
    zo.skipped_in_a_row = header["skipped_in_a_row"]
    return progress


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint files of a folder, the newest last."""
    checkpoints = [path for path in folder.glob("checkpoint-*.safetensors")
                   if re.fullmatch(r"checkpoint-[0-9]+\.safetensors", path.name) and path.is_file()]
    return sorted(checkpoints, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def resume(args: argparse.Namespace, fingerprint: dict, zo: ZOAdam, generator: torch.Generator) -> Progress:
    """The state to start from: fresh, of the checkpoint asked for, or of the newest that is whole."""
    if args.resume_from_checkpoint is None:
        return Progress(curve=[])
    if args.resume_from_checkpoint != "latest":
        return load_checkpoint(Path(args.resume_from_checkpoint), args, fingerprint, zo, generator)
    for path in reversed(list_checkpoints(Path(args.output_dir))):
        try:
            return load_checkpoint(path, args, fingerprint, zo, generator)
        except InputError as error:
            if "is not a whole checkpoint" not in str(error):
                raise
            print(f"skipped a broken checkpoint: {error}", file=sys.stderr)
    print(f"{args.output_dir}: no checkpoint to continue from, starting at step 0", file=sys.stderr)
    return Progress(curve=[])


def write_curve(path: Path, curve: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    write_atomically(path, text.getvalue().encode())


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def make_accelerator(args: argparse.Namespace):
    """Devices, processes and trackers. Raises InputError where a tracker is not installed or processes are too many."""
    from importlib.util import find_spec

    from accelerate import Accelerator

    if args.report_to != "none" and find_spec(args.report_to) is None:
        raise InputError(f"--report_to {args.report_to}: the package is not installed; run pip install {args.report_to}")
    accelerator = Accelerator(cpu=args.cpu, log_with=None if args.report_to == "none" else args.report_to,
                              project_dir=args.output_dir)
    if args.compile and accelerator.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise InputError("--compile needs a C++ compiler (g++ or clang++); install one, or leave the flag out")
    num_candidates = 2 * args.n if args.estimator == "spsa" else args.n + 1
    if accelerator.num_processes > num_candidates:
        raise InputError(f"{accelerator.num_processes} processes share only {num_candidates} candidates a step; start at "
                         f"most {num_candidates} processes or raise --n")
    return accelerator


def resolve_defaults(args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Fill in the defaults that depend on the device and the model."""
    if args.mixed_precision is None:
        args.mixed_precision = "fp16" if device.type == "cuda" else "fp32"
    if args.mu is None:  # bf16 keeps 8 bits: a smaller step drowns in rounding (benchmarks/README.md)
        args.mu = 1e-2 if args.mixed_precision == "bf16" else 1e-3
    if args.resolution is None:
        channels = read_json(folder / "vae" / "config.json").get("block_out_channels", [0] * 4)
        levels = len(channels) if isinstance(channels, list) else 1  # what is no list is refused at loading
        args.resolution = config_number(folder / "unet" / "config.json", "sample_size", 64) * 2 ** (levels - 1)


@dataclass
class FrozenModel:
    """The quantised modules and the loss as a function of the token."""

    unet: nn.Module
    text_encoder: nn.Module
    rows: torch.Tensor  # [R, d], of `Prompts`, on the device
    candidates_per_forward: int | None = None

    @torch.inference_mode()
    def losses(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """Losses [C], on the CPU, of candidate tokens [C, V, d]."""
        batch, tokens = batch.to(self.rows.device), tokens.to(self.rows.device)
        chunks = tokens.split(self.candidates_per_forward or len(tokens))
        return torch.cat([denoising_losses(self.unet, self.text_encoder, self.rows, batch, c) for c in chunks]).cpu()

    def mean_loss(self, batches: list[Batch], theta: torch.Tensor) -> float:
        """Mean loss of one token over a fixed set."""
        return float(np.mean([self.losses(batch, theta.detach()[None]).item() for batch in batches]))


@dataclass
class Data:
    """What batches are drawn from."""

    latents: torch.Tensor  # [N, 2, 2, 4, h, w] of `encode_images`
    choices: list[list[int]]  # per image, the rows of prompts.ids that describe it
    prompts: Prompts
    scheduler: object  # DDPMScheduler: the noise schedule


@dataclass
class Inputs:
    """What is known before a model is loaded; what is wrong with it has been refused by then."""

    subject: Subject
    folder: Path  # of the model
    initial_token: torch.Tensor  # [V, d]
    choices: list[list[int]]  # per image, the rows of prompts.ids that describe it
    prompts: Prompts
    validation_prompts: Prompts | None  # the prompt and the empty one


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Images, captions, model folder, tokenizer and initial token of a run. Raises InputError."""
    subject = load_subject(args)
    folder = find_model_folder(args.pretrained_model_name_or_path, args.revision, args.variant)
    tokenizer = load_tokenizer(folder, args.placeholder_token, args.num_vectors)
    pieces = read_embedding_rows(folder, args.variant, initializer_ids(tokenizer, args.initializer_token))

    def prompts_of(texts: list[str]) -> Prompts:
        return build_prompts(tokenizer, folder, args.variant, texts, args.placeholder_token, args.num_vectors)

    texts = sorted({text for captions in subject.captions for text in captions})
    return Inputs(
        subject, folder, initial_token(pieces, args.num_vectors),
        choices=[[texts.index(text) for text in captions] for captions in subject.captions], prompts=prompts_of(texts),
        validation_prompts=prompts_of([args.validation_prompt, ""]) if args.validation_prompt else None,
    )


def tune_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    """How glibc keeps freed memory: blocks of `mmap_threshold` bytes go back to the system at once, others once
    `trim_threshold` bytes are free together.

    Left to itself it loads into a heap that fragments, and while stepping returns and fetches the same pages again and
    again (benchmarks/NOTES.md).
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):  # another C library
        pass


def load_scheduler(folder: Path):
    """The noise schedule. Raises InputError where it is none that the method is defined for."""
    from diffusers import DDPMScheduler

    path = folder / "scheduler"
    scheduler = from_folder(path, DDPMScheduler.from_pretrained)
    kind, steps = scheduler.config.prediction_type, len(scheduler.alphas_cumprod)
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(f"{path}: prediction_type is {kind!r}; give a Stable Diffusion 1.x or 2.x (epsilon or v_prediction)")
    between = (scheduler.alphas_cumprod >= 0) & (scheduler.alphas_cumprod < 1)
    if steps != NUM_TRAIN_TIMESTEPS or not scheduler.alphas_cumprod.is_floating_point() or not between.all():
        raise InputError(f"{path}: is no noise schedule of {NUM_TRAIN_TIMESTEPS} steps from 1 to 0 (it has {steps}); download "
                         "the folder again")
    return scheduler


def load_model(args: argparse.Namespace, inputs: Inputs, device: torch.device) -> tuple[FrozenModel, Data]:
    """Encode the images, free the VAE, then load text encoder and UNet: never more than one of them unquantised."""
    folder = inputs.folder
    tune_malloc(1 << 20, 1 << 17)
    scheduler = load_scheduler(folder)
    vae = load_frozen(folder, "vae", args.variant, "none", torch.float32, device, skip=("decoder.", "post_quant_conv."))
    latents = from_folder(folder / "vae", lambda _, vae=vae: encode_images(vae, inputs.subject.paths, args.resolution,
                                                                           args.center_crop))
    if not torch.isfinite(latents).all():
        raise InputError(f"{folder / 'vae'}: encodes the images as NaN or Inf; download the folder again")
    del vae
    how = (args.variant, args.quantization, DTYPES[args.mixed_precision], device)
    text_encoder = load_frozen(folder, "text_encoder", *how, skip=("embeddings.token_embedding.",))
    unet = load_frozen(folder, "unet", *how)
    tune_malloc(32 << 20, 256 << 20)  # while stepping, activations are better kept at hand
    split_feed_forward(unet)
    if args.compile:
        unet.compile(dynamic=False)
    model = FrozenModel(unet, text_encoder, inputs.prompts.rows.to(device), args.candidates_per_forward)
    data = Data(latents, inputs.choices, inputs.prompts, scheduler)
    # a configuration can fit its weights and yet not compute (a wrong number of groups): one loss tells, before the run begins
    first = evaluation_batches(latents, data.choices, data.prompts, scheduler, args)[0]
    from_folder(folder, lambda _: model.losses(first, inputs.initial_token[None]))
    return model, data


def split_feed_forward(unet: nn.Module) -> None:
    """Have the feed-forwards at full resolution, the largest activations of a step, take one candidate after another."""
    from diffusers.models.attention import BasicTransformerBlock

    for module in [*unet.down_blocks[0].modules(), *unet.up_blocks[-1].modules()]:
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(1, dim=0)


class StopSignal:
    """Remembers SIGINT and SIGTERM, so that the step under way is finished and saved; a second one ends at once."""

    number = 0

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        self.number = number
        for each in self.previous:
            signal.signal(each, signal.SIG_DFL)


def shared_losses(accelerator, model: FrozenModel, batch: Batch, candidates: torch.Tensor,
                  stop: StopSignal) -> tuple[torch.Tensor, bool]:
    """Losses of all candidates, each process evaluating its share; only losses, and the wish to stop, are exchanged.

    Every process draws the same numbers and so holds the same theta, without ever sending it.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    if processes == 1:
        return model.losses(batch, candidates), stop.number != 0
    message = torch.zeros(len(candidates) + 1)
    message[:-1][rank::processes] = model.losses(batch, candidates[rank::processes])
    message[-1] = float(stop.number != 0)
    message = accelerator.reduce(message.to(accelerator.device), reduction="sum").cpu()
    return message[:-1], bool(message[-1] > 0)


class Recorder:
    """Writes what a run leaves behind, on the main process only."""

    def __init__(self, args: argparse.Namespace, accelerator, fingerprint: dict, prediction_type: str):
        self.args, self.accelerator, self.fingerprint = args, accelerator, fingerprint
        self.prediction_type = prediction_type
        self.folder = Path(args.output_dir)

    def embedding(self, zo: ZOAdam, step: int, final: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        metadata = embedding_metadata(self.args, step, self.prediction_type, zo.theta.shape[-1])
        names = ["learned_embeds", file_stem(self.args.placeholder_token)] if final else [f"learned_embeds-steps-{step}"]
        for name in names:
            save_embedding(self.folder / f"{name}.safetensors", self.args, zo.theta, metadata)

    def checkpoint(self, zo: ZOAdam, generator: torch.Generator, progress: Progress) -> None:
        if not self.accelerator.is_main_process:
            return
        path = self.folder / f"checkpoint-{progress.step}.safetensors"
        save_checkpoint(path, self.args, self.fingerprint, zo, generator, progress)
        self.limit_checkpoints(progress.step)

    def limit_checkpoints(self, step: int) -> None:
        """Remove all but the newest up to `step`; later ones are there after going back to an older one, and stay."""
        if self.args.checkpoints_total_limit and self.accelerator.is_main_process:
            older = [path for path in list_checkpoints(self.folder) if checkpoint_step(path) <= step]
            for path in older[: -self.args.checkpoints_total_limit]:
                path.unlink(missing_ok=True)

    def curve(self, progress: Progress) -> None:
        row = progress.curve[-1]
        if self.accelerator.is_main_process:
            write_curve(self.folder / "training_log.csv", progress.curve)
        self.accelerator.log({f"eval/{k}": v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    def run(self, progress: Progress, seconds: float, steps: int) -> None:
        """run.json: what was run, on what, how fast (evaluation and pictures apart) and in how much memory."""
        if not self.accelerator.is_main_process:
            return
        device = self.accelerator.device
        cuda = device.type == "cuda"
        here = Path(__file__).resolve().parent
        try:
            git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True,
                                 text=True)
            commit = git.stdout.strip() or None
        except OSError:  # no git
            commit = None
        record = dict(
            settings=run_settings(self.args), step=progress.step, unet_forwards=progress.forwards,
            skipped_steps=progress.skipped, smoothed_loss=progress.smoothed_loss, steps_this_time=steps,
            seconds_this_time=round(seconds, 2), steps_per_second=round(steps / seconds, 3) if seconds else None,
            peak_memory_gb=round(peak_memory_gb(device), 3),
            device=torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            processes=self.accelerator.num_processes, python=platform.python_version(), versions=package_versions(),
            commit=commit,
        )  # fmt: skip
        write_atomically(self.folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())


class ValidationDrawer:
    """Draws the validation prompt with the modules that training holds in memory, plus the quantised VAE decoder."""

    def __init__(self, args: argparse.Namespace, model: FrozenModel, folder: Path, prompts: Prompts):
        from diffusers import PNDMScheduler, StableDiffusionPipeline

        self.args, self.folder, self.text_encoder, self.prompts = args, folder, model.text_encoder, prompts
        vae = load_frozen(folder, "vae", args.variant, args.quantization, DTYPES[args.mixed_precision], model.rows.device,
                          skip=("encoder.", "quant_conv."))
        scheduler = from_folder(folder / "scheduler", PNDMScheduler.from_pretrained)
        self.pipeline = StableDiffusionPipeline(
            vae=vae, unet=model.unet, scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def draw(self, theta: torch.Tensor) -> Image.Image:
        """--num_validation_images pictures side by side: 50 steps, the same noise every time."""
        device = self.pipeline.unet.conv_in.weight.device
        rows, ids = self.prompts.rows.to(device), self.prompts.ids.to(device)
        prompt, empty = encode_prompts(self.text_encoder, rows, ids, theta.detach()[None].to(device))  # [L, d] each
        side, count = self.args.resolution, self.args.num_validation_images
        grid = Image.new("RGB", (side * count, side))
        for i in range(count):  # one at a time: pictures must not need more memory than training
            picture = self.pipeline(
                prompt_embeds=prompt[None], negative_prompt_embeds=empty[None], num_inference_steps=50,
                guidance_scale=self.args.validation_guidance, height=side, width=side,
                generator=torch.Generator().manual_seed(self.args.seed + i),
            ).images[0]
            grid.paste(picture, (side * i, 0))
        return grid


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def train(args: argparse.Namespace, accelerator, model: FrozenModel, data: Data, zo: ZOAdam, generator: torch.Generator,
          progress: Progress, recorder: Recorder, drawer: ValidationDrawer | None, stop: StopSignal) -> None:
    """The loop, from `progress` to the last step or to a signal. Raises InputError where it cannot go on."""
    fixed_set = evaluation_batches(data.latents, data.choices, data.prompts, data.scheduler, args) if args.eval_steps else []
    first_step, stepping_seconds, stopped = progress.step, 0.0, False

    def evaluate():
        progress.curve.append(dict(step=progress.step, unet_forwards=progress.forwards, loss=progress.smoothed_loss,
                                   eval_loss=model.mean_loss(fixed_set, zo.theta), token_norm=zo.norm()))
        recorder.curve(progress)

    def draw():
        picture = from_folder(drawer.folder, lambda _: drawer.draw(zo.theta))
        write_image(recorder.folder / f"validation-{progress.step}.png", picture)

    def watch_norm(bar):
        norm = zo.norm()
        if not math.isfinite(norm):
            raise InputError(f"the token is NaN or Inf after step {progress.step}; try a smaller --learning_rate or another --mu")
        if norm > zo.norm_limit and accelerator.is_main_process:  # at 10 times its length, bf16 no longer measures a slope
            bar.write(f"the token's norm has grown to {norm:.3g} by step {progress.step}; where the loss no longer falls, start "
                      "anew with a smaller --learning_rate, or with --mixed_precision fp32", file=sys.stderr)
            zo.norm_limit = 2 * norm

    recorder.limit_checkpoints(progress.step)  # one too many is left of a run that was killed between writing and removing
    if args.eval_steps and not progress.curve:
        evaluate()
    with tqdm(total=args.max_train_steps, initial=progress.step, unit="step", smoothing=0.05, mininterval=0.5,
              disable=not accelerator.is_main_process) as bar:
        while progress.step < args.max_train_steps and not stopped:
            step_started = time.perf_counter()
            batch = draw_batch(data.latents, data.choices, data.prompts, data.scheduler, args, generator)
            directions, candidates = zo.candidates(generator)
            losses, stopped = shared_losses(accelerator, model, batch, candidates, stop)
            progress.step += 1
            progress.forwards += len(candidates)
            finite = zo.step(directions, losses)
            stepping_seconds += time.perf_counter() - step_started
            if finite:
                # losses[0] is the unperturbed loss of rge; of the others, which evaluate none, the mean is it to order mu
                loss = (losses[0] if args.estimator == "rge" else losses.mean()).item()
                previous = loss if progress.smoothed_loss is None else progress.smoothed_loss
                progress.smoothed_loss = 0.99 * previous + 0.01 * loss
            else:
                progress.skipped += 1
                if zo.skipped_in_a_row >= 20:
                    recorder.checkpoint(zo, generator, progress)
                    raise InputError(f"the loss was not finite for 20 steps up to step {progress.step}; try --mixed_precision "
                                     "fp32 or bf16, a smaller --learning_rate or another --mu")
            watch_norm(bar)
            bar.update()
            bar.set_postfix_str(f"loss {progress.smoothed_loss or math.nan:.4f}, {peak_memory_gb(accelerator.device):.2f} GB",
                                refresh=False)
            if due(progress.step, 10):
                accelerator.log({"train/loss": progress.smoothed_loss or math.nan}, step=progress.step)
            last = progress.step == args.max_train_steps
            if args.eval_steps and (due(progress.step, args.eval_steps) or last):
                evaluate()
            if due(progress.step, args.save_steps):
                recorder.embedding(zo, progress.step, final=False)
            picture = drawer is not None and due(progress.step, args.validation_steps) and not last
            if picture and not stopped:
                draw()
            # the last of what a step leaves, so that a run killed in between does all of it again; who stops it is kept waiting
            # for no picture
            if due(progress.step, args.checkpointing_steps) or stopped or (last and args.checkpointing_steps):
                recorder.checkpoint(zo, generator, progress)
            if picture and stopped:
                draw()
    if progress.step == progress.skipped > 0:
        raise InputError("no step had a finite loss; try --mixed_precision fp32 or bf16, or another model")
    recorder.embedding(zo, progress.step, final=True)
    if drawer is not None and progress.step >= args.max_train_steps:  # after the embedding: hours must not hang on a picture
        draw()
    recorder.run(progress, stepping_seconds, progress.step - first_step)
    accelerator.wait_for_everyone()


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save: cheapest first, so that what is wrong is refused before a model is loaded.

    Returns the exit code: 0, or 128 + signal where the run was interrupted (and saved). Raises InputError.
    """
    if args.train_data_dir is None:
        save_quantized(args)
        return 0
    inputs = read_inputs(args)
    accelerator = make_accelerator(args)
    if args.save_quantized is not None:
        inputs.folder = save_quantized(args)
        args.pretrained_model_name_or_path, args.variant = str(inputs.folder), None
    resolve_defaults(args, inputs.folder, accelerator.device)
    zo = ZOAdam(inputs.initial_token, args)
    generator = torch.Generator().manual_seed(args.seed)
    fingerprint = {"images or captions": inputs.subject.fingerprint,
                   "model weights": model_digest(inputs.folder, args.variant)}
    progress = resume(args, fingerprint, zo, generator)
    lock = prepare_output(args, fresh=progress.step == 0) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    accelerator.init_trackers("zoodip", {name: value for name, value in run_settings(args).items() if value is not None})

    model, data = load_model(args, inputs, accelerator.device)
    drawer = None
    if inputs.validation_prompts is not None and accelerator.is_main_process:
        drawer = ValidationDrawer(args, model, inputs.folder, inputs.validation_prompts)
    recorder = Recorder(args, accelerator, fingerprint, data.scheduler.config.prediction_type)
    with StopSignal() as stop:
        train(args, accelerator, model, data, zo, generator, progress, recorder, drawer, stop)
    accelerator.end_training()
    if lock is not None:
        lock.close()
    interrupted = progress.step < args.max_train_steps
    if accelerator.is_main_process:
        if interrupted:
            print(f"interrupted and saved at step {progress.step}; the same command with --resume_from_checkpoint latest "
                  "goes on from there", file=sys.stderr)
        else:
            print(f"{Path(args.output_dir) / 'learned_embeds.safetensors'}: {args.placeholder_token} after "
                  f"{progress.step} steps" + (f" ({progress.skipped} skipped: loss not finite)" if progress.skipped else ""))
    return 128 + (stop.number or signal.SIGTERM) if interrupted else 0


def quiet_libraries() -> None:
    """Silence notices about optional packages that are not needed; errors still come through. Call before loading."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="IProgress not found")


def printable(text: str) -> str:
    """On one line, whatever a file name or a library put in: control characters escaped, access tokens of the hub left out."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub(r"\bhf_[A-Za-z0-9]{30,}", "hf_...", text)


def cli(args: argparse.Namespace) -> int:
    """`main` for the command line: what the user can mend is one line on stderr and exit code 2."""
    quiet_libraries()
    try:
        return main(args)
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except Exception as error:
        if not out_of_memory(error):
            raise
        print("error: out of memory; try --candidates_per_forward 1, then a smaller --train_batch_size or --resolution, or "
              "--mixed_precision bf16. With --resume_from_checkpoint latest a run goes on from its last checkpoint "
              f"({printable(str(error))[:200]})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(ARGS))
