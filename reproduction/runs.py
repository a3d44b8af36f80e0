"""What a run is: a specification with a hash, the command line that does it, the files that it leaves, and what they say.

A run is a JSON-able dict (world, model, method, subject, seed, flags); the hash of its content names its folder under
<output>/runs. There it leaves what it learned (`LEARNED`), result.json once it has learned and been judged, and, for each
evaluation of its pictures, scores-<hash of that>.json and the folder pictures-<the same hash>. What is there is not done again,
so any interrupted command continues, several machines may share or merge their folders, and tables that ask for the same run
share it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import stdev
from types import ModuleType

import numpy as np

import train_zoodip
from reproduction import stats
from reproduction.declarations import Experiment, Row
from reproduction.experiments import BY_NAME
from reproduction.tuning_experiments import SYSTEMS
from reproduction.worlds import World
from trainers import diffusekrona, dreambooth, gauss_newton, gf_ti, qlora, textual_inversion, tuneqdm
from zoodip.errors import InputError
from zoodip.files import write_atomically

# Each a module with `parse_args(argv)`, `main(args) -> exit code` and the files of a `zoodip.run.Run`.
METHODS = {"zoodip": train_zoodip, "ti": textual_inversion, "gf_ti": gf_ti, "gauss_newton": gauss_newton,
           "dreambooth": dreambooth, "qlora": qlora, "tuneqdm": tuneqdm, "diffusekrona": diffusekrona}  # fmt: skip
# Nothing is learned: a token that is the class word's, or those of a full description; the model itself, in a script's bits.
UNTRAINED = {"initial": train_zoodip, "described": train_zoodip, "untuned": qlora, "untuned_integers": tuneqdm}
RENDERED = ("renders", "other_renders")  # no model at all: true pictures of the subject, or of the others
# What a method leaves. Those that are here tune weights, and call the subject by an identifier and its class word.
LEARNED = {dreambooth: "unet", qlora: "pytorch_lora_weights.safetensors", tuneqdm: "tuned_scales.safetensors",
           diffusekrona: "pytorch_lokr_weights.safetensors"}  # fmt: skip

SNAPSHOTS = 8  # tokens of a run that the learning curve shows, beside the first
QUICK_SPEEDUP = 4  # --quick has so many times fewer steps
COST_ROUNDS = 5  # runs that measure cost: one of every row, then the next of every row
ALONG_SEEDS = (1000, 0)  # of the pictures of snapshots: the first choose the best, the second are scored
ARCHIVE = "runs.tar.xz"  # in the folder of a report: token, curve and scores of each of its runs; tuned weights are too large
ARCHIVED = re.compile(r"[0-9a-f]{12}/(?:(?:spec|result|scores-[0-9a-f]{12})\.json|learned_embeds(?:-steps-[0-9]+)?\.safetensors)")


@dataclass
class Settings:
    """What a command's flags say, as every worker gets it."""

    world: World
    output: Path
    model: str
    model_id: str  # identifies the weights, in every hash
    clip: str | None
    dino: str | None
    subjects: tuple[str, ...] | None = None  # instead of the world's or the experiment's
    seeds: tuple[int, ...] | None = None
    rates: dict[str, float] = field(default_factory=dict)  # chosen for the systems of weight tuning, before the world's
    extra: dict = field(default_factory=dict)  # flags of train_zoodip.py for every run
    missing: set[str] = field(default_factory=set)  # scorers that are not to be had
    quick: bool = False
    dry_steps: int | None = None
    redraw: bool = False  # pictures of runs that are scored, where they are not there
    images: int = 2
    inference_steps: int = 25
    inter_images: int = 50
    eval_samples: int = 64
    threads: int = 1

    def prompts(self, subject: str, kind: str = "scores") -> list[str]:
        """Of an evaluation: all, and of snapshots every third."""
        return self.world.prompts(subject)[: 1 if self.dry_steps else None : 3 if kind == "along" else 1]

    def folder(self, spec: dict) -> Path:
        return self.output / "runs" / digest(spec)

    def rate(self, row: Row) -> dict:
        """The learning rate of a row that has the rate of a system, as a flag."""
        if row.rate_of is None:
            return {}
        rates = {system: published for system, (_, _, published) in SYSTEMS.items()} | self.world.start_rates
        rates |= {} if row.of_grid else self.rates
        return dict(learning_rate=float(f"{rates[row.rate_of] * row.rate_factor:.3g}"))


