"""What a result depends on, and how it is reported: versions, commit, machine, memory; Markdown tables and intervals."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


def package_versions() -> dict[str, str]:
    """{package: version} for the packages that a result depends on."""
    names = ("torch", "diffusers", "transformers", "accelerate", "bitsandbytes", "safetensors")
    return {name: version(name) for name in names}


def git_commit(tree: Path = ROOT) -> str | None:
    """The commit of a tree, by default of this code, with "-dirty" if files differ from it; None without git."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=tree, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return git.stdout.strip() or None


def hardware(device: torch.device | str = "cpu") -> str:
    """The class of the machine, never its name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def environment(device: torch.device | str = "cpu") -> dict:
    """Device, versions and commit, as stored in every record."""
    return dict(device=hardware(device), python=platform.python_version(), versions=package_versions(), commit=git_commit())


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e9
    if sys.platform == "linux":
        return peak_resident_bytes() / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_resident_bytes() -> int:
    """Peak resident memory of this program, on Linux: ru_maxrss would start at the peak of the process that started it."""
    with open("/proc/self/status", "rb") as status:
        return int(status.read().partition(b"VmHWM:")[2].split(maxsplit=1)[0]) * 1024


def plain_arguments(flags: dict) -> dict:
    """Arguments fit for publication: a path outside the repository is reduced to its last part."""

    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        if not isinstance(value, (str, Path)) or not Path(value).is_absolute():
            return str(value) if isinstance(value, Path) else value
        path = Path(value).resolve()
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return {name: plain(value) for name, value in flags.items()}


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; numbers should already be formatted."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def write_between(path: Path, mark: str, text: str) -> None:
    """Put `text` between the lines <!-- mark --> and <!-- /mark --> of a Markdown file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    _, found, after = rest.partition(f"<!-- /{mark} -->\n")
    if not found:
        raise ValueError(f"{path}: no lines <!-- {mark} --> and <!-- /{mark} -->")
    path.write_text(f"{before}<!-- {mark} -->\n{text}<!-- /{mark} -->\n{after}", encoding="utf-8")


T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
         2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def quantile(table: tuple[float, ...], normal: float, freedom: int) -> float:
    """Quantile of Student's t from a table for 1, 2, ... degrees of freedom; beyond it, the gap to the normal falls as 1 / n."""
    if freedom <= len(table):
        return table[freedom - 1]
    return normal + (table[-1] - normal) * len(table) / freedom


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval (Student's t, values taken as independent); nan for one value."""
    array = np.asarray(values, float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    return float(array.mean()), float(quantile(T_975, 1.960, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
