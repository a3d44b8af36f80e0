"""A Stable Diffusion folder: found or downloaded, checked, and its weights read tensor by tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zoodip.arguments import DEFAULT_MODEL
from zoodip.errors import DamagedModel, InputError, notice
from zoodip.files import not_safetensors, read_json, read_tensors
from zoodip.single_file import (
    KINDS,
    checkpoint_kind,
    folder_of_single_file,
    published_configuration,
    read_single_file,
    single_file_of,
)

WEIGHT_NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PACKED_NAME = "packed"  # of weights written by --save_quantized: under the usual names others would load them, as noise
NEEDED = ["model_index.json", "tokenizer", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in WEIGHT_NAMES)]


def find_model_folder(
    name: str, revision: str | None = None, variant: str | None = None, model_config: str | None = None
) -> Path:
    """The local folder of a model, downloaded from the hub if need be, or one that stands for a single file, with the
    configurations of `model_config`. Raises an InputError that says how to get the model."""
    folder = Path(name)
    if folder.is_file():
        folder = open_single_file(folder, model_config)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
            raise InputError(
                f"--pretrained_model_name_or_path: there is no folder or file {name!r}; give a folder in diffusers format (with "
                "model_index.json), a .safetensors checkpoint, or a hub name"
            )
        folder = download_model(name, revision, variant)
    for needed in NEEDED:
        if not (folder / needed).exists():
            raise InputError(
                f"{folder}: {needed} is missing; a Stable Diffusion folder in diffusers format contains "
                "model_index.json, tokenizer, scheduler, text_encoder, unet and vae"
            )
    for component in WEIGHT_NAMES:
        find_weights(folder, component, variant)
    if (folder / "text_encoder_2").exists():
        raise InputError(f"{folder}: has two text encoders (SDXL); give a Stable Diffusion 1.x or 2.x")
    channels = read_json(folder / "unet" / "config.json").get("in_channels", 4)
    if channels != read_json(folder / "vae" / "config.json").get("latent_channels", 4):
        raise InputError(
            f"{folder}: the UNet takes {channels} channels (an inpainting or depth model?); give a plain "
            "text-to-image Stable Diffusion"
        )
    return folder


def open_single_file(file: Path, model_config: str | None) -> Path:
    """A folder that stands for a checkpoint in one file. Configurations and tokenizer (2 MB) come from `model_config`, a folder
    or hub name, by default from the published model of the file's kind. Raises InputError."""
    kind, tensors = checkpoint_kind(file)
    source = Path(model_config or published_configuration(kind))
    if kind == "v2" and model_config is None:  # such files do not say it, and either configuration fits
        notice(f"{file}: taken for a 2.x of 768 pixels, which predicts velocity; for one of 512 pixels, which predicts noise, "
               "give --model_config")  # fmt: skip
    if not source.is_dir():
        try:
            source = download_model(str(source), None, None, weights=False)
        except InputError as error:
            raise InputError(
                f"{file}: a single file has neither configuration nor tokenizer; as --model_config, give a {KINDS[kind]} in "
                f"diffusers format, whose weights are not needed ({error})"
            ) from None
    for needed in NEEDED:
        if not (source / needed).exists():
            raise InputError(f"--model_config {source}: {needed} is missing; give a folder in diffusers format")
    return folder_of_single_file(file, tensors, source)


def resolve_model(
    name: str, revision: str | None = None, variant: str | None = None, model_config: str | None = None
) -> tuple[Path, str | None]:
    """`find_model_folder`'s folder, and the variant to use: by default the one that `hub_variant` or `folder_variant` chooses."""
    variant = variant or hub_variant(name, revision) or folder_variant(Path(name))
    return find_model_folder(name, revision, variant, model_config), variant


def hub_variant(name: str, revision: str | None = None) -> str | None:
    """The variant of a hub model to use if the user names none: fp16, half the download, if all its weights have it."""
    if Path(name).exists():
        return None
    from huggingface_hub import HfApi, try_to_load_from_cache

    wanted = [f"{component}/{stem}.fp16.safetensors" for component, stem in WEIGHT_NAMES.items()]
    try:
        if all(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in wanted):
            return "fp16"
        return "fp16" if set(wanted) <= set(HfApi().list_repo_files(name, revision=revision)) else None
    except Exception:  # network, authorisation, spelling: reported by whoever downloads
        return None


def folder_variant(folder: Path) -> str | None:
    """The variant of a local folder to use if the user names none: fp16 if its weights are complete only in that one."""
    return "fp16" if not has_weights(folder, None) and has_weights(folder, "fp16") else None


def has_weights(folder: Path, variant: str | None) -> bool:
    """Whether a local folder has weights of this variant for every component."""
    try:
        return all(find_weights(folder, component, variant) for component in WEIGHT_NAMES)
    except InputError:
        return False


