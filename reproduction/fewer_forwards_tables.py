"""The reports of `fewer_forwards.py`: the rule of its verdicts, the aims, the notes on the search, the tables of the measures.

Results have the form {label of a form: {budget: {(subject, seed): scores}}}, as `fewer_forwards.collect` returns them and
`read_found` reads them back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from reproduction.declarations import COLUMNS
from reproduction.fewer_forwards_forms import BESIDE, BUDGETS, CHOSEN_AT, DEFAULT, END, GRADIENTS, IN_TABLES, RIVALS, START, Form
from reproduction.pages import Table
from reproduction.stats import Records, by_subject, paired_differences, values_of
from zoodip.files import write_json
from zoodip.records import environment, mean_interval, table

# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


def write_found(path: Path, found: dict, commits: list[str]) -> None:
    """Write the results and the commits of the code that made them, as JSON."""
    plain = {label: {str(budget): [dict(record, subject=subject, seed=seed) for (subject, seed), record in records.items()]
                     for budget, records in of.items()} for label, of in found.items()}  # fmt: skip
    write_json(path, dict(found=plain, commits=commits, **environment()), indent=1)


def read_found(path: Path) -> tuple[dict, list[str]]:
    """Read what `write_found` wrote."""
    content = json.loads(path.read_text())
    found = {label: {int(budget): {(record["subject"], record["seed"]): record for record in records}
                     for budget, records in of.items()} for label, of in content["found"].items()}  # fmt: skip
    return found, content["commits"]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

WINS, TIES, LOSES, UNKNOWN = "wins", "ties", "loses", "too few breeds"
PICTURES = ("attributes", "CLIP-I")
JUDGED = ("loss", *PICTURES, "CLIP-T", "scene", "accessory")
as_score = COLUMNS["CLIP-I"].number  # three digits, for attributes and all other scores between 0 and 1


def verdict(differences: list[float], lower_is_better: bool = False) -> str:
    """The rule, the same at every budget, on the 95 % interval of the breeds' paired differences.

    A method wins (loses) if the interval lies wholly on the better (worse) side of 0, and ties if the interval contains 0.
    """
    if not differences:
        return UNKNOWN
    mean, half_width = mean_interval(differences)
    if not math.isfinite(half_width):
        return UNKNOWN
    mean = -mean if lower_is_better else mean
    return WINS if mean - half_width > 0 else LOSES if mean + half_width < 0 else TIES


def in_pictures(verdicts: dict[str, str]) -> str:
    """One verdict from the scores of PICTURES: what one says and the other does not contradict."""
    said = {verdicts[score] for score in PICTURES if score in verdicts}
    if {WINS, LOSES} <= said:
        return "the scores disagree"
    return next((word for word in (LOSES, WINS, TIES) if word in said), UNKNOWN)


def gap_at(curve: dict[int, Records], forwards: float) -> dict[tuple[str, int], float]:
    """The share of the gap that each run has closed at `forwards`, linear between its judged points and 0 at the start."""
    gaps: dict[tuple[str, int], dict[int, float]] = {}
    for budget, records in curve.items():
        for run, record in records.items():
            if "gap" in record:
                gaps.setdefault(run, {0: 0.0})[budget] = record["gap"]
    return {run: float(np.interp(forwards, sorted(of), [of[at] for at in sorted(of)])) for run, of in gaps.items()
            if max(of) >= forwards}  # fmt: skip


def aims(found: dict, ours: str) -> list[tuple[str, str, bool | None]]:
    """(what was aimed at, what was found, whether it is reached; None if it is not measured)."""
    curve = found[ours]
    result = []
    for forwards, wanted in ((250, 0.8), (600, 0.9)):
        gaps = list(by_subject(gap_at(curve, forwards)).values())
        mean = float(np.mean(gaps)) if gaps else None
        result.append(
            (f"{percent(wanted)} of the gap at {forwards} forwards", percent(mean), None if mean is None else mean >= wanted)
        )
    right = values_of(curve.get(400, {}), "attributes"), values_of(found[IN_TABLES.label].get(3000, {}), "attributes")
    known = bool(right[0] and right[1])
    said = " against ".join(percent(float(np.mean(values))) for values in right) if known else percent(None)
    result.append(("attributes at 400 forwards not below the paper's loop at 3,000", said,
                   bool(np.mean(right[0]) >= np.mean(right[1])) if known else None))  # fmt: skip
    gaps = by_subject(gap_at(curve, 400))
    worst = min(gaps, key=lambda subject: gaps[subject]) if gaps else None
    result.append(("no breed under 60 % of the gap at 400", f"{percent(gaps[worst])}, {worst}" if worst else percent(None),
                   gaps[worst] >= 0.6 if worst else None))  # fmt: skip
    for budget in (400, 3000):
        differences = paired_differences(curve.get(budget, {}), found[IN_TABLES.label].get(budget, {}), "accessory")
        mean = float(np.mean(differences)) if differences else None
        text = "not measured" if mean is None else as_score(mean, sign=True)
        result.append(
            (f"accessory at {budget:,} not more than .02 below the paper's loop", text, None if mean is None else mean >= -0.02)
        )
    return result


def percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.0f} %"


# ---------------------------------------------------------------------------------------------------------------------
# The search: its choice and its notes
# ---------------------------------------------------------------------------------------------------------------------


def best_rivals(found: dict) -> dict[int, dict[str, Form]]:
    """{budget: {"loss": the paper's loop with the lowest loss there, "attributes": with the most attributes right}}.

    By means over breeds, among the loops that every breed has.
    """
    chosen: dict[int, dict[str, Form]] = {}
    for budget in BUDGETS:
        for score, sign in (("loss", -1), ("attributes", 1)):
            values = {form: values_of(found[form.label].get(budget, {}), score) for form in RIVALS if budget in form.budgets}
            most = max(map(len, values.values()))
            means = {form: sign * float(np.mean(of)) for form, of in values.items() if of and len(of) == most}
            if means:
                chosen.setdefault(budget, {})[score] = max(means, key=lambda form: means[form])
    return chosen


def searched_rivals(report: Path) -> dict[int, dict[str, Form]]:
    """The paper's loop at its best for each budget, as found by the search of this report; none before it is done."""
    path = report / "search.json"
    return best_rivals(read_found(path)[0]) if path.exists() else {}


def chosen_form(found: dict, forms: Sequence[Form], budgets: Sequence[int] = CHOSEN_AT) -> Form:
    """The form that goes on to the measures, by a rule that was fixed before the search was done.

    It is the trainer as it stands, unless a form beats it at two or more budgets in the same score (gap or attributes) and loses
    to it in neither score at any budget (verdicts of `verdict`, paired by breed). Of several such forms it is the one with the
    most attributes right, as a mean over the budgets. One budget is not enough: among so many forms some win there by chance.
    Forms of another precision or number of vectors answer other questions and are not chosen.
    """
    best, most = DEFAULT, -math.inf
    default = found[DEFAULT.label]
    for form in forms:
        ours = found[form.label]
        if form.label == DEFAULT.label or form.method != DEFAULT.method or {"num_vectors", "mixed_precision"} & set(form.flags):
            continue
        said = {score: [verdict(paired_differences(ours.get(budget, {}), default.get(budget, {}), score)) for budget in budgets]
                for score in ("gap", "attributes")}  # fmt: skip
        wins, loses = (max(of.count(word) for of in said.values()) for word in (WINS, LOSES))
        attributes = [float(np.mean(values_of(ours.get(budget, {}), "attributes") or [math.nan])) for budget in budgets]
        if wins >= 2 and not loses and np.mean(attributes) > most:
            best, most = form, float(np.mean(attributes))
    return best


def cell(records: Records, score: str) -> str:
    values = values_of(records, score)
    if not values:
        return ""
    return percent(float(np.mean(values))) if score == "gap" else as_score(float(np.mean(values)))


def search_notes(found: dict, forms: Sequence[Form], count: int) -> str:
    """SEARCH.md: the figures of each form, what stopping by a signal would have given, and the rivals."""
    text = [f"# Forms of the Gauss-Newton trainer\n\nMeans over {count} spare breeds, none of them among the twelve.\n"]
    text += scores_by_budget("The trainer", found, forms) + scores_by_budget("The paper's loop", found, RIVALS)
    text += [smallest_gaps(found, forms), differences_from_default(found, forms), the_choice(found, forms)]
    text.append(stopping_notes([found[form.label] for form in forms]))
    chosen = [[f"{budget:,}", *(form.label for form in of.values())] for budget, of in best_rivals(found).items()]
    text.append("\n## The paper's loop at its best\n\n" + table(["forwards", "by loss", "by attributes"], chosen) + "\n")
    return "".join(text)


def second_notes(found: dict, forms: Sequence[Form], count: int, seeds: int) -> str:
    """SECOND.md: how the search's best forms do on more breeds and new seeds, and the choice."""
    text = [f"# Forms of the Gauss-Newton trainer, second round\n\nMeans over {count} spare breeds, {seeds} new seeds each.\n"]
    text += scores_by_budget("The trainer", found, forms)
    return "".join([*text, smallest_gaps(found, forms), differences_from_default(found, forms), the_choice(found, forms)])


def pooled(rounds: Sequence[dict]) -> dict:
    """The runs of the trainer and of the basis of 24 from all rounds together; rounds have the latter by one of two names."""
    found: dict[str, dict[int, Records]] = {DEFAULT.label: {}, BESIDE.label: {}}
    for of_round in rounds:
        for name, label in ((DEFAULT.label, DEFAULT.label), (BESIDE.label, BESIDE.label), ("basis 24", BESIDE.label)):
            for budget, records in of_round.get(name, {}).items():
                found[label].setdefault(budget, {}).update(records)
    return found


def third_notes(found: dict, rounds: Sequence[dict]) -> str:
    """THIRD.md: the basis of 24 with new seeds, and the choice by all runs of all rounds."""
    forms, count = (DEFAULT, BESIDE), len(by_subject(gap_at(found[BESIDE.label], 400)))
    text = [f"# Forms of the Gauss-Newton trainer, third round\n\nMeans over the {count} breeds of the measures, a new seed.\n"]
    text += scores_by_budget("The trainer", found, forms)
    text += [smallest_gaps(found, forms), differences_from_default(found, forms, BUDGETS), the_choice(found, forms)]
    everything = pooled([*rounds, found])
    breeds = len(by_subject(gap_at(everything[BESIDE.label], 400)))
    text.append(f"\n# All rounds together\n\n{breeds} breeds, each the mean of its seeds.\n")
    return "".join([*text, differences_from_default(everything, forms), the_choice(everything, forms)])


def scores_by_budget(title: str, found: dict, forms: Sequence[Form]) -> list[str]:
    text, budgets = [], [budget for budget in BUDGETS if any(budget in form.budgets for form in forms)]
    for score in ("gap", "attributes", "CLIP-I", "accessory"):
        rows = [[form.label, *(cell(found[form.label].get(budget, {}), score) for budget in budgets)]
                for form in forms if found[form.label]]  # fmt: skip
        heading = {"gap": "share of the gap closed", "attributes": "attributes right"}.get(score, score)
        text.append(f"\n## {title}: {heading}, by forwards\n\n" + table(["", *map(str, budgets)], rows) + "\n")
    return text


def smallest_gaps(found: dict, forms: Sequence[Form]) -> str:
    rows = [[form.label, percent(min(gaps.values()))] for form in forms
            if (gaps := by_subject(gap_at(found[form.label], 400)))]  # fmt: skip
    return "\n## The breed with the smallest share of the gap at 400 forwards\n\n" + table(["", "gap"], rows) + "\n"


def the_choice(found: dict, forms: Sequence[Form]) -> str:
    rule = " ".join((chosen_form.__doc__ or "").split())
    return f"\n## The choice\n\n{rule}\n\nChosen: {chosen_form(found, forms).label}.\n"


def differences_from_default(found: dict, forms: Sequence[Form], budgets: Sequence[int] = CHOSEN_AT) -> str:
    """Each form minus the trainer as it stands, paired by breed, with 95 % intervals."""
    rows = []
    for form in forms:
        row = []
        for budget in budgets:
            ours, default = found[form.label].get(budget, {}), found[DEFAULT.label].get(budget, {})
            row += [interval_text(paired_differences(ours, default, score)) for score in ("gap", "attributes")]
        if form.label != DEFAULT.label and any(row):
            rows.append([form.label, *row])
    header = [f"{score} at {budget:,}" for budget in budgets for score in ("gap", "attributes")]
    return "\n## Minus the trainer as it stands\n\n" + table(["", *header], rows) + "\n"


def interval_text(differences: list[float], score: str = "CLIP-I") -> str:
    """Mean and half width of the 95 % interval, as a score is printed; empty for no differences."""
    if not differences:
        return ""
    mean, half_width = mean_interval(differences)
    column = COLUMNS.get(score, COLUMNS["CLIP-I"])
    return column.number(mean, sign=True) + (f" ± {column.number(half_width)}" if math.isfinite(half_width) else "")


def stopping_notes(curves: list[dict[int, Records]], first: int = 400) -> str:
    """The attributes that a run would have if it were stopped, from `first` forwards on, where a signal is best."""
    signals: dict[str, Callable[[dict], float]] = {
        "the last budget": lambda point: point["step"], "lowest loss on unseen pictures": lambda point: -point["loss"],
        "highest contrast": lambda point: point["contrast"], "shortest token": lambda point: -point["token_norm"],
        "most attributes: the best that a signal could do": lambda point: point["attributes"],
    }  # fmt: skip
    paths: list[list[dict]] = []
    for curve in curves:
        for run in curve.get(max(BUDGETS), {}):
            path = [curve[budget][run] for budget in BUDGETS if budget >= first and run in curve.get(budget, {})]
            paths += [path] if all("attributes" in point for point in path) else []
    if not paths:
        return ""
    rows = []
    for name, signal in signals.items():
        attributes, signalled = [], []
        for path in paths:
            attributes.append(max(path, key=signal)["attributes"])
            values, right = [signal(point) for point in path], [point["attributes"] for point in path]
            if np.std(values) and np.std(right):
                signalled.append(np.corrcoef(values, right)[0, 1])
        rows.append([name, as_score(float(np.mean(attributes))), f"{np.mean(signalled):+.2f}" if signalled else ""])
    heading = (
        f"\n## Stopping, between {first} and {max(BUDGETS):,} forwards\n\n{len(paths)} runs; correlations are within a run.\n\n"
    )
    return (heading + table(["stopped at", "attributes right", "correlation with them"], rows) + "\n")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The measures: their tables
# ---------------------------------------------------------------------------------------------------------------------


TUNED = "the paper's loop, tuned on other breeds"  # its rate and schedule, for as many forwards


def rivals_at(budget: int, best: dict[int, dict[str, Form]]) -> dict[str, tuple[str, str]]:
    """{heading: (label of the row to compare with in loss, in all other scores)}."""
    of = best.get(budget, {})
    rivals = {"the paper's loop as the suite's tables have it": (IN_TABLES.label, IN_TABLES.label)}
    if of:
        rivals[TUNED] = (of["loss"].label, of["attributes"].label)
    return rivals | {
        "gradient TI at equal cost": (GRADIENTS, GRADIENTS),
        "itself with a basis of 24": (BESIDE.label, BESIDE.label),
    }


def comparison(found: dict, ours: str, budget: int, rival: tuple[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """({score: difference with its interval}, {score: verdict}) at a budget."""
    texts, verdicts = {}, {}
    for score in JUDGED:
        other = found[rival[score != "loss"]].get(budget, {})
        differences = paired_differences(found[ours].get(budget, {}), other, score)
        if not differences:
            continue
        texts[score] = interval_text(differences, score)
        verdicts[score] = verdict(differences, score in COLUMNS and COLUMNS[score].lower_is_better)
    return texts, verdicts


def measured_tables(found: dict, ours: str, best: dict[int, dict[str, Form]]) -> dict[str, Table]:
    """{name: table}: the scores by budget, the differences with their verdicts, and the aims."""
    scored, verdicts, differences = [], [], []
    labels = list(dict.fromkeys(label for label in found if label not in (START, END)))
    for budget in BUDGETS:
        for label in labels:
            records = found[label].get(budget, {})
            if records:
                scored.append(
                    [f"{budget:,}", label, *(cell(records, score) for score in ("gap", *JUDGED[1:])), str(len(records))]
                )
        for heading, rival in rivals_at(budget, best).items():
            texts, said = comparison(found, ours, budget, rival)
            if texts:
                differences.append([f"{budget:,}", heading, *(texts.get(score, "") for score in JUDGED)])
                verdicts.append([f"{budget:,}", heading, said.get("loss", ""), in_pictures(said)])
    reached = {True: "yes", False: "no", None: ""}
    return {
        "verdicts": Table(["forwards", "against", "in loss", "in pictures"], verdicts),
        "aims": Table(["aim", "found", "reached"], [[aim, text, reached[is_so]] for aim, text, is_so in aims(found, ours)]),
        "scores": Table(["forwards", "", "gap closed", *JUDGED[1:], "runs"], scored),
        "differences": Table(["forwards", "Gauss-Newton minus", *JUDGED], differences),
    }


MARK = re.compile(r"(<!-- measured by reproduction\.fewer_forwards: (\w+) -->\n)(?:\n|\|.*\n|Not measured yet\.\n)*")


def fill(page: str, tables: dict[str, Table]) -> str:
    """A page with the tables below its marks `<!-- measured by reproduction.fewer_forwards: NAME -->`."""
    filled = MARK.sub(lambda match: f"{match[1]}\n{tables[match[2]].markdown()}\n\n", page)
    return filled.rstrip("\n") + "\n"
