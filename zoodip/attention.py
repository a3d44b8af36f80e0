"""Cross-attention of a UNet: maps read by hooks, measures of where a word acts, and a bias that restricts where it may act."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from zoodip.errors import InputError

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

MAX_CELLS = 400  # upper limit of the maps used by default: 16 x 16 in SD v1.5 at 512 px
EPSILON = 1e-5  # inside the logarithm of the entropy, as published


# ------------------------------------------------------------------------------------------------------------------ maps


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """{name: layer} for every cross-attention of a Stable Diffusion 1.x or 2.x UNet."""
    return {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}  # pyright: ignore[reportReturnType]


def context_of(inputs: tuple, kwargs: dict) -> torch.Tensor:
    """The text states that a cross-attention is called with."""
    return kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else inputs[1]


@contextmanager
def attention_maps(layers: Sequence[Attention], count: int) -> Iterator[list[torch.Tensor]]:
    """Context manager: each of the `layers` appends its probabilities [count, h w, L], averaged over heads, to the yielded list.

    Only for the last `count` samples: the conditional ones, which follow the unconditional. They are recomputed from the layer's
    input, so that the layer itself stays unchanged; a bias added by its processor is not included.
    """
    maps: list[torch.Tensor] = []

    def record(layer, inputs, kwargs):
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        query = layer.head_to_batch_dim(layer.to_q(hidden[-count:]))
        key = layer.head_to_batch_dim(layer.to_k(context_of(inputs, kwargs)[-count:]))
        shares = (layer.scale * query @ key.transpose(1, 2)).float().softmax(-1)  # [count * heads, h w, L]
        maps.append(shares.unflatten(0, (count, layer.heads)).mean(1))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def map_layers(unet: UNet2DConditionModel, latents: torch.Tensor, cells: int | None = None) -> list[Attention]:
    """The cross-attentions of one level: the one with maps of `cells` places, by default the finest of at most 400. One forward.

    `latents` [1, 4, h, w]: only their shape matters. Raises InputError if no level has `cells` places.
    """
    found: dict[int, list] = {}

    def record(layer, inputs, kwargs):
        found.setdefault((inputs[0] if inputs else kwargs["hidden_states"]).shape[1], []).append(layer)

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in cross_attentions(unet).values()]
    try:
        unet(torch.zeros_like(latents), 0, encoder_hidden_states=latents.new_zeros(1, 1, unet.config["cross_attention_dim"]))
    finally:
        for handle in handles:
            handle.remove()
    if cells is not None and cells not in found:
        raise InputError(f"map_cells {cells}: no cross-attention has maps of that many places; choose from {sorted(found)}")
    return found[cells or max((size for size in found if size <= MAX_CELLS), default=min(found))]


def grid(cells: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a map of `cells` places over latents of `height` x `width`; both are divided by the same factor."""
    factor = round(math.sqrt(height * width / cells))
    return height // factor, width // factor


def word_maps(maps: torch.Tensor, columns: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """How much each place attends to one word of its prompt, relative to the prompt's other words. [N, h w, L] -> [N, h w].

    The words of prompt i are its columns 1 .. ends[i] - 1; columns[i] is the one to read.
    """
    places = torch.arange(maps.shape[2], device=maps.device)
    words = (places >= 1) & (places < ends[:, None])  # [N, L]
    shares = (maps / 0.5).masked_fill(~words[:, None], -torch.inf).softmax(-1)
    return shares[torch.arange(len(maps), device=maps.device), :, columns]


def scaled(values: torch.Tensor) -> torch.Tensor:
    """`values` [..., P] min-max scaled over their P places; ones, with a gradient of 0, if all are equal or not numbers."""
    values = values.nan_to_num()
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    varied = high > low
    # the branch that is not taken must be finite, too: its gradient is multiplied by 0
    return torch.where(varied, (values - low) / torch.where(varied, high - low, 1.0), values * 0 + 1)


def entropy(values: torch.Tensor) -> torch.Tensor:
    """-sum p log(p + 1e-5) in nats, where p is `values` [..., P] min-max scaled, divided by its sum: log of how many places it
    fills."""
    weights = scaled(values)
    share = weights / weights.sum(-1, keepdim=True)
    return -(share * (share + EPSILON).log()).sum(-1)


def centroid(values: torch.Tensor) -> torch.Tensor:
    """(x, y) in [0, 1] of maps [..., rows, columns], min-max scaled; for one place, its centre. (Self-guidance, arXiv
    2306.00986.)"""
    weights = scaled(values.flatten(-2)).view(values.shape)
    rows, columns = values.shape[-2:]
    x = ((torch.arange(columns, device=weights.device) + 0.5) / columns * weights.sum(-2)).sum(-1)
    y = ((torch.arange(rows, device=weights.device) + 0.5) / rows * weights.sum(-1)).sum(-1)
    return torch.stack([x, y], dim=-1) / weights.sum((-2, -1))[..., None]


# ------------------------------------------------------------------------------------------------------------------ bias


def equal_intervals(count: int) -> list[tuple[float, float]]:
    """Equal parts of the width from left to right, as fractions of it."""
    return [(k / count, (k + 1) / count) for k in range(count)]


def location_bias(
    words: Sequence[Sequence[int]],
    intervals: Sequence[tuple[float, float]],
    rows: int,
    columns: int,
    length: int,
    strength: float,
) -> torch.Tensor:
    """[rows * columns, length] to add to attention logits: words[k], rows of the text states, act within intervals[k].

    -strength * clamp(distance from the interval / a quarter of the width, 0, 1). The idea comes from paint-with-words (eDiff-I,
    arXiv 2211.01324).
    """
    x = (torch.arange(columns) + 0.5) / columns
    bias = torch.zeros(rows, columns, length)
    for positions, (low, high) in zip(words, intervals, strict=True):
        distance = torch.maximum(low - x, x - high).clamp(min=0)
        for position in positions:
            bias[:, :, position] = -strength * (distance / 0.25).clamp(max=1)
    return bias.flatten(0, 1)


class BiasedAttention:
    """Cross-attention processor that adds `bias_of(cells)` [N, cells, L] to the logits of the last N samples; all else is as
    diffusers' own processor computes it. For layers with neither norms nor residual, as in Stable Diffusion."""

    def __init__(self, bias_of: Callable[[int], torch.Tensor]):
        self.bias_of = bias_of

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **unused):
        heads = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        query, key, value = (states.unflatten(2, (attn.heads, -1)).transpose(1, 2) for states in heads)
        bias = self.bias_of(hidden_states.shape[1]).to(query)[:, None]
        free = len(query) - len(bias)  # samples without a bias
        parts = [F.scaled_dot_product_attention(query[free:], key[free:], value[free:], attn_mask=bias)]
        if free:
            parts.insert(0, F.scaled_dot_product_attention(query[:free], key[:free], value[:free]))
        joined = torch.cat(parts).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](joined))


@contextmanager
def biased_attention(unet: UNet2DConditionModel, bias_of: Callable[[int], torch.Tensor] | None) -> Iterator[None]:
    """Context manager: every cross-attention of the UNet has the bias; with None, the UNet stays as it is."""
    if bias_of is None:
        yield
        return
    before, processor = unet.attn_processors, BiasedAttention(bias_of)
    # Any: the library accepts every callable, though its annotation lists only its own classes
    processors: dict[str, Any] = {name: processor if ".attn2." in name else own for name, own in before.items()}
    unet.set_attn_processor(processors)
    try:
        yield
    finally:
        unet.set_attn_processor(dict(before))  # a copy, because the library empties what it is given
