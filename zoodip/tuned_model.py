"""The UNet whose weights are tuned, and what it learns from: photographs, and prompts in plain words."""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from zoodip.arguments import NUM_TRAIN_TIMESTEPS
from zoodip.diffusion import Batch, Data, encode_photographs, evaluation_batches, forbid_tf32, load_scheduler
from zoodip.errors import damaged_model
from zoodip.folder import model_digest, resolve_model
from zoodip.model import load_text_encoder, load_unet
from zoodip.prior import PriorPictures
from zoodip.prompts import Prompts, build_prompts, encode_prompts, load_tokenizer
from zoodip.quantize import DTYPES, frozen_format, warn_of_emulation
from zoodip.subject import Subject, load_subject
from zoodip.thrift import LOADING, STEPPING, split_feed_forward, tune_malloc

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


# ----------------------------------------------------------------------------------------------------- before the model


@dataclass
class TuningInputs:
    """What is known before a model is loaded; errors in it have been reported by then."""

    subject: Subject
    folder: Path  # of the model
    variant: str | None  # of its weight files
    digest: str  # of its weights
    choices: list[list[int]]  # per photograph, the row of `prompts` that describes it
    prompts: Prompts  # for all texts below
    class_row: int
    picture_row: int
    empty_row: int  # the last
    picture_prompt: str  # in words
    scheduler: DDPMScheduler

    def fingerprint(self) -> dict[str, str]:
        """{what: SHA-256}: a run can be resumed only if these are unchanged."""
        return {"images or captions": self.subject.fingerprint, "model weights": self.digest}


def in_words(text: str, identifier: str, class_word: str) -> str:
    """A caption with {} replaced: "a {} in the snow" -> "a sks dog in the snow"; the class word is not repeated."""
    named = re.search(rf"\{{\}} {re.escape(class_word)}s?(?!\w)", text)
    subject = identifier if named else f"{identifier} {class_word}"
    return text.replace("{}", subject)


def plain_prompts(folder: Path, variant: str | None, texts: list[str]) -> Prompts:
    """Tokenised texts in plain words, without a placeholder. Raises InputError."""
    return build_prompts(load_tokenizer(folder), folder, variant, texts, None, 0)


def read_tuning_inputs(
    *,
    train_data_dir: str | Path,
    cc_file: str | Path | None = None,
    use_cc: bool = False,
    center_crop: bool = False,
    pretrained_model_name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    identifier: str = "sks",
    class_word: str,
    instance_prompt: str = "a photo of {}",
    validation_prompt: str | None = None,
    timestep_sampling: str = "uniform",
) -> TuningInputs:
    """Photographs, captions, model folder, prompts and noise schedule of a run. Raises InputError."""
    subject = load_subject(train_data_dir, cc_file if use_cc else None, "object", class_word, center_crop)
    if not use_cc:
        subject.captions = [[instance_prompt]] * len(subject.paths)
        subject.fingerprint = hashlib.sha256((subject.fingerprint + instance_prompt).encode()).hexdigest()
    folder, variant = resolve_model(pretrained_model_name_or_path, revision, variant, model_config)
    captions = [in_words(text, identifier, class_word) for (text,) in subject.captions]
    texts = sorted(set(captions))
    choices = [[texts.index(caption)] for caption in captions]
    picture_prompt = in_words(validation_prompt or "a photo of {}", identifier, class_word)
    texts += [f"a photo of {class_word}", picture_prompt, ""]
    prompts, last = plain_prompts(folder, variant, texts), len(texts) - 1
    return TuningInputs(
        subject,
        folder,
        variant,
        model_digest(folder, variant),
        choices,
        prompts,
        class_row=last - 2,
        picture_row=last - 1,
        empty_row=last,
        picture_prompt=picture_prompt,
        scheduler=load_scheduler(folder, timestep_sampling),
    )


# ----------------------------------------------------------------------------------------------------- the model


