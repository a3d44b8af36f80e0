"""What quantisation costs: the miniature's denoising loss over all timesteps, with different parts in 4 or 8 bits."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.renders import PLACEHOLDER, Modules, make_batches, theta_of
from miniature.captions import sample_caption
from miniature.world import random_spec
from train_zoodip import candidate_losses
from zoodip.arguments import NUM_TRAIN_TIMESTEPS
from zoodip.diffusion import Batch, merge_batches
from zoodip.prompts import Prompts, load_tokenizer
from zoodip.quantize import pack_weight, quantized_layer
from zoodip.records import table

COST_CASES = (
    # name, quantisation, text encoder too, UNet's Conv2d too, conv_in and conv_out too
    ("unquantised", "none", False, False, False),
    ("NF4, Linear only", "nf4", True, False, False),
    ("NF4, all but conv_in and conv_out (as trained)", "nf4", True, True, False),
    ("NF4, all but conv_in and conv_out, UNet only", "nf4", False, True, False),
    ("NF4, all", "nf4", True, True, True),
    ("INT8, Linear only", "int8", True, False, False),
    ("INT8, all but conv_in and conv_out (as trained)", "int8", True, True, False),
    ("INT8, all", "int8", True, True, True),
)


def round_trip(model: nn.Module, quantization: str, convolutions: bool, ends: bool) -> nn.Module:
    """A copy whose chosen weights were quantised and dequantised: in fp32, the same values as a packed layer's."""
    model = copy.deepcopy(model)
    kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and (ends or name not in ("conv_in", "conv_out")):
            packed = quantized_layer(module, pack_weight(module.weight, quantization))
            module.weight = nn.Parameter(packed.dequantize().contiguous(), requires_grad=False)
    return model


def cost_batches(folder: Path, tokenizer, images: int, timesteps: int, seed: int, device: str) -> tuple[Prompts, list[Batch]]:
    """Renders of trained breeds with sampled true captions, timesteps spread evenly over all 1000; batches of 16."""
    specs = [random_spec(np.random.default_rng([seed, 1, i])) for i in range(images)]
    texts = [sample_caption(spec, np.random.default_rng([seed, 2, i]), dropout=0) for i, spec in enumerate(specs)]
    generator = torch.Generator().manual_seed(seed)
    count = images * timesteps
    spread = ((torch.randperm(count, generator=generator) + 0.5) * NUM_TRAIN_TIMESTEPS / count).long()
    prompts, batches = make_batches(folder, tokenizer, specs, texts, spread, generator, device)
    return prompts, merge_batches(batches, 16)


def measure_cost(folder: Path, images: int, timesteps: int, seed: int, device: str) -> list[dict]:
    """Mean denoising loss of each entry of COST_CASES, and its excess over the unquantised one with a standard error."""
    tokenizer = load_tokenizer(folder, PLACEHOLDER, 1)
    prompts, batches = cost_batches(folder, tokenizer, images, timesteps, seed, device)
    theta, plain = theta_of(folder, tokenizer), Modules(folder, prompts.rows, device)
    rows, unquantised = [], None
    for name, quantization, text_too, convolutions, ends in COST_CASES:
        model = plain.model("none", "fp32", "fp32")
        if quantization != "none":
            model.unet = round_trip(model.unet, quantization, convolutions, ends)
            model.text_encoder = round_trip(model.text_encoder, quantization, False, False) if text_too else model.text_encoder
        losses = np.array([candidate_losses(model, batch, theta[None]).item() for batch in batches])
        unquantised = losses if unquantised is None else unquantised
        excess = 100 * (losses - unquantised) / unquantised.mean()
        error = excess.std(ddof=1) / math.sqrt(len(batches))
        rows.append(dict(case=name, loss=losses.mean(), excess_percent=excess.mean(), excess_standard_error=error))
    return rows


def cost_markdown(rows: list[dict], count: int) -> str:
    """The table of `measure_cost`, over `count` triples."""
    text = (
        f"\nDenoising loss of renders with true captions, all timesteps, fp32 arithmetic, {count} (picture, timestep, noise) "
        "triples, the same for all; the standard error is of the difference:\n\n"
    )
    cells = [
        [row["case"], f"{row['loss']:.5f}", f"{row['excess_percent']:+.2f} %", f"{row['excess_standard_error']:.2f} %"]
        for row in rows
    ]
    return text + table(["weights", "mean loss", "over unquantised", "standard error"], cells)
