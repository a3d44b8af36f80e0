"""The page of `speed_memory.py`: its results as tables."""

from __future__ import annotations

from statistics import median

from benchmarks.methods import METHODS
from zoodip.records import table

TITLES = {"miniature": "The miniature", "sd15": "Stable Diffusion v1.5's shape, 512 x 512"}
MEGABYTE = 1_000_000
REBASE_STEPS = (22, 60, 110)  # the trainer's default


def page(results: dict, device: str) -> str:
    """`results` is {"world precision": {time, memory, byte_floor}}, with only the entries that were measured."""
    text = []
    for key, found in results.items():
        world, precision = key.split()
        text.append(f"## {TITLES[world]}, activations in {precision}\n\nn = 2: three candidates a step.\n")
        if "time" in found:
            text.append(time_table(found["time"]))
        if "memory" in found and device == "cuda":
            text.append(cuda_table(found["memory"]))
        elif "memory" in found:
            text.append(memory_table(found["memory"], found.get("byte_floor", {})))
            text += [made_of for name, counts in found["memory"].items() if (made_of := peak_table(name, counts))]
    return "\n".join(text)


def time_table(seconds: dict[str, list[float]]) -> str:
    """Seconds per step, relative to both floors and this project."""
    if "error" in seconds:
        return f"Time was not measured: {seconds['error']}\n"
    references = [seconds.get(name) for name in ("floor", "floor_as_loaded", "zoodip")]
    rows = []
    for name, rounds in seconds.items():
        ratios = [f"{median(a / b for a, b in zip(rounds, other, strict=True)):.2f}" if other else "" for other in references]
        samples = f"{METHODS[name].forwards / median(rounds):.3g}" if METHODS[name].forwards else ""
        spread = f"{min(rounds):.4g} to {max(rounds):.4g}"
        rows.append([METHODS[name].label, f"{median(rounds):.4g}", spread, *ratios, samples])
    header = ["method", "seconds a step (median)", "range", "of the floor", "of the floor as loaded", "of this project"]
    count = len(next(iter(seconds.values())))
    text = table([*header, "UNet samples forward/s"], rows) + f"\n\n{count} rounds; ratios are medians over the rounds.\n"
    return text + gauss_newton_table(seconds)


def gauss_newton_table(seconds: dict[str, list[float]]) -> str:
    """Time per forward of a Gauss-Newton run, bases included, relative to ZOODiP's; empty unless all were timed."""
    if not {"zoodip", "newton_basis"} <= seconds.keys():
        return ""
    rows = []
    for name in ("newton", "newton_split"):
        for forwards in (100, 400, 1500) if name in seconds else ():
            per_step = METHODS[name].forwards
            steps = forwards // per_step
            bases = 1 + sum(step < steps for step in REBASE_STEPS)
            rounds = zip(seconds[name], seconds["newton_basis"], seconds["zoodip"], strict=True)
            ratios = [(steps * step + bases * basis) / (steps * per_step) / (ours / METHODS["zoodip"].forwards)
                      for step, basis, ours in rounds]  # fmt: skip
            rows.append([METHODS[name].label, f"{forwards:,}", bases, f"{median(ratios):.2f}"])
    return "\n" + table(["", "forwards", "bases", "time a forward, of ZOODiP's"], rows) + "\n"


def memory_table(memory: dict[str, dict], floor: dict) -> str:
    """Live bytes and resident memory of each method, and the byte floor of any loop."""
    rows = []
    for name, counts in memory.items():
        peaks, stages = counts["bytes"].get("peaks", {}), counts["resident"].get("stages", {})
        row = [METHODS[name].label, f"**{gigabytes(max(peaks.values()))}**" if peaks else "not measured"]
        row += [gigabytes(peaks.get(stage)) for stage in ("load", "train")]
        row += [gigabytes(stages.get(stage, {}).get("rss")) for stage in ("load", "train")]
        rows.append([*row, f"{stages['load']['seconds']:.1f}" if stages else ""])
    header = ["method", "bytes, all", "load and encode", "train", "RSS: load and encode", "train", "s to load and encode"]
    text = "Live tensor bytes at the peak of each stage, and peak resident memory above the interpreter's, GB:\n\n"
    text += table(header, rows) + "\n"
    baselines = [counts["resident"]["baseline"]["rss"] for counts in memory.values() if "baseline" in counts["resident"]]
    if baselines:
        text += f"\nThe interpreter with its libraries: {gigabytes(median(baselines))} GB."
    if "packed" in floor:
        text += (
            f" Byte floor: {gigabytes(floor['packed'] + floor['activations'])} GB, packed weights {gigabytes(floor['packed'])} "
            f"and the largest layer's input and output {gigabytes(floor['activations'])} (`{floor['layer']}`)."
        )
    return text + "\n"


def peak_table(name: str, counts: dict) -> str:
    """What the peak of live bytes consists of; empty if unknown."""
    items = counts["bytes"].get("items", {})
    if not items:
        return ""
    large = {what: size for what, size in items.items() if size >= MEGABYTE}
    rows = [[what.replace("|", "/"), f"{size / MEGABYTE:.1f}"] for what, size in large.items()]
    rows += [
        ["everything smaller", f"{(sum(items.values()) - sum(large.values())) / MEGABYTE:.1f}"],
        ["**together**", f"**{sum(items.values()) / MEGABYTE:.1f}**"],
    ]
    return f"What the peak is made of, {METHODS[name].label}:\n\n" + table(["", "MB"], rows) + "\n"


def cuda_table(memory: dict[str, dict]) -> str:
    rows = []
    for name, counts in memory.items():
        for stage, numbers in counts["resident"].get("stages", {}).items():
            counters = [gigabytes(numbers[what]) for what in ("allocated", "reserved", "nvidia_smi")]
            rows.append([METHODS[name].label, stage, *counters])
    return table(["method", "stage", "allocated, GB", "reserved, GB", "nvidia-smi, GB"], rows) + "\n"


def gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3f}"
