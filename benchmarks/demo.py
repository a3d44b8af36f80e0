#!/usr/bin/env python
"""What the demo costs: wall time, memory and speed of `sh train_zoodip.sh demo`.

    python -m benchmarks.demo

Writes benchmarks/demo.json and .md. Memory is sampled from outside, fifty times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import FOLDER, write_report
from benchmarks.resident import run_watched
from zoodip.arguments import new_parser
from zoodip.errors import run_script
from zoodip.records import ROOT, table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for demo.json and .md")
    parser.add_argument("extra", nargs="*", help="after --: flags passed on to train_zoodip.py")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Run the demo with a temporary output folder and report the figures from its run.json and the memory sampler."""
    with tempfile.TemporaryDirectory() as output:
        environment = dict(os.environ, OUTPUT_DIR=output, PYTHON=sys.executable)
        started = time.monotonic()
        code, text, memory = run_watched(["sh", str(ROOT / "train_zoodip.sh"), "demo", *args.extra], environment)
        seconds = time.monotonic() - started
        if code:
            raise SystemExit(f"the demo ended with code {code}:\n{text[-2000:]}")
        run = json.loads((Path(output) / "run.json").read_text())
        curve = (Path(output) / "training_log.csv").read_text().splitlines()
    rows = [
        ["wall time, from the command to the prompt", f"{seconds / 60:.2f} min"],
        ["stepping alone (evaluations and pictures apart)", f"{run['seconds_this_time'] / 60:.2f} min"],
        ["steps", run["steps_this_time"]],
        ["steps/s", f"{run['steps_per_second']:.1f}"],
        ["peak RSS (anonymous pages)", f"{memory['resident'] / 1e9:.2f} GB ({memory['anonymous'] / 1e9:.2f} GB)"],
    ]
    results = dict(wall_seconds=round(seconds, 1), memory=memory, run=run, curve=curve)
    text = table(["`sh train_zoodip.sh demo`", ""], rows)
    write_report("demo", vars(args), results, text, folder=args.output)
    print(text)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
