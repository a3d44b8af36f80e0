#!/usr/bin/env python
"""GF-TI: textual inversion by evolution (Fei, Fan, Huang 2023, arXiv 2304.05265), the forward-only baseline of Table 1.

CMA-ES (Hansen 2016, by the package `cma`) searches a vector z of --intrinsic_dim numbers; the token is theta0 + z A, where
A is a random matrix scaled to the vocabulary's spread, or the vocabulary's principal components. Everything but the update is
that of train_zoodip.py:

    python reproduction/gf_ti.py --train_data_dir dataset/dog6 --initializer_token dog                       # as published
    python reproduction/gf_ti.py --train_data_dir dataset/dog6 --initializer_token dog --mode fair

--mode published repeats the authors' script: every candidate has its own pictures, captions and noise (only the timestep is
shared), the search starts as wide as the vocabulary (sigma 1, alpha 1), and the best of the LAST generation is kept.
--mode fair gives the method what ZOODiP has: common random numbers, a start at a fifth of that width, and, of the
distribution's means, the best so far on a fixed set (whose forwards are counted).

The flags are those of train_zoodip.py, and the ones of `parse_args` below; a step is one generation.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_zoodip as zoodip  # noqa: E402
from benchmarks.common import cli  # noqa: E402
from reproduction import textual_inversion  # noqa: E402
from train_zoodip import Data, FrozenModel, InputError  # noqa: E402

UNUSED = [name for name in textual_inversion.UNUSED if name != "candidates_per_forward"] + ["learning_rate"]
CHECK_EVERY = 10  # generations between looks at the fixed set in --mode fair

Objective = Callable[[torch.Tensor], torch.Tensor]  # candidate tokens [C, V, d] -> losses [C]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="GF-TI, textual inversion by CMA-ES. Every other flag is that of train_zoodip.py.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--mode", default="published", choices=["published", "fair"], help="see the head of this file")
    add("--subspace", default="random", choices=["random", "pca"], help="of the token space: random projection, or the "
        "vocabulary's principal components")
    add("--intrinsic_dim", type=int, default=256, help="dimensions of that subspace")
    add("--population", type=int, default=20, help="candidates per generation, one forward each")
    add("--sigma", type=float, default=1.0, help="CMA-ES's initial step size")
    add("--alpha", type=float, default=None,
        help="spread of the first generation in units of the vocabulary's; the default is 1, and 0.2 in --mode fair")
    add("--max_train_steps", type=int, default=13000, help="generations")
    add("--timestep_sampling", default="uniform", choices=["puts", "uniform", "snr"], help="as in train_zoodip.py")
    add("--output_dir", default="results/gf_ti", help="folder for embedding, curve, record")
    args = textual_inversion.parse_baseline_args(parser, UNUSED, argv, "GF-TI")
    if args.alpha is None:
        args.alpha = 0.2 if args.mode == "fair" else 1.0
    for name, least in (("intrinsic_dim", 1), ("population", 2)):
        if getattr(args, name) < least:
            parser.exit(2, f"error: --{name} must be at least {least}, got {getattr(args, name)}\n")
    for name in ("sigma", "alpha"):
        if not 0 < getattr(args, name) < math.inf:
            parser.exit(2, f"error: --{name} must be a positive number, got {getattr(args, name)}\n")
    if args.subspace == "pca" and args.num_vectors > 1:
        parser.exit(2, f"error: --subspace pca is of one vector, got --num_vectors {args.num_vectors}; use random\n")
    return args


def vocabulary(folder: Path, variant: str | None) -> torch.Tensor:
    """The model's whole token-embedding table, [vocabulary size, d] fp32."""
    size = zoodip.read_json(folder / "text_encoder" / "config.json")["vocab_size"]
    return zoodip.read_embedding_rows(folder, variant, range(size))


