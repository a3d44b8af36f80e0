"""Draws prompts in which every creature keeps its own attributes, with a frozen Stable Diffusion 1.x or 2.x.

    python -m zoodip.binding --model miniature/model --embedding results/demo/learned_embeds.safetensors \\
        --prompt "a [<sks>* wearing a red hat] and a [blue critter* wearing pink glasses]" --method phrase \\
        --width 128 --height 64 --seeds 0 1 --output results/binding

`phrase` is ours and needs forward passes only. `merge` and `full` are token merging, ToMe (Hu et al., NeurIPS 2024, arXiv
2411.07132), made for SDXL and adapted here; `published` is its code as it stands, and `control` its losses
without merging. docs/binding.md says what each does, and what of it is measured. (Unrelated: ToMe by Bolya et al., for speed.)
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zoodip.arguments import new_parser, parse, require
from zoodip.binding_settings import METHODS, PLAIN, Settings, check_settings
from zoodip.errors import InputError, prepare_process, run_script
from zoodip.marks import MarkedPrompt, parse_marks

# ----------------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Draw prompts whose creatures keep their own attributes.")
    add = parser.add_argument
    add("--model", required=True, help="folder in diffusers format, or hub name, of a Stable Diffusion 1.x or 2.x")
    add("--embedding", type=Path, nargs="*", default=[], help="learned_embeds.safetensors of each learned word")
    add("--prompt", nargs="+", required=True, help="prompts with [groups], and a * after each group's noun")
    add("--clean_prompt", nargs="+", default=None, help="for each prompt, what end tokens come from; default: groups' nouns only")
    add("--negative_prompt", default="", help="what guidance leads away from")
    add("--method", nargs="+", default=["phrase"], choices=list(METHODS), help="one or more, to compare; see docs/binding.md")
    add("--quantization", default="none", choices=["nf4", "int8", "none"], help="storage of the model's weights")
    add("--width", type=int, default=None, help="of the picture in pixels; default: the model's own")
    add("--height", type=int, default=None, help="of the picture in pixels; default: the model's own")
    add("--seeds", type=int, nargs="+", default=[0], help="a picture of every prompt for each")
    add("--batch_size", type=int, default=1, help="pictures at once; changes only rounding")
    add("--output", type=Path, default=Path("results/binding"), help="folder for pictures, sheet.png and binding.json")
    group = parser.add_argument_group("the method's settings (default: what --method sets)").add_argument
    for each in fields(Settings):
        group(
            f"--{each.name}", type=type(each.default), default=None, choices=each.metadata["choices"], help=each.metadata["help"]
        )
    return parser


def check_flags(flags: dict) -> None:
    """Refuse what can be refused without opening a file. Raises InputError."""
    for seed in flags["seeds"]:
        require(flags, "seeds", 0 <= seed < 2**63, "must be in [0, 2^63)")
    require(flags, "batch_size", flags["batch_size"] >= 1, "must be at least 1")
    if flags["clean_prompt"] is not None:
        count = len(flags["prompt"])
        require(flags, "clean_prompt", len(flags["clean_prompt"]) == count, f"must be one for each of the {count} prompts")
    for settings in settings_of_flags(flags).values():
        check_settings(settings)


def settings_of_flags(flags: dict) -> dict[str, Settings]:
    """The settings of each method, with those that the command line sets itself."""
    given = {each.name: flags[each.name] for each in fields(Settings) if flags[each.name] is not None}
    return {method: replace(METHODS[method], **given) for method in flags["method"]}


if __name__ == "__main__":
    ARGS = parse(build_parser(), check_flags)
    prepare_process()

import torch
from PIL import Image
from torch import Tensor

from zoodip.attention import attention_maps, biased_attention, entropy, equal_intervals, grid, location_bias, map_layers, word_map
from zoodip.binding_losses import THRESHOLDS, Predictor, binding_losses, contexts, gradient_step, pose_loss
from zoodip.binding_states import BoundPrompt, Encoder, bind_prompt, substitute_end_tokens, tokens_of
from zoodip.files import read_json, write_image, write_json

if TYPE_CHECKING:  # diffusers takes seconds to import
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


# ---------------------------------------------------------------------------------------------------------------- drawing


@dataclass
class Picture:
    image: Image.Image
    prompt: str  # as marked
    seed: int
    forwards: int  # UNet samples
    backwards: int
    seconds: float
    steps: list[dict]  # of the steps with updates: L_sem of each group's iterations, and entropies
    latents: Tensor  # [4, h, w], the last


class Painting:
    """One picture on its way: latents, states, and the anchors' own trajectories."""

    def __init__(self, bound: BoundPrompt, latents: Tensor, new_scheduler: Callable[[], Any]):
        self.bound, self.latents, self.states = bound, latents, bound.states
        self.anchors = [(latents.clone(), new_scheduler()) for _ in bound.groups]
        self.records: list[dict] = []

    def improve_composites(self, timestep, null: Tensor, predict: Predictor, settings: Settings, step: Callable) -> dict:
        """L_sem: every group's composite toward what its phrase alone predicts, on that phrase's own trajectory."""
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
        """L_ent and L_pose: latents, and states where asked for, toward maps that are narrow and in their places."""
        rows, groups, record = [group.row for group in self.bound.groups], self.bound.groups, []
        size = self.latents.shape[2:]
        pose = settings.pose == "on" or (settings.pose == "auto" and len(groups) == 2)
        rate = settings.map_rate * (max(0.0, 1 - i / (settings.steps - 1 or 1)) if settings.map_rule == "plain" else 1)
        for _ in range(settings.map_iterations):
            with torch.enable_grad():
                latents, states = self.latents.detach().requires_grad_(), self.states.detach().requires_grad_()
                with attention_maps(layers, 1) as captured:
                    predict(scheduler.scale_model_input(latents, timestep), timestep, states[None])
                maps = torch.stack(captured).mean(0)[0]  # [h w, L]
                words = [word_map(maps, row, self.bound.end) for row in rows]
                entropies = torch.stack([entropy(word) for word in words])
                loss = 2 * entropies.sum()
                if pose:
                    loss = loss + pose_loss([word.view(grid(len(word), *size)) for word in words])
                to_latents, to_states = predict.gradients(loss, [latents, states])
            if settings.map_rule == "plain":
                self.latents = latents.detach() - 0.5 * rate * to_latents
                changed = states.detach() - rate * to_states
            else:
                self.latents = latents.detach() - rate * to_latents / to_latents.square().mean().sqrt().clamp_min(1e-12)
                lengths = [tensor.norm(dim=1, keepdim=True) for tensor in (states.detach(), to_states)]
                changed = states.detach() - settings.sem_rate * lengths[0] * to_states / lengths[1].clamp_min(1e-12)
            if settings.update_rows != "none":
                chosen = rows if settings.update_rows == "composite" else list(range(len(changed)))
                self.states = self.states.clone()
                self.states[chosen] = changed[chosen]
            record.append(dict(entropy=entropies.tolist(), loss=loss.item()))
            limit = math.log(len(maps)) - THRESHOLDS[min(i, len(THRESHOLDS) - 1)]
            stop_at = entropies.mean().item() if settings.threshold_on == "entropy" else loss.item() / (2 * len(rows))
            if stop_at < limit:
                break
        return dict(maps=record)


