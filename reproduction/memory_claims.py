"""The memory of the methods' scripts at Stable Diffusion v1.5's size, from benchmarks/gpu.json, and the paper's claims about it.

What is learned does not change the memory used, so that record was made on a GPU with random weights. The miniature's own memory
would tell nothing: it is the interpreter's, whatever the method.
"""

from __future__ import annotations

import json
from pathlib import Path

from reproduction.experiments import METHOD_ROWS
from zoodip.records import ROOT

RECORD = ROOT / "benchmarks" / "gpu.json"
ZOODIP = "ZOODiP, INT8"
# row of Table 1 or point of the plot of quality and memory -> system in the record
MEASURED_AS = {
    "ZOODiP": ZOODIP, "TI, as published": "gradient TI, fp32", "DreamBooth": "DreamBooth, fp32", "QLoRA": "QLoRA, NF4",
    "PEQA": "PEQA, INT8", "TuneQDM": "TuneQDM, INT8", "DiffuseKronA": "DiffuseKronA, NF4",
    "TI, not quantised": "gradient TI, fp32", "TI, NF4": "gradient TI, NF4", "GF-TI, NF4 (memory: INT8)": "GF-TI, INT8",
    "ZOODiP, not quantised": "ZOODiP, not quantised", "ZOODiP, INT8": ZOODIP, "ZOODiP, NF4": "ZOODiP, NF4",
}  # fmt: skip


def measured_memory(record: Path = RECORD) -> dict[str, float]:
    """{system: GB that nvidia-smi shows}; a system that could not be measured is left out."""
    systems = json.loads(record.read_text())["results"].get("systems", {})
    return {name: found["nvidia_smi"] / 1e9 for name, found in systems.items() if "nvidia_smi" in found}


def memory_claims(record: Path = RECORD) -> list[str]:
    """One line for each claim of Table 1 that ZOODiP takes less memory, with both ratios.

    Reproduced if our ratio is at most a quarter above the paper's. If it is above that but below 1, ZOODiP takes less memory, but
    not by as much as claimed.
    """
    held, lines = measured_memory(record), []
    published = {MEASURED_AS[row.label]: row.published["peak_memory_gb"] for row in METHOD_ROWS
                 if row.label in MEASURED_AS and "peak_memory_gb" in row.published}  # fmt: skip
    ours, paper = held[ZOODIP], published.pop(ZOODIP)
    for name, theirs in published.items():
        if name in held:
            ratio, claimed = ours / held[name], paper / theirs
            said = "reproduced" if ratio <= 1.25 * claimed else "less, but not by as much" if ratio < 1 else "contradicted"
            lines.append(f"**{said}**: ZOODiP takes less memory than {name} ({ours:.2f} GB of {held[name]:.2f}, {ratio:.2f}; the "
                         f"paper's {paper:.2f} of {theirs:g}, {claimed:.2f}).")  # fmt: skip
    return lines
