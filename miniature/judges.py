"""Last stages: the scorer (CLIP) and the attribute classifier, which judge what the model draws."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from miniature.captions import scorer_caption, vocabulary
from miniature.classifier import LABELS, AttributeClassifier, truth
from miniature.diffusion import text_config, weights_digest
from miniature.rendering import IMAGE_SIDE, judge_spec, rendered, to_float
from miniature.tokenizer import build_tokenizer, save_tokenizer
from miniature.trainer import Draws, Trainer, autocast, edit_json, recover_folder, replace_folder
from miniature.vae import vae_folder
from miniature.world import SceneSpec, swapped

CLIP_STAGE, CLASSIFIER_STAGE = 2, 3
# The tail is the smallest attribute to read, and the one most often misread.
LABEL_WEIGHTS = {"tail": 3.0}


def judge_pictures(work: Path, count: int, device: torch.device, start: Path | None) -> Tensor:
    """uint8 [N, 64, 64, 3]: renders, then the first quarter of them as reconstructed by the VAE, `work`'s or else `start`'s.

    The pictures to judge come out of the VAE's decoder: judges trained only on clean renders mistrust its blur.
    """
    vae = AutoencoderKL.from_pretrained(vae_folder(work, start)).float().to(device).eval()
    images = rendered(work / "judge_images.npy", judge_spec, count)
    path, first = work / "judge_round_trip.safetensors", images[: count // 4]
    digest = weights_digest(vae.parameters())
    if path.exists():
        stored = load_file(path)
        if len(stored["images"]) == len(first) and torch.equal(stored["vae"], digest):
            return torch.cat([images, stored["images"]])
    outputs = []
    with torch.no_grad(), autocast(device):
        for chunk in tqdm(first.split(100), desc="round trip", mininterval=10):
            pixels = vae(to_float(chunk).to(device)).sample.float().cpu().clamp(-1, 1)
            outputs.append(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    trips = torch.cat(outputs).contiguous()
    save_file({"images": trips, "vae": digest}, path)
    return torch.cat([images, trips])


def augment(pixels: Tensor, draws: Draws) -> Tensor:
    """Adds what separates a generated picture from a render: noise, slight blur, a shift of up to 2 pixels, mirroring."""
    noise = 0.06 * draws.uniform(1) * draws.normal(*pixels.shape)
    dx, dy, blurred, mirrored = (int(draws.numpy.integers(high)) for high in (5, 5, 3, 2))
    pixels = F.pad(pixels, (2, 2, 2, 2), mode="replicate")[..., dy : dy + IMAGE_SIDE, dx : dx + IMAGE_SIDE]
    if blurred == 0:
        pixels = 0.5 * pixels + 0.5 * F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (pixels + noise).flip(-1) if mirrored else pixels + noise


def attribute_targets(specs: list[SceneSpec]) -> dict[str, Tensor]:
    """The class of every attribute of every picture, int64 [N]; -100 where it cannot be seen."""
    answers = [truth(spec) for spec in specs]
    targets = {name: torch.tensor([values.index(answer[name]) for answer in answers]) for name, values in LABELS.items()}
    # A plain critter's pattern colour is invisible.
    targets["pattern_colour"][[answer["pattern"] == "plain" for answer in answers]] = -100
    return targets


def train_classifier(
    work: Path,
    output: Path,
    *,
    images: int,
    steps: int,
    device: torch.device,
    start: Path | None = None,
    restart: bool = False,
    until: int | None = None,
) -> bool:
    """Trains `AttributeClassifier` and writes the folder `output`; True once the last step is taken.

    `start`: the model folder whose VAE is used where `work` has none.
    """
    pictures = judge_pictures(work, images, device, start)
    targets = attribute_targets([judge_spec(index) for index in range(images)])
    torch.manual_seed(CLASSIFIER_STAGE)  # the initial weights
    classifier = AttributeClassifier().to(device)
    trainer = Trainer("classifier", CLASSIFIER_STAGE, {"classifier": classifier}, steps, 2e-3, work, images, ema_decay=0.99)
    if not restart:
        trainer.resume()

    def loss_of_step(draws: Draws) -> tuple[Tensor, dict[str, float]]:
        chosen = draws.batch(len(pictures), 64)
        logits = classifier(augment(to_float(pictures[chosen]), draws).to(device))
        wanted = {name: values[chosen % images].to(device) for name, values in targets.items()}
        losses = {name: F.cross_entropy(logits[name].float(), wanted[name]) for name in LABELS}
        right = (logits["tail"].argmax(1) == wanted["tail"]).float().mean().item()
        return sum(LABEL_WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items()), {"tail": right}

    finished = trainer.run(loss_of_step, until)
    if finished:
        export_classifier(classifier, output)
    return finished


def export_classifier(classifier: AttributeClassifier, folder: Path) -> None:
    """Writes weights (fp16) and labels."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: weight.half().cpu() for name, weight in classifier.state_dict().items()}, part / "model.safetensors")
    (part / "config.json").write_text(json.dumps({"image_side": IMAGE_SIDE, "labels": LABELS}, indent=1) + "\n")
    replace_folder(part, folder)


