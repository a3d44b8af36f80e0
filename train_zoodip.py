#!/usr/bin/env python
"""ZOODiP: teach a frozen 4-bit Stable Diffusion one new word from a handful of photographs, with forward passes only.

Implements Seo, Jeong, Lee, Chun, "Efficient Personalization of Quantized Diffusion Model without Backpropagation"
(CVPR 2025, arXiv 2503.14868). Equations, algorithms and tables cited below are that paper's.

One training step, in the order of this file:

    image, flip, caption, timestep (Eq. 9), noise  ->  n + 1 candidate tokens  ->  one batched UNet forward
    ->  n + 1 losses (Eq. 1)  ->  zeroth-order gradient (Eq. 3)  ->  Subspace Gradient projection (Eqs. 4-8)  ->  Adam

Everything but the token (768 numbers) is frozen, and the modules that training runs through are quantised. Usage:

    python train_zoodip.py --train_data_dir dataset/dog6 --initializer_token dog --use_cc            # one GPU
    python train_zoodip.py --train_data_dir dataset/dog6 --initializer_token dog --use_cc \\
        --mixed_precision bf16                                                                      # a CPU
    accelerate launch --num_processes 3 train_zoodip.py ...              # the candidates of a step, split over three GPUs

This script contains the method. What it shares with the other trainers (photographs, prompts, the quantised model, recording and
resuming a run) is in zoodip/.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from zoodip import arguments
from zoodip.arguments import flags_for, require, require_at_least_one, require_positive
from zoodip.errors import prepare_process, run_script

# Flags that affect what is learned. Checkpoints record them, and resuming with different values is refused.
METHOD_SETTINGS = "n mu tau nu t_min t_max timestep_sampling estimator learning_rate".split()
SETTINGS = [*arguments.SHARED_SETTINGS, *METHOD_SETTINGS]
# Flags that affect it too but are recorded only if they differ from these values. A schedule that ends also records its end.
OPTIONAL_SETTINGS = {**arguments.OPTIONAL_SETTINGS, "lr_scheduler": "constant", "lr_warmup_steps": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Learn one token embedding for a subject with only forward passes through a quantised Stable Diffusion."
    )
    add = arguments.add_model_flags(parser)
    add(
        "--save_quantized",
        default=None,
        metavar="DIR",
        help="write the quantised model to DIR, for use as --pretrained_model_name_or_path; without --train_data_dir, do "
        "nothing else",
    )
    arguments.add_token_flags(parser)
    arguments.add_subject_flags(parser)

    add = parser.add_argument_group("method (defaults are the paper's)").add_argument
    add("--n", type=int, default=2, help="random directions per gradient estimate")
    add(
        "--mu",
        type=float,
        default=None,
        help="scale of the perturbation mu u, u ~ N(0, I), whose length is about mu times the root of the token's size; default: "
        "1e-3, or 1e-2 with bf16 activations",
    )
    add("--tau", type=int, default=128, help="tokens in the Subspace Gradient buffer = steps between its refreshes")
    add("--nu", type=float, default=1e-3, help="share of the trajectory's variance to project out; 0: no projection")
    arguments.add_timestep_flags(add, "puts")  # --t_min and --t_max: T_L and T_U of Eq. 9
    add("--estimator", default="rge", choices=["rge", "spsa", "one_point"], help="zeroth-order gradient estimator")
    add("--learning_rate", type=float, default=5e-3, help="learning rate of Adam (betas .9, .999, epsilon 1e-3)")
    add(
        "--lr_scheduler",
        default="constant",
        choices=["constant", "constant_with_warmup", "linear", "cosine"],
        help="learning rate schedule, as in diffusers; all but the constant ones end at 0 after --max_train_steps",
    )
    add("--lr_warmup_steps", type=int, default=0, help="updates over which the learning rate rises from 0; not for constant")
    add("--max_train_steps", type=int, default=30000, help="steps to train")
    arguments.add_step_flags(add, "images per step; all candidates share them")

    arguments.add_run_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    return arguments.parse(build_parser(), check_flags, argv, without_effect)


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    if flags["save_quantized"] is not None:
        require(flags, "quantization", flags["quantization"] != "none", "must be nf4 or int8 with --save_quantized")
        if flags["train_data_dir"] is None:
            return
        packed, output = (Path(flags[name]).resolve() for name in ("save_quantized", "output_dir"))
        require(flags, "save_quantized", packed not in (output, *output.parents), "must not be, or contain, --output_dir")
    arguments.check_training_flags(flags)
    require_at_least_one(flags, "n")
    if flags["mu"] is not None:
        require_positive(flags, "mu", "1e-3")
    require(flags, "lr_warmup_steps", flags["lr_warmup_steps"] >= 0, "must not be negative")
    require(flags, "tau", flags["tau"] >= 2, "must be at least 2 (a variance needs two tokens)")
    require(flags, "nu", 0 <= flags["nu"] < 1, "must be in [0, 1)")


def without_effect(flags: dict, given: set[str]) -> Iterator[str]:
    """A line for each `given` flag that has no effect in this combination."""
    if flags["train_data_dir"] is None:
        packing = "save_quantized quantization pretrained_model_name_or_path revision variant model_config resume_from_checkpoint"
        for name in sorted(given - set(packing.split())):
            yield f"--{name} {flags[name]} has no effect without --train_data_dir: the model is only packed"
        return
    yield from arguments.without_effect(flags, given)
    if "tau" in given and flags["nu"] == 0:
        yield f"--tau {flags['tau']} has no effect with --nu 0, which projects nothing out"
    if "lr_warmup_steps" in given and flags["lr_scheduler"] == "constant":
        yield f"--lr_warmup_steps {flags['lr_warmup_steps']} has no effect with --lr_scheduler constant"


# torch takes a second to import, so --help and invalid arguments are handled first.
if __name__ == "__main__":
    ARGS = parse_args()
    prepare_process()

import torch
from torch import nn

from zoodip.diffusion import (
    Batch,
    Data,
    FrozenModel,
    TimestepSampler,
    draw_batch,
    load_model,
    read_inputs,
    settle_flags,
    timestep_sampler,
    uniform_timesteps,
)
from zoodip.files import ensure_writable
from zoodip.outputs import TokenOutputs
from zoodip.packing import save_quantized
from zoodip.process import make_accelerator
from zoodip.run import Run

# ---------------------------------------------------------------------------------------------------------------------
# Timesteps: Partial Uniform Timestep Sampling (Eq. 9)
# ---------------------------------------------------------------------------------------------------------------------


def partial_uniform_timesteps(batch_size: int, generator: torch.Generator, t_min: int, t_max: int) -> torch.Tensor:
    """Timesteps [batch_size], uniform over the integers [t_min, t_max). Alternatives (Table 5): `timestep_sampler`."""
    return uniform_timesteps(batch_size, generator, t_min, t_max)


# ---------------------------------------------------------------------------------------------------------------------
# The loss (Eq. 1)
# ---------------------------------------------------------------------------------------------------------------------


def denoising_losses(noise_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L(theta) of Eq. 1 for C candidates: predictions [C, B, 4, h, w], target [B, 4, h, w] -> [C], accumulated in fp32."""
    return (noise_pred - target.float()).square().flatten(1).mean(1)


