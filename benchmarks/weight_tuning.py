#!/usr/bin/env python
"""Memory and time of a step of each weight-tuning system at the shape of Stable Diffusion v1.5, 512 pixels.

    python benchmarks/weight_tuning.py                     # every row, in processes of their own
    python benchmarks/weight_tuning.py --rows qlora peqa4

A row loads, and steps without and with gradient checkpointing, --steps times each. Memory is that of tensors that live at once,
exact and the same in every run (benchmarks/memory.py); time is the last step's, under the profiler that counts them, of a machine
that others may use, so that ratios within a run say more than seconds. Writes weight_tuning.json, after each row, and .md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.memory import count_live_bytes
from benchmarks.sd15_shape import build_folder
from zoodip.arguments import flags_for
from zoodip.files import write_atomically, write_json
from zoodip.records import ROOT, environment, table
from zoodip.weight_tuning import Tuning, prepare

ROWS = {  # trainer, class, flags; what the issue of memory aims at and the paper's table says, GB
    "qlora": ("qlora", "QLoRA", {}, "QLoRA r = 2, NF4", 7.56),
    "krona": ("diffusekrona", "DiffuseKronA", {}, "DiffuseKronA (4, 64), NF4", None),
    "peqa4": ("tuneqdm", "TuneQDM", dict(experts=1, no_scale_in=True, bits=4), "PEQA int4", 6.31),
    "tuneqdm8": ("tuneqdm", "TuneQDM", dict(experts=4), "TuneQDM int8, N = 4", 8.96),
    "dreambooth": ("dreambooth", "DreamBooth", {}, "DreamBooth", 19.4),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    add("--folder", type=Path, default=None, help="the SD v1.5-shaped model: written here, or used if it is there")
    add("--photos", type=Path, default=ROOT / "dataset" / "furmix", help="folder of photographs")
    add("--steps", type=int, default=2, help="steps whose live bytes are followed")
    add("--output", type=Path, default=ROOT / "benchmarks", help="folder for weight_tuning.json and .md")
    add("--child", default=None, choices=list(ROWS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def some_steps(tuning: Tuning, steps: int, moments: list[float]) -> None:
    """Step, and note the moments between steps."""
    for _ in range(steps):
        moments.append(time.perf_counter())
        tuning.step()
    moments.append(time.perf_counter())


def measure(row: str, folder: Path, photos: Path, steps: int) -> dict:
    """Live bytes and seconds of some steps of a row, without and with gradient checkpointing, and what is held between steps."""
    script, class_name, own, _, _ = ROWS[row]
    module = importlib.import_module(f"trainers.{script}")
    found: dict = {}
    with tempfile.TemporaryDirectory() as output:
        argv = ["--pretrained_model_name_or_path", str(folder), "--variant", "fp16", "--train_data_dir", str(photos)]
        argv += ["--class_word", "dog", "--mixed_precision", "bf16", "--cpu", "--eval_steps", "0", "--output_dir", output]
        flags = {**vars(module.parse_args(argv)), **own}
        system = getattr(module, class_name)
        tuning = prepare(system(**flags_for(system, flags)), flags, module.SETTINGS)
        unet, parameters = tuning.model.unet, tuning.tuner.parameters
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers())}
        adam = [moment for state in tuning.tuner.optimizer.state.values() for moment in state.values()]
        found["held"] = sum(tensors.values()) + sum(moment.nbytes for moment in adam) + tuning.model.states.nbytes
        found["trained"] = sum(parameter.numel() for parameter in parameters.values())
        for name in ("plain", "checkpointed"):
            if name == "checkpointed":
                unet.enable_gradient_checkpointing()
            tuning.tuner.optimizer.zero_grad(set_to_none=True)
            moments: list[float] = []
            live = count_live_bytes(partial(some_steps, tuning, steps, moments))
            found[name] = dict(peak=found["held"] + live.peak, seconds=moments[-1] - moments[-2])
        tuning.run.lock.release()
    return found


def report(results: dict) -> str:
    """The record in Markdown."""
    rows = []
    for row, found in results["rows"].items():
        *_, label, paper = ROWS[row]
        cells = [f"{found[name]['peak'] / 1e9:.2f}" for name in ("plain", "checkpointed")]
        seconds = [f"{found[name]['seconds']:.1f}" for name in ("plain", "checkpointed")]
        rows.append([label, f"{found['trained']:,}", f"{found['held'] / 1e9:.2f}", *cells, paper or "", *seconds])
    header = [
        "system",
        "trained",
        "held, GB",
        "step, GB",
        "with checkpointing, GB",
        "paper, GB",
        "step, s",
        "with checkpointing, s",
    ]
    device = results["environment"]["device"]
    head = (
        f"# Memory of weight tuning\n\nSD v1.5's shape, 512 pixels, batch 1, bf16 activations; {device}. Live bytes of tensors; "
    )
    head += "seconds on a machine that others used meanwhile.\n\n"
    return head + table(header, rows) + "\n"


def main(args: argparse.Namespace) -> None:
    if args.child is not None:
        print("RESULT " + json.dumps(measure(args.child, args.folder, args.photos, args.steps)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "sd15"
        if not folder.exists():
            build_folder(folder)
        results = dict(environment=environment(), steps=args.steps, torch_threads=torch.get_num_threads(), rows={})
        for row in args.rows:
            command = [sys.executable, __file__, "--child", row, "--folder", str(folder), "--photos", str(args.photos)]
            command += ["--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{row}: {done.stderr[-2000:]}", file=sys.stderr)
                continue
            results["rows"][row] = json.loads(done.stdout.split("RESULT ")[1])
            print(row, json.dumps(results["rows"][row]), flush=True)
            write_json(args.output / "weight_tuning.json", results, indent=1)
            write_atomically(args.output / "weight_tuning.md", report(results).encode())


if __name__ == "__main__":
    main(parse_args())
