"""Peak bytes of simultaneously live tensors: exact, and the same in every run.

    peak_live_bytes(lambda: trainer.step())

torch's profiler reports every allocation and release of a tensor on a CPU, including the operators' workspaces; the peak is the
maximum of their running sum. Pages of memory-mapped weight files, which the profiler also reports, belong to the system and are
left out. `watch_script.py` counts the live bytes of a whole training script, which may be another version's, so nothing of
`zoodip` is imported here before it is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

STAGE, LAYER = "stage:", "layer:"  # prefixes of profiler range names


@dataclass
class Allocation:
    """A piece of memory and where it was allocated."""

    address: int
    size: int
    operator: str  # torch's
    layer: str | None  # innermost module named by `name_layers`


@dataclass
class LiveBytes:
    """What `count_live_bytes` finds."""

    peak: int = 0
    stages: dict[str, int] = field(default_factory=dict)  # peak within each `stage`
    at_peak: list[Allocation] = field(default_factory=list)  # what is alive at the peak


def peak_live_bytes(function: Callable[[], object], weight_files: Iterable[Path] = ()) -> int:
    """Peak bytes of the CPU tensors that `function` allocates; `weight_files` are the safetensors files that it maps."""
    return count_live_bytes(function, weight_files).peak


def tensors_of(*modules: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers: what is held between steps."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Total bytes of the distinct tensors; shared memory counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def count_live_bytes(function: Callable[[], object], weight_files: Iterable[Path] = ()) -> LiveBytes:
    """Call `function` and track the sum of its live CPU allocations."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 10_000))  # the event tree is as deep as the call stack
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
        return follow(*read_events(recorded, mapped_sizes(weight_files)))
    finally:
        sys.setrecursionlimit(limit)


@contextmanager
def stage(name: str):
    """Name the enclosed code for `LiveBytes.stages`. Stages may nest; the innermost counts."""
    with record_function(STAGE + name):
        yield


class Stages:
    """Seconds and peak memory of each stage of a process; each is also a `stage` of the live bytes."""

    def __init__(self, device: str):
        self.device, self.found = device, {}
        self.baseline = peak_counters(device)

    @contextmanager
    def __call__(self, name: str):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
        started = time.perf_counter()
        with stage(name):
            yield
        above = {
            what: value - (self.baseline[what] if what == "rss" else 0) for what, value in peak_counters(self.device).items()
        }
        self.found[name] = dict(above, seconds=time.perf_counter() - started)


def peak_counters(device: str) -> dict[str, int]:
    """Peak bytes since the process or stage began: resident on a CPU (Linux); the allocator's and nvidia-smi's counts on CUDA."""
    if device == "cuda":
        torch.cuda.synchronize()
        return dict(
            allocated=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.max_memory_reserved(),
            nvidia_smi=gpu_bytes()[os.getpid()],
        )
    from zoodip.records import peak_resident_bytes

    return dict(rss=peak_resident_bytes())


def gpu_bytes() -> Counter[int]:
    """{process: bytes of GPU memory that nvidia-smi reports for it}."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = [row.split(",") for row in subprocess.run(query, capture_output=True, text=True).stdout.splitlines()]
    held: Counter[int] = Counter()  # a process on several GPUs has several rows
    for process, size in rows:
        held[int(process)] += int(size) << 20 if size.strip().isdecimal() else 0  # else: "[N/A]"
    return held


def name_layers(model: nn.Module, prefix: str) -> None:
    """Label allocations in the forwards of `model` with their layer: `prefix`, a dot, the layer's name."""
    open_ranges = []

    def enter(name: str) -> None:
        open_ranges.append(record_function(f"{LAYER}{prefix}.{name}"))
        open_ranges[-1].__enter__()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: enter(name))
        module.register_forward_hook(lambda *_: open_ranges.pop().__exit__(None, None, None))


def mapped_sizes(weight_files: Iterable[Path]) -> set[int]:
    """The sizes under which memory maps of safetensors files are reported: with and without their header."""
    sizes = set()
    for path in weight_files:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        sizes |= {path.stat().st_size, path.stat().st_size - header - 8}
    return sizes


def read_events(recorded: profile, mapped: set[int]) -> tuple[list[tuple], list[tuple]]:
    """(allocations and releases as (moment, address, signed size, names of the open ranges), stages as (start, end, name))."""
    changes, stages = [], []

    def walk(event, path: tuple[str, ...]) -> None:
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation":
            fields = event.extra_fields
            if fields.device.type == "cpu" and abs(fields.alloc_size) not in mapped:
                changes.append((event.start_time_ns, fields.ptr, fields.alloc_size, path))
        if event.name.startswith(STAGE):
            stages.append((event.start_time_ns, event.end_time_ns, event.name.removeprefix(STAGE)))
        for child in event.children:
            walk(child, (*path, event.name))

    for event in recorded.profiler.kineto_results.experimental_event_tree():
        walk(event, ())
    return sorted(changes, key=lambda change: change[0]), stages


def follow(changes: list[tuple], stages: list[tuple]) -> LiveBytes:
    """Follow the running sum of allocations and releases in time order."""
    found, live, total = LiveBytes(), {}, 0
    at_peak: dict[int, tuple] = {}
    for moment, address, size, path in changes:
        if size > 0:
            live[address] = (size, path)
            total += size
        elif address in live:  # otherwise it predates the recording
            total -= live.pop(address)[0]
        if total > found.peak:
            found.peak, at_peak = total, dict(live)
        within = [(end - start, name) for start, end, name in stages if start <= moment <= end]
        name = min(within)[1] if within else "outside"
        found.stages[name] = max(found.stages.get(name, 0), total)
    for address, (size, path) in at_peak.items():
        layer = next((name.removeprefix(LAYER) for name in reversed(path) if name.startswith(LAYER)), None)
        found.at_peak.append(Allocation(address, size, path[-1].removeprefix("aten::") if path else "", layer))
    return found


def largest(found: LiveBytes, names: dict[int, str]) -> dict[str, int]:
    """What the peak consists of, {what: bytes}, largest first. `names` identifies tensors by address (`tensor_names`)."""
    items: Counter[str] = Counter()
    for each in found.at_peak:
        by_place = f"{each.layer}: {each.operator}" if each.layer else "other"
        items[names.get(each.address, by_place)] += each.size
    return dict(items.most_common())


def tensor_names(named: Iterable[tuple[str, torch.Tensor]]) -> dict[int, str]:
    """{address: what} of the tensors that live throughout the run."""
    return {tensor.untyped_storage().data_ptr(): name for name, tensor in named if tensor.numel()}
