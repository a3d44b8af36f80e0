"""First stage: the VAE, 64 x 64 pixels to 16 x 16 x 4 latents of equal scale."""

from __future__ import annotations

import argparse
import json

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from miniature.rendering import IMAGE_SIDE, WORK, rendered, to_float, training_spec
from miniature.trainer import Trainer, autocast, batches, replace_folder


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
    """L1 + 2 MSE + L1 of the differences of neighbouring pixels, of images [B, 3, H, W] in [-1, 1]."""
    error = output - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.25 * edges


def psnr(output: Tensor, target: Tensor) -> float:
    """Mean over images of 10 log10(peak^2 / MSE), images [B, 3, H, W] in [-1, 1] (peak 2)."""
    mse = (output.clamp(-1, 1) - target).square().mean((1, 2, 3))
    return float((10 * torch.log10(4 / mse)).mean())


def train_vae(args: argparse.Namespace) -> None:
    """Trains the VAE, gives every latent channel mean 0 and std 1, and saves it to `.work/vae`."""
    device = torch.device(args.device)
    images = rendered("images", training_spec, args.images)
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)  # the initial weights: diffusers draws them from the global generator
    vae = build_vae().to(device)
    batch = 16
    order = batches(len(images), batch, generator)
    trainer = Trainer("vae", {"vae": vae}, args.minutes_vae, peak_lr=1.5e-3, max_steps=args.max_steps)
    if not args.restart:
        trainer.resume()

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        target = to_float(images[next(order)]).to(device)  # [16, 3, 64, 64]
        if step % 2:
            target = target.flip(-1)
        with autocast(device):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # Just enough of it to keep the four channels at like scales and the latents smooth.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(output, target) + 5e-5 * kl
        return loss, {"psnr": psnr(output.detach(), target), "kl": kl.item()}

    trainer.run(loss_of_step)
    normalise_latents(vae, images)
    part = WORK / "vae.part"
    vae.half().save_pretrained(part)
    (part / "training.json").write_text(
        json.dumps({"steps": trainer.step, "minutes": trainer.elapsed / 60, "loss": trainer.history})
    )
    replace_folder(part, WORK / "vae")


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Folds a shift and a scale per channel into the 1 x 1 convolutions beside the latents: mean 0, std 1.

    Stable Diffusion has one `scaling_factor` for all channels. With unequal channels the weak one drowns in
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
