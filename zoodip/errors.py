"""Errors that the user can fix, as exception types, and how they are reported in one line."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: the value, the place and the remedy."""


class DamagedModel(InputError):
    """A part of the model folder differs from any intact download; the remedy is added to `fault`."""

    def __init__(self, path: Path, fault: str):
        super().__init__(f"{path}: {fault}; download the folder again")


class BrokenCheckpoint(InputError):
    """A checkpoint that is incomplete or corrupt, so that an older one may be tried instead."""

    def __init__(self, path: Path, fault: str):
        super().__init__(
            f"--resume_from_checkpoint {path}: is no valid checkpoint ({fault}); use latest or an older checkpoint-N.safetensors"
        )


class Interrupted(Exception):
    """The user stopped something optional, such as a picture."""


def require_peft(what: str) -> None:
    """Raises InputError if peft, which only some files and trainers need, is not installed."""
    if find_spec("peft") is None:
        raise InputError(f'{what} needs the package peft, which is not installed; run pip install -e ".[tuning]"')


def out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out: on a CPU and on Apple's GPUs, torch says so in a plain RuntimeError."""
    import torch

    words = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(phrase in str(error) for phrase in words)


def of_gpu_or_compiler(error: Exception, path: Path | None = None) -> bool:
    """Whether an error comes from a GPU, its driver or a compiler, and says nothing about the file or folder `path`."""
    import torch

    if isinstance(error, torch.AcceleratorError) or type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return True
    text = str(error) if path is None else str(error).replace(str(path), "")  # the path may have such a word in it
    return re.search("CUDA|cuDNN|triton", text, re.IGNORECASE) is not None


@contextmanager
def damaged_model(path: Path) -> Iterator[None]:
    """Context manager: turns whatever a library raises on a damaged folder into a DamagedModel that names `path`."""
    try:
        yield
    except (InputError, Interrupted):
        raise
    except Exception as error:  # every class of every library raises its own
        if out_of_memory(error) or of_gpu_or_compiler(error, path):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedModel(path, f"cannot be loaded ({reason})") from error


def printable(text: str) -> str:
    """The text on one line, whatever a file name or a library put in: control characters escaped, hub access tokens hidden."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return re.sub(r"\bhf_[A-Za-z0-9]{30,}", "hf_...", text)


def is_first_process() -> bool:
    """Whether this is the process that prints, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def notice(text: str) -> None:
    """Print one line for the user to stderr, whatever a file name in it contains; of several processes, only the first does."""
    if is_first_process():
        print(printable(text), file=sys.stderr)


def quiet_libraries() -> None:
    """Silence notices about optional packages that are not needed; errors still come through. Call before loading."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="IProgress not found")


def run_script(main: Callable[..., int | None], flags) -> int:
    """Run `main(flags)` for the command line -> exit code: an error that the user can fix is one line on stderr and code 2."""
    quiet_libraries()
    try:
        return main(flags) or 0
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if not out_of_memory(error):
            raise
        advice = memory_advice(flags if isinstance(flags, dict) else vars(flags), of_gpu_or_compiler(error))
        print(f"error: out of memory; try {advice} ({printable(str(error))[:200]})", file=sys.stderr)
        return 2


# {flag: (what to try, where a script has it; the values that leave nothing to try)}
MEMORY_SAVERS: dict[str, tuple[str, tuple]] = dict(
    candidates_per_forward=("--candidates_per_forward 1", (1,)), gradient_checkpointing=("--gradient_checkpointing", (True,)),
    quantization=("--quantization nf4", (None, "nf4")), train_batch_size=("a smaller --train_batch_size", (1,)),
    batch_size=("a smaller --batch_size", (1,)), mixed_precision=("--mixed_precision bf16", ("bf16", "fp16")),
    resolution=("a smaller --resolution", ()), width=("a smaller --width and --height", ()),
    final_picture=("--no-final_picture", (False,)), validation_prompt=("no --validation_prompt", (None,)),
)  # fmt: skip
# A resumed run may not differ in the others.
SAVE_WHEN_RESUMED = ("candidates_per_forward", "gradient_checkpointing", "final_picture", "validation_prompt")


def memory_advice(flags: dict, on_gpu: bool) -> str:
    """What a user can do about a lack of memory: closing other programs, and what the flags leave to try."""
    found = [flag for flag, (_, used) in MEMORY_SAVERS.items() if flag in flags and flags[flag] not in used]
    if on_gpu and flags.get("mixed_precision") is None:  # it is fp16 there
        found = [flag for flag in found if flag != "mixed_precision"]
    text = ", ".join(["closing other programs", *(MEMORY_SAVERS[flag][0] for flag in found)])
    if "resume_from_checkpoint" not in flags:
        return text
    changed = " or ".join(f"--{flag}" for flag in SAVE_WHEN_RESUMED if flag in found)
    return (
        f"{text}. --resume_from_checkpoint latest continues the run if no flag{' but ' + changed if changed else ''} is changed"
    )


UNFINISHED: list[Path] = []  # folders that are useless until they are complete


def stop_at_once(number: int, frame, resumable: bool = True) -> None:
    """Handle SIGINT or SIGTERM outside the steps: what is to be saved has been saved, so say how to continue, and exit.

    This does not unwind: an exception raised in the middle of an import may be swallowed or printed with a traceback.
    """
    for folder in UNFINISHED:
        shutil.rmtree(folder, ignore_errors=True)
    how = (
        "interrupted outside the training steps; the same command with --resume_from_checkpoint latest continues from the "
        "last checkpoint, or starts over if there is none"
    )
    print("\n" + (how if resumable else "interrupted"), file=sys.stderr, flush=True)  # a progress bar may stand there
    os._exit(128 + number)


def prepare_environment() -> None:
    """Set what torch reads from the environment at startup: for this process, before the import, or for later processes."""
    # on Linux CPUs: large tensors on huge pages, which saves a tenth of the time (benchmarks/NOTES.md)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def prepare_process(resumable: bool = True) -> None:
    """Set up environment and signals, as scripts do before they import torch. `resumable`: the script has checkpoints."""
    prepare_environment()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(stop_at_once, resumable=resumable))
