"""Trains the miniature Stable Diffusion, and the two models that judge it, on the world of `world.py`.

    python miniature/train.py                                    # everything: about 2 hours on 2 CPU cores
    python miniature/train.py --stage diffusion --minutes-diffusion 240
    python miniature/train.py --device cuda

Stages, in order: `vae`; `diffusion` (text encoder and UNet jointly); `clip` (a small image-text scorer);
`classifier` (reads scene, accessory and attributes off a picture). Each has a budget of minutes, over which
its learning rate falls to zero, so that it is really finished when the time is up. An interrupted stage
goes on from its last checkpoint under `miniature/.work/`; `--restart` begins it anew. Results:
`miniature/model` (a diffusers folder), `miniature/clip`, `miniature/classifier`, all weights fp16.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from miniature.classifier import LABELS, AttributeClassifier, truth  # noqa: E402
from miniature.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer  # noqa: E402
from miniature.world import SceneSpec, random_spec, render, sample_caption, vocabulary  # noqa: E402

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"
MODEL = HERE / "model"
IMAGE_SIDE = 64
IMAGE_SEED = 7
JUDGE_SEED = 11
STAGES = ("vae", "diffusion", "clip", "classifier")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", choices=(*STAGES, "all"), default="all", help="what to train (default: all)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--images", type=int, default=40000, help="training pictures rendered (default: 40000)"
    )
    parser.add_argument("--minutes-vae", type=float, default=31, help="minutes for the VAE (default: 31)")
    parser.add_argument(
        "--minutes-diffusion", type=float, default=58, help="minutes for UNet and text (default: 58)"
    )
    parser.add_argument("--minutes-clip", type=float, default=7, help="minutes for the scorer (default: 7)")
    parser.add_argument(
        "--minutes-classifier", type=float, default=5, help="minutes for the classifier (default: 5)"
    )
    parser.add_argument(
        "--judge-images", type=int, default=16000, help="pictures for the two judges (default: 16000)"
    )
    parser.add_argument("--batch-diffusion", type=int, default=48, help="batch of the UNet (default: 48)")
    parser.add_argument(
        "--lr-diffusion", type=float, default=7e-4, help="peak learning rate of the UNet (default: 7e-4)"
    )
    parser.add_argument(
        "--max-steps", type=int, default=None, help="stop each stage after this many steps (a test)"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the initial weights and of training (default: 0)"
    )
    parser.add_argument("--restart", action="store_true", help="ignore the checkpoints")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------- pictures


def training_spec(index: int) -> SceneSpec:
    """What diffusion training picture `index` shows: never a held-out breed."""
    return random_spec(np.random.default_rng([IMAGE_SEED, index]))


def judge_spec(index: int) -> SceneSpec:
    """What picture `index` of the two judges' training shows: held-out breeds too."""
    return random_spec(np.random.default_rng([JUDGE_SEED, index]), breed_share=0.3, held_out=True)


def _render_range(job: tuple[Callable[[int], SceneSpec], int, int]) -> tuple[int, np.ndarray]:
    spec_of, first, last = job
    return first, np.stack([np.asarray(render(spec_of(index), IMAGE_SIDE)) for index in range(first, last)])


def rendered(name: str, spec_of: Callable[[int], SceneSpec], count: int) -> Tensor:
    """The pictures of `spec_of(0..count-1)`, uint8 [count, 64, 64, 3], rendered once and kept in `.work/`."""
    path = WORK / f"{name}.npy"
    if path.exists() and len(images := np.load(path, mmap_mode="r")) >= count:
        return torch.from_numpy(np.array(images[:count]))
    WORK.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    images = np.lib.format.open_memmap(part, "w+", np.uint8, (count, IMAGE_SIDE, IMAGE_SIDE, 3))
    jobs = [(spec_of, first, min(first + 250, count)) for first in range(0, count, 250)]
    with get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
        for first, pictures in tqdm(pool.imap_unordered(_render_range, jobs), total=len(jobs), desc="render"):
            images[first : first + len(pictures)] = pictures
    images.flush()
    part.rename(path)
    return torch.from_numpy(np.array(images))


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] to float [B, 3, 64, 64] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


# --------------------------------------------------------------------------------------------------- training


