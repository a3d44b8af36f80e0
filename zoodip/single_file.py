"""A Stable Diffusion in one .safetensors file, as AUTOMATIC1111 and Civitai use it, read as if it were a diffusers folder.

Such a file has the weights of all components under the names of the original code (LDM), but neither configuration nor tokenizer.
diffusers converts a file that is already in memory. Here its own functions get stand-ins instead of tensors, and so reveal which
tensor, or which of its rows, becomes which parameter; the tensors are then read one by one as they are packed. The result
is a small temporary folder with configurations, tokenizer, and a table of names for each component.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open

from zoodip.errors import UNFINISHED, InputError, damaged_model
from zoodip.files import copy_folder, copy_whole, is_pickle, not_safetensors, read_json, write_json, writing

TABLE = "single_file.json"  # in a component's folder: {"file": path, "parameters": {name: [name in the file, rows, shape]}}
KINDS = {"v1": "Stable Diffusion 1.x", "v2": "Stable Diffusion 2.x"}  # keys are diffusers' names
PREFIX = "model.diffusion_model."  # of the UNet's tensors in every such file


@dataclass
class StandIn:
    """A tensor of the file for diffusers' converters, which read its shape, slice it and copy it: name, shape and rows."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index) -> StandIn:
        """Select rows, or drop trailing dimensions of size 1; converters do nothing else."""
        shape = tuple(torch.empty(self.shape, device="meta")[index].shape)
        first = index[0] if isinstance(index, tuple) else index
        start, stop, _ = first.indices(self.shape[0])
        rows = None if (start, stop) == (0, self.shape[0]) else (start, stop)
        if self.rows is not None or math.prod(shape) != math.prod(self.shape[1:]) * (stop - start):
            raise NotImplementedError(f"{self.name}[{index}]")
        return StandIn(self.name, shape, rows)

    def detach(self) -> StandIn:
        return self

    def clone(self) -> StandIn:
        return self


def refuse_pickle(file: Path) -> None:
    """Raises InputError if a checkpoint is a pickle, with the command that converts it without running what is in it."""
    if file.suffix.lower() == ".safetensors" and not is_pickle(file):
        return
    command = (
        'python -c "import torch, safetensors.torch as s; '
        f"d = torch.load('{file.name}', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
        f"s.save_file({{k: v.clone() for k, v in d.items() if hasattr(v, 'dtype')}}, '{file.stem}.safetensors')\""
    )
    raise InputError(f"{file}: is a pickle, which could run code, or not a .safetensors file; convert it safely with {command}")


def checkpoint_kind(file: Path) -> tuple[str, dict[str, StandIn]]:
    """("v1" or "v2", {name: stand-in for its tensor}). Raises InputError if the file is not such a checkpoint."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    refuse_pickle(file)
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: StandIn(name, tuple(handle.get_slice(name).get_shape())) for name in handle.keys()}
    except (SafetensorError, OSError) as error:
        raise not_safetensors(file, error) from error
    if not any(name.startswith(PREFIX) for name in tensors):
        raise InputError(f"{file}: holds no Stable Diffusion (no tensor {PREFIX}...); it may be a LoRA, a VAE or an embedding")
    with damaged_model(file):
        kind = infer_diffusers_model_type(tensors)
    if kind not in KINDS:
        raise InputError(f"{file}: is of kind {kind}; give a plain text-to-image Stable Diffusion 1.x or 2.x")
    return kind, tensors


def published_configuration(kind: str) -> str:
    """The hub name of the model of this kind whose configurations and tokenizer are also diffusers' default."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def folder_of_single_file(file: Path, tensors: dict[str, StandIn], configuration: Path) -> Path:
    """A temporary folder that stands for the file, with the configurations and tokenizer of the folder `configuration`.

    It is removed when the process ends. Raises InputError.
    """
    folder = Path(tempfile.mkdtemp(prefix="zoodip-"))
    UNFINISHED.append(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with writing(folder):
        copy_whole(configuration / "model_index.json", folder / "model_index.json")
        for name in ("tokenizer", "scheduler"):
            copy_folder(configuration / name, folder / name)
    for component in ("unet", "vae", "text_encoder"):
        config = read_json(configuration / component / "config.json")
        with damaged_model(file):
            parameters = converted(component, tensors, config)
        with writing(folder):
            (folder / component).mkdir()
        write_json(folder / component / "config.json", config)
        table = {name: [part.name, part.rows, part.shape] for name, part in parameters.items()}
        write_json(folder / component / TABLE, dict(file=str(file.resolve()), parameters=table))
    return folder


def converted(component: str, tensors: dict[str, StandIn], config: dict) -> dict[str, StandIn]:
    """{parameter: where it is in the file} for a component, by diffusers' own mapping."""
    from diffusers.loaders import single_file_utils as ldm

    tensors = {name: part for name, part in tensors.items() if not name.startswith("model_ema.")}
    if component == "unet":
        return ldm.convert_ldm_unet_checkpoint(tensors, config)
    if component == "vae":
        return ldm.convert_ldm_vae_checkpoint(tensors, config)
    if not ldm.is_open_clip_model(tensors):
        return ldm.convert_ldm_clip_checkpoint(tensors)
    tensors = {name: part for name, part in tensors.items() if not name.endswith(".text_projection")}  # of CLIP's other half
    text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return ldm.convert_open_clip_checkpoint(text_model, tensors)


def single_file_of(folder: Path, component: str) -> Path | None:
    """The file that a temporary folder stands for; None for an ordinary folder."""
    table = folder / component / TABLE
    return Path(read_json(table)["file"]) if table.is_file() else None


def read_single_file(folder: Path, component: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter of a component, one at a time. Raises InputError.

    The file is reopened for each, so that the pages of its memory map are released together with the tensor.
    """
    table = read_json(folder / component / TABLE)
    file = Path(table["file"])
    for name, (stored, rows, shape) in table["parameters"].items():
        try:
            with safe_open(file, framework="pt") as handle:
                tensor = handle.get_tensor(stored) if rows is None else handle.get_slice(stored)[rows[0] : rows[1]]
        except (SafetensorError, OSError) as error:
            raise not_safetensors(file, error) from error
        yield name, tensor.reshape(shape)
