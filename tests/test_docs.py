"""What the README and docs/ say is so: flags with their defaults, links, commands, dependencies, figures of the results."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import train_zoodip
from reproduction import archives, report
from reproduction.binding_report import cost_ratios, interval, read_records, tables_of
from reproduction.binding_rows import CORE
from reproduction.claims import CLAIMS
from reproduction.experiments import CLASS_WORD
from reproduction.runs import digest
from reproduction.stats import judge
from zoodip.records import ROOT, mean_interval

TRAINERS = sorted(path.stem for path in (ROOT / "trainers").glob("*.py") if path.stem != "__init__")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
REPORTS = sorted(ROOT.glob("reproduction/*/RESULTS.md"))
NAMES = {"PIL": "pillow", "pillow_heif": "pillow-heif"}  # what is imported under another name than it is installed under
COMMANDS = ("pip install -r requirements.txt && sh train_zoodip.sh demo", "pip install -r requirements.txt && python -m pytest")


# ----------------------------------------------------------------------------------------------------- flags


def load_flags():
    """The module docs/flags.py."""
    spec = importlib.util.spec_from_file_location("docs_flags", ROOT / "docs/flags.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_flags_are_what_help_says():
    flags = load_flags()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert page.read_text() == flags.fill(page.read_text()), f"{page.name}: run python -m docs.flags"


def test_every_flag_is_described():
    """ZOODiP's all in docs/flags.md; of another trainer those of its own, in any page."""
    described = re.findall(r"^\| `(--\w+)`", (ROOT / "docs/flags.md").read_text(), re.MULTILINE)
    expected = [action.option_strings[0] for action in train_zoodip.build_parser()._actions if action.dest != "help"]
    assert sorted(described) == sorted(expected)
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for trainer in TRAINERS:
        assert f"<!-- flags of trainers.{trainer}: method -->" in pages


# ----------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("page", PAGES + REPORTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Every relative link and picture exists, and every anchor is a heading, named as GitHub names it."""
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        target = "".join(target)
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{target}: no such heading"


def test_readme_is_short_and_gives_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 170
    for command in COMMANDS:
        assert lines.count(command) == 1  # alone on its line
        assert f'"{command}"' in (ROOT / ".ci/run").read_text()


# ----------------------------------------------------------------------------------------------------- dependencies


def requirements() -> dict[str, Requirement]:
    """The pins of requirements.txt by name."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-e "))]
    assert all(len(each.specifier) == 1 and str(each.specifier).startswith("==") for each in found)
    return {each.name: each for each in found}


def declared() -> dict[str, Requirement]:
    """The ranges of pyproject.toml, with those of its extras, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {each.name: each for each in map(Requirement, lines) if each.name != "zoodip"}


def test_pins_and_ranges_name_the_same_packages_and_agree():
    pins, ranges = requirements(), declared()
    assert pins.keys() == ranges.keys() - {"spacy"}  # nothing stands on it: pinned where it is declared
    for name, pin in pins.items():
        assert ranges[name].specifier.contains(next(iter(pin.specifier)).version), name
        assert ranges[name].extras == pin.extras


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    return found


def test_what_is_imported_is_declared():
    files = [path for folder in (".", "*") for path in ROOT.glob(f"{folder}/*.py")]
    ours = {path.stem for path in files} | {path.parent.name for path in files}
    names = {name for path in files for name in imported(path)} - ours - set(sys.stdlib_module_names)
    assert {"torch", "PIL"} <= names
    assert {NAMES.get(name, name) for name in names} - declared().keys() <= {"packaging"}  # which pytest brings


# ----------------------------------------------------------------------------------------------------- figures


