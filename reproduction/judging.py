"""What a run left, judged: its losses on pictures that no run saw, and the scores of pictures that are drawn with it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from reproduction import runs
from reproduction.runs import SNAPSHOTS, Settings
from reproduction.scores import (
    INTER_PROMPT,
    PictureCache,
    Token,
    Words,
    contact_sheet,
    digest_of,
    load_scorer,
    score_diversity,
    score_pictures,
)
from zoodip.arguments import NUM_TRAIN_TIMESTEPS, flags_for
from zoodip.diffusion import Batch, FrozenModel, Inputs, evaluation_batches, load_model, merge_batches, read_inputs, settle_flags
from zoodip.files import write_image, write_json
from zoodip.model import load_unet, native_resolution
from zoodip.pictures import Drawer
from zoodip.prompts import read_embedding
from zoodip.quantize import DTYPES, AffineLayer, default_precision, frozen_format
from zoodip.records import environment
from zoodip.run import make_accelerator
from zoodip.subject import find_images, open_image
from zoodip.tuned_files import load_tuned_unet
from zoodip.weight_tuning import TunedModel, TuningInputs, load_tuning_data, read_tuning_inputs

EVALUATION_BATCH = 16  # samples per forward when judging a loss; changes only rounding

# What the model and the pictures are; not how the run learned.
JUDGED_FLAGS = (
    "cc_file pretrained_model_name_or_path revision variant placeholder_token initializer_token quantization mixed_precision "
    "resolution center_crop".split()
)
JUDGED_TUNING_FLAGS = (
    "cc_file pretrained_model_name_or_path revision variant identifier class_word mixed_precision resolution center_crop".split()
)

DRIFT = {"attributes": "drift", "CLIP-I": "drift_CLIP-I", "DINO": "drift_DINO"}  # score -> its name for the class word alone


def snapshot_steps(steps: int) -> list[int]:
    """The steps of a run whose tokens the learning curve shows, beside the first."""
    every = max(1, steps // SNAPSHOTS)
    return sorted({*range(every, steps, every), steps})


def open_judge(spec: dict, settings: Settings) -> Judge:
    """The judge of a run that is there."""
    return (WeightJudge if runs.tunes_weights(spec["method"]) else TokenJudge)(spec, settings)


class Judge:
    """Judges what a run left, on the model that it was learned on.

    Losses are on the miniature's renders that no run sees, in scenes that no run sees; of DreamBooth on the subject's own
    pictures. Always with comprehensive captions, whatever the run learned with.
    """

    inputs: Inputs | TuningInputs
    model: FrozenModel | TunedModel
    learned: Token | Words
    quantization: str  # of what draws beside the UNet
    precision: str
    resolution: int

    def __init__(self, spec: dict, settings: Settings):
        self.spec, self.settings, self.folder = spec, settings, settings.folder(spec)
        self.args, self.world = runs.spec_args(spec, settings), settings.world
        self.pictures_of, self.subject = Path(self.args.train_data_dir), spec["subject"]
        self.judged_on = str(self.world.data / self.world.judging_subject(self.subject))
        self.device = make_accelerator(1, **{"compile": False} | flags_for(make_accelerator, vars(self.args))).device

    def loss(self, name: str) -> float:
        """Of what the run ended with, over a set of `fixed_sets`."""
        raise NotImplementedError

    def curve(self, steps: int, forwards: int) -> list[dict]:
        """The judged losses on the way there."""
        raise NotImplementedError

    def more(self, steps: int) -> dict:
        """What else result.json holds."""
        return {}

    def result(self, run: dict | None) -> dict:
        """What result.json holds of a run with this run.json, or of none."""
        steps, forwards, rate = (run["step"], run["unet_forwards"], run["steps_per_second"]) if run else (0, 0, None)
        curve = self.curve(steps, forwards)
        loss = curve[-1]["loss"] if curve else self.loss("loss")
        return dict(spec=self.spec, **environment(self.device), seconds=round(steps / rate, 3) if rate else 0.0,
                    steps_per_second=rate, forwards=forwards, loss=loss, loss_all=self.loss("loss_all"),
                    stored_bytes=runs.stored_bytes(self.spec, self.settings), curve=curve,
                    skipped_steps=run["skipped_steps"] if run else 0, **self.more(steps))  # fmt: skip

    def score(self, kind: str) -> None:
        """Draw and score what the run learned: scores-<hash>.json and, of `scores`, the contact sheet."""
        how, settings, world = runs.evaluation(self.settings, kind), self.settings, self.world
        drawer = Drawer(self.model, self.inputs.folder, self.inputs.variant, self.quantization, self.resolution, how["steps"],
                        how["guidance"], batch_size=16 if self.resolution <= 128 else 2, scheduler="pndm")  # fmt: skip
        cache = PictureCache(drawer, self.folder / "pictures", self.learned, [self.quantization, self.precision])
        names = [None if name in settings.missing else name for name in (settings.clip, settings.dino)]
        clip, dino = (load_scorer(name, self.device) for name in names)
        if kind == "inter":
            (row,) = cache.pictures([INTER_PROMPT], range(how["images"]))
            scores = score_diversity(row, clip, dino)
        else:
            prompts, word = settings.prompts(self.subject), world.class_word(self.subject)
            references = [open_image(path) for path in find_images(self.pictures_of)]
            texts = [text.replace("{}", word) for text in prompts]

            def scores_of(pictures: list[list[Image.Image]]) -> dict[str, float]:
                found = score_pictures(pictures, references, texts, clip, dino)
                return found | world.picture_scores(pictures, self.subject)

            pictures = cache.pictures(prompts, range(how["images"]))
            scores = scores_of(pictures)
            sheet = contact_sheet(references, pictures, prompts)
            if isinstance(self.learned, Words):  # what the class word alone has come to mean
                alone = cache.pictures(texts, range(1))
                scores |= {DRIFT[name]: score for name, score in scores_of(alone).items() if name in DRIFT}
                sheet = contact_sheet(references, [*pictures, *alone], [*prompts, *texts])
            write_image(self.folder / "sheet.png", sheet)
        write_json(runs.scores_path(self.folder, settings, kind), dict(evaluation=how, scores=scores, **environment(self.device)))


def fixed_sets(data, count: int) -> dict[str, list[Batch]]:
    """Fixed (picture, timestep, noise) triples. "loss": over the timesteps of PUTS; "loss_all": over all, as the first would
    favour PUTS."""
    spans = {"loss": (500, 900), "loss_all": (0, NUM_TRAIN_TIMESTEPS)}
    return {name: evaluation_batches(data, count, *span) for name, span in spans.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Judged:
    """A model with the judging captions, and the fixed sets."""

    flags: dict  # JUDGED_FLAGS, their open defaults filled in, and those of the judging pictures
    inputs: Inputs
    model: FrozenModel
    sets: dict[str, list[Batch]]


@lru_cache(maxsize=1)  # a worker's next run is often judged on the same
def load_judged(flags: str, device: torch.device) -> Judged:
    """`flags`: JSON of `Judged.flags`."""
    flags = json.loads(flags)
    inputs = read_inputs(**flags_for(read_inputs, flags))
    flags |= settle_flags(inputs.folder, inputs.variant, device, **flags_for(settle_flags, flags))
    model, data = load_model(inputs, device=device, **flags_for(load_model, flags))
    sets = fixed_sets(data, flags["num_eval_samples"])
    return Judged(flags, inputs, model, {name: merge_batches(batches, EVALUATION_BATCH) for name, batches in sets.items()})


class TokenJudge(Judge):
    """Of a token, and of its snapshots."""

    def __init__(self, spec: dict, settings: Settings):
        super().__init__(spec, settings)
        self.theta = self.token("learned_embeds")
        flags = {name: vars(self.args)[name] for name in JUDGED_FLAGS}
        flags |= dict(use_cc=True, num_vectors=len(self.theta), num_eval_samples=settings.eval_samples)
        self.judged = load_judged(json.dumps(flags | dict(train_data_dir=self.judged_on)), self.device)
        self.inputs, self.model, flags = self.judged.inputs, self.judged.model, self.judged.flags
        self.quantization, self.precision, self.resolution = (
            flags[name] for name in ("quantization", "mixed_precision", "resolution")
        )
        self.learned = Token(self.theta, self.args.placeholder_token, self.inputs.variant)

    def token(self, name: str) -> torch.Tensor:
        """[V, d] fp32 of one of the run's embedding files."""
        return read_embedding(self.folder / f"{name}.safetensors", self.args.placeholder_token)[0].float()

    def loss(self, name: str) -> float:
        return self.judged.model.mean_loss(self.judged.sets[name], self.theta)

    def curve(self, steps: int, forwards: int) -> list[dict]:
        """Of the run's snapshots. A step's forwards are taken as equal: GF-TI's checks (--mode fair) come in lumps of 16, which
        moves a point by at most 32 of some 9,000."""
        tokens = {0: self.judged.inputs.initial_token}
        tokens |= {step: self.token(f"learned_embeds-steps-{step}") for step in snapshot_steps(steps)[:-1]} | {steps: self.theta}
        return [
            dict(step=step, unet_forwards=round(forwards * step / (steps or 1)),
                 loss=self.judged.model.mean_loss(self.judged.sets["loss"], theta), token_norm=theta.norm(dim=1).mean().item())
            for step, theta in tokens.items()
        ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Tuned weights
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_judged_pictures(flags: str, quantization: str, device: torch.device) -> tuple[TuningInputs, torch.Tensor, dict]:
    """(inputs, text states of their captions, the fixed sets): all but the UNet, which is tuned in place and so never shared."""
    flags = json.loads(flags)
    inputs = read_tuning_inputs(**flags_for(read_tuning_inputs, flags))
    dtype = DTYPES[flags["mixed_precision"]]
    data = load_tuning_data(inputs, quantization, dtype, device, flags["resolution"], flags["center_crop"])
    return inputs, data.prompts.rows, fixed_sets(data, flags["num_eval_samples"])


class WeightJudge(Judge):
    """Of a UNet whose weights were tuned, or of an untuned one in the same bits. The subject's prompts are in words.

    There are no snapshots, and so no curve: a loss is no judge of tuned weights, and one of DreamBooth's is gigabytes.
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

    def curve(self, steps: int, forwards: int) -> list[dict]:
        return []

    def more(self, steps: int) -> dict:
        """Numbers that were trained; of scales also how far Adam can move one, about rate x steps, in units of their median."""
        if not steps:
            return {}
        path, trained = runs.learned_path(self.spec, self.settings), 0
        for file in [path] if path.is_file() else path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as handle:
                trained += sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())
        scales = [layer.scale for layer in self.model.unet.modules() if isinstance(layer, AffineLayer)]
        travel = dict(travel=self.args.learning_rate * steps / torch.cat(scales).median().item()) if scales else {}
        return dict(trained=trained, **travel)