@torch.no_grad()
def draw_bound(
    pipeline: StableDiffusionPipeline,
    marked_prompts: Sequence[str],
    *,
    method: str = "phrase",
    settings: Settings | None = None,
    seeds: Sequence[int] = (0,),
    height: int | None = None,
    width: int | None = None,
    clean_prompts: Sequence[str] | None = None,
    negative_prompt: str = "",
    intervals: Sequence[tuple[float, float]] | None = None,
    scheduler=None,
    batch_size: int = 1,
    semantic_step: Callable[..., tuple[Tensor, float]] = gradient_step,
) -> list[Picture]:
    """A picture of every prompt for each seed, prompt by prompt.

    settings: instead of those of `method`. intervals: (left, right) of each group's place in shares of the width; default: equal
    parts from left to right. scheduler: default DDIM with the pipeline's noise schedule. A seed is the same first noise for every
    prompt and method. semantic_step: improves a composite in L_sem. The pipeline is left as it was. Raises InputError.
    """
    settings = settings or METHODS[method]
    check_settings(settings)
    height, width = canvas(pipeline.unet.config, pipeline.vae_scale_factor, height, width)
    new_scheduler = scheduler_maker(pipeline, scheduler, settings.steps)
    words = [word for word in pipeline.tokenizer.added_tokens_encoder if word not in pipeline.tokenizer.all_special_tokens]

    def expand(text: str) -> str:  # cast: only of a list does the library make a list
        return cast(str, pipeline.maybe_convert_prompt(text, pipeline.tokenizer))

    prompts = [parse_marks(text, words, expand) for text in marked_prompts]
    if clean_prompts is not None:
        prompts = [replace(prompt, clean=expand(clean)) for prompt, clean in zip(prompts, clean_prompts, strict=True)]
    for prompt in prompts:
        check_groups(prompt, settings, intervals)
    encode = Encoder(pipeline)
    mean = encode.mean() if settings.merge == "capped" else None
    bound = [bind_prompt(prompt, encode, settings, mean) for prompt in prompts]
    null = encode(negative_prompt).states
    wanted = [(k, seed) for k in range(len(prompts)) for seed in seeds]
    pictures = []
    for first in range(0, len(wanted), batch_size):
        batch = wanted[first : first + batch_size]
        started, predict = time.perf_counter(), Predictor(pipeline.unet)
        schedule = new_scheduler()
        shape = (1, pipeline.unet.config.in_channels, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
        noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=null.dtype) for _, seed in batch]
        paintings = [
            Painting(bound[k], noise.to(null.device) * schedule.init_noise_sigma, new_scheduler)
            for (k, _), noise in zip(batch, noises, strict=True)
        ]
        paint(paintings, null, predict, settings, schedule, intervals, semantic_step)
        latents = torch.cat([painting.latents for painting in paintings])
        images = decode(pipeline, latents)
        seconds = (time.perf_counter() - started) / len(batch)
        for n, ((k, seed), painting) in enumerate(zip(batch, paintings, strict=True)):
            pictures.append(
                Picture(
                    images[n],
                    prompts[k].marked,
                    seed,
                    predict.forwards // len(batch),
                    predict.backwards // len(batch),
                    seconds,
                    painting.records,
                    latents[n],
                )  # fmt: skip
            )
    return pictures


