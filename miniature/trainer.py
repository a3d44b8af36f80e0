"""The training loop that all stages share: steps, learning rate, moving average, checkpoints, exact resume.

All randomness in step k (pictures, captions, noise, timesteps) comes from generators that are seeded with the stage and
k. A checkpoint therefore needs no generator state, and a run that was stopped and resumed equals one that was not. It is
resumed only with the same number of steps, learning rate, pictures and weights to start from.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from zoodip.errors import InputError
from zoodip.folder import model_digest
from zoodip.quantize import emulates_16_bits

WARM_UP = 0.02  # share of the steps


class Ema:
    """An exponential moving average of parameters, kept in fp32."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        # Early on, a long memory would keep the random start, so the decay grows with the steps taken.
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges parameters and averages; calling it again undoes it."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


@dataclass
class Draws:
    """The randomness of one step of one stage. `torch`: noise, timesteps; `numpy`: captions."""

    stage: int
    step: int

    def __post_init__(self) -> None:
        seed = int(np.random.SeedSequence([self.stage, self.step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.torch = torch.Generator().manual_seed(seed)
        self.numpy = np.random.default_rng([self.stage, self.step])

    def batch(self, count: int, size: int) -> Tensor:
        """int64 [size]: batch number `step` of endless shuffled passes over range(count)."""
        passes, place = divmod(self.step, count // size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000003 * self.stage + passes))
        return order[place * size : (place + 1) * size]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.torch)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.torch)


@dataclass
class Trainer:
    """Trains `modules` for `steps` steps. `stage` seeds the randomness; checkpoints go to `work`/checkpoint-`name`.

    `images`: the number of pictures; `start`: the model folder whose weights the modules begin with, if any.
    """

    name: str
    stage: int
    modules: dict[str, nn.Module]
    steps: int
    peak_lr: float
    work: Path
    images: int
    start: Path | None = None
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    checkpoint_every: int = 250
    step: int = 0
    seconds: float = 0.0
    history: list[float] = field(default_factory=list)
    smooth: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = [
            (f"{module_name}.{name}", parameter)
            for module_name, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        self.parameters = [parameter for _, parameter in self.named]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.peak_lr, weight_decay=self.weight_decay, betas=(0.9, 0.99), foreach=True
        )
        self.ema = Ema(self.parameters, self.ema_decay)
        self.settings = {
            "steps": self.steps,
            "learning rate": self.peak_lr,
            "pictures": self.images,
            "start": self.start and model_digest(self.start, None)[:12],
        }

    @property
    def folder(self) -> Path:
        return self.work / f"checkpoint-{self.name}"

    def save(self) -> None:
        """Writes weights, averages and optimizer moments; a checkpoint is never there half written."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.named, self.ema.average, strict=True):
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = average
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        state = {"step": self.step, "seconds": self.seconds, "history": self.history, "smooth": self.smooth}
        state["settings"] = self.settings
        part = self.folder.with_name(self.folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part / "state.safetensors")
        (part / "state.json").write_text(json.dumps(state))
        replace_folder(part, self.folder)

    def resume(self) -> bool:
        """Goes back to the last checkpoint, if there is one. Raises InputError if it is of a training with other settings."""
        recover_folder(self.folder)
        if not (self.folder / "state.json").exists():
            return False
        state = json.loads((self.folder / "state.json").read_text())
        for name, value in self.settings.items():
            earlier = state.get("settings", {}).get(name)
            if earlier != value:
                raise InputError(
                    f"{self.folder} is of a training with {name} = {earlier}, not {value}; give the same, or --restart"
                )
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for (name, parameter), average in zip(self.named, self.ema.average, strict=True):
                parameter.copy_(tensors[f"weight.{name}"])
                average.copy_(tensors[f"average.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in tensors:
                        value = tensors[f"{key}.{name}"]
                        self.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.smooth = state["history"], state["smooth"]
        return True

    def learning_rate(self) -> float:
        """2 % linear warm-up, then cosine decay to zero."""
        progress = self.step / self.steps
        if progress < WARM_UP:
            return self.peak_lr * max(progress / WARM_UP, 0.02)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))

    def run(
        self,
        loss_of_step: Callable[[Draws], tuple[Tensor, dict[str, float]]],
        until: int | None = None,
        action: Callable[[], None] | None = None,
        action_every: int = 1000,
    ) -> bool:
        """Steps the optimizer on `loss_of_step(draws)` to the last step, or only to step `until`; True after the last.

        The modules then hold the averages. `action` is called with the averages in place every `action_every` steps.
        """
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=10)
        last = self.steps if until is None else min(until, self.steps)
        while self.step < last:
            self.take_step(loss_of_step)
            if self.step % 100 == 0:
                self.history.append(round(self.smooth["loss"], 5))
            bar.update()
            bar.set_postfix({key: f"{value:.4f}" for key, value in self.smooth.items()}, refresh=False)
            if self.step % self.checkpoint_every == 0 or self.step == last:
                self.save()
            if action is not None and self.step % action_every == 0:
                self.ema.swap()
                action()
                self.ema.swap()
        bar.close()
        self.ema.swap()
        return self.step == self.steps

    def take_step(self, loss_of_step: Callable[[Draws], tuple[Tensor, dict[str, float]]]) -> None:
        """One optimizer step with clipped gradients, and one update of the average."""
        started = time.monotonic()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss, parts = loss_of_step(Draws(self.stage, self.step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.step)
        for key, value in {"loss": loss.item(), **parts}.items():
            self.smooth[key] = value if key not in self.smooth else 0.98 * self.smooth[key] + 0.02 * value
        self.seconds += time.monotonic() - started

    def record(self) -> dict:
        """Steps, minutes and losses of the training, for the file beside the weights."""
        return {"steps": self.step, "minutes": round(self.seconds / 60, 1), "loss": self.history}


def replace_folder(new: Path, final: Path) -> None:
    """Puts the finished folder `new` in place of `final`."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Undoes a `replace_folder` that was killed between its two renames."""
    old = final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
        old.rename(final)


def edit_json(path: Path, **changes: object) -> None:
    """Sets top-level keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2) + "\n")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 products, measured 1.6 times faster than fp32 on a CPU with AVX512-BF16; where they would be emulated, far
    more slowly, fp32. Weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=not emulates_16_bits(device.type))