# ---------------------------------------------------------------------------------------------------------------------
# Specifications
# ---------------------------------------------------------------------------------------------------------------------


def digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def script_of(method: str) -> ModuleType:
    """The script of a method, or of one that is untrained the script whose start it is."""
    return METHODS[method] if method in METHODS else UNTRAINED[method]


def tunes_weights(method: str) -> bool:
    return method not in RENDERED and script_of(method) in LEARNED


def learned_path(spec: dict, settings: Settings) -> Path:
    """The file or folder that a run leaves."""
    return settings.folder(spec) / LEARNED.get(script_of(spec["method"]), "learned_embeds.safetensors")


def stored_bytes(spec: dict, settings: Settings) -> int:
    """Of what a run leaves; 0 where nothing was learned and the model is what there was."""
    path = learned_path(spec, settings)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*")))


def parse(method: str, argv: list[str]) -> argparse.Namespace:
    """A run's arguments, by its method's own parser, which exits in one line where one is wrong."""
    return script_of(method).parse_args(argv)


def word_flag(method: str) -> str:
    """The flag of the word for the subject's class."""
    return "--class_word" if tunes_weights(method) else "--initializer_token"


@lru_cache
def flag_names(method: str) -> set[str]:
    return set(vars(parse(method, ["--train_data_dir", "x", word_flag(method), "x"])))


def make_spec(
    settings: Settings, method: str, subject: str, seed: int, flags: dict, cost: bool = False, variation: tuple[str, ...] = ()
) -> dict:
    """The specification of a run; `flags` are the paper's, and those that go with the size of a token are scaled here.

    paper_steps: steps in proportion to the paper's 30,000 of ZOODiP. Of runs that measure cost the seed is the round.
    """
    world = settings.world
    if method in RENDERED:
        return dict(world=world.name, method=method, subject=subject, seed=seed, flags={})
    scaled = {name: world.scaled(value) if name in ("tau", "intrinsic_dim") else value for name, value in flags.items()}
    if (paper_steps := scaled.pop("paper_steps", None)) is not None:
        scaled["max_train_steps"] = world.steps_of_paper(paper_steps)
    extra = {name: value for name, value in settings.extra.items() if name in flag_names(method)}
    all_flags = {**world.methods[method], **extra, **scaled}
    if "max_train_steps" in all_flags:
        steps = settings.dry_steps or round(all_flags["max_train_steps"] / (QUICK_SPEEDUP if settings.quick else 1))
        all_flags["max_train_steps"] = (settings.dry_steps or world.cost_steps) if cost else steps
    if settings.dry_steps and "num_class_images" in all_flags:
        all_flags["num_class_images"] = settings.dry_steps
    spec = dict(world=world.name, model=settings.model_id, method=method, subject=subject, seed=seed, flags=all_flags)
    return spec | ({"cost": True} if cost else {}) | ({"variation": sorted(variation)} if variation else {})


def spec_argv(spec: dict, settings: Settings) -> list[str]:
    """The command line of a run."""
    world, subject = settings.world, spec["subject"]
    described = spec["method"] == "described"
    captions = world.other_captions if "article" in spec.get("variation", ()) else world.captions
    argv = ["--pretrained_model_name_or_path", settings.model, "--train_data_dir", str(world.data / subject),
            word_flag(spec["method"]), world.description(subject) if described else world.class_word(subject),
            "--seed", str(spec["seed"]), "--cc_file", str(captions), "--no-final_picture",
            "--output_dir", str(settings.folder(spec))]  # fmt: skip
    for name, value in spec["flags"].items():
        if isinstance(value, bool):
            argv += [f"--{name}"] if value else [f"--no-{name}"] if name == "use_cc" else []
        else:
            argv += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    if "after" in spec:  # it goes on from another run's token
        argv += ["--initializer_token", str(settings.output / "runs" / spec["after"])]
    return argv


def spec_args(spec: dict, settings: Settings) -> argparse.Namespace:
    return parse(spec["method"], spec_argv(spec, settings))


def evaluation(settings: Settings, kind: str) -> dict:
    """What decides the scores of pictures beside the token: `scores` of the last one, `inter` (diversity), `along` of the
    snapshots, `best` as `scores` of the snapshot that those chose."""
    images = {"inter": settings.inter_images, "along": 1}.get(kind, settings.images)
    clip, dino = (Path(name).name if name else None for name in (settings.clip, settings.dino))
    return dict(kind=kind, images=images, scheduler=settings.world.scheduler, steps=settings.inference_steps,
                guidance=settings.world.guidance, clip=clip, dino=dino, prompts=1 if settings.dry_steps else None)  # fmt: skip


