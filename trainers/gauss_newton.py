#!/usr/bin/env python
"""Gauss-Newton with forward passes: learn a token from whole predictions, not from their losses alone.

Every forward in train_zoodip.py returns a whole prediction, of which its estimator keeps one number, the loss. This trainer
keeps the prediction: the difference of two predictions, divided by rho, is a column of the Jacobian up to an error of order
rho, and m columns give the gradient and the Gauss-Newton matrix in m directions. They are accumulated (recursive least squares
with a fading memory) in a small basis that depends on the text encoder alone: the directions of token space in which its states
move most. There is no backward pass, and no UNet forward besides those of the candidates. docs/gauss_newton.md says where the
formulas come from.

    sample one batch; C = m orthonormal mixtures of the k basis vectors
    candidates theta and theta + rho B c_j  ->  predictions  ->  Y_j = (eps_j - eps_0) / rho,  r = eps_0 - target
    P <- gamma P + alpha C Y Y^T C^T        q <- gamma q + alpha (C Y Y^T C^T w - C Y r)
    w <- w + clip((P + I / prior^2)^-1 q - w)        theta = theta_0 + B w

It takes train_zoodip.py's flags for the model, the token, the photographs and the outputs, and --max_forwards in place of steps:

    sh train_zoodip.sh quick                                # the bundled miniature and subject, 600 forwards
    python -m trainers.gauss_newton --train_data_dir dataset/dog6 --initializer_token dog --use_cc --max_forwards 1500

This is an experiment alongside the paper's method, not part of it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from zoodip import arguments
from zoodip.arguments import flags_for, require, require_at_least_one, require_positive
from zoodip.errors import InputError, prepare_process, run_script

METHOD_SETTINGS = """
    method t_min t_max basis_size directions rho inflation prior clip memory memory_growth rebase_steps starts start_steps
""".split()
SETTINGS = [*arguments.SHARED_SETTINGS, *METHOD_SETTINGS]
RHO = {"fp32": 1e-2, "fp16": 5e-2, "bf16": 0.2}  # the shorter the mantissa, the longer the step needed to see a difference
JUDGING_SAMPLES = 16  # forwards per start for the choice between several starts


def number_or_auto(text: str) -> float | None:
    """A number, or None for "auto"."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Learn one token embedding for a subject in a few hundred forward passes.")
    arguments.add_model_flags(parser)
    arguments.add_token_flags(parser)
    arguments.add_subject_flags(parser)
    add = parser.add_argument_group("method").add_argument
    add("--max_forwards", type=int, default=1500, help="budget of UNet forwards of a batch; a step takes directions + 1 of them")
    add(
        "--basis_size",
        type=int,
        nargs="+",
        default=[16],
        metavar="K",
        help="directions of token space to search; with several numbers, each new basis takes the next one",
    )
    add("--directions", type=int, default=8, help="m: mixtures of those directions that a step measures")
    add(
        "--rho",
        type=float,
        default=None,
        help="length of a finite difference, which does not scale with the token as --prior and --clip do; default: 1e-2 with "
        "fp32 activations, 5e-2 with fp16, 0.2 with bf16, chosen for a token of length 0.7",
    )
    add(
        "--inflation",
        type=number_or_auto,
        default=3.0,
        help="how many numbers of a prediction count as one independent observation; auto: estimated from the residuals",
    )
    add("--prior", type=float, default=0.42, help="expected change of the token along a direction, in initial token lengths")
    add("--clip", type=float, default=0.42, help="longest step, in initial token lengths")
    add("--memory", type=float, default=20.0, help="steps that the memory spans initially")
    add("--memory_growth", type=float, default=0.5, help="steps by which each step lengthens the memory; 0: constant memory")
    add(
        "--rebase_steps",
        type=int,
        nargs="*",
        default=[22, 60, 110],
        metavar="STEP",
        help="steps after which the basis is recomputed at the current token; no values: never",
    )
    add(
        "--starts",
        type=int,
        default=1,
        help="short starts from the same token; only the one with the lowest loss on 16 fixed (picture, timestep, noise) triples "
        "continues; by default those of eval_loss, which is then a little too low",
    )
    add("--start_steps", type=int, default=8, help="steps per start, if there are several")
    add("--t_min", type=int, default=500, help="smallest timestep drawn (T_L of Eq. 9)")
    add("--t_max", type=int, default=900, help="end (excluded) of the timesteps drawn (T_U)")
    arguments.add_step_flags(add, "images per step; all candidates share them")
    arguments.add_run_flags(parser)
    parser.set_defaults(output_dir="results/gauss_newton", eval_steps=25, checkpointing_steps=50, method="gauss_newton")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    args = arguments.parse(build_parser(), check_flags, argv, without_effect)
    args.max_train_steps = steps_of(vars(args))
    return args


