"""The pictures that the models are trained on, rendered once and kept in the work folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from miniature.drawing import ANATOMIES, render
from miniature.world import SceneSpec, random_spec

IMAGE_SIDE = 64
LATENT_SIDE = 16
IMAGE_SEED = 7
JUDGE_SEED = 11
# The rest are critters of no breed: descriptions must compose attributes that no breed has together.
TRAINING_BREED_SHARE = 0.6


def training_spec(index: int) -> SceneSpec:
    """What diffusion training picture `index` shows: never a held-out breed."""
    return random_spec(np.random.default_rng([IMAGE_SEED, index]), breed_share=TRAINING_BREED_SHARE)


def judge_spec(index: int) -> SceneSpec:
    """What training picture `index` of the two judges shows: held-out breeds too."""
    return random_spec(np.random.default_rng([JUDGE_SEED, index]), breed_share=0.3, held_out=True)


def _render_range(job: tuple[Callable[[int], SceneSpec], int, int]) -> tuple[int, np.ndarray]:
    spec_of, first, last = job
    return first, np.stack([np.asarray(render(spec_of(index), IMAGE_SIDE)) for index in range(first, last)])


def rendered(path: Path, spec_of: Callable[[int], SceneSpec], count: int) -> Tensor:
    """The pictures of `spec_of(0..count-1)`, uint8 [count, 64, 64, 3], rendered once and kept in the file `path`."""
    if path.exists() and len(images := np.load(path, mmap_mode="r")) >= count:
        return torch.from_numpy(np.array(images[:count]))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    images = np.lib.format.open_memmap(part, "w+", np.uint8, (count, IMAGE_SIDE, IMAGE_SIDE, 3))
    jobs = [(spec_of, first, min(first + 250, count)) for first in range(0, count, 250)]
    # One process renders 250 pictures faster than another imports torch.
    with get_context("spawn").Pool(min(8, os.cpu_count() or 1)) if len(jobs) > 1 else nullcontext() as pool:
        results = pool.imap_unordered(_render_range, jobs) if pool else map(_render_range, jobs)
        for first, pictures in tqdm(results, total=len(jobs), desc="render", mininterval=10):
            images[first : first + len(pictures)] = pictures
    images.flush()
    part.rename(path)
    return torch.from_numpy(np.array(images))


def detail_boxes(spec: SceneSpec) -> list[tuple[float, float, float, float]]:
    """Where ears, eyes and tail of any kind may be: boxes (left, top, right, bottom) in image sides.

    They do not depend on the kinds that `spec` has: that a critter has no tail must be learned where a tail would be.
    """
    anatomy = ANATOMIES[spec.critter.shape]
    x, y, rx, ry = anatomy.head
    rx = min(rx, 0.38)
    face_x, face_y, gap = anatomy.face
    rump_x, rump_y = anatomy.rump
    boxes = [
        (x - rx * 1.1 - 0.14, y - ry - 0.45, x + rx * 1.1 + 0.14, y - ry * 0.4),  # pointed, round, long
        (x - rx * 1.1 - 0.14, y - ry * 0.4, x - rx * 1.1 + 0.14, y + 0.2),  # floppy, on either side
        (x + rx * 1.1 - 0.14, y - ry * 0.4, x + rx * 1.1 + 0.14, y + 0.2),
        (face_x - gap - anatomy.eye, face_y - anatomy.eye, face_x + gap + anatomy.eye, face_y + anatomy.eye),
        (rump_x - 0.05, rump_y - 0.4, rump_x + 0.33, rump_y + 0.16),
    ]
    mirrored = [(-right, top, -left, bottom) if spec.flip else (left, top, right, bottom) for left, top, right, bottom in boxes]
    return [
        (spec.x + left * spec.scale, spec.y + top * spec.scale, spec.x + right * spec.scale, spec.y + bottom * spec.scale)
        for left, top, right, bottom in mirrored
    ]


def detail_mask(spec: SceneSpec) -> np.ndarray:
    """float32 [16, 16]: how much of each latent cell lies where ears, eyes and tail may be, whatever kind they are."""
    fine = 8  # points per side of a cell
    centres = (np.arange(LATENT_SIDE * fine) + 0.5) / (LATENT_SIDE * fine)
    covered = np.zeros((LATENT_SIDE * fine, LATENT_SIDE * fine), bool)
    for left, top, right, bottom in detail_boxes(spec):
        covered |= ((centres >= top) & (centres <= bottom))[:, None] & ((centres >= left) & (centres <= right))[None]
    return covered.reshape(LATENT_SIDE, fine, LATENT_SIDE, fine).mean((1, 3), dtype=np.float32)


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] to float [B, 3, 64, 64] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
