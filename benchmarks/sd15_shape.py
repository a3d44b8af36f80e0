#!/usr/bin/env python
"""Write a model folder of Stable Diffusion v1.5's size: its shapes, files and names, with random weights.

    python -m benchmarks.sd15_shape sd15-shape
    python -m benchmarks.sd15_shape sd15-shape --clip_bpe bpe_simple_vocab_16e6.txt.gz

For use without a hub: 2.1 GB in the published layout of stable-diffusion-v1-5 (`--variant fp16`: safetensors with the old key
names, tokenizer, scheduler), written tensor by tensor. Memory and time do not depend on the values of the weights; what is
learned with them is meaningless. The benchmarks measure on such a folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from zoodip.arguments import new_parser
from zoodip.errors import InputError
from zoodip.folder import WEIGHT_NAMES
from zoodip.model import build_model

CHECK_PROMPT, CHECK_IDS = "a photo of a dog", [320, 1125, 539, 320, 1929]

UNET = dict(
    _class_name="UNet2DConditionModel", _diffusers_version="0.6.0", act_fn="silu", attention_head_dim=8,
    block_out_channels=[320, 640, 1280, 1280], center_input_sample=False, cross_attention_dim=768,
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, in_channels=4, layers_per_block=2, mid_block_scale_factor=1,
    norm_eps=1e-5, norm_num_groups=32, out_channels=4, sample_size=64,
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
)  # fmt: skip
VAE = dict(
    _class_name="AutoencoderKL", _diffusers_version="0.6.0", act_fn="silu", block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4, in_channels=3, latent_channels=4, layers_per_block=2, norm_num_groups=32,
    out_channels=3, sample_size=512, up_block_types=["UpDecoderBlock2D"] * 4,
)  # fmt: skip
TEXT_ENCODER = dict(
    architectures=["CLIPTextModel"], attention_dropout=0.0, bos_token_id=0, eos_token_id=2, hidden_act="quick_gelu",
    hidden_size=768, initializer_factor=1.0, initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-5,
    max_position_embeddings=77, model_type="clip_text_model", num_attention_heads=12, num_hidden_layers=12, pad_token_id=1,
    projection_dim=768, torch_dtype="float32", vocab_size=49408,
)  # fmt: skip
SCHEDULER = dict(
    _class_name="PNDMScheduler", _diffusers_version="0.6.0", beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085,
    num_train_timesteps=1000, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1, trained_betas=None, clip_sample=False,
)  # fmt: skip
MODEL_INDEX = dict(
    _class_name="StableDiffusionPipeline", _diffusers_version="0.6.0", feature_extractor=[None, None],
    safety_checker=[None, None], scheduler=["diffusers", "PNDMScheduler"], text_encoder=["transformers", "CLIPTextModel"],
    tokenizer=["transformers", "CLIPTokenizer"], unet=["diffusers", "UNet2DConditionModel"], vae=["diffusers", "AutoencoderKL"],
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the model")
    parser.add_argument(
        "--clip_bpe",
        type=Path,
        default=None,
        help="OpenAI CLIP's merges (github.com/openai/CLIP, clip/bpe_simple_vocab_16e6.txt.gz), for the real "
        "tokenizer; without them, every letter is a token",
    )
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------- the folder


def write_tokenizer(folder: Path, clip_bpe: Path | None) -> None:
    """Write vocab.json, merges.txt and the two config files, from OpenAI's merges or, without them, with as many entries."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir(parents=True, exist_ok=True)
    symbols = list(bytes_to_unicode().values())
    if clip_bpe is not None:
        merges = gzip.decompress(clip_bpe.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
        words = [merge.replace(" ", "") for merge in merges]
    else:
        merges, words = [], [f"[unused{i}]" for i in range(49152 - 256 - 2)]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *words, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = dict(special, do_lower_case=True, model_max_length=77, tokenizer_class="CLIPTokenizer", add_prefix_space=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if clip_bpe is not None:
        check_tokenizer(folder)


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError if a known prompt does not give its known ids."""
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(folder).encode(CHECK_PROMPT, add_special_tokens=False)
    if ids != CHECK_IDS:
        raise ValueError(f"{CHECK_PROMPT!r} became {ids}, not {CHECK_IDS}: --clip_bpe is not OpenAI's list of merges")


def published_tensors(folder: Path, part: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(published name, shape, kind) of every tensor of a part; kind says how to fill it."""
    model = build_model(folder, part)
    tensors = []
    for name, parameter in model.named_parameters():
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        kind = "ones" if "Norm" in owner else "embedding" if owner == "Embedding" else "weight"
        kind = "zeros" if name.endswith("bias") else kind
        shape = tuple(parameter.shape)
        if part == "text_encoder":
            name = "text_model." + name
        if part == "vae" and ".attentions." in name:
            for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
                name = name.replace(new, old)
        tensors.append((name, shape, kind))
    if part == "text_encoder":
        tensors.append(("text_model.embeddings.position_ids", (1, 77), "positions"))
    return tensors


def random_tensor(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> np.ndarray:
    """Values that keep activations of order one: no overflow, no denormals."""
    if kind == "positions":
        return np.arange(shape[-1], dtype=np.int64).reshape(shape)
    if kind in ("zeros", "ones"):
        return np.full(shape, float(kind == "ones"), np.float16)
    scale = 0.02 if kind == "embedding" else 1 / math.sqrt(math.prod(shape[1:]))
    return (torch.randn(shape, generator=generator) * scale).half().numpy()


def write_weights(path: Path, tensors: Iterable[tuple[str, tuple[int, ...], str]], seed: int) -> None:
    """Write a safetensors file (8-byte length, JSON header, data) with one tensor in memory at a time."""
    tensors, header, offset = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for name, shape, kind in tensors:
        dtype, width = ("I64", 8) if kind == "positions" else ("F16", 2)
        size = math.prod(shape) * width
        header[name] = dict(dtype=dtype, shape=list(shape), data_offsets=[offset, offset + size])
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(seed)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, shape, kind in tensors:
            file.write(random_tensor(shape, kind, generator).tobytes())


def build_folder(folder: Path, clip_bpe: Path | None = None) -> None:
    """Write a Stable Diffusion v1.5 folder as published with `--variant fp16`, except for the values of the weights."""
    write_tokenizer(folder / "tokenizer", clip_bpe)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    for seed, (part, config) in enumerate(dict(text_encoder=TEXT_ENCODER, vae=VAE, unet=UNET).items()):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config, indent=2))
        path = folder / part / f"{WEIGHT_NAMES[part]}.fp16.safetensors"
        write_weights(path, published_tensors(folder, part), seed)
        print(f"{part}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))  # last: its presence marks a complete folder


def complete_folder(folder: Path) -> Path:
    """The folder, which is written if it is not there. Raises InputError if something else is there."""
    if not (folder / "model_index.json").exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(
                f"{folder}: has no model_index.json, so it is no model, or one half-written; remove it or name another"
            )
        build_folder(folder)
    return folder


@contextmanager
def shape_folder(folder: Path | None) -> Iterator[Path]:
    """The folder of a benchmark, which is written if need be; without one, a temporary folder, which is removed at the end."""
    with tempfile.TemporaryDirectory() as temporary:
        yield complete_folder((folder or Path(temporary) / "sd15-shape").resolve())


if __name__ == "__main__":
    arguments = parse_args()
    build_folder(arguments.folder, arguments.clip_bpe)