class Ema:
    """An exponential moving average of parameters, kept in fp32."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        # Early on a long memory would hold the random start: the decay grows with the steps taken.
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges parameters and averages; calling it again undoes it."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


@dataclass
class Trainer:
    """The loop that all stages share: budget, learning rate, EMA, checkpoints, progress bar."""

    name: str
    modules: dict[str, nn.Module]
    minutes: float
    peak_lr: float
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    max_steps: int | None = None
    checkpoint_every: float = 180.0
    step: int = 0
    elapsed: float = 0.0
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.named = [
            (f"{module_name}.{name}", parameter)
            for module_name, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        parameters = [parameter for _, parameter in self.named]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.peak_lr, weight_decay=self.weight_decay, betas=(0.9, 0.99), foreach=True
        )
        self.ema = Ema(parameters, self.ema_decay)

    @property
    def folder(self) -> Path:
        return WORK / f"checkpoint-{self.name}"

    def save(self) -> None:
        """Writes weights, averages and optimizer moments, atomically."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.named, self.ema.average, strict=True):
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = average
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        state = {"step": self.step, "elapsed": self.elapsed, "history": self.history}
        part = self.folder.with_name(self.folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part / "state.safetensors"
        )
        (part / "state.json").write_text(json.dumps(state))
        replace_folder(part, self.folder)

    def resume(self) -> bool:
        """Goes back to the last checkpoint, if there is one."""
        if not (self.folder / "state.json").exists():
            return False
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for (name, parameter), average in zip(self.named, self.ema.average, strict=True):
                parameter.copy_(tensors[f"weight.{name}"])
                average.copy_(tensors[f"average.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in tensors:
                        value = tensors[f"{key}.{name}"]
                        self.optimizer.state[parameter][key] = (
                            value if key == "step" else value.to(parameter.device)
                        )
        state = json.loads((self.folder / "state.json").read_text())
        self.step, self.elapsed, self.history = state["step"], state["elapsed"], state["history"]
        return True

    def progress(self) -> float:
        """How much of the budget is spent, 0 to 1: of the minutes, or of the steps if they are limited."""
        if self.max_steps is not None:
            return min(self.step / self.max_steps, 1.0)
        return min(self.elapsed / (60 * self.minutes), 1.0)

    def learning_rate(self) -> float:
        """2 % linear warm-up, then a cosine to zero, by the budget spent."""
        progress = self.progress()
        if progress < 0.02:
            return self.peak_lr * max(progress / 0.02, 0.02)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))

    def run(
        self, loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]], every: Periodic | None = None
    ) -> None:
        """Calls `loss_of_step(step)` and steps the optimizer until the budget is spent."""
        bar = tqdm(
            total=1000, desc=self.name, bar_format="{desc}: {n:.0f}/1000 of the budget [{elapsed}] {postfix}"
        )
        bar.update(round(1000 * self.progress()))
        smooth: dict[str, float] = {}
        saved = self.elapsed
        while self.progress() < 1:
            started = time.monotonic()
            lr = self.learning_rate()
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss, parts = loss_of_step(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.step)
            for key, value in {"loss": loss.item(), **parts}.items():
                smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
            self.elapsed += time.monotonic() - started
            if self.step % 100 == 0:
                self.history.append(round(smooth["loss"], 5))
            bar.n = round(1000 * self.progress())
            speed = {"step": self.step, "steps/s": f"{self.step / self.elapsed:.2f}", "lr": f"{lr:.1e}"}
            bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()} | speed, refresh=False)
            if self.step % 25 == 0:
                bar.refresh()
            if self.elapsed - saved > self.checkpoint_every:
                saved = self.elapsed
                self.save()
            if every is not None and every.due(self.elapsed):
                self.ema.swap()
                every.action()
                self.ema.swap()
        bar.close()
        self.save()
        self.ema.swap()


@dataclass
class Periodic:
    """An action that is due at `first` seconds and then every `interval` seconds of training time."""

    action: Callable[[], None]
    first: float
    interval: float

    def due(self, elapsed: float) -> bool:
        if elapsed < self.first:
            return False
        self.first = elapsed + self.interval
        return True


def replace_folder(new: Path, final: Path) -> None:
    """Puts the finished folder `new` in the place of `final`, which is never there half written."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled index batches, each int64 [batch]."""
    while True:
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - batch + 1, batch):
            yield order[first : first + batch]


