#!/usr/bin/env python
"""Fewer forwards: which form of the Gauss-Newton trainer is best, and what it gains over the paper's loop at equal forwards.

    python -m reproduction.fewer_forwards --dry_run             # what would run, and about how long
    python -m reproduction.fewer_forwards --jobs 2              # the search, then the measures
    python -m reproduction.fewer_forwards --parts second --spare 6 --seeds 1 2
    python -m reproduction.fewer_forwards --parts third --seeds 1
    python -m reproduction.fewer_forwards --parts measures --flags "--starts 2" --page docs/gauss_newton.md

The search compares forms of the trainer, and rates and schedules of the paper's loop, on spare breeds on which no results are
reported; its notes are SEARCH.md. The second round runs the best forms and combinations of them on more breeds and with other
seeds; SECOND.md says which form goes on. The measures are on the twelve held-out breeds: the trainer as it stands (with
--flags), the paper's loop as in the suite's tables, the same at the best rate and schedule that the search found for each
budget, and gradient textual inversion. Their tables are RESULTS.md and, with --page, are also written into that page. The third
round runs the basis of 24, which was above the trainer in the first two rounds, on these breeds with a new seed; THIRD.md says
whether it replaces the trainer, by the same rule applied to all runs together. A run is scored along the way at every budget, if
its schedule allows that. Interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from miniature.critters import held_out_breeds, spare_breeds
from reproduction import archives, plans, runs, workers
from reproduction.fewer_forwards_forms import (
    BESIDE,
    BETWEEN,
    BUDGETS,
    DEFAULT,
    END,
    ENDS,
    FORMS,
    GRADIENTS,
    IN_TABLES,
    RIVALS,
    SECOND_ROUND,
    START,
    Form,
    rates_and_schedules,
)
from reproduction.fewer_forwards_tables import (
    fill,
    measured_tables,
    read_found,
    search_notes,
    searched_rivals,
    second_notes,
    third_notes,
    write_found,
)
from reproduction.judging import TokenJudge
from reproduction.runs import Job, Settings, digest
from reproduction.stats import Records, add_gaps
from reproduction.worlds import Miniature
from trainers import gauss_newton
from zoodip.arguments import new_parser
from zoodip.diffusion import Batch, FrozenModel
from zoodip.errors import InputError, run_script
from zoodip.files import write_atomically, write_image, write_json
from zoodip.folder import model_digest, resolve_model
from zoodip.pictures import picture_sheet
from zoodip.prompts import Prompts
from zoodip.records import ROOT, environment
from zoodip.subject import find_images, open_image

SHOWN_AT = (400, 3000)  # forwards
SHOWN = 3  # pictures per method on the sheets

# ---------------------------------------------------------------------------------------------------------------------
# Runs of forms
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class FormJob(Job):
    """A run of a form, scored at its budgets. points: {forwards: the step whose token is judged}."""

    points: dict[int, int]
    save_steps: int

    def learned(self, settings: Settings) -> bool:
        return self.done(settings)  # its tokens are judged as soon as they are learned, and no result.json is written

    def done(self, settings: Settings) -> bool:
        return all(str(budget) in read_points(self, settings) for budget in self.points)

    def tokens(self, settings: Settings) -> list[Path]:
        folder = settings.folder(self.spec)
        names = ["learned_embeds", *(f"learned_embeds-steps-{step}" for step in sorted(set(self.points.values())))]
        return [path for name in names if (path := folder / f"{name}.safetensors").exists()]


def points_path(job: Job, settings: Settings) -> Path:
    return settings.folder(job.spec) / f"points-{digest(runs.evaluation(settings, 'scores'))}.json"


def read_points(job: Job, settings: Settings) -> dict:
    path = points_path(job, settings)
    return json.loads(path.read_text())["points"] if path.exists() else {}


def job_of(form: Form, subject: str, seed: int, settings: Settings) -> Job:
    """The run of a form on a breed. Those of ENDS are judged at the end, as the suite's runs are."""
    if form in ENDS:  # one run per breed, not per seed
        return Job(runs.make_spec(settings, form.method, subject, 0, form.flags), {"scores"})
    spec = runs.make_spec(settings, form.method, subject, seed, form.run_flags())
    if form.after:
        first = job_of(DEFAULT, subject, seed, settings)
        spec["after"] = f"{digest(first.spec)}/learned_embeds-steps-{DEFAULT.step(form.after)}.safetensors"
    return FormJob(spec, {"scores"}, form.points(), form.save_steps)


