"""Second stage: text encoder and UNet, trained jointly on the VAE's latents, and the folder `miniature/model`."""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature.captions import sample_caption, vocabulary
from miniature.rendering import WORK, rendered, to_float, training_spec
from miniature.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer
from miniature.trainer import Periodic, Trainer, autocast, batches, edit_json, replace_folder

MODEL = Path(__file__).resolve().parent / "model"


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Stable Diffusion's kind of text encoder: 3 layers, 256 wide."""
    return CLIPTextModel(text_config(tokenizer, width=256, layers=3, heads=4))


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_unet() -> UNet2DConditionModel:
    """Three levels, cross-attention in the lower two. Widths in multiples of 64: measured faster on CPUs."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def build_scheduler() -> PNDMScheduler:
    """Stable Diffusion v1.5's."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The latent mean and std of every picture, fp16 [count, 4, 16, 16] each."""
    vae = vae.to(device).eval()
    means, stds = [], []
    for chunk in tqdm(images.split(100), desc="encode"):
        with autocast(device):
            posterior = vae.encode(to_float(chunk).to(device)).latent_dist
        means.append(posterior.mean.half().cpu())
        stds.append(posterior.std.half().cpu())
    return torch.cat(means).contiguous(), torch.cat(stds).contiguous()


def latents_of_images(vae: AutoencoderKL, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """`encode_images`, kept in `.work/`; encoded again if the VAE is newer."""
    path, vae_path = WORK / "latents.safetensors", WORK / "vae" / "config.json"
    if path.exists() and path.stat().st_mtime > vae_path.stat().st_mtime:
        stored = load_file(path)
        if len(stored["mean"]) == len(images):
            return stored["mean"], stored["std"]
    mean, std = encode_images(vae, images, device)
    save_file({"mean": mean, "std": std}, path)
    return mean, std


def snr_weights(scheduler: PNDMScheduler, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR for every timestep, float [1000] (Hang et al. 2023, for epsilon prediction)."""
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / snr


def export_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> None:
    """Writes the folder `miniature/model` in fp16, in the place of the one before."""
    part = MODEL.with_name("model.part")
    shutil.rmtree(part, ignore_errors=True)
    # Copies, for training goes on in fp32.
    models = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    halves = {name: copy.deepcopy(model).half().cpu().eval() for name, model in models.items()}
    pipeline = StableDiffusionPipeline(
        **halves,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(part)
    save_tokenizer(tokenizer, part / "tokenizer")
    # As in Stable Diffusion's own file: PNDM ignores it, DDIM and DDPM made from this config must not clip.
    edit_json(part / "scheduler" / "scheduler_config.json", clip_sample=False)
    # transformers obeys this on loading, diffusers loads fp32: a plain `from_pretrained` would mix the two.
    edit_json(part / "text_encoder" / "config.json", dtype="float32")
    edit_json(part / "vae" / "config.json", _name_or_path=None)  # where this machine happened to keep it
    replace_folder(part, MODEL)


def train_diffusion(args: argparse.Namespace) -> None:
    """Trains text encoder and UNet jointly on the VAE's latents; captions are sampled anew for each use."""
    device = torch.device(args.device)
    images = rendered("images", training_spec, args.images)
    vae = AutoencoderKL.from_pretrained(WORK / "vae").float()
    means, stds = latents_of_images(vae, images, device)  # [images, 4, 16, 16]
    specs = [training_spec(index) for index in tqdm(range(len(images)), desc="captions")]
    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(args.seed + 1)  # the initial weights
    text_encoder, unet = build_text_encoder(tokenizer).to(device), build_unet().to(device)
    scheduler = build_scheduler()
    alphas, weights = scheduler.alphas_cumprod.to(device), snr_weights(scheduler).to(device)
    trainer = Trainer(
        "diffusion", {"text_encoder": text_encoder, "unet": unet}, args.minutes_diffusion,
        peak_lr=args.lr_diffusion, ema_decay=0.9985, max_steps=args.max_steps, checkpoint_every=300,
    )  # fmt: skip
    if not args.restart:
        trainer.resume()
    generator = torch.Generator().manual_seed(args.seed + 1 + trainer.step)
    caption_rng = np.random.default_rng([args.seed, trainer.step])
    order = batches(len(means), args.batch_diffusion, generator)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = next(order)
        # [B, 4, 16, 16]; scaling_factor is 1
        noise = torch.randn(len(chosen), 2, 4, 16, 16, generator=generator).to(device)
        latents = means[chosen].to(device).float() + stds[chosen].to(device).float() * noise[:, 0]
        timesteps = torch.randint(0, 1000, (len(chosen),), generator=generator).to(device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise[:, 1]
        captions = [sample_caption(specs[int(index)], caption_rng) for index in chosen]
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        with autocast(device):
            hidden = text_encoder(ids).last_hidden_state  # [B, 32, 256]
            noise_pred = unet(noisy, timesteps, hidden).sample.float()
        error = (noise_pred - noise[:, 1]).square().mean((1, 2, 3))  # [B]
        return (weights[timesteps] * error).mean(), {"mse": error.mean().item()}

    export = Periodic(lambda: export_pipeline(vae, text_encoder, unet, tokenizer), first=480, interval=600)
    trainer.run(loss_of_step, export)
    export_pipeline(vae, text_encoder, unet, tokenizer)
    print(f"diffusion: {trainer.step} steps in {trainer.elapsed / 60:.1f} minutes")
