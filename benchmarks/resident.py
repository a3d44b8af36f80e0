"""Resident memory of a process and its descendants, watched from outside."""

from __future__ import annotations

import subprocess
import sys
import threading

import psutil

from zoodip.records import ROOT


def resident_bytes(pid: int) -> dict[str, int]:
    """Resident bytes of a process and its descendants, in total and anonymous (no file behind them); zeros once they are gone."""
    total = dict(resident=0, anonymous=0)
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in family:
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            continue
        total["resident"] += memory.rss
        total["anonymous"] += memory.rss - getattr(memory, "shared", 0)  # only Linux reports shared pages
    return total


def run_watched(
    command: list[str], environment: dict[str, str] | None = None, interval: float = 0.02
) -> tuple[int, str, dict[str, int]]:
    """Run a command from the repository root to its end -> (exit code, its output, peaks of `resident_bytes`).

    Samples every `interval` seconds. The peaks need not coincide in time.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    assert process.stdout is not None
    peaks = dict(resident=0, anonymous=0)
    ended, chunks = threading.Event(), []

    def sample() -> None:
        while not ended.wait(interval):
            for name, value in resident_bytes(process.pid).items():
                peaks[name] = max(peaks[name], value)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    while chunk := process.stdout.read(4096):
        chunks.append(chunk.decode(errors="replace"))
        sys.stderr.write(chunks[-1])
    code = process.wait()
    ended.set()
    sampler.join()
    return code, "".join(chunks), peaks
