"""What weight-tuning systems share: AdamW on an exact gradient, prior preservation, outputs.

A system is a subclass of `System` in a script of trainers/. Every such script then has the same form:

    tuning = prepare(SystemOfTheScript(...), flags, SETTINGS)     # check, resume, load: errors are reported first
    with tuning.run as run:
        for _ in run.steps(tuning.outputs):
            run.note(*tuning.step())                              # draw a batch, forward, backward, AdamW
    return run.finish()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from zoodip.arguments import flags_for, settings_of
from zoodip.diffusion import Batch, Data, TimestepSampler, draw_batch, evaluation_batches, merge_batches, timestep_sampler
from zoodip.errors import InputError
from zoodip.folder import native_resolution, packed_as
from zoodip.model import build_model
from zoodip.pictures import Drawer, cell_size, drawing_bar, picture_sheet
from zoodip.prior import PriorPictures
from zoodip.process import make_accelerator
from zoodip.quantize import default_precision, frozen_format
from zoodip.records import package_versions
from zoodip.run import Run
from zoodip.tuned_layers import Parameters, Shapes, num_parameters
from zoodip.tuned_model import TunedModel, TuningInputs, load_tuned_model, read_tuning_inputs

LOSS_SCALE = 1024.0  # for fp16 activations: a power of two that keeps their gradients from vanishing
PACKED = {"nf4": "NF4", "affine8": "8-bit integers", "affine4": "4-bit integers"}  # bases, in words
WEIGHT_DECAY, MAX_GRADIENT_NORM = 1e-2, 1.0  # as in the reference scripts


class System:
    """A weight-tuning system: what is trained, how it is put into the UNet, and what is saved."""

    name: str
    quantization: str  # of the UNet's weights: nf4, affine8, affine4 or none
    trains_unet = False  # whether the UNet's own weights are trained, and so kept in fp32
    remedy = "a smaller --learning_rate"  # what to try if the loss diverges
    files: tuple[str, ...]  # patterns of the files that it writes
    sample: TimestepSampler | None = None  # samples the system's own timesteps; None: as --timestep_sampling says

    def claim(self, inputs: TuningInputs, unet: nn.Module) -> None:
        """Check that what is written outside the run's folder can be; `unet` has no weights yet. Raises InputError."""

    def saved_bytes(self, shapes: Shapes) -> int:
        """Lower bound on the bytes in the files that `save` writes."""
        return torch.float32.itemsize * num_parameters(shapes)

    def shapes(self, unet: nn.Module) -> Shapes:
        """The trained tensors, from the architecture alone. Raises InputError if the flags do not fit it."""
        raise NotImplementedError

    def install(self, unet: nn.Module, generator: torch.Generator) -> Parameters:
        """Turn a loaded, frozen UNet into a tuned one that still computes the same -> the trained parameters, as in `shapes`."""
        raise NotImplementedError

    def options(self, name: str) -> dict:
        """AdamW's settings for a trained tensor, where they differ from --learning_rate and the reference's."""
        return {}

    def group(self, timestep: int) -> Hashable:
        """Timesteps of different groups cannot share a forward."""
        return None

    def save(
        self, folder: Path, inputs: TuningInputs, unet: nn.Module, parameters: Parameters, header: dict[str, str], suffix: str
    ) -> Path:
        """Write what is learned, under names that end in `suffix` -> the file or folder to report. Raises InputError.

        inputs: those of the run, with the base model's folder and variant as they were found.
        """
        raise NotImplementedError


# ----------------------------------------------------------------------------------------------------- the trainer


