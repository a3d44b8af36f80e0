"""Pictures of marked prompts: the denoising loop, in which text states and latents are changed according to the settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from zoodip.attention import (
    attention_maps,
    biased_attention,
    entropy,
    equal_intervals,
    grid,
    location_bias,
    map_layers,
    word_maps,
)
from zoodip.binding_losses import THRESHOLDS, Predictor, binding_losses, contexts, gradient_step, pose_losses
from zoodip.binding_settings import METHODS, Settings, check_settings
from zoodip.binding_states import BoundGroup, BoundPrompt, Encoder, bind_prompt, substitute_end_tokens
from zoodip.binding_words import expand, parse_prompts
from zoodip.errors import InputError
from zoodip.marks import MarkedPrompt

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


Prompt = TypeVar("Prompt")  # as read, or bound


@dataclass
class Picture:
    image: Image.Image
    prompt: str  # as marked
    seed: int
    forwards: int  # UNet samples
    backwards: int
    seconds: float
    steps: list[dict]  # for each step with updates: L_sem per group and iteration, and entropies
    latents: Tensor  # [4, h, w], final


@dataclass
class Anchors:
    """The k-th groups of all pictures that have as many, and the trajectories on which their phrases are drawn alone."""

    owners: list[int]  # pictures
    groups: list[BoundGroup]
    latents: Tensor  # [M, 4, h, w]
    scheduler: Any

    @property
    def rows(self) -> tuple[list[int], list[int]]:
        """Where the groups' composites are in the states of all pictures."""
        return self.owners, [group.row for group in self.groups]


class Paintings:
    """Pictures in progress: latents [N, 4, h, w], states [N, L, d], and the anchors' own trajectories.

    Pictures are optimised together, but their gradients do not depend on each other. The groups of a picture take turns, which
    needs less memory.
    """

    def __init__(self, bounds: Sequence[BoundPrompt], latents: Tensor, new_scheduler: Callable[[], Any]):
        self.bounds, self.latents, self.states = bounds, latents, torch.stack([bound.states for bound in bounds])
        self.records: list[list[dict]] = [[] for _ in bounds]
        self.anchors = []
        for k in range(max(len(bound.groups) for bound in bounds)):
            owners = [i for i, bound in enumerate(bounds) if len(bound.groups) > k]
            groups = [bounds[i].groups[k] for i in owners]
            self.anchors.append(Anchors(owners, groups, latents[owners], new_scheduler()))

    def substitute_end_tokens(self) -> None:
        pairs = zip(self.states, self.bounds, strict=True)
        self.states = torch.stack([substitute_end_tokens(states, bound.clean, bound.end) for states, bound in pairs])

    def improve_composites(self, timestep, null: Tensor, predict: Predictor, settings: Settings, step: Callable) -> list[dict]:
        """L_sem: move each group's composite toward what its phrase alone predicts, on that phrase's own trajectory."""
        states = self.states.clone()
        found: list[list] = [[] for _ in self.bounds]
        for own in self.anchors:
            latents = own.scheduler.scale_model_input(own.latents, timestep)
            alone = torch.stack([group.anchor for group in own.groups])
            both = torch.cat([null.expand(len(alone), -1, -1), alone])
            unguided, targets = predict(latents.repeat(2, 1, 1, 1), timestep, both).chunk(2)

            def losses(rows: Tensor, own=own, latents=latents, targets=targets) -> Tensor:
                return binding_losses(predict, latents, timestep, contexts(rows, own.groups, settings.sem), targets)

            rows, values = states[own.rows], [[] for _ in own.groups]
            for _ in range(settings.sem_iterations):
                rows, before = step(rows, losses, own.groups, predict, settings)
                for each, value in zip(values, before.tolist(), strict=True):
                    each.append(value)
            states[own.rows] = rows
            for i, each in zip(own.owners, values, strict=True):
                found[i].append(each)
            sign = 1 if settings.anchor_guidance == "toward" else -1
            noise = unguided + sign * settings.guidance * (targets - unguided)
            own.latents = own.scheduler.step(noise, timestep, own.latents, return_dict=False)[0]
        self.states = states
        return [dict(semantic=values) for values in found]

    def refine_latents(self, i: int, timestep, predict: Predictor, settings: Settings, layers: list, scheduler) -> list[dict]:
        """L_ent and L_pose: move latents, and optionally states, toward attention maps that are narrow and in their places.

        A picture whose maps are narrow enough is left as it is, while the others go on.
        """
        going, found = list(range(len(self.bounds))), [[] for _ in self.bounds]
        for _ in range(settings.map_iterations):
            bounds = [self.bounds[k] for k in going]
            with torch.enable_grad():
                latents, states = self.latents[going].requires_grad_(), self.states[going].requires_grad_()
                with attention_maps(layers, len(going)) as captured:
                    predict(scheduler.scale_model_input(latents, timestep), timestep, states)
                maps = torch.stack(captured).mean(0)  # [pictures, h w, L]
                entropies, losses = map_losses(maps, bounds, latents.shape[2:], settings.pose)
                to_latents, to_states = predict.gradients(losses.sum(), [latents, states])
            self.latents = self.latents.clone()
            self.latents[going] -= latents_step(to_latents, i, settings)
            if settings.update_rows != "none":
                change = states_step(states.detach(), to_states, i, settings)
                if settings.update_rows == "composite":
                    change = only_composites(change, bounds)
                self.states = self.states.clone()
                self.states[going] -= change
            limit = math.log(maps.shape[1]) - THRESHOLDS[min(i, len(THRESHOLDS) - 1)]
            wide = []
            for k, own, loss in zip(going, entropies, losses.tolist(), strict=True):
                found[k].append(dict(entropy=own.tolist(), loss=loss))
                if (own.mean().item() if settings.threshold_on == "entropy" else loss / (2 * len(own))) >= limit:
                    wide.append(k)
            if not wide:
                break
            going = wide
        return [dict(maps=record) for record in found]


