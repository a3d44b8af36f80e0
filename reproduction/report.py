"""Writes the report: RESULTS.md and RESULTS.html with plots and sheets of pictures, results.json, and the packed runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from reproduction import archives, plans, plots, runs
from reproduction.claims import CLAIMS, OTHERS, OURS, Claim
from reproduction.declarations import CLAIM_COLUMNS, COLUMNS, Experiment, Row
from reproduction.experiments import BY_NAME, CLASS_WORD, EXPERIMENTS
from reproduction.memory_claims import memory_claims
from reproduction.other_reports import other_reports
from reproduction.pages import Image, Section, Table, in_words, shortened, write_pages
from reproduction.rates import rates_note
from reproduction.runs import Job, Settings
from reproduction.stats import (
    CONTRADICTED,
    NOTHING_FOUND,
    REPRODUCED,
    SIGNALS,
    STOPS,
    TOO_FEW,
    UNDECIDED,
    Finding,
    Records,
    judge,
    paired_differences,
    printed_spread,
    signals,
    smallest_effect,
    spread_of_seeds,
    survivors,
    values_of,
)
from zoodip.files import write_atomically
from zoodip.records import mean_interval, plain_arguments

# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def number(value: float, score: str, sign: bool = False) -> str:
    return COLUMNS[score].number(value, sign)


def interval(mean: float, half_width: float, score: str, sign: bool = False) -> str:
    """Mean ± half width; just the mean for a single value, and for values that cannot vary."""
    text = number(mean, score, sign)
    return f"{text} ± {number(half_width, score)}" if np.isfinite(half_width) and half_width > 0 else text


def cell(values: list[float], score: str, published: float | None, published_for: str = "") -> str:
    """Our figure with its interval and, if there is one, the published figure, with the setting that only it has."""
    if not values:
        text = "-"
    elif COLUMNS[score].plain:
        mean, (low, high) = float(np.median(values)), (number(min(values), score), number(max(values), score))
        text = number(mean, score) + (f" [{low} to {high}]" if low != high else "")
    else:
        mean, half_width = mean_interval(values)
        text = interval(mean, half_width, score)
    if published is not None:
        text += f" (published {number(published, score)}{f', for {published_for}' if published_for else ''})"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def declared_rows(experiment: Experiment) -> list[Row]:
    """Rows as declared, then those without runs of their own.

    The row whose runs are stopped early is left out: it is scored on other pictures than the rows that say where to stop.
    """
    rows = [row for row in experiment.rows if row.label != experiment.stops]
    labels = [*(STOPS if experiment.stops else ()), *(control.label for control in experiment.controls)]
    return [*rows, *map(Row, labels)]


def table_of(experiment: Experiment, rows: dict[str, Records]) -> Table:
    """A column that no run has is left out, unless only such columns hold published figures."""
    declared = declared_rows(experiment)
    measured = {score for score in experiment.columns if any(values_of(records, score) for records in rows.values())}
    published = {score for score in experiment.columns if any(score in row.published for row in declared)}
    present = [score for score in experiment.columns if score in measured | (set() if measured & published else published)]
    lines, controls = [], {control.label for control in experiment.controls}
    for row in declared:
        records = rows.get(row.label, {})
        cells = [cell(values_of(records, score), score, row.published.get(score), row.published_for) for score in present]
        scored = str(sum(any(score in record for score in present) for record in records.values()))
        lines.append([row.label, "-" if row.label in controls else scored, *cells])
    return Table(["", "runs", *[COLUMNS[score].heading for score in present]], lines)


def grid_note(experiment: Experiment, rows: dict[str, Records]) -> str:
    """The spread of a grid's cells, beside what noise alone would give; empty if the runs cannot tell."""
    parts = []
    for score in experiment.columns:
        if spread := printed_spread(rows, score):
            parts.append(f"{COLUMNS[score].heading} {spread[0]} ({spread[1]})")
    return ("Standard deviation of the cells' means and, in brackets, what would be expected if no cell were better, "
            "from how single runs vary (noise, and breeds that prefer different cells): "
            + "; ".join(parts) + ".") if parts else ""  # fmt: skip


