"""Frozen, quantised modules from a Stable Diffusion folder, read tensor by tensor, and pipelines made of them."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from zoodip.errors import DamagedModel, InputError, damaged_model
from zoodip.files import read_json
from zoodip.folder import WEIGHT_NAMES, choose_quantization, component_tensors, resolve_model
from zoodip.prompts import load_tokenizer
from zoodip.quantize import pack_weight, quantized_layer

if TYPE_CHECKING:  # diffusers and transformers take seconds to import
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from transformers import CLIPTextModel, CLIPTokenizer

MAX_LAYERS = 100  # consecutive layers; a damaged configuration with more would take hours to build
SMALL_UNET = 100_000_000  # parameters: the miniature has 11 million, Stable Diffusion v1.5 860
SCHEDULERS = {"pndm": "PNDMScheduler", "ddim": "DDIMScheduler", "dpmsolver++": "DPMSolverMultistepScheduler"}
VAE_ENCODER, VAE_DECODER = ("encoder.", "quant_conv."), ("decoder.", "post_quant_conv.")  # prefixes of parameter names


def load_frozen(
    folder: Path,
    component: str,
    variant: str | None,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device | str,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """UNet, text encoder or VAE from a diffusers folder, frozen, in eval mode, with Linear and Conv2d quantised.

    Tensors are read, quantised and dropped one by one, so that the 16-bit model never exists as a whole. A parameter whose
    name begins with an entry of `skip` is left empty. The UNet's conv_in and conv_out (0.003 % of SD v1.5's weights) stay in
    `dtype`: quantising them increases the loss more than quantising all the rest
    (benchmarks/README.md). Raises InputError if file and configuration do not match.
    """
    model, where = build_model(folder, component), folder / component
    if component == "unet":
        settle_threads(model, device)
    packed_weights: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in component_tensors(folder, component, variant):
        name = modern_name(name, component)
        module_name, _, leaf = name.rpartition(".")
        if name.endswith("position_ids"):
            continue  # a constant that older files contain
        if module_name.endswith(".weight"):  # written by --save_quantized
            packed = packed_weights.setdefault(module_name.removesuffix(".weight"), {})
            if not name.startswith(skip):
                packed[leaf] = tensor.to(device, copy=True)
            continue
        module = module_of(name, model, where)
        if name.startswith(skip):
            setattr(module, leaf, nn.Parameter(torch.empty(0), requires_grad=False))
            continue
        tensor = check_parameter(tensor, name, module, where).to(device)
        if quantization != "none" and leaf == "weight" and is_quantized(component, module_name, module):
            model.set_submodule(module_name, quantized_layer(module, pack_weight(tensor, quantization)))
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False))
    for module_name, packed in packed_weights.items():
        set_packed(model, module_name, packed, quantization, where)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise DamagedModel(where, f"the weights lack {missing[0]!r} and {len(missing) - 1} more that config.json describes")
    return model.to(device).eval().requires_grad_(False)


def settle_threads(unet: nn.Module, device: torch.device | str) -> None:
    """Use one thread for a small UNet on a CPU, unless OMP_NUM_THREADS is set.

    Its layers take so little time that threads mostly wait for each other: two threads were faster than one only on an idle
    machine, by a third, and 1.3 to 10 times slower beside another busy program (benchmarks/threads.md).
    """
    small = sum(parameter.numel() for parameter in unet.parameters()) < SMALL_UNET
    if small and torch.device(device).type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def set_packed(model: nn.Module, name: str, packed: dict[str, torch.Tensor], quantization: str, where: Path) -> None:
    """Put a module's packed weight in its place; without tensors, for a module that is skipped, an empty one.

    Raises InputError if it does not fit the module or has another quantization.
    """
    try:
        module = model.get_submodule(name)
        if not packed:
            module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
            return
        layer = quantized_layer(module, packed)
    except (AttributeError, KeyError, ValueError) as error:
        raise InputError(
            f"{where}: the packed weight of {name} does not fit config.json ({error}); "
            "write the folder again with --save_quantized"
        ) from None
    if quantization != layer.quantization:
        raise InputError(
            f"{where}: {name} is packed as {layer.quantization}, not {quantization}; write the folder again with --save_quantized"
        )
    model.set_submodule(name, layer)


def load_unet(
    folder: Path, variant: str | None, quantization: str, dtype: torch.dtype, device: torch.device | str
) -> UNet2DConditionModel:
    """The UNet, quantised."""
    return cast("UNet2DConditionModel", load_frozen(folder, "unet", variant, quantization, dtype, device))


def load_text_encoder(
    folder: Path, variant: str | None, quantization: str, dtype: torch.dtype, device: torch.device | str
) -> CLIPTextModel:
    """The text encoder without its token-embedding table: `Prompts` provides the rows that it needs."""
    table = ("embeddings.token_embedding.",)
    return cast("CLIPTextModel", load_frozen(folder, "text_encoder", variant, quantization, dtype, device, skip=table))


def load_vae_encoder(folder: Path, variant: str | None, device: torch.device | str) -> AutoencoderKL:
    """The VAE without its decoder, unquantised, fp32: it encodes the photographs once and is then freed."""
    return cast("AutoencoderKL", load_frozen(folder, "vae", variant, "none", torch.float32, device, skip=VAE_DECODER))


def load_vae_decoder(
    folder: Path, variant: str | None, quantization: str, dtype: torch.dtype, device: torch.device | str
) -> AutoencoderKL:
    """The VAE without its encoder, quantised, for drawing."""
    return cast("AutoencoderKL", load_frozen(folder, "vae", variant, quantization, dtype, device, skip=VAE_ENCODER))


def build_model(folder: Path, component: str) -> nn.Module:
    """The module that config.json describes. Its parameters are on the meta device: they have shapes but no memory."""
    from accelerate import init_empty_weights

    config = read_json(folder / component / "config.json")
    for key in ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers"):
        counts = config[key] if isinstance(config.get(key), list) else [config.get(key)]
        if any(isinstance(count, int) and count > MAX_LAYERS for count in counts):
            raise DamagedModel(folder / component / "config.json", f"{key} {config[key]!r} fits no Stable Diffusion")
    with damaged_model(folder / component), init_empty_weights():
        if component == "text_encoder":
            from transformers import CLIPTextConfig, CLIPTextModel

            return CLIPTextModel(CLIPTextConfig.from_pretrained(folder / component))
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        model_class = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component]
        return model_class.from_config(model_class.load_config(folder / component))


def modern_name(name: str, component: str) -> str:
    """A tensor's name in the installed libraries, given the name it was published under."""
    if component == "text_encoder":
        return name.removeprefix("text_model.")
    if component == "vae":
        for old, new in ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"):
            name = name.replace(f".{old}.", f".{new}.")
    return name


