"""A small network that reads scene, accessory and the critter's attributes off a 64 x 64 picture."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from miniature.words import ACCESSORIES, COLOURS, EARS, EYES, PATTERNS, SCENES, SHAPES, TAILS
from miniature.world import SceneSpec

LABELS: dict[str, tuple[str, ...]] = {
    "scene": SCENES,
    "accessory": ACCESSORIES,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "pattern_colour": tuple(COLOURS),
    "ears": EARS,
    "shape": SHAPES,
    "tail": TAILS,
    "eyes": tuple(EYES),
}


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut; the first may halve the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class AttributeClassifier(nn.Module):
    """One linear head for each key of `labels`, on flattened 8 x 8 features: position matters, as ears are on top."""

    def __init__(self, labels: dict[str, tuple[str, ...]] = LABELS) -> None:
        super().__init__()
        self.labels = labels
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, 2), nn.SiLU(), Block(24, 48, 2), Block(48, 96, 2), Block(96, 96, 1),
            nn.Conv2d(96, 24, 1), nn.Flatten(), nn.Linear(24 * 64, 192), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(values)) for name, values in labels.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """float [B, 3, 64, 64] in [-1, 1] to {attribute: logits [B, number of values]}."""
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The most likely value of every attribute, for each image of float [B, 3, 64, 64] in [-1, 1]."""
        chosen = {name: logits.argmax(1).tolist() for name, logits in self(images).items()}
        return [{name: self.labels[name][chosen[name][i]] for name in chosen} for i in range(len(images))]


def truth(spec: SceneSpec) -> dict[str, str]:
    """The true value of every attribute of a picture."""
    attributes = {name: getattr(spec.critter, name) for name in LABELS if hasattr(spec.critter, name)}
    return {"scene": spec.scene, "accessory": spec.accessory, **attributes}


def load_classifier(folder: str | Path) -> AttributeClassifier:
    """The classifier of `miniature/classifier`, fp32, in evaluation mode."""
    folder = Path(folder)
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["labels"]
    classifier = AttributeClassifier({name: tuple(values) for name, values in labels.items()})
    weights = load_file(folder / "model.safetensors")
    classifier.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return classifier.eval()
