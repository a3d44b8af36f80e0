"""Steps on the semantic binding loss without backpropagation, for `draw_bound(semantic_step=...)`, and how far each gets.

gradient                one forward and one backward
F1, coefficients        central differences along the directions to the states of the group and of its noun when encoded alone
F2, n directions        ZOODiP's estimator over all numbers of the composite
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reproduction.plots import new_plot, save_plot
from train_zoodip import ESTIMATORS, zeroth_order_gradient
from zoodip.binding_drawing import first_noises, scheduler_maker
from zoodip.binding_losses import Losses, Predictor, binding_losses, contexts, gradient_step, moved
from zoodip.binding_settings import FULL, Settings
from zoodip.binding_states import BoundGroup, Encoder, bind_prompt
from zoodip.binding_words import parse_prompts
from zoodip.records import mean_interval, table

SEED = 14  # of first noises and directions


def coefficient_gradient(rows: Tensor, losses: Losses, directions: Tensor, mu: float = 0.1) -> tuple[Tensor, Tensor]:
    """(projections of the gradients [M, d], mean losses [M]) by central differences: 2 m forwards for each of M rows [M, d].

    directions: [m, M, d], orthonormal for each row. Zeros stand for directions that a row lacks; they cost forwards but
    contribute nothing.
    """
    plus, minus = losses(torch.cat([rows + mu * directions, rows - mu * directions])).chunk(2)  # [m, M] each
    real = directions.any(2)
    means = ((plus + minus) / 2 * real).sum(0) / real.sum(0)
    return (((plus - minus) / (2 * mu))[..., None] * directions).sum(0), means


def coefficient_step(
    rows: Tensor, losses: Losses, groups: Sequence[BoundGroup], predict: Predictor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """F1: a step down the gradient's projection on directions to the states of the group and of its noun in the phrase alone.

    These are the two to six numbers w of c = mu + sum_j w_j (u_j - mu): the composite lies in their span, and stays there.
    """
    spans = []
    for row, group in zip(rows, groups, strict=True):
        states = torch.cat([group.within, group.anchor[group.anchor_row][None]])
        _, lengths, directions = torch.linalg.svd((states - row).float(), full_matrices=False)
        # a phrase at the start of the prompt has the same states alone, because the text encoder is causal
        spans.append(directions[lengths > 1e-3 * lengths[0]].to(row))  # [m, d]
    gradients, before = coefficient_gradient(rows, losses, pad_sequence(spans))
    return moved(rows, gradients, settings), before


def estimated_step(rows: Tensor, losses: Losses, groups: Sequence[BoundGroup], predict: Predictor, settings: Settings, *,
                   n: int = 8, mu: float = 1e-3, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """F2: a step down ZOODiP's own estimate (Eq. 3) in all d numbers: n + 1 forwards on the same latents and timestep."""
    directions = torch.randn(n, *rows.shape, generator=generator).to(rows)
    rge = ESTIMATORS["rge"]
    values = losses(rows + mu * rge.candidate_offsets(directions))  # [n + 1, M]
    # each composite has losses of its own; the estimates are not scaled, because the step is normalised
    each = zip(values.T, directions.split(1, dim=1), strict=True)
    gradients = torch.cat([zeroth_order_gradient(rge.slopes(own, mu), ways, effective_dim=1) for own, ways in each])
    return moved(rows, gradients, settings), values[0]


# -------------------------------------------------------------------------------------------------------------- experiment

Curve = list[list[float]]  # for each update: [forwards so far, L_sem as a share of the first]


def steps_to_compare() -> dict[str, Callable]:
    """Each estimate has its own generator. Call this once, so that every group has other directions."""
    estimates = {f"F2, n = {n}": partial(estimated_step, n=n, generator=torch.Generator().manual_seed(SEED)) for n in (2, 8, 32)}
    return {"gradient": gradient_step, "F1, coefficients": coefficient_step, **estimates}


