"""Second stage: text encoder and UNet, trained jointly on the VAE's latents, and the folder `miniature/model`."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from miniature.captions import said, sample_caption, vocabulary
from miniature.classifier import LABELS, truth
from miniature.rendering import detail_mask, rendered, to_float, training_spec
from miniature.tokenizer import MAX_LENGTH, build_tokenizer, save_tokenizer
from miniature.trainer import Draws, Trainer, autocast, edit_json, replace_folder
from miniature.vae import vae_folder
from miniature.world import SceneSpec

STAGE = 1
# Ears, eyes and tail may be in a third of the picture's cells; with this weight that third makes up two thirds of the loss.
DETAIL_WEIGHT = 3.0
# Timesteps at which the critter's form is decided: below them it is visible in the noisy picture, above them nothing is.
DECIDING = (350, 950)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A text encoder of Stable Diffusion's kind: 3 layers, 256 wide."""
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
    """Three levels, each with cross-attention, as SD has at its finest. Widths are multiples of 64, which is faster on CPUs."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=256,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def build_scheduler() -> PNDMScheduler:
    """Stable Diffusion v1.5's scheduler."""
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


# Weight of the word loss in the training loss (see `word_loss`).
WORD_WEIGHT = 0.05


def build_word_heads(width: int) -> nn.ModuleDict:
    """One linear map from a text state to each attribute's values; they are not part of the model."""
    return nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in LABELS.items()})


def word_loss(heads: nn.ModuleDict, hidden: Tensor, ids: Tensor, captions: list[str], specs: list[SceneSpec], draws: Draws):
    """Cross-entropy of what a caption tells, read off one of its states at or after the end of the text; hidden [B, 32, d].

    Stable Diffusion's text encoder knows what words look like before the UNet is trained. This one is trained with the UNet and
    forgets words that barely move the denoising loss: without this loss "amber eyes" and "blue eyes" have nearly the same states.
    """
    end = (ids == ids[0, -1]).int().argmax(1)  # padding is the end-of-text token
    place = end + (draws.uniform(len(ids)) * (ids.shape[1] - end)).long()
    states = hidden[torch.arange(len(ids)), place.to(hidden.device)].float()
    losses = []
    answers = [(truth(spec), said(caption, spec)) for caption, spec in zip(captions, specs, strict=True)]
    for name, head in heads.items():
        told = [(row, LABELS[name].index(values[name])) for row, (values, tells) in enumerate(answers) if tells[name]]
        if told:
            rows, wanted = torch.tensor(told, device=hidden.device).T
            losses.append(F.cross_entropy(head(states[rows]), wanted))
    return torch.stack(losses).mean() if losses else states.sum() * 0


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The latent mean and std of every picture, fp16 [count, 4, 16, 16] each."""
    vae = vae.to(device).eval()
    means, stds = [], []
    for chunk in tqdm(images.split(100), desc="encode", mininterval=10):
        with autocast(device):
            posterior = vae.encode(to_float(chunk).to(device)).latent_dist
        means.append(posterior.mean.half().cpu())
        stds.append(posterior.std.half().cpu())
    return torch.cat(means).contiguous(), torch.cat(stds).contiguous()


def weights_digest(parameters: Iterable[Tensor]) -> Tensor:
    """uint8 [N]: identifies the weights that a cached file was made with."""
    return torch.tensor(list(str(sum(weight.double().abs().sum().item() for weight in parameters)).encode()), dtype=torch.uint8)


def latents_of_images(vae: AutoencoderKL, images: Tensor, path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """`encode_images`, cached in the file `path`; encoded again if the encoder or the number of pictures differs."""
    digest = weights_digest([*vae.encoder.parameters(), *vae.quant_conv.parameters()])
    if path.exists():
        stored = load_file(path)
        if len(stored["mean"]) == len(images) and torch.equal(stored["vae"], digest):
            return stored["mean"], stored["std"]
    mean, std = encode_images(vae, images, device)
    save_file({"mean": mean, "std": std, "vae": digest}, path)
    return mean, std


def snr_weights(scheduler: PNDMScheduler, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR for every timestep, float [1000] (Hang et al. 2023, for epsilon prediction)."""
    alphas = scheduler.alphas_cumprod
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / snr


def form_weights(scheduler: PNDMScheduler) -> Tensor:
    """min(1 + 0.15 / SNR, 5) for every timestep, float [1000].

    The epsilon loss weights an error in the picture by SNR: where a word decides (SNR about 0.1), by next to nothing.
    """
    alphas = scheduler.alphas_cumprod
    return (1 + 0.15 * (1 - alphas) / alphas).clamp(max=5.0)


def draw_timesteps(count: int, draws: Draws) -> Tensor:
    """int64 [count]: half of them uniform over `DECIDING`, the others over all 1000.

    With three quarters, 750 steps got the form right but made the pictures soft: the mse at timestep 100 rose by 15 %.
    """
    deciding = torch.randint(*DECIDING, (count,), generator=draws.torch)
    anywhere = torch.randint(0, 1000, (count,), generator=draws.torch)
    return torch.where(draws.uniform(count) < 0.5, deciding, anywhere)


