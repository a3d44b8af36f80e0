"""What runs say, in words: RESULTS.md, results.json (every figure of every run), the plots, and the runs themselves, packed."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from reproduction import plots, runs
from reproduction.experiments import BY_NAME, CLAIM_COLUMNS, CLAIMS, CLASS_WORD, COLUMNS, EXPERIMENTS, Experiment, Row, Rule
from reproduction.runs import Job, Settings
from reproduction.stats import NOT_SHOWN, NOTHING_FOUND, Finding, Records, judge, smallest_effect, spread_of_cells, values_of
from zoodip.files import write_atomically
from zoodip.records import environment, mean_interval, table

# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def number(value: float, score: str, sign: bool = False) -> str:
    return COLUMNS[score].number(value, sign)


def interval(mean: float, half_width: float, score: str, sign: bool = False) -> str:
    """Mean ± half width; of a single value just its figure."""
    text = number(mean, score, sign)
    return f"{text} ± {number(half_width, score)}" if np.isfinite(half_width) else text


def cell(values: list[float], score: str, published: float | None) -> str:
    """Ours with its interval, and where there is a published figure that and the difference."""
    if not values:
        return "-" if published is None else f"- (published {number(published, score)})"
    mean, half_width = mean_interval(values)
    text = number(mean, score) if COLUMNS[score].plain else interval(mean, half_width, score)
    if published is not None:
        text += f" (published {number(published, score)}, {number(mean - published, score, sign=True)})"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table_of(experiment: Experiment, rows: dict[str, Records]) -> str:
    """Rows as declared, then controls. A column that no run has is left out, unless it holds the only published figures."""
    declared = [*experiment.rows, *(Row(label) for label, _ in experiment.controls)]
    measured = {score for score in experiment.columns if any(values_of(records, score) for records in rows.values())}
    published = {score for score in experiment.columns if any(score in row.published for row in declared)}
    present = [score for score in experiment.columns if score in measured | (set() if measured & published else published)]
    lines = []
    for row in declared:
        records = rows[row.label]
        cells = [cell(values_of(records, score), score, row.published.get(score)) for score in present]
        scored = sum(any(score in record for score in present) for record in records.values())
        lines.append([row.label, str(scored), *cells])
    return table(["", "runs", *[COLUMNS[score].heading for score in present]], lines)


def grid_note(experiment: Experiment, rows: dict[str, Records]) -> str:
    """How far the cells of a grid lie apart, beside what noise alone would do; nothing where the runs do not say."""
    parts = []
    for score in experiment.columns:
        if spread := spread_of_cells(rows, score):
            between, noise = (f"{value:.{COLUMNS[score].digits + 1}f}".removeprefix("0") for value in spread)
            parts.append(f"{COLUMNS[score].heading} {between} ({noise})")
    return ("Standard deviation of the cells' means, and in brackets what the noise of single runs alone would give: "
            + "; ".join(parts) + ".") if parts else ""  # fmt: skip


def difference(finding: Finding, score: str) -> str:
    """A difference with its interval, the paper's and the verdict; where nothing was found, what could have been."""
    if score not in finding.differences:
        return "-"
    mean, half_width, count = finding.differences[score]
    text = interval(mean, half_width, score, sign=True)
    text += f" (published {number(finding.published[score], score, sign=True)})" if score in finding.published else ""
    if score in finding.verdicts:
        text += f": {finding.verdicts[score]}"
        if finding.verdicts[score] in (NOTHING_FOUND, NOT_SHOWN):
            text += f", {number(smallest_effect(half_width, count), score)} would have been"
    return text


def claims_table(findings: list[Finding]) -> str:
    shown = [score for score in CLAIM_COLUMNS if any(score in finding.differences for finding in findings)]
    lines = []
    for finding in findings:
        count = max(count for _, _, count in finding.differences.values())
        cells = [difference(finding, score) for score in shown]
        lines.append([finding.claim.text, f"**{finding.in_short()}**", *cells, str(count)])
    return table(["claim", "in short", *[COLUMNS[score].heading for score in shown], "pairs"], lines)


def claims_section(findings: list[Finding]) -> list[str]:
    rules: dict[Rule, list[str]] = {}
    for finding in findings:
        rules.setdefault(finding.claim.rule, []).append(finding.claim.text)
    decided = [f"- {', '.join(COLUMNS[score].heading for score in rule.scores)}: {rule.why} ({'; '.join(claims)})"
               for rule, claims in rules.items()]  # fmt: skip
    return ["## Claims", CLAIMS_NOTE, "What decides, and why:\n\n" + "\n".join(decided), claims_table(findings)]