def descend(group: BoundGroup, row: Tensor, losses: Losses, predict: Predictor, step: Callable, budget: int) -> Curve:
    """L_sem of a composite [1, d] over the updates until the budget of forwards is used up; a backward counts as two."""
    first, used, curve = losses(row[None]).item(), 0, [[0, 1.0]]
    while True:
        predict.forwards = predict.backwards = 0
        row, _ = step(row, losses, [group], predict, FULL)
        used += predict.forwards + 2 * predict.backwards
        if used > budget:
            return curve
        curve.append([used, losses(row[None]).item() / first])


@torch.no_grad()
def compare_steps(pipeline, marked_prompts: Sequence[str], *, height: int, width: int, budget: int) -> dict:
    """{"curves": {step: one curve per group}, "phrase": [share of each group's loss left with the noun's row of `phrase`]}.

    Curves start at the capped composite, at the first of 25 denoising steps, in the framed context: the problem that `full` has
    there.
    """
    encode, predict = Encoder(pipeline), Predictor(pipeline.unet)
    schedule = scheduler_maker(pipeline, None, 25)()
    timestep, scale = schedule.timesteps[0], pipeline.vae_scale_factor
    size, null = (height // scale, width // scale), encode("").states
    steps = steps_to_compare()
    found: dict = dict(budget=budget, curves={name: [] for name in steps}, phrase=[])
    for k, marked in enumerate(parse_prompts(pipeline.tokenizer, marked_prompts, None)):
        latents = first_noises(pipeline, [k], size, null)
        merged = bind_prompt(marked, encode, FULL, encode.mean())
        for group in merged.groups:
            target = predict(latents, timestep, group.anchor[None])

            def losses(rows: Tensor, group=group, latents=latents, target=target) -> Tensor:
                return binding_losses(predict, latents, timestep, contexts(rows, [group], "framed"), target)

            row = merged.states[[group.row]]
            found["phrase"].append((losses(group.anchor[[group.anchor_row]][None]) / losses(row[None])).item())
            for name, step in steps.items():
                found["curves"][name].append(descend(group, row, losses, predict, step, budget))
    return found


# ------------------------------------------------------------------------------------------------------------------ report


def left_at(curves: Sequence[Curve], forwards: int) -> tuple[float, float, float]:
    """(share of the first L_sem left after `forwards`, ends of its 95 % interval): geometric, over groups."""
    shares = [next(share for used, share in reversed(curve) if used <= forwards) for curve in curves]
    mean, half = mean_interval(np.log(np.maximum(shares, 1e-12)).tolist())
    return tuple(float(np.exp(value)) for value in (mean, mean - half, mean + half))  # pyright: ignore[reportReturnType]


def table_of_steps(found: dict) -> str:
    """What each step leaves of L_sem, in per cent, after an eighth, a quarter, a half and all of the forwards."""
    budgets = [found["budget"] // part for part in (8, 4, 2, 1)]

    def cell(curves: Sequence[Curve], forwards: int) -> str:
        mean, low, high = (100 * share for share in left_at(curves, forwards))
        return f"{mean:.0f} ({low:.0f} to {high:.0f})"

    lines = [[name, *(cell(curves, budget) for budget in budgets)] for name, curves in found["curves"].items()]
    lines.append(["the noun's row of `phrase`, no step", cell([[[0, share]] for share in found["phrase"]], 0), "", "", ""])
    return table(["step", *map(str, budgets)], lines)


def draw_figure(found: dict, path: Path) -> None:
    """What each step leaves of L_sem over forwards, with its interval."""
    figure, (axes,) = new_plot(1, 1, (6, 3.6))
    for name, curves in found["curves"].items():
        at = sorted({int(used) for curve in curves for used, _ in curve})
        mean, low, high = (np.array(values) for values in zip(*(left_at(curves, used) for used in at), strict=True))
        (line,) = axes.step(at, mean, where="post", label=name)
        axes.fill_between(at, low, high, step="post", alpha=0.15, color=line.get_color())
    axes.axhline(left_at([[[0, share]] for share in found["phrase"]], 0)[0], color="grey", linestyle=":", label="phrase, no step")
    axes.set(yscale="log", xlabel="forwards (a backward is two)", ylabel="share of L_sem that is left")
    axes.legend(fontsize=8)
    save_plot(figure, path)
