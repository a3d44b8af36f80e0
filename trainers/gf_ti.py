#!/usr/bin/env python
"""GF-TI: textual inversion by evolution, the forward-only baseline of ZOODiP's Table 1.

Implements Fei, Fan, Huang, "Gradient-Free Textual Inversion" (arXiv 2304.05265). CMA-ES (Hansen, arXiv 1604.00772, from the
package `cma`) searches for a vector z of --intrinsic_dim numbers; the token is theta0 + z A, where A is a random matrix scaled to
the vocabulary's spread, or the vocabulary's principal components. A step is one generation:

    population candidates z  ->  tokens theta0 + z A  ->  one UNet forward each  ->  losses  ->  mean, step size and covariance

    python -m trainers.gf_ti --train_data_dir dataset/dog6 --initializer_token dog                       # as published
    python -m trainers.gf_ti --train_data_dir dataset/dog6 --initializer_token dog --mode fair

--mode published reproduces the authors' script: every candidate has its own pictures, captions and noise (only the timestep is
shared), the search starts as wide as the vocabulary (alpha 1), and the best of the LAST generation is kept.
--mode fair gives the method what ZOODiP has: common random numbers, a start at a fifth of that width, and the best of the
distribution's means so far on the fixed evaluation set (whose forwards are counted).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from zoodip import arguments
from zoodip.arguments import flags_for, require, require_at_least_one, require_positive
from zoodip.errors import InputError, prepare_process, run_script

METHOD_SETTINGS = "method mode subspace intrinsic_dim population alpha timestep_sampling t_min t_max num_eval_samples".split()
SETTINGS = [*arguments.SHARED_SETTINGS, *METHOD_SETTINGS]  # recorded in checkpoints; resuming with others is refused


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Learn one token embedding for a subject with CMA-ES, using only forward passes.")
    arguments.add_model_flags(parser)
    arguments.add_token_flags(parser)
    arguments.add_subject_flags(parser)
    add = parser.add_argument_group("method").add_argument
    add("--mode", default="published", choices=["published", "fair"], help="see the top of this file")
    add("--subspace", default="random", choices=["random", "pca"], help="random matrix, or the vocabulary's principal components")
    add("--intrinsic_dim", type=int, default=256, help="dimensions of that subspace of token space")
    add("--population", type=int, default=20, help="candidates per generation, one forward each")
    add("--alpha", type=float, default=None, help="initial spread, in units of the vocabulary's; default: 1 (--mode fair: 0.2)")
    add("--max_train_steps", type=int, default=13000, help="generations")
    arguments.add_timestep_flags(add, "uniform")
    arguments.add_step_flags(
        add, "images that each candidate is judged on", "with --mode fair: candidates per UNet forward; default: all at once"
    )
    arguments.add_run_flags(parser)
    parser.set_defaults(output_dir="results/gf_ti", method="gf_ti")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    args = arguments.parse(build_parser(), check_flags, argv, without_effect)
    if args.alpha is None:
        args.alpha = 0.2 if args.mode == "fair" else 1.0
    return args


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    arguments.check_training_flags(flags)
    require_at_least_one(flags, "intrinsic_dim")
    require(flags, "population", flags["population"] >= 3, "must be at least 3 (CMA-ES tells the better half from the rest)")
    if flags["alpha"] is not None:
        require_positive(flags, "alpha", "0.2")
    check_subspace(flags)


def without_effect(flags: dict, given: set[str]) -> Iterator[str]:
    """A line for each `given` flag that has no effect in this combination."""
    fair = flags["mode"] == "fair"  # looks at tokens on the evaluation set
    yield from arguments.without_effect(flags, given, evaluated=fair or flags["eval_steps"] > 0)
    if "candidates_per_forward" in given and not fair:
        yield f"--candidates_per_forward {flags['candidates_per_forward']} has no effect without --mode fair"


def check_subspace(flags: dict) -> None:
    """Raises InputError. Called again once an embedding file has said how many vectors it has."""
    require(flags, "num_vectors", flags["subspace"] != "pca" or flags["num_vectors"] == 1, "must be 1 with --subspace pca")


# torch takes a second to import, so --help and invalid arguments are handled first.
if __name__ == "__main__":
    ARGS = parse_args()
    prepare_process()

import math
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from zoodip.diffusion import (
    Batch,
    Data,
    FrozenModel,
    TimestepSampler,
    draw_batch,
    evaluation_batches,
    load_model,
    read_inputs,
    settle_flags,
    timestep_sampler,
    uniform_timesteps,
)
from zoodip.folder import config_number
from zoodip.outputs import TokenOutputs
from zoodip.process import make_accelerator
from zoodip.prompts import read_embedding_rows
from zoodip.run import Run, due

CHECK_EVERY = 10  # generations between evaluations on the fixed set in --mode fair

# ---------------------------------------------------------------------------------------------------------------------
# The subspace
# ---------------------------------------------------------------------------------------------------------------------


def vocabulary(folder: Path, variant: str | None) -> torch.Tensor:
    """The model's whole token-embedding table, [vocabulary size, d] fp32. Raises InputError."""
    size = config_number(folder / "text_encoder" / "config.json", "vocab_size", 49408)
    return read_embedding_rows(folder, variant, range(size))


