#!/usr/bin/env python
"""Memory and time of a training step, against the authors' loop, gradient textual inversion, and the bare forward.

    python -m benchmarks.speed_memory                    # the miniature and a model of Stable Diffusion v1.5's shape
    python -m benchmarks.speed_memory --worlds miniature
    python -m benchmarks.speed_memory --device cuda

Memory: each method loads and makes a few steps in its own process. On a CPU this is done twice: once for resident memory, once
counting the bytes of simultaneously live tensors, which are exact and the same in every run. On CUDA: the allocator's counters
and nvidia-smi. Time: all methods in one process, a few steps of each in turn, medians and ratios over the rounds.
Writes benchmarks/speed_memory.json and .md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.memory import Stages, bytes_of, count_live_bytes, largest, name_layers, tensor_names, tensors_of
from benchmarks.methods import METHODS, Task, ThisProject
from benchmarks.report import FOLDER, write_report
from benchmarks.sd15_shape import complete_folder
from benchmarks.speed_memory_tables import page
from zoodip.arguments import new_parser
from zoodip.errors import prepare_environment, run_script
from zoodip.quantize import DTYPES
from zoodip.records import ROOT
from zoodip.thrift import STEPPING, tune_malloc

GPU_JOBS = 4  # processes measured at a time on a GPU, where each has its own memory counters


@dataclass(frozen=True)
class World:
    """A model to measure on."""

    folder: Path | None  # None: of SD v1.5's shape, with random weights
    variant: str | None
    initializer_token: str
    tau: int
    precisions: tuple[str, ...]  # measured unless --precisions is given
    steps: int  # of each method per timed turn


WORLDS = {
    "miniature": World(ROOT / "miniature" / "model", None, "critter", 43, ("fp32", "bf16"), 10),
    "sd15": World(None, "fp16", "dog", 128, ("bf16",), 1),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add(
        "--precisions",
        nargs="+",
        default=None,
        choices=sorted(DTYPES),
        help="precisions of activations; default: bf16, and fp32 too for the miniature; fp16 on CUDA",
    )
    add("--methods", nargs="+", default=[name for name in METHODS if name != "zoodip_compiled"], choices=list(METHODS))
    add(
        "--folder",
        type=Path,
        default=None,
        help="the SD v1.5-shaped model: written here, or used if it exists; default: a temporary one",
    )
    add("--photos", type=Path, default=ROOT / "dataset" / "furmix", help="folder of photographs")
    add("--rounds", type=int, default=5, help="timed turns of every method, after an untimed one")
    add("--memory_steps", type=int, default=2, help="steps in the runs that measure memory")
    add("--skip_memory", action="store_true", help="measure time only")
    add("--skip_time", action="store_true", help="measure memory only")
    add("--output", type=Path, default=FOLDER, help="folder for speed_memory.json and .md")
    add("--child", choices=list(CHILDREN), default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def task_of(args: argparse.Namespace) -> Task:
    """What a child process measures: the first world in the first precision."""
    world = WORLDS[args.worlds[0]]
    folder = world.folder or args.folder
    precision, device = args.precisions[0], torch.device(args.device)
    return Task(folder, world.variant, args.photos, world.initializer_token, precision, device, world.tau)


# ----------------------------------------------------------------------------------------------------- in a child


def live_method(args: argparse.Namespace):
    """Load a method and run its steps -> (the method, its stages)."""
    stages, method = Stages(args.device), METHODS[args.methods[0]](task_of(args))
    with stages("load"):
        method.load()
    if isinstance(method, ThisProject):
        name_layers(method.model.unet, "UNet")
        name_layers(method.model.text_encoder, "text encoder")
    with stages("train"):
        for _ in range(args.memory_steps):
            method.step()
    return method, stages


def resident(args: argparse.Namespace) -> dict:
    """Seconds and resident memory, or the GPU's counters, of each stage."""
    import bitsandbytes  # noqa: F401  any method's imports count as the interpreter's
    import diffusers  # noqa: F401
    from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    torch.randn(8, 8, device=args.device) @ torch.randn(8, 8, device=args.device)
    stages = live_method(args)[1]
    return dict(baseline=stages.baseline, stages=stages.found)


def live_bytes(args: argparse.Namespace) -> dict:
    """Peak bytes of each stage and, for this project's methods, what the peak consists of."""
    kept = []
    weight_files = task_of(args).model.glob("*/*.safetensors")
    found = count_live_bytes(lambda: kept.append(live_method(args)[0]), weight_files)
    items = largest(found, tensor_names(lasting_tensors(kept[0]))) if isinstance(kept[0], ThisProject) else {}
    return dict(peaks=found.stages, items=items)


