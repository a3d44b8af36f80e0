"""Renders of the miniature's world as batches, and a model's modules in several precisions."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from miniature.drawing import render
from miniature.words import CLASS_NOUN
from miniature.world import SceneSpec
from zoodip.diffusion import Batch, FrozenModel, encode_images, forbid_tf32, load_scheduler, noise_batch
from zoodip.folder import native_resolution
from zoodip.model import load_text_encoder, load_unet, load_vae_encoder
from zoodip.prompts import Prompts, build_prompts, initial_token, initializer_ids, read_embedding_rows
from zoodip.quantize import DTYPES

PLACEHOLDER = "<sks>"


def theta_of(folder: Path, tokenizer) -> torch.Tensor:
    """The embedding of the class noun, [1, d]."""
    return initial_token(read_embedding_rows(folder, None, initializer_ids(tokenizer, CLASS_NOUN)), 1)


def encode(folder: Path, specs: list[SceneSpec], device: str) -> torch.Tensor:
    """Latent distributions [N, 2, 2, 4, h, w] of pictures from the unquantised encoder, read from image files as in training."""
    resolution = native_resolution(folder)
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary) / f"{i:05}.png" for i in range(len(specs))]
        for path, spec in zip(paths, specs, strict=True):
            render(spec, resolution).save(path, compress_level=1)
        return encode_images(load_vae_encoder(folder, None, device), paths, resolution, False)


def make_batches(
    folder: Path,
    tokenizer,
    specs: list[SceneSpec],
    texts: list[str],
    timesteps: torch.Tensor,
    generator: torch.Generator,
    device: str,
) -> tuple[Prompts, list[Batch]]:
    """Batches of one: timestep k with picture k, starting over from the first picture when they run out."""
    unique = sorted(set(texts))
    prompts = build_prompts(tokenizer, folder, None, unique, PLACEHOLDER, 1)
    ids = prompts.ids[[unique.index(text) for text in texts]]
    latents, scheduler = encode(folder, specs, device)[:, 0], load_scheduler(folder)
    pictures = [k % len(specs) for k in range(len(timesteps))]
    return prompts, [
        noise_batch(latents[i][None], timesteps[k, None], ids[i][None], scheduler, generator) for k, i in enumerate(pictures)
    ]


class Modules:
    """UNets and text encoders by quantisation and precision, each loaded once."""

    def __init__(self, folder: Path, rows: torch.Tensor, device: str):
        forbid_tf32()  # as in training
        self.folder, self.rows, self.device = folder, rows.to(device), device
        self.loaded: dict[tuple, nn.Module] = {}

    def get(self, load, quantization: str, precision: str) -> nn.Module:
        key = (load, quantization, precision)
        if key not in self.loaded:
            self.loaded[key] = load(self.folder, None, quantization, DTYPES[precision], self.device)
        return self.loaded[key]

    def model(self, quantization: str, unet: str, text_encoder: str, one_by_one: bool = False) -> FrozenModel:
        """UNet and text encoder, each in its own precision; `one_by_one`: one forward per candidate."""
        modules = self.get(load_unet, quantization, unet), self.get(load_text_encoder, quantization, text_encoder)
        return FrozenModel(*modules, self.rows, 1 if one_by_one else None)
