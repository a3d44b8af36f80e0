"""What a run left, judged: its tokens' losses on pictures that no run saw, and the scores of pictures drawn with the last."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from reproduction import runs
from reproduction.runs import SNAPSHOTS, Settings
from reproduction.scores import INTER_PROMPT, PictureCache, contact_sheet, load_scorer, score_diversity, score_pictures
from zoodip.arguments import NUM_TRAIN_TIMESTEPS, flags_for
from zoodip.diffusion import Batch, FrozenModel, Inputs, evaluation_batches, load_model, merge_batches, read_inputs, settle_flags
from zoodip.files import write_image, write_json
from zoodip.pictures import Drawer
from zoodip.prompts import read_embedding
from zoodip.records import environment
from zoodip.run import make_accelerator
from zoodip.subject import find_images, open_image

EVALUATION_BATCH = 16  # samples per forward when judging a loss; changes only rounding

# What the model and the pictures are; not how the run learned.
JUDGED_FLAGS = (
    "cc_file pretrained_model_name_or_path revision variant placeholder_token initializer_token quantization mixed_precision "
    "resolution center_crop".split()
)


def snapshot_steps(steps: int) -> list[int]:
    """The steps of a run whose tokens the learning curve shows, beside the first."""
    every = max(1, steps // SNAPSHOTS)
    return sorted({*range(every, steps, every), steps})


@dataclass
class Judged:
    """A model with the judging captions, and fixed (picture, timestep, noise) triples."""

    flags: dict  # JUDGED_FLAGS, their open defaults filled in, and those of the judging pictures
    inputs: Inputs
    model: FrozenModel
    sets: dict[str, list[Batch]]  # "loss": over the timesteps of PUTS; "loss_all": over all, as the first would favour PUTS


@lru_cache(maxsize=1)  # a worker's next run is often judged on the same
def load_judged(flags: str, device: torch.device) -> Judged:
    """`flags`: JSON of `Judged.flags`."""
    flags = json.loads(flags)
    inputs = read_inputs(**flags_for(read_inputs, flags))
    flags |= settle_flags(inputs.folder, inputs.variant, device, **flags_for(settle_flags, flags))
    model, data = load_model(inputs, device=device, **flags_for(load_model, flags))
    spans = {"loss": (500, 900), "loss_all": (0, NUM_TRAIN_TIMESTEPS)}
    sets = {name: evaluation_batches(data, flags["num_eval_samples"], *span) for name, span in spans.items()}
    return Judged(flags, inputs, model, {name: merge_batches(batches, EVALUATION_BATCH) for name, batches in sets.items()})


class Judge:
    """Judges the tokens that a run left, on the model that they were learned on.

    Losses are on the miniature's renders that no run sees, in scenes that no run sees; of DreamBooth on the subject's own
    pictures. Always with comprehensive captions, whatever the run learned with.
    """

    def __init__(self, spec: dict, settings: Settings):
        self.spec, self.settings, self.folder = spec, settings, settings.folder(spec)
        args, world = runs.spec_args(spec, settings), settings.world
        self.placeholder_token, self.pictures_of = args.placeholder_token, Path(args.train_data_dir)
        self.device = make_accelerator(1, **flags_for(make_accelerator, vars(args))).device
        self.theta = self.token("learned_embeds")
        flags = {name: vars(args)[name] for name in JUDGED_FLAGS}
        flags |= dict(use_cc=True, num_vectors=len(self.theta), num_eval_samples=settings.eval_samples)
        flags["train_data_dir"] = str(world.data / world.judging_subject(spec["subject"]))
        self.judged = load_judged(json.dumps(flags), self.device)

    def token(self, name: str) -> torch.Tensor:
        """[V, d] fp32 of one of the run's embedding files."""
        return read_embedding(self.folder / f"{name}.safetensors", self.placeholder_token)[0].float()

    def loss(self, theta: torch.Tensor, name: str = "loss") -> float:
        return self.judged.model.mean_loss(self.judged.sets[name], theta)

    def curve(self, steps: int, forwards: int) -> list[dict]:
        """The judged losses of the run's tokens. A step's forwards are taken as equal: GF-TI's checks (--mode fair) come in lumps
        of 16, which moves a point by at most 32 of some 9,000."""
        tokens = {0: self.judged.inputs.initial_token}
        tokens |= {step: self.token(f"learned_embeds-steps-{step}") for step in snapshot_steps(steps)[:-1]} | {steps: self.theta}
        return [
            dict(step=step, unet_forwards=round(forwards * step / (steps or 1)), loss=self.loss(theta),
                 token_norm=theta.norm(dim=1).mean().item())
            for step, theta in tokens.items()
        ]  # fmt: skip

    def result(self, run: dict | None) -> dict:
        """What result.json holds of a run with this run.json, or of none."""
        steps, forwards, rate = (run["step"], run["unet_forwards"], run["steps_per_second"]) if run else (0, 0, None)
        curve = self.curve(steps, forwards)
        return dict(spec=self.spec, **environment(self.device), seconds=round(steps / rate, 3) if rate else 0.0,
                    steps_per_second=rate, forwards=forwards, loss=curve[-1]["loss"], loss_all=self.loss(self.theta, "loss_all"),
                    stored_bytes=(self.folder / "learned_embeds.safetensors").stat().st_size, curve=curve,
                    skipped_steps=run["skipped_steps"] if run else 0)  # fmt: skip

    def score(self, kind: str) -> None:
        """Draw and score the run's token: scores-<hash>.json and, of `scores`, the contact sheet."""
        how, settings, subject = runs.evaluation(self.settings, kind), self.settings, self.spec["subject"]
        flags, inputs = self.judged.flags, self.judged.inputs
        quantization, resolution = flags["quantization"], flags["resolution"]
        drawer = Drawer(self.judged.model, inputs.folder, inputs.variant, quantization, resolution, how["steps"], how["guidance"],
                        batch_size=16 if resolution <= 128 else 2, scheduler="pndm")  # fmt: skip
        cache = PictureCache(drawer, self.folder / "pictures", inputs.variant, self.placeholder_token,
                             [quantization, flags["mixed_precision"]])  # fmt: skip
        names = [None if name in settings.missing else name for name in (settings.clip, settings.dino)]
        clip, dino = (load_scorer(name, self.device) for name in names)
        if kind == "inter":
            (row,) = cache.pictures(self.theta, [INTER_PROMPT], range(how["images"]))
            scores = score_diversity(row, clip, dino)
        else:
            prompts, word = settings.prompts(subject), settings.world.class_word(subject)
            pictures = cache.pictures(self.theta, prompts, range(how["images"]))
            references = [open_image(path) for path in find_images(self.pictures_of)]
            scores = score_pictures(pictures, references, [text.replace("{}", word) for text in prompts], clip, dino)
            scores |= settings.world.picture_scores(pictures, subject)
            write_image(self.folder / "sheet.png", contact_sheet(references, pictures, prompts))
        write_json(runs.scores_path(self.folder, settings, kind), dict(evaluation=how, scores=scores, **environment(self.device)))