def steps_of(flags: dict) -> int:
    """The number of steps that --max_forwards allows, after paying for the choice between several starts."""
    judging = flags["starts"] * JUDGING_SAMPLES if flags["starts"] > 1 else 0
    return (flags["max_forwards"] - judging) // (flags["directions"] + 1)


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    require_at_least_one(flags, "directions", "starts", "start_steps")
    several = flags["starts"] > 1
    least = 1 + flags["starts"] * flags["start_steps"] if several else 1  # plus one step with the best
    forwards = least * (flags["directions"] + 1) + (flags["starts"] * JUDGING_SAMPLES if several else 0)
    what = "one step with the best of the starts" if several else "one step"
    require(flags, "max_forwards", flags["max_forwards"] >= forwards, f"must be at least {forwards}, enough for {what}")
    arguments.check_training_flags({**flags, "max_train_steps": 1})
    smallest = min(flags["basis_size"])
    require(flags, "basis_size", smallest >= 1, "must be at least 1")
    require(flags, "directions", flags["directions"] <= smallest, f"must be at most --basis_size {smallest}")
    for name, example in (("prior", "0.42"), ("clip", "0.42")):
        require_positive(flags, name, example)
    if flags["inflation"] is not None:
        require_positive(flags, "inflation", "3, or auto")
    require(flags, "memory", 1 < flags["memory"] < math.inf, "must be more than 1 step")
    require(flags, "memory_growth", 0 <= flags["memory_growth"] < math.inf, "must not be negative")
    require(flags, "rebase_steps", all(step >= 1 for step in flags["rebase_steps"]), "must be step numbers, counted from 1")
    if flags["rho"] is not None:
        require_positive(flags, "rho", "1e-2")


def without_effect(flags: dict, given: set[str]) -> Iterator[str]:
    """A line for each `given` flag that has no effect in this combination."""
    yield from arguments.without_effect(flags, given)
    if "start_steps" in given and flags["starts"] == 1:
        yield f"--start_steps {flags['start_steps']} has no effect with --starts 1"


# torch takes a second to import, so --help and invalid arguments are handled first.
if __name__ == "__main__":
    ARGS = parse_args()
    prepare_process()

import torch
from accelerate.utils import broadcast
from tqdm import tqdm

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
    uniform_timesteps,
)
from zoodip.outputs import TokenOutputs
from zoodip.process import make_accelerator
from zoodip.prompts import encode_prompts
from zoodip.run import Run

# ---------------------------------------------------------------------------------------------------------------------
# The basis: the directions to which the text encoder is most sensitive
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def text_sensitivity(
    text_encoder: torch.nn.Module,
    rows: torch.Tensor,
    prompt_ids: torch.Tensor,
    theta: torch.Tensor,
    delta: float = 1e-2,
    at_once: int = 16,
) -> torch.Tensor:
    """Sum over prompts of J J^T [D, D], where J [D, L * d] is the derivative of a prompt's states by the token's D numbers.

    rows and prompt_ids [P, L] as in `Prompts`, theta [V, d], D = V * d. Forward differences of length `delta`, `at_once` of them
    together: D + 1 passes of the text encoder per prompt. In fp32 whatever the encoder's own precision: at such lengths, 16-bit
    states differ only by rounding. Memory: one J, D * L * d * 4 bytes (0.18 GB for Stable Diffusion v1.5).
    """
    precision = text_encoder.embeddings.position_embedding.weight.dtype
    text_encoder.to(torch.float32)  # converting there and back loses nothing
    try:
        theta = theta.detach().to(rows.device)
        dim = theta.numel()
        gram = torch.zeros(dim, dim, device=rows.device)
        for ids in prompt_ids.to(rows.device):
            first = int((ids >= len(rows)).nonzero()[0])  # causal attention: earlier states do not depend on the token
            here = encode_prompts(text_encoder, rows, ids[None], theta[None])[:, first:].flatten(1)  # [1, (L - first) * d]
            jacobian = torch.empty(dim, here.shape[1], device=rows.device)
            for start in tqdm(range(0, dim, at_once), desc="computing a basis", unit="batch", leave=False):
                count = min(at_once, dim - start)
                offsets = torch.zeros(count, dim, device=rows.device)
                offsets[torch.arange(count), start + torch.arange(count)] = delta
                there = encode_prompts(text_encoder, rows, ids[None], theta + offsets.view(count, *theta.shape))
                jacobian[start : start + count] = (there[:, first:].flatten(1) - here) / delta
            gram += jacobian @ jacobian.T
    finally:
        text_encoder.to(precision)
    return gram


