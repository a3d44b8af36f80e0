#!/usr/bin/env python
"""Scores of learned tokens: CLIP-T, CLIP-I, DINO and DINO_inter, as in the paper's Section 4 and supplement.

    python reproduction/evaluate.py --embeddings results/learned_embeds.safetensors --references dataset/dog6 \\
        --prompts dataset/prompts_and_classes.txt --quantization int8

For every embedding, --images pictures of every prompt are drawn without the class word ("a <sks> in the jungle"), by the model
quantised as --quantization says (a line tells where the token was learned on another), and compared with the folder of references
that has the same place in the list:

    CLIP-T      mean cosine of picture and prompt, the class word standing for the token in the prompt's text
    CLIP-I      mean cosine over all pairs of a picture and a reference (openai/clip-vit-base-patch32)
    DINO        likewise (facebook/dinov2-base, [CLS])
    DINO_inter  mean cosine over all pairs of two of --inter_images pictures of one prompt: lower is more diverse

A scorer that is not to be had is left out with a line that says so. Pictures are kept under --output, one file per (embedding,
prompt, seed, settings), and never drawn twice. Writes scores.csv and scores.json (per subject, and their mean) and a contact
sheet per subject. The paper's setting is --images 5, the default. Further flags are those of train_zoodip.py.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_zoodip as zoodip  # noqa: E402
from benchmarks.common import cli, environment, plain_arguments  # noqa: E402
from train_zoodip import FrozenModel, InputError  # noqa: E402

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dinov2-base"
LIVE_CLASSES = {"cat", "dog"}  # the nine live subjects of DreamBooth's thirty
INTER_PROMPT = "a photo of a {}"

# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DreamBoothPrompts:
    """What prompts_and_classes.txt says; prompts with one {} for token or class word."""

    classes: dict[str, str]  # subject -> class word
    object_prompts: tuple[str, ...]
    live_prompts: tuple[str, ...]

    def of(self, subject: str) -> tuple[str, list[str]]:
        """Class word and prompts of a subject. Raises InputError for one that the file does not know."""
        if subject not in self.classes:
            raise InputError(f"--prompts: {subject!r} is not a subject of that file; name the folder of references as one of "
                             f"{', '.join(self.classes)}, or give a plain list of prompts and --class_word")
        word = self.classes[subject]
        return word, list(self.live_prompts if word in LIVE_CLASSES else self.object_prompts)


def parse_dreambooth_prompts(text: str) -> DreamBoothPrompts:
    """Read DreamBooth's prompts_and_classes.txt by pattern: it holds Python, which is never executed. Raises InputError."""
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    lists = []
    for heading in ("Object Prompts", "Live Subject Prompts"):
        block = re.search(rf"^{heading}\s+prompt_list\s*=\s*\[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        quoted = re.findall(r"'([^'\n]*)'\.format\(unique_token, class_token\)", block[1]) if block else []
        if not quoted or not all(prompt.count("{0} {1}") == 1 and prompt.count("{") == 2 for prompt in quoted):
            raise InputError(f"--prompts: under {heading!r} there is no list of prompts with {{0}} {{1}}; use DreamBooth's "
                             "prompts_and_classes.txt as it is, or a plain list")
        lists.append(tuple(prompt.replace("{0} {1}", "{}") for prompt in quoted))
    if not classes:
        raise InputError("--prompts: there is no line subject_name,class; use DreamBooth's prompts_and_classes.txt as it is")
    return DreamBoothPrompts(classes, *lists)


