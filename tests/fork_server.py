"""Starts runs quickly: a process that has imported everything forks one run for each command line that it receives.

A run on the tiny model takes a third of a second, importing torch and diffusers several. The runs are ordinary processes: what
they leave when killed, and what a second run finds, is the same as with the script itself. (The server is separate from pytest's
process and computes nothing itself, because threads do not survive a fork.)

Each line of standard input is a request {"argv", "place", ...}; the folder `place` then receives the files pid, stdout, stderr
and, once the run has ended, status: its exit code, or minus the signal that ended it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import traceback
from pathlib import Path

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir"}  # audit events of changes to a folder, raised before the change


def drop_capabilities() -> None:
    """Make permission bits apply to root too, who is otherwise exempt."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)  # version 3, this process; no capability at all
    if ctypes.CDLL(None).capset(header, nothing):
        raise OSError("capset failed")


def die_at(change: int | None, folder: str) -> list[str]:
    """SIGKILL this process just before its `change`-th change (from 0) to `folder`; returns the list of changes."""
    changes = []

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not str(arguments[0]).startswith(folder):
            return
        if event == "open" and not any(letter in str(arguments[1]) for letter in "wax"):
            return
        if len(changes) == change:
            os.kill(os.getpid(), signal.SIGKILL)
        changes.append(f"{event} {Path(str(arguments[0])).name}")

    sys.addaudithook(hook)
    return changes


def run(request: dict) -> None:
    import train_zoodip
    from zoodip.errors import run_script, stop_at_once

    place = Path(request["place"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for number in (signal.SIGINT, signal.SIGTERM):  # as the script does at its start
        signal.signal(number, stop_at_once)
    if request.get("powerless"):
        drop_capabilities()
    if "memory" in request:  # bytes beyond what the imports have taken
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + request["memory"],) * 2)
    changes = die_at(request.get("die_at"), request["output"])
    try:
        code = run_script(train_zoodip.main, train_zoodip.parse_args(request["argv"]))
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
        code = 1
    (place / "changes").write_text("\n".join(changes))
    sys.stdout.flush()
    os._exit(code)


def supervise(request: dict) -> None:
    """Fork the run and report how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    place = Path(request["place"])
    pid = os.fork()
    if pid == 0:
        run(request)
    for name, value in (("pid", lambda: pid), ("status", lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))):
        text = str(value())
        (place / f".{name}").write_text(text)
        (place / f".{name}").rename(place / name)
    os._exit(0)


def serve() -> None:
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import diffusers
    import transformers

    import train_zoodip  # noqa: F401
    from zoodip.errors import quiet_libraries

    for name in "AutoencoderKL UNet2DConditionModel DDPMScheduler PNDMScheduler StableDiffusionPipeline".split():
        getattr(diffusers, name)  # imported when first named
    for name in "CLIPTextConfig CLIPTextModel CLIPTokenizer".split():
        getattr(transformers, name)
    quiet_libraries()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    while line := sys.stdin.readline():
        if os.fork() == 0:
            supervise(json.loads(line))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    serve()
