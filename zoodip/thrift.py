"""Savings in memory, or in the time of a forward, that change no bit of the result."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


# For `tune_malloc`: while loading, freed memory goes back at once; while stepping, freed activations are better kept for reuse.
LOADING, STEPPING = (1 << 20, 1 << 17), (32 << 20, 256 << 20)


def tune_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    """Set how glibc keeps freed memory: blocks of `mmap_threshold` bytes go back to the system at once, others once
    `trim_threshold` bytes are free in one piece.

    By default a model loads into a heap that fragments, and while stepping, glibc returns and fetches the same pages again and
    again (benchmarks/NOTES.md).
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):  # another C library
        pass


def split_feed_forward(unet: UNet2DConditionModel) -> None:
    """Make the feed-forwards at full resolution, the largest activations of a step, process one candidate after another."""
    from diffusers.models.attention import BasicTransformerBlock

    for module in [*unet.down_blocks[0].modules(), *unet.up_blocks[-1].modules()]:
        if isinstance(module, BasicTransformerBlock):
            module.set_chunk_feed_forward(1, dim=0)


def modules_before_text(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The layers of a UNet up to its first cross-attention: what they compute does not depend on the prompt."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if unet._compiled_call_impl is not None:  # adding and removing hooks would recompile it every step
        return []
    modules: list[nn.Module] = [unet.conv_in]
    block: Any  # one of several classes with the same parts
    for block in unet.down_blocks:
        attentions = getattr(block, "attentions", [])
        if not attentions:
            modules += [*block.resnets, *(block.downsamplers or [])]
            continue
        modules.append(block.resnets[0])
        first = attentions[0]
        if isinstance(first, Transformer2DModel):
            transformer: Any = first.transformer_blocks[0]
            if not transformer.only_cross_attention:
                modules += [first.norm, first.proj_in, transformer.norm1, transformer.attn1]
        break
    return modules


@contextmanager
def computed_once(modules: list[nn.Module], count: int):
    """Context manager: the modules compute the first of `count` equal parts of a batch and repeat it (5 % of SD v1.5's UNet).

    Only for modules whose inputs are equal in all parts.
    """

    def first_part(module, inputs, named):
        def cut(value):
            return value[: len(value) // count] if isinstance(value, torch.Tensor) else value

        return tuple(cut(value) for value in inputs), {name: cut(value) for name, value in named.items()}

    def repeated(module, inputs, output):
        return torch.cat([output] * count)

    hooks = []
    if count > 1:
        for module in modules:
            hooks += [module.register_forward_pre_hook(first_part, with_kwargs=True), module.register_forward_hook(repeated)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
