"""Scores of pictures: CLIP-T, CLIP-I, DINO and DINO_inter, as in the paper's Section 4 and supplement.

CLIP-T      mean cosine of picture and prompt, with the class word in place of the token in the prompt's text
CLIP-I      mean cosine over all pairs of a picture and a reference (openai/clip-vit-base-patch32)
DINO        the same with facebook/dinov2-base, [CLS]
DINO_inter  mean cosine over all pairs of pictures of one prompt: lower is more diverse
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from tqdm import tqdm

from zoodip import files
from zoodip.files import write_image
from zoodip.folder import model_digest
from zoodip.pictures import Drawer, picture_sheet
from zoodip.prompts import build_prompts, load_tokenizer
from zoodip.subject import open_image
from zoodip.tuned_model import encode_texts, in_words, plain_prompts

INTER_PROMPT = "a photo of a {}"

# ---------------------------------------------------------------------------------------------------------------------
# Pictures that are kept
# ---------------------------------------------------------------------------------------------------------------------


class Learned(Protocol):
    """What a run learned, in the form that prompts need."""

    @property
    def variant(self) -> str | None:
        """The variant of the model's weight files."""
        ...

    @property
    def digest(self) -> str:
        """Identifies what was learned: equal digests give the same pictures."""
        ...

    def states(self, drawer: Drawer, prompts: list[str]) -> torch.Tensor:
        """Text states [P + 1, L, d] of prompts, with {} for the subject, and last of the empty prompt."""
        ...


@dataclass(frozen=True)
class Token:
    """A token theta [V, d] in place of {}."""

    theta: torch.Tensor
    placeholder_token: str
    variant: str | None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.theta.contiguous().numpy().tobytes()).hexdigest()

    def states(self, drawer: Drawer, prompts: list[str]) -> torch.Tensor:
        word, vectors = self.placeholder_token, len(self.theta)
        tokenizer = load_tokenizer(drawer.folder, word, vectors)
        return drawer.encode(build_prompts(tokenizer, drawer.folder, self.variant, [*prompts, ""], word, vectors), self.theta)


@dataclass(frozen=True)
class Words:
    """The words by which tuned weights know the subject: its identifier and class word, in place of {}."""

    digest: str  # of the tuned weights, which the drawer has
    identifier: str
    class_word: str
    variant: str | None
    quantization: str  # of the text encoder

    def states(self, drawer: Drawer, prompts: list[str]) -> torch.Tensor:
        texts = [in_words(prompt, self.identifier, self.class_word) for prompt in prompts]
        plain, weight = plain_prompts(drawer.folder, self.variant, [*texts, ""]), drawer.pipeline.unet.conv_in.weight
        return encode_texts(drawer.folder, self.variant, plain, self.quantization, weight.dtype, weight.device)


def digest_of(path: Path) -> str:
    """`files.digest_of` of a file, or of all files in a folder in the order of their names."""
    return files.digest_of([path] if path.is_file() else sorted(path.glob("*")))


class PictureCache:
    """Pictures of what was learned, one file per picture, each drawn once.

    `settings`: what the pictures depend on besides what was learned, the model and the drawer.
    """

    def __init__(self, drawer: Drawer, cache: Path, learned: Learned, settings: list):
        self.drawer, self.cache, self.learned = drawer, cache, learned
        self.settings = [model_digest(drawer.folder, learned.variant), *settings, drawer.resolution]

    def of(self, learned: Learned) -> PictureCache:
        """The same cache for something else that was learned on this model."""
        other = copy(self)
        other.learned = learned
        return other

    def path(self, prompt: str, seed: int) -> Path:
        """The file of a picture; its name identifies all that it depends on."""
        depends = [self.learned.digest, prompt, seed, *self.settings, self.drawer.steps, self.drawer.guidance]
        return self.cache / f"{slug(prompt)}-{seed}-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]}.png"

    def pictures(self, prompts: list[str], seeds: range) -> list[list[Image.Image]]:
        """Pictures [prompt][seed] of prompts, with {} for the subject; a seed gives the same first noise for all prompts."""
        self.cache.mkdir(parents=True, exist_ok=True)
        paths = {(prompt, seed): self.path(prompt, seed) for prompt in prompts for seed in seeds}
        missing = [wanted for wanted, path in paths.items() if not path.exists()]
        if missing:
            texts = sorted({prompt for prompt, _ in missing})
            states = self.learned.states(self.drawer, texts)
            drawn = self.drawer.draw_states(states, [(texts.index(prompt), seed) for prompt, seed in missing])
            bar = tqdm(drawn, desc="drawing", unit="picture", leave=False, total=len(missing))
            for wanted, image in zip(missing, bar, strict=True):
                write_image(paths[wanted], image)
        return [[open_image(paths[prompt, seed]) for seed in seeds] for prompt in prompts]


def slug(prompt: str) -> str:
    return re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]


def contact_sheet(references: list[Image.Image], pictures: list[list[Image.Image]], prompts: list[str],
                  per_prompt: int = 3) -> Image.Image:  # fmt: skip
    """The references, then the first pictures of every prompt with the prompt below; <*> stands for the subject."""
    per_prompt = min(per_prompt, len(pictures[0]))
    chunks = [references[first : first + per_prompt] for first in range(0, len(references), per_prompt)]
    blocks = [(chunk, "references") for chunk in chunks]
    blocks += [(row[:per_prompt], prompt.replace("{}", "<*>")) for prompt, row in zip(prompts, pictures, strict=True)]
    return picture_sheet(blocks, columns=4, cell=96)


# ---------------------------------------------------------------------------------------------------------------------
# Scorers
# ---------------------------------------------------------------------------------------------------------------------


class Scorer:
    """CLIP or DINOv2, by name or folder: unit vectors of pictures and, for CLIP, of texts."""

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
            vectors.append(output.pooler_output.cpu())  # for DINOv2 the normalised [CLS]
        return torch.nn.functional.normalize(torch.cat(vectors), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """[N, e] fp32 on the CPU, of unit length."""
        inputs = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        return torch.nn.functional.normalize(self.model.get_text_features(**inputs).pooler_output.cpu(), dim=-1)


@lru_cache
def load_scorer(name: str | None, device: torch.device | str = "cpu") -> Scorer | None:
    """The scorer, or None with a line that says why."""
    if name is None:
        return None
    try:
        return Scorer(name, device)
    except Exception as error:  # network, authorisation, a damaged folder: many exception classes, one answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{name}: not available, its scores are left out ({reason})", file=sys.stderr)
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over all pairs of a row of `a` [N, e] and one of `b` [M, e], all of unit length."""
    return (a.double() @ b.double().T).mean().item()


def mean_pairwise_cosine(vectors: torch.Tensor) -> float:
    """Mean over all pairs of two different rows of [N, e], all of unit length; nan for one row."""
    count = len(vectors)
    total = vectors.double().sum(0).square().sum().item()  # all ordered pairs, including the N of a row with itself
    return (total - count) / (count * (count - 1)) if count > 1 else float("nan")


def score_pictures(pictures: list[list[Image.Image]], references: list[Image.Image], texts: list[str], clip: Scorer | None,
                   dino: Scorer | None) -> dict[str, float]:  # fmt: skip
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