def seeds_note(experiment: Experiment, rows: dict[str, Records]) -> str:
    """Standard deviations over seeds within a subject and over subjects, if a table has several seeds."""
    parts = []
    for label, records in rows.items():
        for score in experiment.columns:
            if spread := spread_of_seeds(records, score):
                within, between, _ = spread
                digits = COLUMNS[score].digits
                parts.append(f"{label}, {COLUMNS[score].heading}: {within:.{digits}f} and {between:.{digits}f}")
    return ("Standard deviation over the seeds of one subject, and over the subjects' means: " + "; ".join(parts) + "."
            ) if parts else ""  # fmt: skip


def differences_of(experiment: Experiment, rows: dict[str, Records]) -> Table | None:
    """Paired differences of rows from the row that each names, or that the table names; None if no runs can be paired."""
    scores = [score for score in experiment.columns if not COLUMNS[score].plain]
    pairs = {row.label: row.against or experiment.against for row in declared_rows(experiment)}
    found = {(row, score): paired_differences(rows.get(row, {}), rows.get(other, {}), score)
             for row, other in pairs.items() if other not in (None, row) for score in scores}  # fmt: skip
    shown = [score for score in scores if any(values for (_, of), values in found.items() if of == score)]
    compared = dict.fromkeys(row for (row, _), values in found.items() if values)  # in the order of the rows
    name = "{0}" if experiment.against else "{0} - {1}"
    lines = [[name.format(row, pairs[row]), *[difference_of(found[row, score], score) for score in shown]] for row in compared]
    return Table(["", *[COLUMNS[score].heading for score in shown]], lines) if lines else None


def difference_of(values: list[float], score: str) -> str:
    """The interval of paired differences and, if it contains 0, the smallest true difference that would have been seen."""
    if not values:
        return "-"
    mean, half_width = mean_interval(values)
    text = interval(mean, half_width, score, sign=True)
    seen = would_be_seen(mean, half_width, len(values), score)
    return text + (f" ({seen})" if seen else "")


def would_be_seen(mean: float, half_width: float, count: int, score: str) -> str:
    """The smallest true difference that an interval would have shown if it contains 0 and, so that this is known, has a width."""
    found_nothing = half_width > 0 and abs(mean) <= half_width < np.inf
    return f"{number(smallest_effect(half_width, count), score)} would be seen" if found_nothing else ""


def signals_note(experiment: Experiment, rows: dict[str, Records]) -> str:
    """Whether a cheaper signal shows when pictures get worse."""
    parts = []
    for score in ("CLIP-I", "attributes"):
        for name, (mean, half_width) in signals(rows.get(experiment.stops or "", {}), score).items():
            width = f" ± {half_width:.2f}" if np.isfinite(half_width) else ""
            parts.append(f"{SIGNALS[name]} with {COLUMNS[score].heading} {mean:+.2f}{width}")
    return ("Rank correlation along a run, from its first snapshot on, of signals with scores of pictures (a loss that always "
            "falls as pictures get better has -1; CLIP-I of other pictures, the only signal that needs pictures, shows how much "
            "could be seen): " + "; ".join(parts) + ".") if parts else ""  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------------


def said(finding: Finding) -> str:
    """The verdict in words: nobody claimed what we ask, so its answer is yes or no."""
    answers = {REPRODUCED: "yes", CONTRADICTED: "no"} if finding.claim.source == OURS else {}
    return answers.get(finding.verdict, finding.verdict)


def sentence(finding: Finding, world: str) -> str:
    """A claim and its verdict, in one line of plain English.

    A published difference is compared with the interval only if both are measured alike: on the miniature another CLIP scores
    other pictures, and a speed is a machine's.
    """
    claim, score = finding.claim, finding.score
    mean, half_width, count = finding.differences[score]
    unit = finding.unit if count != 1 else finding.unit.removesuffix("s")
    measure = claim.rule.measure.format(COLUMNS[score].heading)
    known = [f"{measure} differs by {interval(mean, half_width, score, sign=True)} over {count} {unit}"]
    if finding.above is not None and count > 1:
        known[0] += f", {finding.above} of them above 0"
    if count == 2:
        known.append("an interval of one degree of freedom")
    published = finding.published.get(score)
    if published is not None and (world == "miniature" or score == "steps_per_second"):
        known.append(f"the paper: {number(published, score, sign=True)}")
    elif published is not None:
        inside = abs(published - mean) <= half_width
        known.append(f"the paper's {number(published, score, sign=True)} is {'in' if inside else 'outside'} this interval")
        digits = COLUMNS[score].digits  # compared as printed
        if inside and finding.verdict == NOTHING_FOUND and round(abs(published), digits) < round(finding.smallest, digits):
            known[-1] += ", but too small to be seen with these runs"
    if finding.margin is not None:
        known.append(f"as good is no more than {number(finding.margin, score)} worse")
    if finding.mixed:
        known.append(f"{finding.mixed} of {count} pairs {'was' if finding.mixed == 1 else 'were'} made on two machines")
    than = f"; one larger than {number(finding.smallest, score)} would probably have shown" * (finding.verdict == NOTHING_FOUND)
    asked = "?" if finding.verdict in (NOTHING_FOUND, UNDECIDED, TOO_FEW) else ""
    return f"**{said(finding)}{than}**: {claim.text}{asked} ({'; '.join(known)})." + f" {claim.remark}".rstrip()


