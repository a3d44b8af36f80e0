"""Text states of a marked prompt, changed row by row before the UNet reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoodip.binding_settings import Settings
from zoodip.errors import InputError
from zoodip.marks import MarkedPrompt, Span
from zoodip.subject import OBJECT_TEMPLATES

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


@dataclass
class Encoded:
    """A text's states, and which characters each of its tokens stands for."""

    states: Tensor  # [L, d]
    spans: list[Span]  # of the tokens before the end token

    @property
    def end(self) -> int:
        """Row of the first end token."""
        return len(self.spans)

    def rows(self, span: Span) -> list[int]:
        """Rows of the tokens that overlap `span`."""
        return [row for row, (first, last) in enumerate(self.spans) if first < span[1] and last > span[0]]


class Encoder:
    """A pipeline's tokenizer and text encoder; each text is encoded once, alone. Raises InputError if a text is too long."""

    def __init__(self, pipeline: StableDiffusionPipeline):
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.known: dict[str, Encoded] = {}

    @torch.no_grad()
    def __call__(self, text: str) -> Encoded:
        if text not in self.known:
            ids, spans = tokens_of(self.tokenizer, text)
            states = self.text_encoder(torch.tensor([ids], device=self.text_encoder.device)).last_hidden_state[0]
            self.known[text] = Encoded(states, spans)
        return self.known[text]

    def mean(self) -> Tensor:
        """[d]: what the states of words have in common, as their mean over the templates of textual inversion."""
        encoded = [self(template.replace("{}", "").strip()) for template in OBJECT_TEMPLATES]
        return torch.cat([each.states[1 : each.end] for each in encoded]).mean(0)


def tokens_of(tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Token ids, padded to the encoder's length, and the characters of each token before the end token. Raises InputError.

    The end token is found by counting, because padding may have the same id.
    """
    length = tokenizer.model_max_length
    found = tokenizer(text, padding="max_length", max_length=length, return_offsets_mapping=True, verbose=False)
    if len(found.input_ids) > length:
        raise InputError(
            f"the prompt {text!r} is {len(found.input_ids) - 2} tokens long, but the text encoder takes {length - 2}; shorten it"
        )
    return found.input_ids, [(first, last) for first, last in found.offset_mapping[: sum(found.attention_mask) - 1]]


def composite(
    states: Tensor, noun: Sequence[int], attributes: Sequence[int], noun_weight: float = 1.1, attribute_weight: float = 1.2,
    mean: Tensor | None = None, kappa: float = 1.5,
) -> Tensor:  # fmt: skip
    """The token [d] that stands for a whole group: the weighted sum of its rows of `states` [L, d], as published for SDXL.

    With `mean` [d], for states behind a layer norm: these share a large mean, which a sum would multiply. So only deviations from
    it are summed, and the sum is capped at kappa times the longest deviation in the group.
    """
    origin = torch.zeros_like(states[0]) if mean is None else mean
    deviations = states - origin
    total = noun_weight * deviations[list(noun)].sum(0) + attribute_weight * deviations[list(attributes)].sum(0)
    if mean is None:
        return total
    longest = deviations[[*noun, *attributes]].norm(dim=1).max()
    return mean + (kappa * longest / total.norm().clamp_min(1e-12)).clamp(max=1) * total


def merge_groups(states: Tensor, groups: Sequence[tuple[list[int], list[int]]], erase: bool = True, **how) -> Tensor:
    """New states [L, d]: each noun's first row becomes its group's composite; the group's other rows become zero if `erase`."""
    merged = states.clone()
    for noun, attributes in groups:
        if erase:
            merged[[*noun, *attributes]] = 0
        merged[noun[0]] = composite(states, noun, attributes, **how)
    return merged


def substitute_end_tokens(states: Tensor, clean: Tensor, end: int) -> Tensor:
    """States [L, d] whose end and padding rows, from `end` on, are replaced by those of the clean prompt."""
    return torch.cat([states[:end], clean[end:]])


@dataclass
class BoundGroup:
    row: int  # of its composite: the noun's first row
    words: list[int]  # rows that are not erased
    within: Tensor  # [words, d], states of the phrase within the prompt, as the text encoder gives them
    anchor: Tensor  # [L, d], states of the phrase alone
    anchor_row: int  # of the noun's first token in `anchor`
    frame: Tensor  # [L, d], states of the noun alone with its article; the composite will take row `frame_row`
    frame_row: int


@dataclass
class BoundPrompt:
    marked: str  # as given
    states: Tensor  # [L, d]
    clean: Tensor  # [L, d]
    end: int
    groups: list[BoundGroup]
    erased: list[int]


def bind_prompt(marked: MarkedPrompt, encode: Encoder, settings: Settings, mean: Tensor | None) -> BoundPrompt:
    """A prompt's states, changed according to the settings. Raises InputError.

    A row from a phrase encoded alone keeps the position that it had there; no harm from this was observed.
    """
    whole, clean = encode(marked.prompt), encode(marked.clean)
    states, members, groups, erased = whole.states.clone(), [], [], []
    for group in marked.groups:
        anchor, bare = encode(group.anchor), encode(group.bare)
        noun, words, alone = whole.rows(group.noun), whole.rows(group.phrase), anchor.rows(group.anchor_phrase)
        if len(words) != len(alone):
            raise InputError(
                f"the prompt {marked.marked!r}: {group.anchor!r} is tokenised differently on its own; put spaces around it"
            )
        if settings.states != "prompt":
            states[words] = anchor.states[alone]
        others = [row for row in words if row not in noun]
        members.append((noun, others))
        gone = others if settings.states == "noun" else []
        if settings.merge != "none" and settings.erase != "none":
            gone = others + noun[1:]
        frame, frame_rows = bare.states.clone(), bare.rows(group.bare_noun)
        frame[frame_rows[1:]] = 0
        groups.append(
            BoundGroup(
                noun[0],
                [row for row in words if row not in gone],
                whole.states[words],
                anchor.states,
                alone[words.index(noun[0])],
                frame,
                frame_rows[0],
            )
        )
        erased += gone
    if settings.merge != "none":
        states = merge_groups(states, members, erase=settings.erase != "none", noun_weight=settings.noun_weight,
                              attribute_weight=settings.attribute_weight, mean=mean, kappa=settings.kappa)  # fmt: skip
    states[erased] = 0
    return BoundPrompt(marked.marked, states, clean.states, whole.end, groups, erased if settings.erase == "mask" else [])
