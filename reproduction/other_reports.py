"""Sections of the report for what has programs of its own: what binding and fewer forwards aimed at, and what was found.

From the records that `binding.py` and `fewer_forwards.py` left; there is no section of a record that is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

from reproduction.binding_report import aims, cost_lines, read_records, tables_of
from reproduction.binding_rows import CORE
from reproduction.fewer_forwards_forms import DEFAULT
from reproduction.fewer_forwards_tables import best_rivals, measured_tables, read_found
from reproduction.pages import Image, Section, Table
from zoodip.records import ROOT

BINDING = ROOT / "reproduction" / "binding"
FEWER_FORWARDS = ROOT / "reproduction" / "fewer_forwards"

BINDING_NOTE = """Two creatures in one picture, each with what is its own; `python -m reproduction.binding`, all of whose rows
and scores are in `reproduction/binding/RESULTS.md`. Yes (no): the interval lies wholly on that side of the bound."""
COST_NOTE = "Processor seconds of one picture by itself, and in pictures drawn plainly."
FEWER_NOTE = """The Gauss-Newton trainer, which keeps all of a forward's prediction, against the paper's loop at equal forwards
on the twelve breeds; `python -m reproduction.fewer_forwards`, all of whose scores are in
`reproduction/fewer_forwards/RESULTS.md`."""
VERDICT_NOTE = """It wins (loses) where the 95 % interval of the breeds' paired differences lies wholly on that side of 0 and ties
where it holds 0; in pictures by attributes and CLIP-I, of which one decides where the other does not contradict."""


def other_reports(folder: Path, binding: Path = BINDING, fewer: Path = FEWER_FORWARDS) -> list[Section]:
    """For a report in `folder`, from which pictures are pointed to."""
    sections = []
    if (fewer / "results.json").exists():
        sections += fewer_forwards_sections(folder, fewer)
    if (binding / "records.json.xz").exists():
        sections += binding_sections(folder, binding)
    return sections


def pictures(folder: Path, paths: list[Path]) -> list[Image]:
    return [Image(path.stem, os.path.relpath(path.resolve(), folder.resolve())) for path in paths if path.exists()]


def fewer_forwards_sections(folder: Path, fewer: Path) -> list[Section]:
    found, commits = read_found(fewer / "results.json")
    tables = measured_tables(found, DEFAULT.label, best_rivals(read_found(fewer / "search.json")[0]))
    note = f"{FEWER_NOTE} Runs of commit {', '.join(commit[:7] for commit in commits)}."
    return [
        Section("Fewer forwards: what was aimed at", [note], table=tables["aims"]),
        Section("Fewer forwards: at which budgets it wins", [VERDICT_NOTE], table=tables["verdicts"],
                sheets=pictures(folder, sorted(fewer.glob("sheet-*.jpg")))),
    ]  # fmt: skip


def binding_sections(folder: Path, binding: Path) -> list[Section]:
    records = read_records(binding / "records.json.xz")
    commits = sorted({picture["commit"][:7] for picture in records["pictures"]})
    wanted = Table(["aim", "weights", "figure", "reached"], aims(tables_of(records["pictures"], CORE), records["costs"]))
    cost = Table(["row", "forward", "backward", "seconds", "in plain pictures"], cost_lines(records["costs"]))
    return [
        Section("Binding: what was aimed at", [f"{BINDING_NOTE} Pictures of commit {', '.join(commits)}."], table=wanted,
                sheets=pictures(folder, sorted(binding.glob("S*.jpg")))),
        Section("Binding: what a picture costs", [COST_NOTE], table=cost),
    ]  # fmt: skip