@dataclass
class TunedModel:
    """The UNet being trained, and the text states of a run's prompts; a batch's prompt_ids [B, 1] are rows of these states."""

    unet: UNet2DConditionModel
    states: torch.Tensor  # [P, L, d], on the device
    autocast: torch.dtype | None  # of activations, if the weights are fp32 and trained

    text_encoder = None  # freed once it has encoded the prompts

    def precision(self) -> AbstractContextManager:
        """Context manager: activations in the precision of --mixed_precision."""
        if self.autocast in (None, torch.float32):
            return nullcontext()
        return torch.autocast(self.states.device.type, self.autocast)

    def predict(self, batch: Batch) -> torch.Tensor:
        """The UNet's prediction [B, 4, h, w], fp32, on the device. Differentiable in the trained parameters."""
        batch = batch.to(self.states.device)
        dtype = self.unet.conv_in.weight.dtype
        latents = batch.noisy_latents.to(dtype, memory_format=torch.channels_last)
        with self.precision():
            return self.unet(latents, batch.timesteps, self.states[batch.prompt_ids[:, 0]], return_dict=False)[0].float()

    @torch.inference_mode()
    def mean_loss(self, batches: list[Batch]) -> float:
        """Mean squared error over a fixed set of batches of one, as timesteps may belong to different experts."""
        return float(np.mean([(self.predict(batch).cpu() - batch.target).square().mean().item() for batch in batches]))


def load_tuned_model(
    inputs: TuningInputs,
    quantization: str,
    trains_unet: bool,
    prior: PriorPictures | None,
    device: torch.device,
    *,
    mixed_precision: str,
    resolution: int,
    center_crop: bool,
) -> tuple[TunedModel, Data, Data | None]:
    """Encode photographs and prompts, then load the untuned UNet -> (model, photographs, pictures of the class).

    `quantization` is the UNet's; if the UNet itself is trained (`trains_unet`), its weights are fp32, and only activations have
    fewer bits. Text encoder and VAE are freed. Raises InputError if the folder is damaged.
    """
    folder, variant = inputs.folder, inputs.variant
    forbid_tf32()
    tune_malloc(*LOADING)
    warn_of_emulation(mixed_precision, device.type)
    dtype, others = DTYPES[mixed_precision], frozen_format(quantization)
    data, states = load_tuning_data(inputs, others, dtype, device, resolution, center_crop)
    autocast = dtype if trains_unet else None
    unet = load_unet(folder, variant, quantization, torch.float32 if trains_unet else dtype, device)
    split_feed_forward(unet)
    model = TunedModel(unet, states if autocast is None else states.float(), autocast)
    with damaged_model(folder), torch.inference_mode():
        model.predict(evaluation_batches(data, 1, 0, NUM_TRAIN_TIMESTEPS)[0])
    class_data = None
    if prior is not None:
        if prior.missing():
            with model.precision():
                prior.draw(model, folder, variant, others, resolution, states[[inputs.class_row, inputs.empty_row]])
        class_latents = prior.latents(lambda paths: encode_photographs(folder, variant, paths, device, resolution, center_crop))
        class_data = Data(class_latents, [[inputs.class_row]] * len(class_latents), data.prompt_ids, data.scheduler)
    tune_malloc(*STEPPING)
    return model, data, class_data


def load_tuning_data(
    inputs: TuningInputs, quantization: str, dtype: torch.dtype, device: torch.device, resolution: int, center_crop: bool
) -> tuple[Data, torch.Tensor]:
    """Encode photographs and texts -> (data, text states [P, L, d]); a prompt's only id is the row of its states.

    VAE and text encoder are freed. Raises InputError if the folder is damaged.
    """
    folder, variant = inputs.folder, inputs.variant
    latents = encode_photographs(folder, variant, inputs.subject.paths, device, resolution, center_crop)
    states = encode_texts(folder, variant, inputs.prompts, quantization, dtype, device)
    return Data(latents, inputs.choices, torch.arange(len(states))[:, None], inputs.scheduler), states


@torch.no_grad()
def encode_texts(
    folder: Path, variant: str | None, prompts: Prompts, quantization: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Text states [P, L, d] of prompts in plain words; the text encoder is loaded for this and then freed."""
    encoder = load_text_encoder(folder, variant, quantization, dtype, device)
    rows, ids = prompts.rows.to(device), prompts.ids.to(device)
    none = rows.new_empty(1, 0, rows.shape[1])  # one candidate token without vectors
    with damaged_model(folder / "text_encoder"):
        return torch.cat([encode_prompts(encoder, rows, ids[i : i + 1], none) for i in range(len(ids))])
