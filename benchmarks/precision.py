#!/usr/bin/env python
"""Which mu suits which precision: how well (L(theta + mu u) - L(theta)) / mu tracks the true derivative, and what NF4 costs.

    python -m benchmarks.precision                        # miniature/model, about 25 minutes on a CPU
    python -m benchmarks.precision --device cuda

For each precision, mu and token size: the correlation over (sample, direction) pairs between the finite difference in that
precision and the directional derivative by reverse-mode differentiation in fp32. Then the denoising loss over all timesteps under
each quantisation. Writes benchmarks/precision.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.quantization_cost import cost_markdown, measure_cost
from benchmarks.renders import PLACEHOLDER, Modules, make_batches, theta_of
from benchmarks.report import FOLDER, write_report
from miniature.captions import class_caption
from miniature.critters import held_out_breeds
from miniature.words import ACCESSORIES, SCENES
from miniature.world import scene_spec
from train_zoodip import RGE, candidate_losses
from trainers.textual_inversion import loss_and_gradient
from zoodip.arguments import new_parser
from zoodip.diffusion import Batch, FrozenModel, uniform_timesteps
from zoodip.errors import out_of_memory, run_script
from zoodip.prompts import Prompts, load_tokenizer
from zoodip.records import ROOT, table

T_MIN, T_MAX = 500, 900  # the timesteps of PUTS


@dataclass(frozen=True)
class Case:
    """One way of computing the loss."""

    name: str
    quantization: str
    unet: str
    text_encoder: str
    one_by_one: bool = False
    tf32: bool = False

    def scales(self, scales: list[float]) -> list[float]:
        """The token sizes to measure: one candidate at a time is a side question, for which the first size suffices."""
        return scales[:1] if self.one_by_one else scales


CASES = (
    Case("fp32", "none", "fp32", "fp32"),
    Case("fp32, candidates one by one", "none", "fp32", "fp32", one_by_one=True),
    Case("fp32, convolutions in TF32", "none", "fp32", "fp32", tf32=True),
    Case("bf16", "none", "bf16", "bf16"),
    Case("bf16, candidates one by one", "none", "bf16", "bf16", one_by_one=True),
    Case("bf16 UNet, fp32 text encoder", "none", "bf16", "fp32"),
    Case("fp32 UNet, bf16 text encoder", "none", "fp32", "bf16"),
    Case("fp16", "none", "fp16", "fp16"),
    Case("NF4 + fp32", "nf4", "fp32", "fp32"),
    Case("NF4 + bf16", "nf4", "bf16", "bf16"),
    Case("NF4 + bf16 UNet, fp32 text encoder", "nf4", "bf16", "fp32"),
    Case("NF4 + fp16", "nf4", "fp16", "fp16"),
    Case("INT8 + fp32", "int8", "fp32", "fp32"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "miniature" / "model", help="folder in diffusers format")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--samples", type=int, default=16, help="(image, timestep, noise) triples, timesteps from PUTS")
    parser.add_argument("--directions", type=int, default=4, help="random directions per sample")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 3, 10], help="token lengths, in initial token lengths")
    parser.add_argument("--cost_images", type=int, default=128, help="pictures in the fixed set that quantisation is judged on")
    parser.add_argument("--cost_timesteps", type=int, default=4, help="timesteps per picture in that set")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, noise and directions")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for precision.json and .md")
    args = parser.parse_args(argv)
    args.mus = [10 ** (-4 + k / 2) for k in range(7)]
    return args


# ----------------------------------------------------------------------------------------------------- finite differences


def draw_samples(folder: Path, tokenizer, samples: int, seed: int, device: str) -> tuple[Prompts, list[Batch]]:
    """Batches of one: renders of the held-out breeds, captions with the placeholder, timesteps by PUTS."""
    rng = np.random.default_rng(seed)
    breeds = held_out_breeds()
    specs = []
    for i in range(samples):
        scene, accessory = str(rng.choice(SCENES)), str(rng.choice(ACCESSORIES))
        specs.append(scene_spec(breeds[i % len(breeds)], scene, accessory, rng=rng))
    texts = [class_caption(spec, "{}") for spec in specs]
    generator = torch.Generator().manual_seed(seed)
    timesteps = uniform_timesteps(samples, generator, T_MIN, T_MAX)
    return make_batches(folder, tokenizer, specs, texts, timesteps, generator, device)


def finite_differences(
    model: FrozenModel, batches: list[Batch], theta: torch.Tensor, directions: torch.Tensor, mu: float
) -> torch.Tensor:
    """(L(theta + mu u) - L(theta)) / mu [S, K] for directions [S, K, V, d], separate for each sample."""
    slopes = []
    for batch, u in zip(batches, directions, strict=True):
        slopes.append(RGE.slopes(candidate_losses(model, batch, theta + mu * RGE.candidate_offsets(u)), mu))
    return torch.stack(slopes)


def exact_derivatives(model: FrozenModel, batches: list[Batch], theta: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """<grad L(theta), u> [S, K] by reverse-mode differentiation, for directions [S, K, V, d]."""
    slopes = []
    for batch, u in zip(batches, directions, strict=True):
        gradient = loss_and_gradient(model, batch, theta.clone().requires_grad_())[1]
        slopes.append(torch.einsum("kvd,vd->k", u, gradient))
    return torch.stack(slopes)


def agreement(slopes: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Pearson correlation, and root mean square error relative to the root mean square of the exact values."""
    slopes, exact = slopes.flatten().double(), exact.flatten().double()
    correlation = torch.corrcoef(torch.stack([slopes, exact]))[0, 1].item()
    error = ((slopes - exact).square().mean() / exact.square().mean()).sqrt().item()
    return dict(correlation=correlation, relative_error=error, sign_agreement=((slopes > 0) == (exact > 0)).float().mean().item())