def make_basis(table: torch.Tensor, *, subspace: str, intrinsic_dim: int, num_vectors: int = 1, alpha: float = 1.0,
               seed: int = 0) -> torch.Tensor:  # fmt: skip
    """A, [intrinsic_dim, V * d]: for z ~ N(0, 1), z A is spread alpha times as wide as the vocabulary `table`.

    random: entries N(0, (alpha s / sqrt(k))^2), with s the standard deviation of all entries of the table (the authors' script;
    it also has CMA-ES's initial sigma, but divides A by it, so that the search is the same whatever sigma is). pca: the first k
    principal directions, each as long as the vocabulary's standard deviation along it.
    Raises InputError if the subspace would be larger than the space.
    """
    dim = num_vectors * table.shape[1]
    if intrinsic_dim > dim:
        raise InputError(f"--intrinsic_dim {intrinsic_dim} is more than the token's {dim} numbers; give at most {dim}")
    if subspace == "random":
        generator = torch.Generator().manual_seed(seed)
        scale = alpha * table.std().item() / math.sqrt(intrinsic_dim)
        return torch.randn(intrinsic_dim, dim, generator=generator) * scale
    _, deviations, directions = torch.linalg.svd(table.double() - table.double().mean(0), full_matrices=False)
    deviations = deviations / math.sqrt(len(table) - 1)
    return (directions[:intrinsic_dim] * deviations[:intrinsic_dim, None] * alpha).float().contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# The losses of a generation
# ---------------------------------------------------------------------------------------------------------------------


def generation_losses(model: FrozenModel, data: Data, tokens: torch.Tensor, mode: str, batch_size: int, sample: TimestepSampler,
                      generator: torch.Generator) -> torch.Tensor:  # fmt: skip
    """Losses [C] of tokens [C, V, d]: all on one batch (fair), or each on its own, at a shared timestep (published)."""
    if mode == "fair":
        return model.losses(draw_batch(data, batch_size, sample, generator), tokens)
    timestep = int(sample(1, generator))
    shared = partial(uniform_timesteps, low=timestep, high=timestep + 1)
    return torch.cat([model.losses(draw_batch(data, batch_size, shared, generator), token[None]) for token in tokens])


# ---------------------------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------------------------


