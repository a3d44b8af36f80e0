"""The rows of binding's tables: settings of zoodip.binding, the sets they are drawn for, and the ceiling that no row can pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zoodip.binding_drawing import first_noises, scheduler_maker, with_seeds
from zoodip.binding_losses import Predictor
from zoodip.binding_settings import CONTROL, FULL, MERGE, PHRASE, PLAIN, PUBLISHED, Settings
from zoodip.binding_states import Encoder
from zoodip.binding_words import parse_prompts
from zoodip.marks import MarkedPrompt

NOUN = replace(PHRASE, states="noun")
# No end tokens, no pose, fewer updates. As many of 25 steps have updates as of the published 50: as much is moved, in twice the
# share of steps.
FOR_COLOURS = replace(PUBLISHED, ets_step=-1, pose="off", sem_steps=5, map_steps=5, map_iterations=4)
MOVED = replace(CONTROL, states="noun")  # the losses of the maps do the work of the bias

# The ablation of the ToMe paper: A is plain, B is merge, C to F follow, and all of it without pose is "full without pose".
ROWS: dict[str, Settings] = {
    "plain": PLAIN,
    "phrase": PHRASE,
    "merge": MERGE,
    "full": FULL,
    "control": CONTROL,
    "ceiling": PLAIN,  # `ceiling_latents`
    "published": PUBLISHED,  # the paper's constants for objects with accessories
    "published, for colours": FOR_COLOURS,
    "published, for colours, faults mended": replace(FOR_COLOURS, anchor_guidance="toward", update_rows="composite",
                                                     threshold_on="entropy", step_from="refined"),
    "C: merge + entropy": replace(FULL, sem_steps=0, pose="off"),
    "D: semantic + entropy, not merged": replace(FULL, merge="none", ets_step=-1, pose="off"),
    "E: entropy": replace(CONTROL, pose="off"),
    "F: merge + semantic": replace(FULL, map_steps=0),
    "raw merge": replace(MERGE, merge="raw", ets_step=-1),
    "raw merge + ETS": replace(MERGE, merge="raw"),
    "merge without ETS": replace(MERGE, ets_step=-1),
    "full, maps move composites too": replace(FULL, update_rows="composite"),
    "full without pose": replace(FULL, pose="off"),
    "full without semantic": replace(FULL, sem_steps=0),
    "full without ETS": replace(FULL, ets_step=-1),
    "full, semantic alone": replace(FULL, sem="alone"),
    "full, semantic alone, raw merge": replace(FULL, sem="alone", merge="raw"),
    "plain + bias": replace(PLAIN, bias=PHRASE.bias),
    "merge + bias": replace(MERGE, bias=PHRASE.bias),
    "phrase + ETS": replace(PHRASE, ets_step=0),
    "phrase without bias": replace(PHRASE, bias=0.0),
    "noun": NOUN,
    "noun + ETS": replace(NOUN, ets_step=0),
    "noun + ETS without bias": replace(NOUN, bias=0.0, ets_step=0),
    "noun, losses for bias": MOVED,
    "noun, losses for bias + ETS": replace(MOVED, ets_step=0),
}  # fmt: skip
CORE = ("plain", "phrase", "merge", "full", "control", "ceiling")
HARM = ("plain", "phrase", "merge", "full")  # with one creature there is nothing to place

# On development prompts: one setting of a method is varied at a time, around its value.
SWEEP: dict[str, Settings] = {
    "plain": PLAIN, "phrase": PHRASE, "full": FULL, "control": CONTROL,
    **{f"phrase, bias {value}": replace(PHRASE, bias=value) for value in (3.0, 9.0, 12.0)},
    **{f"full, latents {value}": replace(FULL, map_rate=value) for value in (0.02, 0.04, 0.07)},
    **{f"full, composites {value}": replace(FULL, sem_rate=value) for value in (0.02, 0.1)},
    **{f"full, kappa {value}": replace(FULL, kappa=value) for value in (1.0, 2.0)},
    **{f"full, {value} steps": replace(FULL, sem_steps=value, map_steps=value) for value in (3, 8)},
}  # fmt: skip
SETTINGS = SWEEP | ROWS
TUNED_STEPS = 25  # denoising steps that `sem_steps` and `map_steps` above refer to


def rows_of(set_name: str, quantization: str, split: str) -> list[str]:
    """The rows of a table unless others are requested: each row is drawn for one set, and the rows that matter for every set.

    There are two sets of published constants: for colours, drawn on S1, and for objects with accessories, on S4.
    """
    if split == "development":
        return list(SWEEP)
    if quantization == "none" and set_name == "S1":
        return [row for row in ROWS if row != "published"]
    if quantization == "none" and set_name == "S4":
        return [*CORE, "published"]
    return list(HARM if set_name == "S5" else CORE)


def settings_of(row: str, steps: int, guidance: float) -> Settings:
    """A row's settings for `steps` denoising steps; the share of steps with updates stays the same."""
    settings = SETTINGS[row]
    first = {name: round(getattr(settings, name) * steps / TUNED_STEPS) for name in ("sem_steps", "map_steps")}
    return replace(settings, steps=steps, guidance=guidance, **first)