class WeightTuner:
    """The trained parameters, fp32, and AdamW on their exact gradients, clipped to a norm of 1.

    Before a UNet is loaded, it knows only the parameters' names and shapes, so that a checkpoint can be checked early.
    """

    def __init__(self, system: System, shapes: Shapes, learning_rate: float, scale: float = 1.0):
        """scale: loss scale of the backward pass, for gradients of fp16 activations."""
        self.system, self.shapes, self.learning_rate, self.scale = system, shapes, learning_rate, scale
        self.remedy, self.parameters, self.resumed = system.remedy, {}, None

    def start(self, parameters: Parameters) -> None:
        """Take the parameters of the loaded UNet, and the state of a checkpoint if there is one."""
        found = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        assert found == self.shapes, "what is installed is not what the architecture promised"
        self.parameters = parameters
        groups = [{"params": [parameter], "lr": self.learning_rate, **self.system.options(name)}
                  for name, parameter in parameters.items()]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True)
        for parameter in parameters.values():
            self.optimizer.state[parameter] = dict(
                step=torch.zeros((), device=parameter.device),
                exp_avg=torch.zeros_like(parameter, memory_format=torch.preserve_format),
                exp_avg_sq=torch.zeros_like(parameter, memory_format=torch.preserve_format),
            )
        if self.resumed is not None:
            self.load_state_dict(self.resumed)
            self.resumed = None

    def step(self, model: TunedModel, batch: Batch, class_batch: Batch | None, prior_weight: float) -> tuple[float | None, int]:
        """One update -> (the loss, forwards); the loss is None, and nothing is updated, if a gradient is not finite.

        The loss is the mean over photographs plus prior_weight times the mean over class pictures: two separate means.
        """
        parts = [(batch, 1.0)] if class_batch is None else [(batch, 1.0), (class_batch, prior_weight)]
        whole = merge_batches([part for part, _ in parts], len(parts))[0]
        weights = torch.cat([torch.full((len(part.timesteps),), weight / len(part.timesteps)) for part, weight in parts])
        self.optimizer.zero_grad(set_to_none=True)
        groups: dict[Hashable, list[int]] = {}
        for i, timestep in enumerate(whole.timesteps.tolist()):
            groups.setdefault(self.system.group(timestep), []).append(i)
        total = 0.0
        for rows in groups.values():  # each backward before the next forward: less memory
            some = Batch(*(tensor[rows] for tensor in whole))
            prediction = model.predict(some)
            errors = (prediction - some.target.to(prediction.device)).square().flatten(1).mean(1)
            loss = (errors * weights[rows].to(errors.device)).sum()
            (loss * self.scale).backward()
            total += loss.item()
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if self.scale != 1.0:
            for gradient in gradients:
                gradient.div_(self.scale)
        if not torch.isfinite(torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRADIENT_NORM)):
            return None, len(groups)
        self.optimizer.step()
        return total, len(groups)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything the next steps depend on, except the generator."""
        if not self.parameters:  # only shapes are known
            kinds = dict(value=None, exp_avg=None, exp_avg_sq=None, step=())
            return {f"{kind}.{name}": torch.empty(shape if own is None else own, device="meta")
                    for name, shape in self.shapes.items() for kind, own in kinds.items()}  # fmt: skip
        state = {f"value.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            state |= {f"{kind}.{name}": tensor for kind, tensor in self.optimizer.state[parameter].items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if not self.parameters:
            self.resumed = state
            return
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"value.{name}"])
            for kind, tensor in self.optimizer.state[parameter].items():
                tensor.copy_(state[f"{kind}.{name}"])


# ----------------------------------------------------------------------------------------------------- the outputs


class TunedOutputs:
    """What a run that tunes weights evaluates, draws and saves."""

    def __init__(
        self,
        system: System,
        tuner: WeightTuner,
        inputs: TuningInputs,
        model: TunedModel,
        data: Data,
        settings: dict,
        *,
        t_min: int,
        t_max: int,
        eval_steps: int,
        num_eval_samples: int,
        num_validation_images: int,
        validation_prompt: str | None,
        validation_guidance: float,
        final_picture: bool = False,
        class_data: Data | None = None,
    ):
        self.system, self.tuner, self.inputs, self.model, self.settings = system, tuner, inputs, model, settings
        self.files, self.saved, self.guidance, self.step = system.files, Path(), validation_guidance, 0

        def fixed_set(data: Data) -> list[Batch]:
            return evaluation_batches(data, num_eval_samples, t_min, t_max) if eval_steps else []

        self.fixed_sets = {"eval_loss": fixed_set(data)}
        if class_data is not None:  # the two losses separately: their sum says nothing about either
            self.fixed_sets["class_eval_loss"] = fixed_set(class_data)
        self.seeds = [settings["seed"] + i for i in range(num_validation_images)]
        self.draws_before = validation_prompt is not None or final_picture
        if self.draws_before:
            self.drawer()  # load and release: a folder that cannot draw is refused now, and training keeps the memory

    def drawer(self) -> Drawer:
        """Raises InputError if the folder's decoder or scheduler is damaged."""
        inputs, others = self.inputs, frozen_format(self.system.quantization)
        return Drawer(self.model, inputs.folder, inputs.variant, others, self.settings["resolution"], guidance=self.guidance)

    def evaluate(self) -> dict[str, float]:
        """Columns of the curve: the loss on the fixed set and, with prior preservation, on one of class pictures."""
        return {name: self.model.mean_loss(batches) for name, batches in self.fixed_sets.items()}

    def draw(self, step: int, final: bool, stopped: Callable[[], bool]) -> Iterator[tuple[str, Image.Image]]:
        """(file name, picture) for the prompt, drawn by the untuned model at step 0, and by the tuned one after that.

        The noise is the same every time. Raises Interrupted between two denoising steps once `stopped()`.
        """
        if not self.draws_before:
            return
        drawer, states = self.drawer(), self.model.states[[self.inputs.picture_row, self.inputs.empty_row]]
        prompt, steps, cell = self.inputs.picture_prompt, len(self.seeds) * drawer.forwards, cell_size(drawer.resolution)
        with drawing_bar(prompt, steps, stopped) as after_step, self.model.precision():
            pictures = list(drawer.draw_states(states, [(0, seed) for seed in self.seeds], after_step))
        caption = f"{prompt}, after {step} steps"
        yield f"validation-{step}.png", picture_sheet([(pictures, caption)], cell=cell, gap=0)

    def check(self, step: int) -> str | None:
        """No warnings: steps with a non-finite gradient are skipped, so the parameters stay finite."""

    def result(self, folder: Path) -> str:
        """The beginning of a run's last line: the file or folder, and what is in it."""
        return f"{self.saved}: {self.settings['identifier']} {self.settings['class_word']}, by {self.system.name},"

    def guide(self) -> dict[str, str]:
        """{name: what it is} for the final files besides the one in `result`."""
        prompt = repr(self.inputs.picture_prompt)
        pictures = {"validation-0.png": f"{prompt} before training", f"validation-{self.step}.png": f"{prompt} after it"}
        return pictures if self.draws_before else {}

    def header(self, step: int) -> dict[str, str]:
        """The header of every file that is written. The same run gives the same header."""
        header = {
            "format": "pt",
            "zoodip.method": self.system.name,
            "zoodip.base_model": str(self.settings["pretrained_model_name_or_path"]),
            "zoodip.model_digest": self.inputs.digest,
            "zoodip.base_quantization": self.system.quantization,
            "zoodip.step": str(step),
            "zoodip.settings": json.dumps(self.settings, sort_keys=True),
            "zoodip.versions": json.dumps(package_versions(), sort_keys=True),
        }
        if self.system.quantization in PACKED:
            header["zoodip.note"] = (
                f"learned on weights packed as {PACKED[self.system.quantization]}: on 16-bit weights it only approximates what "
                "was trained; do not merge it and pack the result again, which would be a different model"
            )
        return header

    def save(self, folder: Path, step: int, final: bool) -> None:
        """Write what has been learned so far. Raises InputError."""
        self.step = step
        suffix = "" if final else f"-steps-{step}"
        self.saved = self.system.save(folder, self.inputs, self.model.unet, self.tuner.parameters, self.header(step), suffix)


