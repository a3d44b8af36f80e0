"""Report sections on binding and fewer forwards, which have programs of their own: their aims, and what was found.

They are made from the records of `binding.py` and `fewer_forwards.py`; a record that does not exist has no section.
"""

from __future__ import annotations

import os
from pathlib import Path

from reproduction.binding_report import AIM_HEADER, COST_HEADER, aims, cost_lines, read_records, tables_of
from reproduction.binding_rows import CORE
from reproduction.fewer_forwards_forms import DEFAULT
from reproduction.fewer_forwards_tables import measured_tables, read_found, searched_rivals
from reproduction.pages import Image, Section, Table, in_words, shortened
from zoodip.records import ROOT

BINDING = ROOT / "reproduction" / "binding"
FEWER_FORWARDS = ROOT / "reproduction" / "fewer_forwards"

BINDING_NOTE = """Two creatures in one picture, each with its own attributes; made by `python -m reproduction.binding`, all of
whose rows and scores are in `reproduction/binding/RESULTS.md`. Here S1, S4 and S5 are sets of prompts (two creatures of
different colours; a learned breed and another creature, each with an accessory; one creature), not tables of the paper;
"phrase", "full" and "control" are methods of `docs/binding.md`; weights "none" are not quantised; figures are per cent, except
the cost. Yes (no) means that the interval lies wholly on that side of the bound."""
COST_NOTE = "Processor time of one picture drawn by itself, in seconds and as a multiple of a plain picture's."
FEWER_NOTE = """The Gauss-Newton trainer, which uses all of a forward's prediction, compared with the paper's loop at equal
forwards on the twelve breeds; made by `python -m reproduction.fewer_forwards`, all of whose scores are in
`reproduction/fewer_forwards/RESULTS.md`."""
VERDICT_NOTE = """The trainer wins (loses) if the 95 % interval of the breeds' paired differences lies wholly on that side of 0,
and ties if the interval contains 0. In pictures, attributes and CLIP-I are judged: one of them decides if the other does not
contradict it."""


def other_reports(folder: Path, binding: Path = BINDING, fewer: Path = FEWER_FORWARDS) -> list[Section]:
    """The sections of a report in `folder`, with paths of pictures relative to it."""
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
    tables = measured_tables(found, DEFAULT.label, searched_rivals(fewer))
    note = f"{FEWER_NOTE} Runs of {in_words([*map(shortened, commits)])}."
    return [
        Section("Fewer forwards: the aims", [note], table=tables["aims"]),
        Section("Fewer forwards: at which budgets it wins", [VERDICT_NOTE], table=tables["verdicts"],
                sheets=pictures(folder, sorted(fewer.glob("sheet-*.jpg")))),
    ]  # fmt: skip


def binding_sections(folder: Path, binding: Path) -> list[Section]:
    records = read_records(binding / "records.json.xz")
    commits = sorted({shortened(picture["commit"]) for picture in records["pictures"]})
    wanted = Table(AIM_HEADER, aims(tables_of(records["pictures"], CORE), records["costs"]))
    cost = Table(COST_HEADER, cost_lines(records["costs"]))
    return [
        Section("Binding: the aims", [f"{BINDING_NOTE} Pictures of {in_words(commits)}."], table=wanted,
                sheets=pictures(folder, sorted(binding.glob("S*.jpg")))),
        Section("Binding: what a picture costs", [COST_NOTE], table=cost),
    ]  # fmt: skip
