#!/usr/bin/env python
"""Do creatures keep their own attributes? Methods of zoodip.binding on the miniature, drawn, judged and compared by prompt.

    python -m reproduction.binding --dry_run                                   # how many pictures, how many hours
    python -m reproduction.binding --report reproduction/binding               # everything, and the report
    python -m reproduction.binding --split development --sets S1               # vary one setting at a time, to choose it
    python -m reproduction.binding --report reproduction/binding --report_only # the tables again, from the records

The sets S1 to S5 are described in binding_sets.py, the rows in binding_rows.py. One command does everything: it has the twelve
breeds' tokens learned, as the suite's tables do; trains a network that counts creatures; draws; judges the two 64 x 64 halves of
each picture by that network and by the miniature's classifier; and measures the time of each row and what steps without
backpropagation reach. Finished work is not repeated, so an interrupted command continues. The rows that matter come first, with
some prompts of every set in turn, so that --hours gives a report on the prompts that all rows have by then. Writes RESULTS.md,
records.json.xz (all that was read off pictures) and steps.png to --report, and pictures and sheets to --output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from miniature.critters import held_out_breeds
from reproduction import plans, runs, tables, workers
from reproduction.binding_judges import MODEL, SIDE, load_counter, read_halves, train_counter
from reproduction.binding_report import read_records, write_records, write_report
from reproduction.binding_rows import CORE, SETTINGS, ceiling_latents, passes, rows_of, settings_of
from reproduction.binding_sets import SETS, TEST_PROMPTS, Task, tasks_of
from reproduction.binding_steps import compare_steps
from zoodip.arguments import new_parser
from zoodip.binding_drawing import decode, draw_bound
from zoodip.binding_settings import FULL, Settings
from zoodip.errors import InputError, run_script
from zoodip.files import write_image, write_json
from zoodip.folder import model_digest
from zoodip.model import SCHEDULERS, build_scheduler, load_pipeline
from zoodip.pictures import picture_sheet
from zoodip.records import ROOT, environment, git_commit, hardware, plain_arguments

Tokens = dict[str, str]  # {breed: file of its token}
SEEDS_APART = 1000  # between prompts; the development prompts' first noises were seeds 0 and 1
MAP_CELLS = 64  # places of an attention map per creature, in all sets; the default would be another level for one creature

# ------------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """Pictures of one row that are drawn together."""

    set_name: str
    row: str
    quantization: str
    tasks: tuple[Task, ...]
    seeds: tuple[tuple[int, ...], ...]  # of each task
    settings: Settings
    scheduler: str
    weights: str  # digest of the model and, if prompts have a token, of the tokens

    def stem(self) -> str:
        """The name of its files, made from everything that its pictures depend on."""
        content = json.dumps(asdict(self), sort_keys=True)
        return f"{self.set_name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def pictures(self) -> list[tuple[Task, int]]:
        """(task, seed) of each picture, in the order in which they are drawn."""
        return [(task, seed) for task, seeds in zip(self.tasks, self.seeds, strict=True) for seed in seeds]

    def size(self) -> dict[str, int]:
        return dict(height=SIDE, width=SIDE * len(self.tasks[0].creatures))

    def done(self, output: Path) -> bool:
        return (output / "pictures" / f"{self.stem()}.json").exists()


def jobs_of(args: argparse.Namespace, tokens: Tokens) -> list[Job]:
    """All pictures: unquantised before 4 bits, the rows that matter before the others, some prompts of each set in turn.

    Every prompt has its own noises, the same in every row. The rows that matter less have only the first: differences are paired
    by prompt, and two noises of a prompt say little more than one.
    """
    digest = model_digest(MODEL, None)[:12]
    learned = hashlib.sha256(b"".join(Path(file).read_bytes() for file in tokens.values() if Path(file).exists())).hexdigest()
    jobs: list[tuple[tuple[int, bool, int], Job]] = []
    each = max(1, args.batch_size // len(args.seeds))
    for k, quantization in enumerate(args.quantization):
        for set_name in args.sets:
            tasks = tasks_of(set_name, args.split)[: args.prompts]
            weights = f"{digest}-{learned[:12]}" if needs_tokens(set_name) else digest
            noises = [tuple(SEEDS_APART * (i + 1) + seed for seed in args.seeds) for i in range(len(tasks))]
            for number, first in enumerate(range(0, len(tasks), each)):
                for row in args.rows or rows_of(set_name, quantization, args.split):
                    if row == "ceiling" and set_name == "S5":  # a single creature cannot be mixed up with another
                        continue
                    settings = settings_of(row, args.steps, args.guidance)
                    if settings.map_steps:
                        settings = replace(settings, map_cells=MAP_CELLS * len(tasks[0].creatures))
                    together = slice(first, first + each)
                    seeds = tuple(own if row in CORE else own[:1] for own in noises[together])
                    job = Job(set_name, row, quantization, tuple(tasks[together]), seeds, settings, args.scheduler, weights)
                    jobs.append(((k, row not in CORE, number), job))
    return [job for _, job in sorted(jobs, key=lambda entry: entry[0])]  # a stable sort, which keeps the order of equals


def needs_tokens(set_name: str) -> bool:
    return set_name in ("S2", "S4")


def token_jobs(args: argparse.Namespace) -> tuple[runs.Settings, dict[str, runs.Job]]:
    """The suite's runs that learn the twelve breeds' tokens, in 4 bits: {breed: run}."""
    settings = tables.make_settings(tables.parse_args(["--output", str(args.runs)]))
    breeds = [breed.name for breed in held_out_breeds()]
    return settings, {breed: runs.Job(runs.make_spec(settings, "zoodip", breed, 0, {}), set()) for breed in breeds}


def token_files(settings: runs.Settings, jobs: dict[str, runs.Job]) -> Tokens:
    return {breed: str(settings.folder(job.spec) / "learned_embeds.safetensors") for breed, job in jobs.items()}


def learn_tokens(settings: runs.Settings, jobs: dict[str, runs.Job], count: int) -> None:
    """Learn the tokens that are not learned yet. Raises InputError if one fails."""
    settings.world.prepare(jobs)
    if failures := workers.run_jobs(list(jobs.values()), settings, count):
        raise InputError(f"{len(failures)} tokens could not be learned, the first: {failures[0]}; start the same command again")


# ---------------------------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=1)
def pipeline_of(quantization: str, tokens: tuple[tuple[str, str], ...], device: str):
    """The miniature, with <furmix> for furmix's token and so on."""
    pipeline = load_pipeline(str(MODEL), quantization, device=device)
    for breed, file in tokens:
        pipeline.load_textual_inversion(file, token=f"<{breed}>")
    return pipeline