# ----------------------------------------------------------------------------------------------------- the whole


@dataclass
class Tuning:
    """A run of a system, ready to step."""

    run: Run
    outputs: TunedOutputs
    tuner: WeightTuner
    model: TunedModel
    data: Data
    class_data: Data | None
    sample: TimestepSampler
    generator: torch.Generator
    batch_size: int
    prior_weight: float

    def step(self) -> tuple[float | None, int]:
        """Draw a batch of photographs, and one of class pictures if there are any, and update -> (loss or None, forwards)."""
        batch = draw_batch(self.data, self.batch_size, self.sample, self.generator)
        class_batch = None
        if self.class_data is not None:
            class_batch = draw_batch(self.class_data, self.batch_size, self.sample, self.generator)
        return self.tuner.step(self.model, batch, class_batch, self.prior_weight)


def prepare(system: System, flags: dict, setting_names: list[str]) -> Tuning:
    """Check, resume, load: cheapest checks first, so that errors are reported before a model is loaded. Raises InputError.

    flags: {name: value}, those of `arguments.add_tuning_flags`; setting_names: which of them affect the result.
    """
    inputs = read_tuning_inputs(**flags_for(read_tuning_inputs, flags))
    refuse_other_packing(system, inputs)
    accelerator = make_accelerator(1, **flags_for(make_accelerator, flags))
    device = accelerator.device
    flags["mixed_precision"] = flags["mixed_precision"] or default_precision(device)
    flags["resolution"] = flags["resolution"] or native_resolution(inputs.folder)
    settings = {"method": system.name, **settings_of(flags, setting_names)}
    prior = None
    if flags["prior_preservation"]:
        prior = prior_pictures(inputs, system.quantization, **flags_for(prior_pictures, flags))

    generator = torch.Generator().manual_seed(flags["seed"])
    scale = LOSS_SCALE if flags["mixed_precision"] == "fp16" else 1.0
    architecture = build_model(inputs.folder, "unet")
    tuner = WeightTuner(system, system.shapes(architecture), flags["learning_rate"], scale)
    run = Run(tuner, generator, accelerator, settings, fingerprint(inputs, prior), **flags_for(Run, flags))
    run.resume(flags["resume_from_checkpoint"])
    system.claim(inputs, architecture)
    run.claim(inputs.folder, system.saved_bytes(tuner.shapes))
    model, data, class_data = load_tuned_model(
        inputs, system.quantization, system.trains_unet, prior, device, **flags_for(load_tuned_model, flags)
    )
    run.fingerprint = fingerprint(inputs, prior)  # with the class pictures that have been drawn
    tuner.start(system.install(model.unet, torch.Generator().manual_seed(flags["seed"])))
    if flags["gradient_checkpointing"]:
        model.unet.enable_gradient_checkpointing()
    outputs = TunedOutputs(system, tuner, inputs, model, data, settings, class_data=class_data, **flags_for(TunedOutputs, flags))
    sample = system.sample or timestep_sampler(data, **flags_for(timestep_sampler, flags))
    batch_size, prior_weight = flags["train_batch_size"], flags["prior_loss_weight"]
    return Tuning(run, outputs, tuner, model, data, class_data, sample, generator, batch_size, prior_weight)