def to_tf32(values: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to ten mantissa bits, ties to even: what a GPU's tensor cores keep of an input."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)


@contextmanager
def tf32_convolutions(unet: nn.Module) -> Iterator[None]:
    """Run the unquantised convolutions in TF32, as PyTorch by default computes fp32 convolutions on a GPU."""
    layers = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    weights = [layer.weight.data for layer in layers]
    handles = [layer.register_forward_pre_hook(lambda layer, inputs: (to_tf32(inputs[0]),)) for layer in layers]
    for layer in layers:
        layer.weight.data = to_tf32(layer.weight.data).to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for layer, weight, handle in zip(layers, weights, handles, strict=True):
            layer.weight.data = weight
            handle.remove()


def measure_case(
    case: Case,
    model: FrozenModel,
    batches: list[Batch],
    thetas: dict[str, torch.Tensor],
    directions: torch.Tensor,
    references: dict,
    mus: list[float],
) -> list[dict]:
    """One record per (token size, reference, mu); an empty list if the device cannot compute in this precision."""
    records = []
    for scale, theta in thetas.items():
        for mu in mus:
            try:
                slopes = finite_differences(model, batches, theta, directions, mu)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                print(f"{case.name}: not computed on this device ({str(error).splitlines()[0]})")
                return []
            for against in dict.fromkeys(("none", case.quantization)):
                numbers = agreement(slopes, references[against, scale])
                records.append(dict(case=case.name, theta=scale, against=against, mu=mu, **numbers))
    return records


def measure_precision(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """Measure all CASES -> (records of `measure_case`, a summary with token norms and slopes)."""
    tokenizer = load_tokenizer(args.model, PLACEHOLDER, 1)
    prompts, batches = draw_samples(args.model, tokenizer, args.samples, args.seed, args.device)
    initial = theta_of(args.model, tokenizer)
    thetas = {f"{scale:g}": scale * initial for scale in args.scales}
    generator = torch.Generator().manual_seed(args.seed + 1)
    directions = torch.randn(args.samples, args.directions, *initial.shape, generator=generator)
    modules = Modules(args.model, prompts.rows, args.device)
    references = {}
    for quantization in ("none", "nf4", "int8"):
        model = modules.model(quantization, "fp32", "fp32")
        for scale, theta in thetas.items():
            references[quantization, scale] = exact_derivatives(model, batches, theta, directions)
    records = []
    for case in CASES:
        started, chosen = time.time(), {f"{scale:g}": thetas[f"{scale:g}"] for scale in case.scales(args.scales)}
        model = modules.model(case.quantization, case.unet, case.text_encoder, case.one_by_one)
        with tf32_convolutions(model.unet) if case.tf32 else nullcontext():
            records += measure_case(case, model, batches, chosen, directions, references, args.mus)
        print(f"{case.name}: {time.time() - started:.1f} s", flush=True)
    norms = {scale: theta.norm(dim=1).mean().item() for scale, theta in thetas.items()}
    slopes = {scale: references["none", scale].square().mean().sqrt().item() for scale in thetas}
    return records, dict(token_norms=norms, rms_slope=slopes, pairs=args.samples * args.directions)


def precision_markdown(records: list[dict], summary: dict, args: argparse.Namespace) -> str:
    """One table of correlations per token size: cases down, mu across."""
    text = [
        "Correlation of (L(theta + mu u) - L(theta)) / mu with the exact directional derivative, over "
        f"{summary['pairs']} pairs of sample and direction, timesteps by PUTS, theta = the initial token times a factor."
    ]
    computed = dict.fromkeys(record["case"] for record in records)
    for scale, norm in summary["token_norms"].items():
        slope = summary["rms_slope"][scale]
        text.append(f"\nInitial token x {scale} (norm {norm:.2f}, root mean square slope {slope:.2e} per unit of mu):\n")
        rows = []
        for case in [case for case in CASES if case.name in computed]:
            for against in dict.fromkeys(("none", case.quantization)):
                chosen = [r for r in records if (r["case"], r["theta"], r["against"]) == (case.name, scale, against)]
                if not chosen:
                    continue
                reference = "unquantised" if against == "none" else "itself, quantised"
                rows.append([case.name, reference] + [f"{r['correlation']:.3f}" for r in chosen])
        text.append(table(["precision", "exact derivative of", *[f"mu {mu:.1e}" for mu in args.mus]], rows))
    left_out = [case.name for case in CASES if case.name not in computed]
    if left_out:
        text.append(f"\nNot computed on this device: {', '.join(left_out)}.")
    return "\n".join(text)


def main(args: argparse.Namespace) -> None:
    started = time.time()
    records, summary = measure_precision(args)
    costs = measure_cost(args.model, args.cost_images, args.cost_timesteps, args.seed, args.device)
    markdown = precision_markdown(records, summary, args) + "\n" + cost_markdown(costs, args.cost_images * args.cost_timesteps)
    results = dict(finite_differences=records, summary=summary, quantization_cost=costs, seconds=round(time.time() - started, 1))
    write_report("precision", vars(args), results, markdown, args.device, args.output)
    print(markdown)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
