"""The one class that draws pictures, and the one function that arranges them on a sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from zoodip.diffusion import FrozenModel
from zoodip.errors import Interrupted, damaged_model
from zoodip.model import assemble_pipeline, load_vae_decoder
from zoodip.prompts import Prompts, encode_prompts

if TYPE_CHECKING:
    from zoodip.tuned_model import TunedModel


class Drawer:
    """Draws prompts with the modules that training holds in memory, plus the VAE's decoder, quantised like them.

    `scheduler` is one of `zoodip.model.SCHEDULERS`. On the miniature, 20 steps of DPM-Solver++ are as good as 50 of PNDM, the
    paper's, in two fifths of the time (miniature/schedulers.json). Raises InputError if the folder is damaged.
    """

    def __init__(
        self,
        model: FrozenModel | TunedModel,
        folder: Path,
        variant: str | None,
        quantization: str,
        resolution: int,
        steps: int = 20,
        guidance: float = 7.5,
        batch_size: int = 1,
        scheduler: str = "dpmsolver++",
    ):
        weight = model.unet.conv_in.weight
        self.text_encoder, self.folder, self.resolution = model.text_encoder, folder, resolution
        self.steps, self.guidance, self.batch_size = steps, guidance, batch_size
        vae = load_vae_decoder(folder, variant, quantization, weight.dtype, weight.device)
        self.pipeline = assemble_pipeline(folder, unet=model.unet, vae=vae, scheduler=scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.scheduler.set_timesteps(steps)
        # Denoising steps per picture: PNDM takes one more than it is asked for.
        self.forwards = len(self.pipeline.scheduler.timesteps)

    @torch.no_grad()
    def draw(
        self, prompts: Prompts, theta: torch.Tensor, wanted: list[tuple[int, int]], after_step: Callable[[], None] | None = None
    ) -> Iterator[Image.Image]:
        """One picture for each (row of `prompts`, seed), with theta [V, d] as the token. The last prompt is the empty one.

        A seed gives the same initial noise for every prompt and token. after_step() is called after every denoising step, and may
        raise Interrupted. Raises InputError if the model's folder is damaged.
        """
        yield from self.draw_states(self.encode(prompts, theta), wanted, after_step)

    @torch.no_grad()
    def encode(self, prompts: Prompts, theta: torch.Tensor) -> torch.Tensor:
        """Text states [P, L, d] of prompts with theta [V, d] as the token."""
        assert self.text_encoder is not None  # a TunedModel's is freed: use `draw_states`
        device = self.pipeline.unet.conv_in.weight.device
        return encode_prompts(self.text_encoder, prompts.rows.to(device), prompts.ids.to(device), theta.detach()[None].to(device))

    @torch.no_grad()
    def draw_states(
        self, states: torch.Tensor, wanted: list[tuple[int, int]], after_step: Callable[[], None] | None = None
    ) -> Iterator[Image.Image]:
        """The same for text states [P, L, d] instead of prompts: (row, seed) pairs, with the empty prompt's row last."""
        for first in range(0, len(wanted), self.batch_size):
            rows, seeds = zip(*wanted[first : first + self.batch_size], strict=True)
            with damaged_model(self.folder):
                pictures = self.pipeline(
                    prompt_embeds=states[list(rows)],
                    negative_prompt_embeds=states[-1:].expand(len(rows), -1, -1),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    height=self.resolution,
                    width=self.resolution,
                    callback_on_step_end=None if after_step is None else lambda *state: after_step() or state[-1],
                    return_dict=False,
                )[0]
            yield from pictures


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a text into lines of at most `width` pixels: between words, and within a word that is wider on its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


@contextmanager
def drawing_bar(prompt: str | None, steps: int, stopped: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """A bar over `steps` denoising steps -> what to call after each, which raises Interrupted once `stopped()`."""
    with tqdm(total=steps, desc=f"drawing {prompt!r}", unit="step", leave=False) as bar:

        def after_step() -> None:
            bar.update()
            if stopped():
                raise Interrupted

        yield after_step


def cell_size(resolution: int) -> int:
    """Pixels at which a sheet shows a picture of `resolution`: at least 256, since a miniature's 64 are hard to see."""
    return resolution * math.ceil(256 / resolution)


def picture_sheet(
    blocks: list[tuple[list[Image.Image], str]],
    columns: int = 1,
    cell: int = 128,
    gap: int = 6,
    headings: list[str] | None = None,
    aspect: float = 1.0,
) -> Image.Image:
    """Arrange pictures in blocks, each a row `cell` pixels high with its full caption below, `columns` blocks side by side.

    Pictures become squares, or `aspect` times as wide as high. `headings` stand above the pictures of each column's first block.
    """
    width = round(cell * aspect)
    font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(max(10, cell // 10)))
    most = max(len(pictures) for pictures, _ in blocks)
    block_width = most * (width + gap)
    captions = [wrap(caption, block_width - gap, font) for _, caption in blocks]
    line_height = sum(font.getmetrics()) + 1
    foot = max(len(lines) for lines in captions) * line_height
    head = (line_height + gap) if headings else 0
    columns = min(columns, len(blocks))
    height = head + -(-len(blocks) // columns) * (cell + foot + gap)
    sheet = Image.new("RGB", (columns * (block_width + gap), height - (0 if foot else gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        for i, heading in enumerate(headings or []):
            middle = gap + column * (block_width + gap) + i * (width + gap) + width / 2
            pen.text((middle, line_height / 2), heading, fill="black", font=font, anchor="mm")
    for k, ((pictures, _), lines) in enumerate(zip(blocks, captions, strict=True)):
        left = gap + (k % columns) * (block_width + gap)
        top = head + (k // columns) * (cell + foot + gap)
        for i, picture in enumerate(pictures):
            sheet.paste(picture.resize((width, cell), Image.Resampling.LANCZOS), (left + i * (width + gap), top))
        for i, line in enumerate(lines):
            pen.text((left, top + cell + 1 + i * line_height), line, fill="black", font=font)
    return sheet