def search_state(search) -> dict[str, np.ndarray | float | int]:
    """What a CMAEvolutionStrategy of cma 4.5 makes its next generations from, except for random numbers. The rest of it is
    options, records, and caches that begin empty."""
    model, coordinates = search.sm, search.gp
    moved = not coordinates.isidentity  # into the main axes, once, after the condition number of C has passed 1e12
    none = np.zeros((0, search.N))
    return dict(
        mean=search.mean, sigma=search.sigma, pc=search.pc, ps=search.adapt_sigma.ps, countiter=search.countiter,
        C=model.C, B=model.B, D=model.D, count_tell=model.count_tell, last_update=model.last_update,
        scaling=search.sigma_vec.scaling * np.ones(search.N),  # of the coordinates: not 1 once their condition has passed 1e8
        to_pheno=coordinates._tf_matrix if moved else none, to_geno=coordinates._tf_matrix_inv if moved else none,
    )  # fmt: skip


def restore_search(search, state: dict[str, np.ndarray | float | int]) -> None:
    """Continue a fresh search from a `state` of `search_state`: its generations equal those of the saved search bit for bit."""
    owners = dict(ps=search.adapt_sigma, C=search.sm, D=search.sm, count_tell=search.sm, last_update=search.sm)
    for name in ("mean", "sigma", "pc", "countiter", *owners):
        setattr(owners.get(name, search), name, state[name])
    search.sm.B = np.asfortranarray(state["B"])  # as eigh returns it: another layout changes the last bit
    search.sigma_vec = type(search.sigma_vec)(state["scaling"])
    if len(state["to_pheno"]):
        coordinates = search.gp
        coordinates._tf_matrix, coordinates._tf_matrix_inv = state["to_pheno"], state["to_geno"]
        coordinates.tf_pheno, coordinates.tf_geno, coordinates.isidentity = search._tfp, search._tfg, False
    search._updateBDfromSM()  # its copies of C, B and D
    search.mean_old = search.mean.copy()  # the next generation needs one, and replaces it


