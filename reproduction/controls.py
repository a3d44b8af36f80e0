"""The controls of Figure 8: how much Subspace Gradient removes for a token that learns nothing."""

from __future__ import annotations

from functools import lru_cache

import torch

import train_zoodip
from reproduction.variations import varied
from train_zoodip import low_variance_directions


@lru_cache
def control_removed(
    kind: str, tau: int, nu: float, dim: int, refreshes: int, seed: int = 0, variation: tuple[str, ...] = ()
) -> list[int]:
    """How many directions of the buffer SG would remove at each of `refreshes`, for a token that learns nothing.

    walk: independent Gaussian steps. noise: the method's own update (with a `variation`), given losses that are pure noise.
    With another number of threads the share moves by .001, so that there is always one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return removed_for_nothing(kind, tau, nu, dim, refreshes, seed, variation)
    finally:
        torch.set_num_threads(threads)


def removed_for_nothing(
    kind: str, tau: int, nu: float, dim: int, refreshes: int, seed: int, variation: tuple[str, ...]
) -> list[int]:
    generator, removed = torch.Generator().manual_seed(seed), []
    if kind == "walk":
        for _ in range(refreshes):
            history = torch.randn(tau, dim, generator=generator).cumsum(0)
            removed.append(len(low_variance_directions(history, nu)))
        return removed
    with varied(variation):
        zo = train_zoodip.ZOAdam(torch.zeros(1, dim), learning_rate=1e-2, tau=tau, nu=nu)
    while len(removed) < refreshes:
        directions, _ = zo.candidates(generator)
        zo.step(directions, 5e-6 * torch.randn(3, generator=generator))  # as large as the miniature's differences at mu
        if len(zo.subspace.token_history) == 0:
            removed.append(len(zo.subspace.projection))
    return removed
