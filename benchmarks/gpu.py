#!/usr/bin/env python
"""Check every claim about GPUs in one command: agreement with the CPU, memory, time, the demo, and every training script.

    python -m benchmarks.gpu                    # on a model of Stable Diffusion v1.5's shape, which it writes first
    python -m benchmarks.gpu --parts numbers demo
    python -m benchmarks.gpu --device cpu       # try the script itself without a GPU

numbers: candidate losses and slopes along random directions, in every precision and quantisation, for tokens of 1, 3 and 10 times
the initial norm (training lengthens tokens), against fp32 on the CPU with the same weights. speed: time and memory, as in
`speed_memory.py`. demo: the miniature's demo. systems: every training script for a few steps, with the memory that nvidia-smi
reports for it, which is what the paper's Table 1 gives; several run at a time, so no time is reported. Writes benchmarks/gpu.json
and .md after each part; parts measured by an earlier call at the same commit are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.memory import gpu_bytes
from benchmarks.precision import agreement, draw_samples
from benchmarks.renders import PLACEHOLDER, Modules, theta_of
from benchmarks.report import FOLDER, write_report
from benchmarks.sd15_shape import complete_folder
from benchmarks.speed_memory import GPU_JOBS
from benchmarks.speed_memory_tables import page
from train_zoodip import RGE, candidate_losses
from zoodip.arguments import new_parser
from zoodip.diffusion import Batch, FrozenModel
from zoodip.errors import InputError, run_script
from zoodip.prompts import load_tokenizer
from zoodip.records import ROOT, git_commit, table

MU = {"fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-3}  # train_zoodip.py's defaults
# Allowed relative difference of a loss from the CPU's in fp32: ten unit roundoffs (2^-8 and 2^-11) of the activations' format;
# for fp32, the bound from benchmarks/NOTES.md, since the two devices sum the same products in different orders.
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2, "fp16": 5e-3}
SCALES = (1, 3, 10)
METHODS = [
    "zoodip", "zoodip_one", "zoodip_int8", "zoodip_none", "zoodip_compiled", "newton", "newton_basis", "authors", "authors_stock",
    "ti", "ti_checkpointed", "ti_none", "floor", "floor_as_loaded",
]  # fmt: skip
PEQA = ("--experts", "1", "--no_scale_in")
# {system: (script, its flags, GB in the paper's Table 1: with fp16 activations, but fp32 for DreamBooth and TI)}
SYSTEMS: dict[str, tuple[str, tuple[str, ...], float | None]] = {
    "ZOODiP, NF4": ("train_zoodip", (), None),
    "ZOODiP, NF4, with the pictures at its end": ("train_zoodip", ("--final_picture",), None),
    "ZOODiP, INT8": ("train_zoodip", ("--quantization", "int8"), 2.37),
    "ZOODiP, not quantised": ("train_zoodip", ("--quantization", "none"), None),
    "ZOODiP, NF4, one candidate a forward": ("train_zoodip", ("--candidates_per_forward", "1"), None),
    "Gauss-Newton, NF4": ("trainers.gauss_newton", (), None),
    "GF-TI, INT8": ("trainers.gf_ti", ("--quantization", "int8"), 2.37),
    "gradient TI, fp32": ("trainers.textual_inversion", ("--quantization", "none", "--mixed_precision", "fp32"), 6.75),
    "gradient TI, NF4": ("trainers.textual_inversion", ("--quantization", "nf4"), None),
    "DreamBooth, fp32": ("trainers.dreambooth", ("--mixed_precision", "fp32"), 19.4),
    "DreamBooth": ("trainers.dreambooth", (), None),
    "QLoRA, NF4": ("trainers.qlora", (), 7.56),
    "PEQA, INT8": ("trainers.tuneqdm", PEQA, 6.31),
    "PEQA, INT4": ("trainers.tuneqdm", (*PEQA, "--bits", "4"), None),
    "TuneQDM, INT8": ("trainers.tuneqdm", (), 8.96),
    "DiffuseKronA, NF4": ("trainers.diffusekrona", (), None),
}
PARTS = ("numbers", "speed", "demo", "systems")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--model", type=Path, default=ROOT / "miniature" / "model", help="folder whose losses are compared")
    add("--precisions", nargs="+", default=list(MU), choices=list(MU), help="precisions of activations")
    add("--samples", type=int, default=16, help="(image, timestep, noise) triples")
    add("--directions", type=int, default=4, help="random directions per triple")
    add("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="what to measure")
    add("--folder", type=Path, default=None, help="the SD v1.5-shaped model: written here, or used if it exists")
    add("--worlds", nargs="+", default=["sd15"], choices=["miniature", "sd15"], help="worlds of the speed part")
    add("--rounds", type=int, default=5, help="timed turns of every method")
    add("--demo_steps", type=int, default=500, help="steps of the demo")
    add("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM", help="systems of the last part")
    add("--system_steps", type=int, default=10, help="steps of each; GF-TI runs a tenth as many generations")
    add("--resolution", type=int, default=512, help="their resolution in pixels; lower only to try the script")
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
    """One record for each quantisation, precision and token norm."""
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


def run_speed_memory(args: argparse.Namespace, shape: Path, folder: Path) -> dict:
    """Run `speed_memory.py` and return its results."""
    command = [sys.executable, "-m", "benchmarks.speed_memory", "--device", args.device, "--worlds", *args.worlds]
    command += ["--folder", str(shape), "--methods", *METHODS, "--rounds", str(args.rounds), "--output", str(folder)]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise InputError("benchmarks/speed_memory.py failed; what it printed above says why")
    name = "speed_memory" if args.device == "cpu" else "speed_memory_cuda"
    return json.loads((folder / f"{name}.json").read_text())["results"]


def run_demo(device: str, steps: int, folder: Path) -> dict:
    """Run the demo and return its wall seconds, run.json and training curve."""
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


# ----------------------------------------------------------------------------------------------------- every system


def system_command(name: str, shape: Path, args: argparse.Namespace, output: Path) -> list[str]:
    """The command line of a system's own script."""
    script, flags, _ = SYSTEMS[name]
    steps = args.system_steps
    command = [sys.executable, "-m", script, "--pretrained_model_name_or_path", str(shape), "--variant", "fp16"]
    command += ["--train_data_dir", str(ROOT / "dataset" / "furmix"), "--resolution", str(args.resolution), "--no-use_cc"]
    command += ["--eval_steps", "0", "--no-final_picture", "--checkpointing_steps", "0", "--output_dir", str(output), *flags]
    if script == "trainers.gauss_newton":
        command += ["--max_forwards", str(9 * steps)]
    else:
        command += ["--max_train_steps", str(max(1, steps // 10) if script == "trainers.gf_ti" else steps)]
    tunes_weights = script.rpartition(".")[2] in ("dreambooth", "qlora", "tuneqdm", "diffusekrona")
    command += ["--class_word" if tunes_weights else "--initializer_token", "dog"]
    return [*command, "--cpu"] if args.device == "cpu" else command


def run_system(name: str, shape: Path, args: argparse.Namespace) -> dict:
    """Run a system's script -> figures of its run.json and the peak bytes that nvidia-smi reported; {"error": its last line}."""
    with tempfile.TemporaryDirectory() as temporary:
        output, said = Path(temporary) / "run", Path(temporary) / "said.txt"
        with said.open("w") as file:
            process = subprocess.Popen(system_command(name, shape, args, output), cwd=ROOT, stdout=file, stderr=file)
        held, done = 0, threading.Event()

        def watch() -> None:
            nonlocal held
            while args.device == "cuda" and not done.wait(0.1):
                held = max(held, gpu_bytes()[process.pid])

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
        if code:
            return dict(error=(said.read_text().strip().splitlines() or [f"code {code}"])[-1])
        run = json.loads((output / "run.json").read_text())
    told = ("steps_this_time", "unet_forwards", "peak_memory_gb")
    return dict(nvidia_smi=held, activations=run["settings"]["mixed_precision"], **{key: run[key] for key in told})


def systems_table(systems: dict[str, dict], resolution: int) -> str:
    rows = []
    for name, found in systems.items():
        paper = SYSTEMS[name][2]
        if "error" in found:
            rows.append([name, found["error"].replace("|", "/"), "", "", ""])
            continue
        held = [f"{found['nvidia_smi'] / 1e9:.2f}", f"{found['peak_memory_gb']:.2f}"]
        rows.append([name, found["activations"], *held, str(paper or "")])
    header = ["system", "activations", "nvidia-smi, GB", "tensors, GB", "the paper's, GB"]
    title = f"## Every training script, a few steps at {resolution} pixels, batch 1, SD v1.5's shape"
    return title + "\n\n" + table(header, rows) + "\n"


# ----------------------------------------------------------------------------------------------------- all of it


def earlier_parts(args: argparse.Namespace) -> dict:
    """Results of an earlier call at this commit on this device, except for the parts that this call measures."""
    path = args.output / "gpu.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = earlier.get("commit") == git_commit() and earlier.get("arguments", {}).get("device") == args.device
    return {part: found for part, found in earlier.get("results", {}).items() if same and part not in args.parts}


def whole_page(results: dict, args: argparse.Namespace) -> str:
    text = {
        "numbers": comparison_table,
        "speed": lambda found: page(found, args.device),
        "demo": demo_table,
        "systems": lambda found: systems_table(found, args.resolution),
    }
    return "\n".join(text[part](results[part]) for part in PARTS if part in results)


def main(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; install torch's CUDA build, or try the script with --device cpu")
    results = earlier_parts(args)

    def keep(part: str, found: dict | list) -> None:
        results[part] = found
        write_report("gpu", vars(args), results, whole_page(results, args), args.device, args.output)

    with tempfile.TemporaryDirectory() as temporary:
        shape = (args.folder or Path(temporary) / "sd15-shape").resolve()
        if {"speed", "systems"} & set(args.parts):
            complete_folder(shape)
        if "numbers" in args.parts:
            keep("numbers", compare(args.model, args.device, args.precisions, args.samples, args.directions))
        if "speed" in args.parts:
            keep("speed", run_speed_memory(args, shape, Path(temporary) / "speed_memory"))
        if "demo" in args.parts:
            keep("demo", run_demo(args.device, args.demo_steps, Path(temporary) / "demo"))
        if "systems" in args.parts:
            with ThreadPoolExecutor(GPU_JOBS if args.device == "cuda" else 1) as pool:
                runs = {name: pool.submit(run_system, name, shape, args) for name in args.systems}
                systems: dict[str, dict] = {}
                for name, run in runs.items():
                    systems[name] = run.result()
                    keep("systems", systems)
    print(whole_page(results, args))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
