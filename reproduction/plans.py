"""The runs from which tables are made: which ones a row needs, how long they take, and what the finished ones say."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import stdev

import numpy as np

import train_zoodip
from reproduction import stats
from reproduction.controls import control_removed
from reproduction.declarations import COLUMNS, Experiment, Row
from reproduction.experiments import BY_NAME
from reproduction.runs import (
    ALONG_SEEDS,
    RENDERED,
    SNAPSHOTS,
    UNTRAINED,
    Job,
    Settings,
    digest,
    evaluation,
    make_spec,
    read_run,
    spec_args,
    tunes_weights,
)

COST_ROUNDS = 5  # of the runs that measure cost: one run of every row, then the next of every row


def subjects_of(experiment: Experiment, settings: Settings) -> tuple[str, ...]:
    world = settings.world
    if experiment.chooses_rates:
        return settings.subjects or world.grid_subjects
    subjects = settings.subjects or (experiment.paper_subjects if world.paper_subjects else world.subjects[: experiment.breeds])
    return subjects[:1] if experiment.kind == "cost" or (experiment.grid and settings.quick) else subjects


def seeds_of(experiment: Experiment, settings: Settings) -> tuple[int, ...]:
    """For runs that measure cost, the rounds. With only one or two subjects, several seeds have to show the effect of chance.

    A grid has one seed; if it has one subject, all that are given.
    """
    if experiment.kind == "cost":
        return cost_rounds(settings)
    grid, subjects = experiment.grid or experiment.chooses_rates, subjects_of(experiment, settings)
    if settings.seeds:
        return settings.seeds[:1] if grid and len(subjects) > 1 else settings.seeds
    few = len(subjects) <= 2 and not grid
    return settings.world.seeds[: max(experiment.seeds, 3 if few else 1)]


def cost_rounds(settings: Settings) -> tuple[int, ...]:
    return tuple(range(1 if settings.quick or settings.dry_steps else COST_ROUNDS))


def jobs_of(experiment: Experiment, row: Row, settings: Settings) -> list[Job]:
    """The runs of a row."""
    if row.spread_of:
        return []
    fixed = row.method in (*UNTRAINED, *RENDERED)  # no random numbers are drawn before the first step
    seeds = seeds_of(experiment, settings)[: 1 if fixed else None]
    kinds = {experiment.kind} & {"scores", "inter"}
    if not fixed and not tunes_weights(row.method) and experiment.along:
        kinds |= {"along"}
    if row.at == "best":
        kinds = {"along", "best"}
    flags = row.flags | settings.rate(row)
    return [
        Job(make_spec(settings, row.method, subject, seed, flags, experiment.kind == "cost", row.variation), kinds.copy())
        for subject in subjects_of(experiment, settings)
        for seed in seeds
    ]


def cost_jobs(experiment: Experiment, row: Row, settings: Settings) -> list[Job]:
    """The runs that measure a row's speed and memory; they depend on neither subject nor seed."""
    if not experiment.with_cost or row.method in UNTRAINED:
        return []
    subject, flags = subjects_of(experiment, settings)[0], row.flags | settings.rate(row)
    return [Job(make_spec(settings, row.method, subject, turn, flags, cost=True), set()) for turn in cost_rounds(settings)]


def plan(experiments: Iterable[Experiment], settings: Settings) -> list[Job]:
    """The runs of these tables, each once, with all evaluations that any of the tables needs."""
    jobs = {}
    for experiment in experiments:
        for row in experiment.rows:
            for job in jobs_of(experiment, row, settings) + cost_jobs(experiment, row, settings):
                jobs.setdefault(digest(job.spec), Job(job.spec, set())).kinds.update(job.kinds)
    return list(jobs.values())


def estimated_seconds(job: Job, settings: Settings) -> float:
    """An estimate from the world's measured speed, with a rough allowance for loading and judging."""
    world, spec = settings.world, job.spec
    if spec["method"] in RENDERED:
        return 15.0
    args = spec_args(spec, settings)
    steps, calls, forwards = 0, 1, 3  # for gradients: a backward pass counts as two forwards
    if spec["method"] not in UNTRAINED:
        steps = args.max_train_steps
    if hasattr(args, "population"):
        calls, forwards = args.population if args.mode == "published" else 1, args.population
    elif hasattr(args, "estimator"):
        forwards = train_zoodip.ESTIMATORS[args.estimator].num_candidates(args.n)
    elif hasattr(args, "directions"):
        forwards = args.directions + 1
    seconds = 10 + steps * (calls * world.seconds_per_step + forwards * args.train_batch_size * world.seconds_per_forward)
    if spec.get("cost"):
        return seconds + 15
    judged = (SNAPSHOTS + 2) * settings.eval_samples
    judged += sum(2 * settings.inference_steps * pictures_of(job, kind, settings) for kind in job.kinds)
    return seconds + judged * world.seconds_per_forward


