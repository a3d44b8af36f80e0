"""The loop that all stages of the training share: budget, learning rate, moving average, checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from miniature.rendering import WORK


class Ema:
    """An exponential moving average of parameters, kept in fp32."""

    def __init__(self, parameters: list[Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        # Early on a long memory would hold the random start: the decay grows with the steps taken.
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
class Trainer:
    """The loop that all stages share: budget, learning rate, EMA, checkpoints, progress bar."""

    name: str
    modules: dict[str, nn.Module]
    minutes: float
    peak_lr: float
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    max_steps: int | None = None
    checkpoint_every: float = 180.0
    step: int = 0
    elapsed: float = 0.0
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.named = [
            (f"{module_name}.{name}", parameter)
            for module_name, module in self.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        parameters = [parameter for _, parameter in self.named]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=self.peak_lr, weight_decay=self.weight_decay, betas=(0.9, 0.99), foreach=True
        )
        self.ema = Ema(parameters, self.ema_decay)

    @property
    def folder(self) -> Path:
        return WORK / f"checkpoint-{self.name}"

    def save(self) -> None:
        """Writes weights, averages and optimizer moments, atomically."""
        tensors: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.named, self.ema.average, strict=True):
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = average
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        state = {"step": self.step, "elapsed": self.elapsed, "history": self.history}
        part = self.folder.with_name(self.folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part / "state.safetensors")
        (part / "state.json").write_text(json.dumps(state))
        replace_folder(part, self.folder)

    def resume(self) -> bool:
        """Goes back to the last checkpoint, if there is one."""
        if not (self.folder / "state.json").exists():
            return False
        tensors = load_file(self.folder / "state.safetensors")
        with torch.no_grad():
            for (name, parameter), average in zip(self.named, self.ema.average, strict=True):
                parameter.copy_(tensors[f"weight.{name}"])
                average.copy_(tensors[f"average.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in tensors:
                        value = tensors[f"{key}.{name}"]
                        self.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
        state = json.loads((self.folder / "state.json").read_text())
        self.step, self.elapsed, self.history = state["step"], state["elapsed"], state["history"]
        return True

    def progress(self) -> float:
        """How much of the budget is spent, 0 to 1: of the minutes, or of the steps if they are limited."""
        if self.max_steps is not None:
            return min(self.step / self.max_steps, 1.0)
        return min(self.elapsed / (60 * self.minutes), 1.0)

    def learning_rate(self) -> float:
        """2 % linear warm-up, then a cosine to zero, by the budget spent."""
        progress = self.progress()
        if progress < 0.02:
            return self.peak_lr * max(progress / 0.02, 0.02)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98))

    def run(self, loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]], every: Periodic | None = None) -> None:
        """Calls `loss_of_step(step)` and steps the optimizer until the budget is spent."""
        bar = tqdm(total=1000, desc=self.name, bar_format="{desc}: {n:.0f}/1000 of the budget [{elapsed}] {postfix}")
        bar.update(round(1000 * self.progress()))
        smooth: dict[str, float] = {}
        saved = self.elapsed
        while self.progress() < 1:
            started = time.monotonic()
            lr = self.learning_rate()
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss, parts = loss_of_step(self.step)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.step)
            for key, value in {"loss": loss.item(), **parts}.items():
                smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
            self.elapsed += time.monotonic() - started
            if self.step % 100 == 0:
                self.history.append(round(smooth["loss"], 5))
            bar.n = round(1000 * self.progress())
            speed = {"step": self.step, "steps/s": f"{self.step / self.elapsed:.2f}", "lr": f"{lr:.1e}"}
            bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()} | speed, refresh=False)
            if self.step % 25 == 0:
                bar.refresh()
            if self.elapsed - saved > self.checkpoint_every:
                saved = self.elapsed
                self.save()
            if every is not None and every.due(self.elapsed):
                self.ema.swap()
                every.action()
                self.ema.swap()
        bar.close()
        self.save()
        self.ema.swap()


@dataclass
class Periodic:
    """An action that is due at `first` seconds and then every `interval` seconds of training time."""

    action: Callable[[], None]
    first: float
    interval: float

    def due(self, elapsed: float) -> bool:
        if elapsed < self.first:
            return False
        self.first = elapsed + self.interval
        return True


def replace_folder(new: Path, final: Path) -> None:
    """Puts the finished folder `new` in the place of `final`, which is never there half written."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def edit_json(path: Path, **changes: object) -> None:
    """Sets top-level keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2) + "\n")


def batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled index batches, each int64 [batch]."""
    while True:
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - batch + 1, batch):
            yield order[first : first + batch]


def autocast(device: torch.device) -> torch.autocast:
    """bf16 products, measured 1.6 times faster than fp32 on a CPU with AVX512-BF16; weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16)
