"""Statistics of runs. The unit is the subject: seeds of one subject are no independent witnesses of a method.

Records are {(subject, seed): what is known of a run}. Differences between two rows are paired over the runs that both have and
averaged within a subject first; an interval is then over subjects. Of a single subject it is over seeds, and speaks of that
subject alone. (Named `stats`, as `statistics` is a module of the standard library.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from reproduction.experiments import BY_NAME, CLAIM_COLUMNS, COLUMNS, Claim
from train_zoodip import ZOAdam, low_variance_directions
from zoodip.records import T_975, mean_interval

Run = tuple[str, int]  # subject, seed
Records = dict[Run, dict]

# One-sided quantiles at 80 % of Student's t for 1, 2, ... degrees of freedom: the power of "what a table could have seen".
T_80 = (1.376, 1.061, .978, .941, .920, .906, .896, .889, .883, .879, .876, .873, .870, .868, .866, .865, .863, .862, .861,
        .860)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# From a run to a value
# ---------------------------------------------------------------------------------------------------------------------


def derived(record: dict, tau: int) -> dict:
    """Columns that follow from a run's record. `tau`: of a run whose flags do not name it."""
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
    """`loss_at` and `loss_path` to every record with a curve: the loss at the forwards that every run of the table has used, and
    its mean on the way there. Steps cost differently."""
    records = [record for row in rows.values() for record in row.values() if record.get("curve") and record["forwards"]]
    budget = min((record["forwards"] for record in records), default=0)
    for record in records:
        forwards, losses = zip(*[(point["unet_forwards"], point["loss"]) for point in record["curve"]], strict=True)
        record["loss_at"] = float(np.interp(budget, forwards, losses))
        record["loss_path"] = float(np.interp(np.linspace(0, budget, 1001), forwards, losses).mean())


def add_gaps(rows: dict[str, Records], start: str, end: str) -> None:
    """`gap_closed` to every record: (L_start - L) / (L_start - L_end), with the subject's mean losses of the two rows."""
    starts, ends = (by_subject({run: record["loss"] for run, record in rows.get(label, {}).items()}) for label in (start, end))
    for records in rows.values():
        for (subject, _), record in records.items():
            if subject in starts and subject in ends:
                record["gap_closed"] = (starts[subject] - record["loss"]) / (starts[subject] - ends[subject])


def by_subject(values: dict[Run, float]) -> dict[str, float]:
    """Mean of each subject's seeds."""
    subjects = dict.fromkeys(subject for subject, _ in values)
    return {subject: float(np.mean([value for (of, _), value in values.items() if of == subject])) for subject in subjects}


def units(values: dict[Run, float]) -> list[float]:
    """What an interval is over: one value per subject; of a single subject, one per seed."""
    means = by_subject(values)
    return list(means.values()) if len(means) > 1 else list(values.values())


def values_of(records: Records, score: str) -> list[float]:
    return units({run: record[score] for run, record in records.items() if score in record})


def paired_differences(a: Records, b: Records, score: str) -> list[float]:
    """a - b of the runs that both have, by unit."""
    both = [run for run in a if run in b and score in a[run] and score in b[run]]
    return units({run: a[run][score] - b[run][score] for run in both})


def spread_of_cells(rows: dict[str, Records], score: str) -> tuple[float, float] | None:
    """Standard deviation of a grid's cell means, and what noise alone would make it (two-way layout without replication).

    Noise is what is left of the values [cells, subjects] after the means of cells and subjects are taken out. None where runs
    are missing or of one subject.
    """
    values = [values_of(records, score) for records in rows.values()]
    if len({len(row) for row in values}) != 1 or len(values) < 2 or len(values[0]) < 2:
        return None
    table = np.array(values)
    cells, subjects = table.shape
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    noise = (residual**2).sum() / ((cells - 1) * (subjects - 1))
    return float(table.mean(1).std(ddof=1)), float(np.sqrt(noise / subjects))


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------------------------------------------

HOLDS, FAILS, DISAGREE = "holds here", "does not", "the scores disagree"
NOTHING_FOUND, NOT_SHOWN, TOO_FEW = "no difference found", "not shown", "too few runs"