class GFTI:
    """theta [V, d], the token that is kept, and the search for it: CMA-ES over z [k], fp64 on the CPU (1 MB for k = 256)."""

    remedy = "a smaller --alpha"

    def __init__(self, token: torch.Tensor, basis: torch.Tensor, *, mode: str = "published", population: int = 20,
                 seed: int = 0):  # fmt: skip
        """token: theta0 [V, d], where the search starts; basis: A [k, V * d]."""
        warnings.filterwarnings("ignore", module="cma")  # about missing plotting or Gaussian-process packages
        import cma

        self.origin, self.basis, self.mode = token.detach().clone().float(), basis, mode
        self.theta, self.best = self.origin.clone(), self.origin.clone()
        self.best_loss: float | None = None  # of `best` on the fixed set
        self.normal = np.random.default_rng(seed)
        # seed nan: numpy's global generator is left alone; CMA_mirrors 0: cma would mirror candidates in populations below 6
        options = dict(popsize=population, verbose=-9, seed=math.nan, CMA_mirrors=0,
                       randn=lambda *shape: self.normal.standard_normal(shape))  # fmt: skip
        self.search = cma.CMAEvolutionStrategy(np.zeros(len(basis)), 1.0, options)
        self.search.timer = cma.utilities.utils.ElapsedWCTime()  # made by the first generation and needed by later ones

    def tokens(self, z: np.ndarray) -> torch.Tensor:
        """theta0 + z A: [C, k] -> [C, V, d]."""
        return self.origin + (torch.from_numpy(z).float() @ self.basis).unflatten(-1, self.origin.shape)

    def ask(self) -> torch.Tensor:
        """Draw a new generation: candidate tokens [C, V, d]."""
        self.z = self.search.ask()
        self.candidates = self.tokens(np.asarray(self.z))
        return self.candidates

    def tell(self, losses: torch.Tensor) -> float | None:
        """Update the search from the generation's losses [C] -> their mean, or None, without an update, if none is finite."""
        finite = torch.isfinite(losses)
        if not finite.any():
            return None
        ranked = losses.double().nan_to_num(1e9, 1e9)  # losses that are not finite rank last
        self.search.tell(self.z, ranked.tolist())
        self.theta = self.candidates[int(ranked.argmin())] if self.mode == "published" else self.best
        return losses[finite].mean().item()

    def mean(self) -> torch.Tensor:
        """The token at the distribution's mean, [V, d]."""
        return self.tokens(self.search.gp.pheno(self.search.mean)[None])[0]

    def look(self, loss: float, keep: bool) -> None:
        """Judge the mean by its loss on the fixed set: if it is the best so far, theta becomes it, permanently if `keep`."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.theta = self.mean()
            if keep:
                self.best, self.best_loss = self.theta, loss

    def state_dict(self) -> dict:
        """Everything the next generations depend on, except the generator of batches."""
        search = {f"cma.{name}": torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
                  for name, value in search_state(self.search).items()}  # fmt: skip
        return {"theta": self.theta.clone(), "best": self.best, "best_loss": self.best_loss, "basis": self.basis, **search,
                "normal": self.normal.bit_generator.state}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.theta, self.best, self.best_loss, self.basis = (state[name] for name in ("theta", "best", "best_loss", "basis"))
        search = {name.removeprefix("cma."): value.numpy() if isinstance(value, torch.Tensor) else value
                  for name, value in state.items() if name.startswith("cma.")}  # fmt: skip
        restore_search(self.search, search)
        self.normal.bit_generator.state = state["normal"]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def train(run: Run, outputs: TokenOutputs, evolution: GFTI, model: FrozenModel, data: Data, sample: TimestepSampler,
          fixed_set: list[Batch], batch_size: int, generator: torch.Generator) -> None:  # fmt: skip
    """Train from the current generation of `run` to its last or to a signal."""
    fair = evolution.mode == "fair"
    if fair and evolution.best_loss is None:
        evolution.look(model.mean_loss(fixed_set, evolution.theta), keep=True)
        run.progress.forwards += len(fixed_set)
    for generation in run.steps(outputs):
        tokens = evolution.ask()
        loss = evolution.tell(generation_losses(model, data, tokens, evolution.mode, batch_size, sample, generator))
        forwards = len(tokens)
        if fair and (due(generation, CHECK_EVERY) or generation == run.max_train_steps):
            # not kept if only this run ends here: continued from its checkpoint, it gives the generations of a longer run
            evolution.look(model.mean_loss(fixed_set, evolution.mean()), keep=due(generation, CHECK_EVERY))
            forwards += len(fixed_set)
        run.note(loss, forwards)


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save. Returns the exit code: 0, or 128 + signal if interrupted (and saved). Raises InputError."""
    flags = vars(args)  # a view: values set on `args` below appear in it too
    if find_spec("cma") is None:
        raise InputError("GF-TI needs the package cma, which is not installed; run pip install cma")
    inputs = read_inputs(**flags_for(read_inputs, flags))
    accelerator = make_accelerator(1, **flags_for(make_accelerator, flags))
    flags.update(settle_flags(inputs.folder, inputs.variant, accelerator.device, **flags_for(settle_flags, flags)))
    args.num_vectors = len(inputs.initial_token)  # an embedding file has its own number
    check_subspace(flags)
    basis = make_basis(vocabulary(inputs.folder, inputs.variant), **flags_for(make_basis, flags))

    generator = torch.Generator().manual_seed(args.seed)
    evolution = GFTI(inputs.initial_token, basis, **flags_for(GFTI, flags))
    run = Run(evolution, generator, accelerator, arguments.settings_of(flags, SETTINGS), inputs.fingerprint(), unit="generation",
              **flags_for(Run, flags))  # fmt: skip
    run.resume(args.resume_from_checkpoint)
    run.claim(inputs.folder)
    model, data = load_model(inputs, device=accelerator.device, **flags_for(load_model, flags))
    outputs = TokenOutputs(evolution, inputs, model, data, run.settings, **flags_for(TokenOutputs, flags))
    fixed_set = evaluation_batches(data, args.num_eval_samples, args.t_min, args.t_max)
    sample = timestep_sampler(data, **flags_for(timestep_sampler, flags))
    with run:
        train(run, outputs, evolution, model, data, sample, fixed_set, args.train_batch_size, generator)
    return run.finish(outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
