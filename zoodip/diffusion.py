"""Diffusion on one subject: latents, the batches that candidates share, and the frozen model that predicts their noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from tqdm import tqdm

from zoodip.arguments import NUM_TRAIN_TIMESTEPS, is_embedding_file
from zoodip.errors import DamagedModel, InputError, damaged_model, is_first_process
from zoodip.folder import choose_quantization, model_digest, native_resolution, resolve_model
from zoodip.model import load_text_encoder, load_unet, load_vae_encoder
from zoodip.prompts import Prompts, build_prompts, encode_prompts, load_tokenizer, starting_token, warn_of_an_ordinary_word
from zoodip.quantize import DTYPES, default_precision, warn_of_emulation
from zoodip.subject import Subject, load_subject, open_image, to_square
from zoodip.thrift import LOADING, STEPPING, computed_once, modules_before_text, split_feed_forward, tune_malloc

if TYPE_CHECKING:  # diffusers and transformers take seconds to import
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel

TimestepSampler = Callable[[int, torch.Generator], torch.Tensor]  # (batch size B, generator) -> timesteps [B]


# ----------------------------------------------------------------------------------------------------- before the model


@dataclass
class Inputs:
    """What is known before a model is loaded; errors in it have been reported by then."""

    subject: Subject
    folder: Path  # of the model
    variant: str | None  # of its weight files
    initial_token: torch.Tensor  # [V, d]
    choices: list[list[int]]  # per image, the rows of prompts.ids that describe it
    prompts: Prompts
    picture_prompt: str | None  # for the pictures, with {} or the placeholder
    picture_prompts: Prompts | None  # that prompt and the empty one
    scheduler: DDPMScheduler

    def fingerprint(self) -> dict[str, str]:
        """{what: SHA-256}: a run can be resumed only if these are unchanged."""
        return {
            "images or captions": self.subject.fingerprint,
            "model weights": model_digest(self.folder, self.variant),
            "vectors of --initializer_token": hashlib.sha256(self.initial_token.numpy().tobytes()).hexdigest(),
        }


def read_inputs(
    *,
    train_data_dir: str | Path,
    cc_file: str | Path | None = None,
    use_cc: bool = False,
    learnable_property: str = "object",
    center_crop: bool = False,
    pretrained_model_name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    placeholder_token: str,
    initializer_token: str,
    num_vectors: int = 1,
    validation_prompt: str | None = None,
    final_picture: bool = False,
    timestep_sampling: str = "puts",
) -> Inputs:
    """Photographs, captions, model folder, tokenizer, prompts, initial token and noise schedule of a run. Raises InputError."""
    class_word = None if is_embedding_file(initializer_token) else initializer_token
    subject = load_subject(train_data_dir, cc_file if use_cc else None, learnable_property, class_word, center_crop)
    folder, variant = resolve_model(pretrained_model_name_or_path, revision, variant, model_config)
    tokenizer = load_tokenizer(folder, placeholder_token, num_vectors)
    warn_of_an_ordinary_word(tokenizer, placeholder_token)
    token = starting_token(tokenizer, folder, variant, initializer_token, num_vectors)

    def prompts_of(texts: list[str], what: str) -> Prompts:
        return build_prompts(tokenizer, folder, variant, texts, placeholder_token, len(token), what)

    picture_prompt = validation_prompt
    if final_picture and validation_prompt is None:
        picture_prompt = "a photo of a {}" if learnable_property == "object" else "a painting in the style of {}"
    texts = sorted({text for captions in subject.captions for text in captions})
    return Inputs(
        subject,
        folder,
        variant,
        token,
        choices=[[texts.index(text) for text in captions] for captions in subject.captions],
        prompts=prompts_of(texts, "the caption" if use_cc else "the template"),
        picture_prompt=picture_prompt,
        picture_prompts=prompts_of([picture_prompt, ""], "--validation_prompt") if picture_prompt else None,
        scheduler=load_scheduler(folder, timestep_sampling),
    )


def settle_flags(
    folder: Path,
    variant: str | None,
    device: torch.device,
    *,
    quantization: str | None,
    mixed_precision: str | None,
    resolution: int | None,
) -> dict:
    """The flags whose defaults depend on the model's folder or the device, with their final values.

    Raises InputError if --quantization contradicts a packed folder.
    """
    return dict(
        variant=variant,
        quantization=choose_quantization(folder, variant, quantization),
        mixed_precision=mixed_precision or default_precision(device),
        resolution=resolution or native_resolution(folder),
    )


def load_scheduler(folder: Path, timestep_sampling: str = "uniform") -> DDPMScheduler:
    """The noise schedule. Raises InputError if it is not one of Stable Diffusion's, or the sampling is not defined for it."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    path = folder / "scheduler"
    with damaged_model(path):
        scheduler = cast("DDPMScheduler", DDPMScheduler.from_pretrained(path))
    kind, steps = scheduler.config["prediction_type"], len(scheduler.alphas_cumprod)
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(f"{path}: prediction_type is {kind!r}; give a Stable Diffusion 1.x or 2.x (epsilon or v_prediction)")
    between = (scheduler.alphas_cumprod >= 0) & (scheduler.alphas_cumprod < 1)
    if steps != NUM_TRAIN_TIMESTEPS or not scheduler.alphas_cumprod.is_floating_point() or not between.all():
        raise DamagedModel(path, f"is not a noise schedule of {NUM_TRAIN_TIMESTEPS} steps from 1 to 0 (it has {steps})")
    if timestep_sampling == "snr" and (scheduler.alphas_cumprod == 0).any():
        raise InputError(
            "--timestep_sampling snr: this model's noise schedule ends in pure noise (zero terminal SNR), and the logarithm of a "
            "signal-to-noise ratio of 0 is infinite; choose puts or uniform"
        )
    return scheduler


