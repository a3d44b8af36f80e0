"""Steps of the semantic binding loss without backpropagation, to be given to `draw_bound` as `semantic_step`. Experiments."""

from __future__ import annotations

import torch
from torch import Tensor

from train_zoodip import ESTIMATORS, zeroth_order_gradient
from zoodip.binding_losses import Losses, Predictor, moved
from zoodip.binding_settings import Settings
from zoodip.binding_states import BoundGroup


def coefficient_gradient(row: Tensor, losses: Losses, directions: Tensor, mu: float = 0.1) -> tuple[Tensor, float]:
    """(gradient's projection [d], mean loss) by central differences along orthonormal `directions` [m, d]: 2 m forwards."""
    plus, minus = losses(torch.cat([row + mu * directions, row - mu * directions])).chunk(2)
    return ((plus - minus) / (2 * mu)) @ directions, torch.cat([plus, minus]).mean().item()


def coefficient_step(
    row: Tensor, losses: Losses, group: BoundGroup, predict: Predictor, settings: Settings
) -> tuple[Tensor, float]:
    """F1: down the gradient's projection on what leads to the states of the phrase's words alone, m of them (two to six)."""
    towards = group.anchor[group.anchor_rows] - row
    directions = torch.linalg.qr(towards.float().T).Q.T.to(row)  # [m, d]
    gradient, loss = coefficient_gradient(row, losses, directions)
    return moved(row, gradient, settings), loss


def estimated_step(row: Tensor, losses: Losses, group: BoundGroup, predict: Predictor, settings: Settings, *, n: int = 8,
                   mu: float = 1e-3, generator: torch.Generator | None = None) -> tuple[Tensor, float]:  # fmt: skip
    """F2: down ZOODiP's own estimate (Eq. 3) in all d numbers, n + 1 forwards on the same latents and timestep."""
    directions = torch.randn(n, 1, len(row), generator=generator).to(row)
    rge = ESTIMATORS["rge"]
    values = losses(row + mu * rge.candidate_offsets(directions)[:, 0])
    gradient = zeroth_order_gradient(rge.slopes(values, mu), directions, effective_dim=1)[
        0
    ]  # as the step is normalised, unscaled
    return moved(row, gradient, settings), values[0].item()