@dataclass
class Job:
    """A run and the evaluations that some table wants of it."""

    spec: dict
    kinds: set[str]

    def done(self, settings: Settings) -> bool:
        folder = settings.folder(self.spec)
        return (folder / "result.json").exists() and not any(self.to_score(settings))

    def to_score(self, settings: Settings) -> list[str]:
        """The evaluations that are not there, in the order in which they need one another."""
        folder = settings.folder(self.spec)
        redraw = settings.redraw and (self.spec["method"] not in METHODS or learned_path(self.spec, settings).exists())
        return [kind for kind in sorted(self.kinds) if not scored(folder, settings, kind)
                or (redraw and not pictures_path(folder, settings, kind).exists())]  # fmt: skip


def subjects_of(experiment: Experiment, settings: Settings) -> tuple[str, ...]:
    world = settings.world
    if experiment.chooses_rates:
        return settings.subjects or world.grid_subjects
    subjects = settings.subjects or (experiment.paper_subjects if world.paper_subjects else world.subjects[: experiment.breeds])
    return subjects[:1] if experiment.kind == "cost" or (experiment.grid and settings.quick) else subjects


def seeds_of(experiment: Experiment, settings: Settings) -> tuple[int, ...]:
    """Of runs that measure cost the rounds. Where there are only one or two subjects, seeds have to show what chance does."""
    if experiment.kind == "cost":
        return cost_rounds(settings)
    grid = experiment.grid or experiment.chooses_rates
    if settings.seeds:
        return settings.seeds[:1] if grid else settings.seeds
    few = len(subjects_of(experiment, settings)) <= 2 and not grid
    return settings.world.seeds[: max(experiment.seeds, 3 if few else 1)]


def cost_rounds(settings: Settings) -> tuple[int, ...]:
    return tuple(range(1 if settings.quick or settings.dry_steps else COST_ROUNDS))


def jobs_of(experiment: Experiment, row: Row, settings: Settings) -> list[Job]:
    """The runs of a row."""
    if row.spread_of:
        return []
    fixed = row.method in (*UNTRAINED, *RENDERED)  # nothing is drawn before the first step
    seeds = seeds_of(experiment, settings)[: 1 if fixed else None]
    kinds = {experiment.kind} & {"scores", "inter"}
    if not fixed and not tunes_weights(row.method) and (experiment.along or row.at == "best"):
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
    """The runs of these tables, each once with all evaluations that any of them wants."""
    jobs = {}
    for experiment in experiments:
        for row in experiment.rows:
            for job in jobs_of(experiment, row, settings) + cost_jobs(experiment, row, settings):
                jobs.setdefault(digest(job.spec), Job(job.spec, set())).kinds.update(job.kinds)
    return list(jobs.values())


def estimated_seconds(job: Job, settings: Settings) -> float:
    """A guess from the world's measured speed; loading and judging included roughly."""
    world, spec = settings.world, job.spec
    if spec["method"] in RENDERED:
        return 15.0
    args = spec_args(spec, settings)
    steps, calls, forwards = 0, 1, 3  # of gradients: a backward pass is two forwards
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
    for kind in job.kinds:
        pictures = evaluation(settings, kind)["images"] * (len(settings.prompts(spec["subject"], kind)) if kind != "inter" else 1)
        pictures *= len(ALONG_SEEDS) * (SNAPSHOTS + 1) if kind == "along" else 1
        judged += pictures * settings.inference_steps * (3 if kind == "scores" and tunes_weights(spec["method"]) else 2)
    return seconds + judged * world.seconds_per_forward


# ---------------------------------------------------------------------------------------------------------------------
# What is done
# ---------------------------------------------------------------------------------------------------------------------


def scores_path(folder: Path, settings: Settings, kind: str) -> Path:
    return folder / f"scores-{digest(evaluation(settings, kind))}.json"


def pictures_path(folder: Path, settings: Settings, kind: str) -> Path:
    """The folder of the pictures that were scored."""
    return folder / f"pictures-{digest(evaluation(settings, kind))}"