@torch.no_grad()
def encode_images(vae: AutoencoderKL, paths: list[Path], resolution: int, center_crop: bool) -> torch.Tensor:
    """Image files -> [N, 2 (flips), 2 (mean, standard deviation), 4, h, w]: scaled latent distributions, fp32, on the CPU.

    The VAE is not needed after this; every step still samples its own latent (z = vae(x) * scaling_factor, Eq. 1).
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    device = next(vae.parameters()).device
    # On a CPU, the convolutions' native order: otherwise each copies its input and output. On a GPU, cuDNN's fp32 convolutions
    # take 0.4 GB of workspace in this order at 512 pixels, and none in the usual one (H200, no TF32).
    order = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    cast(Any, vae).to(memory_format=order)  # torch's annotations lack this call
    latents = []
    for path in tqdm(paths, desc="encoding", unit="image", leave=False, disable=not is_first_process()):
        flips = []
        for picture in to_square(open_image(path), resolution, center_crop):  # one at a time: the largest activations of the run
            moments = encoder_moments(vae, picture[None].to(device, vae.dtype, memory_format=order))
            distribution = DiagonalGaussianDistribution(moments)
            flips.append(torch.cat([distribution.mean, distribution.std]).float().cpu() * vae.config["scaling_factor"])
        latents.append(torch.stack(flips).contiguous())
    return torch.stack(latents)


def encode_photographs(
    folder: Path, variant: str | None, paths: list[Path], device: torch.device, resolution: int, center_crop: bool
) -> torch.Tensor:
    """Latent distributions [N, 2, 2, 4, h, w] from `encode_images`; the VAE is loaded for this and then freed."""
    vae = load_vae_encoder(folder, variant, device)
    with damaged_model(folder / "vae"):
        latents = encode_images(vae, paths, resolution, center_crop)
    if not torch.isfinite(latents).all():
        raise DamagedModel(folder / "vae", "encodes the images as NaN or Inf")
    return latents


def encoder_moments(vae: AutoencoderKL, hidden: torch.Tensor) -> torch.Tensor:
    """The moments that vae.encode computes, [B, 8, h, w], with at most three full-size activations at a time.

    At 512 pixels, one takes 0.13 GB; the encoder's own forward holds six of them.
    """
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D

    encoder: Any = vae.encoder  # its blocks are of several classes with the same parts
    if not all(type(block) is DownEncoderBlock2D for block in encoder.down_blocks):
        return vae._encode(hidden)  # not built like Stable Diffusion's
    hidden = encoder.conv_in(hidden)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            shortcut = hidden if resnet.conv_shortcut is None else resnet.conv_shortcut(hidden)
            for layer in (resnet.norm1, resnet.nonlinearity, resnet.conv1, resnet.norm2, resnet.nonlinearity, resnet.conv2):
                hidden = layer(hidden)
            hidden = hidden.add_(shortcut)
        for downsampler in block.downsamplers or []:
            hidden = downsampler(hidden)
    hidden = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(hidden))))
    return hidden if vae.quant_conv is None else vae.quant_conv(hidden)


# ----------------------------------------------------------------------------------------------------- batches


@dataclass
class Data:
    """What batches are drawn from."""

    latents: torch.Tensor  # [N, 2, 2, 4, h, w] from `encode_images`
    choices: list[list[int]]  # per image, the rows of prompt_ids that describe it
    prompt_ids: torch.Tensor  # [P, L]
    scheduler: DDPMScheduler  # the noise schedule


class Batch(NamedTuple):
    """What the candidates of one step share: common random numbers."""

    noisy_latents: torch.Tensor  # [B, 4, h, w]
    target: torch.Tensor  # [B, 4, h, w], the noise or the velocity
    timesteps: torch.Tensor  # [B]
    prompt_ids: torch.Tensor  # [B, L]

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in self))


def noise_batch(
    latents: torch.Tensor, timesteps: torch.Tensor, prompt_ids: torch.Tensor, scheduler, generator: torch.Generator
) -> Batch:
    """Sample latents and noise and mix them at `timesteps` (Eq. 1). latents: [B, 2 (mean, std), 4, h, w]."""
    mean, std = latents.unbind(1)
    z = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(z, noise, timesteps) if velocity else noise
    return Batch(scheduler.add_noise(z, noise, timesteps), target, timesteps, prompt_ids)


def uniform_timesteps(batch_size: int, generator: torch.Generator, low: int = 0, high: int = NUM_TRAIN_TIMESTEPS) -> torch.Tensor:
    """Timesteps [batch_size], uniform over the integers [low, high)."""
    return torch.randint(low, high, (batch_size,), generator=generator)


def snr_timesteps(batch_size: int, generator: torch.Generator, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Timesteps [batch_size], t with probability proportional to log SNR(0) - log SNR(t): noisier timesteps are more frequent.

    From TextBoost (Park et al., arXiv 2409.08248). alphas_cumprod: [1000], of the noise schedule.
    """
    log_snr = torch.log(alphas_cumprod / (1 - alphas_cumprod)).double()
    return torch.multinomial(log_snr.max() - log_snr, batch_size, replacement=True, generator=generator)


