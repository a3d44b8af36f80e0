#!/usr/bin/env python
"""Which mu for which precision: how well (L(theta + mu u) - L(theta)) / mu follows the true derivative, and what NF4 costs.

    python benchmarks/precision.py                        # miniature/model, about 4 minutes on 2 CPU cores
    python benchmarks/precision.py --device cuda

For each precision, mu and size of the token, the correlation over (sample, direction) pairs between the finite difference
in that precision and the directional derivative by reverse-mode differentiation in fp32. Then the denoising loss over all
timesteps under each way of quantising. Writes benchmarks/precision.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import DTYPES, ROOT, Loaded, cli, encode, load_model, load_part, merge_batches, table, write_report
from torch import nn

import train_zoodip as zoodip
from miniature import world


@dataclass(frozen=True)
class Case:
    """One way of computing the loss."""

    name: str
    quantization: str
    unet: str
    text_encoder: str
    one_by_one: bool = False
    cuda_only: bool = False

    def scales(self, scales: list[float], device: str) -> list[float]:
        """Where a case is slow (fp16 on a CPU: 30 times) or a side question, the first size of token must do."""
        slow = self.one_by_one or (device == "cpu" and "fp16" in (self.unet, self.text_encoder))
        return scales[:1] if slow else scales


CASES = (
    Case("fp32", "none", "fp32", "fp32"),
    Case("fp32, candidates one by one", "none", "fp32", "fp32", one_by_one=True),
    Case("bf16", "none", "bf16", "bf16"),
    Case("bf16, candidates one by one", "none", "bf16", "bf16", one_by_one=True),
    Case("bf16 UNet, fp32 text encoder", "none", "bf16", "fp32"),
    Case("fp32 UNet, bf16 text encoder", "none", "fp32", "bf16"),
    Case("fp16", "none", "fp16", "fp16"),
    Case("NF4 + fp32", "nf4", "fp32", "fp32"),
    Case("NF4 + bf16", "nf4", "bf16", "bf16"),
    Case("NF4 + bf16 UNet, fp32 text encoder", "nf4", "bf16", "fp32"),
    Case("NF4 + fp16", "nf4", "fp16", "fp16", cuda_only=True),
    Case("INT8 + fp32", "int8", "fp32", "fp32"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "miniature" / "model", help="folder in diffusers format")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--samples", type=int, default=16, help="(image, timestep, noise) triples, timesteps from PUTS")
    parser.add_argument("--directions", type=int, default=4, help="random directions per sample")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 3, 10], help="sizes of the token, in initial tokens")
    parser.add_argument("--cost_images", type=int, default=128, help="pictures of the fixed set that quantisation is judged on")
    parser.add_argument("--cost_timesteps", type=int, default=4, help="timesteps per picture of that set")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, noise and directions")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder for precision.json and .md")
    args = parser.parse_args(argv)
    args.mus = [10 ** (-4 + k / 2) for k in range(7)]
    return args


def run_args(args: argparse.Namespace, quantization: str = "none") -> argparse.Namespace:
    """The flags of train_zoodip.py that this measurement stands for."""
    return zoodip.parse_args(["--pretrained_model_name_or_path", str(args.model), "--train_data_dir", "renders",
                              "--initializer_token", world.CLASS_NOUN, "--quantization", quantization,
                              "--mixed_precision", "fp32"])


# ----------------------------------------------------------------------------------------------------- finite differences


def draw_samples(loaded: Loaded, args: argparse.Namespace, run: argparse.Namespace) -> tuple[zoodip.Prompts, list[zoodip.Batch]]:
    """`--samples` batches of one: renders of the held-out breeds, captions with the placeholder, timesteps by PUTS."""
    rng = np.random.default_rng(args.seed)
    breeds = world.held_out_breeds()
    specs = []
    for i in range(args.samples):
        scene, accessory = str(rng.choice(world.SCENES)), str(rng.choice(world.ACCESSORIES))
        specs.append(world.scene_spec(breeds[i % len(breeds)], scene, accessory, rng=rng))
    texts = [world.class_caption(spec, "{}") for spec in specs]
    prompts = loaded.prompts(sorted(set(texts)), run)
    rows = [sorted(set(texts)).index(text) for text in texts]
    latents = encode(loaded.folder, [world.render(spec, run.resolution) for spec in specs], run, args.device)
    generator = torch.Generator().manual_seed(args.seed)
    scheduler = loaded.scheduler
    timesteps = zoodip.sample_timesteps("puts", len(specs), generator, run.t_min, run.t_max, scheduler.alphas_cumprod)
    batches = [zoodip.noise_batch(latents[i, 0][None], timesteps[i, None], prompts.ids[row][None], scheduler, generator)
               for i, row in enumerate(rows)]
    return prompts, batches


def finite_differences(model: zoodip.FrozenModel, batches: list[zoodip.Batch], theta: torch.Tensor,
                       directions: torch.Tensor, mu: float) -> torch.Tensor:
    """(L(theta + mu u) - L(theta)) / mu [S, K] for directions [S, K, V, d], each sample its own."""
    slopes = []
    for batch, u in zip(batches, directions, strict=True):
        losses = model.losses(batch, theta + mu * zoodip.candidate_offsets("rge", u))
        slopes.append((losses[1:] - losses[0]) / mu)
    return torch.stack(slopes)


def exact_derivatives(model: zoodip.FrozenModel, batches: list[zoodip.Batch], theta: torch.Tensor,
                      directions: torch.Tensor) -> torch.Tensor:
    """<grad L(theta), u> [S, K] by reverse-mode differentiation, for directions [S, K, V, d]."""
    device = model.rows.device
    slopes = []
    for batch, u in zip(batches, directions, strict=True):
        token = theta.to(device).clone().requires_grad_()
        loss = zoodip.denoising_losses(model.unet, model.text_encoder, model.rows, batch.to(device), token[None])[0]
        (gradient,) = torch.autograd.grad(loss, token)
        slopes.append(torch.einsum("kvd,vd->k", u, gradient.cpu()))
    return torch.stack(slopes)


def agreement(slopes: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Pearson correlation, and root mean square error relative to the root mean square of the exact values."""
    slopes, exact = slopes.flatten().double(), exact.flatten().double()
    correlation = torch.corrcoef(torch.stack([slopes, exact]))[0, 1].item()
    error = ((slopes - exact).square().mean() / exact.square().mean()).sqrt().item()
    return dict(correlation=correlation, relative_error=error, sign_agreement=((slopes > 0) == (exact > 0)).float().mean().item())