# ---------------------------------------------------------------------------------------------------------------------
# Doing them
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def contrast(
    model: FrozenModel, prompts: Prompts, theta: torch.Tensor, scheduler, samples: int = 4, timestep: int = 900
) -> float:
    """A picture-like signal at the cost of 4 forwards: how much the picture that the model expects varies over its area.

    From pure noise at a timestep where only the outline is decided, (z - sqrt(1 - a) eps) / sqrt(a) is the mean of the pictures
    that the prompt allows; it is flat for a token that draws washed-out pictures. The noises are the same every time.
    """
    side = model.unet.config["sample_size"]
    noise = torch.randn(samples, 4, side, side, generator=torch.Generator().manual_seed(0))
    ids = prompts.ids[:1].repeat(samples, 1)
    predicted = model.predict(Batch(noise, noise, torch.full((samples,), timestep), ids), theta[None])[0].cpu()
    a = scheduler.alphas_cumprod[timestep]
    return ((noise - (1 - a).sqrt() * predicted) / a.sqrt()).flatten(2).std(2).mean().item()


def picture_scores(judge: TokenJudge, theta: torch.Tensor, sheet: str) -> dict[str, float]:
    """Scores of the pictures drawn with a token of a run; leaves a contact sheet of them in the run's folder."""
    prompts = judge.settings.prompts(judge.subject)
    pictures = judge.drawn("scores").of(judge.as_token(theta)).pictures(prompts, range(judge.settings.images))
    judge.write_sheet(sheet, pictures, prompts)
    return judge.likeness("scores", pictures)


def token_at(judge: TokenJudge, step: int) -> torch.Tensor:
    """A run's token after `step` steps: one kept along the way, or the last."""
    name = f"learned_embeds-steps-{step}"
    return judge.token(name) if (judge.folder / f"{name}.safetensors").exists() else judge.theta


def do(job: Job, settings: Settings) -> None:
    """Learn, then judge the tokens of a FormJob's points one after another; points that are already judged are skipped."""
    if not isinstance(job, FormJob):
        workers.do(job, settings)
        return
    folder, path = settings.folder(job.spec), points_path(job, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "spec.json", job.spec)
    workers.learn(job.spec, settings, eval_steps=0, save_steps=job.save_steps)
    judge, points = TokenJudge(job.spec, settings), read_points(job, settings)
    inputs = judge.judged.inputs
    for budget, step in job.points.items():
        if str(budget) in points:
            continue
        theta = token_at(judge, step)
        points[str(budget)] = dict(
            step=step, loss=judge.loss("loss", theta), token_norm=theta.norm(dim=1).mean().item(),
            contrast=contrast(judge.judged.model, inputs.prompts, theta, inputs.scheduler),
            **({} if budget in BETWEEN else picture_scores(judge, theta, f"sheet-{budget}.png")),
        )  # fmt: skip
        write_json(path, dict(spec=job.spec, points=points, **environment(judge.device)), indent=1)
    for checkpoint in folder.glob("checkpoint-*.safetensors"):
        checkpoint.unlink()