def sensitive_directions(gram: torch.Tensor, basis_size: int) -> torch.Tensor:
    """The `basis_size` eigenvectors of J J^T [D, D] with the largest eigenvalues -> orthonormal columns [D, k], fp64."""
    _, vectors = torch.linalg.eigh(gram.cpu().double())  # ascending
    vectors = vectors[:, -basis_size:].flip(1)
    largest = vectors.abs().argmax(0)
    return (vectors * vectors[largest, torch.arange(vectors.shape[1])].sign()).contiguous()  # fixes the sign across libraries


# ---------------------------------------------------------------------------------------------------------------------
# Recursive least squares in the basis
# ---------------------------------------------------------------------------------------------------------------------


class Observation(NamedTuple):
    """What one batch says about the squared error sum |eps - target|^2 in the basis, as far as the mixtures see it. fp64."""

    matrix: torch.Tensor  # A [k, k], Gauss-Newton matrix
    gradient: torch.Tensor  # g [k], half the gradient
    loss: float  # mean squared residual
    seen_variance: float  # the same for the residual's part in the span of the slopes: equal to `loss` for white noise


def gauss_newton(noise_preds: torch.Tensor, target: torch.Tensor, mixtures: torch.Tensor, rho: float) -> Observation:
    """noise_preds [m + 1, ...]: predictions at theta and at theta + rho B c_j; target [...]; mixtures C [k, m], orthonormal
    columns."""
    flat = noise_preds.flatten(1).cpu().double()
    slopes = (flat[1:] - flat[0]) / rho  # Y [m, N], rows of the transposed Jacobian
    residual = flat[0] - target.flatten().cpu().double()
    gram, gradient = slopes @ slopes.T, slopes @ residual
    seen = gradient @ torch.linalg.pinv(gram, hermitian=True) @ gradient / len(slopes) if gram.isfinite().all() else math.nan
    return Observation(mixtures @ gram @ mixtures.T, mixtures @ gradient, residual.square().mean().item(), float(seen))


