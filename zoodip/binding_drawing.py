"""Pictures of marked prompts: the denoising loop, in which text states and latents are changed according to the settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from zoodip.attention import attention_maps, biased_attention, entropy, equal_intervals, grid, location_bias, map_layers, word_map
from zoodip.binding_losses import THRESHOLDS, Predictor, binding_losses, contexts, gradient_step, pose_loss
from zoodip.binding_settings import METHODS, Settings, check_settings
from zoodip.binding_states import BoundPrompt, Encoder, bind_prompt, substitute_end_tokens
from zoodip.errors import InputError
from zoodip.marks import MarkedPrompt, parse_marks

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


class Painting:
    """One picture in progress: latents, states, and the anchors' own trajectories."""

    def __init__(self, bound: BoundPrompt, latents: Tensor, new_scheduler: Callable[[], Any]):
        self.bound, self.latents, self.states = bound, latents, bound.states
        self.anchors = [(latents.clone(), new_scheduler()) for _ in bound.groups]
        self.records: list[dict] = []

    def improve_composites(self, timestep, null: Tensor, predict: Predictor, settings: Settings, step: Callable) -> dict:
        """L_sem: move each group's composite toward what its phrase alone predicts, on that phrase's own trajectory."""
        states, record = self.states.clone(), []
        for k, (group, (latents, scheduler)) in enumerate(zip(self.bound.groups, self.anchors, strict=True)):
            scaled_latents = scheduler.scale_model_input(latents, timestep)
            unguided, target = predict(scaled_latents.repeat(2, 1, 1, 1), timestep, torch.stack([null, group.anchor])).split(1)

            def losses(rows: Tensor, group=group, latents=scaled_latents, target=target) -> Tensor:
                return binding_losses(predict, latents, timestep, contexts(rows, group, settings.sem), target)

            values = []
            for _ in range(settings.sem_iterations):
                states[group.row], value = step(states[group.row], losses, group, predict, settings)
                values.append(value)
            sign = 1 if settings.anchor_guidance == "toward" else -1
            noise = unguided + sign * settings.guidance * (target - unguided)
            self.anchors[k] = (scheduler.step(noise, timestep, latents, return_dict=False)[0], scheduler)
            record.append(values)
        self.states = states
        return dict(semantic=record)

    def refine_latents(self, i: int, timestep, predict: Predictor, settings: Settings, layers: list, scheduler) -> dict:
        """L_ent and L_pose: move latents, and optionally states, toward attention maps that are narrow and in their places."""
        rows, record = [group.row for group in self.bound.groups], []
        pose = settings.pose == "on" or (settings.pose == "auto" and len(rows) == 2)
        for _ in range(settings.map_iterations):
            with torch.enable_grad():
                latents, states = self.latents.detach().requires_grad_(), self.states.detach().requires_grad_()
                with attention_maps(layers, 1) as captured:
                    predict(scheduler.scale_model_input(latents, timestep), timestep, states[None])
                maps = torch.stack(captured).mean(0)[0]  # [h w, L]
                entropies, loss = map_loss(maps, rows, self.bound.end, self.latents.shape[2:], pose)
                to_latents, to_states = predict.gradients(loss, [latents, states])
            self.latents = latents.detach() - latents_step(to_latents, i, settings)
            if settings.update_rows != "none":
                chosen = rows if settings.update_rows == "composite" else list(range(len(states)))
                self.states = states.detach().clone()
                self.states[chosen] -= states_step(self.states, to_states, i, settings)[chosen]
            record.append(dict(entropy=entropies.tolist(), loss=loss.item()))
            limit = math.log(len(maps)) - THRESHOLDS[min(i, len(THRESHOLDS) - 1)]
            stop_at = entropies.mean().item() if settings.threshold_on == "entropy" else loss.item() / (2 * len(rows))
            if stop_at < limit:
                break
        return dict(maps=record)


def map_loss(maps: Tensor, rows: list[int], end: int, size: Sequence[int], pose: bool) -> tuple[Tensor, Tensor]:
    """(entropies [K] of the maps of the words at `rows`, L_ent plus, with `pose`, L_pose). `maps` [h w, L], latents of `size`."""
    words = [word_map(maps, row, end) for row in rows]
    entropies = torch.stack([entropy(word) for word in words])
    loss = 2 * entropies.sum()
    if pose:
        loss = loss + pose_loss([word.view(grid(len(word), *size)) for word in words])
    return entropies, loss


def falling_rate(i: int, settings: Settings) -> float:
    """The published factor at denoising step i, which falls to 0 at the last step."""
    return settings.map_rate * max(0.0, 1 - i / (settings.steps - 1 or 1))


def latents_step(gradient: Tensor, i: int, settings: Settings) -> Tensor:
    """What the map loss subtracts from the latents: a step of given rms, or the published gradient step."""
    if settings.map_rule == "plain":
        return 0.5 * falling_rate(i, settings) * gradient
    return settings.map_rate * gradient / gradient.square().mean().sqrt().clamp_min(1e-12)