def collect(forms: Iterable[Form], subjects: Iterable[str], seeds: Iterable[int], settings: Settings) -> dict:
    """{label: {budget: {(subject, seed): scores}}} of finished runs, `gap` among the scores; the ends' only budget is 0."""
    subjects, seeds, found = list(subjects), list(seeds), {}
    for form in (*ENDS, *forms):
        of_form: dict[int, Records] = {}
        for subject in subjects:
            for seed in seeds:
                job = job_of(form, subject, seed, settings)
                if isinstance(job, FormJob):
                    for budget, point in read_points(job, settings).items():
                        of_form.setdefault(int(budget), {})[subject, seed] = point
                elif (record := runs.read_run(job.spec, settings)) is not None:
                    of_form.setdefault(0, {})[subject, seed] = record
        found[form.label] = of_form
    start, end = (found[label].get(0, {}) for label in (START, END))
    add_gaps((records for of_form in found.values() for records in of_form.values()), start, end, "gap")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--parts",
        nargs="+",
        default=["search", "measures"],
        choices=["search", "second", "measures", "third"],
        help="parts to run, always in this order",
    )
    add("--forms", nargs="+", default=None, metavar="WORDS", help="search only the forms whose label contains one of these words")
    add("--flags", default="", help="flags of the trainer in the measures: the form that the search found to be best")
    add("--spare", type=int, default=4, help="spare breeds to search on, at most 6")
    add("--breeds", nargs="+", default=None, help="breeds of the measures; default: the twelve held-out ones")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of all parts; run parts separately to give each its own")
    add("--images", type=int, default=Miniature.images, help="pictures per prompt; the search draws one")
    add("--inference_steps", type=int, default=Miniature.inference_steps, help="denoising steps per picture")
    add("--model", default=Miniature.model, help="folder of the miniature's model")
    add("--output", type=Path, default=Path("results/fewer_forwards"), help="folder for the runs")
    add("--report", type=Path, default=ROOT / "reproduction" / "fewer_forwards", help="folder for the reports")
    add("--page", type=Path, default=None, help="page whose marked tables are filled in, too")
    add("--jobs", type=int, default=1, help="runs at once")
    add("--threads", type=int, default=1, help="CPU threads per run")
    add("--dry_run", action="store_true", help="only print what would run, and an estimate of the hours")
    add("--report_only", action="store_true", help="run nothing; report on the finished runs")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Exits with code 2 and one line on an error. `trainer_flags`: --flags as the trainer's parser reads them."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("jobs", "threads", "images", "inference_steps", "spare"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.spare > len(spare_breeds()):
        parser.error(f"--spare must be at most {len(spare_breeds())}, got {args.spare}")
    args.breeds = args.breeds or [breed.name for breed in held_out_breeds()]
    args.trainer_flags = flags_of_trainer(args.flags)
    return args


def flags_of_trainer(text: str) -> dict:
    """The flags of the trainer's method named in a text, checked by its parser, which exits with one line on an error."""
    needed = ["--train_data_dir", "x", "--initializer_token", "x"]
    given = vars(gauss_newton.parse_args([*needed, *shlex.split(text)]))
    plain = vars(gauss_newton.parse_args(needed))
    return {name: "auto" if name == "inflation" and value is None else value for name, value in given.items()
            if value != plain[name] and name != "max_train_steps"}  # fmt: skip


def make_settings(args: argparse.Namespace, images: int) -> Settings:
    """Raises InputError if the model's folder is incomplete."""
    world = Miniature(args.output, args.output, args.output)
    digest_of_model = model_digest(*resolve_model(args.model))[:12]
    return Settings(world, args.output, args.model, digest_of_model, world.clip, world.dino, images=images,
                    inference_steps=args.inference_steps, threads=args.threads)  # fmt: skip


@dataclass
class Part:
    """What one part runs and reports."""

    forms: list[Form]
    subjects: list[str]
    seeds: list[int]
    settings: Settings

    def jobs(self) -> list[Job]:
        """Each run once; runs that start from another run's token come last."""
        jobs = [job_of(form, subject, seed, self.settings) for form in (*ENDS, *self.forms) for subject in self.subjects
                for seed in self.seeds]  # fmt: skip
        unique: dict[str, Job] = {}
        for job in jobs:
            kept = unique.setdefault(digest(job.spec), job)
            if isinstance(kept, FormJob) and isinstance(job, FormJob):  # the same run, read at other budgets too
                kept.points |= job.points
        return sorted(unique.values(), key=lambda job: "after" in job.spec)

    def collect(self) -> dict:
        return collect(self.forms, self.subjects, self.seeds, self.settings)

    def commits(self) -> list[str]:
        """Commits of the code that made the finished runs."""
        found = set()
        for job in self.jobs():
            path = points_path(job, self.settings) if isinstance(job, FormJob) else self.settings.folder(job.spec) / "result.json"
            found |= {json.loads(path.read_text()).get("commit") or "unknown"} if path.exists() else set()
        return sorted(found)


