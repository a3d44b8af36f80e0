"""Settings for drawing with bound attributes, i.e. how text states and latents are changed, and the methods built from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from zoodip.arguments import require


def option(default: Any, text: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass(frozen=True)
class Settings:
    """What happens to text states and latents. By default nothing does, and a picture is the stock pipeline's."""

    steps: int = option(50, "denoising steps")
    guidance: float = option(7.5, "classifier-free guidance scale")
    states: str = option("prompt", "where the states of a group's words come from: the prompt, or its phrase encoded alone "
                         "(noun: the others are erased)", "prompt", "phrase", "noun")  # fmt: skip
    bias: float = option(0.0, "logit bias that keeps a group's words out of the others' places; 0: none")
    merge: str = option("none", "composite token per group: the published sum, or that sum capped around the mean state",
                        "none", "raw", "capped")  # fmt: skip
    noun_weight: float = option(1.1, "weight of the noun in the composite")
    attribute_weight: float = option(1.2, "weight of every other word in the composite")
    kappa: float = option(1.5, "cap on the composite's distance from the mean state, in units of the group's largest")
    erase: str = option("zero", "what happens to the merged words: zero rows, or also no attention", "zero", "mask", "none")
    ets_step: int = option(-1, "step from which end and padding rows are those of the clean prompt; -1: never")
    sem_steps: int = option(0, "first steps in which the semantic loss improves the composites (without --merge: the nouns)")
    sem_iterations: int = option(3, "updates in each of those steps")
    sem: str = option("framed", "context of that loss: the composite in its phrase, or alone, as published", "framed", "alone")
    sem_rule: str = option(
        "normalised", "update for that loss: a share of the row's length, or a plain gradient step", "normalised", "plain"
    )
    sem_rate: float = option(0.05, "that share, or the rate of the plain step (published: 1e4)")
    anchor_guidance: str = option("toward", "sign of the anchors' guidance; the published code has away", "toward", "away")
    map_steps: int = option(0, "first steps in which entropy (and pose) of the attention maps move the latents")
    map_iterations: int = option(4, "updates in each of those steps")
    map_rule: str = option("unit", "update of the latents: a step of given rms, or the published gradient step", "unit", "plain")
    map_rate: float = option(0.1, "that rms, or the factor of the plain step (published: 3, falling)")
    map_cells: int = option(0, "size of the attention maps, in places; 0: the finest maps of at most 400")
    update_rows: str = option("none", "states that the maps' loss also moves (published: all)", "none", "composite", "all")
    pose: str = option("off", "loss that pulls two groups to left and right; auto: if there are two", "off", "on", "auto")
    threshold_on: str = option("entropy", "what ends a step's updates early: mean entropy, or, as published, the whole loss",
                               "entropy", "loss")  # fmt: skip
    step_from: str = option("refined", "latents that the scheduler steps from; the published code has old", "refined", "old")


PLAIN = Settings()
PHRASE = replace(PLAIN, states="phrase", bias=6.0)
MERGE = replace(PLAIN, merge="capped", ets_step=0)
FULL = replace(MERGE, sem_steps=5, map_steps=5, pose="auto")
CONTROL = replace(PLAIN, map_steps=5, pose="auto")
PUBLISHED = replace(
    FULL, merge="raw", sem="alone", sem_rule="plain", sem_rate=1e4, anchor_guidance="away", map_rule="plain", map_rate=3.0,
    update_rows="all", threshold_on="loss", step_from="old", sem_steps=7, map_steps=7, map_iterations=6,
)  # fmt: skip
METHODS = dict(plain=PLAIN, phrase=PHRASE, merge=MERGE, full=FULL, control=CONTROL, published=PUBLISHED)


def check_settings(settings: Settings) -> None:
    """Raises InputError."""
    values = asdict(settings)
    for name, least in dict(steps=1, guidance=1, ets_step=-1).items():
        require(values, name, least <= values[name] < math.inf, f"must be at least {least}")
    for each in fields(Settings):
        if type(each.default) in (int, float) and each.name != "ets_step":
            require(values, each.name, 0 <= values[each.name] < math.inf, "must not be negative")
        if choices := each.metadata["choices"]:
            require(values, each.name, values[each.name] in choices, f"must be one of {', '.join(choices)}")
    require(values, "update_rows", settings.update_rows != "composite" or settings.merge != "none", "needs --merge raw or capped")
