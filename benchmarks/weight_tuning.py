#!/usr/bin/env python
"""Memory and time per step of each weight-tuning system at Stable Diffusion v1.5's shape, 512 pixels.

    python -m benchmarks.weight_tuning                      # all, with a model of that shape, which it writes first
    python -m benchmarks.weight_tuning --folder sd15-shape --rows qlora peqa4
    python -m benchmarks.weight_tuning --small --output x   # on the miniature: does it work?

For each system, in separate processes one after the other: a step of ZOODiP, of this project's version of the system, and of the
stock path of the libraries (`stock_tuning.py`), the last two without and with gradient checkpointing. Memory is that of
simultaneously live tensors over --steps steps, exact and the same in every run (benchmarks/memory.py). Time is processor time
over --steps further steps without the profiler, which other programs on the machine hardly affect; ratios are within a row, whose
processes run one after the other. Writes weight_tuning.json and .md after each process.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from benchmarks.memory import bytes_of, count_live_bytes, tensors_of
from benchmarks.methods import Task, ThisProject
from benchmarks.sd15_shape import shape_folder
from benchmarks.stock_tuning import Stock, StockDreamBooth, StockLoKr, StockPEQA, StockQLoRA, StockScales
from zoodip.arguments import flags_for, new_parser
from zoodip.errors import quiet_libraries
from zoodip.files import write_atomically, write_json
from zoodip.quantize import DTYPES
from zoodip.records import ROOT, environment, table
from zoodip.weight_tuning import prepare


@dataclass(frozen=True)
class Row:
    """A system: its script, class and flags, its stock path, and its GB in Table 1 of the ZOODiP paper, if in these bits."""

    label: str
    script: str
    system: str
    flags: dict
    stock: type[Stock]
    paper: float | None


ROWS = {
    "qlora": Row("QLoRA r = 2, NF4", "qlora", "QLoRA", {}, StockQLoRA, 7.56),
    "krona": Row("DiffuseKronA (4, 64), NF4", "diffusekrona", "DiffuseKronA", {}, StockLoKr, None),
    "peqa4": Row("PEQA int4", "tuneqdm", "TuneQDM", dict(experts=1, no_scale_in=True, bits=4), StockPEQA, None),
    "tuneqdm8": Row("TuneQDM int8, N = 4", "tuneqdm", "TuneQDM", dict(experts=4), StockScales, 8.96),
    "dreambooth": Row("DreamBooth", "dreambooth", "DreamBooth", {}, StockDreamBooth, 19.4),
}
PATHS = ("zoodip", "ours", "stock")
VARIANTS = ("plain", "checkpointed")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    add("--folder", type=Path, default=None, help="the SD v1.5-shaped model: written here, or used if it exists")
    add("--small", action="store_true", help="use the miniature instead, to check that it works")
    add("--photos", type=Path, default=ROOT / "dataset" / "furmix", help="folder of photographs")
    add("--steps", type=int, default=2, help="steps whose live bytes are counted, and as many that are timed")
    add("--mixed_precision", default="bf16", choices=list(DTYPES), help="precision of activations")
    add("--output", type=Path, default=ROOT / "benchmarks", help="folder for weight_tuning.json and .md")
    add("--child", nargs=2, default=None, metavar=("ROW", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    return args


# ----------------------------------------------------------------------------------------------------- one process


class Ours:
    """A system from trainers/, prepared and stepped as its script does."""

    def __init__(self, row: Row, folder: Path, variant: str | None, photos: Path, mixed_precision: str, output: str):
        module = importlib.import_module(f"trainers.{row.script}")
        argv = ["--pretrained_model_name_or_path", str(folder), *(["--variant", variant] if variant else [])]
        argv += ["--train_data_dir", str(photos), "--class_word", "dog", "--mixed_precision", mixed_precision, "--cpu"]
        argv += ["--eval_steps", "0", "--no-final_picture", "--output_dir", output]
        flags = {**vars(module.parse_args(argv)), **row.flags}
        system = getattr(module, row.system)
        self.tuning = prepare(system(**flags_for(system, flags)), flags, module.SETTINGS)
        self.unet, self.optimizer = self.tuning.model.unet, self.tuning.tuner.optimizer
        self.parameters = list(self.tuning.tuner.parameters.values())

    def held(self) -> list[torch.Tensor]:
        return [self.tuning.model.states]

    def step(self) -> None:
        self.tuning.step()


def processor_seconds(step: Callable[[], None], steps: int) -> list[float]:
    """Processor seconds of each step, in this process alone, over all its threads."""
    seconds = []
    for _ in range(steps):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    return seconds


def measure_zoodip(zoodip: ThisProject, steps: int) -> dict:
    """Live bytes and seconds of `steps` steps, and the bytes held between them."""
    zoodip.step()  # the first is slower and allocates Adam's moments
    model, moments = zoodip.model, zoodip.zo.state_dict().values()
    held = bytes_of((*tensors_of(model.unet, model.text_encoder), model.rows, *moments))
    live = count_live_bytes(lambda: [zoodip.step() for _ in range(steps)])
    return dict(held=held, peak=held + live.peak, seconds=processor_seconds(zoodip.step, steps))


def measure(tuner: Ours | Stock, steps: int) -> dict:
    """Live bytes and seconds of `steps` steps, without and with gradient checkpointing, and the bytes held between steps."""
    frozen = bytes_of((*tensors_of(tuner.unet), *tuner.held()))
    found: dict = dict(trained=sum(parameter.numel() for parameter in tuner.parameters))
    for name in VARIANTS:
        if name == "checkpointed":
            tuner.unet.enable_gradient_checkpointing()
        tuner.optimizer.zero_grad(set_to_none=True)
        moments = [tensor for state in tuner.optimizer.state.values() for tensor in state.values()]
        found["held"] = frozen + bytes_of(moments)
        live = count_live_bytes(lambda: [tuner.step() for _ in range(steps)])
        found[name] = dict(peak=found["held"] + live.peak, seconds=processor_seconds(tuner.step, steps))
    return found


def measure_child(args: argparse.Namespace) -> dict:
    """In a child process: measure one row on one path."""
    quiet_libraries()
    row, path, variant = ROWS[args.child[0]], args.child[1], None if args.small else "fp16"
    if path == "zoodip":
        zoodip = ThisProject(
            Task(args.folder, variant, args.photos, "critter" if args.small else "dog", args.mixed_precision, torch.device("cpu"))
        )
        zoodip.load()
        return measure_zoodip(zoodip, args.steps)
    if path == "stock":
        return measure(row.stock(args.folder, variant, DTYPES[args.mixed_precision]), args.steps)
    with tempfile.TemporaryDirectory() as output:
        ours = Ours(row, args.folder, variant, args.photos, args.mixed_precision, output)
        try:
            return measure(ours, args.steps)
        finally:
            ours.tuning.run.lock.release()


# ----------------------------------------------------------------------------------------------------- all of them


def zoodip_needs(rows: dict) -> str:
    """A clause on the memory of a ZOODiP step, which is the same in every row."""
    peaks = [found["zoodip"]["peak"] for found in rows.values() if "zoodip" in found]
    return f"; a step of ZOODiP (NF4, n = 2) takes {max(peaks) / 1e9:.2f} GB" if peaks else ""


def report(results: dict) -> str:
    """The record in Markdown."""
    header = ["system", "trained", "held, GB", "step, GB", "checkpointed, GB", "stock path, GB", "checkpointed, GB",
              "ZOODiP's share of the step's", "the paper's, GB"]  # fmt: skip
    memory, times, notes = [], [], []
    for name, found in results["rows"].items():
        row, ours, stock = ROWS[name], found["ours"], found.get("stock")
        gigabytes = [f"{ours[variant]['peak'] / 1e9:.2f}" for variant in VARIANTS]
        theirs = [f"{stock[variant]['peak'] / 1e9:.2f}" if stock else "-" for variant in VARIANTS]
        zoodip, line = found.get("zoodip"), [row.label]
        share = f"{zoodip['peak'] / ours['plain']['peak']:.2f}" if zoodip else "-"
        paper = row.paper or "-"
        memory.append([row.label, f"{ours['trained']:,}", f"{ours['held'] / 1e9:.2f}", *gigabytes, *theirs, share, paper])
        for variant in VARIANTS:
            seconds = mean(ours[variant]["seconds"])
            line += [f"{seconds:.3g}", f"{seconds / mean(zoodip['seconds']):.2f}" if zoodip else "-"]
            line += [f"{seconds / mean(stock[variant]['seconds']):.2f}" if stock else "-"]
        times.append(line)
        notes.append(f"- {row.label}: {row.stock.label}")
    columns = ["step, s", "/ ZOODiP's", "/ stock path"]
    shape = "The miniature's shape" if results["small"] else "SD v1.5's shape, 512 pixels"
    settings = f"batch 1, {results['mixed_precision']} activations, {results['steps']} steps each"
    return "\n\n".join([
        "# Memory and time of weight tuning",
        f"{shape}, {settings}; {results['environment']['device']}. Live bytes of tensors{zoodip_needs(results['rows'])}. The "
        "paper's are of whole processes on a GPU; its PEQA (6.31) and its ZOODiP (2.37) are INT8, unlike these.",
        table(header, memory),
        "Seconds of the processor of a step, and ratios to a step of ZOODiP (NF4, n = 2) and of the same method on the stock "
        "path, which ran right before and after it; the last three columns with gradient checkpointing.",
        table(["system", *columns, *columns], times),
        "The stock paths:\n\n" + "\n".join(notes),
    ]) + "\n"  # fmt: skip


def main(args: argparse.Namespace) -> None:
    if args.child is not None:
        print("RESULT " + json.dumps(measure_child(args)))
        return
    with nullcontext(ROOT / "miniature" / "model") if args.small else shape_folder(args.folder) as folder:
        results = dict(environment=environment(), steps=args.steps, torch_threads=torch.get_num_threads(), small=args.small,
                       mixed_precision=args.mixed_precision, rows={})  # fmt: skip
        args.output.mkdir(parents=True, exist_ok=True)
        for row, path in tqdm([(row, path) for row in args.rows for path in PATHS], unit="process"):
            command = [sys.executable, "-m", "benchmarks.weight_tuning", "--child", row, path, "--folder", str(folder)]
            command += ["--photos", str(args.photos.resolve()), "--steps", str(args.steps)]
            command += ["--mixed_precision", args.mixed_precision, *(["--small"] if args.small else [])]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                tqdm.write(f"{row}, {path}: {done.stderr[-2000:]}", file=sys.stderr)
                continue
            results["rows"].setdefault(row, {})[path] = json.loads(done.stdout.split("RESULT ")[1])
            write_json(args.output / "weight_tuning.json", results, indent=1)
            whole = results | dict(rows={name: found for name, found in results["rows"].items() if "ours" in found})
            write_atomically(args.output / "weight_tuning.md", report(whole).encode())


if __name__ == "__main__":
    main(parse_args())
