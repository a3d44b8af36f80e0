#!/usr/bin/env python
"""How idle threads should wait: steps per second of the demo's training, alone and beside a busy program.

    python -m benchmarks.threads
    python -m benchmarks.threads --cpus 0 1 --rounds 5

OpenMP's threads wait for each other many times per step: asleep, spinning, or spinning for a while (GOMP_SPINCOUNT, in loop
iterations). libgomp reads the setting at startup, so each setting gets its own process, pinned to the same processors; in each,
the same steps are timed first alone and then beside a program that keeps the last processor busy. The settings take turns, so
that any disturbance of the machine affects all of them. Writes benchmarks/threads.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import FOLDER, write_report
from train_zoodip import ZOAdam, candidate_losses
from zoodip.arguments import new_parser
from zoodip.diffusion import draw_batch, load_model, read_inputs, uniform_timesteps
from zoodip.errors import InputError, run_script
from zoodip.records import ROOT, table

SETTINGS: dict[str, dict[str, str]] = {
    "asleep (OMP_WAIT_POLICY=PASSIVE)": dict(OMP_WAIT_POLICY="PASSIVE"),
    "GOMP_SPINCOUNT=1000": dict(GOMP_SPINCOUNT="1000"),
    "GOMP_SPINCOUNT=20000": dict(GOMP_SPINCOUNT="20000"),
    "GOMP_SPINCOUNT=100000": dict(GOMP_SPINCOUNT="100000"),
    "libgomp's own (300000)": {},
    "spinning (OMP_WAIT_POLICY=ACTIVE)": dict(OMP_WAIT_POLICY="ACTIVE"),
    "one thread": dict(OMP_NUM_THREADS="1"),
}
CASES = ("alone", "beside")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cpus", type=int, nargs="+", default=[0, 1], help="processors to run on")
    add("--rounds", type=int, default=3, help="processes per setting")
    add("--seconds", type=float, default=4.0, help="seconds of steps in each, alone and beside another program")
    add("--output", type=Path, default=FOLDER, help="folder for threads.json and .md")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def stepper():
    """A function that makes one step of the demo's training."""
    inputs = read_inputs(
        train_data_dir=ROOT / "dataset" / "furmix",
        cc_file=ROOT / "cc.json",
        use_cc=True,
        pretrained_model_name_or_path=str(ROOT / "miniature" / "model"),
        placeholder_token="<sks>",
        initializer_token="critter",
    )
    model, data = load_model(inputs, quantization="nf4", mixed_precision="fp32", device=torch.device("cpu"), resolution=64)
    zo, generator = ZOAdam(inputs.initial_token, tau=43, learning_rate=1e-2), torch.Generator().manual_seed(0)
    sample = partial(uniform_timesteps, low=500, high=900)

    def step() -> None:
        batch = draw_batch(data, 1, sample, generator)
        directions, candidates = zo.candidates(generator)
        zo.step(directions, candidate_losses(model, batch, candidates))

    return step


def rate(step, seconds: float) -> float:
    """Steps per second."""
    for _ in range(3):
        step()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        step()
        count += 1
    return count / (time.perf_counter() - started)


def measure(args: argparse.Namespace) -> None:
    """In a child process: print the rates alone and beside a busy program."""
    step = stepper()
    rates = [rate(step, args.seconds)]
    last = {args.cpus[-1]}
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=lambda: os.sched_setaffinity(0, last))
    try:
        rates.append(rate(step, args.seconds))
    finally:
        busy.kill()
        busy.wait()
    print(json.dumps(rates))


def run_child(setting: dict[str, str], args: argparse.Namespace) -> list[float]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [
        sys.executable,
        "-m",
        "benchmarks.threads",
        "--child",
        "--seconds",
        str(args.seconds),
        "--cpus",
        *map(str, args.cpus),
    ]
    kept |= dict(THP_MEM_ALLOC_ENABLE="1", OMP_NUM_THREADS=str(len(args.cpus)))
    done = subprocess.run(command, cwd=ROOT, env={**kept, **setting}, capture_output=True, text=True,
                          preexec_fn=lambda: os.sched_setaffinity(0, set(args.cpus)))  # fmt: skip
    if done.returncode:
        raise InputError(f"a process ended with {done.returncode}: {(done.stderr.strip() or '-').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: argparse.Namespace) -> None:
    """Raises InputError if the system cannot pin processes."""
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system pins no process to a processor; run it on Linux")
    if args.child:
        return measure(args)
    rates: dict[str, list[list[float]]] = {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        for name, setting in SETTINGS.items():
            rates[name].append(run_child(setting, args))
            print(f"{name}: {rates[name][-1]}", file=sys.stderr)
    rows = []
    for name, pairs in rates.items():
        columns = zip(*pairs, strict=True)
        rows.append([name, *(f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in columns)])
    text = table(["idle threads", *(f"{case}, steps/s" for case in CASES)], rows)
    notes = f"Median of {args.rounds} processes, lowest and highest; {len(args.cpus)} processors.\n\n"
    write_report("threads", vars(args), dict(rates=rates), notes + text, folder=args.output)
    print(text)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
