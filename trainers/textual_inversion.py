#!/usr/bin/env python
"""Gradient textual inversion: learn the token by backpropagation, which ZOODiP does without.

Implements Gal et al., "An Image is Worth One Word" (arXiv 2208.01618) on the quantised model of train_zoodip.py: photographs,
captions, timesteps, evaluation set and output files are the same; only the update differs. One training step:

    image, flip, caption, timestep, noise  ->  UNet forward  ->  loss  ->  backward through the dequantised weights  ->  Adam

    python -m trainers.textual_inversion --train_data_dir dataset/dog6 --initializer_token dog --use_cc

The backward pass keeps every activation (weights are dequantised again): at the size of Stable Diffusion v1.5, its tensors take
three times the memory of train_zoodip.py's on a CPU, 1.7 times on a GPU (docs/measurements.md).
"""

from __future__ import annotations

import argparse
import sys

from zoodip import arguments
from zoodip.arguments import flags_for, require_positive
from zoodip.errors import prepare_process, run_script

METHOD_SETTINGS = "method learning_rate adam_epsilon timestep_sampling t_min t_max".split()
SETTINGS = [*arguments.SHARED_SETTINGS, *METHOD_SETTINGS]  # recorded in checkpoints; resuming with others is refused


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser(
        "Learn one token embedding for a subject by backpropagation through a quantised Stable Diffusion."
    )
    arguments.add_model_flags(parser, compiling=False)
    arguments.add_token_flags(parser)
    arguments.add_subject_flags(parser)
    add = parser.add_argument_group("method").add_argument
    add("--learning_rate", type=float, default=5e-3, help="constant learning rate of Adam (betas .9, .999)")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of Adam; ZOODiP's is 1e-3, but here gradients are exact")
    add("--max_train_steps", type=int, default=5000, help="steps of one forward and one backward pass")
    arguments.add_timestep_flags(add, "puts")
    arguments.add_step_flags(add, candidates=None)
    arguments.add_run_flags(parser)
    parser.set_defaults(output_dir="results/textual_inversion", method="textual_inversion")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    return arguments.parse(build_parser(), check_flags, argv, arguments.without_effect)


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    arguments.check_training_flags(flags)
    require_positive(flags, "adam_epsilon", "1e-8")


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
)
from zoodip.outputs import TokenOutputs
from zoodip.process import make_accelerator
from zoodip.run import Run

LOSS_SCALE = 1024.0  # a power of two: exact in fp32 and bf16, and keeps fp16 gradients from vanishing


def loss_and_gradient(model: FrozenModel, batch: Batch, theta: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean squared error of the prediction at theta [V, d], a leaf that requires a gradient -> (loss, gradient [V, d])."""
    error = model.predict(batch, theta[None])[0] - batch.target.to(model.rows.device)  # [B, 4, h, w]
    loss = error.square().flatten().mean()
    (gradient,) = torch.autograd.grad(loss * LOSS_SCALE, theta)
    return loss.item(), gradient / LOSS_SCALE


class TextualInversion:
    """theta [V, d] and Adam on its exact gradient, fp32 on the CPU (a few KB)."""

    remedy = "a smaller --learning_rate"

    def __init__(self, token: torch.Tensor, *, learning_rate: float = 5e-3, adam_epsilon: float = 1e-8):
        """token: [V, d], where training starts."""
        self.theta = nn.Parameter(token.detach().clone().float())
        self.optimizer = torch.optim.Adam([self.theta], lr=learning_rate, betas=(0.9, 0.999), eps=adam_epsilon)
        moments = {name: torch.zeros_like(self.theta) for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.theta] = {"step": torch.tensor(0.0), **moments}

    def step(self, model: FrozenModel, batch: Batch) -> float | None:
        """One forward, one backward, one update -> the loss, or None, without an update, if the gradient is not finite."""
        loss, gradient = loss_and_gradient(model, batch, self.theta)
        if not torch.isfinite(gradient).all():
            return None
        self.theta.grad = gradient
        self.optimizer.step()
        return loss

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything the next steps depend on, except the generator."""
        return {"theta": self.theta.detach(), **self.optimizer.state[self.theta]}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.theta.data.copy_(state["theta"])
        self.optimizer.state[self.theta].update({name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")})


def train(run: Run, outputs: TokenOutputs, inversion: TextualInversion, model: FrozenModel, data: Data, sample: TimestepSampler,
          batch_size: int, generator: torch.Generator) -> None:  # fmt: skip
    """Train `run` from its current step to the last or to a signal. Forwards count; backwards, about twice as costly, do not."""
    for _ in run.steps(outputs):
        batch = draw_batch(data, batch_size, sample, generator)
        run.note(inversion.step(model, batch), forwards=1)


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save. Returns the exit code: 0, or 128 + signal if interrupted (and saved). Raises InputError."""
    flags = vars(args)  # a view: values set on `args` below appear in it too
    inputs = read_inputs(**flags_for(read_inputs, flags))
    accelerator = make_accelerator(1, **flags_for(make_accelerator, flags))
    flags.update(settle_flags(inputs.folder, inputs.variant, accelerator.device, **flags_for(settle_flags, flags)))
    args.num_vectors = len(inputs.initial_token)  # an embedding file has its own number

    generator = torch.Generator().manual_seed(args.seed)
    inversion = TextualInversion(inputs.initial_token, **flags_for(TextualInversion, flags))
    run = Run(inversion, generator, accelerator, arguments.settings_of(flags, SETTINGS), inputs.fingerprint(),
              **flags_for(Run, flags))  # fmt: skip
    run.resume(args.resume_from_checkpoint)
    run.claim(inputs.folder)
    model, data = load_model(inputs, device=accelerator.device, **flags_for(load_model, flags))
    outputs = TokenOutputs(inversion, inputs, model, data, run.settings, **flags_for(TokenOutputs, flags))
    sample = timestep_sampler(data, **flags_for(timestep_sampler, flags))
    with run:
        train(run, outputs, inversion, model, data, sample, args.train_batch_size, generator)
    return run.finish(outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
