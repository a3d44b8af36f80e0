#!/usr/bin/env python
"""The paper's tables of the token methods, each a list of runs: does what is not done, then writes RESULTS.md and plots.

    python reproduction/tables.py                                  # the miniature, everything
    python reproduction/tables.py --quick --jobs 2                 # the same in 16 minutes: 2 subjects, 1 seed, short runs
    python reproduction/tables.py --tables 3 S4 --jobs 2           # some tables
    python reproduction/tables.py --dry_run                        # what would run, and how long
    python reproduction/tables.py --shard 1/8                      # the first of eight machines; then, on one, without it
    python reproduction/tables.py --world sd15 --data dataset --prompts dataset/prompts_and_classes.txt

Interrupted, the same command continues. Flags that are not listed below are train_zoodip.py's and go to every run (for example
--variant fp16 --mixed_precision bf16). `EXPERIMENTS` is the one list of what is run, how it is summed up and what was published.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_zoodip as zoodip  # noqa: E402
from benchmarks.common import cli, environment, mean_interval, table  # noqa: E402
from reproduction import plots, runs  # noqa: E402
from reproduction.runs import DREAMBOOTH, WORLDS, Job, Settings, make_spec  # noqa: E402
from train_zoodip import InputError  # noqa: E402

LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
                      "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}
LOWER_IS_BETTER = {"loss", "loss_all", "loss_at", "loss_path", "DINO_inter", "CLIP_inter"}
QUALITY = ("CLIP-T", "CLIP-I", "DINO")
LEARNED = ("attributes", "loss", "loss_all")  # beside the paper's scores: attributes on the miniature only
CLAIM_COLUMNS = (*QUALITY, *LEARNED, "loss_path")
COST = ("peak_memory_gb", "stored_kb", "steps_per_second", "minutes", "forwards")
HEADINGS = {"loss": "loss, t in [500, 900)", "loss_all": "loss, all t", "loss_at": "loss at equal forwards",
            "loss_path": "mean loss on the way there",
            "attributes": "attributes right", "peak_memory_gb": "memory, GB", "stored_kb": "stored, KB",
            "steps_per_second": "steps/s", "forwards": "forwards", "minutes": "minutes"}  # fmt: skip
DIGITS = {"loss": 5, "loss_all": 5, "loss_at": 5, "loss_path": 5, "forwards": 0, "minutes": 1, "peak_memory_gb": 2,
          "stored_kb": 1, "steps_per_second": 2}


# ---------------------------------------------------------------------------------------------------------------------
# What is run, how it is summed up, what was published
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    label: str
    flags: dict = field(default_factory=dict)  # of the paper; tau and intrinsic_dim are scaled to the token's size
    method: str = "zoodip"
    published: dict = field(default_factory=dict)  # score -> figure of the paper


def scores(text_score: float, image_score: float, dino: float, **more: float) -> dict:
    return {"CLIP-T": text_score, "CLIP-I": image_score, "DINO": dino, **more}


@dataclass(frozen=True)
class Experiment:
    """One table. `sd15_subjects`: the paper's; of the miniature always all. `kind`: scores, inter, cost, or none to draw."""

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    kind: str = "scores"
    sd15_subjects: tuple[str, ...] = ("shiny_sneaker",)
    one_seed: bool = False  # a grid: seed 0 only
    with_cost: bool = False  # for each row also a run that measures speed and memory
    note: str = ""

    def subjects(self, settings: Settings) -> tuple[str, ...]:
        subjects = settings.subjects or (settings.world.subjects if settings.miniature else self.sd15_subjects)
        return subjects[:1] if self.kind == "cost" or (self.one_seed and settings.quick) else subjects

    def seeds(self, settings: Settings) -> tuple[int, ...]:
        seeds = settings.seeds or settings.world.seeds
        whole_dataset = not settings.miniature and self.sd15_subjects == DREAMBOOTH
        return seeds[:1] if self.one_seed or whole_dataset or self.kind == "cost" else seeds

    def jobs(self, row: Row, settings: Settings) -> list[Job]:
        """The runs of a row, in the order (subject, seed) that pairs them with another row's."""
        cost = self.kind == "cost"
        seeds = self.seeds(settings)[: 1 if row.method == "initial" else None]  # nothing is drawn before the first step
        kinds = {self.kind} & {"scores", "inter"}
        return [Job(make_spec(settings, row.method, subject, seed, row.flags, cost), kinds)
                for subject in self.subjects(settings) for seed in seeds]

    def cost_jobs(self, row: Row, settings: Settings) -> list[Job]:
        """The run that measures a row's speed and memory; they depend on neither subject nor seed."""
        if not self.with_cost or row.method == "initial":
            return []
        spec = make_spec(settings, row.method, self.subjects(settings)[0], self.seeds(settings)[0], row.flags, cost=True)
        return [Job(spec, set())]


TI_PUBLISHED = dict(quantization="none", timestep_sampling="uniform")  # and templates, Adam's usual epsilon
TI_FAIR = dict(use_cc=True)  # quantisation and timesteps as ZOODiP's
GF_FAIR = dict(use_cc=True, mode="fair", timestep_sampling="puts")
UNIFORM, NO_SG = dict(timestep_sampling="uniform"), dict(nu=0.0)