def search_of(args: argparse.Namespace) -> Part:
    forms = [form for form in FORMS if form is DEFAULT or args.forms is None or any(word in form.label for word in args.forms)]
    rivals = RIVALS if args.forms is None else ()
    subjects = [breed.name for breed in spare_breeds()[: args.spare]]
    return Part([*forms, *rivals], subjects, args.seeds, make_settings(args, 1))


def measures_of(args: argparse.Namespace, best: dict[int, dict[str, Form]]) -> Part:
    """best: the rivals found by the search; before it is done the plan lacks these rows."""
    ours = Form(DEFAULT.label, args.trainer_flags)
    gradients = Form(GRADIENTS, dict(use_cc=True), "ti")
    rivals = {IN_TABLES.label: IN_TABLES} | {form.label: form for of in best.values() for form in of.values()}
    return Part([ours, BESIDE, *rivals.values(), gradients], list(args.breeds), args.seeds, make_settings(args, args.images))


def estimated_seconds(job: Job, settings: Settings) -> float:
    """A guess from the world's measured speed."""
    if job.done(settings):
        return 0.0
    if not isinstance(job, FormJob):
        return plans.estimated_seconds(job, settings)
    pictures = len(set(job.points) & set(BUDGETS)) * settings.images * len(settings.prompts(job.spec["subject"]))
    judged = len(job.points) * (settings.eval_samples + 4) + pictures * settings.inference_steps * 2
    learned = plans.estimated_seconds(Job({key: value for key, value in job.spec.items() if key != "after"}, set()), settings)
    return learned + judged * settings.world.seconds_per_forward


def print_plan(name: str, part: Part, workers_at_once: int) -> None:
    jobs = part.jobs()
    seconds = [estimated_seconds(job, part.settings) for job in jobs]
    left, hours = sum(duration > 0 for duration in seconds), sum(seconds) / 3600
    print(f"{name}: {len(jobs)} runs, {left} to do: about {hours:.1f} hours of one process on {part.settings.world.speed_of}, "
          f"{hours / workers_at_once:.1f} with --jobs {workers_at_once} if there is room for them")  # fmt: skip


def run_part(part: Part, args: argparse.Namespace) -> list[str]:
    """Do the unfinished runs -> one line per failure."""
    if args.report_only:
        return []
    part.settings.world.prepare(part.subjects)
    jobs = part.jobs()
    first, then = ([job for job in jobs if ("after" in job.spec) is late] for late in (False, True))
    failures = []
    for some in (first, then):
        if some:
            failures += workers.run_jobs(some, part.settings, args.jobs, do)
    return failures


