"""Judges what a run left: its losses on pictures that no run saw, and the scores of pictures that are drawn with it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from reproduction import runs
from reproduction.runs import ALONG_SEEDS, RENDERED, SNAPSHOTS, Settings
from reproduction.scores import (
    INTER_PROMPT,
    PictureCache,
    Scorer,
    Token,
    Words,
    contact_sheet,
    digest_of,
    load_scorer,
    score_diversity,
    score_pictures,
    slug,
)
from zoodip.arguments import NUM_TRAIN_TIMESTEPS, flags_for
from zoodip.diffusion import Batch, FrozenModel, Inputs, evaluation_batches, load_model, merge_batches, read_inputs, settle_flags
from zoodip.files import write_image, write_json
from zoodip.folder import native_resolution
from zoodip.model import load_unet
from zoodip.pictures import Drawer
from zoodip.process import make_accelerator
from zoodip.prompts import read_embedding
from zoodip.quantize import DTYPES, AffineLayer, default_precision, frozen_format
from zoodip.records import environment
from zoodip.subject import find_images, open_image
from zoodip.tuned_files import load_tuned_unet
from zoodip.tuned_model import TunedModel, TuningInputs, load_tuning_data, read_tuning_inputs

EVALUATION_BATCH = 16  # samples per forward when judging a loss; changes only rounding

# Flags that define the model and the pictures, not how the run learned.
JUDGED_FLAGS = (
    "cc_file pretrained_model_name_or_path revision variant placeholder_token initializer_token quantization mixed_precision "
    "resolution center_crop".split()
)
JUDGED_TUNING_FLAGS = (
    "cc_file pretrained_model_name_or_path revision variant identifier class_word mixed_precision resolution center_crop".split()
)

AS_DRIFT = {"attributes": "drift", "CLIP-I": "drift_CLIP-I", "DINO": "drift_DINO"}  # score -> its name for the class word alone


def snapshot_steps(steps: int) -> list[int]:
    """The steps of a run whose tokens the learning curve shows, in addition to the first."""
    every = max(1, steps // SNAPSHOTS)
    return sorted({*range(every, steps, every), steps})


def open_judge(spec: dict, settings: Settings) -> Judge | RendersJudge:
    """The judge of an existing run."""
    if spec["method"] in RENDERED:
        return RendersJudge(spec, settings)
    return (WeightJudge if runs.tunes_weights(spec["method"]) else TokenJudge)(spec, settings)


class Judge:
    """Judges what a run left, on the model that it was learned on.

    On the miniature, losses are on renders that no run sees, in scenes that no run sees; for DreamBooth, they are on the
    subject's own pictures. Captions are always comprehensive, whatever the run learned with.
    """

    inputs: Inputs | TuningInputs
    model: FrozenModel | TunedModel
    learned: Token | Words
    quantization: str  # of the models that draw besides the UNet
    precision: str
    resolution: int

    def __init__(self, spec: dict, settings: Settings):
        self.spec, self.settings, self.folder = spec, settings, settings.folder(spec)
        self.args, self.world = runs.spec_args(spec, settings), settings.world
        self.pictures_of, self.subject = Path(self.args.train_data_dir), spec["subject"]
        self.judged_on = str(self.world.data / self.world.judging_subject(self.subject))
        self.device = make_accelerator(1, **flags_for(make_accelerator, vars(self.args))).device

    def loss(self, name: str) -> float:
        """The loss of what the run ended with, over a set of `fixed_sets`."""
        raise NotImplementedError

    def curve(self, steps: int) -> list[dict]:
        """The judged losses along the run."""
        raise NotImplementedError

    def more(self, steps: int) -> dict:
        """Further entries of result.json."""
        return {}

    def result(self, run: dict | None) -> dict:
        """The content of result.json for a run with this run.json, or for no run."""
        steps, forwards, rate = (run["step"], run["unet_forwards"], run["steps_per_second"]) if run else (0, 0, None)
        curve = self.curve(steps)
        loss = curve[-1]["loss"] if curve else self.loss("loss")
        return dict(spec=self.spec, **environment(self.device), seconds=round(steps / rate, 3) if rate else 0.0, step=steps,
                    steps_per_second=rate, forwards=forwards, loss=loss, loss_all=self.loss("loss_all"),
                    stored_bytes=runs.stored_bytes(self.spec, self.settings), curve=curve,
                    skipped_steps=run["skipped_steps"] if run else 0, **self.more(steps))  # fmt: skip

    def drawn(self, kind: str) -> PictureCache:
        """What draws the pictures of an evaluation, with what the run ended with, and keeps them."""
        how = runs.evaluation(self.settings, kind)
        drawer = Drawer(self.model, self.inputs.folder, self.inputs.variant, self.quantization, self.resolution, how["steps"],
                        how["guidance"], batch_size=16 if self.resolution <= 128 else 2, scheduler=how["scheduler"])  # fmt: skip
        return PictureCache(drawer, runs.pictures_path(self.folder, self.settings, kind), self.learned,
                            [self.quantization, self.precision, how["scheduler"]])  # fmt: skip

    def likeness(self, kind: str, pictures: list[list[Image.Image]]) -> dict[str, float]:
        """Scores of pictures [prompt][seed] of the subject."""
        return score_likeness(self.subject, self.settings, kind, pictures, self.pictures_of, self.device)

    def write_sheet(self, name: str, pictures: list[list[Image.Image]], prompts: list[str]) -> None:
        references = [open_image(path) for path in find_images(self.pictures_of)]
        write_image(self.folder / name, contact_sheet(references, pictures, prompts))

    def ways(self) -> dict[str, Callable[[], dict]]:
        """{kind of an evaluation: what draws and scores it}."""
        return dict(inter=self.score_inter, scores=self.score_last)

    def score(self, kind: str) -> None:
        """Draw and score what `kind` asks for: scores-<hash>.json and, for `scores`, the sheet. Existing scores are kept."""
        path, content = runs.scores_path(self.folder, self.settings, kind), self.ways()[kind]()
        if not runs.scored(self.folder, self.settings, kind):  # else they were only drawn again to look at
            write_json(path, dict(evaluation=runs.evaluation(self.settings, kind), **content, **environment(self.device)))

    def score_last(self) -> dict:
        prompts = self.settings.prompts(self.subject)
        pictures = self.drawn("scores").pictures(prompts, range(self.settings.images))
        self.write_sheet("sheet.png", pictures, prompts)
        return dict(scores=self.likeness("scores", pictures))

    def score_inter(self) -> dict:
        (row,) = self.drawn("inter").pictures([INTER_PROMPT], range(self.settings.inter_images))
        return dict(scores=score_diversity(row, *scorers(self.settings, self.device)))


def fixed_sets(data, count: int) -> dict[str, list[Batch]]:
    """Fixed (picture, timestep, noise) triples. "loss": over the timesteps of PUTS; "loss_all": over all timesteps.

    The second exists because the first would favour PUTS.
    """
    spans = {"loss": (500, 900), "loss_all": (0, NUM_TRAIN_TIMESTEPS)}
    return {name: evaluation_batches(data, count, *span) for name, span in spans.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Judged:
    """A model with the judging captions and the fixed sets."""

    flags: dict  # JUDGED_FLAGS with their open defaults filled in, and the flags of the judging pictures
    inputs: Inputs
    model: FrozenModel
    sets: dict[str, list[Batch]]


@lru_cache(maxsize=1)  # a worker's next run is often judged on the same model
def load_judged(flags: str, device: torch.device) -> Judged:
    """`flags`: JSON of `Judged.flags`."""
    flags = json.loads(flags)
    inputs = read_inputs(**flags_for(read_inputs, flags))
    flags |= settle_flags(inputs.folder, inputs.variant, device, **flags_for(settle_flags, flags))
    model, data = load_model(inputs, device=device, **flags_for(load_model, flags))
    sets = fixed_sets(data, flags["num_eval_samples"])
    return Judged(flags, inputs, model, {name: merge_batches(batches, EVALUATION_BATCH) for name, batches in sets.items()})


class TokenJudge(Judge):
    """The judge of a token and of its snapshots."""

    def __init__(self, spec: dict, settings: Settings):
        super().__init__(spec, settings)
        self.theta = self.token("learned_embeds")
        flags = {name: vars(self.args)[name] for name in JUDGED_FLAGS}
        flags |= dict(use_cc=True, num_vectors=len(self.theta), num_eval_samples=settings.eval_samples)
        flags |= dict(cc_file=str(self.world.captions), train_data_dir=self.judged_on)
        self.judged = load_judged(json.dumps(flags), self.device)
        self.inputs, self.model, flags = self.judged.inputs, self.judged.model, self.judged.flags
        self.quantization, self.precision, self.resolution = (
            flags[name] for name in ("quantization", "mixed_precision", "resolution")
        )
        self.learned = self.as_token(self.theta)

    def token(self, name: str) -> torch.Tensor:
        """[V, d] fp32 of one of the run's embedding files."""
        return read_embedding(self.folder / f"{name}.safetensors", self.args.placeholder_token)[0].float()

    def as_token(self, theta: torch.Tensor) -> Token:
        return Token(theta, self.args.placeholder_token, self.inputs.variant)

    def tokens(self, steps: int) -> dict[int, torch.Tensor]:
        """{step: token} of a run of `steps` steps: the first, the snapshots, the last."""
        snapshots = {step: self.token(f"learned_embeds-steps-{step}") for step in snapshot_steps(steps)[:-1]}
        return {0: self.judged.inputs.initial_token} | snapshots | {steps: self.theta}

    def loss(self, name: str, theta: torch.Tensor | None = None) -> float:
        """The loss of `theta`, if it is given, instead of the run's token."""
        return self.judged.model.mean_loss(self.judged.sets[name], self.theta if theta is None else theta)

    def curve(self, steps: int) -> list[dict]:
        """The judged tokens of the run, with what training_log.csv says: the forwards, and what the user of a run sees."""
        log = read_log(self.folder / "training_log.csv") if steps else {}
        return [
            dict(step=step, unet_forwards=int(log.get(step, {}).get("unet_forwards", 0)), loss=self.loss("loss", theta),
                 token_norm=theta.norm(dim=1).mean().item(), training_loss=log.get(step, {}).get("loss"),
                 eval_loss=log.get(step, {}).get("eval_loss"))
            for step, theta in self.tokens(steps).items()
        ]  # fmt: skip

    def ways(self) -> dict[str, Callable[[], dict]]:
        return super().ways() | dict(along=self.score_along, best=self.score_best)

    def score_along(self) -> dict:
        """Pictures of each snapshot in two sets of seeds: the first may choose a step, the second is scored."""
        drawn, prompts, points = self.drawn("along"), self.settings.prompts(self.subject, "along"), []
        record = json.loads((self.folder / "result.json").read_text())
        for step, theta in self.tokens(record["step"]).items():
            of_step = drawn.of(self.as_token(theta))
            choosing, scored = (self.likeness("along", of_step.pictures(prompts, range(seed, seed + 1))) for seed in ALONG_SEEDS)
            points.append(dict(step=step, **scored) | ({"choosing": choosing["CLIP-I"]} if "CLIP-I" in choosing else {}))
        return dict(scores={name: points[-1][name] for name in ("CLIP-I", "DINO") if name in points[-1]}, points=points)

    def score_best(self) -> dict:
        """The snapshot that `along` chose, scored like the last token."""
        record = runs.read_run(self.spec, self.settings)
        assert record is not None  # `along` comes before
        step = runs.best_step(record["curve"])
        theta = self.tokens(record["step"])[step]
        point = next(point for point in record["curve"] if point["step"] == step)
        drawn = self.drawn("best").of(self.as_token(theta))
        pictures = drawn.pictures(self.settings.prompts(self.subject), range(self.settings.images))
        return dict(scores=self.likeness("best", pictures) | dict(step=step, forwards=point["unet_forwards"], loss=point["loss"],
                                                                  loss_all=self.loss("loss_all", theta)))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tuned weights
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_judged_pictures(flags: str, quantization: str, device: torch.device) -> tuple[TuningInputs, torch.Tensor, dict]:
    """(inputs, text states of their captions, the fixed sets): all but the UNet, which is tuned in place and so never shared."""
    flags = json.loads(flags)
    inputs = read_tuning_inputs(**flags_for(read_tuning_inputs, flags))
    dtype = DTYPES[flags["mixed_precision"]]
    data, states = load_tuning_data(inputs, quantization, dtype, device, flags["resolution"], flags["center_crop"])
    return inputs, states, fixed_sets(data, flags["num_eval_samples"])


