"""No dequantised weight is kept for a backward pass (D = 0): in whole training forwards, and in live bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import MINIATURE, seeded
from tiny import Tiny, load, scheduler_of
from torch import nn
from tuned import prepared

from benchmarks.memory import LiveBytes, count_live_bytes, stage
from zoodip.diffusion import FrozenModel, noise_batch
from zoodip.quantize import QuantizedLayer
from zoodip.tuned_layers import add_lora

IMAGES, SIDE = 5, 40  # so that every activation's size has a factor of 5, and no weight's has
Forward = tuple[Callable[[], torch.Tensor], list[nn.Module]]  # a training forward -> its loss, and the models in it


@pytest.fixture
def plain(monkeypatch) -> Callable[[], list[int]]:
    """Calling it makes packed layers multiply through plain autograd; it returns a list that fills with the sizes of the
    dequantised weights that a backward pass then needs."""

    def install() -> list[int]:
        needed = []

        def linear(self, inputs, bias):
            if torch.is_grad_enabled() and inputs.requires_grad:
                needed.append(self.shape.numel())
            return self.product(inputs, bias)

        monkeypatch.setattr(QuantizedLayer, "linear", linear)
        return needed

    return install


def tuning_forward(name: str, precision: str, tiny_model, subject, tmp_path) -> Forward:
    """The forward of a batch that one expert serves, as in a step of the script."""
    tuning = prepared(name, tiny_model, subject, tmp_path, resolution=SIDE, mixed_precision=precision)
    tuning.run.lock.release()
    data, timesteps = tuning.data, torch.tensor([300, 310, 260, 480, 499])
    latents = data.latents[torch.arange(IMAGES) % len(data.latents), 0]
    batch = noise_batch(latents, timesteps, data.prompt_ids[:1].expand(IMAGES, -1), data.scheduler, seeded())
    return lambda: (tuning.model.predict(batch) - batch.target).square().mean(), [tuning.model.unet]


def inversion_forward(tiny_model, subject, tmp_path) -> Forward:
    """The forward of gradient textual inversion, in which the text encoder takes part."""
    tiny = Tiny(tiny_model, 1)
    model = FrozenModel(load(tiny_model, "unet", "nf4"), load(tiny_model, "text_encoder", "nf4"), tiny.prompts.rows)
    latents, timesteps = torch.rand(IMAGES, 2, 4, SIDE // 2, SIDE // 2, generator=seeded()), torch.arange(500, 900, 80)
    batch = noise_batch(latents, timesteps, tiny.prompts.ids[torch.arange(IMAGES) % 2], scheduler_of(tiny_model), seeded())
    theta = tiny.tokens(1)[0].requires_grad_()
    return lambda: (model.predict(batch, theta[None])[0] - batch.target).square().mean(), [model.unet, model.text_encoder]


def kept_sizes(forward: Callable[[], torch.Tensor], models: list[nn.Module]) -> list[int]:
    """The sizes of what autograd keeps of a forward, except parameters, which exist anyway, and scales times a number."""
    own = {tensor.untyped_storage().data_ptr() for model in models for tensor in (*model.parameters(), *model.buffers())}
    scales = {tensor.shape for model in models for tensor in model.parameters() if tensor.requires_grad and tensor.dim() == 1}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape not in scales:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert forward().requires_grad
    return kept


@pytest.mark.parametrize(("name", "precision"), [
    ("qlora", "fp32"), ("krona", "fp32"), ("peqa", "fp32"), ("tuneqdm", "fp32"), ("textual inversion", "fp32"),
    ("qlora", "bf16"), ("tuneqdm", "bf16"),
])  # fmt: skip
def test_no_weight_is_kept_of_a_training_forward(name, precision, tiny_model, subject, tmp_path, plain):
    """Weights are told by size, so in any shape: transposed, flat, channels last. The plain path shows that one would be seen."""
    if name == "textual inversion":
        forward, models = inversion_forward(tiny_model, subject, tmp_path)
    else:
        forward, models = tuning_forward(name, precision, tiny_model, subject, tmp_path)
    layers = [module for model in models for module in model.modules() if isinstance(module, QuantizedLayer)]
    sizes = {layer.shape.numel() for layer in layers}
    assert len(layers) > 60 and all(size % 5 for size in sizes)
    kept = kept_sizes(forward, models)
    assert len(kept) > len(layers) and not sizes & set(kept)  # activations are kept

    needed = plain()
    kept = kept_sizes(forward, models)
    assert sorted(size for size in kept if size in sizes) == sorted(needed) and len(needed) > len(layers) // 2


def step_bytes(unet: nn.Module, inputs: tuple) -> LiveBytes:
    """Live bytes of a forward and a backward; the stage "between" tells what the backward pass finds."""

    def step() -> None:
        loss = unet(*inputs).sample.square().mean()
        with stage("between"):
            torch.zeros(1)
        loss.backward()
        unet.zero_grad(set_to_none=True)

    step()  # the first fills caches
    return count_live_bytes(step)


def test_live_bytes_of_qlora(plain):
    """On the miniature, whose weights are most of a step's memory, our step does without what the plain path keeps.

    When the backward pass begins, the plain path has every dequantised weight that it needs, and ours has none. The peak is near
    that moment, as activations grow until then. At its peak ours has one dequantised weight, hence the bound; both have the same
    activations, except that the plain path also keeps the inputs of convolutions.
    """
    unet = load(MINIATURE, "unet", "nf4")
    add_lora(unet, 2, seeded())
    latents = torch.randn(1, 4, 16, 16, generator=seeded(1)).to(memory_format=torch.channels_last)
    inputs = latents, 300, torch.randn(1, 77, 256, generator=seeded(2))
    ours, needed = step_bytes(unet, inputs), plain()
    stock = step_bytes(unet, inputs)
    sizes = [4 * size for size in needed[: len(needed) // 2]]  # fp32; of two steps
    assert len(sizes) > 100 and sum(sizes) > 3 * ours.peak  # or the bounds would not say much
    assert stock.stages["between"] - ours.stages["between"] >= sum(sizes)
    assert stock.peak - ours.peak >= sum(sizes) - max(sizes)