def timestep_sampler(data: Data, *, timestep_sampling: str, t_min: int, t_max: int) -> TimestepSampler:
    """The sampler that --timestep_sampling names.

    "puts" is Partial Uniform Timestep Sampling (Eq. 9): uniform over [t_min, t_max). Its alternatives (Table 5) are "uniform",
    over all timesteps, and TextBoost's "snr".
    """
    return {
        "puts": partial(uniform_timesteps, low=t_min, high=t_max),
        "uniform": uniform_timesteps,
        "snr": partial(snr_timesteps, alphas_cumprod=data.scheduler.alphas_cumprod),
    }[timestep_sampling]


def draw_batch(data: Data, batch_size: int, sample_timesteps: TimestepSampler, generator: torch.Generator) -> Batch:
    """Draw image, flip, caption, timestep and noise for one step, all from `generator`."""
    images = torch.randint(len(data.latents), (batch_size,), generator=generator)
    flips = torch.randint(2, (batch_size,), generator=generator)
    draws = torch.rand(batch_size, generator=generator)
    described_by = [data.choices[i] for i in images.tolist()]
    captions = [choices[int(u * len(choices))] for choices, u in zip(described_by, draws.tolist(), strict=True)]
    timesteps = sample_timesteps(batch_size, generator)
    return noise_batch(data.latents[images, flips], timesteps, data.prompt_ids[captions], data.scheduler, generator)