def test_results_in_the_readme_are_those_of_the_record():
    """Its table of results, and its figures of time and memory, computed anew from the records."""
    readme = (ROOT / "README.md").read_text()
    table = json.loads((ROOT / "reproduction/evidence/results.json").read_text())["Gap"]
    names = {
        "class word (untrained)": "| the ordinary word, before training |",
        "ZOODiP": "| **ZOODiP**, 1,000 steps of 3 forward passes |",
        "TI, converged": "| textual inversion with gradients, same 4-bit model and captions, converged |",
        "true description (untrained)": "| for comparison: the subject described in the model's own words |",
    }

    def values(name: str, key: str) -> np.ndarray:
        return np.array([run[key] for run in sorted(table[name], key=lambda run: run["spec"]["subject"])])

    start, ours, gradients, described = (values(name, "loss") for name in names)
    assert len(start) == len(ours) == len(gradients) == len(described) == 12
    closed = {name: mean_interval(list(100 * (start - loss) / (start - gradients)))
              for name, loss in (("ours", ours), ("described", described))}  # fmt: skip
    share = {name: f"{mean:.1f} ± {half_width:.1f} %" for name, (mean, half_width) in closed.items()}
    gaps = ("0 %", f"**{share['ours']}**", "100 %", share["described"])
    for name, gap in zip(names, gaps, strict=True):
        loss, clip, right = (values(name, key).mean() for key in ("loss", "CLIP-I", "attributes"))
        expected = f"{names[name]} {loss:.4f} | {gap} | {clip:.3f} | {100 * right:.0f} % |".replace("| 0.", "| .")
        assert expected in readme.splitlines()

    sd15 = json.loads((ROOT / "benchmarks/speed_memory.json").read_text())["results"]["sd15 bf16"]
    seconds = {name: float(np.median(times)) for name, times in sd15["time"].items()}
    gigabytes = {name: max(sd15["memory"][name]["bytes"]["peaks"].values()) / 1e9 for name in ("zoodip", "authors")}
    pictures = json.loads((ROOT / "benchmarks/pictures.json").read_text())["results"]["bf16"]["bytes"]["in strips"] / 1e9
    text = " ".join(readme.split())
    assert f"and the pictures at the end {pictures:.2f} ([record]" in text
    assert f"a step takes {seconds['zoodip']:.1f} seconds, and loading and training need {gigabytes['zoodip']:.2f} GB" in text
    assert f"INT8 weights takes {seconds['authors']:.1f} seconds and {gigabytes['authors']:.1f} GB" in text
    assert f"on the same 4-bit model {seconds['ti']:.1f} seconds" in text


def test_binding_in_the_readme_is_that_of_the_record():
    records = read_records(ROOT / "reproduction/binding/records.json.xz")
    tables = tables_of(records["pictures"], CORE)
    words, learned = (
        {row: interval(tables[name, "none"].means(row, "right").values()) for row in ("phrase", "plain", "full")}
        for name in ("S1", "S2")
    )
    ratio = np.mean(cost_ratios(records["costs"])["phrase"])
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"at {ratio:.2f} times the cost of a plain picture" in text
    assert (
        f"Of the miniature's test pictures, {words['phrase']} % have both colours right (a plain prompt: {words['plain']}; "
        f"token merging, ToMe, with its losses: {words['full']}), and {learned['phrase']} % if one creature is a learned word "
        f"({learned['plain']}; {learned['full']})"
    ) in text


def test_every_claim_about_likeness_is_quoted_as_the_record_has_it():
    """Judged anew from the figures of the runs."""
    record = json.loads((ROOT / "reproduction/evidence/results.json").read_text())
    rows = {
        table: {
            row: {(run["spec"]["subject"], run["spec"]["seed"]): run for run in runs if "spec" in run}  # a control has none
            for row, runs in found.items()
        }
        for table, found in record.items()
    }
    pages = ("reproduction/README.md", "docs/weight_tuning.md")
    text = " ".join(word for page in pages for word in (ROOT / page).read_text().split())
    quoted = 0
    for claim in CLAIMS:
        finding = judge(claim, rows[claim.experiment], rows["1"][CLASS_WORD.label])
        if finding is None or finding.score != "CLIP-I" or finding.unit != "subjects":
            continue
        mean, half_width, _ = finding.differences["CLIP-I"]
        difference = report.interval(mean, half_width, "CLIP-I", sign=True)
        assert difference in text, (claim.text, difference)
        quoted += 1
    assert quoted > 40