def autocast(device: torch.device) -> torch.autocast:
    """bf16 products, measured 1.6 times faster than fp32 on a CPU with AVX512-BF16; weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16)


# -------------------------------------------------------------------------------------------------------- VAE


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
    latents = torch.cat(
        [vae.encode(to_float(chunk).to(device)).latent_dist.mean for chunk in images[:2048].split(64)]
    )
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


# -------------------------------------------------------------------------------------------------- diffusion


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


def edit_json(path: Path, **changes: object) -> None:
    """Sets top-level keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({key: value for key, value in content.items() if value is not None}, indent=2) + "\n"
    )


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
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
            device
        )
        with autocast(device):
            hidden = text_encoder(ids).last_hidden_state  # [B, 32, 256]
            noise_pred = unet(noisy, timesteps, hidden).sample.float()
        error = (noise_pred - noise[:, 1]).square().mean((1, 2, 3))  # [B]
        return (weights[timesteps] * error).mean(), {"mse": error.mean().item()}

    export = Periodic(lambda: export_pipeline(vae, text_encoder, unet, tokenizer), first=480, interval=600)
    trainer.run(loss_of_step, export)
    export_pipeline(vae, text_encoder, unet, tokenizer)
    print(f"diffusion: {trainer.step} steps in {trainer.elapsed / 60:.1f} minutes")


# ----------------------------------------------------------------------------------------------------- judges


def judge_images(args: argparse.Namespace, device: torch.device) -> Tensor:
    """uint8 [N, 64, 64, 3]: renders, and the first quarter of them once more as the VAE gives them back.

    What is judged comes out of the VAE's decoder: judges trained on clean renders alone mistrust its blur.
    """
    images = rendered("judge_images", judge_spec, args.judge_images)
    path = WORK / "judge_round_trip.safetensors"
    first = images[: len(images) // 4]
    if not path.exists() or len(load_file(path)["images"]) != len(first):
        vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().to(device).eval()
        outputs = []
        with torch.no_grad(), autocast(device):
            for chunk in tqdm(first.split(100), desc="round trip"):
                outputs.append(vae(to_float(chunk).to(device)).sample.float().cpu())
        pixels = ((torch.cat(outputs).clamp(-1, 1) + 1) * 127.5).round().byte()
        save_file({"images": pixels.permute(0, 2, 3, 1).contiguous()}, path)
    return torch.cat([images, load_file(path)["images"]])


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Adds what separates a generated picture from a render: noise, slight blur, a shift of 1 or 2 pixels."""
    noise = 0.06 * torch.rand(1, generator=generator) * torch.randn(pixels.shape, generator=generator)
    dx, dy, blurred = (int(torch.randint(0, high, (1,), generator=generator)) for high in (5, 5, 3))
    pixels = F.pad(pixels, (2, 2, 2, 2), mode="replicate")[..., dy : dy + IMAGE_SIDE, dx : dx + IMAGE_SIDE]
    if blurred == 0:
        pixels = 0.5 * pixels + 0.5 * F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return pixels + noise


def train_classifier(args: argparse.Namespace) -> None:
    """Trains `AttributeClassifier` and writes `miniature/classifier`."""
    device = torch.device(args.device)
    images = judge_images(args, device)
    specs = [judge_spec(index) for index in range(args.judge_images)]
    targets = attribute_targets(specs)
    torch.manual_seed(args.seed + 2)  # the initial weights
    generator = torch.Generator().manual_seed(args.seed + 2)
    classifier = AttributeClassifier().to(device)
    trainer = Trainer("classifier", {"classifier": classifier}, args.minutes_classifier, peak_lr=2e-3,
                      max_steps=args.max_steps, ema_decay=0.99)  # fmt: skip
    if not args.restart:
        trainer.resume()
    order = batches(len(images), 64, generator)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = next(order)
        pixels = augment(to_float(images[chosen]), generator).to(device)
        pixels = pixels.flip(-1) if step % 2 else pixels
        logits = classifier(pixels)
        indices = chosen % args.judge_images
        losses = [F.cross_entropy(logits[name].float(), targets[name][indices].to(device)) for name in LABELS]
        right = (logits["pattern"].argmax(1).cpu() == targets["pattern"][indices]).float().mean().item()
        return torch.stack(losses).sum(), {"pattern": right}

    trainer.run(loss_of_step)
    part = HERE / "classifier.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_file(
        {name: weight.half().cpu() for name, weight in classifier.state_dict().items()},
        part / "model.safetensors",
    )
    (part / "config.json").write_text(
        json.dumps({"image_side": IMAGE_SIDE, "labels": LABELS}, indent=1) + "\n"
    )
    replace_folder(part, HERE / "classifier")


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 16 x 16 patches, 192 wide, whose text tower begins as the diffusion model's text encoder."""
    config = CLIPConfig(
        text_config=text_config(tokenizer, width=256, layers=3, heads=4).to_dict(),
        vision_config={
            "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3,
            "image_size": IMAGE_SIDE, "patch_size": 16,
        },
        projection_dim=128,
    )  # fmt: skip
    clip = CLIPModel(config)
    text_encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32)
    clip.text_model.load_state_dict(text_encoder.state_dict())
    return clip