# scores that say nothing about claims that they do not decide
OF_ONE_TABLE = ("DINO_inter", "CLIP_inter", "removed", "steps_per_second", "stored_kb")


def difference(finding: Finding, score: str) -> str:
    """A difference with its interval and the paper's; for the deciding score also the smallest that would have been seen."""
    if score not in finding.differences or (score in OF_ONE_TABLE and score != finding.score):
        return "-"
    mean, half_width, count = finding.differences[score]
    text = interval(mean, half_width, score, sign=True)
    if score == finding.score and finding.margin is None and (seen := would_be_seen(mean, half_width, count, score)):
        text += f", {seen}"
    text += f" (published {number(finding.published[score], score, sign=True)})" if score in finding.published else ""
    return f"**{text}**" if score == finding.score else text


def claims_table(findings: list[Finding]) -> Table:
    shown = [score for score in CLAIM_COLUMNS if any(difference(finding, score) != "-" for finding in findings)]
    lines = [[f"{finding.claim.text} ({BY_NAME[finding.claim.experiment].heading.partition(':')[0]}: {finding.claim.a} - "
              f"{finding.claim.b})",
              said(finding), *[difference(finding, score) for score in shown]] for finding in findings]  # fmt: skip
    return Table(["claim", "", *[COLUMNS[score].heading for score in shown]], lines)


def claims_section(findings: list[Finding], unjudged: list[str], world: str) -> Section:
    """`unjudged`: one line for each claim without a finding."""
    rules: dict[str, list[str]] = {}
    for finding in findings:
        rule = finding.claim.rule
        why = f"{' or '.join(COLUMNS[score].heading for score in rule.scores)}: {rule.why}"
        rules.setdefault(why, []).append(finding.claim.text)
    decided = [f"{why} ({'; '.join(texts)})" for why, texts in rules.items()]
    order = (REPRODUCED, CONTRADICTED, UNDECIDED)
    ranked = sorted(findings, key=lambda finding: order.index(finding.verdict) if finding.verdict in order else len(order))
    sources = dict.fromkeys(claim.source for claim in CLAIMS)  # in the order of their first claims
    same, lines = same_runs(findings), []
    for source in sources:
        for finding in ranked:
            if finding.claim.source == source:
                again = same.get(finding.claim.text)
                line = sentence(finding, world) + (f' These are the runs of "{again}".' if again else "")
                lines.append(line + ("" if source == Claim.source else f" [{source}]"))
    return Section("Verdicts on the claims", [CLAIMS_NOTE], table=claims_table(findings), bullets=[*lines, *unjudged],
                   after=[MORE_ON_CLAIMS, several_note(findings), "Which score decides, and why:"],
                   after_bullets=decided)  # fmt: skip


def not_judged(claim: Claim, settings: Settings) -> str:
    """Why a claim has no finding. The best other row is chosen on other runs of each cell, which a single run does not leave."""
    experiment, why = BY_NAME[claim.experiment], "for lack of runs"
    if claim.b == OTHERS and len(plans.subjects_of(experiment, settings)) == len(plans.seeds_of(experiment, settings)) == 1:
        why = "as one run per cell cannot decide it; give --seeds"
    return f"**not judged**, {why}: {claim.text}."