def refuse_other_packing(system: System, inputs: TuningInputs) -> None:
    """Raises InputError if --save_quantized has packed the model in another format than the system's."""
    packed = packed_as(inputs.folder, inputs.variant)
    if packed not in (None, system.quantization):
        needed = PACKED.get(system.quantization, "unpacked weights")
        raise InputError(f"{inputs.folder}: its weights are packed as {packed}, but {system.name} needs {needed}; give the model "
                         "that it was made from")  # fmt: skip


def fingerprint(inputs: TuningInputs, prior: PriorPictures | None) -> dict[str, str]:
    """{what: SHA-256}: a run can be resumed only if these are unchanged."""
    return inputs.fingerprint() | ({} if prior is None else {"class pictures": prior.digest()})


def prior_pictures(
    inputs: TuningInputs,
    quantization: str,
    *,
    class_word: str,
    num_class_images: int,
    class_data_dir: str | None,
    output_dir: str,
    resolution: int,
    center_crop: bool,
) -> PriorPictures:
    """The class pictures that this run's untuned model draws, or has drawn. Raises InputError."""
    folder = Path(class_data_dir or Path(output_dir) / "class_images")
    made_by = dict(model=inputs.digest, quantization=quantization, prompt=f"a photo of {class_word}",
                   resolution=str(resolution), center_crop=str(center_crop))  # fmt: skip
    return PriorPictures(folder, num_class_images, made_by)
