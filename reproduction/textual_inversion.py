#!/usr/bin/env python
"""Gradient textual inversion (Gal et al. 2022, arXiv 2208.01618): the baseline that ZOODiP does without.

Model, quantisation, images, captions, timesteps, evaluation set and output files are those of train_zoodip.py, from
which this script imports them; only the update differs. Each step is one UNet forward and one backward through the
dequantised weights, and Adam (epsilon 1e-8) on the token:

    python reproduction/textual_inversion.py --train_data_dir dataset/dog6 --initializer_token dog --use_cc

The flags are those of train_zoodip.py, and the four of `parse_args` below. A backward pass keeps every activation and
every dequantised weight: at SD v1.5's size expect several times the memory of train_zoodip.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_zoodip as zoodip  # noqa: E402
from benchmarks.common import cli  # noqa: E402
from train_zoodip import Data, FrozenModel, InputError, Inputs, Progress  # noqa: E402

LOSS_SCALE = 1024.0  # a power of two: exact in fp32 and bf16, and keeps fp16 gradients from vanishing

# Flags of train_zoodip.py that say how to do without gradients, or that this script has no use for.
UNUSED = ("n mu tau nu estimator candidates_per_forward save_steps checkpointing_steps checkpoints_total_limit "
          "resume_from_checkpoint validation_prompt validation_steps num_validation_images "
          "validation_guidance").split()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of train_zoodip.py with this method's defaults; exits with code 2 on flags that mean nothing here."""
    parser = argparse.ArgumentParser(
        description="Gradient textual inversion. Every other flag is that of train_zoodip.py.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="of Adam (betas .9, .999), constant")
    parser.add_argument("--adam_epsilon", type=float, default=1e-8, help="of Adam; here gradients are exact")
    parser.add_argument("--max_train_steps", type=int, default=5000, help="steps of one forward and one backward")
    parser.add_argument("--output_dir", default="results/textual_inversion", help="folder for embedding, curve, record")
    return parse_baseline_args(parser, UNUSED, argv, "gradient textual inversion")


def parse_baseline_args(parser: argparse.ArgumentParser, unused: list[str], argv: list[str] | None,
                        method: str) -> argparse.Namespace:
    """The flags of train_zoodip.py under those of `parser`; exits with code 2 on wrong ones and on any of `unused`."""
    own, rest = parser.parse_known_args(argv)
    args = zoodip.parse_args(rest)
    defaults = zoodip.parse_args(["--train_data_dir", "x", "--initializer_token", "x"])
    for name in unused:
        if getattr(args, name) != getattr(defaults, name):
            parser.exit(2, f"error: --{name} has no meaning for {method}; drop it\n")
    for name, value in vars(own).items():
        setattr(args, name, value)
    try:
        zoodip.check_args(args)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")
    return args


def invert(model: FrozenModel, data: Data, theta0: torch.Tensor, args: argparse.Namespace, steps: int, lr: float,
           evaluate: Callable[[torch.Tensor], float] | None = None, eval_steps: int = 0,
           on_row: Callable[[list[dict]], None] | None = None, show_bar: bool = True,
           stop: zoodip.StopSignal | None = None) -> tuple[torch.Tensor, list[dict], int]:
    """Minimise Eq. 1 over the token by backpropagation -> (theta [V, d] fp32 on the CPU, rows of the curve, steps done).

    Draws the same batches as train_zoodip.py with the same seed would (args.train_batch_size, .timestep_sampling, .seed),
    though not in step with it, as no directions are drawn here. `evaluate(theta)` is asked every `eval_steps` steps, at
    0 and at the end; `on_row` is told of each new row. After a signal that `stop` has seen the step under way is the last.
    A step counts as one UNet forward of train_batch_size samples; its backward pass, about twice as dear, is not counted.
    """
    device = model.rows.device
    theta = nn.Parameter(theta0.detach().clone().float().to(device))
    optimizer = torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.999), eps=getattr(args, "adam_epsilon", 1e-8))
    generator = torch.Generator().manual_seed(args.seed)
    curve, smoothed, step = [], None, 0

    def add_row(step: int):
        curve.append(dict(step=step, unet_forwards=step, loss=smoothed, eval_loss=evaluate(theta.detach().cpu()),
                          token_norm=theta.detach().norm(dim=1).mean().item()))
        if on_row is not None:
            on_row(curve)

    if evaluate is not None:
        add_row(0)
    bar = tqdm(range(1, steps + 1), unit="step", mininterval=0.5, smoothing=0.05, disable=not show_bar)
    for step in bar:
        batch = zoodip.draw_batch(data.latents, data.choices, data.prompts, data.scheduler, args, generator).to(device)
        loss = zoodip.denoising_losses(model.unet, model.text_encoder, model.rows, batch, theta[None])[0]
        (gradient,) = torch.autograd.grad(loss * LOSS_SCALE, theta)
        loss = loss.item()
        if torch.isfinite(gradient).all():
            theta.grad = gradient / LOSS_SCALE
            optimizer.step()
            smoothed = loss if smoothed is None else 0.99 * smoothed + 0.01 * loss
        bar.set_postfix_str(f"loss {loss if smoothed is None else smoothed:.4f}", refresh=False)
        stopped = stop is not None and stop.number != 0
        if evaluate is not None and (zoodip.due(step, eval_steps) or step == steps or stopped):
            add_row(step)
        if stopped:
            break
    return theta.detach().cpu(), curve, step