def same_runs(findings: list[Finding]) -> dict[str, str]:
    """{claim: an earlier claim that the same runs decide}: two rows can have the same settings, such as two rates."""
    first: dict[tuple, str] = {}
    result = {}
    for finding in findings:
        text, rows = finding.claim.text, (finding.score, *sorted(finding.differences.items()))
        if first.setdefault(rows, text) != text:
            result[text] = first[rows]
    return result


def several_note(findings: list[Finding]) -> str:
    """What a correction for the number of claims would change; it decides nothing."""
    same = same_runs(findings)
    judged = [finding for finding in findings if finding.verdict != TOO_FEW and finding.claim.text not in same]
    kept = survivors([finding.p for finding in judged])
    decided = [finding.verdict in (REPRODUCED, CONTRADICTED) for finding in judged]
    lost = [finding.claim.text for finding, is_kept, is_decided in zip(judged, kept, decided, strict=True)
            if is_decided and not is_kept]  # fmt: skip
    text = (f"One 95 % interval in twenty misses the true value: among the {len(judged)} claims that were judged, about "
            f"{max(1, round(len(judged) / 20))}. Many claims share the runs of a row, so errors come together; the intervals of "
            "scores that decide nothing are not counted.")  # fmt: skip
    if not any(decided):
        return text
    text += f" With Holm's correction for all of these claims, {sum(decided) - len(lost)} of the {sum(decided)} decided verdicts "
    text += "would still be significant"
    return text + (f"; not: {'; '.join(lost)}." if lost else ".")


CLAIMS_NOTE = """A claim is from ZOODiP's paper unless another source is named, and is about the difference between two rows. It
is reproduced if the 95 % interval of that difference lies above 0, contradicted if it lies below, and no difference was found
if the interval contains 0: whatever it contains remains possible. "One larger than X would probably have shown" means that
these runs would have shown a true difference of X with a probability of 80 %. "As good" is judged in the same way against minus
a tenth of what the other row gained over the class word, and is not decided if the interval contains that value. Such an
interval may lie wholly below 0: then the row is worse, and it is open only whether by more than that tenth. Our own questions
are answered with yes or no."""

MORE_ON_CLAIMS = """A subject's seeds are averaged, and the rows are then paired over subjects (for a single subject: over its
seeds or rounds). One score decides a claim, chosen before the runs (bold in the table); all others are given for comparison.
For losses, drift and similarity of pictures of one prompt (DINO_inter, CLIP_inter), lower is better. The tenth that "as good"
may give up is measured on the same runs, and its own error is not counted. "The best other row" is chosen on the other
subjects. "Made on two machines" means that the pair's runs differ in device or in versions of the libraries. Rounds are of one
machine, and their intervals hold for it alone. "Mean loss on the way there" is the mean of the learning curve over the forwards
that every row has used."""


MEMORY_NOTE = """What nvidia-smi shows on a GPU for each method's own script at Stable Diffusion v1.5's size, with 512 pixels,
batch size 1 and random weights. The figures come from a separate record, `benchmarks/gpu.json`, and not from runs of this suite.
There is one run of each. "Reproduced" means that our ratio is at most a quarter above the paper's; this bound was set after the
record was made."""

CURVES_NOTE = ("Loss on the judging set (t in [500, 900)), and scores of the snapshots' pictures, against forwards used; bands "
               "are 95 % intervals after each subject's own level is taken out. Only the runs of Tables 1 and Stop have pictures "
               "of their snapshots, fewer than the tables score; in the other plots, a single line of scores is the default run, "
               "which is also in Table 1.")  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def command_of(names: list[str], settings: Settings) -> str:
    """The command that makes these tables again."""
    world, dry = settings.world, settings.dry_steps
    command = f"python -m reproduction.tables --world {world.name}" + " --quick" * settings.quick
    command += f" --dry_steps {dry}" if dry else ""
    command += f" --tables {' '.join(names)}" if names != default_names(settings) else ""
    implied = world.subjects[: 1 if dry else 2], world.seeds[:1]  # implied by --dry_steps and --quick
    for name, values in (("subjects", settings.subjects), ("seeds", settings.seeds)):
        if values and not ((settings.quick or dry) and values in implied):
            command += f" --{name} {' '.join(map(str, values))}"
    for name, value in (plain_arguments(settings.given) | settings.extra).items():
        command += f" --{name} {value}" if not isinstance(value, bool) else f" --{name}" if value else f" --no-{name}"
    return command