@torch.inference_mode()
def candidate_losses(model: FrozenModel, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """Losses [C], on the CPU, of candidate tokens [C, V, d], all on the same images, timesteps and noise."""
    noise_pred = model.predict(batch, tokens)
    return denoising_losses(noise_pred, batch.target.to(noise_pred.device)).cpu()


def shared_losses(accelerator, model: FrozenModel, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """Losses [C] of all candidates; each process evaluates its share, and only losses are exchanged.

    Every process draws the same random numbers and so holds the same theta, which is never sent.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    if processes == 1:
        return candidate_losses(model, batch, tokens)
    losses = torch.zeros(len(tokens))
    losses[rank::processes] = candidate_losses(model, batch, tokens[rank::processes])
    return accelerator.reduce(losses.to(accelerator.device), reduction="sum").cpu()


# ---------------------------------------------------------------------------------------------------------------------
# The zeroth-order gradient (Eq. 3) and its alternatives (Table S4)
# ---------------------------------------------------------------------------------------------------------------------


class RGE:
    """One-sided differences (Eq. 3): n + 1 forwards, one of them at theta."""

    @staticmethod
    def num_directions(n: int) -> int:
        """Number of random directions drawn for an estimate of n slopes."""
        return n

    @staticmethod
    def num_candidates(n: int) -> int:
        """Number of tokens whose loss an estimate of n slopes needs, i.e. its forwards."""
        return n + 1

    @staticmethod
    def candidate_offsets(directions: torch.Tensor) -> torch.Tensor:
        """Offsets from theta at which the loss is evaluated, in units of mu. Directions [n, V, d] -> [C, V, d]."""
        return torch.cat([torch.zeros_like(directions[:1]), directions])

    @staticmethod
    def slopes(losses: torch.Tensor, mu: float) -> torch.Tensor:
        """p_i = (L(theta + mu u_i) - L(theta)) / mu, from the losses [C] at the offsets -> [n]."""
        return (losses[1:] - losses[0]) / mu

    @staticmethod
    def loss(losses: torch.Tensor) -> torch.Tensor:
        """The loss to report for a step."""
        return losses[0]


class SPSA(RGE):
    """Central differences: 2n forwards, none of them at theta; their mean loss differs from the loss at theta by O(mu^2)."""

    @staticmethod
    def num_candidates(n: int) -> int:
        return 2 * n

    @staticmethod
    def candidate_offsets(directions: torch.Tensor) -> torch.Tensor:
        return torch.cat([directions, -directions])

    @staticmethod
    def slopes(losses: torch.Tensor, mu: float) -> torch.Tensor:
        """p_i = (L(theta + mu u_i) - L(theta - mu u_i)) / (2 mu)."""
        plus, minus = losses.chunk(2)
        return (plus - minus) / (2 * mu)

    @staticmethod
    def loss(losses: torch.Tensor) -> torch.Tensor:
        return losses.mean()


class OnePoint(RGE):
    """Differences between successive perturbed tokens: n + 1 forwards, none of them at theta.

    Each contains two perturbations: with the s of `zeroth_order_gradient`, the estimate is 1.4 times as long as RGE's.
    """

    @staticmethod
    def num_directions(n: int) -> int:
        return n + 1

    @staticmethod
    def candidate_offsets(directions: torch.Tensor) -> torch.Tensor:
        return directions

    @staticmethod
    def slopes(losses: torch.Tensor, mu: float) -> torch.Tensor:
        """p_i = (L(theta + mu u_{i+1}) - L(theta + mu u_i)) / mu (Table S4).

        The slope multiplies u_{i+1}; with u_i, as printed in the supplement, the expectation would be minus the gradient.
        """
        return (losses[1:] - losses[:-1]) / mu

    @staticmethod
    def loss(losses: torch.Tensor) -> torch.Tensor:
        return losses.mean()


ESTIMATORS: dict[str, type[RGE]] = {"rge": RGE, "spsa": SPSA, "one_point": OnePoint}


def zeroth_order_gradient(slopes: torch.Tensor, directions: torch.Tensor, effective_dim: int) -> torch.Tensor:
    """g = 1 / (n s) sum_i p_i u_i (Eq. 3): slopes [n] along directions [n, V, d] -> [V, d].

    s = sqrt((effective_dim + n - 1) / n) is about the expected ratio of the estimate's norm to the true gradient's; dividing by
    it keeps Adam's large epsilon (1e-3) in proportion.
    """
    n = len(slopes)
    scale = math.sqrt((effective_dim + n - 1) / n)
    return torch.einsum("i,ivd->vd", slopes, directions) / (n * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Subspace Gradient (Eqs. 4-8, Algorithm 2)
# ---------------------------------------------------------------------------------------------------------------------


def low_variance_directions(history: torch.Tensor, nu: float) -> torch.Tensor:
    """Directions in which the tokens of `history` [tau, D] hardly moved -> orthonormal rows [k, D], k < min(tau, D) (Eqs. 4-7).

    Columns are standardised. i* is the smallest number of right singular vectors whose variances sum to more than 1 - nu of
    the total; the vectors after it are returned. If tau <= D, the last one has variance 0, as centred data have rank tau - 1;
    Eq. 7 includes it. The SVD is in fp64, because the squared singular values span twelve decades.
    """
    history = history.double()
    centred = history - history.mean(0)
    deviation = centred.square().mean(0).sqrt()
    standardised = centred / torch.where(deviation > 0, deviation, 1.0)
    _, singular_values, right_vectors = torch.linalg.svd(standardised, full_matrices=False)
    explained = singular_values.square().cumsum(0)
    if explained[-1] == 0:  # the token never moved: no direction is known
        return history.new_zeros(0, history.shape[1]).float()
    enough = explained / explained[-1] > 1 - nu
    kept = int(enough.float().argmax()) + 1 if enough.any() else len(enough)  # i* of Eq. 6, 1-based
    return right_vectors[kept:].float().contiguous()  # the layout that a checkpoint restores: another changes the last bit


class SubspaceGradient:
    """Algorithm 2: every tau steps, find the directions along which the token hardly moved, then project them out."""

    def __init__(self, tau: int, nu: float, dim: int):
        self.tau, self.nu = tau, nu
        self.token_history = torch.zeros(0, dim)  # [< tau, D], D = num_vectors * d
        self.projection = torch.zeros(0, dim)  # [k, D], orthonormal rows

    def project(self, gradient: torch.Tensor) -> torch.Tensor:
        """g - g P^T P (Eq. 8)."""
        flat = gradient.flatten()
        return (flat - (flat @ self.projection.T) @ self.projection).view_as(gradient)

    def append(self, token: torch.Tensor) -> None:
        """Store an updated token; once there are tau of them, refresh the projection and start over."""
        self.token_history = torch.cat([self.token_history, token.detach().reshape(1, -1)])
        if len(self.token_history) == self.tau:
            self.projection = low_variance_directions(self.token_history, self.nu)
            self.token_history = self.token_history[:0]


# ---------------------------------------------------------------------------------------------------------------------
# The token and its optimiser
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate_factor(lr_scheduler: str, lr_warmup_steps: int, max_train_steps: int) -> Callable[[int], float]:
    """The diffusers schedule of that name, as a function: number of updates so far -> factor of the learning rate."""
    from diffusers.optimization import get_scheduler

    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # a scheduler needs an optimiser, and would wrap step() of ours
    schedule = get_scheduler(lr_scheduler, unused, num_warmup_steps=lr_warmup_steps, num_training_steps=max_train_steps)
    return schedule.lr_lambdas[0]


class ZOAdam:
    """theta and everything that updates it, fp32 on the CPU (under 1 MB): Adam with epsilon 1e-3 on the projected estimate."""

    remedy = "a smaller --learning_rate or another --mu"

    def __init__(
        self,
        token: torch.Tensor,
        *,
        estimator: str = "rge",
        n: int = 2,
        mu: float = 1e-3,
        tau: int = 128,
        nu: float = 1e-3,
        learning_rate: float = 5e-3,
        lr_scheduler: str = "constant",
        lr_warmup_steps: int = 0,
        max_train_steps: int = 30000,
    ):
        """token: [V, d], where the search starts."""
        self.theta = nn.Parameter(token.detach().clone().float())  # [V, d]
        self.estimator, self.n, self.mu = ESTIMATORS[estimator], n, mu
        self.subspace = SubspaceGradient(tau, nu, self.theta.numel())
        self.learning_rate, self.factor = learning_rate, learning_rate_factor(lr_scheduler, lr_warmup_steps, max_train_steps)
        self.optimizer = torch.optim.Adam([self.theta], lr=learning_rate, betas=(0.9, 0.999), eps=1e-3)
        self.optimizer.state[self.theta] = dict(
            step=torch.tensor(0.0), exp_avg=torch.zeros_like(self.theta), exp_avg_sq=torch.zeros_like(self.theta)
        )

    def candidates(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the directions [n, V, d] and build the candidates [C, V, d] as new tensors; theta itself is never perturbed."""
        directions = torch.randn(self.estimator.num_directions(self.n), *self.theta.shape, generator=generator)
        return directions, self.theta.detach() + self.mu * self.estimator.candidate_offsets(directions)

    def step(self, directions: torch.Tensor, losses: torch.Tensor) -> float | None:
        """Update theta from the candidates' losses [C] -> the step's loss, or None, without an update, if any is not finite."""
        if not torch.isfinite(losses).all():
            return None
        effective_dim = self.theta.numel() - len(self.subspace.projection)
        gradient = zeroth_order_gradient(self.estimator.slopes(losses, self.mu), directions[-self.n :], effective_dim)
        self.theta.grad = self.subspace.project(gradient)
        updates = int(self.optimizer.state[self.theta]["step"])  # counted by Adam, so a schedule has no state of its own to save
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * self.factor(updates)
        self.optimizer.step()
        self.subspace.append(self.theta)
        return self.estimator.loss(losses).item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything the next steps depend on, except the generator."""
        adam = {f"adam.{name}": tensor for name, tensor in self.optimizer.state[self.theta].items()}
        return {
            "theta": self.theta.detach(),
            **adam,
            "subspace.token_history": self.subspace.token_history,
            "subspace.projection": self.subspace.projection,
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.theta.data.copy_(state["theta"])
        for name in self.optimizer.state[self.theta]:
            self.optimizer.state[self.theta][name] = state[f"adam.{name}"]
        self.subspace.token_history, self.subspace.projection = state["subspace.token_history"], state["subspace.projection"]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def train(
    run: Run,
    outputs: TokenOutputs,
    zo: ZOAdam,
    model: FrozenModel,
    data: Data,
    sample: TimestepSampler,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Algorithm 1, from the current step of `run` to its last step or to a signal."""
    for _ in run.steps(outputs):
        batch = draw_batch(data, batch_size, sample, generator)  # shared by all candidates of the step
        directions, candidates = zo.candidates(generator)
        losses = shared_losses(run.accelerator, model, batch, candidates)  # forward passes only
        loss = zo.step(directions, losses)
        run.note(loss, forwards=len(candidates))


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save: the cheapest checks come first, so that errors are reported before a model is loaded.

    Returns the exit code: 0, or 128 + signal if the run was interrupted (and saved). Raises InputError.
    """
    flags = vars(args)  # a view: values set on `args` below appear in it too
    if args.train_data_dir is None:
        save_quantized(Path(args.save_quantized), **flags_for(save_quantized, flags))
        return 0
    inputs = read_inputs(**flags_for(read_inputs, flags))
    estimator = ESTIMATORS[args.estimator]
    accelerator = make_accelerator(estimator.num_candidates(args.n), **flags_for(make_accelerator, flags))
    if args.save_quantized is not None:
        ensure_writable(Path(args.output_dir), "output_dir", 0)  # packing takes minutes
        inputs.folder, inputs.variant = save_quantized(Path(args.save_quantized), **flags_for(save_quantized, flags)), None
        args.pretrained_model_name_or_path, args.variant = str(inputs.folder), None
    flags.update(settle_flags(inputs.folder, inputs.variant, accelerator.device, **flags_for(settle_flags, flags)))
    args.num_vectors = len(inputs.initial_token)  # an embedding file has its own number
    if args.mu is None:  # bf16 has 8 significant bits: a smaller step drowns in rounding (docs/measurements.md)
        args.mu = 1e-2 if args.mixed_precision == "bf16" else 1e-3

    generator = torch.Generator().manual_seed(args.seed)
    zo = ZOAdam(inputs.initial_token, **flags_for(ZOAdam, flags))
    settings = arguments.settings_of(flags, SETTINGS, OPTIONAL_SETTINGS)
    if not args.lr_scheduler.startswith("constant"):
        settings["max_train_steps"] = args.max_train_steps
    run = Run(zo, generator, accelerator, settings, inputs.fingerprint(), **flags_for(Run, flags))
    run.resume(args.resume_from_checkpoint)
    run.claim(inputs.folder)
    model, data = load_model(inputs, device=accelerator.device, **flags_for(load_model, flags))
    outputs = TokenOutputs(zo, inputs, model, data, run.settings, **flags_for(TokenOutputs, flags))
    if args.timestep_sampling == "puts":
        sample = partial(partial_uniform_timesteps, t_min=args.t_min, t_max=args.t_max)
    else:  # an alternative from Table 5
        sample = timestep_sampler(data, **flags_for(timestep_sampler, flags))
    with run:
        train(run, outputs, zo, model, data, sample, args.train_batch_size, generator)
    return run.finish(outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