def only_composites(change: Tensor, bounds: Sequence[BoundPrompt]) -> Tensor:
    """`change` [N, L, d] at the rows of the composites, and zero elsewhere."""
    kept = torch.zeros_like(change)
    for k, bound in enumerate(bounds):
        rows = [group.row for group in bound.groups]
        kept[k, rows] = change[k, rows]
    return kept


def map_losses(maps: Tensor, bounds: Sequence[BoundPrompt], size: Sequence[int], pose: str) -> tuple[Sequence[Tensor], Tensor]:
    """(entropies of the maps of each picture's groups, L_ent plus, depending on `pose`, L_pose of each picture [N]).

    maps: [N, h w, L], of latents of `size`.
    """
    owners = [k for k, bound in enumerate(bounds) for _ in bound.groups]
    groups = [(side, group, bound) for bound in bounds for side, group in enumerate(bound.groups)]
    columns, ends = (torch.tensor(each, device=maps.device) for each in zip(*((g.row, b.end) for _, g, b in groups), strict=True))
    words = word_maps(maps[owners], columns, ends)  # [groups, h w]
    entropies = entropy(words)
    losses = 2 * entropies
    posed = [j for j, (_, _, bound) in enumerate(groups) if pose == "on" or (pose == "auto" and len(bound.groups) == 2)]
    if posed:
        sides = torch.tensor([groups[j][0] for j in posed], device=maps.device)
        squares = words[posed].view(-1, *grid(words.shape[1], *size))
        losses = losses.index_add(0, torch.tensor(posed, device=maps.device), pose_losses(squares, sides))
    of_pictures = losses.new_zeros(len(bounds)).index_add(0, torch.tensor(owners, device=maps.device), losses)
    return entropies.split([len(bound.groups) for bound in bounds]), of_pictures


def falling_rate(i: int, settings: Settings) -> float:
    """The published factor at denoising step i, which falls to 0 at the last step."""
    return settings.map_rate * max(0.0, 1 - i / (settings.steps - 1 or 1))


def latents_step(gradient: Tensor, i: int, settings: Settings) -> Tensor:
    """What the map losses subtract from latents [N, 4, h, w]: a step of given rms, or the published gradient step."""
    if settings.map_rule == "plain":
        return 0.5 * falling_rate(i, settings) * gradient
    return settings.map_rate * gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)


def states_step(states: Tensor, gradients: Tensor, i: int, settings: Settings) -> Tensor:
    """What the map losses subtract from states [N, L, d]: a share of each row's length, or the published gradient step."""
    if settings.map_rule == "plain":
        return falling_rate(i, settings) * gradients
    lengths, slopes = (rows.norm(dim=-1, keepdim=True) for rows in (states, gradients))
    return settings.sem_rate * lengths * gradients / slopes.clamp_min(1e-12)