class WeightJudge(Judge):
    """The judge of a UNet whose weights were tuned, or of an untuned one in the same bits. The subject is named by words.

    There are no snapshots and so no curve: the loss is no judge of tuned weights, and a snapshot of DreamBooth takes gigabytes.
    """

    def __init__(self, spec: dict, settings: Settings):
        super().__init__(spec, settings)
        args, path = self.args, runs.learned_path(spec, settings)
        flags = {name: vars(args)[name] for name in JUDGED_TUNING_FLAGS}
        flags |= dict(use_cc=True, num_eval_samples=settings.eval_samples, train_data_dir=self.judged_on)
        flags["mixed_precision"] = self.precision = args.mixed_precision or default_precision(self.device)
        inputs = read_tuning_inputs(**flags_for(read_tuning_inputs, flags))
        folder, variant = inputs.folder, inputs.variant
        flags["resolution"] = self.resolution = args.resolution or native_resolution(folder)
        dtype = DTYPES[self.precision]
        if spec["method"] in runs.UNTRAINED:
            base = f"affine{args.bits}" if hasattr(args, "bits") else args.base
            unet, self.quantization = load_unet(folder, variant, base, dtype, self.device), frozen_format(base)
        else:
            tuned = path.parent if path.name == "unet" else path
            unet, self.quantization = load_tuned_unet(folder, variant, tuned, dtype, self.device)
        self.inputs, states, self.sets = load_judged_pictures(json.dumps(flags), self.quantization, self.device)
        self.tuned = self.model = TunedModel(unet, states, None)
        digest = f"untuned {base}" if spec["method"] in runs.UNTRAINED else digest_of(path)
        self.learned = Words(digest, args.identifier, args.class_word, self.inputs.variant, self.quantization)

    def loss(self, name: str) -> float:
        return self.tuned.mean_loss(self.sets[name])

    def curve(self, steps: int) -> list[dict]:
        return []

    def more(self, steps: int) -> dict:
        """The number of trained parameters; for scales also how far Adam can move one, about rate x steps, in their medians."""
        if not steps:
            return {}
        path, trained = runs.learned_path(self.spec, self.settings), 0
        for file in [path] if path.is_file() else path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as handle:
                trained += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())
        scales = [layer.scale for layer in self.model.unet.modules() if isinstance(layer, AffineLayer)]
        travel = dict(travel=self.args.learning_rate * steps / torch.cat(scales).median().item()) if scales else {}
        return dict(trained=trained, **travel)

    def score_last(self) -> dict:
        """Also scores one picture per prompt with the class word alone, to see what that word has come to mean."""
        prompts, word, drawn = self.settings.prompts(self.subject), self.world.class_word(self.subject), self.drawn("scores")
        texts = [text.replace("{}", word) for text in prompts]
        pictures, alone = drawn.pictures(prompts, range(self.settings.images)), drawn.pictures(texts, range(1))
        self.write_sheet("sheet.png", [*pictures, *alone], [*prompts, *texts])
        drift = {AS_DRIFT[name]: score for name, score in self.likeness("scores", alone).items() if name in AS_DRIFT}
        return dict(scores=self.likeness("scores", pictures) | drift)


