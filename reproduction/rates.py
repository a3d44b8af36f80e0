"""The learning rates of weight tuning: chosen on a grid by pictures, and kept in a file that records how.

`python -m reproduction.tables --tables TuningRates` runs the grid and writes the file; every other table reads it. If the file is
missing or was made for other weights, rows learn at the middle of the grid, and a line says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

from reproduction import plans
from reproduction.declarations import OBEYED
from reproduction.experiments import BY_NAME
from reproduction.runs import Settings
from reproduction.tuning_experiments import GRID_FACTORS, SYSTEMS
from zoodip.files import write_json
from zoodip.records import ROOT, environment

FILE = ROOT / "reproduction" / "tuning_rates.json"
CRITERION = ("attributes", *OBEYED)  # their sum decides; the loss does not
KEPT = (*CRITERION, "drift", "CLIP-I", "CLIP-T", "loss", "loss_all")  # for each cell


def read_rates(path: Path, model_id: str) -> dict[str, float]:
    """{system: learning rate} as chosen for these weights; empty, with a line that says so, if there is no such choice."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("model") == model_id:
        return {system: float(rate) for system, rate in found["chosen"].items()}
    why = f"was chosen for other weights ({found['model']}, not {model_id})" if found else "is not there"
    print(f"{path}: {why}; weight tuning learns at the middle of the grid of rates until --tables TuningRates has chosen",
          file=sys.stderr)  # fmt: skip
    return {}


def rates_note(settings: Settings) -> str:
    """At which rates the rows learn that have those of their system."""
    if settings.rates:
        spare = ", ".join(settings.world.grid_subjects)
        return f"Weight tuning learns at rates chosen by pictures of spare breeds ({spare}), for the same prompts as here."
    if settings.world.grid_subjects:
        return "Weight tuning learns at the middle of the grid of rates, because none has been chosen for these weights."
    return "Weight tuning learns at its published rates."


def choose_rates(settings: Settings) -> dict | None:
    """The content of the file: each cell of the grid, and for each system the rate with the highest sum of `CRITERION`.

    Scores are means over the runs of a cell. Choices at the edge of the grid are named, because the grid should then be widened.
    None if runs are missing.
    """
    experiment = BY_NAME["TuningRates"]
    rows, cells, chosen, at_edge = plans.collect(experiment, settings), [], {}, []
    expected = len(plans.subjects_of(experiment, settings)) * len(plans.seeds_of(experiment, settings))
    for row in experiment.rows:
        records = list(rows[row.label].values())
        if len(records) < expected or not all(name in record for record in records for name in CRITERION[:1]):
            return None
        scores = {name: mean(record[name] for record in records) for name in KEPT if all(name in record for record in records)}
        rate = settings.rate(row)["learning_rate"]
        cell = dict(system=row.rate_of, factor=row.rate_factor, learning_rate=rate, runs=len(records), **scores)
        cells.append(cell | dict(sum=sum(scores[name] for name in CRITERION if name in scores)))
    for system in SYSTEMS:
        best = max((cell for cell in cells if cell["system"] == system), key=lambda cell: cell["sum"])
        chosen[system] = best["learning_rate"]
        at_edge += [system] if best["factor"] in (min(GRID_FACTORS[system]), max(GRID_FACTORS[system])) else []
    return dict(chosen=chosen, by=f"the sum of {', '.join(CRITERION)}", at_edge=at_edge, model=settings.model_id,
                subjects=list(plans.subjects_of(experiment, settings)), cells=cells, **environment())  # fmt: skip


def write_rates(settings: Settings, path: Path) -> None:
    """Choose the rates and write the file; if runs are missing, say so."""
    notes = choose_rates(settings)
    if notes is None:
        print("not all runs of the grid of rates are there; none is chosen", file=sys.stderr)
        return
    write_json(path, notes, indent=1)
    print(f"{path}: " + ", ".join(f"{system} {rate:g}" for system, rate in notes["chosen"].items()))
    if notes["at_edge"]:
        print(f"at the edge of the grid, which should be widened: {', '.join(notes['at_edge'])}", file=sys.stderr)
