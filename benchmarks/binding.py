#!/usr/bin/env python
"""Memory and time of one picture with each binding method, at Stable Diffusion v1.5's shape with random weights.

    python -m benchmarks.binding                               # 512 pixels; writes the model to a temporary folder
    python -m benchmarks.binding --folder sd15 --size 256 --output results

Draws a prompt of two groups in a few denoising steps, of which only the first makes the method's updates: the peak is that of a
full-length picture, whose cost is reported in passes. Memory counts simultaneously live tensors, exact and the same in every run
(benchmarks/memory.py); seconds include the profiler that counts them, so ratios say more. Writes binding.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.memory import bytes_of, count_live_bytes, tensors_of
from benchmarks.sd15_shape import shape_folder
from zoodip.arguments import new_parser
from zoodip.binding_drawing import draw_bound
from zoodip.binding_settings import METHODS
from zoodip.errors import run_script
from zoodip.files import write_atomically, write_json
from zoodip.model import load_pipeline
from zoodip.quantize import DTYPES
from zoodip.records import ROOT, environment, table

PROMPT = "a [red dog*] and a [blue cat*]"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="methods to measure")
    add("--folder", type=Path, default=None, help="the SD v1.5-shaped model, or any other; default: a temporary one")
    add("--size", type=int, default=512, help="width and height of the picture in pixels")
    add("--steps", type=int, default=2, help="denoising steps, of which the first has updates")
    add("--quantization", default="nf4", choices=["nf4", "int8", "none"], help="quantisation of the weights")
    add("--dtype", default="fp32", choices=["fp32", "bf16"], help="precision of the activations")
    add("--output", type=Path, default=ROOT / "benchmarks", help="folder for binding.json and .md")
    return parser.parse_args(argv)


def measure(pipeline, method: str, size: int, steps: int) -> dict:
    """Peak live bytes, seconds and passes of one picture."""
    whole = METHODS[method]
    settings = replace(whole, steps=steps, sem_steps=min(1, whole.sem_steps), map_steps=min(1, whole.map_steps))
    pictures = []

    def draw() -> None:
        pictures.extend(draw_bound(pipeline, [PROMPT], settings=settings, height=size, width=size))

    started = time.perf_counter()
    live = count_live_bytes(draw)
    seconds = time.perf_counter() - started
    (picture,) = pictures
    return dict(live=live.peak, seconds=round(seconds, 2), forwards=picture.forwards, backwards=picture.backwards,
                settings=asdict(settings))  # fmt: skip


def report(results: dict) -> str:
    """The record in Markdown."""
    arguments, rows = results["arguments"], []
    for method, found in results["methods"].items():
        total = (results["held"] + found["live"]) / 1e9
        rows.append(
            [method, f"{found['live'] / 1e9:.2f}", f"{total:.2f}", found["forwards"], found["backwards"], found["seconds"]]
        )
    header = ["method", "beside the weights, GB", "in all, GB", "samples forward", "backward passes", "seconds"]
    return f"""# A picture by each binding method at the shape of SD v1.5

{arguments["size"]} pixels, {arguments["steps"]} denoising steps of which the first has a method's updates, two groups.
Weights {arguments["quantization"]}, {results["held"] / 1e9:.2f} GB of the whole pipeline; activations {arguments["dtype"]}.
GB of tensors that live at once; seconds under the profiler. {results["device"]}, commit {results["commit"]}.

{table(header, rows)}
"""


def main(args: argparse.Namespace) -> None:
    with shape_folder(args.folder) as folder:
        pipeline = load_pipeline(str(folder), args.quantization, DTYPES[args.dtype])
        modules = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
        held = bytes_of(tensors_of(*modules))
        arguments = {name: value for name, value in vars(args).items() if name not in ("folder", "output")}
        results = dict(arguments=arguments, **environment(), held=held, methods={})
        for method in args.methods:
            results["methods"][method] = measure(pipeline, method, args.size, args.steps)
            print(method, json.dumps({name: value for name, value in results["methods"][method].items() if name != "settings"}))
            write_json(args.output / "binding.json", results, indent=1)
            write_atomically(args.output / "binding.md", report(results).encode())


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