def default_names(settings: Settings) -> list[str]:
    """The tables of a world."""
    return [experiment.name for experiment in EXPERIMENTS if experiment.is_default_in(settings.world.name)]


def introduction(names: list[str], settings: Settings, jobs: list[Job], done: int) -> Section:
    world = settings.world
    subjects = dict.fromkeys(job.spec["subject"] for job in jobs)
    records = [record for job in jobs if (record := runs.read_run(job.spec, settings)) is not None]
    hours = sum(record.get("seconds", 0) for record in records) / 3600
    commits = sorted({shortened(commit) for record in records for commit in record["commits"]}) or ["unknown"]
    machines = [json.loads(machine) for record in records for machine in record["machines"]]
    devices = " and ".join(sorted({device for device, _ in machines}))
    versions = "; or ".join(sorted({", ".join(map(" ".join, packages.items())) for _, packages in machines}))
    text = [
        f"{done} of {len(jobs)} runs, {hours:.1f} hours of training in all (summed over processes that ran side by side). "
        f"Made by `{command_of(names, settings)}` on {devices}, {in_words(commits)}; {versions}. The tokens, curves "
        f"and scores of every run are in `{archives.ARCHIVE}`, but not tuned weights, which are too large: `--report_only` makes "
        "this report from it, and `--redraw` the pictures of tokens.",
        "± is the half width of a 95 % interval (Student's t over subjects, each the mean of its seeds; for a single subject "
        "over its seeds, and then valid for that subject alone). Differences between rows are paired. Subjects: "
        f'{", ".join(subjects)}; the column "runs" gives the number of runs of a row. Steps, costs and other figures that '
        "hardly vary are medians [lowest to highest]. "
        f"Scores are of {settings.images} pictures per prompt, drawn with {settings.inference_steps} steps of {world.scheduler} "
        f"and guidance {world.guidance:g}.",
    ]
    bullets = []
    if world.caveats:
        flags = runs.make_spec(settings, "zoodip", next(iter(subjects)), 0, {})["flags"]
        caveats = world.caveats.format(steps=f"{flags['max_train_steps']:,}", rate=f"{flags['learning_rate']:g}")
        first, *bullets = (" ".join(part.split()) for part in re.split(r"\n+- ", caveats))
        text.append(first)
    return Section("", text, bullets)


def section_of(experiment: Experiment, collect: plots.Collect, settings: Settings, folder: Path) -> Section:
    """A table with its notes, its plot and the sheets of its rows."""
    rows = collect(experiment.name)
    chosen = any(row.rate_of and not row.of_grid for row in experiment.rows)
    notes = [experiment.note, rates_note(settings) if chosen else "", grid_note(experiment, rows) if experiment.grid else "",
             seeds_note(experiment, rows), signals_note(experiment, rows), machines_note(experiment, settings)]  # fmt: skip
    section = Section(experiment.heading, [], table=table_of(experiment, rows), after=[note for note in notes if note])
    subjects = plans.subjects_of(experiment, settings)
    if subjects != (settings.subjects or (() if settings.world.paper_subjects else settings.world.subjects)):
        section.after.append(f"Subjects of this table: {', '.join(subjects)}.")
    if differences := differences_of(experiment, rows):
        of = f'Differences from the row "{experiment.against}"' if experiment.against else "Differences between two rows"
        section.after.append(f"{of}, paired by {'subject' if len(subjects) > 1 else 'seed'}:")
        section.after_table = differences
    plot = experiment.plot
    if plot and plots.draw(plot, experiment.name, collect, settings, folder / "plots" / plot.file):
        section.images.append(Image(experiment.name, f"plots/{plot.file}"))
    for row in experiment.rows:
        if experiment.kind in ("scores", "inter") and not row.spread_of and (records := rows[row.label]):
            kind = "best" if row.at == "best" else experiment.kind
            specs = [record["spec"] for record in records.values()]
            name = f"sheets/{runs.digest(dict(kind=kind, specs=specs))}.jpg"  # tables that share a row share its sheet
            if plots.row_sheet(records, settings, kind, folder / name):
                section.sheets.append(Image(row.label, name))
    return section