def download_model(name: str, revision: str | None, variant: str | None, weights: bool = True) -> Path:
    """Download configurations, tokenizer and weights of `variant` from the hub -> the folder in the cache. Raises InputError."""
    from huggingface_hub import snapshot_download

    suffix = f".{variant}" if variant else ""
    patterns = ["model_index.json", "tokenizer/*", "scheduler/*"]
    for component, stem in WEIGHT_NAMES.items():
        patterns.append(f"{component}/config.json")
        if not weights:
            continue
        patterns += [
            f"{component}/{PACKED_NAME}*",
            f"{component}/{stem}{suffix}.safetensors",
            f"{component}/{stem}{suffix}-*-of-*.safetensors",
            f"{component}/{stem}.safetensors.index{suffix}.json",
        ]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, spelling: many classes, one remedy
        if Path(name).parent.is_dir() and "/" in name:
            raise InputError(
                f"--pretrained_model_name_or_path: there is no folder or file {name!r}, nor such a model on the hub; correct it"
            ) from None
        wanted = ["*.json", "*.txt"]
        if weights:
            variant = variant or ("fp16" if name == DEFAULT_MODEL else None)  # without network, it was not looked up
            wanted.append(f"*/*.{variant}.safetensors" if variant else "*/*.safetensors")
        files = " ".join(f"--include '{pattern}'" for pattern in wanted)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--pretrained_model_name_or_path: {name!r} is neither a folder here nor available from the hub ({reason}); run "
            f"`hf download {name} --local-dir sd-model {files}` on a machine with network access, copy that folder here and give "
            f"its path{f' and --variant {variant}' if variant else ''}"
        ) from None


def find_weights(folder: Path, component: str, variant: str | None) -> list[Path]:
    """The safetensors file, or shards, of a component of the model. Raises InputError; a pickle is never returned."""
    single_file = single_file_of(folder, component)
    if single_file is not None:
        return [single_file]
    stem = WEIGHT_NAMES[component] + (f".{variant}" if variant else "")
    whole = folder / component / f"{stem}.safetensors"
    index = folder / component / f"{WEIGHT_NAMES[component]}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if whole.is_file():
        return [whole]
    packed_index = folder / component / f"{PACKED_NAME}.safetensors.index.json"
    if packed_index.is_file() and not variant:
        index = packed_index
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
        shards = [folder / component / Path(name).name for name in sorted(names)]
        missing = [path.name for path in shards if not path.is_file()]
        if shards and not missing:
            return shards
        raise DamagedModel(folder / component, f"the shards {', '.join(missing)} are missing")
    found = sorted(path.name for path in (folder / component).glob("*") if path.suffix in (".safetensors", ".bin", ".ckpt"))
    remedy = (
        "only safetensors is read, never a pickle: save the model with save_pretrained(safe_serialization=True)"
        if found and not any(name.endswith(".safetensors") for name in found)
        else "set or drop --variant"
        if found
        else "download the folder again"
    )
    raise InputError(f"{folder / component}: {stem}.safetensors is missing (found: {', '.join(found) or 'nothing'}); {remedy}")


def component_tensors(folder: Path, component: str, variant: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in a component's weight files, one at a time. Raises InputError."""
    if single_file_of(folder, component) is not None:
        return read_single_file(folder, component)
    return read_tensors(find_weights(folder, component, variant))


def packed_as(folder: Path, variant: str | None) -> str | None:
    """The quantization in which --save_quantized packed a folder's weights; None if they are not packed."""
    for path in find_weights(folder, "unet", variant):
        try:
            with safe_open(path, framework="pt") as handle:
                names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise not_safetensors(path, error) from error
        for name in names:
            if name.endswith((".weight.nf4", ".weight.int8")):
                return name.rpartition(".")[2]
    return None


def choose_quantization(folder: Path, variant: str | None, wanted: str | None) -> str:
    """--quantization; by default that of a packed folder, otherwise nf4. Raises InputError if flag and folder disagree."""
    packed = packed_as(folder, variant)
    if wanted and packed and wanted != packed:
        raise InputError(
            f"--quantization {wanted}: the weights in {folder} are packed as {packed}; leave the flag out, or give "
            "the model that they were made from"
        )
    return wanted or packed or "nf4"


def refuse_model_folder(flag: str, output: Path, base: Path) -> None:
    """Raises InputError if the folder to write to is `base`, or a model that no run wrote: its unet/ could be moved aside."""
    model = (output / "model_index.json").exists()
    of_a_run = any((output / name).exists() for name in ("run.json", ".lock"))  # a killed run leaves only its lock
    if output.resolve() == base.resolve() or (model and not of_a_run):
        raise InputError(f"--{flag} {str(output)!r} is a model's own folder; choose another")


def model_digest(folder: Path, variant: str | None) -> str:
    """SHA-256 over size, beginning and end of the weight files: fast, and enough to tell a retrained model apart."""
    digest = hashlib.sha256()
    for path in [path for component in WEIGHT_NAMES for path in find_weights(folder, component, variant)]:
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read() + str(size).encode())
    return digest.hexdigest()


def config_number(path: Path, key: str, default: int) -> int:
    """A count from a configuration in the model folder. Raises DamagedModel if it is not a positive integer."""
    value = read_json(path).get(key, default)
    if type(value) is not int or value < 1:
        raise DamagedModel(path, f"{key} must be a positive whole number, got {value!r}")
    return value


def vae_scale_factor(folder: Path) -> int:
    """Pixels per latent in each direction. Raises DamagedModel."""
    channels = read_json(folder / "vae" / "config.json").get("block_out_channels", [0] * 4)
    levels = len(channels) if isinstance(channels, list) else 1  # anything but a list is refused on loading
    return 2 ** (levels - 1)


def native_resolution(folder: Path) -> int:
    """Side length in pixels of the images that the model was made for. Raises DamagedModel."""
    return config_number(folder / "unet" / "config.json", "sample_size", 64) * vae_scale_factor(folder)
