#!/usr/bin/env python
"""Memory and time of a picture at the end of a run, with its VAE's decoder in strips and as the library runs it.

    python -m benchmarks.pictures
    python -m benchmarks.pictures --folder sd15-shape --precisions bf16 --rounds 0

On a model of Stable Diffusion v1.5's shape with random weights in NF4, held as in training: loading, one training step, and one
picture of one denoising step, drawn each way. Memory counts simultaneously live tensors, exact and the same in every run; more
denoising steps add none. Time is that of the decoder alone, the two ways in turn. Writes benchmarks/pictures.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.memory import count_live_bytes, stage
from benchmarks.methods import Task, ThisProject
from benchmarks.report import FOLDER, write_report
from benchmarks.sd15_shape import shape_folder
from zoodip import strips
from zoodip.arguments import new_parser
from zoodip.errors import run_script
from zoodip.pictures import Drawer
from zoodip.quantize import DTYPES
from zoodip.records import ROOT, table

SIZE = 512  # pixels
WAYS = {"as the library decodes": SIZE * SIZE, "in strips": 0}  # the number of pixels up to which the library decodes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, default=None, help="the SD v1.5-shaped model; default: a temporary one")
    add("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"], help="of the activations")
    add("--rounds", type=int, default=3, help="timed decodings each way, in turn")
    add("--output", type=Path, default=FOLDER, help="folder for pictures.json and .md")
    return parser.parse_args(argv)


@contextmanager
def decoding(way: str):
    """Decode this way."""
    usual, strips.WHOLE = strips.WHOLE, WAYS[way]
    try:
        yield
    finally:
        strips.WHOLE = usual


def measure(task: Task, size: int, rounds: int) -> dict:
    """Peak live bytes of every stage with pictures of `size` pixels, the decoder's seconds, and how the pictures differ."""
    method, drawers, dtype = ThisProject(task), [], DTYPES[task.mixed_precision]

    def run() -> None:
        with stage("load"):
            method.load()
        with stage("train"):
            method.step()
        for way in WAYS:
            with stage(way), decoding(way):
                drawers[:] = [Drawer(method.model, task.model, task.variant, "nf4", size, steps=1)]
                states = torch.randn(2, 77, method.model.unet.config.cross_attention_dim, dtype=dtype)
                list(drawers[0].draw_states(states, [(0, 0)]))

    bytes_of = count_live_bytes(run, task.model.glob("*/*.safetensors")).stages
    vae, side = drawers[0].pipeline.vae, size // drawers[0].pipeline.vae_scale_factor
    shape = (1, vae.config.latent_channels, side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    seconds, pictures = {way: [] for way in WAYS}, {}
    for _ in range(rounds):
        for way in WAYS:
            with decoding(way), torch.no_grad():
                started = time.perf_counter()
                pictures[way] = vae.decode(latents).sample
                seconds[way].append(round(time.perf_counter() - started, 2))
    found = dict(bytes=bytes_of, seconds=seconds)
    if pictures:
        whole, in_strips = (pictures[way].float() for way in WAYS)
        found["difference"] = dict(largest=(in_strips - whole).abs().max().item(), deviation=whole.std().item())
    return found


def page(results: dict) -> str:
    """The tables."""
    rows = []
    for precision, found in results.items():
        size, seconds = found["bytes"], found["seconds"]
        held = [f"{size[name] / 1e9:.2f}" for name in ("load", "train", *WAYS)]
        first, second = (statistics.median(times) if times else 0 for times in seconds.values())
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        told = [f"{first:.1f}", f"{second:.1f}", f"{statistics.median(ratios):.2f}"] if ratios else ["", "", ""]
        rows.append([precision, *held, *told])
    header = ["activations", "loading, GB", "training, GB", *(f"a picture {way}, GB" for way in WAYS)]
    header += ["seconds to decode", "in strips", "ratio"]
    differences = "; ".join(
        f"in {precision} at most {found['difference']['largest']:.1e}, where pixels have a standard deviation of "
        f"{found['difference']['deviation']:.2f}"
        for precision, found in results.items()
        if "difference" in found
    )
    text = f"# A picture at the end of a run\n\nStable Diffusion v1.5's shape, {SIZE} pixels, NF4. Bytes of tensors that live at "
    text += "once, the frozen model's included.\n\n" + table(header, rows) + "\n"
    return text + (f"\nThe pictures differ by rounding: {differences}.\n" if differences else "")


def main(args: argparse.Namespace) -> None:
    with shape_folder(args.folder) as folder:
        results = {}
        for precision in args.precisions:
            task = Task(folder, "fp16", ROOT / "dataset" / "furmix", "dog", precision, torch.device("cpu"))
            results[precision] = measure(task, SIZE, args.rounds)
        write_report("pictures", vars(args) | dict(folder=None), results, page(results), folder=args.output)
    print((args.output / "pictures.md").read_text())


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