def machines_note(experiment: Experiment, settings: Settings) -> str:
    """A warning if a table's speed and memory were measured on several machines."""
    jobs_of = plans.jobs_of if experiment.kind == "cost" else plans.cost_jobs
    jobs = [job for row in experiment.rows for job in jobs_of(experiment, row, settings)]
    records = [record for job in jobs if (record := runs.read_run(job.spec, settings)) is not None]
    machines = {machine for record in records for machine in record["machines"]}
    devices = sorted({json.loads(machine)[0] for machine in machines})
    return (f"Speed and memory were measured on {len(machines)} machines ({', '.join(devices)}), so rows need not be comparable "
            "in them.") if len(machines) > 1 else ""  # fmt: skip


def sheets_of(page: Path) -> dict[str, set[str]]:
    """{title of a section, up to its colon: the sheets that it shows} of a RESULTS.md; empty if there is none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    sections = (section.partition("\n") for section in re.split("^## ", text, flags=re.MULTILINE)[1:])
    return {title.partition(":")[0]: set(re.findall(r"\((sheets/\w+\.jpg)\)", content)) for title, _, content in sections}


def write_report(names: list[str], jobs: list[Job], settings: Settings, folder: Path) -> None:
    """Write the whole report into `folder`. What is there of other tables stays: their runs in the archive, and their sheets."""
    folder.mkdir(parents=True, exist_ok=True)
    collect = lru_cache(lambda name: plans.collect(BY_NAME[name], settings))
    done = sum(job.done(settings) for job in jobs)
    untrained = collect("1")[CLASS_WORD.label] if any(claim.rule.margin for claim in CLAIMS) else {}
    claims = [claim for claim in CLAIMS if claim.experiment in names]
    findings = {claim: judge(claim, collect(claim.experiment), untrained) for claim in claims}
    sections = [introduction(names, settings, jobs, done)]
    if any(findings.values()):
        unjudged = [not_judged(claim, settings) for claim, finding in findings.items() if finding is None]
        judged = [finding for finding in findings.values() if finding is not None]
        sections.append(claims_section(judged, unjudged, settings.world.name))
    if {"2", "S10"} & set(names) and settings.world.name == "miniature":  # the other world measures its own memory
        sections.append(Section("Memory", [MEMORY_NOTE], bullets=memory_claims()))
    sections += [section_of(BY_NAME[name], collect, settings, folder) for name in names]
    if "1" in names and settings.world.name == "miniature":
        sections += other_reports(folder)
    panels = {BY_NAME[name].curves: last_tokens(BY_NAME[name], collect) for name in names if BY_NAME[name].curves}
    if panels:
        plots.draw_curves(panels, settings.world.judged_on, folder / "plots" / "curves.png")
        sections.append(Section("Learning curves", [CURVES_NOTE], images=[Image("curves", "plots/curves.png")]))
    before, titles = sheets_of(folder / "RESULTS.md"), {BY_NAME[name].heading.partition(":")[0] for name in names}
    shown = {sheet.path for section in sections for sheet in section.sheets}
    shown |= {sheet for title, sheets in before.items() if title not in titles for sheet in sheets}
    for sheet in set().union(*before.values()) - shown:  # stale: its row has more runs by now
        (folder / sheet).unlink(missing_ok=True)
    write_pages(f"Results: {settings.world.name}", sections, folder)
    everything = {name: {label: list(map(figures_of, records.values())) for label, records in collect(name).items()}
                  for name in names}  # fmt: skip
    write_atomically(folder / "results.json", (json.dumps(everything) + "\n").encode())
    archives.pack_runs(jobs, settings, folder / archives.ARCHIVE)
    print(f"{folder / 'RESULTS.md'}, RESULTS.html: {done} of {len(jobs)} runs done")


def last_tokens(experiment: Experiment, collect: Callable[[str], dict[str, Records]]) -> dict[str, Records]:
    """The rows of a table whose curves are not those of another row."""
    rows = collect(experiment.name)
    return {row.label: rows[row.label] for row in experiment.rows if row.at == "last"}


def figures_of(record: dict) -> dict:
    """What the tables use of a record; curves and environments are in the archive, once per run."""
    left_out = ("curve", "versions", "python", "device", "machines", "removed_shares")
    return {name: value for name, value in record.items() if name not in left_out}