def verdict(mean: float, half_width: float, margin: float | None = None) -> str:
    """Of an advantage with a 95 % interval: does it lie above 0, or above -margin? An interval on both sides decides nothing."""
    bound = -(margin or 0.0)
    if not np.isfinite(half_width):
        return TOO_FEW
    if mean - half_width > bound:
        return HOLDS
    if mean + half_width < bound:
        return FAILS
    return NOTHING_FOUND if margin is None else NOT_SHOWN


def smallest_effect(half_width: float, count: int) -> float:
    """The smallest true difference that an interval of this width over `count` units would have shown with a chance of 80 %.

    (t_.975 + t_.80) standard errors, the usual approximation to the noncentral t.
    """
    if count < 2:
        return float("nan")
    return half_width * (1 + quantile(T_80, 0.842, count - 1) / quantile(T_975, 1.960, count - 1))


def quantile(table: tuple[float, ...], normal: float, freedom: int) -> float:
    return table[freedom - 1] if freedom <= len(table) else normal


@dataclass
class Finding:
    claim: Claim
    differences: dict[str, tuple[float, float, int]]  # score -> mean of a - b, half width, units
    verdicts: dict[str, str]  # of those scores of the rule that there are
    published: dict[str, float]  # a - b

    def in_short(self) -> str:
        """One verdict of all: what some say and none contradicts."""
        said = set(self.verdicts.values()) & {HOLDS, FAILS}
        if len(said) > 1:
            return DISAGREE
        return said.pop() if said else next(iter(self.verdicts.values()))


def judge(claim: Claim, rows: dict[str, Records], untrained: Records) -> Finding | None:
    """None where no score is there of both rows. One of which lower is better enters its verdict with the sign turned.

    `untrained`: the records of the class word, where a rule's margin starts.
    """
    a, b, rule = rows.get(claim.a, {}), rows.get(claim.b, {}), claim.rule
    differences = {}
    for score in CLAIM_COLUMNS:
        if values := paired_differences(a, b, score):
            differences[score] = (*mean_interval(values), len(values))
    verdicts = {}
    for score in rule.scores:
        if score not in differences or (rule.margin is not None and not values_of(untrained, score)):
            continue
        mean, half_width, _ = differences[score]
        margin = None
        if rule.margin is not None:
            margin = rule.margin * abs(np.mean(values_of(b, score)) - np.mean(values_of(untrained, score)))
        verdicts[score] = verdict(-mean if COLUMNS[score].lower_is_better else mean, half_width, margin)
    published = {row.label: row.published for row in BY_NAME[claim.experiment].rows}
    of_paper = {score: published[claim.a][score] - published[claim.b][score]
                for score in published[claim.a] if score in published[claim.b]}  # fmt: skip
    return Finding(claim, differences, verdicts, of_paper) if verdicts else None


# ---------------------------------------------------------------------------------------------------------------------
# Controls of Fig. 8
# ---------------------------------------------------------------------------------------------------------------------


def control_removed(kind: str, tau: int, nu: float, dim: int, refreshes: int, seed: int = 0) -> list[int]:
    """How many directions of the buffer SG would remove, at each of `refreshes`, of a token that learns nothing.

    walk: independent Gaussian steps. noise: the method's own update, fed losses that are pure noise.
    """
    generator, removed = torch.Generator().manual_seed(seed), []
    if kind == "walk":
        for _ in range(refreshes):
            history = torch.randn(tau, dim, generator=generator).cumsum(0)
            removed.append(len(low_variance_directions(history, nu)))
        return removed
    zo = ZOAdam(torch.zeros(1, dim), learning_rate=1e-2, tau=tau, nu=nu)
    while len(removed) < refreshes:
        directions, _ = zo.candidates(generator)
        zo.step(directions, 5e-6 * torch.randn(3, generator=generator))  # as large as the miniature's differences at mu
        if len(zo.subspace.token_history) == 0:
            removed.append(len(zo.subspace.projection))
    return removed