def evaluation_batches(data: Data, count: int, t_min: int, t_max: int) -> list[Batch]:
    """The fixed set of `count` (image, timestep, noise) triples on which learning curves are evaluated, as batches of one.

    It is the same for every seed and sampler: timesteps spread evenly over [t_min, t_max), images and flips in turn.
    """
    generator = torch.Generator().manual_seed(0)
    timesteps = (t_min + (torch.arange(count) + 0.5) * (t_max - t_min) / count).long()
    timesteps = timesteps[torch.randperm(count, generator=generator)]  # otherwise image and timestep would be correlated
    batches = []
    for k in range(count):
        image, flip = k % len(data.latents), (k // len(data.latents)) % 2
        choices = data.choices[image]
        caption = choices[int(torch.randint(len(choices), (1,), generator=generator))]
        batches.append(
            noise_batch(
                data.latents[image, flip][None], timesteps[k, None], data.prompt_ids[caption][None], data.scheduler, generator
            )
        )
    return batches


def merge_batches(batches: list[Batch], size: int) -> list[Batch]:
    """Join batches of one into batches of `size`, so that evaluating a fixed set takes fewer forwards."""
    groups = [batches[first : first + size] for first in range(0, len(batches), size)]
    return [Batch(*(torch.cat(parts) for parts in zip(*group, strict=True))) for group in groups]


# ----------------------------------------------------------------------------------------------------- the model


def forbid_tf32() -> None:
    """Let a GPU's fp32 convolutions compute in fp32."""
    # By default PyTorch lets a GPU's convolutions round fp32 to TF32, which has only fp16's ten mantissa bits: differences
    # between candidates were then no more precise in fp32 than in fp16 (docs/measurements.md, On a GPU)
    torch.backends.cudnn.allow_tf32 = False


@dataclass
class FrozenModel:
    """The quantised modules, and their prediction as a function of the token."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    rows: torch.Tensor  # [R, d], from `Prompts`, on the device
    candidates_per_forward: int | None = None  # None: all at once

    def predict(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """The UNet's prediction for C candidate tokens [C, V, d] on one batch of B -> [C, B, 4, h, w], fp32, on the device.

        One forward over C * B latents: candidates differ only in their prompt, so the weights are dequantised once.
        Differentiable in `tokens` if gradients are enabled.
        """
        batch, tokens = batch.to(self.rows.device), tokens.to(self.rows.device)
        chunks = tokens.split(self.candidates_per_forward or len(tokens))
        predictions = [self.predict_at_once(batch, chunk) for chunk in chunks]
        return predictions[0] if len(predictions) == 1 else torch.cat(predictions)

    def predict_at_once(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        count = len(tokens)
        states = encode_prompts(self.text_encoder, self.rows, batch.prompt_ids, tokens)  # [C * B, L, d]
        dtype = self.unet.conv_in.weight.dtype
        noisy_latents = batch.noisy_latents.to(dtype).repeat(count, 1, 1, 1)  # [C * B, 4, h, w]
        noisy_latents = noisy_latents.to(memory_format=torch.channels_last)  # as the weights are packed
        timesteps = batch.timesteps.repeat(count)  # [C * B]
        with computed_once(modules_before_text(self.unet), count):
            noise_pred = self.unet(noisy_latents, timesteps, states.to(dtype), return_dict=False)[0]
        return noise_pred.float().unflatten(0, (count, -1))

    @torch.inference_mode()
    def losses(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """Mean squared errors [C], on the CPU, of the predictions for candidate tokens [C, V, d] on one batch (Eq. 1)."""
        return (self.predict(batch, tokens) - batch.target.to(self.rows.device)).square().flatten(1).mean(1).cpu()

    def mean_loss(self, batches: list[Batch], theta: torch.Tensor) -> float:
        """Mean squared error of the predictions for one token [V, d] over a fixed set."""
        return float(np.mean([self.losses(batch, theta.detach()[None]).item() for batch in batches]))


def load_model(
    inputs: Inputs,
    *,
    quantization: str,
    mixed_precision: str,
    device: torch.device,
    resolution: int,
    center_crop: bool = False,
    candidates_per_forward: int | None = None,
    compile: bool = False,
) -> tuple[FrozenModel, Data]:
    """Encode the images, free the VAE, then load text encoder and UNet, so that at most one of them is unquantised at a time.

    Raises InputError if the folder is damaged, even if its weights fit the configuration but the model does not compute.
    """
    folder, variant = inputs.folder, inputs.variant
    forbid_tf32()
    tune_malloc(*LOADING)
    latents = encode_photographs(folder, variant, inputs.subject.paths, device, resolution, center_crop)
    warn_of_emulation(mixed_precision, device.type)
    dtype = DTYPES[mixed_precision]
    text_encoder = load_text_encoder(folder, variant, quantization, dtype, device)
    unet = load_unet(folder, variant, quantization, dtype, device)
    tune_malloc(*STEPPING)
    split_feed_forward(unet)
    model = FrozenModel(unet, text_encoder, inputs.prompts.rows.to(device), candidates_per_forward)
    data = Data(latents, inputs.choices, inputs.prompts.ids, inputs.scheduler)
    with damaged_model(folder):  # a configuration can fit its weights and still not compute (a wrong number of groups)
        model.mean_loss(evaluation_batches(data, 1, 0, NUM_TRAIN_TIMESTEPS), inputs.initial_token)
    if compile:  # only now: a fault of the compiler would be reported as one of the folder
        unet.compile(dynamic=False)
    return model, data