def passes(settings: Settings, groups: int) -> tuple[int, int]:
    """(forward samples, backward passes) per picture, at most: thresholds may end updates early."""
    semantic, maps = settings.sem_steps * groups, settings.map_steps * settings.map_iterations
    return (2 * settings.steps + semantic * (2 + settings.sem_iterations) + maps, semantic * settings.sem_iterations + maps)


# ----------------------------------------------------------------------------------------------------------------- ceiling


def side_prompts(marked: MarkedPrompt) -> list[str]:
    """Each group alone, followed by the text after the last group: "a red critter in the snow"."""
    tail = marked.prompt[marked.groups[-1].phrase[1] :]
    return [group.anchor + tail for group in marked.groups]


@torch.no_grad()
def ceiling_latents(
    pipeline,
    marked_prompts: Sequence[str],
    *,
    settings: Settings,
    seeds: Sequence[int] | Sequence[Sequence[int]],
    height: int,
    width: int,
    scheduler=None,
) -> Tensor:
    """Latents [N, 4, h, w], prompt by prompt, whose left and right halves are each predicted from the prompt of one group.

    The groups can mix only at the seam: each side's window reaches an eighth of the width beyond the middle, and the predictions
    are blended there.
    """
    encode, predict = Encoder(pipeline), Predictor(pipeline.unet)
    null = encode("").states
    wanted = with_seeds(parse_prompts(pipeline.tokenizer, marked_prompts, None), seeds)
    sides = [torch.stack([encode(text).states for text in side_prompts(prompt)]) for prompt, _ in wanted]
    states = torch.cat([null.expand(2 * len(sides), -1, -1), *sides])  # [4 N, L, d]
    size = (height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
    schedule = scheduler_maker(pipeline, scheduler, settings.steps)()
    latents = first_noises(pipeline, [seed for _, seed in wanted], size, null) * schedule.init_noise_sigma
    for timestep in schedule.timesteps:
        windows = split_windows(schedule.scale_model_input(latents, timestep))
        unguided, noise = predict(torch.cat([windows, windows]), timestep, states).chunk(2)
        joined = join_windows(unguided + settings.guidance * (noise - unguided), latents.shape[3])
        latents = schedule.step(joined, timestep, latents, return_dict=False)[0]
    return latents


def split_windows(latents: Tensor) -> Tensor:
    """[N, 4, h, w] -> [2 N, 4, h, 5 w / 8]: the left and right windows of each picture in turn."""
    width = latents.shape[3]
    reach = width // 2 + width // 8
    return torch.stack([latents[..., :reach], latents[..., width - reach :]], dim=1).flatten(0, 1)


def join_windows(windows: Tensor, width: int) -> Tensor:
    """The reverse of `split_windows`: where windows overlap, they are weighted by ramps that add up to 1."""
    left, right = windows.unflatten(0, (-1, 2)).unbind(1)
    margin = width - left.shape[3]
    overlap = width - 2 * margin
    ramp = ((torch.arange(width, device=windows.device) + 0.5 - margin) / overlap).clamp(0, 1)
    return F.pad(left, (0, margin)) * (1 - ramp) + F.pad(right, (margin, 0)) * ramp
