"""The methods whose memory and time `speed_memory.py` compares: call `load`, then `step` any number of times.

This project's step is the trainer's own. The others are written out as published, on models as the libraries load them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from train_zoodip import ZOAdam, candidate_losses
from trainers import gauss_newton
from zoodip.diffusion import Batch, draw_batch, load_model, load_scheduler, read_inputs, uniform_timesteps
from zoodip.files import read_json
from zoodip.folder import native_resolution
from zoodip.model import load_frozen
from zoodip.prompts import load_tokenizer
from zoodip.quantize import DTYPES, pack_weight, quantized_layer
from zoodip.subject import find_images, open_image, to_square

PLACEHOLDER = "<sks>"
N, MU, T_MIN, T_MAX = 2, 1e-3, 500, 900  # the paper's; a step costs the same at any mu


@dataclass(frozen=True)
class Task:
    """The input of every method."""

    model: Path  # folder in diffusers format
    variant: str | None  # of its weight files
    photographs: Path
    initializer_token: str
    mixed_precision: str
    device: torch.device
    tau: int = 128


class ThisProject:
    """`train_zoodip.py`: its own loading and step."""

    label, forwards, candidates_per_forward, compile, weights = "ZOODiP, this project", N + 1, None, False, "nf4"

    def __init__(self, task: Task):
        self.task = task

    def load(self) -> None:
        task = self.task
        inputs = read_inputs(
            train_data_dir=task.photographs,
            pretrained_model_name_or_path=str(task.model),
            variant=task.variant,
            placeholder_token=PLACEHOLDER,
            initializer_token=task.initializer_token,
        )
        self.model, self.data = load_model(
            inputs,
            quantization=self.weights,
            mixed_precision=task.mixed_precision,
            device=task.device,
            resolution=native_resolution(inputs.folder),
            candidates_per_forward=self.candidates_per_forward,
            compile=self.compile,
        )
        self.generator = torch.Generator().manual_seed(0)
        self.start_from(inputs.initial_token)

    def start_from(self, token: torch.Tensor) -> None:
        self.zo = ZOAdam(token, n=N, mu=MU, tau=self.task.tau)

    def batch(self) -> Batch:
        return draw_batch(self.data, 1, partial(uniform_timesteps, low=T_MIN, high=T_MAX), self.generator)

    def step(self) -> None:
        batch = self.batch()
        directions, candidates = self.zo.candidates(self.generator)
        self.zo.step(directions, candidate_losses(self.model, batch, candidates))


class OneByOne(ThisProject):
    label, candidates_per_forward = "the same, one candidate per forward", 1


class Int8(ThisProject):
    label, weights = "the same, INT8", "int8"


class NotQuantized(ThisProject):
    label, weights = "the same, not quantised", "none"


class Compiled(ThisProject):
    label, compile = "the same, --compile", True


class GaussNewton(ThisProject):
    """`trainers/gauss_newton.py`: its own step; the first one also takes the basis."""

    label, forwards, basis_size = "Gauss-Newton", 9, 16

    def start_from(self, token: torch.Tensor) -> None:
        rho = gauss_newton.RHO[self.task.mixed_precision]
        self.learner = gauss_newton.GaussNewton(token, directions=self.forwards - 1, rho=rho)

    def take_basis(self) -> None:
        gauss_newton.take_basis(self.learner, self.model, self.data, self.basis_size)

    @torch.inference_mode()
    def step(self) -> None:
        if not len(self.learner.weights):
            self.take_basis()
        batch = self.batch()
        mixtures, tokens = self.learner.candidates(self.generator)
        self.learner.step(mixtures, self.model.predict(batch, tokens), batch.target)


class GaussNewtonSplit(GaussNewton):
    label, candidates_per_forward = "the same, three candidates per forward", 3


class GaussNewtonBasis(GaussNewton):
    """Takes the basis instead of a step, as a run does a few times."""

    label, forwards = "one Gauss-Newton basis", 0

    def start_from(self, token: torch.Tensor) -> None:
        self.learner = gauss_newton.GaussNewton(token)

    def step(self) -> None:
        self.take_basis()


class Reference:
    """Base of the other methods: whole models as the libraries load them, and one training image."""

    def __init__(self, task: Task):
        self.task, self.device, self.dtype = task, task.device, DTYPES[task.mixed_precision]

    def from_pretrained(self, component: str) -> nn.Module:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        model_class = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)[component]
        variant = {} if self.task.variant is None else dict(variant=self.task.variant)
        dtype = {"dtype" if component == "text_encoder" else "torch_dtype": self.dtype}
        model = model_class.from_pretrained(self.task.model / component, **variant, **dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def text_length(self) -> int:
        return read_json(self.task.model / "text_encoder" / "config.json")["max_position_embeddings"]

    def load_inputs(self) -> None:
        """Load the tokenizer with the placeholder, the noise schedule, the photograph as pixels, and a prompt."""
        self.tokenizer = load_tokenizer(self.task.model, PLACEHOLDER, 1)
        self.scheduler = load_scheduler(self.task.model)
        photograph = open_image(find_images(self.task.photographs, "photos")[0])
        self.pixels = to_square(photograph, native_resolution(self.task.model), False)[:1].to(self.device, self.dtype)
        prompt = f"a photo of {PLACEHOLDER}"
        ids = self.tokenizer(prompt, padding="max_length", max_length=self.text_length(), return_tensors="pt").input_ids
        self.ids = ids.to(self.device)

    def draw(self, vae: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode the photograph again -> (noisy latents, timesteps, noise)."""
        with torch.no_grad():
            latents = vae.encode(self.pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(T_MIN, T_MAX, (1,), device=self.device)
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps, noise


class AuthorsLoop(Reference):
    """The authors' published loop, written plainly: the VAE in every step, n + 1 separate forwards, the token perturbed in place.

    INT8 weights are multiplied by their scale on use (as optimum-quanto does); the whole embedding table is kept.
    """

    label, weights, forwards = "authors' loop, INT8", "int8", N + 1

    def quantize(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                model.set_submodule(name, quantized_layer(module, pack_weight(module.weight.data, self.weights)))
        return model

    def load(self) -> None:
        self.load_inputs()
        text_encoder = self.from_pretrained("text_encoder")
        text_encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        self.vae, unet = self.from_pretrained("vae"), self.from_pretrained("unet")
        self.text_encoder, self.unet, self.vae = self.quantize(text_encoder), self.quantize(unet), self.quantize(self.vae)
        self.unet.to(memory_format=torch.channels_last)
        self.token = self.text_encoder.embeddings.token_embedding.weight.data[-1]  # a view of the table
        self.moments = torch.zeros_like(self.token), torch.zeros_like(self.token)
        self.count = 0

    @torch.no_grad()
    def loss(self, noisy: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        states = self.text_encoder(self.ids)[0].to(self.dtype)
        prediction = self.unet(noisy, timesteps, states).sample
        return nn.functional.mse_loss(prediction.float(), noise.float())

    @torch.no_grad()
    def perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        self.token.add_(scale * MU * torch.randn_like(self.token))

    @torch.no_grad()
    def step(self) -> None:
        batch, gradient = self.draw(self.vae), 0
        unperturbed = self.loss(*batch)
        for seed in np.random.randint(1_000_000_000, size=N).tolist():
            self.perturb(seed, 1)
            loss = self.loss(*batch)
            self.perturb(seed, -1)
            torch.manual_seed(seed)
            gradient = gradient + (loss - unperturbed) / MU * torch.randn_like(self.token)
        gradient = (gradient / (N * ((len(self.token) + N - 1) / N) ** 0.5)).to(self.token.dtype)
        m, v = self.moments
        self.count += 1
        m.mul_(0.9).add_(0.1 * gradient)
        v.mul_(0.999).add_(0.001 * gradient**2)
        self.token.sub_(5e-3 * m / (1 - 0.9**self.count) / ((v / (1 - 0.999**self.count)).sqrt() + 1e-3))


class AuthorsLoopFast(AuthorsLoop):
    label, weights = "authors' loop, with this project's NF4 layers", "nf4"


def linear4bit(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Replace every Linear of a model that bitsandbytes' own module supports with that module, in place."""
    import bitsandbytes as bnb

    options = dict(compress_statistics=True, quant_type="nf4")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.in_features % 64 == 0 and module.out_features % 32 == 0:
            bias = module.bias is not None
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias, dtype, device="meta", **options)
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **options)
            layer.bias = module.bias
            model.set_submodule(name, layer.to(device).eval())
    return model


class AuthorsLoopStock(AuthorsLoop):
    """4-bit weights as bitsandbytes offers them: only for Linear, through its own module."""

    label = "authors' loop, bitsandbytes' Linear4bit"

    def quantize(self, model: nn.Module) -> nn.Module:
        return linear4bit(model, self.dtype, self.device)


class GradientInversion(Reference):
    """Textual inversion as in diffusers' example, on this project's 4-bit layers: AdamW over the whole embedding table."""

    label, forwards, checkpointing, weights = "gradient textual inversion, NF4", 1, False, "nf4"

    def load(self) -> None:
        self.load_inputs()
        self.vae = self.from_pretrained("vae")
        self.text_encoder, self.unet = (
            load_frozen(self.task.model, component, self.task.variant, self.weights, self.dtype, self.device)
            for component in ("text_encoder", "unet")
        )
        embedding = self.text_encoder.embeddings.token_embedding
        self.table = nn.Parameter(torch.cat([embedding.weight, embedding.weight[:1]]).float())
        embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # the trained table takes its place
        self.original = self.table.detach().clone()
        self.optimizer = torch.optim.AdamW([self.table], lr=5e-4)

    def step(self) -> None:
        noisy, timesteps, noise = self.draw(self.vae)
        self.unet.disable_gradient_checkpointing()
        if self.checkpointing:
            self.unet.enable_gradient_checkpointing()
        override = {"embeddings.token_embedding.weight": self.table.to(self.dtype)}
        states = torch.func.functional_call(self.text_encoder, override, (self.ids,))[0]
        prediction = self.unet(noisy, timesteps, states).sample
        nn.functional.mse_loss(prediction.float(), noise.float()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[:-1] = self.original[:-1]


class GradientInversionCheckpointed(GradientInversion):
    label, checkpointing = "the same, with gradient checkpointing", True


class GradientInversionNotQuantized(GradientInversion):
    label, weights = "gradient textual inversion, not quantised", "none"


class BareForward(Reference):
    """The floor: one forward of n + 1 samples through the unquantised UNet, resident in 16 bits, and nothing else.

    Weights and activations are channels_last, like this project's: the memory format that the convolutions compute in.
    """

    label, forwards, layout = "floor: bare UNet forward, weights resident, channels_last", N + 1, torch.channels_last

    def load(self) -> None:
        self.unet = self.from_pretrained("unet").to(memory_format=self.layout)
        for parameter in self.unet.parameters():
            parameter.data = parameter.data.clone()  # out of the memory-mapped file: in huge pages, like everything else
        config, count, kind = self.unet.config, N + 1, dict(device=self.device, dtype=self.dtype)
        noisy = torch.randn(count, config.in_channels, config.sample_size, config.sample_size, **kind)
        self.noisy = noisy.to(memory_format=self.layout)
        self.states = torch.randn(count, self.text_length(), config.cross_attention_dim, **kind)
        self.timesteps = torch.full((count,), 700, device=self.device)

    @torch.inference_mode()
    def step(self) -> None:
        self.unet(self.noisy, self.timesteps, self.states, return_dict=False)


class BareForwardAsLoaded(BareForward):
    label, layout = "the same, in the order that the library loads", torch.contiguous_format


Method = ThisProject | AuthorsLoop | GradientInversion | BareForward
METHODS: dict[str, type[Method]] = {
    "zoodip": ThisProject,
    "zoodip_one": OneByOne,
    "zoodip_int8": Int8,
    "zoodip_none": NotQuantized,
    "zoodip_compiled": Compiled,
    "newton": GaussNewton,
    "newton_split": GaussNewtonSplit,
    "newton_basis": GaussNewtonBasis,
    "authors": AuthorsLoop,
    "authors_fast": AuthorsLoopFast,
    "authors_stock": AuthorsLoopStock,
    "ti": GradientInversion,
    "ti_checkpointed": GradientInversionCheckpointed,
    "ti_none": GradientInversionNotQuantized,
    "floor": BareForward,
    "floor_as_loaded": BareForwardAsLoaded,
}
