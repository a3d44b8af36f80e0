"""First stage: the VAE, 64 x 64 pixels to 16 x 16 x 4 latents of equal scale."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from miniature.rendering import IMAGE_SIDE, rendered, to_float, training_spec
from miniature.trainer import Draws, Trainer, autocast, replace_folder
from zoodip.errors import InputError

STAGE = 0


def build_vae() -> AutoencoderKL:
    """64 x 64 x 3 to 16 x 16 x 4. The full-resolution level is narrow: nearly all the time is spent there."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIDE,
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + 2 MSE + 0.25 L1 of the differences of neighbouring pixels, for images [B, 3, H, W] in [-1, 1]."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.25 * edges


def psnr(output: Tensor, target: Tensor) -> float:
    """Mean over images of 10 log10(peak^2 / MSE), images [B, 3, H, W] in [-1, 1] (peak 2)."""
    mse = (output.clamp(-1, 1) - target).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / mse)).mean())


def vae_loss(vae: AutoencoderKL, target: Tensor, draws: Draws) -> tuple[Tensor, dict[str, float]]:
    """Reconstruction loss through sampled latents plus a little KL divergence, for images [B, 3, 64, 64] in [-1, 1]."""
    with autocast(target.device):
        posterior = vae.encode(target).latent_dist
        noise = draws.normal(*posterior.mean.shape).to(target.device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    # Just enough to keep the four channels at similar scales and the latents smooth.
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return reconstruction_loss(output, target) + 5e-5 * kl, {"psnr": psnr(output.detach(), target), "kl": kl.item()}


def train_vae(
    work: Path,
    *,
    images: int,
    steps: int,
    device: torch.device,
    start: Path | None = None,
    restart: bool = False,
    until: int | None = None,
) -> bool:
    """Trains the VAE, gives every latent channel mean 0 and std 1, writes `work`/vae; True once the last step is taken.

    `start`: a model folder whose VAE to begin from instead of random weights. Only its decoder is trained: the latents stay
    what the UNet of that folder knows.
    """
    torch.manual_seed(STAGE)  # the initial weights: diffusers draws them from the global generator
    vae = build_vae().to(device)
    if start is not None:
        vae.load_state_dict(AutoencoderKL.from_pretrained(start / "vae").state_dict())
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trainer = Trainer("vae", STAGE, {"vae": vae}, steps, 1.5e-3 if start is None else 5e-4, work, images, start)
    if not restart:
        trainer.resume()
    pictures = rendered(work / "images.npy", training_spec, images)

    def loss_of_step(draws: Draws) -> tuple[Tensor, dict[str, float]]:
        target = to_float(pictures[draws.batch(len(pictures), 16)]).to(device)  # [16, 3, 64, 64]
        return vae_loss(vae, target.flip(-1) if draws.step % 2 else target, draws)

    finished = trainer.run(loss_of_step, until)
    if finished:
        if start is None:
            normalise_latents(vae, pictures)
        part = work / "vae.part"
        vae.half().save_pretrained(part)
        (part / "training.json").write_text(json.dumps(trainer.record()))
        replace_folder(part, work / "vae")
    return finished


def vae_folder(work: Path, start: Path | None) -> Path:
    """The VAE for the other stages: `work`/vae, or without it that of the model folder `start`. Raises InputError."""
    for folder in [work / "vae", *([start / "vae"] if start else [])]:
        if (folder / "config.json").exists():
            return folder
    raise InputError(f"{work / 'vae'}: is not there; train the VAE first (--stage vae), or give a model folder as --start")


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Folds a shift and a scale per channel into the 1 x 1 convolutions around the latents: mean 0, std 1.

    Stable Diffusion has one `scaling_factor` for all channels. With unequal channels, a weak one drowns in
    the diffusion noise; equalised, it does not, and the pictures stay the same. `scaling_factor` becomes 1.
    """
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(to_float(chunk).to(device)).latent_dist.mean for chunk in images[:2048].split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))  # [4], [4]
    print("latent channels before: mean", mean.tolist(), "std", std.tolist())
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log-variances
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)
