#!/usr/bin/env python
"""DreamBooth: teach Stable Diffusion a subject by training every weight of its UNet.

Implements Ruiz et al., DreamBooth (arXiv 2208.12242), as diffusers' examples/dreambooth does, with the text encoder frozen.
All parameters of the UNet are trained in fp32, with activations in the precision of --mixed_precision. Prior preservation
(Sec. 4.2) is an option; it is off by default, as in ZOODiP's Table 1.

    python -m trainers.dreambooth --train_data_dir dataset/dog6 --class_word dog
    python -m trainers.dreambooth --train_data_dir dataset/dog6 --class_word dog --prior_preservation --max_train_steps 800

The run writes unet/, in fp16, for UNet2DConditionModel.from_pretrained; with --save_pipeline, the whole folder for
StableDiffusionPipeline.from_pretrained. For Stable Diffusion v1.5, weights, gradients and two moments take 13.8 GB, and a
checkpoint 10.3 GB: one is written when the run is interrupted, otherwise only with --checkpointing_steps.
"""

from __future__ import annotations

import argparse
import sys

from zoodip import arguments
from zoodip.arguments import flags_for
from zoodip.errors import prepare_process, run_script

SETTINGS = arguments.TUNING_SETTINGS


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Learn a subject by training every weight of a Stable Diffusion's UNet.")
    add = arguments.add_tuning_flags(parser, learning_rate=5e-6, max_train_steps=400)
    add("--save_precision", default="fp16", choices=["fp16", "fp32"], help="precision of the saved weights")
    add("--save_pipeline", action="store_true", help="save the other folders as well, so that the output is a complete model")
    parser.set_defaults(output_dir="results/dreambooth", checkpointing_steps=0)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    return arguments.parse(build_parser(), arguments.check_tuning_flags, argv, arguments.without_effect)


# torch takes a second to import, so --help and invalid arguments are handled first.
if __name__ == "__main__":
    ARGS = parse_args()
    prepare_process()

from pathlib import Path

import torch
from torch import nn

from zoodip.quantize import DTYPES
from zoodip.tuned_files import save_other_folders, save_unet
from zoodip.tuned_layers import Parameters, Shapes, num_parameters
from zoodip.tuned_model import TuningInputs
from zoodip.weight_tuning import System, prepare


class DreamBooth(System):
    """Every weight of the UNet."""

    name, quantization, trains_unet = "DreamBooth", "none", True
    files = ("unet*", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json")

    def __init__(self, *, save_precision: str = "fp16", save_pipeline: bool = False):
        self.dtype, self.save_pipeline = DTYPES[save_precision], save_pipeline

    def shapes(self, unet: nn.Module) -> Shapes:
        return {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}

    def saved_bytes(self, shapes: Shapes) -> int:
        return self.dtype.itemsize * num_parameters(shapes)

    def install(self, unet: nn.Module, generator: torch.Generator) -> Parameters:
        return dict(unet.requires_grad_(True).named_parameters())

    def save(
        self, folder: Path, inputs: TuningInputs, unet: nn.Module, parameters: Parameters, header: dict[str, str], suffix: str
    ) -> Path:
        path = save_unet(folder / f"unet{suffix}", dict(parameters), inputs.folder, self.dtype, header)
        if self.save_pipeline and not suffix:
            save_other_folders(folder, inputs.folder, inputs.variant)
        return path


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save. Returns the exit code: 0, or 128 + signal if interrupted (and saved). Raises InputError."""
    flags = vars(args)
    tuning = prepare(DreamBooth(**flags_for(DreamBooth, flags)), flags, SETTINGS)
    with tuning.run as run:
        for _ in run.steps(tuning.outputs):
            run.note(*tuning.step())
    return run.finish(tuning.outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
