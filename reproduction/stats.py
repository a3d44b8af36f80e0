"""Statistics of runs. The unit is the subject: seeds of one subject are not independent evidence about a method.

Records are {(subject, seed): what is known of a run}. A subject's seeds are averaged first; differences between two rows are
then paired over the subjects that both have, and an interval is over subjects. For a single subject it is over seeds, and holds
for that subject alone. (Named `stats` because `statistics` is a module of the standard library.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from reproduction.claims import OTHERS, Claim
from reproduction.declarations import AT_THE_END, CLAIM_COLUMNS, COLUMNS
from reproduction.experiments import BY_NAME
from zoodip.records import T_975, mean_interval, quantile

Run = tuple[str, int]  # subject, seed
Records = dict[Run, dict]
NO_SUBJECT = ""  # the subject of a control, which belongs to none and is compared with each

# One-sided quantiles at 80 % of Student's t for 1, 2, ... degrees of freedom: the power of "what a table could have seen".
T_80 = (1.376, 1.061, .978, .941, .920, .906, .896, .889, .883, .879, .876, .873, .870, .868, .866, .865, .863, .862, .861,
        .860)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# From a run to a value
# ---------------------------------------------------------------------------------------------------------------------


def derived(record: dict, tau: int) -> dict:
    """Columns that follow from a run's record. `tau`: for a run whose flags do not name it."""
    result = {}
    if "stored_bytes" in record:
        result["stored_kb"] = record["stored_bytes"] / 1000
    if "seconds" in record:
        result["minutes"] = record["seconds"] / 60
    if record.get("removed"):
        tau = record.get("spec", {}).get("flags", {}).get("tau", tau)
        shares = [count / tau for count in record["removed"]]
        result.update(removed_shares=shares, removed=float(np.mean(shares)), removed_least=min(shares), removed_most=max(shares),
                      refreshes=len(shares))  # fmt: skip
    return result


def add_equal_budgets(rows: dict[str, Records]) -> None:
    """Add `loss_at` and `loss_path` to every record with a curve: the loss at equal forwards, and its mean on the way there.

    The forwards are those that every run of the table has used, because steps differ in cost.
    """
    records = [record for row in rows.values() for record in row.values() if record.get("curve") and record["forwards"]]
    budget = min((record["forwards"] for record in records), default=0)
    for record in records:
        forwards, losses = zip(*[(point["unet_forwards"], point["loss"]) for point in record["curve"]], strict=True)
        record["loss_at"] = float(np.interp(budget, forwards, losses))
        record["loss_path"] = float(np.interp(np.linspace(0, budget, 1001), forwards, losses).mean())


def add_gaps(rows: Iterable[Records], start: Records, end: Records, name: str = "gap_closed") -> None:
    """Add `name` to every record: (L_start - L) / (L_start - L_end), with the subject's mean losses of those two rows."""
    starts, ends = (by_subject({run: record["loss"] for run, record in records.items()}) for records in (start, end))
    for records in rows:
        for (subject, _), record in records.items():
            if subject in starts and subject in ends:
                record[name] = (starts[subject] - record["loss"]) / (starts[subject] - ends[subject])


def add_likeness(rows: dict[str, Records], ceiling: Records, floor: Records) -> None:
    """Add `likeness` to every record: its CLIP-I on a scale from true renders of other subjects (0) to its own (1)."""
    tops, bottoms = (by_subject({run: record["CLIP-I"] for run, record in records.items() if "CLIP-I" in record})
                     for records in (ceiling, floor))  # fmt: skip
    for records in rows.values():
        for (subject, _), record in records.items():
            if subject in tops and subject in bottoms and "CLIP-I" in record:
                record["likeness"] = (record["CLIP-I"] - bottoms[subject]) / (tops[subject] - bottoms[subject])


def by_subject(values: dict[Run, float]) -> dict[str, float]:
    """Mean of each subject's seeds."""
    subjects = dict.fromkeys(subject for subject, _ in values)
    return {subject: float(np.mean([value for (of, _), value in values.items() if of == subject])) for subject in subjects}


