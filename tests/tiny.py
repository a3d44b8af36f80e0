"""The tiny model as this project loads it and as the stock libraries do, for the tests that look inside."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from conftest import seeded
from safetensors.torch import load_file, save_file
from torch import nn

from train_zoodip import denoising_losses
from zoodip.diffusion import Batch, FrozenModel, noise_batch
from zoodip.folder import WEIGHT_NAMES
from zoodip.model import load_frozen, load_text_encoder
from zoodip.prompts import build_prompts, load_tokenizer

PARTS = ["unet", "vae", "text_encoder"]
TOKEN = "<sks>"


def weights_of(folder: Path, part: str) -> Path:
    return folder / part / f"{WEIGHT_NAMES[part]}.safetensors"


def load(folder, part: str, quantization: str = "none", dtype=torch.float32, variant=None, skip=()):
    return load_frozen(Path(folder), part, variant, quantization, dtype, "cpu", skip)


def from_pretrained(folder, part: str):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    model_class = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
    return model_class.from_pretrained(folder / part)


def rewrite(folder: Path, part: str, change) -> None:
    path = weights_of(folder, part)
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert set(ours) == set(theirs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    for (name, ours), (_, theirs) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def scheduler_of(folder, **changes):
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(folder / "scheduler", **changes)


def alphas_cumprod() -> np.ndarray:
    """Stable Diffusion's schedule, "scaled_linear", written out."""
    return np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)


class Tiny:
    """The tiny model, frozen in fp32 without quantisation, and prompts over two texts with one or more vectors."""

    def __init__(self, folder, num_vectors: int):
        self.folder, self.num_vectors = folder, num_vectors
        self.unet = load_frozen(folder, "unet", None, "none", torch.float32, "cpu")
        self.text_encoder = load_text_encoder(folder, None, "none", torch.float32, "cpu")
        self.tokenizer = load_tokenizer(folder, TOKEN, num_vectors)
        self.texts = ["a photo of {} in the snow", "{} on the grass with a cat"]
        self.prompts = build_prompts(self.tokenizer, folder, None, self.texts, TOKEN, num_vectors)
        self.width = self.prompts.rows.shape[1]

    def tokens(self, count: int, seed: int = 7) -> torch.Tensor:
        return 0.5 * torch.randn(count, self.num_vectors, self.width, generator=seeded(seed))

    def batch(self, size: int, seed: int = 3) -> Batch:
        generator = seeded(seed)
        latents = torch.rand(size, 2, 4, 8, 8, generator=generator)
        timesteps = torch.randint(500, 900, (size,), generator=generator)
        ids = self.prompts.ids[torch.arange(size) % 2]
        return noise_batch(latents, timesteps, ids, scheduler_of(self.folder), generator)

    def losses(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """The losses as the script computes them, with gradients."""
        model = FrozenModel(self.unet, self.text_encoder, self.prompts.rows)
        return denoising_losses(model.predict(batch, tokens), batch.target)

    def stock_states(self, text: str, token: torch.Tensor) -> torch.Tensor:
        """States [L, d] as a user gets them: the stock encoder, the vectors as new rows of its table, one word per vector."""
        from transformers import CLIPTextModel, CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        names = [TOKEN] + [f"{TOKEN}_{i}" for i in range(1, self.num_vectors)]
        tokenizer.add_tokens(names)
        encoder = CLIPTextModel.from_pretrained(self.folder / "text_encoder")
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[-self.num_vectors :] = token
        ids = tokenizer(text.replace("{}", " ".join(names)), padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(ids).last_hidden_state[0]