def start_from(folder: Path, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Copies the weights of an earlier model as far as they fit; attention that it lacks starts with zero output."""
    text_encoder.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).state_dict())
    earlier = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    own = unet.state_dict()
    unknown = earlier.keys() - own.keys()
    if unknown:
        raise ValueError(f"{folder}: the UNet has {sorted(unknown)[0]} and {len(unknown) - 1} more that this one has not")
    for name in own.keys() - earlier.keys():
        if ".attentions." in name and ".proj_out." in name:
            earlier[name] = torch.zeros_like(own[name])
    unet.load_state_dict(own | earlier)


def export_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Writes the Stable Diffusion folder `folder` in fp16, replacing the one before."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    # Copies, because training goes on in fp32.
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
    replace_folder(part, folder)


def diffusion_loss(
    modules: dict[str, nn.Module],
    tokenizer: CLIPTokenizer,
    scheduler: PNDMScheduler,
    data: dict[str, Tensor],
    specs: list[SceneSpec],
    draws: Draws,
    batch: int,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch. `data`: latent "mean" and "std" [N, 4, 16, 16] and "detail" [N, 16, 16] of `specs`."""
    device = next(modules["unet"].parameters()).device
    chosen = draws.batch(len(specs), batch)
    # [B, 4, 16, 16]; scaling_factor is 1
    latents = data["mean"][chosen].float() + data["std"][chosen].float() * draws.normal(batch, *data["mean"].shape[1:])
    noise = draws.normal(*latents.shape)
    timesteps = draw_timesteps(batch, draws)
    alpha = scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    shown = [specs[int(index)] for index in chosen]
    captions = [sample_caption(spec, draws.numpy) for spec in shown]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with autocast(device):
        hidden = modules["text_encoder"](ids.to(device)).last_hidden_state  # [B, 32, d]
        noise_pred = modules["unet"](noisy.to(device), timesteps.to(device), hidden).sample.float()
    error = (noise_pred - noise.to(device)).square().mean(1)  # [B, 16, 16]
    detail = 1 + DETAIL_WEIGHT * data["detail"][chosen].to(device)
    weights = (snr_weights(scheduler) * form_weights(scheduler))[timesteps].to(device)
    loss = (weights * (detail * error).mean((1, 2))).mean() / detail.mean()
    words = word_loss(modules["words"], hidden, ids, captions, shown, draws)
    return loss + WORD_WEIGHT * words, {"mse": error.mean().item(), "words": words.item()}


def train_diffusion(
    work: Path,
    output: Path,
    *,
    images: int,
    steps: int,
    batch: int,
    peak_lr: float,
    device: torch.device,
    start: Path | None = None,
    restart: bool = False,
    until: int | None = None,
) -> bool:
    """Trains text encoder and UNet jointly and writes the folder `output`; True once the last step is taken.

    Captions are resampled for each use of a picture. `start`: a model folder to begin from instead of random weights. The VAE is
    `work`/vae, or without it that of `start`.
    """
    vae = AutoencoderKL.from_pretrained(vae_folder(work, start)).float()
    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(STAGE)  # the initial weights: the libraries draw them from the global generator
    text_encoder, unet = build_text_encoder(tokenizer).to(device), build_unet().to(device)
    if start is not None:
        start_from(start, text_encoder, unet)
    # Attention written out: in bf16 on a CPU a step takes 1.53 s with it, 1.91 s with the fused kernels.
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    scheduler = build_scheduler()
    words = build_word_heads(text_encoder.config.hidden_size).to(device)
    modules = {"text_encoder": text_encoder, "unet": unet, "words": words}
    trainer = Trainer("diffusion", STAGE, modules, steps, peak_lr, work, images, start, ema_decay=0.9985)
    if not restart:
        trainer.resume()
    pictures = rendered(work / "images.npy", training_spec, images)
    means, stds = latents_of_images(vae, pictures, work / "latents.safetensors", device)  # [images, 4, 16, 16]
    specs = [training_spec(index) for index in range(images)]
    detail = torch.from_numpy(np.stack([detail_mask(spec) for spec in tqdm(specs, desc="detail", mininterval=10)]))
    data = {"mean": means, "std": stds, "detail": detail}

    def loss_of_step(draws: Draws) -> tuple[Tensor, dict[str, float]]:
        return diffusion_loss(modules, tokenizer, scheduler, data, specs, draws, batch)

    def export(folder: Path) -> None:
        # The VAE as it is now: with `start`, its decoder may be trained at the same time.
        export_pipeline(AutoencoderKL.from_pretrained(vae_folder(work, start)), text_encoder, unet, tokenizer, folder)

    finished = trainer.run(loss_of_step, until, lambda: export(work / "model-so-far"), action_every=500)
    export(output if finished else work / "model-so-far")
    return finished
