#!/usr/bin/env python
"""TuneQDM and PEQA: teach a UNet in 8- or 4-bit integers a subject by training only the scales of its integers.

Implements Ryu et al., "Memory-Efficient Personalization using Quantized Diffusion Model" (arXiv 2401.04339; v1 describes S1
and S2; v2, ECCV 2024, is TuneQDM) and, as its special case, Kim et al., PEQA (arXiv 2305.14152). The weights are W = s (q - z)
with a scale s for each output channel, and

    PEQA       W = s_out (q - z)            s_out trained, starting at s               --experts 1 --no_scale_in
    TuneQDM    W = s_out (q - z) s_in       s_in too, per input channel, starting at 1
    S2         N sets of scales, set e for timesteps [e T / N, (e + 1) T / N)           --experts N
    S1         one set, trained only at timesteps [LOW, HIGH)                           --train_interval LOW HIGH

    python -m trainers.tuneqdm --train_data_dir dataset/dog6 --class_word dog --bits 4
    python -m trainers.tuneqdm --train_data_dir dataset/dog6 --class_word dog --experts 1 --no_scale_in          # PEQA

The integers, biases and norms are frozen. One step: image, flip, timestep, noise -> UNet forward -> loss (Eq. 1 of ZOODiP's
paper) -> backward -> AdamW on the scales. Differences from the paper and from its code: docs/weight_tuning.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from zoodip import arguments
from zoodip.arguments import NUM_TRAIN_TIMESTEPS, flags_for, require, require_positive
from zoodip.errors import prepare_process, run_script

LEARNING_RATES = {8: 3e-6, 4: 5e-5}  # as published, in their proportion to the scales: those of 4 bits are 17 times as large
METHOD_SETTINGS = "bits experts no_scale_in scale_in_learning_rate train_interval apply".split()
SETTINGS = [*arguments.TUNING_SETTINGS, *METHOD_SETTINGS]


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Learn a subject by training the scales of a Stable Diffusion in 8- or 4-bit integers.")
    rates = "; default: " + ", ".join(f"{rate:g} with {bits} bits" for bits, rate in LEARNING_RATES.items())
    add = arguments.add_tuning_flags(parser, learning_rate=None, max_train_steps=400, rates=rates)
    add("--bits", type=int, default=8, choices=[8, 4], help="bits per integer; for 4, multiply a learning rate for 8 by 17")
    add(
        "--experts",
        type=int,
        default=None,
        help="sets of scales, each for its share of the timesteps; default: 4, or 1 with --train_interval",
    )
    add("--no_scale_in", action="store_true", help="do not train scales of input channels (PEQA)")
    add(
        "--scale_in_learning_rate",
        type=float,
        default=None,
        help="learning rate of the input channels' scales, then without weight decay; default: --learning_rate, with decay",
    )
    add(
        "--train_interval",
        type=int,
        nargs=2,
        default=None,
        metavar=("LOW", "HIGH"),
        help="S1: train one set of scales, only at timesteps in [LOW, HIGH), for example 500 900",
    )
    add(
        "--apply",
        default="interval",
        choices=["interval", "everywhere"],
        help="S1: timesteps at which drawing uses the trained scales; interval: the untuned ones are used elsewhere",
    )
    parser.set_defaults(output_dir="results/tuneqdm")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    args = arguments.parse(build_parser(), check_flags, argv, without_effect)
    if args.experts is None:  # set here, so that records and checkpoints hold the numbers
        args.experts = 4 if args.train_interval is None else 1
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.bits]
    return args


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    arguments.check_tuning_flags(flags)
    most, experts = NUM_TRAIN_TIMESTEPS, flags["experts"]
    require(flags, "experts", experts is None or 1 <= experts <= most, f"must be at least 1 and at most {most}")
    if flags["scale_in_learning_rate"] is not None:
        require_positive(flags, "scale_in_learning_rate", "1e-3")
        require(flags, "scale_in_learning_rate", not flags["no_scale_in"], "cannot be used with --no_scale_in")
    if flags["train_interval"] is not None:
        low, high = flags["train_interval"]
        require(flags, "train_interval", 0 <= low < high <= most, f"must be LOW < HIGH within [0, {most}]")
        require(flags, "train_interval", flags["timestep_sampling"] == "uniform", "needs --timestep_sampling uniform")
        require(flags, "experts", experts in (None, 1), "must be 1 with --train_interval (S1 has one set of scales)")


def without_effect(flags: dict, given: set[str]) -> Iterator[str]:
    """A line for each `given` flag that has no effect in this combination, and one if eval_loss will not show what is learned."""
    yield from arguments.without_effect(flags, given)
    if "apply" in given and flags["train_interval"] is None:
        yield f"--apply {flags['apply']} has no effect without --train_interval"
    low, high = flags["train_interval"] or (0, NUM_TRAIN_TIMESTEPS)
    unseen = high <= flags["t_min"] or flags["t_max"] <= low
    if unseen and flags["apply"] == "interval" and flags["eval_steps"]:
        yield (f"--train_interval {low} {high} is outside the evaluation set's timesteps: eval_loss will not show what is "
               f"learned; give --t_min {low} --t_max {high}")  # fmt: skip


# torch takes a second to import, so --help and invalid arguments are handled first.
if __name__ == "__main__":
    ARGS = parse_args()
    prepare_process()

from pathlib import Path

import torch
from torch import nn

from zoodip.diffusion import uniform_timesteps
from zoodip.tuned_files import save_scales
from zoodip.tuned_layers import Experts, Parameters, Shapes, add_scales, scale_shapes
from zoodip.tuned_model import TuningInputs
from zoodip.weight_tuning import System, prepare


class TuneQDM(System):
    """Scales of integers, with experts over timesteps."""

    files = ("tuned_scales*.safetensors",)

    def __init__(
        self,
        *,
        bits: int = 8,
        experts: int = 4,
        no_scale_in: bool = False,
        scale_in_learning_rate: float | None = None,
        train_interval: list[int] | None = None,
        apply: str = "interval",
    ):
        interval = (train_interval[0], train_interval[1]) if train_interval and apply == "interval" else None
        self.experts, self.scale_in = Experts(experts, interval), not no_scale_in
        self.scale_in_learning_rate = scale_in_learning_rate
        self.quantization = f"affine{bits}"
        self.sample = (
            None if train_interval is None else partial(uniform_timesteps, low=train_interval[0], high=train_interval[1])
        )
        self.name = "PEQA" if experts == 1 and no_scale_in and train_interval is None else "TuneQDM"

    def shapes(self, unet: nn.Module) -> Shapes:
        return scale_shapes(unet, self.experts.number, self.scale_in)

    def install(self, unet: nn.Module, generator: torch.Generator) -> Parameters:
        return add_scales(unet, self.experts, self.scale_in)

    def options(self, name: str) -> dict:
        """AdamW's decay draws s_in towards 0, not 1. At the published rate this is too little to matter; with a rate of its own,
        s_in has no decay."""
        own_rate = self.scale_in_learning_rate is not None and ".scale_in." in name
        return dict(lr=self.scale_in_learning_rate, weight_decay=0.0) if own_rate else {}

    def group(self, timestep: int) -> int | None:
        return self.experts.of(timestep)

    def save(
        self, folder: Path, inputs: TuningInputs, unet: nn.Module, parameters: Parameters, header: dict[str, str], suffix: str
    ) -> Path:
        return save_scales(folder / f"tuned_scales{suffix}.safetensors", parameters, header)


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save. Returns the exit code: 0, or 128 + signal if interrupted (and saved). Raises InputError."""
    flags = vars(args)
    tuning = prepare(TuneQDM(**flags_for(TuneQDM, flags)), flags, SETTINGS)
    with tuning.run as run:
        for _ in run.steps(tuning.outputs):
            run.note(*tuning.step())
    return run.finish(tuning.outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