METHOD_ROWS = (
    Row("class word (untrained)", {}, "initial"),
    Row("TI, as published", TI_PUBLISHED, "ti", scores(.285, .778, .559, minutes=8.8, peak_memory_gb=6.75, stored_kb=3)),
    Row("TI, ZOODiP's weights, captions, timesteps", TI_FAIR, "ti"),
    Row("GF-TI, as published", {}, "gf_ti", scores(.253, .540, .011, minutes=293, peak_memory_gb=2.37, stored_kb=3)),
    Row("GF-TI, fair", GF_FAIR, "gf_ti"),
    Row("ZOODiP, templates", dict(use_cc=False)),
    Row("ZOODiP", {}, "zoodip", scores(.287, .772, .558, minutes=31, peak_memory_gb=2.37, stored_kb=3)),
)  # fmt: skip
TAUS, NUS = (32, 64, 128, 256, 512), (1e-1, 1e-2, 1e-3, 1e-4)
TABLE_4 = {32: (.704, .686, .716, .729), 64: (.721, .736, .712, .724), 128: (.736, .735, .759, .716),
           256: (.739, .727, .738, .716), 512: (.705, .704, .676, .707)}  # fmt: skip
BOUNDS = tuple((low, high) for low in (0, 300, 500, 700) for high in (300, 500, 700, 900, 1000) if low < high)


def tau_flags(tau: int, nu: float) -> dict:
    return {} if (tau, nu) == (128, 1e-3) else dict(tau=tau, nu=nu)  # the default is one run with all other tables'


def puts_flags(low: int, high: int) -> dict:
    if (low, high) == (0, 1000):
        return UNIFORM
    return {} if (low, high) == (500, 900) else dict(t_min=low, t_max=high)


EXPERIMENTS = (
    Experiment("1", "Token methods", METHOD_ROWS, (*QUALITY, *LEARNED, "forwards"), sd15_subjects=DREAMBOOTH,
               note="The paper trained TI and GF-TI with templates and ZOODiP with comprehensive captions: both are here for TI "
                    "and ZOODiP. A TI step's backward pass is not counted as forwards."),
    Experiment("2", "Speed and memory of the methods' own scripts", (
        Row("TI, 16/32-bit weights, fp32", dict(quantization="none", mixed_precision="fp32"), "ti", dict(steps_per_second=9.42)),
        Row("ZOODiP, not quantised, n = 1", dict(quantization="none", n=1), "zoodip", dict(steps_per_second=22.3)),
        Row("ZOODiP, not quantised, n = 2", dict(quantization="none"), "zoodip", dict(steps_per_second=18.4)),
        Row("ZOODiP, INT8, n = 1", dict(quantization="int8", n=1), "zoodip", dict(steps_per_second=20.7)),
        Row("ZOODiP, INT8, n = 2", dict(quantization="int8"), "zoodip", dict(steps_per_second=16.1, peak_memory_gb=2.37)),
        Row("ZOODiP, NF4, n = 2", dict(quantization="nf4"), "zoodip", dict(peak_memory_gb=1.9)),
        Row("TI, NF4", dict(quantization="nf4"), "ti"),
        Row("GF-TI, INT8", dict(quantization="int8"), "gf_ti", dict(steps_per_second=0.74, peak_memory_gb=2.37)),
    ), ("steps_per_second", "peak_memory_gb", "stored_kb"), kind="cost",
        note="A step of GF-TI is a generation of 20 forwards. The runs are made one at a time, after all others. The paper read "
             "nvidia-smi; here memory is the most that was allocated on a GPU, or the peak resident set on a CPU."),
    Experiment("3", "Subspace Gradient and PUTS", (
        Row("neither", UNIFORM | NO_SG, published=scores(.273, .736, .505)),
        Row("SG", UNIFORM, published=scores(.265, .747, .527)),
        Row("PUTS", NO_SG, published=scores(.277, .744, .562)),
        Row("SG and PUTS", {}, published=scores(.266, .759, .569)),
    ), (*QUALITY, *LEARNED)),
    Experiment("4", "tau and nu", tuple(
        Row(f"tau {tau}, nu {nu:g}", tau_flags(tau, nu), published={"CLIP-I": TABLE_4[tau][k]})
        for tau in TAUS for k, nu in enumerate(NUS)
    ), ("CLIP-I", "DINO", "CLIP-T", "attributes", "loss"), one_seed=True,
        note="tau is the paper's; it was run in proportion to the token's size."),
    Experiment("5", "Timestep sampling", (
        Row("uniform", UNIFORM, published=scores(.265, .747, .527)),
        Row("SNR-based", dict(timestep_sampling="snr"), published=scores(.271, .719, .545)),
        Row("PUTS", {}, published=scores(.266, .759, .569)),
    ), (*QUALITY, *LEARNED)),
    Experiment("S4", "Gradient estimators, n = 2", (
        Row("RGE", {}, published=scores(.266, .759, .569)),
        Row("SPSA", dict(estimator="spsa"), published=scores(.277, .732, .506)),
        Row("one-point", dict(estimator="one_point"), published=scores(.296, .703, .393)),
    ), (*QUALITY, *LEARNED, "forwards", "loss_at", "loss_path")),
    Experiment("S5", "Perturbation mu", (
        Row("mu = 1e-2", dict(mu=1e-2), published=scores(.281, .778, .599)),
        Row("mu = 1e-3", {}, published=scores(.277, .797, .613)),
        Row("mu = 1e-4", dict(mu=1e-4), published=scores(.296, .724, .470)),
    ), (*QUALITY, *LEARNED), note="The middle row is the default, which is 1e-2 where activations are bf16."),
    Experiment("S6", "Directions n", (
        Row("n = 1", dict(n=1), published=scores(.298, .736, .495)),
        Row("n = 2", {}, published=scores(.277, .796, .613)),
        Row("n = 4", dict(n=4), published=scores(.282, .784, .584)),
        Row("n = 8", dict(n=8), published=scores(.282, .798, .627)),
    ), (*QUALITY, *LEARNED, "forwards", "loss_at", "loss_path")),
    Experiment("S7", "PUTS for gradient TI", (
        Row("TI, uniform", TI_PUBLISHED, "ti", scores(.241, .798, .584)),
        Row("TI, PUTS", dict(quantization="none"), "ti", scores(.247, .825, .661)),
    ), (*QUALITY, *LEARNED), note="The DreamBooth rows of the paper train the UNet and are not of this suite."),
    Experiment("S8", "Precision of the weights", (
        Row("not quantised", dict(quantization="none")),
        Row("INT8", dict(quantization="int8"), published=scores(.288, .834, .657)),
        Row("NF4", dict(quantization="nf4"), published=scores(.212, .835, .647)),
        Row("TI, not quantised", TI_FAIR | dict(quantization="none"), "ti"),
        Row("TI, NF4", TI_FAIR | dict(quantization="nf4"), "ti"),
    ), (*QUALITY, *LEARNED), sd15_subjects=("dog6",),
        note="Each token is judged by the model it was trained on, so losses of different precisions are of different models."),
    Experiment("S9", "Diversity: pictures of one prompt", (
        Row("TI", TI_PUBLISHED, "ti", {"DINO_inter": .679}),
        Row("GF-TI", {}, "gf_ti", {"DINO_inter": .150}),
        Row("ZOODiP", {}, "zoodip", {"DINO_inter": .671}),
    ), ("DINO_inter", "CLIP_inter"), kind="inter", sd15_subjects=DREAMBOOTH, note="Lower is more diverse."),
    Experiment("S10", "Token methods with their cost", METHOD_ROWS, (*QUALITY, *COST), sd15_subjects=DREAMBOOTH, with_cost=True,
               note="Memory and steps per second are of separate runs, as in Table 2; minutes of runs beside other runs."),
    Experiment("PUTS", "Bounds of PUTS", tuple(
        Row(f"T_L {low}, T_U {high}", puts_flags(low, high)) for low, high in BOUNDS
    ), ("CLIP-I", "DINO", "CLIP-T", "attributes", "loss", "loss_all"), one_seed=True),
    Experiment("Fig8", "Directions removed by SG", (Row("ZOODiP, SG and PUTS"), Row("ZOODiP, SG, uniform timesteps", UNIFORM)),
               ("removed",), kind="none",
               note="The second control is the method itself on a token that learns nothing: momentum alone makes its walk so "
                    "smooth that most directions carry less than nu of the variance. A walk of independent steps is not smooth."),
)  # fmt: skip
BY_NAME = {experiment.name: experiment for experiment in EXPERIMENTS}