def scored(folder: Path, settings: Settings, kind: str) -> bool:
    """Is every score there that can be had? One that a missing scorer left out is made up for when it is no longer missing."""
    path = scores_path(folder, settings, kind)
    if not path.exists():
        return False
    names = ("CLIP_inter", "DINO_inter") if kind == "inter" else ("CLIP-I", "DINO")
    wanted = {name for name, scorer in zip(names, (settings.clip, settings.dino), strict=True)
              if scorer and scorer not in settings.missing}  # fmt: skip
    return wanted <= set(json.loads(path.read_text())["scores"])


def read_run(spec: dict, settings: Settings, at: str = "last") -> dict | None:
    """result.json with all scores that are there; None where the run is not done. `at`: of which token the scores are."""
    folder = settings.folder(spec)
    if not (folder / "result.json").exists():
        return None
    record = json.loads((folder / "result.json").read_text())
    files = {kind: scores_path(folder, settings, kind) for kind in ("along", "inter", "best" if at == "best" else "scores")}
    found = {kind: json.loads(path.read_text()) for kind, path in files.items() if path.exists()}
    if at == "best" and "best" not in found:
        return None
    for kind, content in found.items():
        if kind == "along":  # pictures of the snapshots join the points of the curve
            points = {point["step"]: point for point in content["points"]}
            record["curve"] = [point | points.get(point["step"], {}) for point in record["curve"]]
        else:
            record.update(content["scores"])
    return record


def best_step(curve: list[dict]) -> int:
    """The step whose pictures, of those that choose, are most like the subject; of equals the first. Without CLIP the last."""
    scored = [point for point in curve if "choosing" in point]
    return max(scored, key=lambda point: point["choosing"])["step"] if scored else curve[-1]["step"]


def collect(experiment: Experiment, settings: Settings) -> dict[str, stats.Records]:
    """{row label: {(subject, seed): record}} of the runs that are done, and of the controls."""
    found = {}
    for row in experiment.rows:
        records = {}
        for job in jobs_of(experiment, row, settings):
            record = read_run(job.spec, settings, row.at)
            if record is not None:
                if experiment.kind != "cost":
                    record.pop("steps_per_second", None)  # of a run beside others
                if not record.get("removed"):  # no refresh of a subspace, so no share
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
            found[row.label] = spread([found[label] for label in row.spread_of], experiment.columns)
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
        removed = stats.control_removed(control.kind, tau, 1e-3, dim, 30)
        found[control.label] = {(stats.NO_SUBJECT, 0): stats.derived(dict(removed=removed), tau)}
    return found


def spread(rows: list[stats.Records], scores: Iterable[str]) -> stats.Records:
    """The standard deviation of each score over rows, of every run that all of them have."""
    records: stats.Records = {}
    for run in set.intersection(*(set(records) for records in rows)):
        values = {score: [records[run][score] for records in rows if score in records[run]] for score in scores}
        records[run] = {score: stdev(some) for score, some in values.items() if len(some) == len(rows)}
    return records


def pack_runs(jobs: list[Job], settings: Settings, path: Path) -> None:
    """All that tables are made of, of the jobs that are done, in one compressed file. The same runs give the same bytes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for job in sorted(jobs, key=lambda job: digest(job.spec)):
            folder, of_snapshot = settings.folder(job.spec), "learned_embeds-steps-"
            for file in sorted(folder.glob("*")):
                if file.name.startswith(of_snapshot) and "along" not in job.kinds:
                    continue  # no picture is of it
                if (folder / "result.json").exists() and ARCHIVED.fullmatch(name := f"{folder.name}/{file.name}"):
                    entry = tarfile.TarInfo(name)
                    entry.size = file.stat().st_size
                    archive.addfile(entry, io.BytesIO(file.read_bytes()))
    write_atomically(path, lzma.compress(content.getvalue()))


def unpack_runs(path: Path, output: Path) -> None:
    """The runs of `pack_runs` into <output>/runs, where a file is not there yet. Raises InputError."""
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(path.read_bytes()))) as archive:
            for entry in archive:
                target = output / "runs" / entry.name
                if ARCHIVED.fullmatch(entry.name) and entry.isfile() and not target.exists():  # nothing else is written
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(target, archive.extractfile(entry).read())
    except (tarfile.TarError, lzma.LZMAError, OSError) as error:
        raise InputError(f"{path}: is no whole archive of runs ({error}); restore or remove it") from error