def units(values: dict[Run, float]) -> list[float]:
    """The values that an interval is over: one per subject or, for a single subject, one per seed."""
    means = by_subject(values)
    return list(means.values()) if len(means) > 1 else list(values.values())


def values_of(records: Records, score: str) -> list[float]:
    return units({run: record[score] for run, record in records.items() if score in record})


def paired_differences(a: Records, b: Records, score: str) -> list[float]:
    """a - b by unit: means over seeds of each subject that both have or, for a single one, the seeds that both have."""
    ours, theirs = ({run: record[score] for run, record in records.items() if score in record} for records in (a, b))
    means, their_means = by_subject(ours), by_subject(theirs)
    if NO_SUBJECT in their_means:
        their_means = dict.fromkeys(means, their_means[NO_SUBJECT])
        theirs = dict.fromkeys(ours, their_means.get(next(iter(means), ""), 0.0))
    both = [subject for subject in means if subject in their_means]
    if len(both) > 1:
        return [means[subject] - their_means[subject] for subject in both]
    return [ours[run] - theirs[run] for run in ours if run in theirs]


def mixed_pairs(a: Records, b: Records, score: str) -> int:
    """How many of `paired_differences` are between runs of two machines: another device or other versions of the libraries."""
    ours, theirs = ({run: record.get("machines", []) for run, record in records.items() if score in record} for records in (a, b))
    several = len({subject for subject, _ in ours} & {subject for subject, _ in theirs}) > 1
    made: list[dict] = [{}, {}]
    for machines, records in zip(made, (ours, theirs), strict=True):
        for run, names in records.items():
            machines.setdefault(run[0] if several else run, set()).update(names)
    return sum(len(made[0][unit] | made[1][unit]) > 1 for unit in made[0].keys() & made[1].keys())


def best_of_others(rows: dict[str, Records], label: str, score: str) -> Records:
    """For each subject, its records in the best of all other rows, chosen on the other subjects (for a single one, other seeds).

    A row chosen on the runs on which it is judged would be better by chance: of twenty rows some are.
    """
    sign = -1 if COLUMNS[score].lower_is_better else 1
    others = {name: {run: record for run, record in records.items() if score in record}
              for name, records in rows.items() if name != label}  # fmt: skip
    everyone = dict.fromkeys(run for records in others.values() for run in records)
    one_subject = len({subject for subject, _ in everyone}) == 1

    def unit(run: Run) -> Run | str:
        return run if one_subject else run[0]

    result = {}
    for run in everyone:
        means = {name: sign * float(np.mean(values)) for name, records in others.items()
                 if run in records and (values := units({other: record[score] for other, record in records.items()
                                                         if unit(other) != unit(run)}))}  # fmt: skip
        if means:
            result[run] = others[max(means, key=lambda name: means[name])][run]
    return result


def spread_of_seeds(records: Records, score: str) -> tuple[float, float, int] | None:
    """(standard deviation of a subject's seeds, of the subjects' means, runs); None if no subject has two seeds.

    The first is pooled over subjects. It contributes to the second, because a mean is over seeds that vary by chance.
    """
    values = {run: record[score] for run, record in records.items() if score in record}
    means = by_subject(values)
    freedom = len(values) - len(means)
    if freedom < 1 or len(means) < 2:
        return None
    within = sum((value - means[subject]) ** 2 for (subject, _), value in values.items()) / freedom
    return float(np.sqrt(within)), float(np.std(list(means.values()), ddof=1)), len(values)


def spread_of_cells(rows: dict[str, Records], score: str) -> tuple[float, float] | None:
    """Standard deviation of a grid's cell means, and what noise alone would make it (two-way layout without replication).

    Noise is what is left of the values [cells, subjects] after the means of cells and subjects are taken out. None if runs are
    missing or all of one subject.
    """
    values = [values_of(records, score) for records in rows.values()]
    if len({len(row) for row in values}) != 1 or len(values) < 2 or len(values[0]) < 2:
        return None
    table = np.array(values)
    cells, subjects = table.shape
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    noise = (residual**2).sum() / ((cells - 1) * (subjects - 1))
    return float(table.mean(1).std(ddof=1)), float(np.sqrt(noise / subjects))


