#!/usr/bin/env python
"""QLoRA: teach a 4-bit Stable Diffusion a subject with low-rank updates of its attention projections.

Implements Dettmers et al., QLoRA (arXiv 2305.14314), on the UNet's 128 projections (query, key, value, output of self- and
cross-attention), chosen and initialised as in diffusers' DreamBooth LoRA example:

    y = base(x) + B A x        A [r, I] ~ N(0, 1 / r^2), B [O, r] = 0, base frozen in NF4

    python -m trainers.qlora --train_data_dir dataset/dog6 --class_word dog

The run writes pytorch_lora_weights.safetensors, which pipe.load_lora_weights reads, and a copy for A1111 and ComfyUI, named after
the identifier. Layers, initialisation and names are peft's. Differences from the paper: docs/weight_tuning.md.
"""

from __future__ import annotations

import argparse
import sys

from zoodip import arguments
from zoodip.arguments import flags_for, require_at_least_one
from zoodip.errors import prepare_process, require_peft, run_script

METHOD_SETTINGS = "rank base".split()
SETTINGS = [*arguments.TUNING_SETTINGS, *METHOD_SETTINGS]


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Learn a subject with low-rank updates (LoRA) of a 4-bit Stable Diffusion.")
    add = arguments.add_tuning_flags(parser, learning_rate=1e-4, max_train_steps=500)
    add("--rank", type=int, default=2, help="rank r of the updates; alpha = r, so they are not scaled")
    arguments.add_base_flag(add)
    parser.set_defaults(output_dir="results/qlora")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    return arguments.parse(build_parser(), check_flags, argv, arguments.without_effect)


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    arguments.check_tuning_flags(flags)
    require_at_least_one(flags, "rank")


# torch takes a second to import, so --help and invalid arguments are handled first.
if __name__ == "__main__":
    ARGS = parse_args()
    prepare_process()

from pathlib import Path

import torch
from torch import nn

from zoodip.prompts import file_stem
from zoodip.tuned_files import save_lora
from zoodip.tuned_layers import Parameters, Shapes, add_lora, lora_shapes
from zoodip.tuned_model import TuningInputs
from zoodip.weight_tuning import System, prepare


class QLoRA(System):
    """Low-rank updates of the attention projections."""

    def __init__(self, *, rank: int = 2, base: str = "nf4", identifier: str = "sks"):
        require_peft("QLoRA")  # before a model is loaded
        self.rank, self.quantization, self.stem = rank, base, file_stem(identifier)
        self.name = "QLoRA" if base == "nf4" else "LoRA"
        self.files = ("pytorch_lora_weights*.safetensors", f"{self.stem}.safetensors", f"{self.stem}-steps-*.safetensors")

    def shapes(self, unet: nn.Module) -> Shapes:
        return lora_shapes(unet, self.rank)

    def install(self, unet: nn.Module, generator: torch.Generator) -> Parameters:
        return add_lora(unet, self.rank, generator)

    def save(
        self, folder: Path, inputs: TuningInputs, unet: nn.Module, parameters: Parameters, header: dict[str, str], suffix: str
    ) -> Path:
        return save_lora(folder, unet, self.stem, header, suffix)


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save. Returns the exit code: 0, or 128 + signal if interrupted (and saved). Raises InputError."""
    flags = vars(args)
    tuning = prepare(QLoRA(**flags_for(QLoRA, flags)), flags, SETTINGS)
    with tuning.run as run:
        for _ in run.steps(tuning.outputs):
            run.note(*tuning.step())
    return run.finish(tuning.outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
