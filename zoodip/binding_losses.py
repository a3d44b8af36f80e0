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
    """A UNet's noise prediction, counting the samples that pass through it, forward and backward."""

    def __init__(self, unet):
        self.unet, self.forwards, self.backwards = unet, 0, 0

    def __call__(self, latents: Tensor, timestep, states: Tensor) -> Tensor:
        """latents [N, 4, h, w], states [N, L, d] -> [N, 4, h, w]."""
        self.forwards += len(latents)
        return self.unet(latents, timestep, encoder_hidden_states=states, return_dict=False)[0]

    def gradients(self, loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        """d loss / d inputs in fp32, with the loss scaled up in the backward pass for fp16, where gradients would underflow.

        Inputs hold one row per sample, and each sample's loss depends on its own row alone.
        """
        self.backwards += len(inputs[0])
        scale = 1024.0 if inputs[0].dtype == torch.float16 else 1.0
        return [gradient.float() / scale for gradient in torch.autograd.grad(scale * loss, inputs)]


def contexts(rows: Tensor, groups: Sequence[BoundGroup], sem: str) -> Tensor:
    """C candidate composites for each of M groups [C, M, d] as the UNet's contexts.

    Alone [C M, 1, d], as published, or within the frame of the group's noun [C M, L, d].
    """
    own = rows.flatten(0, 1)
    if sem == "alone":
        return own[:, None]
    frames = torch.stack([group.frame for group in groups]).repeat(len(rows), 1, 1)
    frames[torch.arange(len(own)), [group.frame_row for group in groups] * len(rows)] = own
    return frames


def binding_losses(predict: Predictor, latents: Tensor, timestep, states: Tensor, targets: Tensor) -> Tensor:
    """L_sem of the contexts [C M, L, d] of M groups -> [C, M].

    The mean squared distance of the predictions from those of the groups' anchors, both for `latents` [M, 4, h, w].
    """
    count = len(states) // len(latents)
    predictions = predict(latents.repeat(count, 1, 1, 1), timestep, states)
    return (predictions - targets.repeat(count, 1, 1, 1)).float().square().flatten(1).mean(1).view(count, -1)


Losses = Callable[[Tensor], Tensor]  # candidate composites [C, M, d] of M groups -> their L_sem [C, M]


def moved(rows: Tensor, gradients: Tensor, settings: Settings) -> Tensor:
    """Rows [..., d] after one step down their gradients."""
    if settings.sem_rule == "plain":
        return rows - settings.sem_rate * gradients
    lengths, slopes = (each.norm(dim=-1, keepdim=True) for each in (rows, gradients))
    return rows - settings.sem_rate * lengths * gradients / slopes.clamp_min(1e-12)


def gradient_step(
    rows: Tensor, losses: Losses, groups: Sequence[BoundGroup], predict: Predictor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """(the composites [M, d] after one step by backpropagation, their L_sem [M] before the step)."""
    with torch.enable_grad():
        rows = rows.detach().requires_grad_()
        (before,) = losses(rows[None])
        (gradients,) = predict.gradients(before.sum(), [rows])
    return moved(rows.detach(), gradients, settings).to(rows.dtype), before.detach()


def pose_losses(maps: Tensor, sides: Tensor) -> Tensor:
    """L_pose of each map [N, rows, columns] -> [N]: squared distance of its centroid from its side's target, in 32nds.

    sides: int64 [N], 0 for the left group, 1 for the right one.
    """
    targets = torch.tensor(POSE_TARGETS, device=maps.device)[sides]
    return 0.2 * (32 * (centroid(maps) - targets)).square().mean(-1)
