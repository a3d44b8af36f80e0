#!/usr/bin/env python
"""Memory and time at the size of Stable Diffusion v1.5: the real train_zoodip.py on a model of its shape, random weights.

    python benchmarks/sd15_shape.py --clip_bpe bpe_simple_vocab_16e6.txt.gz --photos dataset/dog6

No weights are needed: a folder as stable-diffusion-v1-5 is published (fp16 safetensors with the old key names, tokenizer,
scheduler) is written tensor by tensor, 2.1 GB, and train_zoodip.py runs three steps on it as a subprocess whose memory
is sampled every 20 ms. What is learned from random weights means nothing; seconds and bytes do not depend on the values.
Writes benchmarks/sd15_shape.json and .md. Linux only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from common import DTYPES, ROOT, Watcher, cli, run_watched, table, write_report

import train_zoodip as zoodip

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--clip_bpe", type=Path, required=True, help="OpenAI CLIP's merges, bpe_simple_vocab_16e6.txt.gz")
    add("--photos", type=Path, default=ROOT / "dataset" / "dog6", help="folder of photographs to train on")
    add("--steps", type=int, default=3, help="training steps to measure")
    add("--precisions", nargs="+", default=["bf16", "fp32"], choices=sorted(DTYPES), help="activations, one run each")
    add("--quantizations", nargs="+", default=["nf4"], choices=["nf4", "int8", "none"], help="weights, one run each")
    add("--folder", type=Path, default=None, help="keep the model here, or use the one that is; default: a temporary folder")
    add("--output", type=Path, default=ROOT / "benchmarks", help="folder for sd15_shape.json and .md")
    add("extra", nargs="*", help="after --: flags handed on to train_zoodip.py")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------- the folder


def write_tokenizer(folder: Path, clip_bpe: Path) -> None:
    """vocab.json, merges.txt and the two small files, from OpenAI's list of merges."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder.mkdir(parents=True, exist_ok=True)
    lines = gzip.decompress(clip_bpe.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(line.replace(" ", "") for line in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = dict(special, do_lower_case=True, model_max_length=77, tokenizer_class="CLIPTokenizer", add_prefix_space=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError where the known ids of a known prompt do not come out."""
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(folder).encode(CHECK_PROMPT, add_special_tokens=False)
    if ids != CHECK_IDS:
        raise ValueError(f"{CHECK_PROMPT!r} became {ids}, not {CHECK_IDS}: --clip_bpe is not OpenAI's list of merges")


def published_tensors(folder: Path, part: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(published name, shape, kind) of every tensor of a part; kind says how to fill it."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = zoodip.build_model(folder, part)
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
    """Values at which activations stay of the order of one: no overflow, no denormals."""
    if kind == "positions":
        return np.arange(shape[-1], dtype=np.int64).reshape(shape)
    if kind in ("zeros", "ones"):
        return np.full(shape, float(kind == "ones"), np.float16)
    scale = 0.02 if kind == "embedding" else 1 / math.sqrt(math.prod(shape[1:]))
    return (torch.randn(shape, generator=generator) * scale).half().numpy()


def write_weights(path: Path, tensors: Iterable[tuple[str, tuple[int, ...], str]], seed: int) -> None:
    """A safetensors file (8 bytes of length, JSON header, data), one tensor in memory at a time."""
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


def build_folder(folder: Path, clip_bpe: Path) -> None:
    """A Stable Diffusion v1.5 folder as published with `--variant fp16`, but for the values of the weights."""
    write_tokenizer(folder / "tokenizer", clip_bpe)
    check_tokenizer(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    for seed, (part, config) in enumerate(dict(text_encoder=TEXT_ENCODER, vae=VAE, unet=UNET).items()):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config, indent=2))
        path = folder / part / f"{zoodip.WEIGHT_NAMES[part]}.fp16.safetensors"
        write_weights(path, published_tensors(folder, part), seed)
        print(f"{part}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))  # last: its presence says that all is there


# ----------------------------------------------------------------------------------------------------- the runs


class Stages:
    """Reads the progress bars of train_zoodip.py: which stage it is in, and when each step ended."""

    def __init__(self, steps: int):
        self.steps, self.tail, self.step_times = steps, "", {}

    def __call__(self, text: str, watcher: Watcher) -> None:
        self.tail = (self.tail + text)[-400:]
        if "encoding:" in self.tail and watcher.phase == "start":
            watcher.begin("encode images")
        if "encoding: 100%" in self.tail and watcher.phase == "encode images":
            watcher.begin("load")
        for count in re.findall(rf"\b(\d+)/{self.steps} \[[^\]]*step", self.tail):
            if watcher.phase != "train":
                watcher.begin("train")
            self.step_times.setdefault(int(count), time.monotonic())

    def seconds_per_step(self) -> list[float]:
        """Of each step that the bar showed, the first included; empty where it showed too few."""
        counts = sorted(self.step_times)
        return [(self.step_times[b] - self.step_times[a]) / (b - a) for a, b in zip(counts, counts[1:], strict=False)]


def run_training(args: argparse.Namespace, folder: Path, quantization: str, precision: str) -> dict:
    """`--steps` steps of the real script -> times, memory by stage, and what run.json says."""
    with tempfile.TemporaryDirectory() as output:
        stages = Stages(args.steps)
        code, text, phases = run_watched(
            [sys.executable, "train_zoodip.py", "--pretrained_model_name_or_path", str(folder), "--variant", "fp16",
             "--train_data_dir", str(args.photos), "--initializer_token", "dog", "--max_train_steps", str(args.steps),
             "--mixed_precision", precision, "--quantization", quantization, "--eval_steps", "0", "--cpu",
             "--output_dir", output, *args.extra], "start", stages)  # fmt: skip
        if code:
            raise SystemExit(f"train_zoodip.py ended with code {code}:\n{text[-2000:]}")
        run = json.loads((Path(output) / "run.json").read_text())
    return dict(quantization=quantization, precision=precision, seconds_per_step=stages.seconds_per_step(), stages=phases,
                peak_rss=max(phase["VmRSS"] for phase in phases.values()),
                peak_anonymous=max(phase["RssAnon"] for phase in phases.values()), run=run)


def weight_bytes(folder: Path, quantization: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the loaded UNet, exactly: packed weights, what dequantising them takes, and all that is not packed."""
    unet = zoodip.load_frozen(folder, "unet", "fp16", quantization, dtype, "cpu")
    count = Counter()

    def size(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    packed_parameters = 0
    for module in unet.modules():
        if not isinstance(module, zoodip.QuantizedLayer):
            continue
        count["packed"] += size(module.packed)
        packed_parameters += math.prod(module.shape)
        if module.quant_state is not None:
            states = [module.quant_state, module.quant_state.state2]
            count["quantisation constants"] += sum(size(state.absmax) + size(state.code) for state in states)
            count["quantisation constants"] += size(module.quant_state.offset)
        else:
            count["quantisation constants"] += size(module.scale)
    count["not packed"] = sum(size(parameter) for parameter in unet.parameters())
    total = packed_parameters + sum(parameter.numel() for parameter in unet.parameters())
    return dict(count, total=sum(count.values()), parameters=total, packed_parameters=packed_parameters)


def markdown_of(runs: list[dict], weights: list[dict], args: argparse.Namespace) -> str:
    text = [f"The real `train_zoodip.py` on a model of Stable Diffusion v1.5's shape with random weights: batch 1, n = 2 (3 UNet "
            f"rows per step), 512 px, {args.steps} steps. Resident memory of the whole process, sampled every 20 ms: anonymous "
            "pages, which must fit, and file-backed ones (libraries, and weight files while they are read), which the system "
            "can drop.\n"]
    rows = []
    for run in runs:
        for stage, numbers in run["stages"].items():
            gigabytes = [f"{numbers.get(name, 0) / 1e9:.2f}" for name in ("VmRSS", "RssAnon", "RssFile")]
            rows.append([run["quantization"], run["precision"], stage, f"{numbers['seconds']:.1f}", *gigabytes])
    text.append(table(["weights", "activations", "stage", "seconds", "peak RSS, GB", "anonymous, GB", "file-backed, GB"], rows))
    text.append("")
    rows = []
    for run in runs:
        steps, record = " ".join(f"{seconds:.2f}" for seconds in run["seconds_per_step"]), run["run"]
        mean = record["seconds_this_time"] / record["steps_this_time"]
        rows.append([run["quantization"], run["precision"], steps, f"{mean:.2f}", f"{run['peak_rss'] / 1e9:.2f}"])
    text.append(table(["weights", "activations", "seconds of each step", "mean, from run.json", "peak RSS, GB"], rows))
    text.append("\nThe UNet in memory, counted tensor by tensor:\n")
    rows = []
    for w in weights:
        megabytes = [f"{w.get(name, 0) / 1e6:.1f}" for name in ("packed", "quantisation constants", "not packed", "total")]
        share = f"{w['packed_parameters'] / 1e6:.2f} of {w['parameters'] / 1e6:.2f} M"
        rows.append([w["quantization"], w["precision"], share, *megabytes])
    header = ["weights", "rest in", "packed weights", "packed, MB", "constants, MB", "not packed, MB", "total, MB"]
    text.append(table(header, rows))
    return "\n".join(text)


def measure(args: argparse.Namespace, folder: Path) -> None:
    if not (folder / "model_index.json").exists():
        build_folder(folder, args.clip_bpe)
    runs, weights = [], []
    for quantization in args.quantizations:
        for precision in args.precisions:
            runs.append(run_training(args, folder, quantization, precision))
            write_report("sd15_shape", args, dict(runs=runs, unet_weights=weights), markdown_of(runs, weights, args),
                         folder=args.output, show=False)  # each run is minutes: keep what there is
        counted = weight_bytes(folder, quantization, DTYPES[args.precisions[0]])
        weights.append(dict(quantization=quantization, precision=args.precisions[0], **counted))
    write_report("sd15_shape", args, dict(runs=runs, unet_weights=weights), markdown_of(runs, weights, args), folder=args.output)


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
        measure(args, args.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    cli(main, parse_args())