@dataclass(frozen=True)
class Claim:
    """Row `a` of an experiment against row `b`, paired over (subject, seed), with a verdict in each of `scores` that there is.

    margin None: a beats b. Else: a is not worse than b by more than `margin` of what b gained over the class word.
    """

    text: str
    experiment: str
    a: str
    b: str
    scores: tuple[str, ...] = ("CLIP-I", "DINO", "attributes", "loss")
    margin: float | None = None


SPEED = ("CLIP-I", "DINO", "attributes", "loss", "loss_path")  # where rows differ in how fast they learn, too
# Where the rows' weights differ, losses are of different models; where their timesteps do, "loss" favours PUTS and "loss_all"
# small timesteps: tokens learned at t in [0, 300) have as low a one as any, and draw other colours.
PICTURES = ("CLIP-I", "DINO", "attributes")
CLAIMS = (
    Claim("SG helps", "3", "SG and PUTS", "PUTS"),
    Claim("SG helps, without PUTS", "3", "SG", "neither"),
    Claim("PUTS helps", "3", "SG and PUTS", "SG", PICTURES),
    Claim("PUTS beats SNR-based sampling", "5", "PUTS", "SNR-based", PICTURES),
    Claim("RGE beats SPSA at n = 2", "S4", "RGE", "SPSA", SPEED),
    Claim("SPSA beats one-point at n = 2", "S4", "SPSA", "one-point", SPEED),
    Claim("mu = 1e-3 is better than 1e-2", "S5", "mu = 1e-3", "mu = 1e-2"),
    Claim("mu = 1e-3 is better than 1e-4", "S5", "mu = 1e-3", "mu = 1e-4"),
    Claim("n = 2 beats n = 1", "S6", "n = 2", "n = 1", SPEED),
    Claim("n = 2 suffices (against n = 8)", "S6", "n = 2", "n = 8", margin=0.1),
    Claim("4 bit loses text alignment", "S8", "INT8", "NF4", ("CLIP-T",)),
    Claim("ZOODiP matches gradient TI (as published)", "1", "ZOODiP", "TI, as published", PICTURES, margin=0.1),
    Claim("ZOODiP matches gradient TI (same conditions)", "1", "ZOODiP", "TI, ZOODiP's weights, captions, timesteps", margin=0.1),
    Claim("GF-TI fails at this budget (as published)", "1", "ZOODiP", "GF-TI, as published", PICTURES),
    Claim("GF-TI fails at this budget (fair)", "1", "ZOODiP", "GF-TI, fair"),
    Claim("PUTS helps gradient TI", "S7", "TI, PUTS", "TI, uniform", PICTURES),
)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def collect(experiment: Experiment, settings: Settings) -> dict[str, dict[tuple[str, int], dict]]:
    """{row label: {(subject, seed): record}} of the runs that are done."""
    found = {}
    for row in experiment.rows:
        records = {}
        for job in experiment.jobs(row, settings):
            record = runs.read_run(job.spec, settings)
            if record is not None:
                if experiment.kind != "cost":
                    del record["steps_per_second"]  # of a run beside others
                records[job.spec["subject"], job.spec["seed"]] = record | derived(record)
        for job in experiment.cost_jobs(row, settings):
            cost = runs.read_run(job.spec, settings) or {}
            for record in records.values():
                record.update({name: cost[name] for name in ("steps_per_second", "peak_memory_gb") if name in cost})
        found[row.label] = records
    budget = min((record["forwards"] for records in found.values() for record in records.values() if record["forwards"]),
                 default=0)
    for records in found.values():
        for record in records.values():
            if budget and record.get("curve") and record["forwards"]:
                forwards, losses = zip(*[(row["unet_forwards"], row["loss"]) for row in record["curve"]], strict=True)
                record["loss_at"] = float(np.interp(budget, forwards, losses))
                record["loss_path"] = float(np.interp(np.linspace(0, budget, 1001), forwards, losses).mean())
    return found


