"""The losses of token merging (ToMe, arXiv 2411.07132) and their update steps: what a composite adds, and where a word acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoodip.attention import centroid
from zoodip.binding_settings import Settings
from zoodip.binding_states import BoundGroup

# Published thresholds T_i, rewritten: updates stop at mean entropy log(h w) - D_i nats, so a map may fill the share exp(-D_i).
THRESHOLDS = (0.93, 1.18, 1.43, 1.68, 1.81, 1.93, 2.06, 2.18)  # the last one for all later steps
POSE_TARGETS = ((10 / 32, 16 / 32), (25 / 32, 16 / 32))


class Predictor:
    """A UNet's noise prediction, counting the samples that pass through it and the backward passes."""

    def __init__(self, unet):
        self.unet, self.forwards, self.backwards = unet, 0, 0

    def __call__(self, latents: Tensor, timestep, states: Tensor) -> Tensor:
        """latents [N, 4, h, w], states [N, L, d] -> [N, 4, h, w]."""
        self.forwards += len(latents)
        return self.unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]

    def gradients(self, loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        """d loss / d inputs, with the loss scaled up in the backward pass for fp16, where gradients would underflow."""
        self.backwards += 1
        scale = 1024.0 if inputs[0].dtype == torch.float16 else 1.0
        return [gradient / scale for gradient in torch.autograd.grad(scale * loss, inputs)]


def contexts(rows: Tensor, group: BoundGroup, sem: str) -> Tensor:
    """Candidate composites [C, d] as the UNet's context: alone [C, 1, d], as published, or within the noun's frame [C, L, d]."""
    if sem == "alone":
        return rows[:, None]
    before, after = (
        part.expand(len(rows), -1, -1) for part in (group.frame[: group.frame_row], group.frame[group.frame_row + 1 :])
    )
    return torch.cat([before, rows[:, None], after], dim=1)


def binding_losses(predict: Predictor, latents: Tensor, timestep, states: Tensor, target: Tensor) -> Tensor:
    """L_sem of C contexts [C, L, d]: mean squared distance of their predictions from the anchor's [1, 4, h, w] -> [C]."""
    predictions = predict(latents.expand(len(states), -1, -1, -1), timestep, states)
    return (predictions - target).float().square().flatten(1).mean(1)


Losses = Callable[[Tensor], Tensor]  # candidate composites [C, d] -> their L_sem [C]


def moved(row: Tensor, gradient: Tensor, settings: Settings) -> Tensor:
    """A row [d] after one step down its gradient."""
    if settings.sem_rule == "plain":
        return row - settings.sem_rate * gradient
    return row - settings.sem_rate * row.norm() * gradient / gradient.norm().clamp_min(1e-12)


def gradient_step(row: Tensor, losses: Losses, group: BoundGroup, predict: Predictor, settings: Settings) -> tuple[Tensor, float]:
    """(the composite [d] after one step by backpropagation, its L_sem before the step)."""
    with torch.enable_grad():
        row = row.detach().requires_grad_()
        (loss,) = losses(row[None])
        (gradient,) = predict.gradients(loss, [row])
    return moved(row.detach(), gradient, settings), loss.item()


def pose_loss(maps: Sequence[Tensor]) -> Tensor:
    """L_pose of two groups' maps [rows, columns]: squared distances of their centroids from targets left and right, in 32nds."""
    targets = torch.tensor(POSE_TARGETS, device=maps[0].device)
    return sum((0.2 * (32 * (centroid(each) - target)).square().mean() for each, target in zip(maps, targets, strict=True)),
               start=torch.zeros((), device=maps[0].device))  # fmt: skip