def states_step(states: Tensor, gradients: Tensor, i: int, settings: Settings) -> Tensor:
    """What the map loss subtracts from the states [L, d]: a share of each row's length, or the published gradient step."""
    if settings.map_rule == "plain":
        return falling_rate(i, settings) * gradients
    lengths, slopes = (rows.norm(dim=1, keepdim=True) for rows in (states, gradients))
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
    semantic_step: Callable[..., tuple[Tensor, float]] = gradient_step,
) -> list[Picture]:
    """A picture of every prompt for each seed, ordered by prompt.

    settings: replace those of `method`. intervals: (left, right) of each group's place as fractions of the width; default: equal
    parts from left to right. scheduler: default DDIM with the pipeline's noise schedule. semantic_step: improves a composite in
    L_sem. seeds: of every prompt, or a list of each prompt's own; a seed gives the same initial noise for every prompt and
    method. The pipeline stays unchanged. Raises InputError.
    """
    settings = settings or METHODS[method]
    check_settings(settings)
    height, width = canvas(pipeline.unet.config, pipeline.vae_scale_factor, height, width)
    prompts = read_prompts(pipeline, marked_prompts, clean_prompts)
    for prompt in prompts:
        check_groups(prompt, settings, intervals)
    encode = Encoder(pipeline)
    mean = encode.mean() if settings.merge == "capped" else None
    bound = [bind_prompt(prompt, encode, settings, mean) for prompt in prompts]
    null = encode(negative_prompt).states
    size = (height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
    new_scheduler = scheduler_maker(pipeline, scheduler, settings.steps)
    wanted = with_seeds(bound, seeds)
    pictures = []
    for first in range(0, len(wanted), batch_size):
        batch = wanted[first : first + batch_size]
        pictures += draw_batch(pipeline, batch, null, size, settings, new_scheduler, intervals, semantic_step)
    return pictures


def with_seeds(prompts: Sequence[Prompt], seeds: Sequence[int] | Sequence[Sequence[int]]) -> list[tuple[Prompt, int]]:
    """(prompt, seed) of every picture; `seeds` are those of every prompt, or a list for each."""
    of_each = seeds if any(isinstance(each, Sequence) for each in seeds) else [seeds] * len(prompts)
    of_each = cast("Sequence[Sequence[int]]", of_each)
    return [(prompt, seed) for prompt, own in zip(prompts, of_each, strict=True) for seed in own]


def read_prompts(pipeline: StableDiffusionPipeline, marked: Sequence[str], clean: Sequence[str] | None) -> list[MarkedPrompt]:
    """Parse marked prompts, writing out the pipeline's learned words that have several vectors. Raises InputError."""
    words = [word for word in pipeline.tokenizer.added_tokens_encoder if word not in pipeline.tokenizer.all_special_tokens]

    def expand(text: str) -> str:  # cast: the library returns a list only for a list
        return cast(str, pipeline.maybe_convert_prompt(text, pipeline.tokenizer))

    prompts = [parse_marks(text, words, expand) for text in marked]
    if clean is None:
        return prompts
    return [replace(prompt, clean=expand(text)) for prompt, text in zip(prompts, clean, strict=True)]


def draw_batch(
    pipeline: StableDiffusionPipeline, batch: Sequence[tuple[BoundPrompt, int]], null: Tensor, size: tuple[int, int],
    settings: Settings, new_scheduler: Callable[[], Any], intervals, semantic_step,
) -> list[Picture]:  # fmt: skip
    """Pictures of (prompt, seed) pairs, with latents of `size`, denoised together."""
    started, predict, scheduler = time.perf_counter(), Predictor(pipeline.unet), new_scheduler()
    paintings = []
    for bound, seed in batch:
        noise = torch.randn(
            (1, pipeline.unet.config.in_channels, *size), generator=torch.Generator().manual_seed(seed), dtype=null.dtype
        )
        paintings.append(Painting(bound, noise.to(null.device) * scheduler.init_noise_sigma, new_scheduler))
    paint(paintings, null, predict, settings, scheduler, intervals, semantic_step)
    latents = torch.cat([painting.latents for painting in paintings])
    images = decode(pipeline, latents)
    seconds = (time.perf_counter() - started) / len(batch)
    forwards, backwards = predict.forwards // len(batch), predict.backwards // len(batch)
    return [
        Picture(image, bound.marked, seed, forwards, backwards, seconds, painting.records, last)
        for (bound, seed), painting, image, last in zip(batch, paintings, images, latents, strict=True)
    ]


def paint(
    paintings: list[Painting], null: Tensor, predict: Predictor, settings: Settings, scheduler, intervals, semantic_step
) -> None:
    """All denoising steps of a batch. Optimisation goes picture by picture; only the guided forward is shared."""
    layers = map_layers(predict.unet, paintings[0].latents, settings.map_cells or None) if settings.map_steps else []
    bias_of = bias_of_batch([painting.bound for painting in paintings], paintings[0].latents.shape[2:], settings, intervals)
    nulls = null.expand(len(paintings), -1, -1)
    for i, timestep in enumerate(scheduler.timesteps):
        old = torch.cat([painting.latents for painting in paintings])
        for painting in paintings:
            bound, record = painting.bound, {}
            if i == settings.ets_step:
                painting.states = substitute_end_tokens(painting.states, bound.clean, bound.end)
            if i < settings.sem_steps:
                record |= painting.improve_composites(timestep, null, predict, settings, semantic_step)
            if i < settings.map_steps:
                record |= painting.refine_latents(i, timestep, predict, settings, layers, scheduler)
            if record:
                painting.records.append(dict(step=i, **record))
        latents = torch.cat([painting.latents for painting in paintings])
        states = torch.stack([painting.states for painting in paintings])
        with biased_attention(predict.unet, bias_of):
            if settings.guidance > 1:
                both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
                unguided, noise = predict(both, timestep, torch.cat([nulls, states])).chunk(2)
                noise = unguided + settings.guidance * (noise - unguided)
            else:
                noise = predict(scheduler.scale_model_input(latents, timestep), timestep, states)
        start = latents if settings.step_from == "refined" else old
        for painting, after in zip(paintings, scheduler.step(noise, timestep, start, return_dict=False)[0].split(1), strict=True):
            painting.latents = after


def bias_of_batch(
    bounds: list[BoundPrompt], size: Sequence[int], settings: Settings, intervals
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