def derived(record: dict) -> dict:
    result = dict(stored_kb=record["stored_bytes"] / 1000)
    if "seconds" in record:
        result["minutes"] = record["seconds"] / 60
    if record.get("removed"):
        tau = record["spec"]["flags"].get("tau", 128)
        result["removed"] = [count / tau for count in record["removed"]]
    return result


def values_of(records: dict[tuple[str, int], dict], score: str) -> list[float]:
    return [float(np.mean(record[score])) for record in records.values() if score in record]


def paired_differences(a: dict[tuple[str, int], dict], b: dict[tuple[str, int], dict], score: str) -> list[float]:
    """a - b for every (subject, seed) that both have."""
    return [a[key][score] - b[key][score] for key in a if key in b and score in a[key] and score in b[key]]


def spread_of_cells(collected: dict[str, dict], score: str) -> tuple[float, float] | None:
    """Standard deviation of a grid's cell means, and what noise alone would make it (two-way layout without replication).

    Noise is what is left of the runs [cells, subjects] after the means of cells and subjects are taken out. None where runs
    are missing or of one subject.
    """
    values = [values_of(records, score) for records in collected.values()]
    if len({len(row) for row in values}) != 1 or len(values) < 2 or len(values[0]) < 2:
        return None
    runs_of = np.array(values)
    cells, subjects = runs_of.shape
    residual = runs_of - runs_of.mean(1, keepdims=True) - runs_of.mean(0) + runs_of.mean()
    noise = (residual**2).sum() / ((cells - 1) * (subjects - 1))
    return float(runs_of.mean(1).std(ddof=1)), float(np.sqrt(noise / subjects))


def verdict(mean: float, half_width: float, margin: float = 0.0) -> str:
    """Of an advantage with a 95 % interval: is it above -margin?"""
    if mean - half_width > -margin:
        return "holds here"
    return "does not" if mean + half_width < -margin else "cannot be told"


@dataclass
class Finding:
    claim: Claim
    differences: dict[str, tuple[float, float, int]]  # score -> mean of a - b, half width, pairs
    verdicts: dict[str, str]  # of those of claim.scores that there are
    published: dict[str, float]  # a - b

    def in_short(self) -> str:
        """One verdict of all: what some say and none contradicts."""
        said = set(self.verdicts.values()) - {"cannot be told"}
        return "the scores disagree" if len(said) > 1 else said.pop() if said else "cannot be told"


def judge(claim: Claim, settings: Settings, collected: dict[str, dict]) -> Finding | None:
    """None where no score is there of both rows. One of which lower is better enters its verdict with the sign turned."""
    records = collected.get(claim.experiment, {})
    a, b = records.get(claim.a, {}), records.get(claim.b, {})
    differences = {}
    for score in CLAIM_COLUMNS:
        values = paired_differences(a, b, score)
        if values:
            differences[score] = (*mean_interval(values), len(values))
    untrained = collect(BY_NAME["1"], settings)["class word (untrained)"] if claim.margin is not None else {}
    verdicts = {}
    for score in claim.scores:
        if score in differences and (claim.margin is None or values_of(untrained, score)):
            mean, half_width, _ = differences[score]
            margin = 0.0
            if claim.margin is not None:
                margin = claim.margin * abs(np.mean(values_of(b, score)) - np.mean(values_of(untrained, score)))
            verdicts[score] = verdict(-mean if score in LOWER_IS_BETTER else mean, half_width, margin)
    rows = {row.label: row.published for row in BY_NAME[claim.experiment].rows}
    published = {score: rows[claim.a][score] - rows[claim.b][score] for score in rows[claim.a] if score in rows[claim.b]}
    return Finding(claim, differences, verdicts, published) if verdicts else None