def make_basis(table: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """A, [intrinsic_dim, V * d]: z ~ N(0, sigma^2) then spreads z A alpha times as wide as the vocabulary `table`.

    random: entries N(0, (alpha s / (sqrt(k) sigma))^2), s the standard deviation of all entries of the table (the authors'
    script). pca: the k first principal directions, each as long as the vocabulary's standard deviation along it.
    Raises InputError where the subspace would be larger than the space.
    """
    k, dim = args.intrinsic_dim, args.num_vectors * table.shape[1]
    if k > dim:
        raise InputError(f"--intrinsic_dim {k} is more than the token's {dim} numbers; give at most {dim}")
    if args.subspace == "random":
        generator = torch.Generator().manual_seed(args.seed)
        return torch.randn(k, dim, generator=generator) * (args.alpha * table.std().item() / (math.sqrt(k) * args.sigma))
    _, deviations, directions = torch.linalg.svd(table.double() - table.double().mean(0), full_matrices=False)
    deviations = deviations / math.sqrt(len(table) - 1)
    return (directions[:k] * deviations[:k, None] * (args.alpha / args.sigma)).float()


def noisy_losses(model: FrozenModel, data: Data, args: argparse.Namespace) -> Objective:
    """One generation's losses: all on one batch (fair), or each on its own at a shared timestep (published)."""
    generator = torch.Generator().manual_seed(args.seed)

    def draw(settings: argparse.Namespace) -> zoodip.Batch:
        return zoodip.draw_batch(data.latents, data.choices, data.prompts, data.scheduler, settings, generator)

    def objective(tokens: torch.Tensor) -> torch.Tensor:
        if args.mode == "fair":
            return model.losses(draw(args), tokens)
        timestep = int(zoodip.sample_timesteps(args.timestep_sampling, 1, generator, args.t_min, args.t_max,
                                               data.scheduler.alphas_cumprod))
        at_timestep = argparse.Namespace(**{**vars(args), "timestep_sampling": "puts", "t_min": timestep, "t_max": timestep + 1})
        return torch.cat([model.losses(draw(at_timestep), token[None]) for token in tokens])

    return objective


def evolve(objective: Objective, theta0: torch.Tensor, basis: torch.Tensor, args: argparse.Namespace,
           judge: Callable[[torch.Tensor], float], on_generation: Callable[[int, int, torch.Tensor], None] | None = None,
           show_bar: bool = True, stop: zoodip.StopSignal | None = None) -> tuple[torch.Tensor, int, int]:
    """Minimise `objective` over theta0 + z A by CMA-ES -> (theta [V, d], generations done, forwards).

    `judge` gives a token's loss on a fixed set of args.num_eval_samples; only --mode fair asks it. `on_generation` is told
    (generation, forwards, the token that would be returned now) after every generation, and before the first. After a signal
    that `stop` has seen the generation under way is the last.
    """
    warnings.filterwarnings("ignore", module="cma")  # that a plotting or Gaussian-process package is not there
    import cma

    def tokens_of(z: np.ndarray) -> torch.Tensor:  # [C, k] -> [C, V, d]
        return theta0 + (torch.from_numpy(np.asarray(z)).float() @ basis).unflatten(-1, theta0.shape)

    rng = np.random.default_rng(args.seed)
    options = dict(popsize=args.population, verbose=-9, seed=math.nan, randn=lambda *shape: rng.standard_normal(shape))
    search = cma.CMAEvolutionStrategy(np.zeros(len(basis)), args.sigma, options)
    theta, best_loss, forwards, generation = theta0.clone(), math.inf, 0, 0
    if args.mode == "fair":
        best_loss, forwards = judge(theta), args.num_eval_samples
    if on_generation is not None:
        on_generation(0, forwards, theta)
    bar = tqdm(range(1, args.max_train_steps + 1), unit="generation", mininterval=0.5, disable=not show_bar)
    for generation in bar:
        z = search.ask()
        losses = objective(tokens_of(z)).double().nan_to_num(1e9, 1e9)  # one that is not finite ranks last
        search.tell(z, losses.tolist())
        forwards += args.population
        stopped = stop is not None and stop.number != 0
        bar.set_postfix_str(f"loss {losses.min():.4f} to {losses.max():.4f}", refresh=False)
        if args.mode == "published":
            theta = tokens_of(z)[int(losses.argmin())]
        elif generation % CHECK_EVERY == 0 or generation == args.max_train_steps or stopped:
            candidate = tokens_of(search.result.xfavorite[None])[0]
            loss = judge(candidate)
            forwards += args.num_eval_samples
            if loss < best_loss:
                theta, best_loss = candidate, loss
        if on_generation is not None:
            on_generation(generation, forwards, theta)
        if stopped:
            break
    return theta, generation, forwards


def main(args: argparse.Namespace) -> None:
    def learn(model, data, inputs, evaluate, on_row, stop):
        fixed_set = zoodip.evaluation_batches(data.latents, data.choices, data.prompts, data.scheduler, args)
        curve = []

        def on_generation(generation: int, forwards: int, theta: torch.Tensor) -> None:
            if evaluate and (generation % args.eval_steps == 0 or generation == args.max_train_steps or stop.number):
                curve.append(dict(step=generation, unet_forwards=forwards, loss=None, eval_loss=evaluate(theta),
                                  token_norm=theta.norm(dim=1).mean().item()))
                on_row(curve)

        basis = make_basis(vocabulary(inputs.folder, args.variant), args)
        theta, generations, forwards = evolve(noisy_losses(model, data, args), inputs.initial_token, basis, args,
                                              lambda token: model.mean_loss(fixed_set, token), on_generation, stop=stop)
        return theta, curve, generations, forwards

    textual_inversion.run_baseline(args, f"CMA-ES, {args.mode}", learn)


if __name__ == "__main__":
    cli(main, parse_args())