def pictures_of(job: Job, kind: str, settings: Settings) -> float:
    """How many pictures an evaluation draws."""
    pictures = evaluation(settings, kind)["images"] * (len(settings.prompts(job.spec["subject"], kind)) if kind != "inter" else 1)
    pictures *= len(ALONG_SEEDS) * (SNAPSHOTS + 1) if kind == "along" else 1
    return pictures * (1.5 if kind == "scores" and tunes_weights(job.spec["method"]) else 1)  # also of the class word


def estimated_bytes(job: Job, settings: Settings) -> float:
    """What a run leaves that is large: its pictures, and DreamBooth's weights; those of a run that measures cost are removed."""
    world, spec = settings.world, job.spec
    pictures = sum(pictures_of(job, kind, settings) for kind in job.kinds)
    return pictures * world.picture_bytes + (world.unet_bytes if spec["method"] == "dreambooth" and not spec.get("cost") else 0)


def collect(experiment: Experiment, settings: Settings) -> dict[str, stats.Records]:
    """{row label: {(subject, seed): record}} of the finished runs and of the controls."""
    found = {}
    for row in experiment.rows:
        records = {}
        for job in jobs_of(experiment, row, settings):
            record = read_run(job.spec, settings, row.at)
            if record is not None:
                if experiment.kind != "cost":
                    record.pop("steps_per_second", None)  # measured beside other runs
                if not record.get("removed"):  # without a refresh of the subspace there is no share
                    record.pop("removed", None)
                records[job.spec["subject"], job.spec["seed"]] = record | stats.derived(record, settings.world.scaled(128))
        costs = [cost for job in cost_jobs(experiment, row, settings) if (cost := read_run(job.spec, settings)) is not None]
        for name in ("steps_per_second", "peak_memory_gb"):
            if costs:
                median = float(np.median([cost[name] for cost in costs]))
                records = {run: record | {name: median} for run, record in records.items()}
        found[row.label] = records
    for row in experiment.rows:
        if row.spread_of:
            columns = [score for score in experiment.columns if not COLUMNS[score].plain]  # those hardly vary
            found[row.label] = spread([found[label] for label in row.spread_of], columns)
    if {"loss_at", "loss_path"} & set(experiment.columns):
        stats.add_equal_budgets(found)
    if experiment.gap is not None:
        start, end = (found.get(label, {}) for label in experiment.gap)
        stats.add_gaps(found.values(), start, end)
    if "likeness" in experiment.columns:
        scale = BY_NAME["Scale"]
        if settings.world.name in scale.worlds:
            stats.add_likeness(found, *collect(scale, settings).values())
    if experiment.stops is not None:
        found |= stats.stopped(found[experiment.stops])
    for control in experiment.controls:
        tau, dim = control.size or (settings.world.scaled(128), settings.world.width)
        shown = dict(removed=control.share)
        if control.share is None:
            refreshes = 30 if control.size else settings.world.steps_of_paper(30_000) // tau  # as many as a run here has
            how = dict(refreshes=refreshes, variation=control.variation)
            removed = [control_removed(control.kind, tau, 1e-3, dim, seed=seed, **how) for seed in range(5)]
            shown = stats.derived(dict(removed=sum(removed, [])), tau)
        found[control.label] = {(stats.NO_SUBJECT, 0): shown}
    return found


def spread(rows: list[stats.Records], scores: Iterable[str]) -> stats.Records:
    """The standard deviation of each score over rows, for every run that all of them have, in the order of the first."""
    records: stats.Records = {}
    for run in (run for run in rows[0] if all(run in others for others in rows)):
        values = {score: [records[run][score] for records in rows if score in records[run]] for score in scores}
        records[run] = {score: stdev(some) for score, some in values.items() if len(some) == len(rows)}
    return records