def attribute_targets(specs: list[SceneSpec]) -> dict[str, Tensor]:
    """The class of every attribute of every picture, int64 [N]; -100 where it cannot be seen."""
    answers = [truth(spec) for spec in specs]
    targets = {
        name: torch.tensor([values.index(answer[name]) for answer in answers])
        for name, values in LABELS.items()
    }
    # A plain critter's pattern colour is invisible.
    targets["pattern_colour"][[answer["pattern"] == "plain" for answer in answers]] = -100
    return targets


def train_clip(args: argparse.Namespace) -> None:
    """Trains the scorer contrastively and writes `miniature/clip`. Held-out breeds are never named."""
    device = torch.device(args.device)
    images = judge_images(args, device)
    specs = [judge_spec(index) for index in range(args.judge_images)]
    names = set(vocabulary())
    specs = [spec if spec.breed in names else dataclasses.replace(spec, breed=None) for spec in specs]
    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(args.seed + 3)  # the initial weights
    generator = torch.Generator().manual_seed(args.seed + 3)
    caption_rng = np.random.default_rng(args.seed + 3)
    clip = build_clip(tokenizer).to(device)
    # Naming the attributes teaches the image tower sooner than contrast alone; these heads are not kept.
    width = clip.config.projection_dim  # the pooled output is projected already
    heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in LABELS.items()}).to(device)
    targets = attribute_targets(specs)
    trainer = Trainer("clip", {"clip": clip, "heads": heads}, args.minutes_clip, peak_lr=1e-3,
                      max_steps=args.max_steps, weight_decay=0.05, ema_decay=0.995)  # fmt: skip
    if not args.restart:
        trainer.resume()
    order = batches(len(images), 128, generator)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = next(order)
        pixels = augment(to_float(images[chosen]), generator).to(device)
        pixels = pixels.flip(-1) if step % 2 else pixels
        captions = [
            sample_caption(specs[int(index) % len(specs)], caption_rng, dropout=0) for index in chosen
        ]
        inputs = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        with autocast(device):
            output = clip(pixel_values=pixels, return_loss=True, **inputs)
        logits = output.logits_per_image.float()
        right = (logits.argmax(1).cpu() == torch.arange(len(chosen))).float().mean().item()
        pooled, indices = output.vision_model_output.pooler_output.float(), chosen % len(specs)
        named = [
            F.cross_entropy(head(pooled), targets[name][indices].to(device)) for name, head in heads.items()
        ]
        return output.loss.float() + 2 * torch.stack(named).mean(), {"right": right}

    trainer.run(loss_of_step)
    part = HERE / "clip.part"
    shutil.rmtree(part, ignore_errors=True)
    clip.half().cpu().save_pretrained(part)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    CLIPProcessor(image_processor, tokenizer).save_pretrained(part)
    save_tokenizer(tokenizer, part)
    edit_json(part / "config.json", dtype="float32")
    replace_folder(part, HERE / "clip")


def main(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    WORK.mkdir(exist_ok=True)
    stages = {
        "vae": train_vae,
        "diffusion": train_diffusion,
        "clip": train_clip,
        "classifier": train_classifier,
    }
    for name in STAGES if args.stage == "all" else (args.stage,):
        stages[name](args)


if __name__ == "__main__":
    main(parse_args())
