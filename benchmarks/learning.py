#!/usr/bin/env python
"""How much of what gradient textual inversion learns ZOODiP learns too, on subjects that the miniature has never seen.

    python benchmarks/learning.py --pilot                               # which settings suit the demo
    python benchmarks/learning.py --steps 1000 --learning_rate 1e-2     # the table, the curves and the pictures

Subjects are held-out breeds of miniature/world.py: five renders with comprehensive captions to learn from, and a fixed
set of 64 (picture, timestep, noise) triples of 16 unseen renders in other scenes to be judged on. Flags that are not
listed below are those of train_zoodip.py and set ZOODiP's side. Every (breed, seed, method) is one JSON file in --work;
what is there already, under the same settings, is not run again. Writes benchmarks/learning.json, .md and two pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import ROOT, Loaded, cli, encode, environment, load_model, mean_interval, merge_batches, table, write_report
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import train_zoodip as zoodip
from miniature import world
from reproduction.textual_inversion import invert

PICTURES = (("beach", "nothing"), ("snow", "red hat"), ("cobblestone street", "nothing"), ("forest", "rainbow scarf"))
METHODS = {"zoodip": "ZOODiP", "ti_equal": "gradient TI, equal forwards", "ti_converged": "gradient TI, converged"}
EVALUATION_BATCH = 16  # samples per forward when judging; changes only rounding


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "miniature" / "model", help="folder in diffusers format")
    add("--clip", type=Path, default=ROOT / "miniature" / "clip", help="folder of the scorer; no scores where there is none")
    add("--classifier", type=Path, default=ROOT / "miniature" / "classifier", help="folder of the reader of attributes, likewise")
    add("--device", default="cpu", help="cpu or cuda")
    add("--breeds", nargs="+", default=[breed.name for breed in world.held_out_breeds()[:3]], help="held-out breeds to learn")
    add("--seeds", type=int, default=3, help="runs per breed and method: seeds 0, 1, ...")
    add("--steps", type=int, default=1000, help="ZOODiP's steps")
    add("--eval_triples", type=int, default=64, help="(picture, timestep, noise) triples to judge on")
    add("--eval_every", type=int, default=100, help="ZOODiP steps between evaluations")
    add("--baselines", nargs="+", choices=["ti_equal", "ti_converged"], default=["ti_converged"],
        help="gradient TI with as many UNet forwards as ZOODiP, or until it has converged")
    add("--ti_learning_rates", type=float, nargs="+", default=[3e-3, 1e-2],
        help="gradient TI: tried with seed 0 of each breed; the best by final loss on the evaluation set serves the other seeds")
    add("--ti_converged_steps", type=int, default=1000, help="steps of the converged gradient TI")
    add("--ti_converged_batch", type=int, default=4, help="samples per step of the converged gradient TI")
    add("--inference_steps", type=int, default=50, help="denoising steps per picture")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance scale of the pictures")
    add("--pictures_per_prompt", type=int, default=4, help="pictures per prompt and token that are scored; the first is shown")
    add("--pilot", action="store_true", help="only the grid of learning rate, steps and nu for the first breed, two seeds")
    add("--work", type=Path, default=ROOT / "results" / "learning", help="folder of finished runs")
    add("--output", type=Path, default=ROOT / "benchmarks", help="folder for learning.json and .md")
    add("--pics", type=Path, default=ROOT / "pics", help="folder for miniature.png and learning.png")
    args, rest = parser.parse_known_args(argv)
    if "ti_converged" not in args.baselines:
        parser.error("--baselines: ti_converged is what the gap is measured against; add it")
    known = [breed.name for breed in world.held_out_breeds()]
    if unknown := set(args.breeds) - set(known):
        parser.error(f"--breeds: {sorted(unknown)} are not held out; choose from {' '.join(known)}")
    args.zoodip = rest
    return args


def zoodip_args(args: argparse.Namespace, **changes) -> argparse.Namespace:
    """The flags of train_zoodip.py for one run."""
    run = zoodip.parse_args(["--pretrained_model_name_or_path", str(args.model), "--train_data_dir", "renders",
                             "--initializer_token", world.CLASS_NOUN, "--use_cc", *args.zoodip,
                             "--max_train_steps", str(args.steps), "--num_eval_samples", str(args.eval_triples)])
    for name, value in changes.items():
        setattr(run, name, value)
    return run


# ----------------------------------------------------------------------------------------------------- the subjects


@dataclass
class Subject:
    """One breed as something to learn."""

    breed: world.Breed
    references: list[Image.Image]  # 256 px
    data: zoodip.Data
    model: zoodip.FrozenModel
    theta0: torch.Tensor  # [V, d]
    token_batches: list[zoodip.Batch]  # the evaluation set, with the placeholder in the captions
    described_batches: list[zoodip.Batch]  # the same, with the full description instead
    weights: str  # of `Loaded`

    def evaluate(self, theta: torch.Tensor) -> float:
        return self.model.mean_loss(self.token_batches, theta)


def draw_specs(breed: world.Breed) -> tuple[list[world.SceneSpec], list[world.SceneSpec]]:
    """Five specs to learn from, each in its own scene, and 16 to be judged on, in the other scenes."""
    rng = np.random.default_rng([1, [b.name for b in world.held_out_breeds()].index(breed.name)])
    scenes = [str(scene) for scene in rng.permutation(world.SCENES)]

    def spec(scene: str) -> world.SceneSpec:
        return world.scene_spec(breed, scene, str(rng.choice(world.ACCESSORIES)), rng=rng)

    return [spec(scene) for scene in scenes[:5]], [spec(scenes[5 + i % 7]) for i in range(16)]


def make_subject(loaded: Loaded, args: argparse.Namespace, breed: world.Breed) -> Subject:
    """Render, caption and encode what a breed is learned from and judged on."""
    run = zoodip_args(args, resolution=None)
    zoodip.resolve_defaults(run, loaded.folder, torch.device(args.device))
    learned, unseen = draw_specs(breed)
    learned_texts = [world.class_caption(spec, "{}") for spec in learned]
    token_texts = [world.class_caption(spec, "{}") for spec in unseen]
    described_texts = [world.class_caption(spec, world.describe(breed.critter)) for spec in unseen]
    texts = sorted({*learned_texts, *token_texts, *described_texts})
    prompts = loaded.prompts(texts, run)
    references = [world.render(spec, 256) for spec in learned]
    latents = encode(loaded.folder, references, run, args.device)
    unseen_latents = encode(loaded.folder, [world.render(spec, 256) for spec in unseen], run, args.device)

    def fixed_set(captions: list[str]) -> list[zoodip.Batch]:
        choices = [[texts.index(caption)] for caption in captions]
        batches = zoodip.evaluation_batches(unseen_latents, choices, prompts, loaded.scheduler, run)
        return merge_batches(batches, EVALUATION_BATCH)

    data = zoodip.Data(latents, [[texts.index(text)] for text in learned_texts], prompts, loaded.scheduler)
    return Subject(breed, references, data, loaded.frozen(prompts, run), loaded.initial_token(run),
                   fixed_set(token_texts), fixed_set(described_texts), loaded.weights)


# ----------------------------------------------------------------------------------------------------- the runs


class Judge:
    """Evaluates a token on the unseen renders and keeps the time that takes out of the training time."""

    def __init__(self, subject: Subject):
        self.subject, self.seconds = subject, 0.0

    def __call__(self, theta: torch.Tensor) -> float:
        started = time.perf_counter()
        loss = self.subject.evaluate(theta)
        self.seconds += time.perf_counter() - started
        return loss


def learn(subject: Subject, run: argparse.Namespace, judge: Judge, every: int) -> tuple[torch.Tensor, list[dict]]:
    """ZOODiP by the classes of train_zoodip.py, without its files -> (theta [V, d], curve as of `invert`)."""
    zo, generator = zoodip.ZOAdam(subject.theta0, run), torch.Generator().manual_seed(run.seed)
    data, curve, forwards = subject.data, [], 0
    for step in tqdm(range(run.max_train_steps + 1), unit="step", mininterval=1, leave=False):
        if step:
            batch = zoodip.draw_batch(data.latents, data.choices, data.prompts, data.scheduler, run, generator)
            directions, candidates = zo.candidates(generator)
            zo.step(directions, subject.model.losses(batch, candidates))
            forwards += len(candidates)
        if step % every == 0 or step == run.max_train_steps:
            curve.append(dict(step=step, unet_forwards=forwards, eval_loss=judge(zo.theta.detach()),
                              token_norm=zo.theta.norm(dim=1).mean().item()))
    return zo.theta.detach(), curve


def finished_or_run(path: Path, settings: dict, work: Callable[[], dict], device: str) -> dict:
    """The record in `path` where it was made under `settings`; else the result of `work`, written there."""
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] == json.loads(json.dumps(settings)):
            return record
        print(f"{path.name}: settings have changed, running it again")
    record = dict(settings=settings, **environment(device), **work())
    path.parent.mkdir(parents=True, exist_ok=True)
    zoodip.write_atomically(path, (json.dumps(record) + "\n").encode())
    return record


def run_zoodip(args: argparse.Namespace, subject: Subject, seed: int, every: int, **changes) -> dict:
    """One ZOODiP run, or the record of it. `changes` overrides flags of train_zoodip.py."""
    run = zoodip_args(args, seed=seed, **changes)
    zoodip.resolve_defaults(run, args.model, torch.device(args.device))
    settings = dict(zoodip.run_settings(run), method="zoodip", breed=subject.breed.name, steps=run.max_train_steps,
                    eval_triples=args.eval_triples, eval_every=every, weights=subject.weights)

    def work() -> dict:
        judge, started = Judge(subject), time.perf_counter()
        theta, curve = learn(subject, run, judge, every)
        return outcome(theta, curve, time.perf_counter() - started - judge.seconds)

    suffix = "".join(f"-{name}{value:g}" for name, value in changes.items())
    return finished_or_run(args.work / f"{subject.breed.name}-{seed}-zoodip{suffix}.json", settings, work, args.device)


def run_inversion(args: argparse.Namespace, subject: Subject, seed: int, method: str, lr: float) -> dict:
    """One run of gradient TI, or the record of it. `method`: ti_equal has as many UNet forwards as ZOODiP."""
    run = zoodip_args(args, seed=seed)
    zoodip.resolve_defaults(run, args.model, torch.device(args.device))
    per_step = 2 * run.n if run.estimator == "spsa" else run.n + 1
    steps = args.ti_converged_steps if method == "ti_converged" else per_step * args.steps
    if method == "ti_converged":
        run.train_batch_size = args.ti_converged_batch
    settings = dict(zoodip.run_settings(run), method=method, breed=subject.breed.name, steps=steps, learning_rate=lr,
                    eval_triples=args.eval_triples, weights=subject.weights)
    for name in ("n", "mu", "tau", "nu", "estimator"):
        del settings[name]

    def work() -> dict:
        judge, started = Judge(subject), time.perf_counter()
        theta, curve, _ = invert(subject.model, subject.data, subject.theta0, run, steps, lr, judge, max(steps // 10, 1))
        return outcome(theta, curve, time.perf_counter() - started - judge.seconds)

    return finished_or_run(args.work / f"{subject.breed.name}-{seed}-{method}-{lr:g}.json", settings, work, args.device)


def outcome(theta: torch.Tensor, curve: list[dict], seconds: float) -> dict:
    last = curve[-1]
    return dict(final_loss=last["eval_loss"], unet_forwards=last["unet_forwards"], seconds=round(seconds, 2),
                steps_per_second=round(last["step"] / seconds, 2), curve=curve, token=theta.tolist())


def run_breed(args: argparse.Namespace, subject: Subject) -> dict:
    """All methods and seeds on one breed -> the losses before and the records {method: [one per seed]}."""
    records = {method: [] for method in ("zoodip", *args.baselines)}
    for seed in range(args.seeds):
        records["zoodip"].append(run_zoodip(args, subject, seed, args.eval_every))
        for method in args.baselines:
            if seed == 0:
                tried = [run_inversion(args, subject, 0, method, lr) for lr in args.ti_learning_rates]
                records[method].append(min(tried, key=lambda record: record["final_loss"]))
            else:
                best = records[method][0]["settings"]["learning_rate"]
                records[method].append(run_inversion(args, subject, seed, method, best))
    return dict(initial=subject.evaluate(subject.theta0),
                described=subject.model.mean_loss(subject.described_batches, subject.theta0), records=records)


# ----------------------------------------------------------------------------------------------------- the tables


def summarise(breeds: dict[str, dict]) -> dict:
    """Losses and gaps closed per breed, and over breeds x seeds with a 95 % interval.

    Gap closed = (L_initial - L_zoodip) / (L_initial - L_ti), with L_ti the mean over seeds on that breed.
    """
    methods = list(next(iter(breeds.values()))["records"])
    baselines = methods[1:]
    rows, gaps = {}, {against: [] for against in (*baselines, "described")}
    for name, result in breeds.items():
        losses = {method: [record["final_loss"] for record in records] for method, records in result["records"].items()}
        ends = dict(described=result["described"], **{m: float(np.mean(losses[m])) for m in baselines})
        closed = {against: [(result["initial"] - loss) / (result["initial"] - end) for loss in losses["zoodip"]]
                  for against, end in ends.items()}
        for against, values in closed.items():
            gaps[against] += values
        rates = {method: result["records"][method][0]["settings"]["learning_rate"] for method in baselines}
        rows[name] = dict(initial=result["initial"], described=result["described"], losses=losses, gap_closed=closed,
                          ti_learning_rates=rates)
    total = {against: dict(zip(("mean", "half_width"), mean_interval(values), strict=True), runs=len(values))
             for against, values in gaps.items()}
    speed = {method: {key: float(np.mean([record[key] for result in breeds.values() for record in result["records"][method]]))
                      for key in ("seconds", "steps_per_second", "unet_forwards")} for method in methods}
    return dict(breeds=rows, gap_closed=total, speed=speed)


def markdown_of(summary: dict, args: argparse.Namespace, scores: dict[str, dict]) -> str:
    """The tables of `summarise` and of `score`."""
    rows = []
    for name, row in summary["breeds"].items():
        means = [f"{np.mean(losses):.5f} ({np.std(losses, ddof=1):.5f})" if len(losses) > 1 else f"{losses[0]:.5f}"
                 for losses in row["losses"].values()]
        gaps = [f"{100 * np.mean(row['gap_closed'][against]):.0f} %" for against in args.baselines]
        rows.append([name, f"{row['initial']:.5f}", f"{row['described']:.5f}", *means, *gaps])
    header = ["breed", "class noun", "true description", *[METHODS[method] for method in summary["speed"]],
              *[f"gap to {METHODS[against]} closed" for against in args.baselines]]
    text = [f"Loss on {args.eval_triples} fixed (picture, timestep, noise) triples of 16 unseen renders per breed, mean over "
            f"{args.seeds} seeds (standard deviation); lower is better.\n", table(header, rows), ""]
    for against, words in (("ti_equal", "gradient TI at equal UNet forwards"), ("ti_converged", "converged gradient TI"),
                           ("described", "the true description")):
        if against not in summary["gap_closed"]:
            continue
        total = summary["gap_closed"][against]
        interval = f"95 % interval +- {100 * total['half_width']:.0f}, {total['runs']} runs"
        text.append(f"- ZOODiP closes {100 * total['mean']:.0f} % ({interval}) of the gap between the class noun and {words}.")
    rates = ", ".join(f"{lr:g}" for lr in args.ti_learning_rates)
    text.append(f"\nGradient TI's learning rate is the best of {rates} by final loss on this very set with seed 0 of each breed, "
                "which favours it; its backward passes are not counted.\n")
    speed = [[METHODS[method], f"{s['unet_forwards']:.0f}", f"{s['seconds']:.1f}", f"{s['steps_per_second']:.1f}"]
             for method, s in summary["speed"].items()]
    text.append(table(["method", "UNet forwards", "seconds", "steps/s"], speed))
    names = list(next(iter(scores.values()), {}))
    if names:
        text.append("\nPictures, judged by the miniature's CLIP (cosine with the five references, and with the prompt under the "
                    "class noun) and by its classifier (shares read as they should be). "
                    f"Guidance {args.guidance:g}, {args.inference_steps} steps, {len(PICTURES)} prompts x "
                    f"{args.pictures_per_prompt} pictures per breed, tokens of seed 0.\n")
        rows = [[token, *[f"{row[name]:.3f}" for name in names]] for token, row in scores.items()]
        text.append(table(["pictures of", *names], rows))
    return "\n".join(text)


def pilot(args: argparse.Namespace, loaded: Loaded) -> None:
    """The grid from which the demo's settings are chosen. The rate is constant, so one run serves every step count."""
    subject = make_subject(loaded, args, world.breed_by_name(args.breeds[0]))
    initial, described = subject.evaluate(subject.theta0), subject.model.mean_loss(subject.described_batches, subject.theta0)
    counts, rows, results = [args.steps // 2, args.steps, 2 * args.steps], [], []
    for lr in (2.5e-3, 5e-3, 1e-2, 2e-2):
        for nu in (0.0, 1e-3):
            runs = [run_zoodip(args, subject, seed, max(args.steps // 2, 1), learning_rate=lr, nu=nu,
                               max_train_steps=counts[-1]) for seed in (0, 1)]
            losses = [[row["eval_loss"] for row in run["curve"] if row["step"] in counts] for run in runs]
            cells = [" ".join(f"{loss[i]:.5f}" for loss in losses) for i in range(len(counts))]
            gap = 100 * (initial - np.mean(losses, axis=0)) / (initial - described)
            norm = np.mean([run["curve"][-1]["token_norm"] for run in runs])
            rows.append([f"{lr:g}", f"{nu:g}", *[f"{c} ({g:.0f} %)" for c, g in zip(cells, gap, strict=True)], f"{norm:.2f}",
                         f"{np.mean([run['steps_per_second'] for run in runs]):.1f}"])
            results.append(dict(learning_rate=lr, nu=nu, steps=counts, losses=losses, token_norm=norm))
    text = (f"Breed {subject.breed.name}: class noun {initial:.5f}, true description {described:.5f}. Loss with seeds 0 and 1, "
            "and the share of the gap to the description that their mean closes.\n\n")
    text += table(["learning rate", "nu", *[f"{count} steps" for count in counts], "|theta|", "steps/s"], rows)
    write_report("pilot", args, dict(initial=initial, described=described, grid=results), text, args.device, args.work)


# ----------------------------------------------------------------------------------------------------- the pictures


def picture_prompts() -> list[str]:
    """A caption with {} for each (scene, accessory) of PICTURES."""
    return [world.compose("{}", world.SCENE_PHRASES[scene][0], world.ACCESSORY_PHRASES[accessory][0])
            for scene, accessory in PICTURES]


class Drawer:
    """Draws prompts with any token by the modules that training holds, plus the quantised VAE decoder."""

    def __init__(self, loaded: Loaded, args: argparse.Namespace):
        from diffusers import PNDMScheduler, StableDiffusionPipeline

        self.loaded, self.args = loaded, args
        self.run = zoodip_args(args)
        zoodip.resolve_defaults(self.run, loaded.folder, torch.device(args.device))
        vae = zoodip.load_frozen(loaded.folder, "vae", None, self.run.quantization, loaded.unet.conv_in.weight.dtype, args.device,
                                 skip=("encoder.", "quant_conv."))
        self.pipeline = StableDiffusionPipeline(
            vae=vae, unet=loaded.unet, scheduler=PNDMScheduler.from_pretrained(loaded.folder / "scheduler"), text_encoder=None,
            tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def draw(self, texts: list[str], theta: torch.Tensor) -> list[list[Image.Image]]:
        """--pictures_per_prompt pictures of each text; picture k starts from the same noise whatever text and token."""
        count, device = self.args.pictures_per_prompt, self.args.device
        prompts = self.loaded.prompts([*texts, ""], self.run)
        rows, ids = prompts.rows.to(device), prompts.ids.to(device)
        states = zoodip.encode_prompts(self.loaded.text_encoder, rows, ids, theta[None].to(device))  # [P + 1, L, d]
        pictures = []
        for state in states[:-1]:
            pictures.append(self.pipeline(
                prompt_embeds=state[None].repeat(count, 1, 1), negative_prompt_embeds=states[-1:].repeat(count, 1, 1),
                num_inference_steps=self.args.inference_steps, guidance_scale=self.args.guidance,
                generator=[torch.Generator().manual_seed(k) for k in range(count)], height=self.run.resolution,
                width=self.run.resolution,
            ).images)  # fmt: skip
        return pictures


def draw_all(args: argparse.Namespace, drawer: Drawer, subject: Subject, result: dict) -> dict[str, list[list[Image.Image]]]:
    """{token: [prompt][picture]} for the class noun, ZOODiP, gradient TI and the full description."""
    tokens = {"initial token": subject.theta0, "ZOODiP": torch.tensor(result["records"]["zoodip"][0]["token"]),
              "gradient TI": torch.tensor(result["records"]["ti_converged"][0]["token"])}
    prompts = picture_prompts()
    pictures = {name: drawer.draw(prompts, theta) for name, theta in tokens.items()}
    described = [prompt.replace("a {}", world.full_description(subject.breed)) for prompt in prompts]
    pictures["true description"] = drawer.draw(described, subject.theta0)
    return pictures


def save_grid(path: Path, subjects: list[Subject], drawn: list[dict], cell: int = 128, rows_per_breed: int = 2) -> None:
    """reference | initial token | ZOODiP | gradient TI, a caption under every row."""
    columns = ["initial token", "ZOODiP", "gradient TI"]
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    gap, head, foot = 6, 26, 22
    rows = [(subject, pictures, k) for k in range(len(PICTURES)) for subject, pictures in zip(subjects, drawn, strict=True)]
    rows = [row for row in rows if row[2] < rows_per_breed]
    rows.sort(key=lambda row: [subject.breed.name for subject in subjects].index(row[0].breed.name))
    width, height = (cell + gap) * 4 + gap, head + (cell + foot) * len(rows)
    grid = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(grid)
    for column, title in enumerate(["a reference", *columns]):
        pen.text((gap + column * (cell + gap) + cell / 2, head / 2), title, fill="black", font=font, anchor="mm")
    for index, (subject, pictures, k) in enumerate(rows):
        top = head + index * (cell + foot)
        cells = [subject.references[k], *[pictures[name][k][0] for name in columns]]
        for column, picture in enumerate(cells):
            enlarged = picture.resize((cell, cell), Image.Resampling.LANCZOS)
            grid.paste(enlarged, (gap + column * (cell + gap), top))
        caption = picture_prompts()[k].replace("{}", "<sks>")
        pen.text((width / 2, top + cell + foot / 2), caption, fill="black", font=small, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path, optimize=True)


def save_curves(path: Path, breeds: dict[str, dict]) -> None:
    """Evaluation loss against UNet forwards, one panel per breed, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(breeds), figsize=(4 * len(breeds), 3.2), squeeze=False)
    for axis, (name, result) in zip(axes[0], breeds.items(), strict=True):
        for method, colour in (("zoodip", "tab:blue"), ("ti_equal", "tab:orange")):
            for seed, record in enumerate(result["records"].get(method, [])):
                axis.plot([row["unet_forwards"] for row in record["curve"]], [row["eval_loss"] for row in record["curve"]],
                          color=colour, linewidth=1, label=METHODS[method] if seed == 0 else None)
        converged = np.mean([record["final_loss"] for record in result["records"]["ti_converged"]])
        for level, style, label in ((result["initial"], "-", "class noun"), (result["described"], "--", "true description"),
                                    (converged, ":", METHODS["ti_converged"])):
            axis.axhline(level, color="grey", linestyle=style, linewidth=1, label=label)
        axis.set(title=name, xlabel="UNet forwards", ylabel="loss on unseen renders")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------- the scores


class Scorer:
    """The miniature's CLIP: unit vectors of pictures and texts."""

    def __init__(self, folder: Path):
        from transformers import CLIPModel, CLIPProcessor

        self.model = CLIPModel.from_pretrained(folder).float().eval()
        self.processor = CLIPProcessor.from_pretrained(folder)

    @torch.no_grad()
    def pictures(self, images: list[Image.Image]) -> torch.Tensor:
        """[N, e] of unit length."""
        pixels = self.processor.image_processor(images, return_tensors="pt").pixel_values
        return torch.nn.functional.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """[N, e] of unit length."""
        inputs = self.processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return torch.nn.functional.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)


def clip_scores(folder: Path, subjects: list[Subject], drawn: list[dict]) -> dict[str, dict]:
    """Mean cosines per token over breeds, prompts and pictures: with the references, and with the class-noun prompt."""
    scorer, scores = Scorer(folder), {}
    prompts = scorer.texts([prompt.replace("{}", world.CLASS_NOUN) for prompt in picture_prompts()])
    for token in drawn[0]:
        image, text = [], []
        for subject, pictures in zip(subjects, drawn, strict=True):
            references = scorer.pictures(subject.references)
            vectors = [scorer.pictures(row) for row in pictures[token]]
            image.append(float(np.mean([(v @ references.T).mean().item() for v in vectors])))
            text.append(float(np.mean([(v @ prompts[k]).mean().item() for k, v in enumerate(vectors)])))
        scores[token] = {"CLIP, image": float(np.mean(image)), "CLIP, text": float(np.mean(text))}
    return scores


def attribute_scores(folder: Path, subjects: list[Subject], drawn: list[dict]) -> dict[str, dict]:
    """Shares of pictures whose subject, scene and accessory the attribute classifier reads as they should be."""
    from miniature.classifier import load_classifier

    classifier, scores = load_classifier(folder), {}
    for token in drawn[0]:
        right = {"subject's attributes": [], "scene": [], "accessory": []}
        for subject, pictures in zip(subjects, drawn, strict=True):
            critter = subject.breed.critter
            names = [name for name in ("shape", "colour", "pattern", "pattern_colour", "ears", "tail", "eyes")
                     if not (name == "pattern_colour" and critter.pattern == "plain")]
            for (scene, accessory), row in zip(PICTURES, pictures[token], strict=True):
                pixels = torch.stack([torch.from_numpy(np.array(image.resize((64, 64)))).permute(2, 0, 1) for image in row])
                for read in classifier.read(pixels / 127.5 - 1):
                    right["subject's attributes"] += [read[name] == getattr(critter, name) for name in names]
                    right["scene"].append(read["scene"] == scene)
                    right["accessory"].append(read["accessory"] == accessory)
        scores[token] = {name: float(np.mean(values)) for name, values in right.items()}
    return scores


def score(args: argparse.Namespace, subjects: list[Subject], drawn: list[dict]) -> dict[str, dict]:
    """{token: {score: value}} by the judges of the miniature that are there."""
    scores = {token: {} for token in drawn[0]}
    for folder, judge in ((args.clip, clip_scores), (args.classifier, attribute_scores)):
        if (folder / "config.json").exists():
            for token, values in judge(folder, subjects, drawn).items():
                scores[token].update(values)
    return scores


def main(args: argparse.Namespace) -> None:
    loaded = load_model(zoodip_args(args), args.device)
    if args.pilot:
        pilot(args, loaded)
        return
    subjects = [make_subject(loaded, args, world.breed_by_name(name)) for name in args.breeds]
    results = {subject.breed.name: run_breed(args, subject) for subject in subjects}
    summary = summarise(results)
    save_curves(args.pics / "learning.png", results)
    drawer = Drawer(loaded, args)
    drawn = [draw_all(args, drawer, subject, results[subject.breed.name]) for subject in subjects]
    save_grid(args.pics / "miniature.png", subjects, drawn)
    scores = score(args, subjects, drawn)
    write_report("learning", args, dict(summary, scores=scores), markdown_of(summary, args, scores), args.device, args.output)


if __name__ == "__main__":
    cli(main, parse_args())
