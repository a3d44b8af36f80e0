#!/usr/bin/env python
"""Everything that a GPU is claimed to do, tried in one command: the same numbers as on a CPU, memory, time, and a demo.

    python -m benchmarks.gpu                    # miniature, and a model of Stable Diffusion v1.5's shape
    python -m benchmarks.gpu --worlds miniature
    python -m benchmarks.gpu --device cpu       # how far the script itself can be tried without a GPU

Numbers: losses of candidates and slopes along random directions, in every precision and quantisation, for tokens of 1, 3 and 10
times the initial length (training lengthens them), against fp32 on the CPU with the same weights. Memory and time: as
`speed_memory.py`, with and without --compile. Writes benchmarks/gpu.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.precision import agreement, draw_samples
from benchmarks.renders import PLACEHOLDER, Modules, theta_of
from benchmarks.report import FOLDER, write_report
from benchmarks.speed_memory_tables import page
from train_zoodip import RGE, candidate_losses
from zoodip.diffusion import Batch, FrozenModel
from zoodip.errors import InputError, run_script
from zoodip.prompts import load_tokenizer
from zoodip.records import ROOT, table

MU = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-3}  # train_zoodip.py's defaults
# How far a loss may be from the CPU's in fp32, relatively: ten unit roundoffs (2^-8 and 2^-11) of what the activations are
# kept in; in fp32 the bound of benchmarks/NOTES.md, as both devices sum the same products in another order.
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2, "fp16": 5e-3}
SCALES = (1, 3, 10)
METHODS = ["zoodip", "zoodip_one", "zoodip_compiled", "authors", "ti", "floor", "floor_as_loaded"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--model", type=Path, default=ROOT / "miniature" / "model", help="folder whose losses are compared")
    add("--precisions", nargs="+", default=list(MU), choices=list(MU), help="of activations")
    add("--samples", type=int, default=16, help="(image, timestep, noise) triples")
    add("--directions", type=int, default=4, help="random directions per triple")
    add(
        "--worlds",
        nargs="*",
        default=["miniature", "sd15"],
        choices=["miniature", "sd15"],
        help="where memory and time are measured",
    )
    add("--rounds", type=int, default=5, help="timed turns of every method")
    add("--demo_steps", type=int, default=1000, help="steps of the demo; 0: none")
    add("--output", type=Path, default=FOLDER, help="folder for gpu.json and .md")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------- the same numbers?


def all_losses(
    model: FrozenModel, batches: list[Batch], theta: torch.Tensor, directions: torch.Tensor, mu: float
) -> torch.Tensor:
    """Losses [S, K + 1] at theta and around it, for directions [S, K, V, d]."""
    offsets = [RGE.candidate_offsets(u) for u in directions]
    return torch.stack([candidate_losses(model, batch, theta + mu * u) for batch, u in zip(batches, offsets, strict=True)])


def compare(folder: Path, device: str, precisions: list[str], samples: int, directions: int) -> list[dict]:
    """One record for each quantisation, precision and length of the token."""
    tokenizer = load_tokenizer(folder, PLACEHOLDER, 1)
    prompts, batches = draw_samples(folder, tokenizer, samples, 0, "cpu")
    initial = theta_of(folder, tokenizer)
    along = torch.randn(samples, directions, *initial.shape, generator=torch.Generator().manual_seed(1))
    here, there = Modules(folder, prompts.rows, "cpu"), Modules(folder, prompts.rows, device)
    records = []
    for quantization in ("none", "nf4", "int8"):
        reference = here.model(quantization, "fp32", "fp32")
        for precision in precisions:
            model, mu = there.model(quantization, precision, precision), MU[precision]
            for scale in SCALES:
                exact, found = (all_losses(each, batches, scale * initial, along, mu) for each in (reference, model))
                slopes = [RGE.slopes(losses.T, mu) for losses in (found, exact)]
                error = ((found - exact).abs() / exact).max().item()
                case = dict(quantization=quantization, precision=precision, scale=scale, mu=mu)
                within = error <= TOLERANCE[precision]
                records.append(dict(case, loss_error=error, within=within, **agreement(slopes[0], slopes[1])))
    return records


def comparison_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        verdict = (
            f"{record['loss_error']:.1e} ({'within' if record['within'] else '**above**'} {TOLERANCE[record['precision']]:.0e})"
        )
        case = [record["quantization"], record["precision"], f"x {record['scale']}", f"{record['mu']:.0e}"]
        rows.append([*case, verdict, f"{record['correlation']:.3f}", f"{100 * record['sign_agreement']:.0f} %"])
    header = ["weights", "activations", "token", "mu", "largest relative error of a loss", "correlation of slopes", "same sign"]
    return "## Against the CPU in fp32, same weights\n\n" + table(header, rows) + "\n"


# ----------------------------------------------------------------------------------------------------- memory, time, demo


def run_speed_memory(args: argparse.Namespace, folder: Path) -> dict:
    """The results of `speed_memory.py`, whose command line this is."""
    command = [sys.executable, "-m", "benchmarks.speed_memory", "--device", args.device, "--worlds", *args.worlds]
    command += ["--methods", *METHODS, "--rounds", str(args.rounds), "--output", str(folder)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise InputError("benchmarks/speed_memory.py failed; what it printed above says why")
    name = "speed_memory" if args.device == "cpu" else "speed_memory_cuda"
    return json.loads((folder / f"{name}.json").read_text())["results"]


def run_demo(device: str, steps: int, folder: Path) -> dict:
    """Wall seconds, run.json and curve of the demo."""
    command = [
        "sh",
        str(ROOT / "train_zoodip.sh"),
        "demo",
        "--max_train_steps",
        str(steps),
        *(["--cpu"] if device == "cpu" else []),
    ]
    started = time.monotonic()
    ended = subprocess.run(command, env=dict(os.environ, OUTPUT_DIR=str(folder), PYTHON=sys.executable))
    if ended.returncode:
        raise InputError(f"the demo ended with code {ended.returncode}; what it printed above says why")
    curve = (folder / "training_log.csv").read_text().splitlines()
    return dict(wall_seconds=time.monotonic() - started, run=json.loads((folder / "run.json").read_text()), curve=curve)


def demo_table(demo: dict) -> str:
    column = demo["curve"][0].split(",").index("eval_loss")
    first, last = (line.split(",")[column] for line in (demo["curve"][1], demo["curve"][-1]))
    run = demo["run"]
    rows = [
        ["wall time", f"{demo['wall_seconds']:.0f} s"],
        ["activations", run["settings"]["mixed_precision"]],
        ["steps/s", f"{run['steps_per_second']:.1f}"],
        ["peak memory", f"{run['peak_memory_gb']:.2f} GB"],
        ["loss of the fixed set", f"{float(first):.5f} to {float(last):.5f}"],
    ]
    return f"## The demo, {run['step']} steps\n\n" + table(["", ""], rows) + "\n"


def main(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; install torch's CUDA build, or try the script with --device cpu")
    records = compare(args.model, args.device, args.precisions, args.samples, args.directions)
    results, text = dict(comparison=records), [comparison_table(records)]
    with tempfile.TemporaryDirectory() as temporary:
        if args.worlds:
            results["speed_memory"] = run_speed_memory(args, Path(temporary) / "speed_memory")
            text.append(page(results["speed_memory"], args.device))
        if args.demo_steps:
            results["demo"] = run_demo(args.device, args.demo_steps, Path(temporary) / "demo")
            text.append(demo_table(results["demo"]))
    write_report("gpu", vars(args), results, "\n".join(text), args.device, args.output)
    print("\n".join(text))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
