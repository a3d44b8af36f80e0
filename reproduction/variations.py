"""The method with one part replaced, for rows that ask what the part does: the script itself needs no flag for it.

A variation replaces names of `train_zoodip` while its `main` runs; everything else in a run stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

import train_zoodip
from train_zoodip import OnePoint, ZOAdam
from zoodip.diffusion import Data
from zoodip.run import Run

# ---------------------------------------------------------------------------------------------------------------------
# The authors' Adam
# ---------------------------------------------------------------------------------------------------------------------


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers rounded to fp16 but kept in fp32, because a checkpoint keeps its types."""
    return tensor.half().float()


class HalfPrecisionAdam(torch.optim.Adam):
    """Adam for one tensor, whose gradient and moments are rounded to fp16 after each operation, as in the authors' script.

    (1 - beta2) g^2 rounds to 0 while |g| < 5.5e-3 (half of fp16's smallest number is 3e-8), so v stays 0 until a larger g
    comes. A small v then never decays: beta2 v rounds back to v.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        (group,) = self.param_groups
        (theta,), (beta1, beta2) = group["params"], group["betas"]
        state, gradient = self.state[theta], rounded(theta.grad)
        state["step"] += 1
        count = float(state["step"])
        mean = state["exp_avg"] = rounded(state["exp_avg"].lerp(gradient, 1 - beta1))
        square = rounded(state["exp_avg_sq"] * beta2)
        square = state["exp_avg_sq"] = rounded(square.addcmul(gradient, gradient, value=1 - beta2))
        denominator = rounded(rounded(square.sqrt() / (1 - beta2**count) ** 0.5) + group["eps"])
        theta.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**count))


class MomentumDescent(torch.optim.Adam):
    """Adam for one tensor whose v is always 0: momentum descent at the rate lr / epsilon, with the first moment's correction."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        (group,) = self.param_groups
        (theta,), (beta1, _) = group["params"], group["betas"]
        state = self.state[theta]
        state["step"] += 1
        state["exp_avg"].lerp_(theta.grad, 1 - beta1)
        theta.add_(state["exp_avg"], alpha=-group["lr"] / group["eps"] / (1 - beta1 ** float(state["step"])))


class OtherAdamZO(ZOAdam):
    """ZOAdam with another Adam; theta itself stays fp32, because its rounding is not in question."""

    adam: type[torch.optim.Adam]

    @wraps(ZOAdam.__init__)  # whose keywords are the flags that are passed to it
    def __init__(self, token: torch.Tensor, **settings):
        super().__init__(token, **settings)
        (group,) = self.optimizer.param_groups
        other = self.adam([self.theta], lr=group["lr"], betas=group["betas"], eps=group["eps"])
        other.state[self.theta] = self.optimizer.state[self.theta]
        self.optimizer = other


class HalfPrecisionZO(OtherAdamZO):
    adam = HalfPrecisionAdam


class MomentumZO(OtherAdamZO):
    adam = MomentumDescent


class NoMomentumZO(ZOAdam):
    """ZOAdam whose first moment is the gradient of the step itself; for a control of Figure 8."""

    @wraps(ZOAdam.__init__)
    def __init__(self, token: torch.Tensor, **settings):
        super().__init__(token, **settings)
        self.optimizer.param_groups[0]["betas"] = (0.0, 0.999)


# ---------------------------------------------------------------------------------------------------------------------
# Shuffled epochs
# ---------------------------------------------------------------------------------------------------------------------


train = train_zoodip.train  # bound now: the run replaces it there by `train_by_epochs`


class Epochs:
    """A `Data` of one image, the next in the epoch at the current step of `run`, so that every image comes once per epoch.

    The order of an epoch follows from the seed and the epoch's number, so an interrupted run continues in the same order.
    """

    def __init__(self, data: Data, run: Run):
        self.data, self.run, self.prompt_ids, self.scheduler = data, run, data.prompt_ids, data.scheduler

    @property
    def image(self) -> int:
        epoch, place = divmod(self.run.progress.step, len(self.data.latents))
        generator = torch.Generator().manual_seed(self.run.settings["seed"] * 1_000_003 + epoch)
        return int(torch.randperm(len(self.data.latents), generator=generator)[place])

    @property
    def latents(self) -> torch.Tensor:
        return self.data.latents[self.image, None]

    @property
    def choices(self) -> list[list[int]]:
        return [self.data.choices[self.image]]


def train_by_epochs(run, outputs, zo, model, data, sample, batch_size, generator) -> None:
    assert batch_size == 1, "an epoch is one image after another"
    train(run, outputs, zo, model, Epochs(data, run), sample, batch_size, generator)


# ---------------------------------------------------------------------------------------------------------------------
# The sign of the one-point estimate
# ---------------------------------------------------------------------------------------------------------------------


class PrintedOnePoint(OnePoint):
    """p_i u_i instead of p_i u_i+1, as printed in the supplement.

    With the directions in reverse order this is `OnePoint`'s estimate with the opposite sign, so it ascends.
    """

    @staticmethod
    def slopes(losses: torch.Tensor, mu: float) -> torch.Tensor:
        return -OnePoint.slopes(losses, mu)


# ---------------------------------------------------------------------------------------------------------------------
# What can be replaced
# ---------------------------------------------------------------------------------------------------------------------

VARIATIONS: dict[str, dict[str, Any]] = {
    "half_adam": {"ZOAdam": HalfPrecisionZO},
    "momentum": {"ZOAdam": MomentumZO},
    "no_momentum": {"ZOAdam": NoMomentumZO},
    "epochs": {"train": train_by_epochs},
    "printed_sign": {"ESTIMATORS": train_zoodip.ESTIMATORS | {"one_point": PrintedOnePoint}},
    "article": {},  # its captions come from another file: `runs.spec_argv`
}


@contextmanager
def varied(names: list[str]) -> Iterator[None]:
    """`train_zoodip` with these variations: the same functions run, with other parts."""
    with ExitStack() as stack:
        for name in names:
            for part, other in VARIATIONS[name].items():
                stack.enter_context(patch.object(train_zoodip, part, other))
        yield