def test_costs_in_words_are_those_of_the_record():
    """Ratios of medians over the rounds of Table 2."""
    record = json.loads((ROOT / "reproduction/evidence/results.json").read_text())["2"]
    assert {len(runs) for runs in record.values()} == {5}
    speed = {row: np.median([run["steps_per_second"] for run in runs]) for row, runs in record.items()}
    ours, unquantised = speed["ZOODiP, INT8, n = 2"], speed["ZOODiP, not quantised, n = 2"]
    text = " ".join((ROOT / "reproduction/README.md").read_text().split())
    assert f"({ours / speed['TuneQDM']:.1f} and {ours / speed['GF-TI, INT8']:.1f} times as fast; the paper" in text
    assert f"({speed['ZOODiP, INT8, n = 1'] / ours:.1f} times; the paper: 1.3)" in text
    assert f"({ours / unquantised:.2f} of the speed; the paper: .88;".replace("0.", ".") in text
    assert f"({unquantised / speed['TI, 16/32-bit weights, fp32']:.2f}; the paper: 1.95;".replace("0.", ".") in text


def test_lengths_of_words_are_those_of_the_record():
    """Means over breeds at the end of the runs."""
    record = json.loads((ROOT / "reproduction/evidence/results.json").read_text())["1"]
    archived = archives.read_archive(ROOT / "reproduction/evidence" / archives.ARCHIVE)
    names = ("TI, ZOODiP's weights, captions, timesteps", "ZOODiP")
    files = ([archived[digest(run["spec"])]["result.json"] for run in record[name]] for name in names)
    gradients, ours = (np.mean([json.loads(file)["curve"][-1]["token_norm"] for file in of]) for of in files)
    text = " ".join((ROOT / "reproduction/README.md").read_text().split())
    assert f"TI's vector is not longer ({gradients:.2f}, ZOODiP's {ours:.2f};" in text


def test_commands_run_from_a_clone():
    """A module's path as the command would look for the package beside the module, and fail where nothing is installed."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*"), *ROOT.glob("*/README.md")]
    sources = [
        path
        for folder in ("trainers", "benchmarks", "reproduction", "miniature", "zoodip")
        for path in ROOT.glob(f"{folder}/*.py")
    ]
    for path in (path for path in (*pages, *sources) if path.suffix in (".md", ".py")):
        assert not re.search(r"python (trainers|benchmarks|reproduction|miniature|docs|zoodip)/", path.read_text()), path
        for name in re.findall(r"python -m ((?:trainers|benchmarks|reproduction|miniature|docs|zoodip)\.\w+)", path.read_text()):
            assert (ROOT / (name.replace(".", "/") + ".py")).is_file(), (path, name)


def test_the_archive_has_as_many_runs_as_the_page_says():
    """A run counts if it has its specification and its result."""
    runs = archives.read_archive(ROOT / "reproduction/evidence" / archives.ARCHIVE).values()
    whole = [files for files in runs if {"spec.json", "result.json"} <= files.keys()]
    assert f"has all {len(whole):,} runs," in " ".join((ROOT / "reproduction/README.md").read_text().split())


def test_runs_made_again_differ_as_the_page_says():
    """From those of the record, which another machine made."""
    evidence = ROOT / "reproduction/evidence"
    table = json.loads((evidence / "results.json").read_text())["5"]
    recorded = {digest(run["spec"]): run["CLIP-I"] for runs in table.values() for run in runs}
    again = json.loads((evidence / "elsewhere.json").read_text())["runs"]
    differences = np.array([run["CLIP-I"] - recorded[run["run"]] for run in again])
    size, rms = np.abs(differences), np.sqrt(np.square(differences).mean())
    mean, most, bias, rms = (
        report.number(value, "CLIP-I", sign)
        for value, sign in ((size.mean(), False), (size.max(), False), (differences.mean(), True), (rms, False))
    )
    text = " ".join((ROOT / "reproduction/README.md").read_text().split())
    assert f"differs by {mean} on average and by {most} at most, in both directions (mean {bias})" in text
    assert f"here {rms})" in text