def control_fractions(kind: str, tau: int, nu: float, dim: int, refreshes: int, seed: int = 0) -> list[float]:
    """Fig. 8's control: the share of the buffer that SG would remove of a token that learns nothing.

    walk: independent Gaussian steps. adam: the method's own update, fed losses that are pure noise.
    """
    generator = torch.Generator().manual_seed(seed)
    fractions = []
    if kind == "walk":
        for _ in range(refreshes):
            history = torch.randn(tau, dim, generator=generator).cumsum(0)
            fractions.append(len(zoodip.low_variance_directions(history, nu)) / tau)
        return fractions
    args = argparse.Namespace(learning_rate=1e-2, tau=tau, nu=nu, n=2, mu=1e-3, estimator="rge")
    zo = zoodip.ZOAdam(torch.zeros(1, dim), args)
    zo.subspace = runs.CountingSubspace(tau, nu, dim)
    while len(zo.subspace.removed) < refreshes:
        directions, _ = zo.candidates(generator)
        zo.step(directions, 5e-6 * torch.randn(3, generator=generator))  # as large as the miniature's differences at mu
    return [count / tau for count in zo.subspace.removed]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def number(value: float, score: str, sign: bool = False) -> str:
    """As the paper prints it: .759."""
    digits = DIGITS.get(score, 3)
    value = round(value, digits) + 0.0  # no minus before a zero
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return re.sub(r"^([+-]?)0\.", r"\1.", text)


def interval(mean: float, half_width: float, score: str, sign: bool = False) -> str:
    """Mean ± half width; of a single run just its figure."""
    text = number(mean, score, sign)
    return f"{text} ± {number(half_width, score)}" if np.isfinite(half_width) else text


def cell(values: list[float], score: str, published: float | None) -> str:
    """Ours with its interval, and where there is a published figure that and the difference."""
    if not values:
        return "-" if published is None else f"- (published {number(published, score)})"
    mean, half_width = mean_interval(values)
    text = number(mean, score) if score in COST else interval(mean, half_width, score)
    if published is not None:
        text += f" (published {number(published, score)}, {number(mean - published, score, sign=True)})"
    return text


def table_of(experiment: Experiment, collected: dict[str, dict]) -> str:
    """Rows as declared. A column that no run has is left out, unless it holds the only published figures."""
    measured = {score for score in experiment.columns if any(values_of(records, score) for records in collected.values())}
    published = {score for score in experiment.columns if any(score in row.published for row in experiment.rows)}
    present = [score for score in experiment.columns if score in measured | (set() if measured & published else published)]
    rows = []
    for row in experiment.rows:
        records = collected[row.label]
        cells = [cell(values_of(records, score), score, row.published.get(score)) for score in present]
        scored = sum(any(score in record for score in present) for record in records.values())
        rows.append([row.label, str(scored), *cells])
    return table(["", "runs", *[HEADINGS.get(score, score) for score in present]], rows)


def grid_note(experiment: Experiment, collected: dict[str, dict]) -> str:
    """How far the cells of a grid lie apart, beside what noise alone would do; nothing where that cannot be told."""
    spreads = {score: spread_of_cells(collected, score) for score in experiment.columns}
    parts = []
    for score, spread in spreads.items():
        if spread:
            between, noise = (f"{value:.{DIGITS.get(score, 3) + 1}f}".removeprefix("0") for value in spread)
            parts.append(f"{HEADINGS.get(score, score)} {between} ({noise})")
    return ("Standard deviation of the cells' means, and in brackets what the noise of single runs alone would give: "
            + "; ".join(parts) + ".") if parts else ""


def claims_table(findings: list[Finding]) -> str:
    shown = [score for score in CLAIM_COLUMNS if any(score in finding.differences for finding in findings)]
    rows = []
    for finding in findings:
        cells = []
        for score in shown:
            text = "-"
            if score in finding.differences:
                mean, half_width, _ = finding.differences[score]
                text = interval(mean, half_width, score, sign=True)
                text += f" (published {number(finding.published[score], score, sign=True)})" if score in finding.published else ""
                text += f": {finding.verdicts[score]}" if score in finding.verdicts else ""
            cells.append(text)
        pairs = max(pairs for _, _, pairs in finding.differences.values())
        rows.append([finding.claim.text, f"**{finding.in_short()}**", *cells, str(pairs)])
    return table(["claim", "in short", *[HEADINGS.get(score, score) for score in shown], "pairs"], rows)


def removed_shares(collected: dict[str, dict], settings: Settings) -> dict[str, list[float]]:
    """Share of the buffer's directions that each refresh removed, of all runs of a row; and of two controls."""
    tau, width = settings.world.scaled(128), settings.world.width
    shares = {label: [share for record in records.values() for share in record.get("removed", [])]
              for label, records in collected.items()}
    return shares | {"control: random walk": control_fractions("walk", tau, 1e-3, width, 30),
                     "control: the method on losses of pure noise": control_fractions("adam", tau, 1e-3, width, 30)}


def fig8_table(collected: dict[str, dict], settings: Settings) -> str:
    rows = [[label, f"{np.mean(shares):.3f}", f"{min(shares):.3f} to {max(shares):.3f}", str(len(shares))]
            for label, shares in removed_shares(collected, settings).items() if shares]
    return table(["", "share of the buffer's directions removed", "range", "refreshes"], rows)