@torch.no_grad()
def draw_bound(
    pipeline: StableDiffusionPipeline,
    marked_prompts: Sequence[str],
    *,
    method: str = "phrase",
    settings: Settings | None = None,
    seeds: Sequence[int] | Sequence[Sequence[int]] = (0,),
    height: int | None = None,
    width: int | None = None,
    clean_prompts: Sequence[str] | None = None,
    negative_prompt: str = "",
    intervals: Sequence[tuple[float, float]] | None = None,
    scheduler=None,
    batch_size: int = 1,
    semantic_step: Callable[..., tuple[Tensor, Tensor]] = gradient_step,
) -> list[Picture]:
    """A picture of every prompt for each seed, ordered by prompt.

    settings: replace those of `method`. intervals: (left, right) of each group's place as fractions of the width; default: equal
    parts from left to right. scheduler: default DDIM with the pipeline's noise schedule. semantic_step: improves composites in
    L_sem, as `gradient_step` does. seeds: of every prompt, or a list of each prompt's own; a seed gives the same initial noise
    for every prompt and method. The pipeline stays unchanged. Raises InputError.
    """
    settings = settings or METHODS[method]
    check_settings(settings)
    height, width = canvas(pipeline.unet.config, pipeline.vae_scale_factor, height, width)
    prompts = parse_prompts(pipeline.tokenizer, marked_prompts, clean_prompts)
    for prompt in prompts:
        check_groups(prompt, settings, intervals)
    encode = Encoder(pipeline)
    mean = encode.mean() if settings.merge == "capped" else None
    bound = [bind_prompt(prompt, encode, settings, mean) for prompt in prompts]
    null = encode(expand(pipeline.tokenizer, negative_prompt)).states
    size = (height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
    new_scheduler = scheduler_maker(pipeline, scheduler, settings.steps)
    wanted = with_seeds(bound, seeds)
    pictures = []
    for first in range(0, len(wanted), batch_size):
        batch = wanted[first : first + batch_size]
        pictures += draw_pictures(pipeline, batch, null, size, settings, new_scheduler, intervals, semantic_step)
    return pictures


def with_seeds(prompts: Sequence[Prompt], seeds: Sequence[int] | Sequence[Sequence[int]]) -> list[tuple[Prompt, int]]:
    """(prompt, seed) of every picture; `seeds` are those of every prompt, or a list for each."""
    of_each = seeds if any(isinstance(each, Sequence) for each in seeds) else [seeds] * len(prompts)
    of_each = cast("Sequence[Sequence[int]]", of_each)
    return [(prompt, seed) for prompt, own in zip(prompts, of_each, strict=True) for seed in own]


def first_noises(pipeline: StableDiffusionPipeline, seeds: Sequence[int], size: Sequence[int], like: Tensor) -> Tensor:
    """The noise [N, 4, h, w] of each seed for latents of `size`, drawn on the CPU, in the dtype and on the device of `like`."""
    shape = (1, pipeline.unet.config.in_channels, *size)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype) for seed in seeds]
    return torch.cat(noises).to(like.device)


def draw_pictures(
    pipeline: StableDiffusionPipeline, batch: Sequence[tuple[BoundPrompt, int]], null: Tensor, size: tuple[int, int],
    settings: Settings, new_scheduler: Callable[[], Any], intervals, semantic_step,
) -> list[Picture]:  # fmt: skip
    """Pictures of (prompt, seed) pairs, with latents of `size`, denoised together."""
    started, predict, scheduler = time.perf_counter(), Predictor(pipeline.unet), new_scheduler()
    noises = first_noises(pipeline, [seed for _, seed in batch], size, null)
    paintings = Paintings([bound for bound, _ in batch], noises * scheduler.init_noise_sigma, new_scheduler)
    paint(paintings, null, predict, settings, scheduler, intervals, semantic_step)
    images = decode(pipeline, paintings.latents)
    seconds = (time.perf_counter() - started) / len(batch)
    forwards, backwards = predict.forwards // len(batch), predict.backwards // len(batch)
    return [
        Picture(image, bound.marked, seed, forwards, backwards, seconds, record, last)
        for (bound, seed), record, image, last in zip(batch, paintings.records, images, paintings.latents, strict=True)
    ]