def paint(
    paintings: list[Painting], null: Tensor, predict: Predictor, settings: Settings, scheduler, intervals, semantic_step
) -> None:
    """All denoising steps of a batch. What is optimised is optimised picture by picture; only the guided forward is shared."""
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
    """The function cells -> [N, cells, L] that `biased_attention` wants; None where nothing is biased."""
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
    """Raises InputError where a prompt has not the groups that the settings need."""
    count = len(prompt.groups)
    if not count and settings.map_steps + settings.sem_steps + settings.bias:
        raise InputError(f"the prompt {prompt.marked!r}: has no group; mark them, as in a [red critter*] and a [blue critter*]")
    if settings.pose == "on" and count != 2:
        raise InputError(f"the prompt {prompt.marked!r}: has {count} groups, and the pose loss is for two; use --pose auto")
    if intervals is not None and len(intervals) != count:
        raise InputError(f"the prompt {prompt.marked!r}: has {count} groups for {len(intervals)} intervals; give one for each")


def canvas(unet_config: Mapping[str, Any], scale: int, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, by default the model's own; `scale` is the VAE's. Raises InputError."""
    factor = scale * 2 ** (len(unet_config["block_out_channels"]) - 1)
    sides = [unet_config.get("sample_size", 64) * scale if side is None else side for side in (height, width)]
    for name, side in zip(("height", "width"), sides, strict=True):
        if side <= 0 or side % factor:
            raise InputError(f"--{name} must be a positive multiple of {factor} for this model, got {side}")
    return sides[0], sides[1]


def scheduler_maker(pipeline: StableDiffusionPipeline, scheduler, steps: int) -> Callable[[], Any]:
    """A function that makes a scheduler of its own for every trajectory: some keep a history."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    def make():
        if scheduler is not None:
            own = type(scheduler).from_config(scheduler.config)
        else:  # clip_sample is for pixels: latents are larger than 1
            own = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
            assert isinstance(own, DDIMScheduler)  # a tuple only where return_unused_kwargs is asked for
        own.set_timesteps(steps, device=pipeline.unet.device)
        return own

    return make


def decode(pipeline: StableDiffusionPipeline, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents [N, 4, h, w]."""
    images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    images, flagged = pipeline.run_safety_checker(images, latents.device, latents.dtype)
    keep = [not flag for flag in flagged] if flagged else [True] * len(images)
    pictures = pipeline.image_processor.postprocess(images, output_type="pil", do_denormalize=keep)
    return cast("list[Image.Image]", pictures)  # of "pil" it is a list, though the library says a single picture


# ---------------------------------------------------------------------------------------------------------------- command


def read_words(paths: Sequence[Path]) -> dict[str, int]:
    """{learned word: its vectors} of embedding files. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    from zoodip.files import why_unreadable
    from zoodip.prompts import read_embedding

    words = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"--embedding {path}: cannot be read ({why_unreadable(path, error)}); give a learned_embeds.safetensors"
            ) from None
        if len(names) != 1:
            raise InputError(f"--embedding {path}: holds {len(names)} tensors; give a file with one learned word")
        words[names[0]] = len(read_embedding(path, names[0])[0])
    return words


def check_prompts(folder: Path, flags: dict, methods: Iterable[Settings]) -> None:
    """Marks and lengths of the prompts, before a model is loaded. Raises InputError."""
    from transformers import CLIPTokenizer

    words = read_words(flags["embedding"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    pieces = {word: [word, *(f"{word}_{i}" for i in range(1, count))] for word, count in words.items()}
    tokenizer.add_tokens([piece for names in pieces.values() for piece in names])

    def expand(text: str) -> str:
        for word, names in pieces.items():
            text = text.replace(word, " ".join(names))
        return text

    for k, text in enumerate(flags["prompt"]):
        prompt = parse_marks(text, list(words), expand)
        for settings in methods:
            check_groups(prompt, settings, None)
        clean = expand(flags["clean_prompt"][k]) if flags["clean_prompt"] else prompt.clean
        for each in (prompt.prompt, clean, flags["negative_prompt"]):
            tokens_of(tokenizer, each)


def main(flags: dict) -> None:
    """Pictures PROMPT-METHOD-SEED.png, sheet.png and binding.json in --output. Raises InputError."""
    from zoodip.model import find_model_folder, load_pipeline
    from zoodip.pictures import picture_sheet
    from zoodip.records import environment, plain_arguments

    methods, output = settings_of_flags(flags), flags["output"]
    folder = find_model_folder(flags["model"])
    vae_levels = len(read_json(folder / "vae" / "config.json").get("block_out_channels", [0] * 4))
    canvas(read_json(folder / "unet" / "config.json"), 2 ** (vae_levels - 1), flags["height"], flags["width"])
    check_prompts(folder, flags, methods.values())
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {str(output)!r} cannot be made ({error.strerror}); choose another") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(flags["model"], flags["quantization"], device=device)
    for path in flags["embedding"]:
        pipeline.load_textual_inversion(str(path))
    how = {name: flags[name] for name in ("seeds", "height", "width", "negative_prompt", "batch_size")}
    records, blocks = [], []
    for k, prompt in enumerate(flags["prompt"]):
        clean = None if flags["clean_prompt"] is None else [flags["clean_prompt"][k]]
        for method, settings in methods.items():
            pictures = draw_bound(pipeline, [prompt], settings=settings, clean_prompts=clean, **how)
            for picture in pictures:
                name = f"{k}-{method}-{picture.seed}.png"
                write_image(output / name, picture.image)
                costs = dict(forwards=picture.forwards, backwards=picture.backwards, seconds=round(picture.seconds, 3))
                records.append(dict(file=name, prompt=prompt, method=method, seed=picture.seed, **costs, steps=picture.steps))
            blocks.append(([picture.image for picture in pictures], f"{method}: {prompt}"))
    shape = blocks[0][0][0].size
    write_image(output / "sheet.png", picture_sheet(blocks, columns=len(methods), aspect=shape[0] / shape[1]))
    arguments = plain_arguments({name: value for name, value in flags.items() if name not in asdict(PLAIN)})
    used = {method: asdict(settings) for method, settings in methods.items()}
    record = dict(arguments=arguments, settings=used, pictures=records, **environment(device))
    write_json(output / "binding.json", record, indent=1)


if __name__ == "__main__":
    sys.exit(run_script(main, vars(ARGS)))