class GaussNewton:
    """theta = theta_0 + B w, and the normal equations P w = q of all steps so far, fp64 on the CPU (about 100 KB)."""

    def __init__(
        self,
        token: torch.Tensor,
        *,
        directions: int = 8,
        rho: float = 1e-2,
        inflation: float | None = 3.0,
        prior: float = 0.42,
        clip: float = 0.42,
        memory: float = 20.0,
        memory_growth: float = 0.5,
    ):
        """token [V, d]: where the search starts. There is no basis until `rebase` sets one. inflation None: estimated from the
        data, as the variance of the residuals in the directions of the slopes."""
        self.origin = token.detach().clone().double()  # theta_0 [V, d]
        length = self.origin.norm().item()
        self.prior, self.clip = prior * length, clip * length
        self.num_mixtures, self.rho, self.inflation = directions, rho, inflation
        self.memory, self.memory_growth = memory, memory_growth
        self.basis = torch.zeros(self.origin.numel(), 0, dtype=torch.float64)  # B [D, k]
        self.weights = torch.zeros(0, dtype=torch.float64)  # w [k]
        self.precision = torch.zeros(0, 0, dtype=torch.float64)  # P [k, k]
        self.moment = torch.zeros(0, dtype=torch.float64)  # q [k]
        self.variance = torch.tensor(0.0, dtype=torch.float64)  # of a residual, exponential mean over 10 steps
        self.steps = torch.tensor(0)

    @property
    def theta(self) -> torch.Tensor:
        """The current token, [V, d] fp32."""
        return (self.origin + (self.basis @ self.weights).view_as(self.origin)).float()

    def rebase(self, basis: torch.Tensor) -> None:
        """Continue in another basis [D, k'] from the current token, keeping what was learned as far as both bases span it."""
        turn = self.basis.T @ basis  # T [k, k']
        self.moment = turn.T @ (self.moment - self.precision @ self.weights)
        self.precision = turn.T @ self.precision @ turn
        self.origin = self.origin + (self.basis @ self.weights).view_as(self.origin)
        self.basis, self.weights = basis.clone(), basis.new_zeros(basis.shape[1])

    def candidates(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the mixtures C [k, m] and build the candidates [m + 1, V, d]: theta, and theta + rho B c_j."""
        mixtures, _ = torch.linalg.qr(torch.randn(len(self.weights), self.num_mixtures, generator=generator, dtype=torch.float64))
        offsets = (self.rho * self.basis @ mixtures).T.reshape(-1, *self.origin.shape).float()
        return mixtures, torch.cat([self.theta[None], self.theta + offsets])

    def step(self, mixtures: torch.Tensor, noise_preds: torch.Tensor, target: torch.Tensor) -> float | None:
        """Update theta from the candidates' predictions [m + 1, B, 4, h, w] -> the loss at theta.

        Returns None, without an update, if a prediction is not finite, or if all are equal because `rho` is lost in rounding.
        """
        matrix, gradient, loss, seen_variance = gauss_newton(noise_preds, target, mixtures, self.rho)
        if not (torch.isfinite(matrix).all() and math.isfinite(loss) and matrix.any()):
            return None
        variance = seen_variance if self.inflation is None else self.inflation * loss
        self.variance = torch.tensor(variance).double() if self.steps == 0 else 0.9 * self.variance + 0.1 * variance
        certainty = 1 / self.variance  # alpha, per number of a prediction
        keep = 1 - 1 / (self.memory + self.memory_growth * self.steps.item())  # gamma
        self.precision = keep * self.precision + certainty * matrix
        self.moment = keep * self.moment + certainty * (matrix @ self.weights - gradient)
        prior = torch.eye(len(self.weights), dtype=torch.float64) / self.prior**2
        change = torch.linalg.solve(self.precision + prior, self.moment) - self.weights
        self.weights = self.weights + change * min(1.0, self.clip / max(change.norm().item(), 1e-30))
        self.steps = self.steps + 1
        return loss

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything the next steps depend on, except the generator. Tensors of the basis' size start empty and may grow."""
        names = ("origin", "weights", "moment", "variance", "steps")
        state = {name: getattr(self, name) for name in names}
        return {**state, "basis": self.basis.T.contiguous(), "precision": self.precision.flatten()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in ("origin", "weights", "moment", "variance", "steps"):
            setattr(self, name, state[name])
        size = len(self.weights)
        self.basis, self.precision = state["basis"].T.contiguous(), state["precision"].view(size, size)


class Starts:
    """Several learners that start from the same token but see different batches; the best after a few steps goes on.

    A first step in a wrong direction is corrected only slowly. With one learner, it is simply that learner.
    """

    remedy = "a smaller --clip, a larger --inflation or another --rho"

    def __init__(self, learners: list[GaussNewton], start_steps: int):
        self.learners, self.start_steps = learners, start_steps
        self.active = torch.tensor(0)  # index of the learner that steps

    @property
    def learner(self) -> GaussNewton:
        return self.learners[int(self.active)]

    @property
    def theta(self) -> torch.Tensor:
        return self.learner.theta

    def begin(self, step: int) -> bool:
        """Activate the learner for `step`, counted from 1 -> whether all have started and one must be chosen first."""
        number, within = divmod(step - 1, self.start_steps)
        if len(self.learners) == 1 or within:
            return False
        if number < len(self.learners):
            self.active = torch.tensor(number)
        return number == len(self.learners)

    def choose(self, losses: torch.Tensor) -> None:
        """Continue with the learner that has the lowest of `losses` [S]; NaN counts as infinite."""
        self.active = losses.cpu().nan_to_num(math.inf).argmin()

    def state_dict(self) -> dict[str, torch.Tensor]:
        states = {f"{i}.{name}": value for i, each in enumerate(self.learners) for name, value in each.state_dict().items()}
        return {**states, "active": self.active}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for i, learner in enumerate(self.learners):
            learner.load_state_dict({name: state[f"{i}.{name}"] for name in learner.state_dict()})
        self.active = state["active"]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def shared_predictions(accelerator, model: FrozenModel, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """Predictions [C, B, 4, h, w] for all candidates [C, V, d], each process computing its share."""
    processes, rank = accelerator.num_processes, accelerator.process_index
    if processes == 1:
        return model.predict(batch, tokens)
    predictions = torch.zeros(len(tokens), *batch.target.shape, device=accelerator.device)
    predictions[rank::processes] = model.predict(batch, tokens[rank::processes])
    return accelerator.reduce(predictions, reduction="sum")


def size_of_new_basis(done: int, sizes: list[int], rebase_steps: list[int]) -> int | None:
    """The size of the new basis after `done` steps, None if there is none: `sizes` in turn, the last one repeatedly."""
    if done and done not in rebase_steps:
        return None
    number = sum(step <= done for step in rebase_steps)  # of earlier bases
    return sizes[min(number, len(sizes) - 1)]


def take_basis(learner: GaussNewton, model: FrozenModel, data: Data, basis_size: int) -> None:
    """Set a basis at the current token, from one of the training prompts: more would add cost and hardly a new direction.

    Devices round differently, so all processes take the first one's.
    """
    gram = text_sensitivity(model.text_encoder, model.rows, data.prompt_ids[:1], learner.theta)
    learner.rebase(sensitive_directions(broadcast(gram.clone()), basis_size))


def train(
    run: Run,
    outputs: TokenOutputs,
    starts: Starts,
    model: FrozenModel,
    data: Data,
    sample: TimestepSampler,
    batch_size: int,
    generator: torch.Generator,
    basis_size: Callable[[int], int | None],
    judging: list[Batch],
) -> None:
    """Train from the current step of `run` to its last or to a signal. basis_size: steps done -> size of a new basis, or None;
    judging: the batches of one on which starts are compared."""
    for step in run.steps(outputs):
        forwards = 0
        if starts.begin(step):
            losses = [model.mean_loss(judging, learner.theta) for learner in starts.learners]
            starts.choose(broadcast(torch.tensor(losses, device=run.accelerator.device)))
            forwards += len(judging) * len(starts.learners)
        learner = starts.learner
        if size := basis_size(int(learner.steps)):
            take_basis(learner, model, data, size)
        batch = draw_batch(data, batch_size, sample, generator)  # shared by all candidates of the step
        mixtures, tokens = learner.candidates(generator)
        noise_preds = shared_predictions(run.accelerator, model, batch, tokens)  # forward passes only
        loss = learner.step(mixtures, noise_preds, batch.target)
        run.note(loss, forwards=forwards + len(tokens))


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save. Returns the exit code; raises InputError."""
    flags = vars(args)  # a view: values set on `args` below appear in it too
    inputs = read_inputs(**flags_for(read_inputs, flags))
    accelerator = make_accelerator(args.directions + 1, **flags_for(make_accelerator, flags))
    flags.update(settle_flags(inputs.folder, inputs.variant, accelerator.device, **flags_for(settle_flags, flags)))
    args.num_vectors = len(inputs.initial_token)  # an embedding file has its own number
    args.rho = args.rho or RHO[args.mixed_precision]
    if max(args.basis_size) > (numbers := inputs.initial_token.numel()):
        raise InputError(f"--basis_size {max(args.basis_size)} is more than the token's {numbers} numbers; give fewer")
    if not inputs.initial_token.any():
        raise InputError(
            f"--initializer_token {args.initializer_token}: is zero, so that steps have no length; start from a word"
        )
    generator = torch.Generator().manual_seed(args.seed)
    learners = [GaussNewton(inputs.initial_token, **flags_for(GaussNewton, flags)) for _ in range(args.starts)]
    starts = Starts(learners, args.start_steps)
    settings = arguments.settings_of(flags, SETTINGS)
    run = Run(starts, generator, accelerator, settings, inputs.fingerprint(), **flags_for(Run, flags))
    run.resume(args.resume_from_checkpoint)
    run.claim(inputs.folder)
    model, data = load_model(inputs, device=accelerator.device, **flags_for(load_model, flags))
    outputs = TokenOutputs(starts, inputs, model, data, settings, **flags_for(TokenOutputs, flags))
    sample = partial(uniform_timesteps, low=args.t_min, high=args.t_max)
    basis_size = partial(size_of_new_basis, sizes=args.basis_size, rebase_steps=args.rebase_steps)
    judging = evaluation_batches(data, JUDGING_SAMPLES, args.t_min, args.t_max)
    with run:
        train(run, outputs, starts, model, data, sample, args.train_batch_size, generator, basis_size, judging)
    return run.finish(outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
