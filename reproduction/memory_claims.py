"""The paper's claims on memory, at Stable Diffusion v1.5's size: from benchmarks/gpu.json, the record of a GPU.

What is learned does not change the memory that it takes, so the weights were random; and the miniature's own memory is the
interpreter's, whatever the method.
"""

from __future__ import annotations

import json
from pathlib import Path

from zoodip.records import ROOT

RECORD = ROOT / "benchmarks" / "gpu.json"
OURS = "ZOODiP, INT8", 2.37  # GB of the paper's Table 1, by nvidia-smi
THEIRS = {
    "gradient TI, fp32": 6.75, "DreamBooth, fp32": 19.4, "QLoRA, NF4": 7.56, "PEQA, INT4": 6.31, "TuneQDM, INT8": 8.96,
}  # fmt: skip


def memory_claims(record: Path = RECORD) -> list[str]:
    """A line for each claim of Table 1 that ZOODiP takes less, with both ratios.

    Reproduced where ours is at most a quarter above the paper's; below 1 it is less, but not by what is claimed.
    """
    content = json.loads(record.read_text())
    held = {name: found["nvidia_smi"] / 1e9 for name, found in content["results"]["systems"].items()}
    ours, paper = held[OURS[0]], OURS[1]
    lines = []
    for name, theirs in THEIRS.items():
        if name in held:
            ratio, claimed = ours / held[name], paper / theirs
            said = "reproduced" if ratio <= 1.25 * claimed else "less, but not by as much" if ratio < 1 else "contradicted"
            lines.append(f"**{said}**: ZOODiP takes less memory than {name} ({ours:.2f} GB of {held[name]:.2f}, {ratio:.2f}; the "
                         f"paper's {paper:.2f} of {theirs:g}, {claimed:.2f}).")  # fmt: skip
    return lines
