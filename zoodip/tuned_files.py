"""The files that hold tuned weights, in formats that other tools of each kind read, and how they are read back.

tuned_scales.safetensors         scales of an integer UNet (TuneQDM, PEQA); read by `load_pipeline(tuned_scales=...)`
pytorch_lora_weights.safetensors LoRA with diffusers' names, for pipe.load_lora_weights; a copy with kohya's for A1111, ComfyUI
pytorch_lokr_weights.safetensors Kronecker factors with LyCORIS' names, for A1111 and ComfyUI; if a1 = a2, also a peft adapter
unet/                            a whole UNet, for from_pretrained
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from zoodip.errors import InputError, require_peft
from zoodip.files import copy_folder, copy_whole, read_json, why_unreadable, write_json, write_tensors, writing
from zoodip.folder import WEIGHT_NAMES, component_tensors, model_digest, resolve_model
from zoodip.model import assemble_pipeline, load_frozen
from zoodip.prompts import load_tokenizer
from zoodip.quantize import frozen_format
from zoodip.tuned_layers import (
    Experts,
    KroneckerLayer,
    Parameters,
    Shapes,
    add_kronecker,
    add_lora,
    add_scales,
    kronecker_shapes,
    lora_shapes,
    scale_shapes,
)

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

Tensors = dict[str, torch.Tensor]
Reading = tuple[Shapes, Callable[[nn.Module], Parameters], Callable[[str], torch.Tensor]]  # shapes, how to add them, their values


# ----------------------------------------------------------------------------------------------------- writing


def save_scales(path: Path, parameters: Parameters, header: dict[str, str]) -> Path:
    """Write `<module>.scale_out` [N, O] and, if trained, `<module>.scale_in` [N, I]; the integers come from the base."""
    stacked: dict[str, list[torch.Tensor]] = {}
    for name, parameter in parameters.items():  # <module>.scale_out.<expert>, in the experts' order
        stacked.setdefault(name.rpartition(".")[0], []).append(parameter.detach())
    write_tensors(path, {name: torch.stack(scales) for name, scales in stacked.items()}, header)
    return path


def save_lora(folder: Path, unet: nn.Module, stem: str, header: dict[str, str], suffix: str) -> Path:
    """Write a LoRA as diffusers reads it, and a copy named after the identifier, `stem`, as A1111 and ComfyUI read it."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from peft import get_peft_model_state_dict

    header = {**header, "zoodip.peft": version("peft")}
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    path = folder / f"pytorch_lora_weights{suffix}.safetensors"
    write_tensors(path, convert_state_dict_to_diffusers(state), header)
    write_tensors(folder / f"{stem}{suffix}.safetensors", convert_state_dict_to_kohya(state), header)
    return path


def save_lokr(folder: Path, parameters: Parameters, header: dict[str, str], suffix: str) -> Path:
    """Write Kronecker factors with LyCORIS' names and, if A is square, also as a peft adapter in the folder peft_adapter."""
    path = folder / f"pytorch_lokr_weights{suffix}.safetensors"
    write_tensors(path, {lycoris_name(name): parameter.detach() for name, parameter in parameters.items()}, header)
    firsts = [parameter for name, parameter in parameters.items() if name.endswith("lokr_w1")]
    if all(first.shape[0] == first.shape[1] for first in firsts):
        save_peft_lokr(folder / f"peft_adapter{suffix}", parameters, firsts[0].shape[0], header)
    return path


def lycoris_name(name: str) -> str:
    """<module>.lokr_w1 -> lora_unet_<module with _>.lokr_w1."""
    module, _, leaf = name.rpartition(".")
    return f"lora_unet_{module.replace('.', '_')}.{leaf}"


def save_peft_lokr(folder: Path, parameters: Parameters, factor: int, header: dict[str, str]) -> None:
    """Write a peft LoKr adapter. Its rank is large enough to keep both factors whole, and alpha equals it: a scale of 1."""
    from peft import LoKrConfig

    with writing(folder):
        folder.mkdir(exist_ok=True)
    rank = max(max(parameter.shape) for name, parameter in parameters.items() if name.endswith("lokr_w2"))
    targets = [name.removesuffix(".lokr_w1") for name in parameters if name.endswith(".lokr_w1")]
    config = LoKrConfig(r=rank, alpha=rank, decompose_factor=factor, target_modules=targets).to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_json(folder / "adapter_config.json", plain | {"inference_mode": True}, indent=2)
    tensors = {f"base_model.model.{name}": parameter.detach() for name, parameter in parameters.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, header)