def draw(job: Job, tokens: Tokens, device: str) -> tuple[list[Image.Image], dict]:
    """The pictures of a job, and what one picture costs."""
    pipeline = pipeline_of(job.quantization, tuple(tokens.items()), device)
    prompts = [task.prompt for task in job.tasks]
    # a multistep scheduler's history holds latents as they were before a loss moved them
    scheduler = None if job.scheduler == "ddim" else build_scheduler(MODEL, job.scheduler)
    if job.row == "ceiling":
        latents = ceiling_latents(pipeline, prompts, settings=job.settings, seeds=job.seeds, scheduler=scheduler, **job.size())
        images = decode(pipeline, latents)
        return images, dict(forwards=2 * passes(job.settings, 0)[0], backwards=0)
    pictures = draw_bound(pipeline, prompts, settings=job.settings, seeds=job.seeds, scheduler=scheduler,
                          batch_size=len(job.pictures()), **job.size())  # fmt: skip
    return [picture.image for picture in pictures], dict(forwards=pictures[0].forwards, backwards=pictures[0].backwards)


def draw_job(job: Job, output: Path, tokens: Tokens, device: str) -> None:
    """Write STEM.png, the pictures one below the other, then STEM.json, which says that they are done; remove old readings."""
    for old in (output / "readings").glob(f"{job.stem()}-*"):
        old.unlink()
    images, cost = draw(job, tokens, device)
    column = Image.new("RGB", (images[0].width, SIDE * len(images)))
    for k, image in enumerate(images):
        column.paste(image, (0, SIDE * k))
    write_image(output / "pictures" / f"{job.stem()}.png", column)
    write_json(output / "pictures" / f"{job.stem()}.json", cost | dict(device=hardware(device), commit=git_commit()))


