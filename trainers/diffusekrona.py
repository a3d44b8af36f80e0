#!/usr/bin/env python
"""DiffuseKronA: teach Stable Diffusion a subject with Kronecker products added to its attention projections.

Implements Marjit et al., DiffuseKronA (arXiv 2402.17412v2, WACV 2025), on the UNet's 128 projections:

    W + A kron B  (Eq. 5)      A [a1, a2] ~ N(0, 1 / a1^2), B [O / a1, I / a2] = 0, W frozen, in NF4 or plain

    python -m trainers.diffusekrona --train_data_dir dataset/dog6 --class_word dog

The rank of such a product is rank A times rank B: up to 80 at (4, 64), where LoRA with as many numbers has rank 2. The run writes
pytorch_lokr_weights.safetensors with LyCORIS' names, which A1111 and ComfyUI read; if a1 = a2, also a peft adapter.
With --base none, --export_merged writes a plain unet/ with the products added. Differences from the paper and from its code,
whose forward is not the Kronecker product: docs/weight_tuning.md.
"""

from __future__ import annotations

import argparse
import sys

from zoodip import arguments
from zoodip.arguments import flags_for, require, require_at_least_one
from zoodip.errors import prepare_process, require_peft, run_script

METHOD_SETTINGS = "a1 a2 base".split()
SETTINGS = [*arguments.TUNING_SETTINGS, *METHOD_SETTINGS]


def build_parser() -> argparse.ArgumentParser:
    parser = arguments.new_parser("Learn a subject with Kronecker products added to the attention layers of a Stable Diffusion.")
    add = arguments.add_tuning_flags(parser, learning_rate=5e-4, max_train_steps=500)
    add("--a1", type=int, default=4, help="rows of A; must divide the outputs of every projection")
    add("--a2", type=int, default=64, help="columns of A; must divide the inputs of every projection")
    arguments.add_base_flag(add)
    add("--export_merged", default=None, metavar="DIR", help="with --base none: write to DIR a unet/ with the products added")
    parser.set_defaults(output_dir="results/diffusekrona")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line (`sys.argv` if `argv` is None); exit with code 2 and a one-line message on an error."""
    return arguments.parse(build_parser(), check_flags, argv, arguments.without_effect)


def check_flags(flags: dict) -> None:
    """Check everything that can be checked without opening a file. Raises InputError."""
    arguments.check_tuning_flags(flags)
    require_at_least_one(flags, "a1", "a2")
    plain = flags["export_merged"] is None or flags["base"] == "none"
    require(flags, "export_merged", plain, "needs --base none: packed again, the sum would be a different model")


# torch takes a second to import, so --help and invalid arguments are handled first.
if __name__ == "__main__":
    ARGS = parse_args()
    prepare_process()

from pathlib import Path

import torch
from torch import nn

from zoodip.files import ensure_writable
from zoodip.folder import refuse_model_folder
from zoodip.run import move_aside
from zoodip.tuned_files import merged_unet, save_lokr, save_unet
from zoodip.tuned_layers import Parameters, Shapes, add_kronecker, kronecker_shapes
from zoodip.tuned_model import TuningInputs
from zoodip.weight_tuning import System, prepare

EXPORT_DTYPE = torch.float16  # of the merged UNet, as in other tools


class DiffuseKronA(System):
    """Kronecker products added to the attention projections."""

    name = "DiffuseKronA"
    files = ("pytorch_lokr_weights*.safetensors", "peft_adapter*")

    def __init__(self, *, a1: int = 4, a2: int = 64, base: str = "nf4", export_merged: str | None = None):
        if a1 == a2:  # checked now rather than after the last step
            require_peft("DiffuseKronA with --a1 equal to --a2, which also writes a peft adapter,")
        self.a1, self.a2, self.quantization = a1, a2, base
        self.export = None if export_merged is None else Path(export_merged) / "unet"

    def claim(self, inputs: TuningInputs, unet: nn.Module) -> None:
        if self.export is None:
            return
        refuse_model_folder("export_merged", self.export.parent, inputs.folder)
        parameters = sum(parameter.numel() for parameter in unet.parameters())
        ensure_writable(self.export, "export_merged", EXPORT_DTYPE.itemsize * parameters)

    def shapes(self, unet: nn.Module) -> Shapes:
        return kronecker_shapes(unet, self.a1, self.a2)

    def install(self, unet: nn.Module, generator: torch.Generator) -> Parameters:
        return add_kronecker(unet, self.a1, self.a2, generator)

    def save(
        self, folder: Path, inputs: TuningInputs, unet: nn.Module, parameters: Parameters, header: dict[str, str], suffix: str
    ) -> Path:
        return save_lokr(folder, parameters, header, suffix)


def main(args: argparse.Namespace) -> int:
    """Check, load, train, save. Returns the exit code: 0, or 128 + signal if interrupted (and saved). Raises InputError."""
    flags = vars(args)
    system = DiffuseKronA(**flags_for(DiffuseKronA, flags))
    tuning = prepare(system, flags, SETTINGS)
    with tuning.run as run:
        for _ in run.steps(tuning.outputs):
            run.note(*tuning.step())
    exported = system.export is not None and any(system.export.glob("*.safetensors"))
    if system.export is not None and not run.interrupted and not (exported and run.progress.step == run.first_step):
        if any(system.export.iterdir()):  # `claim` has made the folder
            move_aside(system.export.parent, [system.export])
        inputs = tuning.outputs.inputs
        merged = merged_unet(tuning.model.unet, inputs.folder, inputs.variant)
        save_unet(system.export, merged, inputs.folder, EXPORT_DTYPE, tuning.outputs.header(run.progress.step))
        print(f"{system.export}: the UNet with the products added, fp16")
    return run.finish(tuning.outputs)


if __name__ == "__main__":
    sys.exit(run_script(main, ARGS))