def measure_case(case: Case, model: zoodip.FrozenModel, batches: list[zoodip.Batch], thetas: dict[str, torch.Tensor],
                 directions: torch.Tensor, references: dict, mus: list[float]) -> list[dict]:
    """One record per (size of token, reference, mu); an empty list where the device cannot compute in this precision."""
    records = []
    for scale, theta in thetas.items():
        for mu in mus:
            try:
                slopes = finite_differences(model, batches, theta, directions, mu)
            except RuntimeError as error:
                print(f"{case.name}: not computed on this device ({str(error).splitlines()[0]})")
                return []
            for against in dict.fromkeys(("none", case.quantization)):
                numbers = agreement(slopes, references[against, scale])
                records.append(dict(case=case.name, theta=scale, against=against, mu=mu, **numbers))
    return records


def measure_precision(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """All cases of CASES -> (records of `measure_case`, the norms of the tokens)."""
    run = run_args(args)
    loaded = load_model(run, args.device)
    prompts, batches = draw_samples(loaded, args, run)
    initial = loaded.initial_token(run)
    thetas = {f"{scale:g}": scale * initial for scale in args.scales}
    generator = torch.Generator().manual_seed(args.seed + 1)
    directions = torch.randn(args.samples, args.directions, *initial.shape, generator=generator)
    parts = {}

    def part(name: str, quantization: str, dtype: str) -> nn.Module:
        key = (name, quantization, dtype)
        if key not in parts:
            parts[key] = load_part(loaded.folder, name, quantization, DTYPES[dtype], args.device)
        return parts[key]

    def model_of(case: Case) -> zoodip.FrozenModel:
        unet = part("unet", case.quantization, case.unet)
        text_encoder = part("text_encoder", case.quantization, case.text_encoder)
        return zoodip.FrozenModel(unet, text_encoder, prompts.rows.to(args.device), 1 if case.one_by_one else None)

    references = {}
    for quantization in ("none", "nf4", "int8"):
        model = model_of(Case("", quantization, "fp32", "fp32"))
        for scale, theta in thetas.items():
            references[quantization, scale] = exact_derivatives(model, batches, theta, directions)
    records = []
    for case in CASES:
        if case.cuda_only and args.device == "cpu":
            continue
        started, chosen = time.time(), {f"{scale:g}": thetas[f"{scale:g}"] for scale in case.scales(args.scales, args.device)}
        records += measure_case(case, model_of(case), batches, chosen, directions, references, args.mus)
        print(f"{case.name}: {time.time() - started:.1f} s", flush=True)
    norms = {scale: theta.norm(dim=1).mean().item() for scale, theta in thetas.items()}
    slopes = {scale: references["none", scale].square().mean().sqrt().item() for scale in thetas}
    return records, dict(token_norms=norms, rms_slope=slopes, pairs=args.samples * args.directions)


def precision_markdown(records: list[dict], summary: dict, args: argparse.Namespace) -> str:
    """One table per size of the token: cases down, mu across, correlations."""
    text = ["Correlation of (L(theta + mu u) - L(theta)) / mu with the exact directional derivative, over "
            f"{summary['pairs']} pairs of sample and direction, timesteps by PUTS, theta = the initial token times a factor."]
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
    if args.device == "cpu":
        text.append("\nfp16 is very slow on a CPU, so it is here at the first size of token only; `--device cuda` computes all.")
    return "\n".join(text)


# ----------------------------------------------------------------------------------------------------- cost of quantising

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
    """A copy whose chosen weights went through quantisation and back: in fp32 the same numbers as a packed layer's."""
    model = copy.deepcopy(model)
    kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and (ends or name not in ("conv_in", "conv_out")):
            packed = zoodip.QuantizedLayer(module, zoodip.pack_weight(module.weight, quantization), torch.float32)
            module.weight = nn.Parameter(packed.dequantize().contiguous(), requires_grad=False)
    return model


def cost_batches(loaded: Loaded, args: argparse.Namespace, run: argparse.Namespace) -> tuple[zoodip.Prompts, list[zoodip.Batch]]:
    """Renders of trained breeds under sampled true captions, timesteps spread evenly over all 1000; batches of 16."""
    specs = [world.random_spec(np.random.default_rng([args.seed, 1, i])) for i in range(args.cost_images)]
    texts = [world.sample_caption(spec, np.random.default_rng([args.seed, 2, i]), dropout=0) for i, spec in enumerate(specs)]
    unique = sorted(set(texts))
    prompts = loaded.prompts(unique, run)
    ids = prompts.ids[[unique.index(text) for text in texts]]
    latents = encode(loaded.folder, [world.render(spec, run.resolution) for spec in specs], run, args.device)[:, 0]
    generator = torch.Generator().manual_seed(args.seed)
    count = len(specs) * args.cost_timesteps
    timesteps = ((torch.randperm(count, generator=generator) + 0.5) * zoodip.NUM_TRAIN_TIMESTEPS / count).long()
    batches = [zoodip.noise_batch(latents[k % len(specs)][None], timesteps[k, None], ids[k % len(specs)][None], loaded.scheduler,
                                  generator) for k in range(count)]
    return prompts, merge_batches(batches, 16)


def measure_cost(args: argparse.Namespace) -> list[dict]:
    """Mean denoising loss of each entry of COST_CASES, and its excess over the unquantised one with a standard error."""
    run = run_args(args)
    loaded = load_model(run, args.device)
    prompts, batches = cost_batches(loaded, args, run)
    theta = loaded.initial_token(run)
    rows, plain = [], None
    for name, quantization, text_too, convolutions, ends in COST_CASES:
        unet, text_encoder = loaded.unet, loaded.text_encoder
        if quantization != "none":
            unet = round_trip(unet, quantization, convolutions, ends)
            text_encoder = round_trip(text_encoder, quantization, False, False) if text_too else text_encoder
        model = zoodip.FrozenModel(unet, text_encoder, prompts.rows.to(args.device))
        losses = np.array([model.losses(batch, theta[None]).item() for batch in batches])
        plain = losses if plain is None else plain
        excess = losses - plain
        rows.append(dict(case=name, loss=losses.mean(), excess_percent=100 * excess.mean() / plain.mean(),
                         excess_standard_error=100 * excess.std(ddof=1) / math.sqrt(len(batches)) / plain.mean()))
    return rows


def cost_markdown(rows: list[dict], args: argparse.Namespace) -> str:
    count = args.cost_images * args.cost_timesteps
    text = (f"\nDenoising loss of renders with true captions, all timesteps, fp32 arithmetic, {count} (picture, timestep, noise) "
            "triples, the same for all; the standard error is of the difference:\n\n")
    cells = [[row["case"], f"{row['loss']:.5f}", f"{row['excess_percent']:+.2f} %", f"{row['excess_standard_error']:.2f} %"]
             for row in rows]
    return text + table(["weights", "mean loss", "over unquantised", "standard error"], cells)


def main(args: argparse.Namespace) -> None:
    started = time.time()
    records, summary = measure_precision(args)
    costs = measure_cost(args)
    markdown = precision_markdown(records, summary, args) + "\n" + cost_markdown(costs, args)
    results = dict(finite_differences=records, summary=summary, quantization_cost=costs, seconds=round(time.time() - started, 1))
    write_report("precision", args, results, markdown, args.device, args.output)


if __name__ == "__main__":
    cli(main, parse_args())