CLAIMS_NOTE = f"""Each line is the difference of two rows with its 95 % interval, paired over the runs that both have, averaged
within a subject and then over subjects (of a single subject: over its seeds). "Beats", "helps", "fails", "loses" hold where the
interval lies on the better side of 0; "matches" and "suffices" where it lies on the better side of minus a tenth of what the
other row gained over the class word. A claim "does not" hold where the interval lies wholly on the other side. Where it lies on
both sides, "{NOTHING_FOUND}" (or "{NOT_SHOWN}") stands beside the smallest true difference that would have been found with a
chance of 80 %. "In short" is what at least one score says and none contradicts; with several scores on each of many claims,
expect an interval or two to mislead. Of losses, lower is better. Differences without a verdict are there to be read beside the
others. "Mean loss on the way there" is the mean of the learning curve over the forwards that every row of the table has used:
how fast it falls, where the ends are alike."""


CURVES_NOTE = ("Loss on the judging set (t in [500, 900)) against forwards used; bands are 95 % intervals after the runs' own "
               "levels are taken out.")  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def command_of(names: list[str], settings: Settings) -> str:
    """The command that makes these tables, as it is given again."""
    world, dry = settings.world, settings.dry_steps
    command = f"python -m reproduction.tables --world {world.name}" + " --quick" * settings.quick
    command += f" --dry_steps {dry}" if dry else ""
    command += f" --tables {' '.join(names)}" if names != default_names(settings) else ""
    implied = world.subjects[: 1 if dry else 2], world.seeds[:1]  # by --dry_steps and --quick
    for name, values in (("subjects", settings.subjects), ("seeds", settings.seeds)):
        if values and not ((settings.quick or dry) and values in implied):
            command += f" --{name} {' '.join(map(str, values))}"
    for name, value in settings.extra.items():
        command += f" --{name} {value}" if not isinstance(value, bool) else f" --{name}" if value else f" --no-{name}"
    return command


def default_names(settings: Settings) -> list[str]:
    """The tables of a world."""
    return [experiment.name for experiment in EXPERIMENTS if experiment.is_default_in(settings.world.name)]


def introduction(names: list[str], settings: Settings, jobs: list[Job], done: int) -> str:
    world, where = settings.world, environment()
    subjects = dict.fromkeys(job.spec["subject"] for job in jobs)
    hours = sum((runs.read_run(job.spec, settings) or {}).get("seconds", 0) for job in jobs) / 3600
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    text = [
        f"# Results: {world.name}",
        f"{done} of {len(jobs)} runs, {hours:.1f} hours of training in all (summed over processes that ran side by side). "
        f"Made by `{command_of(names, settings)}`, {where['device']}, commit {where['commit']}; {versions}.",
        "± is the half width of a 95 % interval (Student's t over subjects, each the mean of its seeds; of a single subject over "
        "its seeds, and then of that subject alone). Differences between rows are paired. Subjects: "
        f'{", ".join(subjects)}; the column "runs" says how many runs a row has. Scores are on {settings.images} pictures a '
        f"prompt, {settings.inference_steps} steps, guidance {world.guidance:g}.",
    ]
    if world.caveats:
        flags = runs.make_spec(settings, "zoodip", next(iter(subjects)), 0, {})["flags"]
        text.append(world.caveats.format(steps=f"{flags['max_train_steps']:,}", rate=f"{flags['learning_rate']:g}"))
    return "\n\n".join(text)


def write_report(names: list[str], jobs: list[Job], settings: Settings, folder: Path) -> None:
    """All of a report, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    collect = lru_cache(lambda name: runs.collect(BY_NAME[name], settings))
    done = sum(job.done(settings) for job in jobs)
    untrained = collect("1")[CLASS_WORD.label] if any(claim.rule.margin for claim in CLAIMS) else {}
    claims = [claim for claim in CLAIMS if claim.experiment in names]
    findings = [finding for claim in claims if (finding := judge(claim, collect(claim.experiment), untrained)) is not None]
    text = [introduction(names, settings, jobs, done)]
    text += claims_section(findings) if findings else []
    for experiment in (BY_NAME[name] for name in names):
        rows = collect(experiment.name)
        text += [f"## {experiment.heading}", table_of(experiment, rows), experiment.note]
        text.append(grid_note(experiment, rows) if experiment.one_seed else "")
        plot = experiment.plot
        if plot and plots.draw(plot, experiment.name, collect, settings, folder / "plots" / plot.file):
            text.append(f"![{experiment.name}](plots/{plot.file})")
    panels = {BY_NAME[name].curves: collect(name) for name in names if BY_NAME[name].curves}
    if panels:
        plots.draw_curves(panels, folder / "plots" / "curves.png")
        text += ["## Learning curves", CURVES_NOTE, "![curves](plots/curves.png)"]
    write_atomically(folder / "RESULTS.md", ("\n\n".join(part for part in text if part) + "\n").encode())
    everything = {name: {label: list(records.values()) for label, records in collect(name).items()} for name in names}
    write_atomically(folder / "results.json", (json.dumps(everything) + "\n").encode())
    runs.pack_runs(jobs, settings, folder / runs.ARCHIVE)
    print(f"{folder / 'RESULTS.md'}: {done} of {len(jobs)} runs done")