def draw_all(jobs: Sequence[Job], output: Path, tokens: Tokens, device: str, count: int, hours: float | None) -> None:
    """Draw what is missing, in `count` one-thread processes, for at most `hours`. Raises InputError if a process is killed."""
    last = time.monotonic() + 3600 * (float("inf") if hours is None else hours)
    waiting = [job for job in jobs if not job.done(output)]
    with tqdm(total=sum(len(job.pictures()) for job in waiting), unit="picture", smoothing=0.02) as bar:
        for job, _ in workers.in_processes(
            partial(draw_job, output=output, tokens=tokens, device=device), waiting, count, threads=1
        ):
            bar.update(len(job.pictures()))
            if time.monotonic() > last:
                break


def images_of(job: Job, output: Path) -> list[Image.Image]:
    """The pictures of a job, in the order of (prompt, seed)."""
    with Image.open(output / "pictures" / f"{job.stem()}.png") as column:
        return [column.crop((0, top, column.width, top + SIDE)) for top in range(0, column.height, SIDE)]


# ------------------------------------------------------------------------------------------------------------- measurements


def measured_rows(args: argparse.Namespace) -> dict[str, Settings]:
    return {row: settings_of(row, args.steps, args.guidance) for row in (*CORE, "published")}


def measure_costs(args: argparse.Namespace) -> dict:
    """Processor seconds of one picture by itself, rows in turn on up to eight prompts; other programs do not affect them."""
    torch.set_num_threads(1)
    found = []
    tasks = tasks_of("S1", "development")[: min(8, args.prompts)]
    for warm, task in enumerate([tasks[0], *tasks]):  # the first is not counted
        for row, settings in measured_rows(args).items():
            job = Job("S1", row, "none", (task,), ((0,),), settings, args.scheduler, "")
            started = time.process_time()
            _, cost = draw(job, {}, "cpu")
            if warm:
                found.append(dict(row=row, prompt=task.prompt, seconds=round(time.process_time() - started, 3), **cost))
    return dict(pictures=found)


def once(output: Path, name: str, depends_on: dict, make: Callable[[], dict]) -> dict:
    """What `make` returns, kept in a file whose name has a digest of what it depends on, with its device and commit."""
    path = output / f"{name}-{runs.digest(depends_on)}.json"
    if not path.exists():
        write_json(path, make() | dict(device=hardware(), commit=git_commit()))
    return json.loads(path.read_text())