def build_clip(tokenizer: CLIPTokenizer, start: Path) -> CLIPModel:
    """A CLIP with 8 x 8 patches and width 128, whose text tower is the text encoder of the model folder `start`."""
    config = CLIPConfig(
        text_config=text_config(tokenizer, width=256, layers=3, heads=4).to_dict(),
        vision_config={
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 2,
            "image_size": IMAGE_SIDE, "patch_size": 8,
        },
        projection_dim=128,
    )  # fmt: skip
    clip = CLIPModel(config)
    text_encoder = CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
    clip.text_model.load_state_dict(text_encoder.state_dict())
    return clip


def scorer_captions(specs: list[SceneSpec], draws: Draws) -> list[str]:
    """A true caption of every picture, then for every picture one that differs in a single attribute."""
    seeds = [int(seed) for seed in draws.numpy.integers(2**31, size=len(specs))]
    true = [scorer_caption(spec, np.random.default_rng(seed)) for spec, seed in zip(specs, seeds, strict=True)]
    false = [
        scorer_caption(swapped(spec, draws.numpy), np.random.default_rng(seed)) for spec, seed in zip(specs, seeds, strict=True)
    ]
    return true + false


def contrastive_loss(similarity: Tensor, captions: list[str]) -> Tensor:
    """Loss of similarities [B, 2B]: pictures against true captions, then altered ones. A caption that also fits is no rival."""
    count = len(similarity)
    same = torch.tensor([[captions[i] == caption for caption in captions] for i in range(count)], device=similarity.device)
    same[:, :count] &= ~torch.eye(count, dtype=torch.bool, device=similarity.device)
    similarity = similarity.masked_fill(same, -1e4)
    wanted = torch.arange(count, device=similarity.device)
    return (F.cross_entropy(similarity, wanted) + F.cross_entropy(similarity[:, :count].T, wanted)) / 2


def train_clip(
    work: Path,
    output: Path,
    *,
    images: int,
    steps: int,
    device: torch.device,
    start: Path,
    restart: bool = False,
    until: int | None = None,
) -> bool:
    """Trains the scorer contrastively and writes the folder `output`. Held-out breeds are never named.

    `start`: the model folder whose text encoder becomes the text tower; all of it but its projection stays frozen.
    """
    pictures = judge_pictures(work, images, device, start)
    names = set(vocabulary())
    specs = [judge_spec(index) for index in range(images)]
    specs = [spec if spec.breed in names else dataclasses.replace(spec, breed=None) for spec in specs]
    targets = attribute_targets(specs)
    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(CLIP_STAGE)  # the initial weights
    clip = build_clip(tokenizer, start).to(device)
    clip.set_attn_implementation("eager")  # as for the diffusion stage: faster in bf16 on a CPU
    # Its states already tell every attribute (`word_loss`): the pictures have to find their place among the words.
    clip.text_model.requires_grad_(False)
    # Classifying the attributes teaches the image tower faster than contrast alone; these heads are not kept.
    width = clip.config.projection_dim  # the pooled output is already projected
    heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in LABELS.items()}).to(device)
    modules = {"clip": clip, "heads": heads}
    trainer = Trainer("clip", CLIP_STAGE, modules, steps, 1e-3, work, images, start, weight_decay=0.05, ema_decay=0.995)
    if not restart:
        trainer.resume()

    def loss_of_step(draws: Draws) -> tuple[Tensor, dict[str, float]]:
        chosen = draws.batch(len(pictures), 64)
        pixels = augment(to_float(pictures[chosen]), draws).to(device)
        captions = scorer_captions([specs[int(index) % images] for index in chosen], draws)
        inputs = tokenizer(captions, padding=True, truncation=True, return_tensors="pt").to(device)
        with autocast(device):
            seen = clip.get_image_features(pixel_values=pixels).pooler_output
            said = clip.get_text_features(**inputs).pooler_output
        similarity = F.normalize(seen.float(), dim=-1) @ F.normalize(said.float(), dim=-1).T * clip.logit_scale.exp()
        named = [F.cross_entropy(head(seen.float()), targets[name][chosen % images].to(device)) for name, head in heads.items()]
        right = (similarity.argmax(1).cpu() == torch.arange(len(chosen))).float().mean().item()
        return contrastive_loss(similarity, captions) + torch.stack(named).mean(), {"right": right}

    finished = trainer.run(loss_of_step, until)
    if finished:
        export_clip(clip, tokenizer, output)
    return finished


def export_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes the scorer with its processor, weights in fp16."""
    recover_folder(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    clip.half().cpu().save_pretrained(part)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    CLIPProcessor(image_processor, tokenizer).save_pretrained(part)
    save_tokenizer(tokenizer, part)
    edit_json(part / "config.json", dtype="float32")
    replace_folder(part, folder)