def printed_spread(rows: dict[str, Records], score: str) -> list[str] | None:
    """`spread_of_cells`, printed with one digit more than the score."""
    spread = spread_of_cells(rows, score)
    return spread and [f"{value:.{COLUMNS[score].digits + 1}f}".removeprefix("0") for value in spread]


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

REPRODUCED, CONTRADICTED, UNDECIDED = "reproduced", "contradicted", "not decided"
NOTHING_FOUND, TOO_FEW = "no difference found", "too few runs"


def verdict(mean: float, half_width: float, margin: float | None = None) -> str:
    """The verdict on an advantage with a 95 % interval. Fixed before the runs that it judges.

    "Beats" is reproduced if the interval lies above 0 and contradicted if it lies below; if it contains 0, no difference was
    found. "Is as good" is judged in the same way against -margin, and is not decided if the interval contains that value. (An
    earlier rule, by which the table Gap of the second edition was judged, called "as good" contradicted whenever the interval
    lay below 0.)
    """
    if not np.isfinite(half_width):
        return TOO_FEW
    bound = 0.0 if margin is None else -margin
    if mean - half_width > bound:
        return REPRODUCED
    if mean + half_width < bound:
        return CONTRADICTED
    return NOTHING_FOUND if margin is None else UNDECIDED


def smallest_effect(half_width: float, count: int) -> float:
    """The smallest true difference that an interval of this width over `count` units would show with a probability of 80 %.

    It is (t_.975 + t_.80) standard errors, the usual approximation to the noncentral t.
    """
    if count < 2:
        return float("nan")
    return half_width * (1 + quantile(T_80, 0.842, count - 1) / quantile(T_975, 1.960, count - 1))


def p_value(distance: float, half_width: float, count: int) -> float:
    """Two-sided, of Student's t test that a mean over `count` units with this 95 % interval is 0; `distance` is the mean.

    With x = sqrt(f) tan(a), the density of t with f degrees of freedom becomes cos(a) to the power f - 1.
    """
    if half_width == 0:
        return float(distance == 0)
    freedom = count - 1
    t = abs(distance) / half_width * quantile(T_975, 1.960, freedom)

    def area(start: float) -> float:
        angles = np.linspace(start, np.pi / 2, 20_001)
        return float(np.trapezoid(np.cos(angles) ** (freedom - 1), angles))

    return area(np.arctan(t / np.sqrt(freedom))) / area(0.0)


def survivors(p_values: list[float], level: float = 0.05) -> list[bool]:
    """Which of several tests are still significant with Holm's correction for their number."""
    kept = [False] * len(p_values)
    for place, k in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[k] > level / (len(p_values) - place):
            break
        kept[k] = True
    return kept


def advantage(difference: float, score: str) -> float:
    """The difference with the sign that makes more of it better."""
    return -difference if COLUMNS[score].lower_is_better else difference


@dataclass
class Finding:
    claim: Claim
    score: str  # the one that decides
    verdict: str
    margin: float | None
    differences: dict[str, tuple[float, float, int]]  # score -> mean of a - b, half width, units
    published: dict[str, float]  # a - b
    unit: str = "subjects"  # or seeds, for a single subject, or rounds, for what is measured in rounds
    above: int | None = None  # units whose difference in the deciding score is above 0
    mixed: int = 0  # units whose two rows were made on two machines

    @property
    def p(self) -> float:
        """Of the test that decides: against 0, or against what may be given up."""
        mean, half_width, count = self.differences[self.score]
        return p_value(advantage(mean, self.score) + (self.margin or 0.0), half_width, count)

    @property
    def smallest(self) -> float:
        """The smallest difference of the deciding score that these runs would have shown."""
        _, half_width, count = self.differences[self.score]
        return smallest_effect(half_width, count)