def module_of(parameter_name: str, model: nn.Module, where: Path) -> nn.Module:
    """The module that a parameter belongs to. Raises InputError if the model has no such parameter."""
    module_name, _, leaf = parameter_name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        module.get_parameter(leaf)
    except AttributeError:
        raise InputError(
            f"{where}: the weights hold {parameter_name!r}, which config.json does not describe; configuration and "
            "weights belong to different models"
        ) from None
    return module


def check_parameter(tensor: torch.Tensor, name: str, module: nn.Module, where: Path) -> torch.Tensor:
    """A parameter from a weight file, in its module's shape. Raises InputError if it does not fit or is not finite floats."""
    expected = module.get_parameter(name.rpartition(".")[2]).shape
    if tensor.shape == (*expected, 1, 1):
        tensor = tensor.view(expected)  # older VAEs keep attention matrices as 1 x 1 convolutions
    if tensor.shape != expected:
        raise InputError(
            f"{where}: {name} is {tuple(tensor.shape)}, but config.json says {tuple(expected)}; configuration and "
            "weights belong to different models"
        )
    if not tensor.is_floating_point() or not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise DamagedModel(where, f"{name} ({tensor.dtype}) is not finite floating-point data")
    return tensor


def is_quantized(component: str, name: str, module: nn.Module) -> bool:
    """Whether a module is one whose weight is packed: every Linear and Conv2d except the UNet's first and last."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) and not (component == "unet" and name in ("conv_in", "conv_out"))


def load_pipeline(
    name: str,
    quantization: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    model_config: str | None = None,
    tuned_scales: str | Path | None = None,
) -> StableDiffusionPipeline:
    """A pipeline whose UNet, text encoder and VAE are quantised exactly as in training, with the same default.

    `load_textual_inversion` works on it as on any other. With `tuned_scales`, it is a tuned model, in the bits in which it was
    tuned, whatever `quantization` is. Despite its name, `tuned_scales` is what any weight-tuning trainer leaves: a file of
    scales, LoRA (diffusers' names) or Kronecker factors, or DreamBooth's folder with unet/. Raises InputError if the model or the
    tuning cannot be loaded.
    """
    if tuned_scales is not None:
        from zoodip.tuned_files import load_tuned_pipeline

        return load_tuned_pipeline(name, tuned_scales, dtype, device, revision, variant, model_config)
    folder, variant = resolve_model(name, revision, variant, model_config)
    quantization = choose_quantization(folder, variant, quantization)
    components: dict[str, Any] = {}
    for component in WEIGHT_NAMES:
        components[component] = load_frozen(folder, component, variant, quantization, dtype, device)
    return assemble_pipeline(folder, **components, tokenizer=load_tokenizer(folder))


def build_scheduler(folder: Path, name: str) -> SchedulerMixin:
    """The scheduler `name` of SCHEDULERS with the folder's noise schedule and timestep spacing. Raises DamagedModel."""
    diffusers: Any = import_module("diffusers")
    pndm, kind = diffusers.PNDMScheduler, getattr(diffusers, SCHEDULERS[name])
    with damaged_model(folder / "scheduler"):
        # Via PNDM, the class that the folder names, so that what its file leaves out gets PNDM's defaults, not those of `kind`.
        return kind.from_config(pndm.from_pretrained(folder / "scheduler").config)


def assemble_pipeline(
    folder: Path,
    *,
    unet: nn.Module,
    vae: nn.Module,
    text_encoder: nn.Module | None = None,
    tokenizer: CLIPTokenizer | None = None,
    scheduler: str = "pndm",
) -> StableDiffusionPipeline:
    """A pipeline of loaded parts with the folder's noise schedule and a scheduler from `SCHEDULERS`. Raises DamagedModel.

    Without text encoder and tokenizer, it draws from embeddings.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    from zoodip.strips import decode_in_strips

    decode_in_strips(cast(Any, vae).decoder)
    parts: dict[str, Any] = dict(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    parts["scheduler"] = build_scheduler(folder, scheduler)
    parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**parts)