def introduction(names: list[str], settings: Settings, jobs: list[Job], done: int) -> str:
    world, where = settings.world, environment()
    subjects = dict.fromkeys(job.spec["subject"] for job in jobs)
    command = f"python reproduction/tables.py --world {world.name}" + " --quick" * settings.quick
    command += f" --dry_steps {settings.dry_steps}" if settings.dry_steps else ""
    command += f" --tables {' '.join(names)}" if names != list(BY_NAME) else ""
    implied = world.subjects[: 1 if settings.dry_steps else 2], world.seeds[:1]  # by --dry_steps and --quick
    for name, values in (("subjects", settings.subjects), ("seeds", settings.seeds)):
        if values and not ((settings.quick or settings.dry_steps) and values in implied):
            command += f" --{name} {' '.join(map(str, values))}"
    for name, value in settings.extra.items():
        command += f" --{name} {value}" if not isinstance(value, bool) else f" --{name}" if value else f" --no-{name}"
    hours = sum((runs.read_run(job.spec, settings) or {}).get("seconds", 0) for job in jobs) / 3600
    text = [
        f"# Results: {world.name}", "",
        f"{done} of {len(jobs)} runs, {hours:.1f} hours of training in all (summed over processes that ran side by side). "
        f"Made by `{command}`, {where['hardware']}, commit {where['commit']}; "
        + ", ".join(f"{package} {version}" for package, version in where["versions"].items()) + ".", "",
        "± is the half width of a 95 % interval (Student's t over subjects x seeds taken as independent). Differences between "
        f"rows are paired over (subject, seed). Subjects: {', '.join(subjects)}; the column \"runs\" says how many runs a row "
        "has. Scores are on "
        f"{settings.images} pictures a prompt, {settings.inference_steps} steps, guidance {world.guidance:g}.",
    ]  # fmt: skip
    if settings.miniature:
        flags = make_spec(settings, "zoodip", next(iter(subjects)), 0, {})["flags"]
        text += ["", CAVEATS.format(steps=f"{flags['max_train_steps']:,}", rate=f"{flags['learning_rate']:g}")]
    return "\n".join(text)


CLAIMS_NOTE = """Each line is the difference of two rows, paired over (subject, seed), with its 95 % interval. "Beats", "helps",
"fails", "loses" hold where the interval lies on the better side of 0; "matches" and "suffices" where it lies on the better side
of minus a tenth of what the other row gained over the class word. A claim "does not" hold where the interval lies wholly on the
other side. "In short" is what at least one score says and none contradicts; with several scores on each of sixteen claims, expect
an interval or two to mislead. Of losses, lower is better. Differences without a verdict are there to be read beside the others.
Where timesteps or weights differ the verdict is on pictures alone: each loss favours those who learn at its own timesteps, on its
own weights. "Mean loss on the way there" is the mean of the learning curve over the forwards that every row of the table has
used: how fast it falls, where the ends are alike."""

CAVEATS = """Subjects are breeds that the miniature has never seen; the scorer is its own CLIP, and its attribute classifier reads
whether the subject's looks are right. The losses are on renders that no run saw, in scenes that no run saw. There is no DINO for
this world. The published figures beside ours are Stable Diffusion v1.5's on photographs: their level cannot be compared, the
order of rows can. What scale does not carry over:

- the token has 256 numbers, not 768: tau and GF-TI's intrinsic dimension are a third of the paper's;
- {steps} steps at learning rate {rate} instead of 30,000 at 0.005; GF-TI's and TI's steps are reduced with them;
- the base is NF4 here, INT8 in the paper (Table S8 has both); activations are fp32, so a small mu is not drowned in rounding;
- CLIP-I and the loss need not agree: a token of lower loss can draw worse pictures. Look at the sheets;
- 16 x 16 latents lose their layout at earlier timesteps than 64 x 64 ones: PUTS's bounds need not be the best here;
- a small model has less redundancy to spare for 4 bits than 860 M weights have."""

# ---------------------------------------------------------------------------------------------------------------------
# What the plots show
# ---------------------------------------------------------------------------------------------------------------------


def grid(collected: dict[str, dict], score: str, xs: tuple, ys: tuple, label: Callable) -> np.ndarray:
    """Means of a two-dimensional experiment, [len(ys), len(xs)]; nan where there is no run."""
    return np.array([[np.mean(values_of(collected.get(label(x, y), {}), score) or [np.nan]) for x in xs] for y in ys])


def learning_curves(collected: dict[str, dict]) -> dict[str, tuple]:
    """{row: (forwards, mean loss, half width)}; the half width is of the runs' own shapes, their levels taken out.

    It is 0, no band, of fewer than three runs: the interval of two is thirteen standard errors wide.
    """
    lines = {}
    for label, records in collected.items():
        curves = [record["curve"] for record in records.values() if len(record.get("curve", [])) > 1]
        if curves:
            losses = np.array([[point["loss"] for point in curve] for curve in curves])  # [runs, points]
            shapes = losses - losses.mean(1, keepdims=True)
            widths = np.array([mean_interval(list(column))[1] if len(curves) > 2 else 0.0 for column in shapes.T])
            lines[label] = ([point["unet_forwards"] for point in curves[0]], losses.mean(0), widths)
    return lines


# point of the plot: (table, row) of its quality, row of Table 2 of its memory
QUALITY_AND_MEMORY = {
    "TI, not quantised": ("S8", "TI, not quantised", "TI, 16/32-bit weights, fp32"), "TI, NF4": ("S8", "TI, NF4", "TI, NF4"),
    "GF-TI, INT8": ("1", "GF-TI, as published", "GF-TI, INT8"),
    "ZOODiP, not quantised": ("S8", "not quantised", "ZOODiP, not quantised, n = 2"),
    "ZOODiP, INT8": ("S8", "INT8", "ZOODiP, INT8, n = 2"), "ZOODiP, NF4": ("S8", "NF4", "ZOODiP, NF4, n = 2"),
}  # fmt: skip


def quality_and_memory(settings: Settings) -> dict[str, tuple[float, float, float]]:
    collected = {name: collect(BY_NAME[name], settings) for name in ("1", "2", "S8")}
    points = {}
    for label, (name, quality_row, cost_row) in QUALITY_AND_MEMORY.items():
        quality = values_of(collected[name][quality_row], "CLIP-I")
        memory = values_of(collected["2"][cost_row], "peak_memory_gb")
        if quality and memory:
            points[label] = (float(np.mean(memory)), *mean_interval(quality))
    return points