def lasting_tensors(method: ThisProject):
    """(what it is, tensor) of everything that lives throughout the run."""
    kinds = dict.fromkeys(("nf4", "int8"), "packed weights") | dict.fromkeys(("scale", "absmax"), "scales")
    for component, module in (("UNet", method.model.unet), ("text encoder", method.model.text_encoder)):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            kind = kinds.get(name.rpartition(".")[2].partition("_")[0], "biases, norms, what else is not packed")
            yield f"{component}: {kind}", tensor
    for tensor in (method.model.rows, method.data.latents, method.data.prompt_ids):
        yield "token rows of the prompts, latents", tensor


@torch.no_grad()
def byte_floor(args: argparse.Namespace) -> dict:
    """Packed weights, and the largest input plus output of any one layer at n + 1 samples: the minimum for any loop."""
    method = ThisProject(task_of(args))
    method.load()
    modules = (method.model.unet, method.model.text_encoder)
    packed = bytes_of(tensors_of(*modules))
    activations = {}

    def look(name: str, inputs: tuple, output) -> None:
        size = sum(value.nbytes for value in [*inputs, output] if isinstance(value, torch.Tensor))
        activations[name] = max(size, activations.get(name, 0))

    for name, module in method.model.unet.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output, name=name: look(name, inputs, output))
    method.step()
    layer = max(activations, key=lambda name: activations[name])
    return dict(packed=packed, activations=activations[layer], layer=layer)


def step_times(args: argparse.Namespace) -> dict:
    """{method: seconds per step, one per round}. Methods take turns, so that any disturbance of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in args.methods}
    methods = {name: METHODS[name](task_of(args)) for name in args.methods}
    for method in methods.values():
        method.load()
    tune_malloc(*STEPPING)  # as in this project's trainer: for all methods alike, whatever their loading order
    steps = WORLDS[args.worlds[0]].steps
    for turn in range(-1, args.rounds):
        for name, method in methods.items():
            synchronize(args.device)
            count = steps if method.forwards else 1  # a basis takes as long as many steps
            started = time.perf_counter()
            for _ in range(count):
                method.step()
            synchronize(args.device)
            if turn >= 0:
                seconds[name].append((time.perf_counter() - started) / count)
    return seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


CHILDREN = {"time": step_times, "resident": resident, "bytes": live_bytes, "floor": byte_floor}


# ----------------------------------------------------------------------------------------------------- all of it


def in_child(what: str, world: str, precision: str, methods: list[str], args: argparse.Namespace) -> dict:
    """What an entry of CHILDREN finds, in its own process; {"error": its last line} if it fails."""
    command = [sys.executable, "-m", "benchmarks.speed_memory", "--child", what, "--worlds", world, "--precisions", precision]
    command += ["--methods", *methods, "--device", args.device, "--photos", str(args.photos.resolve())]
    command += ["--rounds", str(args.rounds), "--memory_steps", str(args.memory_steps), "--folder", str(args.folder)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = (ended.stderr if ended.returncode else ended.stdout).strip().splitlines() or [f"code {ended.returncode}"]
    found = dict(error=lines[-1]) if ended.returncode else json.loads(lines[-1])
    print(f"{world} {precision} {what} {' '.join(methods)}: {json.dumps(found)[:300]}", file=sys.stderr, flush=True)
    return found


def measure(world: str, precision: str, args: argparse.Namespace) -> Iterator[dict]:
    """Time and memory of all methods in one world and precision: what is known so far, method by method."""
    found = {}
    if not args.skip_time:
        found["time"] = in_child("time", world, precision, args.methods, args)
        yield found
    if not args.skip_memory:
        counts = ["resident"] if args.device == "cuda" else ["resident", "bytes"]
        with ThreadPoolExecutor(GPU_JOBS if args.device == "cuda" else 1) as pool:
            runs = {(name, what): pool.submit(in_child, what, world, precision, [name], args)
                    for name in args.methods for what in counts}  # fmt: skip
            found["memory"] = {}
            for name in args.methods:
                found["memory"][name] = {what: runs[name, what].result() for what in counts}
                yield found
        if args.device == "cpu":
            found["byte_floor"] = in_child("floor", world, precision, ["zoodip"], args)
            yield found


def main(args: argparse.Namespace) -> None:
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    prepare_environment()  # inherited by the children: for all methods alike
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = (args.folder or Path(temporary) / "sd15-shape").resolve()
        if "sd15" in args.worlds:
            complete_folder(args.folder)
        results, name = {}, "speed_memory" if args.device == "cpu" else "speed_memory_cuda"
        for world in args.worlds:
            for precision in args.precisions or (["fp16"] if args.device == "cuda" else WORLDS[world].precisions):
                for found in measure(world, precision, args):
                    results[f"{world} {precision}"] = found
                    write_report(name, vars(args), results, page(results, args.device), args.device, args.output)
    print(page(results, args.device))


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
