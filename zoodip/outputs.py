"""What a run that learns a token evaluates, draws, monitors and saves, whatever the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from zoodip.arguments import is_embedding_file
from zoodip.diffusion import Data, FrozenModel, Inputs, evaluation_batches
from zoodip.errors import InputError
from zoodip.pictures import Drawer, cell_size, drawing_bar, picture_sheet
from zoodip.prompts import file_stem, save_embedding

SIZES_ELSEWHERE = (768, 1024)  # of the tokens of Stable Diffusion 1.x and 2.x; other programs load no others


class TokenOutputs:
    """The outputs of a trainer that learns a token; the trainer has `theta` [V, d] and, for error messages, a `remedy`.

    settings: those of the run, as recorded. t_min, t_max: the timesteps [t_min, t_max) of the fixed evaluation set.
    """

    draws_before = False  # whether pictures of the untrained model are drawn as well

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
        final_picture: bool = False,
    ):
        self.trainer, self.inputs, self.model, self.settings = trainer, inputs, model, settings
        self.prediction_type = data.scheduler.config["prediction_type"]
        self.fixed_set = evaluation_batches(data, num_eval_samples, t_min, t_max) if eval_steps else []
        self.norm_limit = 10 * mean_norm(inputs.initial_token)
        self.validates, self.compares, self.guidance = validation_prompt is not None, final_picture, validation_guidance
        self.seeds = [settings["seed"] + i for i in range(num_validation_images)]
        word = settings["initializer_token"]  # or a file, which is named after its word
        self.initial_word = f"<{Path(word).stem}>" if is_embedding_file(word) else word
        self.files = ("learned_embeds*.safetensors", f"{file_stem(settings['placeholder_token'])}.safetensors")
        if self.validates or self.compares:
            self.drawer()  # load and release: a folder that cannot draw is refused now, and training keeps the memory

    def drawer(self) -> Drawer:
        """Raises InputError if the folder's decoder or scheduler is damaged."""
        return Drawer(
            self.model,
            self.inputs.folder,
            self.inputs.variant,
            self.settings["quantization"],
            self.settings["resolution"],
            guidance=self.guidance,
        )

    def evaluate(self) -> dict[str, float]:
        """Columns of the curve: the loss on the fixed set, and the mean length of the token's vectors."""
        return dict(eval_loss=self.model.mean_loss(self.fixed_set, self.trainer.theta), token_norm=mean_norm(self.trainer.theta))

    def draw(self, step: int, final: bool, stopped: Callable[[], bool]) -> Iterator[tuple[str, Image.Image]]:
        """(file name, picture) for the validation prompt and, at the end, for the initial word above the learned one.

        The noise is the same every time. Raises Interrupted between two denoising steps once `stopped()`.
        """
        compare = final and self.compares
        if not (self.validates or compare):
            return
        drawer, prompt = self.drawer(), self.inputs.picture_prompt
        cell, steps = cell_size(drawer.resolution), (1 + compare) * len(self.seeds) * drawer.forwards
        with drawing_bar(prompt, steps, stopped) as after_step:

            def row(theta: torch.Tensor) -> list[Image.Image]:
                assert self.inputs.picture_prompts is not None
                return list(drawer.draw(self.inputs.picture_prompts, theta, [(0, seed) for seed in self.seeds], after_step))

            learned = row(self.trainer.theta), f"{self.prompt_with(self.settings['placeholder_token'])}, after {step} steps"
            if self.validates:
                yield f"validation-{step}.png", picture_sheet([learned], cell=cell, gap=0)
            if compare:
                initial = row(self.inputs.initial_token), f"{self.prompt_with(self.initial_word)}, before"
                yield "before_after.png", picture_sheet([initial, learned], cell=cell)

    def prompt_with(self, word: str) -> str:
        """The pictures' prompt with a word in place of the token."""
        return (self.inputs.picture_prompt or "").replace(self.settings["placeholder_token"], "{}").replace("{}", word)

    def check(self, step: int) -> str | None:
        """A warning if the token has grown out of proportion. Raises InputError if it is NaN or Inf."""
        norm = mean_norm(self.trainer.theta)
        if not math.isfinite(norm):
            raise InputError(f"the token is NaN or Inf after step {step}; try {self.trainer.remedy}")
        if norm <= self.norm_limit:  # at 10 times the initial length, bf16 can no longer measure a slope
            return None
        self.norm_limit = 2 * norm
        return (
            f"the token's norm has grown to {norm:.3g} by step {step}; if the loss no longer falls, start over with "
            f"{self.trainer.remedy}, or with --mixed_precision fp32"
        )

    def result(self, folder: Path) -> str:
        """The beginning of a run's last line: the file, and what is in it."""
        return f"{folder / 'learned_embeds.safetensors'}: {self.settings['placeholder_token']}"

    def save(self, folder: Path, step: int, final: bool) -> None:
        """Write the current token as an embedding file. Raises InputError."""
        save_embedding(folder, self.trainer.theta, self.settings, self.prediction_type, step, final)

    def guide(self) -> dict[str, str]:
        """{name: what it is and what to do with it} for the final files besides learned_embeds.safetensors."""
        token, stem = self.settings["placeholder_token"], file_stem(self.settings["placeholder_token"])
        words = f"where the word is {stem} (ComfyUI: embedding:{stem}; InvokeAI: <{stem}>)"
        files = {}
        if self.trainer.theta.shape[1] in SIZES_ELSEWHERE:
            files[f"{stem}.safetensors"] = f"the same for AUTOMATIC1111, Forge, ComfyUI and InvokeAI, {words}"
        if self.compares:
            files["before_after.png"] = f"{self.prompt_with(self.initial_word)!r} above, with {token} below"
        return files


def mean_norm(theta) -> float:
    """Mean length of the token's vectors [V, d]."""
    return theta.detach().norm(dim=1).mean().item()
