#!/usr/bin/env python
"""Measure a training script from outside: its peak live bytes, or the seconds of each of its steps.

    python -m benchmarks.watch_script bytes found.json train_zoodip.py --cpu --max_train_steps 2 ...
    python -m benchmarks.watch_script steps found.json train_zoodip.py --cpu --max_train_steps 100 --eval_steps 0 ...

The script runs unmodified in this process. A step is the time from one UNet forward to the next, so under `steps` it has to
make one forward per step: no evaluation, no pictures, all candidates at once. Nothing but the byte counter is imported from the
repository, and that imports nothing of `zoodip`, so that the script can be another version's with its own package.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from pathlib import Path

from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks.memory import peak_live_bytes


def run_as_main(script: Path, argv: list[str]) -> None:
    """Run a script in this process as `python script argv`. Raises SystemExit if it ends with a nonzero code."""
    sys.argv = [str(script), *argv]
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise


def live_bytes(script: Path, argv: list[str]) -> dict:
    """Peak live bytes of a run, from its first line to its last."""
    models = [Path(value) for value in argv if (Path(value) / "model_index.json").exists()]
    files = [path for folder in models for path in folder.glob("*/*.safetensors")]
    return dict(peak=peak_live_bytes(lambda: run_as_main(script, argv), files))


def step_seconds(script: Path, argv: list[str]) -> dict:
    """Wall-clock seconds, and processor seconds over all threads, of every step but the last."""
    moments: list[tuple[float, float]] = []

    def note(module, inputs) -> None:
        moments.append((time.perf_counter(), time.process_time()))

    def find(module, inputs) -> None:
        if type(module).__name__ == "UNet2DConditionModel":
            finder.remove()  # a hook on every module would slow the script down
            module.register_forward_pre_hook(note)
            note(module, inputs)

    finder = register_module_forward_pre_hook(find)
    run_as_main(script, argv)
    moments = moments[1:]  # the first forward is the check of the loaded model
    pairs = list(zip(moments[:-1], moments[1:], strict=True))
    return dict(wall=[after[0] - before[0] for before, after in pairs], cpu=[after[1] - before[1] for before, after in pairs])


MODES = {"bytes": live_bytes, "steps": step_seconds}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=list(MODES), help="what to measure")
    parser.add_argument("output", type=Path, help="JSON file for the result")
    parser.add_argument("script", type=Path, help="training script to watch")
    parser.add_argument("argv", nargs=argparse.REMAINDER, help="its arguments")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.output.write_text(json.dumps(MODES[args.mode](args.script, args.argv)) + "\n")


if __name__ == "__main__":
    main(parse_args())