def judge(claim: Claim, rows: dict[str, Records], untrained: Records) -> Finding | None:
    """The finding on a claim; None if no deciding score exists for both rows. Scores of which lower is better change sign.

    `untrained`: the records of the class word, from which the margin of a rule is measured.
    """
    a, rule = rows.get(claim.a, {}), claim.rule
    b = best_of_others(rows, claim.a, rule.scores[0]) if claim.b == OTHERS else rows.get(claim.b, {})
    values = {score: found for score in CLAIM_COLUMNS if (found := paired_differences(a, b, score))}
    differences = {score: (*mean_interval(found), len(found)) for score, found in values.items()}
    score = next((score for score in rule.scores if score in differences), None)
    if score is None or (rule.margin is not None and not values_of(untrained, score)):
        return None
    mean, half_width, _ = differences[score]
    margin = rule.tolerance
    if rule.margin is not None:
        margin = rule.margin * max(0.0, float(np.mean(values_of(b, score)) - np.mean(values_of(untrained, score))))
    of_rows = {row.label: row.published for row in BY_NAME[claim.experiment].rows}
    theirs = of_rows.get(claim.b, {})
    if claim.b == OTHERS:
        others = [figures for label, figures in of_rows.items() if label != claim.a and score in figures]
        theirs = max(others, key=lambda figures: figures[score], default={})
    published = {score: figure - theirs[score] for score, figure in of_rows[claim.a].items() if score in theirs}
    unit = "seeds" if len({subject for subject, _ in a}) == 1 else "subjects"
    if BY_NAME[claim.experiment].kind == "cost":
        unit = "rounds"
    above = sum(value > 0 for value in values[score])
    said = verdict(advantage(mean, score), half_width, margin)
    return Finding(claim, score, said, margin, differences, published, unit, above, mixed_pairs(a, b, score))


# ---------------------------------------------------------------------------------------------------------------------
# When to stop
# ---------------------------------------------------------------------------------------------------------------------

# {how the snapshot is chosen: a function from the points of a curve to the chosen one}
STOPS: dict[str, Callable[[list[dict]], dict]] = {
    AT_THE_END: lambda points: points[-1],
    "stopped after a third of the steps, about as many as in the other tables": lambda points: min(
        points, key=lambda point: abs(point["step"] - points[-1]["step"] / 3)
    ),
    "stopped where other pictures are best": lambda points: max(points, key=lambda point: point.get("choosing", -1.0)),
    "stopped at the lowest loss on the photographs": lambda points: min(points, key=lambda point: point["eval_loss"]),
    "stopped at the lowest training loss": lambda points: min(points, key=lambda point: point["training_loss"]),
    "stopped at the lowest loss on unseen renders": lambda points: min(points, key=lambda point: point["loss"]),
}
SIGNALS = {"eval_loss": "loss on the photographs", "training_loss": "training loss", "loss": "loss on unseen renders",
           "token_norm": "the token's length", "choosing": "CLIP-I of other pictures of the same snapshot"}  # fmt: skip


def trained_points(record: dict) -> list[dict]:
    """The points of a curve whose pictures are scored, without the start."""
    return [point for point in record.get("curve", []) if point["step"] and "CLIP-I" in point]


def stopped(records: Records) -> dict[str, Records]:
    """{a row of STOPS: records} for the runs of one row, each scored at the chosen snapshot."""
    rows: dict[str, Records] = {label: {} for label in STOPS}
    for run, record in records.items():
        if points := trained_points(record):
            for label, choose in STOPS.items():
                point = choose(points)
                rows[label][run] = {**point, "spec": record["spec"], "forwards": point["unet_forwards"]}
    return rows


def ranks(values: list[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def signals(records: Records, score: str) -> dict[str, tuple[float, float]]:
    """{signal: mean and half width, over units, of its rank correlation with the pictures' `score` along a run}."""
    found = {}
    for name in SIGNALS:
        values = {}
        for run, record in records.items():
            points = [point for point in trained_points(record) if score in point and point.get(name) is not None]
            columns = [ranks([point[which] for point in points]) for which in (name, score)]
            if len(points) > 2 and all(np.ptp(column) for column in columns):  # a column that never changes says nothing
                values[run] = float(np.corrcoef(*columns)[0, 1])
        if values:
            found[name] = mean_interval(units(values))
    return found
