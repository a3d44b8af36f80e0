"""--save_quantized: a copy of a model folder with packed weights, which loads in seconds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from zoodip.errors import UNFINISHED, DamagedModel, InputError
from zoodip.files import copy_folder, copy_whole, read_json, serialize, write_atomically, write_json, writing
from zoodip.folder import PACKED_NAME, WEIGHT_NAMES, choose_quantization, component_tensors, model_digest, resolve_model
from zoodip.model import VAE_ENCODER, build_model, check_parameter, is_quantized, modern_name, module_of
from zoodip.quantize import pack_weight


def save_quantized(
    target: Path,
    *,
    pretrained_model_name_or_path: str,
    quantization: str | None,
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    resume_from_checkpoint: str | None = None,
) -> Path:
    """Write a model, packed, to the new folder `target`. On a CPU, loading either folder gives the same bits. Raises InputError.

    Plain diffusers cannot read packed weights, and randomly initialises whatever is missing from a weight file that it knows.
    So the files have names of their own, at which it stops, and model_index.json says what the folder is, by which a run that is
    resumed knows the folder that it has written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"--save_quantized {str(target)!r}: runs in one process, not {os.environ['WORLD_SIZE']}; start it with "
            "python, then train from that folder"
        )
    exists = InputError(
        f"--save_quantized: {str(target)!r} already exists; give it as --pretrained_model_name_or_path or choose a new folder"
    )
    if target.exists() and resume_from_checkpoint is None:
        raise exists
    folder, variant = resolve_model(pretrained_model_name_or_path, revision, variant, model_config)
    quantization = choose_quantization(folder, variant, quantization)
    model_index = read_json(folder / "model_index.json")
    origin = model_index.get("_zoodip_packed_from") or model_digest(folder, variant)
    marker = dict(_zoodip_packed=quantization, _zoodip_packed_from=origin)
    if target.exists():
        if not is_marked(target, marker):
            raise exists
        return target
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    UNFINISHED.append(unfinished)
    try:
        with writing(target):
            for component in WEIGHT_NAMES:
                (unfinished / component).mkdir(parents=True)
                copy_whole(folder / component / "config.json", unfinished / component / "config.json")
                tensors = packed_tensors(folder, component, variant, quantization)
                write_shards(unfinished / component, PACKED_NAME, tqdm(tensors, desc=f"packing {component}", unit=" tensor"))
            note = "packed weights: load the folder with zoodip.model.load_pipeline"
            write_json(unfinished / "model_index.json", model_index | marker | dict(_zoodip_note=note), indent=2)
            for other in ("tokenizer", "scheduler"):
                copy_folder(folder / other, unfinished / other)
            unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        UNFINISHED.remove(unfinished)
    size = sum(path.stat().st_size for path in target.rglob("*"))
    print(f"{target}: the model with {quantization} weights, {size / 1e9:.2f} GB")
    return target


def is_marked(folder: Path, marker: dict[str, str]) -> bool:
    """Whether the folder's model_index.json holds `marker`: it was packed in this way from these weights."""
    try:
        return marker.items() <= read_json(folder / "model_index.json").items()
    except DamagedModel:  # not a model's folder
        return False


def packed_tensors(folder: Path, component: str, variant: str | None, quantization: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a component with packed weights, as `load_frozen` would pack them, for storage.

    The VAE's encoder (which training uses unpacked), norms, biases and weights that are already packed stay as they are.
    """
    model, where = build_model(folder, component), folder / component
    for name, tensor in component_tensors(folder, component, variant):
        modern = modern_name(name, component)
        module_name, _, leaf = modern.rpartition(".")
        if module_name.endswith(".weight") or leaf == "position_ids":  # already packed, or a constant of older files
            yield name, tensor.clone()
            continue
        module = module_of(modern, model, where)
        tensor = check_parameter(tensor, modern, module, where)
        encoder = component == "vae" and modern.startswith(VAE_ENCODER)
        if leaf == "weight" and not encoder and is_quantized(component, module_name, module):
            for format_name, packed in pack_weight(tensor, quantization).items():
                yield f"{name}.{format_name}", packed
        else:
            yield name, tensor.clone()


def write_shards(folder: Path, stem: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write safetensors files of about 64 MB and their index, so that a model is never in memory as a whole."""
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}

    def write() -> None:
        name = f"{stem}-{len(set(weight_map.values())) + 1:05}.safetensors"
        write_atomically(folder / name, serialize(shard, {"format": "pt"}))
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor
        if sum(held.nbytes for held in shard.values()) >= 64 << 20:
            write()
    if shard:
        write()
    index = json.dumps(dict(metadata={}, weight_map=weight_map), indent=1)
    write_atomically(folder / f"{stem}.safetensors.index.json", index.encode())