# (model, data, inputs, evaluate or None, on_row, stop) -> (theta, rows of the curve, steps, UNet forwards)
Learner = Callable[[FrozenModel, Data, Inputs, Callable | None, Callable, zoodip.StopSignal],
                   tuple[torch.Tensor, list[dict], int, int]]


def run_baseline(args: argparse.Namespace, estimator: str, learn: Learner) -> None:
    """Load, learn, save: learned_embeds.safetensors, training_log.csv and run.json as train_zoodip.py writes them.

    Ctrl-C saves the token as it stands; unlike a ZOODiP run it is not continued from there (CMA-ES's state is a pickle).
    """
    accelerator = zoodip.make_accelerator(args)
    if accelerator.num_processes > 1:
        raise InputError("this baseline runs as one process; start it with python, not accelerate launch")
    inputs = zoodip.read_inputs(args)
    zoodip.resolve_defaults(args, inputs.folder, accelerator.device)
    lock = zoodip.prepare_output(args)
    model, data = zoodip.load_model(args, inputs, accelerator.device)
    forget_unused(args, estimator)
    settings = {name: value for name, value in zoodip.run_settings(args).items() if value is not None}
    accelerator.init_trackers(estimator, settings)
    recorder = zoodip.Recorder(args, accelerator, {}, data.scheduler.config.prediction_type)
    evaluate, evaluating = None, 0.0
    if args.eval_steps:
        fixed_set = zoodip.evaluation_batches(data.latents, data.choices, data.prompts, data.scheduler, args)

        def evaluate(theta):
            nonlocal evaluating
            started = time.perf_counter()
            loss = model.mean_loss(fixed_set, theta)
            evaluating += time.perf_counter() - started
            return loss

    started = time.perf_counter()
    with zoodip.StopSignal() as stop:
        theta, curve, steps, forwards = learn(model, data, inputs, evaluate, lambda rows: recorder.curve(Progress(curve=rows)),
                                              stop)
    seconds = time.perf_counter() - started - evaluating
    smoothed = curve[-1]["loss"] if curve else None
    recorder.embedding(SimpleNamespace(theta=theta), steps, final=True)
    recorder.run(Progress(steps, forwards, 0, smoothed, curve), seconds, steps)
    accelerator.end_training()
    lock.close()
    interrupted = steps < args.max_train_steps
    done = f"{steps} steps of {args.max_train_steps}, as it stood when interrupted" if interrupted else f"{steps} steps"
    print(f"{Path(args.output_dir) / 'learned_embeds.safetensors'}: {args.placeholder_token} by {estimator}, {done}")
    if interrupted:
        raise KeyboardInterrupt


def forget_unused(args: argparse.Namespace, estimator: str) -> None:
    """The record of a baseline must not claim zeroth-order settings that it did not use."""
    args.estimator = estimator
    args.n = args.mu = args.tau = args.nu = None


def main(args: argparse.Namespace) -> None:
    def learn(model, data, inputs, evaluate, on_row, stop):
        theta, curve, steps = invert(model, data, inputs.initial_token, args, args.max_train_steps, args.learning_rate, evaluate,
                                     args.eval_steps, on_row, stop=stop)
        return theta, curve, steps, steps

    run_baseline(args, "backpropagation", learn)


if __name__ == "__main__":
    cli(main, parse_args())
