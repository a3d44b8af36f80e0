"""Last stages: the scorer (CLIP) and the attribute classifier, which judge what the model draws."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from miniature.captions import sample_caption, vocabulary
from miniature.classifier import LABELS, AttributeClassifier, truth
from miniature.diffusion import MODEL, text_config
from miniature.rendering import IMAGE_SIDE, WORK, judge_spec, rendered, to_float
from miniature.tokenizer import build_tokenizer, save_tokenizer
from miniature.trainer import Trainer, autocast, batches, edit_json, replace_folder
from miniature.world import SceneSpec

HERE = MODEL.parent


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


def attribute_targets(specs: list[SceneSpec]) -> dict[str, Tensor]:
    """The class of every attribute of every picture, int64 [N]; -100 where it cannot be seen."""
    answers = [truth(spec) for spec in specs]
    targets = {name: torch.tensor([values.index(answer[name]) for answer in answers]) for name, values in LABELS.items()}
    # A plain critter's pattern colour is invisible.
    targets["pattern_colour"][[answer["pattern"] == "plain" for answer in answers]] = -100
    return targets


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
    (part / "config.json").write_text(json.dumps({"image_side": IMAGE_SIDE, "labels": LABELS}, indent=1) + "\n")
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
        captions = [sample_caption(specs[int(index) % len(specs)], caption_rng, dropout=0) for index in chosen]
        inputs = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        with autocast(device):
            output = clip(pixel_values=pixels, return_loss=True, **inputs)
        logits = output.logits_per_image.float()
        right = (logits.argmax(1).cpu() == torch.arange(len(chosen))).float().mean().item()
        pooled, indices = output.vision_model_output.pooler_output.float(), chosen % len(specs)
        named = [F.cross_entropy(head(pooled), targets[name][indices].to(device)) for name, head in heads.items()]
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