def seconds_of_passes() -> tuple[float, float]:
    """Seconds on a CPU, now and here, per sample of a forward, and of a forward and backward, in batches."""
    torch.set_num_threads(1)
    unet = pipeline_of("none", (), "cpu").unet
    latents = torch.randn(16, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    states = torch.zeros(16, 32, unet.config.cross_attention_dim)
    taken = []
    for count, gradient in ((16, False), (16, False), (8, True)):  # the first warms up
        started = time.perf_counter()
        with torch.set_grad_enabled(gradient):
            wanted = latents[:count].clone().requires_grad_(gradient)
            noise = unet(wanted, 500, encoder_hidden_states=states[:count]).sample
            if gradient:
                torch.autograd.grad(noise.square().mean(), wanted)
        taken.append(time.perf_counter() - started)
    return taken[1] / 16, taken[2] / 8


def print_plan(args: argparse.Namespace, jobs: Sequence[Job], learners: tuple[runs.Settings, dict[str, runs.Job]]) -> None:
    """Print how many pictures each table needs, and the hours of one process at the present speed."""
    forward, both = seconds_of_passes()
    hours: dict[tuple[str, str], list[float]] = {}
    for job in jobs:
        creatures, pictures = len(job.tasks[0].creatures), len(job.pictures())
        forwards, backwards = passes(job.settings, creatures)
        ceiling = 1.25 if job.row == "ceiling" else 1.0  # two windows of 5/8 of the width
        alone = max(0, forwards - 2 * job.settings.steps - backwards)  # for the anchors
        seconds = ceiling * (forwards - backwards - alone) * forward + alone * both / 3 + backwards * both
        entry = hours.setdefault((job.set_name, job.quantization), [0, 0, 0])
        entry[0] += pictures
        if not job.done(args.output):
            entry[1] += pictures
            entry[2] += pictures * seconds * creatures / 2 / 3600
    for (set_name, quantization), (pictures, waiting, time_left) in hours.items():
        print(f"{set_name}, {quantization}: {pictures} pictures, {waiting} to draw, {time_left:.2f} hours")
    settings, learning = learners
    tokens = sum(plans.estimated_seconds(job, settings) for job in learning.values() if not job.done(settings)) / 3600
    total = tokens + sum(entry[2] for entry in hours.values())
    pictures = sum(int(entry[0]) for entry in hours.values())
    print(f"tokens: {tokens:.2f} hours; in all {pictures} pictures, {total:.1f} hours of one CPU process at this moment's speed, "
          f"{total / args.jobs:.1f} with --jobs {args.jobs} if there is room for them")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ records


def read_job(job: Job, output: Path, judges: str) -> None:
    """Write what is read off the halves of each of a job's pictures. `judges`: digest of the judges' weights."""
    counter, _ = load_counter(output)
    write_json(readings(job, output, judges), [read_halves(image, counter) for image in images_of(job, output)])


def readings(job: Job, output: Path, judges: str) -> Path:
    return output / "readings" / f"{job.stem()}-{judges}.json"


def read_pictures(jobs: Sequence[Job], output: Path, count: int) -> list[dict]:
    """What is read off each drawn picture: one record per picture. Those not read yet are read in `count` processes."""
    weights = (output / "counter.safetensors", ROOT / "miniature" / "classifier" / "model.safetensors")
    judges = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:12]
    (output / "readings").mkdir(exist_ok=True)
    drawn = [job for job in jobs if job.done(output)]
    waiting = [job for job in drawn if not readings(job, output, judges).exists()]
    reading = workers.in_processes(partial(read_job, output=output, judges=judges), waiting, count, threads=1)
    for _ in tqdm(reading, total=len(waiting), desc="judging", leave=False):
        pass
    found = []
    for job in drawn:
        cost = json.loads((output / "pictures" / f"{job.stem()}.json").read_text())
        of_each = json.loads(readings(job, output, judges).read_text())
        for (task, seed), halves in zip(job.pictures(), of_each, strict=True):
            about = dict(set=job.set_name, quantization=job.quantization, row=job.row, prompt=task.prompt, seed=seed)
            found.append(dict(about, **cost, halves=halves))
    return found


def sheet(jobs: Sequence[Job], output: Path, most: int = 8) -> Image.Image:
    """The pictures of the first prompts and their first seeds, a line per prompt, rows side by side."""
    rows = list(dict.fromkeys(job.row for job in jobs))
    lines: dict[str, list[Image.Image]] = {}
    for job in jobs:
        firsts: dict[str, Image.Image] = {}
        for (task, _), image in zip(job.pictures(), images_of(job, output), strict=True):
            firsts.setdefault(task.prompt, image)
        for prompt, image in firsts.items():
            lines.setdefault(prompt, []).append(image)
    whole = [(pictures, prompt) for prompt, pictures in lines.items() if len(pictures) == len(rows)][:most]
    return picture_sheet(whole, cell=96, aspect=len(jobs[0].tasks[0].creatures), headings=[row.split(":")[0] for row in rows])


def write_sheets(jobs: Sequence[Job], output: Path, report: Path) -> None:
    """Write a sheet of all rows to `output`, and one of the rows that matter, on fewer prompts, to `report`, which shows it."""
    for set_name, quantization in dict.fromkeys((job.set_name, job.quantization) for job in jobs):
        drawn = [job for job in jobs if (job.set_name, job.quantization) == (set_name, quantization) and job.done(output)]
        core, name = [job for job in drawn if job.row in CORE], f"{set_name}-{quantization}"
        if drawn:
            write_image(output / f"{name}.png", sheet(drawn, output))
        if core:
            write_image(report / f"{name}.jpg", sheet(core, output, most=6))


