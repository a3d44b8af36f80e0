"""The paper's claims about memory at Stable Diffusion v1.5's size, judged from benchmarks/gpu.json, a record made on a GPU.

What is learned does not change the memory used, so that record was made with random weights. The miniature's own memory would
tell nothing: it is the interpreter's, whatever the method.
"""

from __future__ import annotations

import json
from pathlib import Path

from reproduction.experiments import METHOD_ROWS
from zoodip.records import ROOT

RECORD = ROOT / "benchmarks" / "gpu.json"
OURS = "ZOODiP"
# row of Table 1, which has the paper's figure -> system in the record
SYSTEMS = {OURS: "ZOODiP, INT8", "TI, as published": "gradient TI, fp32", "DreamBooth": "DreamBooth, fp32",
           "QLoRA": "QLoRA, NF4", "PEQA": "PEQA, INT8", "TuneQDM": "TuneQDM, INT8"}  # fmt: skip


def memory_claims(record: Path = RECORD) -> list[str]:
    """One line for each claim of Table 1 that ZOODiP takes less memory, with both ratios.

    Reproduced if our ratio is at most a quarter above the paper's. If it is above that but below 1, ZOODiP takes less memory, but
    not by as much as claimed.
    """
    content = json.loads(record.read_text())
    held = {name: found["nvidia_smi"] / 1e9 for name, found in content["results"]["systems"].items()}
    published = {row.label: row.published["peak_memory_gb"] for row in METHOD_ROWS if row.label in SYSTEMS}
    ours, paper, lines = held[SYSTEMS[OURS]], published[OURS], []
    for label, name in SYSTEMS.items():
        if label != OURS and name in held:
            ratio, claimed = ours / held[name], paper / published[label]
            said = "reproduced" if ratio <= 1.25 * claimed else "less, but not by as much" if ratio < 1 else "contradicted"
            lines.append(f"**{said}**: ZOODiP takes less memory than {name} ({ours:.2f} GB of {held[name]:.2f}, {ratio:.2f}; the "
                         f"paper's {paper:.2f} of {published[label]:g}, {claimed:.2f}).")  # fmt: skip
    return lines
