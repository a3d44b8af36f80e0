"""The process that trains: its devices and trackers, and the signals that stop it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from datetime import timedelta

from zoodip.errors import InputError


def make_accelerator(most_processes: int, *, cpu: bool, report_to: str, output_dir: str, compile: bool = False):
    """Devices, processes and trackers. Raises InputError if a tracker is not installed or there are too many processes."""
    from importlib.util import find_spec

    from accelerate import Accelerator, InitProcessGroupKwargs

    if report_to != "none" and find_spec(report_to) is None:
        raise InputError(f"--report_to {report_to}: the package is not installed; run pip install {report_to}")
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))  # while one process draws, the others wait
    log_with = None if report_to == "none" else report_to
    accelerator = Accelerator(cpu=cpu, log_with=log_with, project_dir=output_dir, kwargs_handlers=[patience])
    if compile and accelerator.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise InputError("--compile needs a C++ compiler (g++ or clang++); install one, or leave the flag out")
    asked = launched_for()
    if asked > accelerator.num_processes and accelerator.is_main_process:
        print(
            f"accelerate launch was asked for {asked} processes but started {accelerator.num_processes}: on CPUs, start them "
            f"with torchrun --nproc_per_node {asked} -- {sys.argv[0]} --cpu ...",
            file=sys.stderr,
        )
    if accelerator.num_processes > most_processes:
        if most_processes == 1:
            raise InputError(f"this method runs as one process, not {accelerator.num_processes}; start it with python")
        raise InputError(
            f"{accelerator.num_processes} processes share only {most_processes} candidates a step; start at "
            f"most {most_processes} processes"
        )
    return accelerator


def launched_for() -> int:
    """The number of processes that `accelerate launch` was asked for; 1 if this process is not its child."""
    import psutil

    try:
        parent = psutil.Process().parent()
        command = " ".join(parent.cmdline()) if parent else ""
    except psutil.Error:  # it is gone, or access is denied
        return 1
    asked = re.search(r"accelerate\S* (?:launch )?.*--num[_-]processes[= ](\d+)", command)
    return int(asked[1]) if asked else 1


ECHO = 2.0  # seconds within which a second signal may be the launcher's copy of the first


class StopSignal:
    """Remembers SIGINT and SIGTERM, so that the current step is finished and saved; a second signal ends the process at once.

    If torchrun and its workers are all sent one signal, each worker gets it twice, as torchrun passes it on.
    """

    number, since = 0, 0.0

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        first, launched = self.number == 0, "TORCHELASTIC_RUN_ID" in os.environ
        if first:
            self.number, self.since = number, time.monotonic()
        if launched and time.monotonic() - self.since < ECHO:
            return
        for name in self.previous:
            signal.signal(name, signal.SIG_DFL)
        if not first:
            signal.raise_signal(number)