def save_unet(folder: Path, tensors: Tensors, base: Path, dtype: torch.dtype, header: dict[str, str]) -> Path:
    """Write a UNet in diffusers' format, in `dtype`, with the configuration of the model folder `base`. Raises InputError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        copy_whole(base / "unet" / "config.json", folder / "config.json")
    write_tensors(
        folder / f"{WEIGHT_NAMES['unet']}.safetensors", {name: t.detach().to(dtype) for name, t in tensors.items()}, header
    )
    return folder


def save_other_folders(target: Path, base: Path, variant: str | None) -> None:
    """Complete a folder with unet/ for from_pretrained: add tokenizer, scheduler, text encoder and VAE of `base`.

    Raises InputError.
    """
    with writing(target):
        for other in ("tokenizer", "scheduler"):
            copy_folder(base / other, target / other)
        for component in ("text_encoder", "vae"):
            (target / component).mkdir(exist_ok=True)
            copy_whole(base / component / "config.json", target / component / "config.json")
    for component in ("text_encoder", "vae"):
        tensors = dict(component_tensors(base, component, variant))
        write_tensors(target / component / f"{WEIGHT_NAMES[component]}.safetensors", tensors, {"format": "pt"})
    model_index = read_json(base / "model_index.json") | {"requires_safety_checker": False}
    for unused in ("safety_checker", "feature_extractor", "image_encoder"):
        if unused in model_index:
            model_index[unused] = [None, None]
    write_json(target / "model_index.json", model_index, indent=2)


def merged_unet(unet: nn.Module, base: Path, variant: str | None) -> Tensors:
    """{name: tensor} of the UNet of the model folder `base`, with `unet`'s Kronecker products added: W + A kron B [O, I], fp32.

    Everything else is as in the folder, whatever the precision of training. Raises InputError.
    """
    tensors = dict(component_tensors(base, "unet", variant))
    for name, module in unet.named_modules():
        if isinstance(module, KroneckerLayer):
            if not isinstance(module.base, nn.Linear):
                raise InputError(
                    "--export_merged needs --base none: a packed weight plus a product, packed again, is a different model"
                )
            factors = module.lokr_w1.detach(), module.lokr_w2.detach()
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() + torch.kron(*factors).cpu()
    return tensors


# ----------------------------------------------------------------------------------------------------- reading


@dataclass
class TunedFile:
    """One of the files above that applies to a base model, read and checked."""

    path: Path
    header: dict[str, str]
    tensors: Tensors

    @property
    def quantization(self) -> str:
        """The format of the UNet that it was learned on."""
        return self.header["zoodip.base_quantization"]

    def apply(self, unet: nn.Module) -> nn.Module:
        """Turn the UNet, in the format `quantization`, into the tuned one. Raises InputError if the file does not fit it."""
        shapes, add, find = self.reader()(unet)
        try:
            values = {name: find(name) for name in shapes}
        except (KeyError, IndexError) as error:
            raise InputError(f"{self.path}: lacks {error} for this UNet; give the model that it was learned on") from error
        wrong = [
            name for name, shape in shapes.items() if tuple(values[name].shape) != shape or not values[name].isfinite().all()
        ]
        if wrong:
            raise InputError(f"{self.path}: its {wrong[0]} is {tuple(values[wrong[0]].shape)} or contains NaN or Inf, "
                             f"but the UNet needs {shapes[wrong[0]]}; give the model that it was learned on")  # fmt: skip
        for name, parameter in add(unet).items():
            parameter.data.copy_(values[name])
            parameter.requires_grad_(False)
        return unet

    def reader(self) -> Callable[[nn.Module], Reading]:
        """The method that reads this kind of file, chosen by its tensor names."""
        readers = {"scale_out": self.scales, "lokr_w1": self.kronecker, "lora.down": self.lora}
        found = [reader for part, reader in readers.items() if any(part in name for name in self.tensors)]
        if not found:
            raise InputError(
                f"{self.path}: holds no tuned weights under the names that are read here; of the trainer's files, give "
                "tuned_scales.safetensors, pytorch_lokr_weights.safetensors or pytorch_lora_weights.safetensors"
            )
        return found[0]

    def scales(self, unet: nn.Module) -> Reading:
        settings = json.loads(self.header["zoodip.settings"])
        trained = settings.get("train_interval") if settings.get("apply") == "interval" else None
        interval = (trained[0], trained[1]) if trained else None
        number = len(next(tensor for name, tensor in self.tensors.items() if name.endswith(".scale_out")))
        scale_in = any(name.endswith(".scale_in") for name in self.tensors)

        def find(name: str) -> torch.Tensor:
            module, _, expert = name.rpartition(".")
            return self.tensors[module][int(expert)]

        return scale_shapes(unet, number, scale_in), lambda unet: add_scales(unet, Experts(number, interval), scale_in), find

    def kronecker(self, unet: nn.Module) -> Reading:
        a1, a2 = next(tensor.shape for name, tensor in self.tensors.items() if name.endswith("lokr_w1"))
        add = partial(add_kronecker, a1=a1, a2=a2, generator=torch.Generator())
        return kronecker_shapes(unet, a1, a2), add, lambda name: self.tensors[lycoris_name(name)]

    def lora(self, unet: nn.Module) -> Reading:
        require_peft(f"{self.path}, a LoRA,")
        rank = len(next(tensor for name, tensor in self.tensors.items() if "lora.down" in name))

        def find(name: str) -> torch.Tensor:
            module, _, matrix = name.removesuffix(".default.weight").rpartition(".")
            return self.tensors[f"unet.{module}.lora.{'down' if matrix == 'lora_A' else 'up'}.weight"]

        return lora_shapes(unet, rank), partial(add_lora, rank=rank, generator=torch.Generator()), find


def read_tuned(path: Path) -> TunedFile:
    """Read a file of a weight-tuning trainer. Raises InputError."""
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        file = TunedFile(path, header, tensors)
        check_header(file.header)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: holds no tuned weights ({why_unreadable(path, error)}); give a file that a weight-tuning "
                         "trainer wrote") from error  # fmt: skip
    return file


def check_header(header: dict[str, str]) -> None:
    """Raises ValueError if it lacks what every weight-tuning trainer writes into its files."""
    for key in ("base_model", "base_quantization", "model_digest", "settings"):
        if f"zoodip.{key}" not in header:
            raise ValueError(f"its header lacks zoodip.{key}")
    if not isinstance(json.loads(header["zoodip.settings"]), dict):
        raise ValueError("its settings are not a JSON object")


def tuned_settings(tuned: Path) -> dict:
    """The settings of the run that wrote a file, or a folder with unet/. Raises InputError."""
    header = unet_header(tuned) if (tuned / "unet").is_dir() else read_tuned(tuned).header
    return json.loads(header["zoodip.settings"])


def unet_header(tuned: Path) -> dict[str, str]:
    """The header of the unet/ in a folder that a trainer wrote. Raises InputError."""
    path = tuned / "unet" / f"{WEIGHT_NAMES['unet']}.safetensors"
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
        check_header(header)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: was not written by a weight-tuning trainer ({why_unreadable(path, error)}); give the folder "
                         "of one of its runs") from error  # fmt: skip
    return header


def check_base(tuned: Path, header: dict[str, str], digest: str) -> None:
    """Raises InputError if the base is not the model that was tuned: even a whole UNet needs its text encoder and VAE."""
    if header["zoodip.model_digest"] != digest:
        raise InputError(f"{tuned}: was learned on other weights ({header['zoodip.base_model']}) than this model's; "
                         "give the model that it was learned on")  # fmt: skip


def load_tuned_unet(
    folder: Path, variant: str | None, tuned: Path, dtype: torch.dtype, device: torch.device | str
) -> tuple[nn.Module, str]:
    """The UNet of the model in `folder` with the tuning in `tuned`, a file or a folder with unet/, quantised exactly as in
    training, and the format of the model's other parts.

    Raises InputError if it cannot be loaded, or was learned on other weights.
    """
    digest = model_digest(folder, variant)
    if (tuned / "unet").is_dir():
        check_base(tuned, unet_header(tuned), digest)
        return load_frozen(tuned, "unet", None, "none", dtype, device), "none"
    file = read_tuned(tuned)
    check_base(tuned, file.header, digest)
    unet = load_frozen(folder, "unet", variant, file.quantization, dtype, device)
    return file.apply(unet), frozen_format(file.quantization)


def load_tuned_pipeline(
    name: str,
    tuned: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
) -> StableDiffusionPipeline:
    """A pipeline of the model `name` with what a weight-tuning trainer learned on it, quantised exactly as in training.

    tuned: a file of scales, LoRA (diffusers' names) or Kronecker factors, or a folder with unet/ (DreamBooth). The pipeline picks
    the expert for each denoising step by itself. Raises InputError if it cannot be loaded, or was learned on other weights.
    """
    folder, variant = resolve_model(name, revision, variant, model_config)
    unet, others = load_tuned_unet(folder, variant, Path(tuned), dtype, device)
    vae, text_encoder = (load_frozen(folder, part, variant, others, dtype, device) for part in ("vae", "text_encoder"))
    return assemble_pipeline(folder, unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=load_tokenizer(folder))