def draw_plots(names: list[str], collected: dict[str, dict], settings: Settings, folder: Path) -> dict[str, str]:
    """Draw what these tables have plots of -> {table, or "curves": file name}."""
    drawn = {}

    def heat_maps(name: str, file: str, scores: tuple[str, ...], x: tuple[str, tuple], y: tuple[str, tuple], label: Callable):
        maps = {score: grid(collected[name], score, x[1], y[1], label) for score in scores}
        maps = {score: values for score, values in maps.items() if np.isfinite(values).any() or score == scores[0]}
        plots.heat_maps(maps, HEADINGS, LOWER_IS_BETTER, x, y, number, folder / file)
        drawn[name] = file

    if "4" in names:
        heat_maps("4", "tau_nu.png", ("CLIP-I", "DINO", "attributes", "loss"), ("nu", NUS), ("tau", TAUS),
                  lambda nu, tau: f"tau {tau}, nu {nu:g}")
    if "PUTS" in names:
        lows, highs = (tuple(sorted({bound[i] for bound in BOUNDS})) for i in (0, 1))
        heat_maps("PUTS", "puts.png", ("CLIP-I", "DINO", "attributes", "loss_all"), ("T_U", highs), ("T_L", lows),
                  lambda high, low: f"T_L {low}, T_U {high}")
    if "Fig8" in names:
        tau = settings.world.scaled(128)
        plots.histograms(removed_shares(collected["Fig8"], settings), (np.arange(tau + 2) - 0.5) / tau,
                         ("share of the buffer's directions removed", "share of refreshes"), folder / "figure_8.png")
        drawn["Fig8"] = "figure_8.png"
    if "2" in names:
        plots.scatter(quality_and_memory(settings), ("peak memory, GB", "CLIP-I"), folder / "quality_memory.png")
        drawn["2"] = "quality_memory.png"
    panels = {title: learning_curves(collected[name]) for title, name in
              {"estimator": "S4", "directions n": "S6", "timesteps": "5", "method": "1"}.items() if name in names}
    if panels:
        plots.curves(panels, ("forwards used", "loss on unseen pictures"), folder / "curves.png")
        drawn["curves"] = "curves.png"
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = zoodip.OneLineArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--world", default="miniature", choices=list(WORLDS), help="the bundled miniature, or Stable Diffusion v1.5")
    add("--tables", nargs="+", default=list(BY_NAME), choices=list(BY_NAME), metavar="TABLE", help="which of them")
    add("--quick", action="store_true", help="two subjects, one seed, a quarter of the steps, one picture a prompt")
    add("--subjects", nargs="+", default=None, help="instead of the tables' own")
    add("--seeds", type=int, nargs="+", default=None, help="instead of the world's")
    add("--model", default=None, help="another model folder or hub name than the world's")
    add("--data", type=Path, default=Path("dataset"), help="sd15: folder of DreamBooth's subject folders")
    add("--prompts", type=Path, default=Path("dataset/prompts_and_classes.txt"), help="sd15: DreamBooth's prompts")
    add("--clip", default=None, help="another CLIP scorer than the world's, name or folder")
    add("--dino", default=None, help="another DINOv2 scorer than the world's, name or folder")
    add("--output", type=Path, default=None, help="folder of runs; default: results/reproduction/<world>")
    add("--report", type=Path, default=None, help="folder for RESULTS.md, results.json and plots; default: the output folder")
    add("--jobs", type=int, default=1, help="runs at once")
    add("--threads", type=int, default=1, help="CPU threads of each")
    add("--shard", default=None, metavar="I/K", help="do only every K-th run, from the I-th; write no report")
    add("--dry_run", action="store_true", help="only print what would run, and a guess at the hours")
    add("--dry_steps", type=int, default=None, help="every run for so many steps with one picture: is anything broken?")
    add("--report_only", action="store_true", help="run nothing, report what is done")
    args, rest = parser.parse_known_args(argv)
    if args.shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", args.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            parser.error(f"--shard must be I/K with 1 <= I <= K, for example 2/8, got {args.shard!r}")
        args.shard = (int(match[1]), int(match[2]))
    for name in ("jobs", "threads", "dry_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    zoodip.parse_args(["--train_data_dir", "x", "--initializer_token", "x", *rest])  # exits where a value is wrong
    args.extra = given_flags(rest)
    own = {"train_data_dir", "initializer_token", "seed", "output_dir", "pretrained_model_name_or_path"}
    if forbidden := own & set(args.extra):
        parser.error(f"--{sorted(forbidden)[0]} is set by the suite; use --subjects, --seeds, --output or --model")
    return args


def given_flags(argv: list[str]) -> dict:
    """The flags of train_zoodip.py that a command line names, one named at its default too: the suite has other defaults."""
    parser, not_given = zoodip.build_parser(), object()
    names = vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given)))
    return {name: value for name, value in vars(args).items() if value is not not_given}


