#!/usr/bin/env python
"""Is this version slower or larger than another? Step time and peak live bytes of both versions, measured in alternation.

    git worktree add ../before COMMIT
    python -m benchmarks.house --before ../before

Each version's `train_zoodip.py` runs unmodified in its own process on the same models, photographs and flags, with one thread, on
one core where the system can pin processes. The two alternate, one suspended while the other runs, a second each. Steps are timed
in processor time, which neither suspension nor other programs add to. Writes benchmarks/house.json and .md. Linux, macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.report import FOLDER, write_report
from benchmarks.sd15_shape import complete_folder
from zoodip.arguments import new_parser
from zoodip.errors import InputError, prepare_environment, run_script
from zoodip.records import ROOT, git_commit, mean_interval, table

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RUN_FLAGS = ("--cpu", "--eval_steps", "0", "--checkpointing_steps", "0")
TURN = 1.0  # seconds


def without_pictures(tree: Path) -> list[str]:
    """The flag that keeps a version from drawing, where it has one: the forwards of pictures are no steps."""
    sources = [tree / "train_zoodip.py", *(tree / "zoodip").glob("*.py")]
    return ["--no-final_picture"] if any('"--final_picture"' in path.read_text() for path in sources) else []


@dataclass(frozen=True)
class Case:
    """A workload that both versions run."""

    title: str
    flags: tuple[str, ...]
    steps: int  # timed per round; one more is run


CASES = {
    "miniature": Case("The miniature, fp32", ("--initializer_token", "critter", "--tau", "43", "--mixed_precision", "fp32"), 300),
    "sd15": Case(
        "Stable Diffusion v1.5's shape, 512 x 512, bf16", ("--initializer_token", "dog", "--mixed_precision", "bf16"), 3
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="root of the other version's tree")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of both versions")
    parser.add_argument("--core", type=int, default=0, help="processor core that both versions are pinned to (Linux)")
    parser.add_argument("--folder", type=Path, default=None, help="folder for the SD v1.5-shaped models; default: temporary")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for house.json and .md")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Versions:
    """The two trees, and where they run."""

    trees: dict[str, Path]  # before, after
    folder: Path  # for models and results
    core: int

    def start(self, version: str, *arguments: str) -> subprocess.Popen:
        """Start `python arguments` in a version's tree, with its output in <version>.log."""
        command = [sys.executable, *arguments]
        pinned = ["taskset", "-c", str(self.core), *command] if shutil.which("taskset") else command
        with open(self.folder / f"{version}.log", "w") as log:
            environment = {**os.environ, **ENVIRONMENT}
            return subprocess.Popen(pinned, cwd=self.trees[version], env=environment, stdout=log, stderr=subprocess.STDOUT)

    def watch(self, mode: str, case: str, model: list[str], steps: int) -> dict[str, dict]:
        """{version: what `watch_script.py` measures over a run of `steps` steps}, with both versions alternating."""
        processes = {}
        for version, tree in self.trees.items():
            flags = [*model, *CASES[case].flags, *RUN_FLAGS, "--max_train_steps", str(steps), *without_pictures(tree)]
            flags += ["--train_data_dir", str(self.folder / "photographs"), "--output_dir", str(self.folder / version)]
            watcher, found = str(ROOT / "benchmarks" / "watch_script.py"), str(self.folder / f"{version}.json")
            processes[version] = self.start(version, watcher, mode, found, str(tree / "train_zoodip.py"), *flags)
        self.wait(processes)
        return {version: json.loads((self.folder / f"{version}.json").read_text()) for version in self.trees}

    def wait(self, processes: dict[str, subprocess.Popen]) -> None:
        """Run the processes in turn, a second each with the others suspended, until all have ended.

        Any disturbance of the machine thus affects all alike. Raises InputError if one fails.
        """
        try:
            for process in processes.values():
                process.send_signal(signal.SIGSTOP)
            while running := [process for process in processes.values() if process.poll() is None]:
                for process in running:
                    process.send_signal(signal.SIGCONT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(TURN)
                    process.send_signal(signal.SIGSTOP)  # no effect on a process that has ended
        finally:  # leave no process suspended
            for process in processes.values():
                process.kill()
        for version, process in processes.items():
            if process.returncode:
                log = (self.folder / f"{version}.log").read_text()
                raise InputError(
                    f"{version}: {' '.join(map(str, process.args))} ended with code {process.returncode}: {log[-1000:]}"
                )

    def models(self, case: str) -> dict[str, list[str]]:
        """{mode: flags for the model}. SD v1.5's shape is timed on a packed copy, which loads in seconds."""
        if case == "miniature":
            return dict.fromkeys(("bytes", "steps"), ["--pretrained_model_name_or_path", str(ROOT / "miniature" / "model")])
        whole, packed = self.folder / "sd15", self.folder / "sd15-packed"
        flags = ["--pretrained_model_name_or_path", str(whole), "--variant", "fp16"]
        complete_folder(whole)
        if not packed.exists():
            packing = self.start("before", str(self.trees["before"] / "train_zoodip.py"), *flags, "--save_quantized", str(packed))
            self.wait(dict(before=packing))
        return dict(bytes=flags, steps=["--pretrained_model_name_or_path", str(packed)])


def measure(versions: Versions, case: str, rounds: int) -> dict:
    """{bytes: {version: peak}, rounds: [{version: median seconds per step}]}"""
    models = versions.models(case)
    found = dict(
        bytes={name: each["peak"] for name, each in versions.watch("bytes", case, models["bytes"], 2).items()}, rounds=[]
    )
    print(f"{case}: live bytes {found['bytes']}", file=sys.stderr, flush=True)
    for _ in range(rounds):
        times = versions.watch("steps", case, models["steps"], CASES[case].steps + 1)
        found["rounds"].append({name: median(each["cpu"]) for name, each in times.items()})
        print(f"{case}: {found['rounds'][-1]}", file=sys.stderr, flush=True)
    return found


# ----------------------------------------------------------------------------------------------------- the report


def ratio_with_noise(found: dict) -> str:
    """Geometric mean of after / before over the rounds, with its 95 % confidence interval."""
    mean, half = mean_interval([math.log(seconds["after"] / seconds["before"]) for seconds in found["rounds"]])
    return f"{math.exp(mean):.3f} ({math.exp(mean - half):.3f} to {math.exp(mean + half):.3f})"


def case_table(case: str, found: dict) -> str:
    seconds = [" / ".join(f"{each[version]:.4g}" for each in found["rounds"]) for version in ("before", "after")]
    before, after = found["bytes"]["before"], found["bytes"]["after"]
    rows = [
        [f"processor seconds a step, median of {CASES[case].steps}", *seconds, ratio_with_noise(found)],
        ["peak of live bytes, loading and 2 steps", f"{before:,}", f"{after:,}", f"{after / before:.4f}"],
    ]
    commits = ", ".join(f"{name} {commit}" for name, commit in found["commits"].items())
    return f"## {CASES[case].title}\n\n{table(['', 'before', 'after', 'after / before'], rows)}\n\nCommits: {commits}.\n"


def markdown_of(results: dict, core: int) -> str:
    return "\n".join(case_table(case, found) for case, found in results.items()) + (
        "\nn = 2, three candidates in one forward. A figure for each round; of the ratios the geometric mean over the rounds "
        "with its 95 % interval (Student's t): that interval is the noise. Both versions ran at once, with one thread each, on "
        f"core {core}, one standing still while the other ran, a second each: other programs shared the machine, so only "
        "the ratio is meaningful, not the seconds.\n"
    )


def earlier_results(folder: Path) -> dict:
    """The cases already in house.json; those not measured now are kept."""
    path = folder / "house.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def main(args: argparse.Namespace) -> None:
    prepare_environment()  # for both versions' processes: the watcher imports torch before their scripts can set the environment
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        photographs = folder / "photographs"
        photographs.mkdir(parents=True, exist_ok=True)
        first = min((ROOT / "dataset" / "furmix").glob("*.jpg"))
        shutil.copy(first, photographs)  # one is enough: encoding is not timed
        versions = Versions(dict(before=args.before.resolve(), after=ROOT), folder, args.core)
        results = earlier_results(args.output)
        for case in args.cases:
            commits = {name: git_commit(tree) for name, tree in versions.trees.items()}
            results[case] = dict(commits=commits, **measure(versions, case, args.rounds))
            markdown = markdown_of(results, args.core)
            write_report(
                "house", vars(args), results, markdown, folder=args.output, command="python -m benchmarks.house --before TREE"
            )
    print(markdown)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
