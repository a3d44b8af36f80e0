"""The results of binding and of fewer forwards, as sections of the suite's report."""

from __future__ import annotations

from conftest import ROOT
from test_fewer_forwards import invented

from reproduction.fewer_forwards_forms import BUDGETS
from reproduction.fewer_forwards_tables import write_found
from reproduction.other_reports import other_reports
from reproduction.pages import write_pages

DEVELOPMENT = ROOT / "reproduction" / "binding_development"  # a record of the same kind


def test_sections_are_of_the_records(tmp_path):
    fewer, absent = tmp_path / "fewer", tmp_path / "absent"
    fewer.mkdir()
    for name in ("search.json", "results.json"):
        write_found(fewer / name, invented(better=0.1), ["0123456789"])
    (fewer / "sheet-400.jpg").touch()
    sections = {section.title: section for section in other_reports(tmp_path / "report", DEVELOPMENT, fewer)}
    assert [title.partition(":")[0] for title in sections] == ["Fewer forwards"] * 2 + ["Binding"] * 2
    wins = sections["Fewer forwards: at which budgets it wins"]
    assert len(wins.table.lines) == 4 * len(BUDGETS) and wins.table.lines[0][2] == "wins"
    assert wins.sheets[0].path == "../fewer/sheet-400.jpg"
    assert "0123456" in sections["Fewer forwards: the aims"].paragraphs[0]
    aimed = sections["Binding: the aims"]
    assert any("at least 85 % of S1" in line[0] for line in aimed.table.lines) and aimed.sheets
    (tmp_path / "report").mkdir()
    write_pages("x", list(sections.values()), tmp_path / "report")
    assert "../fewer/sheet-400.jpg" in (tmp_path / "report" / "RESULTS.html").read_text()
    assert other_reports(tmp_path, absent, absent) == []