def read_text(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--{flag} {path}: cannot be read ({error}); give a text file") from error


def read_prompts(path: Path, subject: str, class_word: str | None) -> tuple[str, list[str]]:
    """Class word and prompts of a subject, from DreamBooth's file or a list with one prompt a line. Raises InputError."""
    text = read_text(path, "prompts")
    if "prompt_list" in text:
        word, prompts = parse_dreambooth_prompts(text).of(subject)
        return class_word or word, prompts
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [prompt for prompt in prompts if prompt.count("{}") != 1]
    if wrong or not prompts:
        raise InputError(f"--prompts {path}: every line must hold one {{}} for the token, got {(wrong or [''])[0]!r}")
    if class_word is None:
        raise InputError(f"--class_word is needed with a plain list of prompts ({path}), for example --class_word dog")
    return class_word, prompts


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


class Drawer:
    """Draws prompts with a learned token by the modules that training holds, keeping every picture on disk."""

    def __init__(self, args: argparse.Namespace, model: FrozenModel, folder: Path, steps: int, guidance: float,
                 batch_size: int = 16):
        self.args, self.model, self.folder = args, model, folder
        self.steps, self.guidance, self.batch_size = steps, guidance, batch_size
        self.pipeline = zoodip.ValidationDrawer(args, model, folder, None).pipeline
        self.tokenizer = zoodip.load_tokenizer(folder, args.placeholder_token, args.num_vectors)
        self.settings = [zoodip.model_digest(folder, args.variant), args.quantization, args.mixed_precision, args.resolution,
                         steps, guidance]

    def name(self, theta: torch.Tensor, prompt: str, seed: int) -> str:
        """The file of a picture: its name tells all that it depends on."""
        token = hashlib.sha256(theta.contiguous().numpy().tobytes()).hexdigest()
        digest = hashlib.sha256(json.dumps([token, prompt, seed, *self.settings]).encode()).hexdigest()[:12]
        return f"{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}-{seed}-{digest}.png"

    @torch.no_grad()
    def draw(self, theta: torch.Tensor, wanted: list[tuple[str, int]]) -> list[Image.Image]:
        """One picture per (prompt with {}, seed); a seed is the same first noise for every prompt and token."""
        device = self.model.rows.device
        texts = sorted({prompt for prompt, _ in wanted})
        prompts = zoodip.build_prompts(self.tokenizer, self.folder, self.args.variant, [*texts, ""], self.args.placeholder_token,
                                       self.args.num_vectors)
        states = zoodip.encode_prompts(self.model.text_encoder, prompts.rows.to(device), prompts.ids.to(device),
                                       theta[None].to(device))  # [P + 1, L, d], the empty prompt last
        rows = [texts.index(prompt) for prompt, _ in wanted]
        return self.pipeline(
            prompt_embeds=states[rows], negative_prompt_embeds=states[-1:].expand(len(wanted), -1, -1),
            generator=[torch.Generator().manual_seed(seed) for _, seed in wanted], num_inference_steps=self.steps,
            guidance_scale=self.guidance, height=self.args.resolution, width=self.args.resolution,
        ).images  # fmt: skip

    def pictures(self, theta: torch.Tensor, prompts: list[str], seeds: range, cache: Path) -> list[list[Image.Image]]:
        """[prompt][seed], from `cache` where they are there, else drawn and kept."""
        cache.mkdir(parents=True, exist_ok=True)
        paths = {(prompt, seed): cache / self.name(theta, prompt, seed) for prompt in prompts for seed in seeds}
        missing = [wanted for wanted, path in paths.items() if not path.exists()]
        with tqdm(total=len(missing), desc="drawing", unit="picture", leave=False, disable=not missing) as bar:
            for first in range(0, len(missing), self.batch_size):
                chunk = missing[first : first + self.batch_size]
                for wanted, image in zip(chunk, self.draw(theta, chunk), strict=True):
                    zoodip.write_image(paths[wanted], image)
                bar.update(len(chunk))
        return [[zoodip.open_image(paths[prompt, seed]) for seed in seeds] for prompt in prompts]


def read_token(path: Path, placeholder_token: str, quantization: str | None = None) -> torch.Tensor:
    """theta [V, d] of a learned_embeds.safetensors; a line where it was learned on other weights. Raises InputError."""
    try:
        with safe_open(path, framework="pt") as handle:
            settings = json.loads((handle.metadata() or {}).get("zoodip.settings", "{}"))
            theta = handle.get_tensor(placeholder_token)
        if theta.dim() == 1:  # as others save a single vector
            theta = theta[None]
        if theta.dim() != 2 or not theta.numel() or not theta.is_floating_point() or not torch.isfinite(theta).all():
            raise ValueError(f"it is {tuple(theta.shape)} {theta.dtype}, or NaN or Inf")
    except (SafetensorError, OSError, ValueError) as error:
        reason = zoodip.why_unreadable(path, error)
        raise InputError(f"{path}: does not hold the token {placeholder_token} ({reason}); give a learned_embeds.safetensors, or "
                         "its --placeholder_token") from error
    learned_on = settings.get("quantization", quantization) if isinstance(settings, dict) else quantization
    if quantization is not None and learned_on != quantization:
        print(f"{path}: was learned with --quantization {learned_on}, its pictures are drawn with {quantization}",
              file=sys.stderr)
    return theta.float()


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


class Scorer:
    """CLIP or DINOv2 by name or folder: unit vectors of pictures, and of texts where it knows them."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in ("clip", "dinov2"):
            raise ValueError(f"is a {kind}, not CLIP or DINOv2")
        model_class = CLIPModel if kind == "clip" else Dinov2Model
        self.model = model_class.from_pretrained(name, dtype=torch.float32).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.tokenizer = AutoTokenizer.from_pretrained(name) if kind == "clip" else None
        self.device = device

    @torch.no_grad()
    def images(self, images: list[Image.Image], batch_size: int = 32) -> torch.Tensor:
        """[N, e] fp32 on the CPU, of unit length."""
        vectors = []
        for first in range(0, len(images), batch_size):
            pixels = self.processor(images[first : first + batch_size], return_tensors="pt").pixel_values.to(self.device)
            clip = self.tokenizer is not None
            output = self.model.get_image_features(pixel_values=pixels) if clip else self.model(pixel_values=pixels)
            vectors.append(output.pooler_output.cpu())  # of DINOv2 the normalised [CLS]
        return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """[N, e] fp32 on the CPU, of unit length."""
        inputs = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return torch.nn.functional.normalize(self.model.get_text_features(**inputs).pooler_output.cpu(), dim=-1)


def load_scorer(name: str | Path | None, device: torch.device | str = "cpu") -> Scorer | None:
    """The scorer, or None and a line that says why not."""
    if name is None:
        return None
    try:
        return Scorer(str(name), device)
    except Exception as error:  # network, authorisation, a damaged folder: many classes, one answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{name}: not available, its scores are left out ({reason})", file=sys.stderr)
        return None


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Over all pairs of a row of `a` [N, e] and one of `b` [M, e], all of unit length."""
    return (a.double() @ b.double().T).mean().item()


def mean_pairwise_cosine(vectors: torch.Tensor) -> float:
    """Over all pairs of two different rows of [N, e], all of unit length; nan for one row."""
    count = len(vectors)
    total = vectors.double().sum(0).square().sum().item()  # all ordered pairs, the N of a row with itself included
    return (total - count) / (count * (count - 1)) if count > 1 else float("nan")


def score_pictures(pictures: list[list[Image.Image]], references: list[Image.Image], texts: list[str], clip: Scorer | None,
                   dino: Scorer | None) -> dict[str, float]:
    """CLIP-T, CLIP-I and DINO of pictures [prompt][seed]; `texts` are the prompts with the class word."""
    scores, flat = {}, [image for row in pictures for image in row]
    if clip is not None:
        vectors = clip.images(flat)
        per_prompt = clip.texts(texts).repeat_interleave(len(pictures[0]), 0)
        scores["CLIP-T"] = (vectors * per_prompt).sum(1).double().mean().item()
        scores["CLIP-I"] = mean_cosine(vectors, clip.images(references))
    if dino is not None:
        scores["DINO"] = mean_cosine(dino.images(flat), dino.images(references))
    return scores


def score_diversity(pictures: list[Image.Image], clip: Scorer | None, dino: Scorer | None) -> dict[str, float]:
    """DINO_inter of pictures of one prompt, and the same by CLIP."""
    scorers = {"CLIP_inter": clip, "DINO_inter": dino}
    return {name: mean_pairwise_cosine(scorer.images(pictures)) for name, scorer in scorers.items() if scorer is not None}


def contact_sheet(references: list[Image.Image], pictures: list[list[Image.Image]], prompts: list[str], cell: int = 96,
                  per_prompt: int = 3, blocks_per_row: int = 4) -> Image.Image:
    """References in a column on the left; beside it the first pictures of every prompt with the prompt below."""
    font, gap, foot = ImageFont.load_default(10), 4, 42
    per_prompt = min(per_prompt, len(pictures[0]))
    block_width, block_height = per_prompt * (cell + gap) + 2 * gap, cell + foot
    rows = -(-len(prompts) // blocks_per_row)
    columns = min(blocks_per_row, len(prompts))
    height = max(rows * block_height, len(references) * (cell + gap)) + 20
    sheet = Image.new("RGB", (cell + 3 * gap + columns * block_width, height), "white")
    pen = ImageDraw.Draw(sheet)

    def paste(image: Image.Image, left: int, top: int):
        sheet.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (left, top))

    pen.text((gap, 4), "references", fill="black", font=font)
    for i, image in enumerate(references):
        paste(image, gap, 20 + i * (cell + gap))
    for k, (prompt, row) in enumerate(zip(prompts, pictures, strict=True)):
        left = cell + 3 * gap + (k % blocks_per_row) * block_width
        top = 20 + (k // blocks_per_row) * block_height
        for i, image in enumerate(row[:per_prompt]):
            paste(image, left + i * (cell + gap), top)
        text = "\n".join(textwrap.wrap(prompt.replace("{}", "<*>"), per_prompt * (cell + gap) // 5)[:3])
        pen.multiline_text((left, top + cell + 2), text, fill="black", font=font, spacing=1)
    return sheet


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = zoodip.OneLineArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--embeddings", type=Path, nargs="+", required=True, help="learned_embeds.safetensors of each subject")
    add("--references", type=Path, nargs="+", required=True, help="folder of each subject's pictures, in the same order")
    add("--prompts", type=Path, required=True, help="DreamBooth's prompts_and_classes.txt, or a list with one {} a line")
    add("--class_word", default=None, help="word for the subject in CLIP-T's text; default: what DreamBooth's file says")
    add("--images", type=int, default=5, help="pictures per prompt")
    add("--inter_images", type=int, default=0, help=f"pictures of {INTER_PROMPT!r} for DINO_inter, 50 in the paper; 0: none")
    add("--inference_steps", type=int, default=50, help="denoising steps per picture")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance scale")
    add("--batch_size", type=int, default=4, help="pictures at once")
    add("--clip", default=CLIP, help="CLIP scorer, name or folder")
    add("--dino", default=DINO, help="DINOv2 scorer, name or folder")
    add("--output", type=Path, default=Path("results/evaluation"), help="folder for pictures, scores and sheets")
    args, rest = parser.parse_known_args(argv)
    if len(args.embeddings) != len(args.references):
        parser.error(f"--references: {len(args.references)} folders for {len(args.embeddings)} embeddings; give one for each")
    for name, least in (("images", 1), ("inter_images", 0), ("inference_steps", 1), ("batch_size", 1), ("guidance", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.inter_images == 1:
        parser.error("--inter_images must be 0 (none) or at least 2, as pairs of pictures are compared, got 1")
    args.zoodip = zoodip.parse_args(["--train_data_dir", "x", "--initializer_token", "x", *rest])
    return args


def write_scores(folder: Path, scores: dict[str, dict[str, float]], record: dict) -> dict[str, float]:
    """scores.json and scores.csv, per subject and their mean, which is returned."""
    columns = list(dict.fromkeys(name for row in scores.values() for name in row))
    means = {name: float(np.mean([row[name] for row in scores.values()])) for name in columns}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["subject", *columns])
    for subject, row in [*scores.items(), ("mean", means)]:
        writer.writerow([subject, *[f"{row[name]:.6f}" for name in columns]])
    folder.mkdir(parents=True, exist_ok=True)
    zoodip.write_atomically(folder / "scores.csv", text.getvalue().encode())
    content = json.dumps(dict(**record, subjects=scores, mean=means), indent=1)
    zoodip.write_atomically(folder / "scores.json", (content + "\n").encode())
    return means


def load_frozen_model(args: argparse.Namespace, device: torch.device) -> tuple[FrozenModel, Path]:
    """Text encoder and UNet as in training, without a subject; open defaults of `args` are filled in."""
    folder = zoodip.find_model_folder(args.pretrained_model_name_or_path, args.revision, args.variant)
    zoodip.resolve_defaults(args, folder, device)
    how = (args.variant, args.quantization, zoodip.DTYPES[args.mixed_precision], device)
    text_encoder = zoodip.load_frozen(folder, "text_encoder", *how, skip=("embeddings.token_embedding.",))
    return FrozenModel(zoodip.load_frozen(folder, "unet", *how), text_encoder, torch.zeros(0, device=device)), folder


def main(args: argparse.Namespace, load: Callable = load_scorer) -> None:
    subjects = []
    for embedding, folder in zip(args.embeddings, args.references, strict=True):
        theta = read_token(embedding, args.zoodip.placeholder_token, args.zoodip.quantization)
        word, prompts = read_prompts(args.prompts, folder.resolve().name, args.class_word)
        subjects.append((folder.resolve().name, theta, [zoodip.open_image(path) for path in zoodip.find_images(folder)], word,
                         prompts))
    if len({name for name, *_ in subjects}) < len(subjects):
        raise InputError("--references: two folders have the same name; name each after its subject")
    if len({theta.shape for _, theta, *_ in subjects}) > 1:
        raise InputError("--embeddings: the tokens have different numbers of vectors; evaluate them in separate commands")
    accelerator = zoodip.make_accelerator(args.zoodip)
    clip, dino = load(args.clip, accelerator.device), load(args.dino, accelerator.device)
    args.zoodip.num_vectors, width = subjects[0][1].shape
    model, folder = load_frozen_model(args.zoodip, accelerator.device)
    if width != model.text_encoder.config.hidden_size:
        raise InputError(f"--embeddings {args.embeddings[0]}: has {width} numbers, the model's tokens have "
                         f"{model.text_encoder.config.hidden_size}; give the model that it was learned on")
    drawer = Drawer(args.zoodip, model, folder, args.inference_steps, args.guidance, args.batch_size)
    scores = {}
    for name, theta, references, word, prompts in tqdm(subjects, unit="subject"):
        cache = args.output / name
        pictures = drawer.pictures(theta, prompts, range(args.images), cache)
        scores[name] = score_pictures(pictures, references, [prompt.replace("{}", word) for prompt in prompts], clip, dino)
        if args.inter_images:
            (row,) = drawer.pictures(theta, [INTER_PROMPT], range(args.inter_images), cache)
            scores[name].update(score_diversity(row, clip, dino))
        zoodip.write_image(args.output / f"{name}.png", contact_sheet(references, pictures, prompts))
    arguments = plain_arguments(args) | {"zoodip": zoodip.run_settings(args.zoodip)}
    means = write_scores(args.output, scores, dict(arguments=arguments, **environment(str(accelerator.device))))
    print(f"{args.output / 'scores.csv'}: mean of {len(scores)} subjects: "
          + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))


if __name__ == "__main__":
    cli(main, parse_args())