# ---------------------------------------------------------------------------------------------------------------------
# True pictures
# ---------------------------------------------------------------------------------------------------------------------


class RendersJudge:
    """Scores true pictures like drawn ones: those of the subject give the ceiling, those of the others the floor."""

    def __init__(self, spec: dict, settings: Settings):
        self.spec, self.settings, self.folder = spec, settings, settings.folder(spec)

    def result(self, run: dict | None) -> dict:
        return dict(spec=self.spec, forwards=0, **environment())

    def score(self, kind: str) -> None:
        settings, subject = self.settings, self.spec["subject"]
        pictures = settings.world.renders(subject, self.spec["method"] == "other_renders", settings.images)
        pictures = pictures[: len(settings.prompts(subject))]
        folder = runs.pictures_path(self.folder, settings, kind)
        folder.mkdir(exist_ok=True)
        for prompt, row in zip(settings.prompts(subject), pictures, strict=True):
            for seed, picture in enumerate(row):
                write_image(folder / f"{slug(prompt)}-{seed}-render.png", picture)
        if not runs.scored(self.folder, settings, kind):
            scores = score_likeness(subject, settings, kind, pictures, settings.world.data / subject, torch.device("cpu"))
            write_json(runs.scores_path(self.folder, settings, kind),
                       dict(evaluation=runs.evaluation(settings, kind), scores=scores, **environment()))  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What they share
# ---------------------------------------------------------------------------------------------------------------------


def scorers(settings: Settings, device: torch.device) -> tuple[Scorer | None, Scorer | None]:
    """CLIP and DINO; None for one that is not available."""
    clip, dino = (load_scorer(None if name in settings.missing else name, device) for name in (settings.clip, settings.dino))
    return clip, dino


def score_likeness(subject: str, settings: Settings, kind: str, pictures: list[list[Image.Image]], references: Path,
                   device: torch.device) -> dict[str, float]:  # fmt: skip
    """CLIP-T, CLIP-I, DINO and the world's own scores of pictures [prompt][seed]."""
    prompts, word = settings.prompts(subject, kind), settings.world.class_word(subject)
    texts = [text.replace("{}", word) for text in prompts]
    images = [open_image(path) for path in find_images(references)]
    scores = score_pictures(pictures, images, texts, *scorers(settings, device))
    return scores | settings.world.picture_scores(dict(zip(prompts, pictures, strict=True)), subject)


def read_log(path: Path) -> dict[int, dict[str, float | None]]:
    """{step: row} of a training_log.csv; values not known yet at step 0 are None."""
    with path.open(newline="") as file:
        rows = [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]
    return {int(row["step"] or 0): row for row in rows}
