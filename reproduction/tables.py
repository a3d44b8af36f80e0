#!/usr/bin/env python
"""The paper's tables, each a list of runs: does what is not done, then writes RESULTS.md and RESULTS.html.

    python -m reproduction.tables                                  # the miniature, all but the tables on request
    python -m reproduction.tables --quick --jobs 2                 # the same in about an hour: 2 subjects, 1 seed, short runs
    python -m reproduction.tables --tables 3 S4 --jobs 2           # some tables
    python -m reproduction.tables --tables TuningRates             # choose the learning rates of weight tuning, by pictures
    python -m reproduction.tables --tables Tuning TuneQDM KronA --subjects vaxmo mexti runma      # weight tuning's own tables
    python -m reproduction.tables --dry_run --jobs 2               # what would run, and how long, by table
    python -m reproduction.tables --redraw --report FOLDER         # draw the pictures of a report again, from its tokens
    python -m reproduction.tables --shard 1/8                      # the first of eight machines; afterwards, on one, without it
    python -m reproduction.tables --world sd15 --data dataset --prompts dataset/prompts_and_classes.txt

Interrupted, the same command continues. Flags that are not listed below are train_zoodip.py's and go to every run (for example
--variant fp16 --mixed_precision bf16). `experiments.py` is the one list of what is run and what was published; `claims.py` is the
list of claims and of how they are judged.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import train_zoodip
from reproduction import archives, plans, rates, report, runs, workers
from reproduction.experiments import BY_NAME
from reproduction.runs import Job, Settings
from reproduction.scores import load_scorer
from reproduction.worlds import WORLDS
from zoodip.arguments import new_parser
from zoodip.errors import InputError, run_script
from zoodip.folder import model_digest, resolve_model
from zoodip.records import table

LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
                      "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}  # fmt: skip
SUITE_FLAGS = {"train_data_dir", "initializer_token", "seed", "output_dir", "pretrained_model_name_or_path"}


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--world", default="miniature", choices=list(WORLDS), help="the bundled miniature, or Stable Diffusion v1.5")
    add("--tables", nargs="+", default=None, choices=list(BY_NAME), metavar="TABLE", help="tables to make; default: the world's")
    add("--quick", action="store_true", help="two subjects, one seed, a quarter of the steps, one picture per prompt")
    add("--subjects", nargs="+", default=None, help="subjects to use instead of the tables' own")
    add("--seeds", type=int, nargs="+", default=None, help="seeds to use instead of the world's")
    add("--model", default=None, help="model folder or hub name to use instead of the world's")
    add("--data", type=Path, default=Path("dataset"), help="sd15: folder of DreamBooth's subject folders")
    add("--prompts", type=Path, default=Path("dataset/prompts_and_classes.txt"), help="sd15: DreamBooth's prompts")
    add("--clip", default=None, help="CLIP scorer to use instead of the world's: hub name or folder")
    add("--dino", default=None, help="DINOv2 scorer to use instead of the world's: hub name or folder")
    add("--output", type=Path, default=None, help="folder for runs; default: results/reproduction/<world>")
    add(
        "--report",
        type=Path,
        default=None,
        help=f"folder for RESULTS.md and .html, results.json, plots, sheets and {archives.ARCHIVE}, from which runs are "
        "taken; default: --output",
    )
    add("--rates", type=Path, default=rates.FILE, help="learning rates for weight tuning, chosen by --tables TuningRates")
    add("--jobs", type=int, default=1, help="runs at once")
    add("--threads", type=int, default=1, help="CPU threads per run")
    add("--shard", default=None, metavar="I/K", help="do only every K-th run, from the I-th, and write no report; runs that "
        "measure cost are the first shard's")  # fmt: skip
    add("--dry_run", action="store_true", help="only print what would run, and an estimate of the hours")
    add("--dry_steps", type=int, default=None, help="run everything for this many steps with one picture, as a smoke test")
    add("--report_only", action="store_true", help="run nothing; report on the finished runs")
    add("--redraw", action="store_true", help="redraw missing pictures of scored runs, to look at them")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Exits with code 2 and one line on an error. `extra`: the flags of train_zoodip.py that were given."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", args.shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            parser.error(f"--shard must be I/K with 1 <= I <= K, for example 2/8, got {args.shard!r}")
        args.shard = (int(match[1]), int(match[2]))
    for name in ("jobs", "threads", "dry_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.report_only and args.redraw:
        parser.error("--redraw draws, and --report_only runs nothing; give one of them")
    args.tables = args.tables or [name for name, experiment in BY_NAME.items() if experiment.is_default_in(args.world)]
    if elsewhere := [name for name in args.tables if args.world not in BY_NAME[name].worlds]:
        parser.error(f"--tables: {elsewhere[0]} cannot be made in --world {args.world}; leave it out")
    train_zoodip.parse_args(["--train_data_dir", "x", "--initializer_token", "x", *rest])  # exits if a value is wrong
    args.extra = given_flags(rest)
    if forbidden := SUITE_FLAGS & set(args.extra):
        parser.error(f"--{sorted(forbidden)[0]} is set by the suite; use --subjects, --seeds, --output or --model")
    return args


def given_flags(argv: list[str]) -> dict:
    """The flags of train_zoodip.py named on a command line, also those at their default: the suite has other defaults."""
    parser, not_given = train_zoodip.build_parser(), object()
    names = vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, not_given)))
    return {name: value for name, value in vars(args).items() if value is not not_given}


def take_shard_of_launcher(args: argparse.Namespace) -> None:
    """Under `accelerate launch` or torchrun, make each process one shard on its own GPU, not part of one distributed run."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return
    args.shard = (int(os.environ["RANK"]) + 1, processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    local = int(os.environ["LOCAL_RANK"])
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)
    for name in [name for name in os.environ if name in LAUNCHER_VARIABLES or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # the workers inherit the rest


def make_settings(args: argparse.Namespace) -> Settings:
    """Raises InputError if the model's folder is incomplete."""
    output = args.output or Path("results") / "reproduction" / args.world
    world = WORLDS[args.world](output, args.data, args.prompts)
    model, variant = args.model or world.model, args.extra.get("variant")
    local = Path(model).is_dir()
    defaults = vars(build_parser().parse_args([])) | dict(model=world.model, clip=world.clip, dino=world.dino)
    given = {name: value for name in ("model", "clip", "dino", "data", "prompts", "rates")
             if (value := getattr(args, name)) not in (None, defaults[name])}  # fmt: skip
    settings = Settings(
        world, output, model, model_digest(*resolve_model(model, None, variant))[:12] if local else model,
        args.clip or world.clip, args.dino or world.dino, subjects=args.subjects and tuple(args.subjects),
        seeds=args.seeds and tuple(args.seeds), extra=args.extra, given=given, images=world.images,
        inference_steps=world.inference_steps, threads=args.threads, redraw=args.redraw,
    )  # fmt: skip
    if args.quick:
        settings.quick, settings.images, settings.inter_images, settings.eval_samples = True, 1, 12, 32
    if args.dry_steps:
        settings.dry_steps, settings.images, settings.inter_images, settings.inference_steps = args.dry_steps, 1, 2, 2
        settings.eval_samples = 2
    if args.quick or args.dry_steps:
        settings.seeds = settings.seeds or world.seeds[:1]
        settings.subjects = settings.subjects or world.subjects[: 1 if args.dry_steps else 2]
    if world.grid_subjects and any(row.rate_of and not row.of_grid for name in args.tables for row in BY_NAME[name].rows):
        settings.rates = rates.read_rates(args.rates, settings.model_id)
    return settings


def print_plan(jobs: list[Job], args: argparse.Namespace, settings: Settings, archived: Settings) -> None:
    """Print every run with its seconds, then the hours of every table; a run counts in the first table that needs it.

    `archived`: the settings with the runs of the report's archive.
    """
    waiting = [job for job in jobs if not (job.done(settings) or job.done(archived))]
    seconds = dict.fromkeys((runs.digest(job.spec) for job in jobs), 0.0)
    seconds |= {runs.digest(job.spec): plans.estimated_seconds(job, settings) for job in waiting}
    gigabytes = sum(plans.estimated_bytes(job, settings) for job in waiting) / 1e9
    for job in jobs:
        spec, duration = job.spec, seconds[runs.digest(job.spec)]
        flags = " ".join([*(f"--{name} {value}" for name, value in spec["flags"].items()), *spec.get("variation", [])])
        print(f"{runs.digest(spec)}  {f'{duration:.0f} s' if duration else 'done':>8}  {'cost ' if spec.get('cost') else ''}"
              f"{spec['method']} {spec['subject']} seed {spec['seed']}  {flags}")  # fmt: skip
    hours = {name: value / 3600 for name, value in seconds.items()}
    shared = {runs.digest(job.spec): hours[runs.digest(job.spec)] / (1 if job.spec.get("cost") else args.jobs) for job in jobs}
    lines, counted = [], set()
    for name in args.tables:
        asked = {runs.digest(job.spec) for job in plans.plan([BY_NAME[name]], settings)}
        new, counted = asked - counted, counted | asked
        lines.append([BY_NAME[name].heading, len(asked), f"{sum(map(hours.__getitem__, asked)):.1f}", len(new),
                      f"{sum(map(shared.__getitem__, new)):.1f}"])  # fmt: skip
    print(table(["", "runs", "hours of one process", "not in a table above", f"hours of these, --jobs {args.jobs}"], lines))
    print(f"{len(jobs)} runs, {sum(value > 0 for value in seconds.values())} to do: about {sum(hours.values()):.1f} hours of one "
          f"process on {settings.world.speed_of}, {sum(shared.values()):.1f} with --jobs {args.jobs} if there is room for them; "
          f"runs that measure cost go alone; all pictures and weights take about {gigabytes:.1f} GB")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    take_shard_of_launcher(args)
    settings = make_settings(args)
    jobs = plans.plan((BY_NAME[name] for name in args.tables), settings)
    folder = args.report or settings.output
    if args.dry_run:
        with TemporaryDirectory() as restored:
            archives.unpack_runs(folder / archives.ARCHIVE, Path(restored))
            print_plan(jobs, args, settings, replace(settings, output=Path(restored)))
        return
    archives.unpack_runs(folder / archives.ARCHIVE, settings.output)
    if args.report_only and not any(job.done(settings) for job in jobs):
        raise InputError(f"--report_only: no run of these tables is finished in {settings.output / 'runs'} or "
                         f"{folder / archives.ARCHIVE}; correct --output or --report")  # fmt: skip
    failures = []
    settings.missing = {name for name in (settings.clip, settings.dino) if name and load_scorer(name) is None}
    if not args.report_only:
        mine = workers.share_of(jobs, args.shard) if args.shard else jobs
        if args.redraw:  # and nothing else
            mine = [job for job in mine if job.done(replace(settings, redraw=False))]
        settings.world.prepare({job.spec["subject"] for job in jobs})  # for all shards, so that each writes the same
        failures = workers.run_jobs(mine, settings, args.jobs)
    if args.shard is None:
        report.write_report(args.tables, jobs, settings, folder)
        if any(BY_NAME[name].chooses_rates for name in args.tables):
            trial = args.quick or args.dry_steps or args.subjects or args.seeds or args.extra  # not for other tables
            rates.write_rates(settings, folder / args.rates.name if trial else args.rates)
    if failures:
        raise InputError(f"{len(failures)} runs failed, the first: {failures[0]}; fix it and start the same command again")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
