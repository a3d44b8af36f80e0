"""What a run that learns a token evaluates, draws, watches and saves of it, whatever the method."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image

from zoodip.diffusion import Data, FrozenModel, Inputs, evaluation_batches
from zoodip.errors import InputError
from zoodip.pictures import Drawer, picture_sheet
from zoodip.prompts import save_embedding


class TokenOutputs:
    """The outputs of a trainer of a token, which has `theta` [V, d] and, for errors, a `remedy`.

    settings: the run's, as recorded. t_min, t_max: the timesteps [t_min, t_max) of the fixed evaluation set.
    """

    def __init__(
        self,
        trainer,
        inputs: Inputs,
        model: FrozenModel,
        data: Data,
        settings: dict,
        *,
        t_min: int,
        t_max: int,
        eval_steps: int,
        num_eval_samples: int,
        validation_prompt: str | None,
        num_validation_images: int,
        validation_guidance: float,
    ):
        self.trainer, self.model, self.settings = trainer, model, settings
        self.prediction_type = data.scheduler.config["prediction_type"]
        self.fixed_set = evaluation_batches(data, num_eval_samples, t_min, t_max) if eval_steps else []
        self.norm_limit = 10 * mean_norm(inputs.initial_token)
        self.prompts, self.drawer = inputs.validation_prompts, None
        if validation_prompt is not None:
            self.drawer = Drawer(
                model,
                inputs.folder,
                inputs.variant,
                settings["quantization"],
                settings["resolution"],
                guidance=validation_guidance,
            )
            self.seeds = [settings["seed"] + i for i in range(num_validation_images)]

    def evaluate(self) -> dict[str, float]:
        """Columns of the curve: the loss on the fixed set, and the mean length of the token's vectors."""
        return dict(eval_loss=self.model.mean_loss(self.fixed_set, self.trainer.theta), token_norm=mean_norm(self.trainer.theta))

    def draw(self) -> Image.Image:
        """Pictures of the validation prompt side by side: 50 steps, the same noises every time."""
        assert self.drawer is not None and self.prompts is not None
        pictures = self.drawer.draw(self.prompts, self.trainer.theta, [(0, seed) for seed in self.seeds])
        return picture_sheet([(list(pictures), "")], cell=self.drawer.resolution, gap=0)

    def check(self, step: int) -> str | None:
        """A warning where the token has grown out of proportion. Raises InputError where it is NaN or Inf."""
        norm = mean_norm(self.trainer.theta)
        if not math.isfinite(norm):
            raise InputError(f"the token is NaN or Inf after step {step}; try {self.trainer.remedy}")
        if norm <= self.norm_limit:  # at 10 times its length, bf16 no longer measures a slope
            return None
        self.norm_limit = 2 * norm
        return (
            f"the token's norm has grown to {norm:.3g} by step {step}; where the loss no longer falls, start anew with "
            f"{self.trainer.remedy}, or with --mixed_precision fp32"
        )

    def save(self, folder: Path, step: int, final: bool) -> None:
        """The token as it stands, as an embedding file. Raises InputError."""
        save_embedding(folder, self.trainer.theta, self.settings, self.prediction_type, step, final)


def mean_norm(theta) -> float:
    """Mean length of the token's vectors [V, d]."""
    return theta.detach().norm(dim=1).mean().item()