# ------------------------------------------------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sets", nargs="+", default=list(SETS), choices=SETS, help="sets of prompts to draw")
    add("--rows", nargs="+", default=None, choices=list(SETTINGS), help="methods to draw; default: those of each table")
    add("--split", default="test", choices=["test", "development"], help="prompts to report, or to choose settings on")
    add("--prompts", type=int, default=TEST_PROMPTS, help="prompts of each set, at most")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        help="one picture for each, with noise that differs between prompts; less important rows use only the first",
    )
    add("--quantization", nargs="+", default=["none", "nf4"], choices=["none", "nf4"], help="quantisation of the model")
    add("--scheduler", default="ddim", choices=SCHEDULERS, help="scheduler of every row; DPM-Solver++ needs 15 steps")
    add("--steps", type=int, default=25, help="denoising steps")
    add("--guidance", type=float, default=5.0, help="classifier-free guidance scale")
    add("--batch_size", type=int, default=8, help="pictures drawn together")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, choices=["cpu", "cuda"], help="where pictures are drawn; costs are always those of a CPU")
    add("--counter_pictures", type=int, default=3000, help="renders that the counter of creatures learns from")
    add("--forwards", type=int, default=96, help="forwards that each step without backpropagation may use per composite")
    add("--jobs", type=int, default=os.cpu_count(), help="processes, with one thread each")
    add("--hours", type=float, default=None, help="hours to draw, at most; the report covers the prompts that every row has")
    add(
        "--runs", type=Path, default=Path("results/reproduction/miniature"), help="folder of the suite's runs: the breeds' tokens"
    )
    add("--output", type=Path, default=Path("results/reproduction/binding"), help="folder for pictures")
    add("--report", type=Path, default=None, help="folder for RESULTS.md, records.json.xz and steps.png; default: --output")
    add("--report_only", action="store_true", help="draw nothing; write the tables from --report's records")
    add("--dry_run", action="store_true", help="only print how many pictures and hours it would take")
    args = parser.parse_args(argv)
    for name in ("prompts", "steps", "batch_size", "jobs", "counter_pictures", "forwards"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 1 <= args.guidance < float("inf"):
        parser.error(f"--guidance must be at least 1, got {args.guidance}")
    return args


def main(args: argparse.Namespace) -> None:
    output, report = args.output, args.report or args.output
    if args.report_only:
        write_report(read_records(report / "records.json.xz"), report)
        return
    settings, learning = token_jobs(args)
    tokens = token_files(settings, learning)  # {breed: file}, learned or not
    if args.dry_run:
        print_plan(args, jobs_of(args, tokens), (settings, learning))
        return
    for folder in (output / "pictures", report):
        folder.mkdir(parents=True, exist_ok=True)
    if any(map(needs_tokens, args.sets)):
        learn_tokens(settings, learning, args.jobs)
    else:
        tokens = {}
    if not (output / "counter.json").exists() or load_counter(output)[1]["pictures"] != args.counter_pictures:
        train_counter(output, args.counter_pictures)
    jobs = jobs_of(args, tokens)
    draw_all(jobs, output, tokens, args.device, args.jobs, args.hours)
    prompts = [task.prompt for task in tasks_of("S1", "development")[: min(8, args.prompts)]]
    how = dict(height=SIDE, width=2 * SIDE, budget=args.forwards)
    of_all = dict(weights=model_digest(MODEL, None), prompts=prompts)
    of_costs = dict(
        of_all, scheduler=args.scheduler, rows={row: asdict(settings) for row, settings in measured_rows(args).items()}
    )
    of_steps = dict(of_all, full=asdict(FULL), **how)
    records = dict(
        arguments=plain_arguments(vars(args)), **environment(), counter=load_counter(output)[1],
        costs=once(output, "costs", of_costs, lambda: measure_costs(args)),
        steps=once(output, "steps", of_steps, lambda: compare_steps(pipeline_of("none", (), "cpu"), prompts, **how)),
        pictures=read_pictures(jobs, output, args.jobs),
    )  # fmt: skip
    write_records(report / "records.json.xz", records)
    write_sheets(jobs, output, report)
    write_report(records, report)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