def main(args: argparse.Namespace) -> None:
    search = search_of(args)
    second = Part(list(SECOND_ROUND), search.subjects, search.seeds, search.settings)
    third = Part([DEFAULT, BESIDE], list(args.breeds), args.seeds, make_settings(args, args.images))
    if args.dry_run:
        if "search" in args.parts:
            print_plan("search", search, args.jobs)
        if "second" in args.parts:
            print_plan("second round", second, args.jobs)
        if "third" in args.parts:
            print_plan("third round", third, args.jobs)
        if "measures" in args.parts:
            best = searched_rivals(args.report)
            expected = best or {budget: {"loss": list(rates_and_schedules(budget))[1]} for budget in BUDGETS}
            print_plan("measures", measures_of(args, expected), args.jobs)
        return
    failures = []
    if "search" in args.parts:
        failures += run_part(search, args)
        whole = Part([*FORMS, *RIVALS], search.subjects, search.seeds, search.settings)
        found = whole.collect()
        write_report(args.report, "SEARCH", search_notes(found, FORMS, len(search.subjects)), found, whole.commits())
    if "second" in args.parts:
        failures += run_part(second, args)
        found = second.collect()
        text = second_notes(found, SECOND_ROUND, len(second.subjects), len(second.seeds))
        write_report(args.report, "SECOND", text, found, second.commits())
    if "measures" in args.parts:
        best = searched_rivals(args.report)
        if not best:
            print("without a search the paper's loop has no best rate yet: its row is left out", file=sys.stderr)
        measures = measures_of(args, best)
        archives.unpack_runs(args.report / archives.ARCHIVE, args.output)
        failures += run_part(measures, args)
        found = measures.collect()
        tables = measured_tables(found, DEFAULT.label, best)
        text = f"# Fewer forwards\n\n{len(measures.subjects)} breeds, {len(measures.seeds)} seed(s); "
        text += f"trainer's flags: {args.flags or 'its defaults'}.\n"
        text += "".join(f"\n## {name.capitalize()}\n\n{table.markdown()}\n" for name, table in tables.items())
        for budget in SHOWN_AT:
            if write_sheet(measures, args.report / f"sheet-{budget}.jpg", budget, best):
                text += f"\n![After {budget:,} forwards: a line for each breed](sheet-{budget}.jpg)\n"
        write_report(args.report, "RESULTS", text, found, measures.commits())
        archives.pack_runs(measures.jobs(), measures.settings, args.report / archives.ARCHIVE)
        if args.page is not None:
            write_atomically(args.page, fill(args.page.read_text(), tables).encode())
    if "third" in args.parts:
        failures += run_part(third, args)
        found, before = third.collect(), ("search.json", "second.json", "results.json")
        rounds = [read_found(path)[0] for name in before if (path := args.report / name).exists()]
        write_report(args.report, "THIRD", third_notes(found, rounds), found, third.commits())
    if failures:
        raise InputError(f"{len(failures)} runs failed, the first: {failures[0]}; fix it and start the same command again")


def write_sheet(measures: Part, path: Path, budget: int, best: dict[int, dict[str, Form]]) -> bool:
    """A line per breed: a photograph, then what each method draws after `budget` forwards -> whether the sheet could be made.

    Uses the pictures that were scored; one that is not on this machine is drawn again.
    """
    labels = {"loop": IN_TABLES.label}
    if budget in best:
        labels["loop at its best"] = best[budget]["attributes"].label
    labels |= {"Gauss-Newton": DEFAULT.label, "gradient TI": GRADIENTS}
    by_label = {form.label: form for form in measures.forms if budget in form.budgets}
    forms = {heading: by_label[label] for heading, label in labels.items() if label in by_label}
    lines = []
    for subject in measures.subjects:
        jobs = [job_of(form, subject, measures.seeds[0], measures.settings) for form in forms.values()]
        if not all(str(budget) in read_points(job, measures.settings) for job in jobs):
            continue
        drawn = []
        for job in jobs:
            judge, step = TokenJudge(job.spec, measures.settings), job.points[budget]
            prompts = measures.settings.prompts(subject)[:SHOWN]
            of = judge.drawn("scores").of(judge.as_token(token_at(judge, step)))
            drawn += [row[0] for row in of.pictures(prompts, range(1))]
        photograph = find_images(measures.settings.world.data / subject)[0]
        lines.append(([open_image(photograph), *drawn], subject))
    if lines:
        headings = ["photograph", *(heading for heading in forms for _ in range(SHOWN))]
        write_image(path, picture_sheet(lines, cell=96, headings=headings))
    return bool(lines)


def count_scored(found: dict) -> int:
    """Tokens that were scored: of all forms, at all budgets, of all runs."""
    return sum(len(records) for of_form in found.values() for records in of_form.values())


def write_report(folder: Path, name: str, text: str, found: dict, commits: list[str]) -> None:
    """Write <NAME>.md and <name>.json. Raises InputError if the record there has more: its runs may be on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path, here = folder / f"{name.lower()}.json", count_scored(found)
    if path.exists() and (recorded := count_scored(read_found(path)[0])) > here:
        raise InputError(f"{path} has {recorded} scored tokens and the runs here only {here}; give another --report, or move it")
    where = environment()
    foot = f"\nMade by `python -m reproduction.fewer_forwards` on {where['device']}; runs of commit {', '.join(commits)}, "
    foot += f"this page of {where['commit']}.\n"
    write_atomically(folder / f"{name}.md", (text.rstrip() + "\n" + foot).encode())
    write_found(path, found, commits)
    print(folder / f"{name}.md")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