def take_shard_of_launcher(args: argparse.Namespace) -> None:
    """Under `accelerate launch` or torchrun: each process is one shard on its own GPU, and not a part of one distributed run."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return
    args.shard = (int(os.environ["RANK"]) + 1, processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    local = int(os.environ["LOCAL_RANK"])
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    for name in [name for name in os.environ if name in LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # the workers inherit what is left


def make_settings(args: argparse.Namespace) -> Settings:
    """Raises InputError where the model's folder is not whole."""
    world = WORLDS[args.world]
    model = args.model or world.model
    local = Path(model).is_dir()
    folder = zoodip.find_model_folder(model, None, args.extra.get("variant")) if local else None
    settings = Settings(
        world, args.output or Path("results") / "reproduction" / world.name, args.data, args.prompts, model,
        zoodip.model_digest(folder, args.extra.get("variant"))[:12] if local else model,
        args.clip or world.clip, args.dino or world.dino, subjects=args.subjects and tuple(args.subjects),
        seeds=args.seeds and tuple(args.seeds), extra=args.extra, images=world.images, inference_steps=world.inference_steps,
        threads=args.threads,
    )  # fmt: skip
    if args.quick:
        settings.quick, settings.images, settings.inter_images, settings.eval_samples = True, 1, 12, 32
        settings.subjects = settings.subjects or world.subjects[:2]
        settings.seeds = settings.seeds or world.seeds[:1]
    if args.dry_steps:
        settings.dry_steps, settings.images, settings.inter_images, settings.inference_steps = args.dry_steps, 1, 2, 2
        settings.eval_samples = 2
        settings.seeds = settings.seeds or world.seeds[:1]
        settings.subjects = settings.subjects or world.subjects[:1]
    return settings


def plan(names: list[str], settings: Settings) -> list[Job]:
    """The runs of these tables, each once with all evaluations that any of them wants."""
    jobs = {}
    for name in names:
        for row in BY_NAME[name].rows:
            for job in BY_NAME[name].jobs(row, settings) + BY_NAME[name].cost_jobs(row, settings):
                jobs.setdefault(runs.digest(job.spec), Job(job.spec, set())).kinds.update(job.kinds)
    return list(jobs.values())


def print_plan(jobs: list[Job], args: argparse.Namespace, settings: Settings) -> None:
    seconds = {id(job): 0.0 if job.done(settings) else runs.estimated_seconds(job, settings) for job in jobs}
    for job in jobs:
        flags = " ".join(f"--{name} {value}" for name, value in job.spec["flags"].items())
        state = "done" if job.done(settings) else f"{seconds[id(job)]:.0f} s"
        print(f"{runs.digest(job.spec)}  {state:>8}  {'cost ' if job.spec.get('cost') else ''}{job.spec['method']} "
              f"{job.spec['subject']} seed {job.spec['seed']}  {flags}")
    hours = sum(seconds.values()) / 3600
    left = sum(value > 0 for value in seconds.values())
    where = "two CPU cores" if settings.miniature else "the paper's RTX 3090"
    print(f"{len(jobs)} runs, {left} to do: about {hours:.1f} hours of one process on {where}, {hours / args.jobs:.1f} with "
          f"--jobs {args.jobs} if there is room for them")


def write_results(names: list[str], jobs: list[Job], settings: Settings, folder: Path) -> None:
    """RESULTS.md, results.json (every figure of every run) and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    collected = {name: collect(BY_NAME[name], settings) for name in names}
    done = sum(job.done(settings) for job in jobs)
    findings = [finding for claim in CLAIMS if (finding := judge(claim, settings, collected)) is not None]
    text = [introduction(names, settings, jobs, done)]
    if findings:
        text += ["## Claims", CLAIMS_NOTE, claims_table(findings)]
    drawn = draw_plots(names, collected, settings, folder / "plots")
    for name in names:
        experiment = BY_NAME[name]
        title = f"## {'Table ' if name[0] in 'S123456789' else ''}{name}: {experiment.title}".replace("Fig8", "Figure 8")
        text += [title, fig8_table(collected[name], settings) if name == "Fig8" else table_of(experiment, collected[name])]
        note = grid_note(experiment, collected[name]) if experiment.one_seed else ""
        text += [line for line in (experiment.note, note) if line]
        text += [f"![{name}](plots/{drawn[name]})"] if name in drawn else []
    if "curves" in drawn:
        text += ["## Learning curves", "Loss on the judging set (t in [500, 900)) against forwards used; bands are 95 % "
                 "intervals after the runs' own levels are taken out.", f"![curves](plots/{drawn['curves']})"]
    zoodip.write_atomically(folder / "RESULTS.md", ("\n\n".join(text) + "\n").encode())
    everything = {name: {label: list(records.values()) for label, records in rows.items()} for name, rows in collected.items()}
    zoodip.write_atomically(folder / "results.json", (json.dumps(everything) + "\n").encode())
    print(f"{folder / 'RESULTS.md'}: {done} of {len(jobs)} runs done")


def main(args: argparse.Namespace) -> None:
    take_shard_of_launcher(args)
    settings = make_settings(args)
    jobs = plan(args.tables, settings)
    if args.dry_run:
        print_plan(jobs, args, settings)
        return
    failures = []
    settings.missing = {name for name in (settings.clip, settings.dino) if name and runs.evaluate.load_scorer(name) is None}
    if not args.report_only:
        mine = jobs[args.shard[0] - 1 :: args.shard[1]] if args.shard else jobs
        runs.prepare_data(settings, {job.spec["subject"] for job in jobs})  # of all shards, so that each writes the same
        failures = runs.run_jobs(mine, settings, args.jobs)
    if args.shard is None:
        write_results(args.tables, jobs, settings, args.report or settings.output)
    if failures:
        raise InputError(f"{len(failures)} runs failed, the first: {failures[0]}; mend it and start the same command again")


if __name__ == "__main__":
    cli(main, parse_args())
