#!/usr/bin/env python
"""Does a run leak? Memory, open files and time per step over a long run on the miniature, with slopes and their standard errors.

    python -m benchmarks.long_run                 # 30,000 steps, the paper's number
    python -m benchmarks.long_run --steps 1500    # a minute or two

Samples the process twice a second (not on Windows, which counts no open files) and writes benchmarks/long_run.json and .md. The
slopes are least-squares fits through the means of 40 equal parts of the run, without its first tenth, in which allocators and
caches fill up. Part means are fitted because the samples are so strongly correlated in time that their standard error would come
out far too small.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.report import FOLDER, write_report
from benchmarks.resident import resident_bytes
from zoodip.arguments import new_parser
from zoodip.errors import run_script
from zoodip.records import ROOT, table

PARTS = 40
QUANTITIES = {  # name: unit, decimals
    "resident": ("MB", 2), "anonymous": ("MB", 2), "open_files": ("", 3), "wall_ms_per_step": ("ms", 3),
    "cpu_ms_per_step": ("ms", 3),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30000, help="length of the run")
    parser.add_argument("--checkpointing_steps", type=int, default=500, help="as in train_zoodip.py")
    parser.add_argument("--checkpoints_total_limit", type=int, default=2, help="as in train_zoodip.py")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for long_run.json and .md")
    parser.add_argument("extra", nargs="*", help="after --: flags passed on to train_zoodip.py")
    return parser.parse_args(argv)


def sample(pid: int, folder: Path, bar: Path) -> dict | None:
    """One sample of the process; None once it is gone."""
    try:
        process = psutil.Process(pid)
        times, files = process.cpu_times(), process.num_fds()
    except psutil.Error:
        return None
    with open(bar, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 400))
        shown = re.findall(rb"(\d+)/\d+ \[", file.read())
    memory = resident_bytes(pid)
    return dict(
        seconds=time.monotonic(), step=int(shown[-1]) if shown else 0, open_files=files, resident=memory["resident"] / 1e6,
        anonymous=memory["anonymous"] / 1e6, cpu=times.user + times.system,
        checkpoints=len(list(folder.glob("checkpoint-*.safetensors"))),
        kilobytes=sum(path.stat().st_size for path in folder.glob("[!.]*")) / 1e3,
    )  # fmt: skip


def part_means(samples: list[dict], steps: int) -> list[dict]:
    """Means over equal parts of the run, without its first tenth."""
    edges = np.linspace(0.1 * steps, steps, PARTS + 1)
    parts = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        within = [one for one in samples if low <= one["step"] <= high]
        if len(within) < 2 or within[-1]["step"] == within[0]["step"]:
            continue
        first, last = within[0], within[-1]
        done = last["step"] - first["step"]
        means = {name: float(np.mean([one[name] for one in within])) for name in ("step", "resident", "anonymous", "open_files")}
        means["wall_ms_per_step"] = 1e3 * (last["seconds"] - first["seconds"]) / done
        means["cpu_ms_per_step"] = 1e3 * (last["cpu"] - first["cpu"]) / done
        parts.append(means)
    return parts


def line(steps: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error, per 10,000 steps."""
    x = (np.asarray(steps, float) - np.mean(steps)) / 1e4
    y = np.asarray(values, float) - np.mean(values)
    slope = (x @ y) / (x @ x)
    residual = y - slope * x
    return float(slope), float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x)))


def run(args: argparse.Namespace, folder: Path) -> tuple[list[dict], dict]:
    """Run the demo while sampling it -> (samples, its run.json)."""
    bar = folder / ".bar"
    command = ["sh", str(ROOT / "train_zoodip.sh"), "demo", "--max_train_steps", str(args.steps),
               "--checkpointing_steps", str(args.checkpointing_steps),
               "--checkpoints_total_limit", str(args.checkpoints_total_limit), *args.extra]  # fmt: skip
    samples = []
    with open(bar, "wb") as stderr:  # the shell script uses exec, so the pid is the run's own
        process = subprocess.Popen(command, stderr=stderr, env=dict(os.environ, OUTPUT_DIR=str(folder), PYTHON=sys.executable))
        while process.poll() is None:
            if one := sample(process.pid, folder, bar):
                samples.append(one)
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the run ended with code {process.returncode}:\n{bar.read_text()[-2000:]}")
    return samples, json.loads((folder / "run.json").read_text())


def fit(samples: list[dict], steps: int) -> dict:
    """The parts of the run, the line fitted to each quantity, and the peaks of checkpoints, open files and kilobytes."""
    # from the first step to the last evaluation: loading before it and drawing pictures after it are other work
    stepping = [one for one in samples if 0 < one["step"] < steps]
    parts = part_means(stepping, steps)
    if len(parts) < 10:
        raise SystemExit(f"only {len(parts)} of {PARTS} parts of the run have samples; raise --steps")
    lines = {name: line([part["step"] for part in parts], [part[name] for part in parts]) for name in QUANTITIES}
    fits = {name: dict(slope_per_10000_steps=slope, standard_error=error) for name, (slope, error) in lines.items()}
    most = dict(
        checkpoints=max(one["checkpoints"] for one in samples),
        open_files=max(one["open_files"] for one in stepping),
        kilobytes=round(max(one["kilobytes"] for one in samples)),
    )
    return dict(fits=fits, most=most, samples=len(samples), parts=parts)


def markdown_of(results: dict, steps: int) -> str:
    rows = []
    for name, (unit, digits) in QUANTITIES.items():
        values, fitted = [part[name] for part in results["parts"]], results["fits"][name]
        numbers = [f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values))]
        slope = f"{fitted['slope_per_10000_steps']:+.{digits}f} +- {fitted['standard_error']:.{digits}f}"
        rows.append([name.replace("_", " "), f"{numbers[0]} {unit}", *numbers[1:], slope])
    most, run = results["most"], results["run"]
    return table(["", "mean", "least part", "largest part", "slope per 10,000 steps +- standard error"], rows) + (
        f"\n\n{steps} steps in {run['seconds_this_time'] / 60:.1f} min, {results['samples']} samples. At most "
        f"{most['checkpoints']} checkpoints at a time (one is written before one is removed), {len(results['checkpoints_left'])} "
        f"left; at most {most['open_files']} open files; the output folder took at most {most['kilobytes']} KB. "
        f"Steps skipped: {run['skipped_steps']}.\n"
    )


def main(args: argparse.Namespace) -> None:
    """Run, fit, report."""
    with tempfile.TemporaryDirectory() as folder:
        samples, record = run(args, Path(folder))
        left = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    results = dict(fit(samples, args.steps), checkpoints_left=left, run=record)
    text = markdown_of(results, args.steps)
    write_report("long_run", vars(args), results, text, folder=args.output)
    print(text)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