def paint(
    paintings: Paintings, null: Tensor, predict: Predictor, settings: Settings, scheduler, intervals, semantic_step
) -> None:
    """All denoising steps of a batch."""
    layers = map_layers(predict.unet, paintings.latents[:1], settings.map_cells or None) if settings.map_steps else []
    bias_of = bias_of_batch(paintings.bounds, paintings.latents.shape[2:], settings, intervals)
    nulls = null.expand(len(paintings.bounds), -1, -1)
    for i, timestep in enumerate(scheduler.timesteps):
        old, found = paintings.latents, []
        if i == settings.ets_step:
            paintings.substitute_end_tokens()
        if i < settings.sem_steps:
            found.append(paintings.improve_composites(timestep, null, predict, settings, semantic_step))
        if i < settings.map_steps:
            found.append(paintings.refine_latents(i, timestep, predict, settings, layers, scheduler))
        for history, *parts in zip(paintings.records, *found, strict=True) if found else ():
            history.append(dict(step=i) | {name: value for part in parts for name, value in part.items()})
        latents, states = paintings.latents, paintings.states
        with biased_attention(predict.unet, bias_of):
            if settings.guidance > 1:
                both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
                unguided, noise = predict(both, timestep, torch.cat([nulls, states])).chunk(2)
                noise = unguided + settings.guidance * (noise - unguided)
            else:
                noise = predict(scheduler.scale_model_input(latents, timestep), timestep, states)
        start = latents if settings.step_from == "refined" else old
        paintings.latents = scheduler.step(noise, timestep, start, return_dict=False)[0]


def bias_of_batch(
    bounds: Sequence[BoundPrompt], size: Sequence[int], settings: Settings, intervals
) -> Callable[[int], Tensor] | None:
    """The function cells -> [N, cells, L] that `biased_attention` takes; None if nothing is biased."""
    if settings.bias == 0 and not any(bound.erased for bound in bounds):
        return None
    known: dict[int, Tensor] = {}

    def bias_of(cells: int) -> Tensor:
        if cells not in known:
            known[cells] = torch.stack([bias_of_prompt(bound, cells) for bound in bounds]).to(bounds[0].states)
        return known[cells]

    def bias_of_prompt(bound: BoundPrompt, cells: int) -> Tensor:
        words = [group.words for group in bound.groups]
        places = intervals or equal_intervals(len(words))
        bias = location_bias(words, places, *grid(cells, size[0], size[1]), len(bound.states), settings.bias)
        bias[:, bound.erased] = -1e4
        return bias

    return bias_of


def check_groups(prompt: MarkedPrompt, settings: Settings, intervals) -> None:
    """Raises InputError if a prompt lacks the groups that the settings need."""
    count = len(prompt.groups)
    if not count and settings.map_steps + settings.sem_steps + settings.bias:
        raise InputError(f"the prompt {prompt.marked!r}: has no groups; mark them, as in a [red critter*] and a [blue critter*]")
    if settings.pose == "on" and count != 2:
        raise InputError(f"the prompt {prompt.marked!r}: has {count} groups, but the pose loss needs two; use --pose auto")
    if intervals is not None and len(intervals) != count:
        raise InputError(f"the prompt {prompt.marked!r}: has {count} groups for {len(intervals)} intervals; give one for each")


def canvas(unet_config: Mapping[str, Any], scale: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default the model's own; `scale` is the VAE's scale factor. Raises InputError."""
    factor = scale * 2 ** (len(unet_config["block_out_channels"]) - 1)
    sides = [unet_config.get("sample_size", 64) * scale if side is None else side for side in (height, width)]
    for name, side in zip(("height", "width"), sides, strict=True):
        if side <= 0 or side % factor:
            raise InputError(f"--{name} must be a positive multiple of {factor} for this model, got {side}")
    return sides[0], sides[1]


def scheduler_maker(pipeline: StableDiffusionPipeline, scheduler, steps: int) -> Callable[[], Any]:
    """A function that makes a separate scheduler for every trajectory, because some schedulers keep a history."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    def make():
        if scheduler is not None:
            own = type(scheduler).from_config(scheduler.config)
        else:  # clip_sample is for pixels; latents exceed 1
            own = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
            assert isinstance(own, DDIMScheduler)  # a tuple only with return_unused_kwargs
        own.set_timesteps(steps, device=pipeline.unet.device)
        return own

    return make


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: Tensor) -> list[Image.Image]:
    """Decode latents [N, 4, h, w] into pictures."""
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    images, flagged = pipeline.run_safety_checker(images, latents.device, latents.dtype)
    keep = [not flag for flag in flagged] if flagged else [True] * len(images)
    pictures = pipeline.image_processor.postprocess(images, output_type="pil", do_denormalize=keep)
    return cast("list[Image.Image]", pictures)  # a list for "pil", though the library's annotation says a single picture
