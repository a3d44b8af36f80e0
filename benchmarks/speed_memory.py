#!/usr/bin/env python
"""Memory and time of a training step, against the authors' loop, gradient textual inversion, and the bare forward.

    python benchmarks/speed_memory.py                    # the miniature, and a model of Stable Diffusion v1.5's shape
    python benchmarks/speed_memory.py --worlds miniature
    python benchmarks/speed_memory.py --device cuda

Memory: each method lives its whole life (load, encode, a few steps, save) in a process of its own, stage by stage. On a
CPU twice: once for resident memory, once under torch's profiler, which sees every allocation and release of a tensor and of
the operators' workspaces; their running sum is exact and the same in every run. On CUDA: the allocator's counters and
nvidia-smi. Time: all methods in one process, one step of each in turn, medians and ratios over the rounds.
Writes benchmarks/speed_memory.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import median

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as train_zoodip.py: it is for all methods alike
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # likewise

import numpy as np
import torch
from common import DTYPES, ROOT, cli, table, write_report, zoodip
from sd15_shape import build_folder
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

SETTINGS = {  # per world: flags of train_zoodip.py, the precisions to measure, steps per turn of the timing
    "miniature": (["--pretrained_model_name_or_path", str(ROOT / "miniature" / "model"), "--initializer_token", "critter",
                   "--tau", "43"], ["fp32", "bf16"], 10),
    "sd15": (["--variant", "fp16", "--initializer_token", "dog"], ["bf16"], 1),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--worlds", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--precisions", nargs="+", default=None, choices=sorted(DTYPES),
        help="of activations; default: bf16, for the miniature fp32 too; fp16 on CUDA")
    add("--methods", nargs="+", default=[name for name in METHODS if name != "zoodip_compiled"], choices=list(METHODS))
    add("--folder", type=Path, default=None,
        help="the SD v1.5-shaped model: written here, or used if it is there; default: a temporary one")
    add("--photos", type=Path, default=ROOT / "dataset" / "furmix", help="folder of photographs")
    add("--rounds", type=int, default=5, help="timed turns of every method, after one that does not count")
    add("--memory_steps", type=int, default=2, help="steps in the runs that measure memory")
    add("--skip_memory", action="store_true", help="time only")
    add("--skip_time", action="store_true", help="memory only")
    add("--output", type=Path, default=ROOT / "benchmarks", help="folder for speed_memory.json and .md")
    add("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def training_arguments(world: str, precision: str, folder: str, args: argparse.Namespace, *extra: str) -> argparse.Namespace:
    """The command line of the run that is measured."""
    flags = [*SETTINGS[world][0], "--train_data_dir", str(args.photos), "--mixed_precision", precision, "--eval_steps", "0"]
    if world == "sd15":
        flags += ["--pretrained_model_name_or_path", folder]
    return zoodip.parse_args([*flags, *(["--cpu"] if args.device == "cpu" else []), *extra])


# ----------------------------------------------------------------------------------------------------- the methods


class ThisProject:
    """`train_zoodip.py`: its loading and the body of its loop."""

    label, extra, forwards = "ZOODiP, this project", (), 3

    def __init__(self, settings: argparse.Namespace, device: str):
        self.args, self.device = settings, torch.device(device)

    def load(self) -> None:
        self.inputs = zoodip.read_inputs(self.args)
        zoodip.resolve_defaults(self.args, self.inputs.folder, self.device)
        self.model, self.data = zoodip.load_model(self.args, self.inputs, self.device)
        self.zo = zoodip.ZOAdam(self.inputs.initial_token, self.args)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        data = self.data
        batch = zoodip.draw_batch(data.latents, data.choices, data.prompts, data.scheduler, self.args, self.generator)
        directions, candidates = self.zo.candidates(self.generator)
        self.zo.step(directions, self.model.losses(batch, candidates))


class OneByOne(ThisProject):
    label, extra = "the same, one candidate per forward", ("--candidates_per_forward", "1")


class Compiled(ThisProject):
    label, extra = "the same, --compile", ("--compile",)


class Reference:
    """What the other methods share: models as the libraries load them, whole, and one training image."""

    def __init__(self, settings: argparse.Namespace, device: str):
        self.args, self.device, self.dtype = settings, torch.device(device), DTYPES[settings.mixed_precision]

    def from_pretrained(self, part: str) -> nn.Module:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        model_class = dict(unet=UNet2DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)[part]
        variant = {} if self.args.variant is None else dict(variant=self.args.variant)
        dtype = {"dtype" if part == "text_encoder" else "torch_dtype": self.dtype}
        model = model_class.from_pretrained(Path(self.args.pretrained_model_name_or_path) / part, **variant, **dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def load_inputs(self) -> None:
        """Tokenizer with the placeholder, schedule, the photograph as pixels, and a prompt."""
        from diffusers import DDPMScheduler

        folder = zoodip.find_model_folder(self.args.pretrained_model_name_or_path, None, self.args.variant)
        zoodip.resolve_defaults(self.args, folder, self.device)
        self.tokenizer = zoodip.load_tokenizer(folder, "<sks>", 1)
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        path = zoodip.find_images(self.args.train_data_dir)[0]
        self.pixels = zoodip.to_square(zoodip.open_image(path), self.args.resolution, False)[:1].to(self.device, self.dtype)
        length = zoodip.read_json(folder / "text_encoder" / "config.json")["max_position_embeddings"]
        ids = self.tokenizer("a photo of <sks>", padding="max_length", max_length=length, return_tensors="pt").input_ids
        self.ids = ids.to(self.device)

    def draw(self, vae: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps, noise: the photograph encoded anew."""
        with torch.no_grad():
            latents = vae.encode(self.pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(500, 900, (1,), device=self.device)
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps, noise


class AuthorsLoop(Reference):
    """The authors' published loop, plainly: VAE in every step, n + 1 separate forwards, the token perturbed in place.

    INT8 weights are multiplied by their scale where they are used (as optimum-quanto does); the whole embedding table is there.
    """

    label, weights, forwards = "authors' loop, INT8", "int8", 3

    def quantize(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                packed = zoodip.pack_weight(module.weight.data, self.weights)
                model.set_submodule(name, zoodip.QuantizedLayer(module, packed, self.dtype))
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
        self.token.add_(scale * 1e-3 * torch.randn_like(self.token))

    @torch.no_grad()
    def step(self) -> None:
        batch, gradient, n = self.draw(self.vae), 0, self.args.n
        unperturbed = self.loss(*batch)
        for seed in np.random.randint(1_000_000_000, size=n).tolist():
            self.perturb(seed, 1)
            loss = self.loss(*batch)
            self.perturb(seed, -1)
            torch.manual_seed(seed)
            gradient = gradient + (loss - unperturbed) / 1e-3 * torch.randn_like(self.token)
        gradient = (gradient / (n * ((len(self.token) + n - 1) / n) ** 0.5)).to(self.token.dtype)
        m, v = self.moments
        self.count += 1
        m.mul_(0.9).add_(0.1 * gradient)
        v.mul_(0.999).add_(0.001 * gradient**2)
        self.token.sub_(5e-3 * m / (1 - 0.9**self.count) / ((v / (1 - 0.999**self.count)).sqrt() + 1e-3))


class AuthorsLoopFast(AuthorsLoop):
    label, weights = "authors' loop, with this project's NF4 layers", "nf4"


class AuthorsLoopStock(AuthorsLoop):
    """4 bits as bitsandbytes offers them: Linear alone, through its own module."""

    label = "authors' loop, bitsandbytes' Linear4bit"

    def quantize(self, model: nn.Module) -> nn.Module:
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module.in_features % 64 == 0 and module.out_features % 32 == 0:
                layer = bnb.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, self.dtype,
                                          compress_statistics=True, quant_type="nf4", device="meta")
                layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4",
                                                 compress_statistics=True)
                layer.bias = module.bias
                model.set_submodule(name, layer.to(self.device).eval())
        return model


class GradientInversion(Reference):
    """Textual inversion as diffusers' example trains it, on this project's 4-bit layers: the whole table through AdamW."""

    label, forwards, checkpointing = "gradient textual inversion, NF4", 1, False

    def load(self) -> None:
        self.load_inputs()
        folder, variant = Path(self.args.pretrained_model_name_or_path), self.args.variant
        self.vae = self.from_pretrained("vae")
        self.text_encoder, self.unet = (zoodip.load_frozen(folder, part, variant, "nf4", self.dtype, self.device)
                                        for part in ("text_encoder", "unet"))
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


class BareForward(Reference):
    """The floor: one forward of n + 1 samples through the unquantised UNet, resident in 16 bits, and nothing else."""

    label, forwards = "floor: bare UNet forward, weights resident", 3

    def load(self) -> None:
        self.unet = self.from_pretrained("unet")
        config, count, kind = self.unet.config, self.args.n + 1, dict(device=self.device, dtype=self.dtype)
        text_config = zoodip.read_json(Path(self.args.pretrained_model_name_or_path) / "text_encoder" / "config.json")
        self.noisy = torch.randn(count, config.in_channels, config.sample_size, config.sample_size, **kind)
        self.states = torch.randn(count, text_config["max_position_embeddings"], config.cross_attention_dim, **kind)
        self.timesteps = torch.full((count,), 700, device=self.device)

    @torch.inference_mode()
    def step(self) -> None:
        self.unet(self.noisy, self.timesteps, self.states, return_dict=False)


METHODS = {
    "zoodip": ThisProject, "zoodip_one": OneByOne, "zoodip_compiled": Compiled, "authors": AuthorsLoop,
    "authors_fast": AuthorsLoopFast, "authors_stock": AuthorsLoopStock, "ti": GradientInversion,
    "ti_checkpointed": GradientInversionCheckpointed, "floor": BareForward,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- memory


class Stages:
    """Names what a process is doing, and keeps seconds and peak memory of each stage. Stages may nest; inner ones win."""

    def __init__(self, device: str):
        self.device, self.open, self.found = device, [], {}
        self.baseline = self.peak()

    def peak(self) -> dict[str, float]:
        """Bytes, since `reset`."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
            rows = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
            used = [int(row.split(",")[1]) << 20 for row in rows if row.split(",")[0].strip() == str(os.getpid())]
            return dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved(),
                        nvidia_smi=sum(used))
        lines = Path("/proc/self/status").read_text().splitlines()
        return dict(rss=next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def note(self) -> None:
        """File the peak so far under the innermost open stage, and begin to measure anew."""
        if self.open:
            stage = self.found.setdefault(self.open[-1], {})
            for name, value in self.peak().items():
                stage[name] = max(stage.get(name, 0), value - (self.baseline[name] if name == "rss" else 0))
        self.reset()

    @contextmanager
    def __call__(self, name: str):
        self.note()
        self.open.append(name)
        started = time.perf_counter()
        with record_function(f"stage:{name}"):
            yield
        self.note()
        self.open.pop()
        self.found[name]["seconds"] = self.found[name].get("seconds", 0) + time.perf_counter() - started


def run_script(settings: argparse.Namespace, stages: Stages, steps: int) -> object:
    """`train_zoodip.main`, its stages marked -> (FrozenModel, Data), as they stood at the end."""
    kept = []

    def mark(owner: object, name: str, stage_of) -> None:
        function = getattr(owner, name)

        def marked(*args, **kwargs):
            with stages(stage_of(args)):
                return function(*args, **kwargs)

        setattr(owner, name, marked)

    load_model = zoodip.load_model

    def load_and_keep(*args):
        kept.append(load_model(*args))
        for part, module in (("UNet", kept[0][0].unet), ("text encoder", kept[0][0].text_encoder)):
            name_modules(part, module)
        return kept[0]

    zoodip.load_model = load_and_keep
    mark(zoodip, "load_frozen", lambda args: "encode" if args[1] == "vae" else "load")
    mark(zoodip, "encode_images", lambda args: "encode")
    mark(zoodip, "train", lambda args: "train")
    for name in ("embedding", "checkpoint", "run"):
        mark(zoodip.Recorder, name, lambda args: "save")
    with tempfile.TemporaryDirectory() as output:
        settings.output_dir, settings.max_train_steps = output, steps
        zoodip.main(settings)
    return kept[0]


def name_modules(part: str, model: nn.Module) -> None:
    """Have the profiler know which layer an allocation is made in."""
    open_ranges = []

    def enter(module: nn.Module, args: tuple, name: str) -> None:
        open_ranges.append(record_function(f"layer:{part}.{name}"))
        open_ranges[-1].__enter__()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: enter(module, args, name))
        module.register_forward_hook(lambda *_: open_ranges.pop().__exit__(None, None, None))


def run_method(name: str, settings: argparse.Namespace, args: argparse.Namespace, stages: Stages) -> object:
    """The whole life of a method; the model it leaves, for `persistent_tensors`."""
    if issubclass(METHODS[name], ThisProject):
        return run_script(settings, stages, args.memory_steps)
    method = METHODS[name](settings, args.device)
    with stages("load"):
        method.load()
    with stages("train"):
        for _ in range(args.memory_steps):
            method.step()
    return method


def persistent_tensors(model: zoodip.FrozenModel, data: zoodip.Data) -> dict[int, str]:
    """Address of each tensor that lives as long as the run -> what it is."""
    found = {}

    def add(tensor: torch.Tensor, what: str) -> None:
        if tensor.numel():
            found[tensor.untyped_storage().data_ptr()] = what

    for part, module in (("UNet", model.unet), ("text encoder", model.text_encoder)):
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            leaf = name.rpartition(".")[2]
            kinds = {"nf4": "packed weights", "int8": "packed weights", "scale": "scales"}
            what = kinds.get(leaf, "scales" if "absmax" in leaf else "biases, norms, what else is not packed")
            add(tensor, f"{part}: {what}")
    for tensor in (model.rows, data.latents, data.prompts.ids, data.prompts.rows):
        add(tensor, "token rows of the prompts, latents")
    return found


def count_bytes(recorded: profile, settings: argparse.Namespace, persistent: dict[int, str]) -> dict:
    """Peak of the sum of live allocations, per stage, and what the overall peak is made of, from torch's memory events.

    Memory-mapped weight files, which the profiler also reports, are left out: they are the page cache's.
    """
    folder = Path(settings.pretrained_model_name_or_path)
    mapped = set()
    for path in folder.glob("*/*.safetensors"):
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        mapped |= {path.stat().st_size, path.stat().st_size - header - 8}
    events, ranges = [], []

    def walk(event, path: tuple[str, ...]) -> None:
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation":
            fields = event.extra_fields
            if abs(fields.alloc_size) not in mapped:
                events.append((event.start_time_ns, fields.ptr, fields.alloc_size, path))
        if event.name.startswith("stage:"):
            ranges.append((event.start_time_ns, event.end_time_ns, event.name.removeprefix("stage:")))
        for child in event.children:
            walk(child, (*path, event.name))

    for event in recorded.profiler.kineto_results.experimental_event_tree():
        walk(event, ())
    live, total, peaks, at_peak = {}, 0, Counter(), {}
    for moment, address, size, path in sorted(events, key=lambda event: event[0]):
        if size > 0:
            live[address] = (size, path)
            total += size
        elif address in live:  # else it is older than the recording
            total -= live.pop(address)[0]
        around = [(end - start, name) for start, end, name in ranges if start <= moment <= end]
        stage = min(around)[1] if around else "start"
        if total > max(peaks.values(), default=0):
            at_peak = dict(live)
        peaks[stage] = max(peaks[stage], total)
    items = Counter()
    for address, (size, path) in at_peak.items():
        layer = next((name.removeprefix("layer:") for name in reversed(path) if name.startswith("layer:")), None)
        what = persistent.get(address)
        if what is None:
            what = f"{layer}: {path[-1].removeprefix('aten::')}" if layer else "other"
        items[what] += size
    return dict(peaks=peaks, items=dict(items.most_common()))


def child(args: argparse.Namespace) -> None:
    """One method, one way of counting; the result as the last line of output."""
    name, count = args.child
    world, precision = args.worlds[0], args.precisions[0]
    settings = training_arguments(world, precision, str(args.folder), args, *getattr(METHODS[name], "extra", ()))
    import bitsandbytes  # noqa: F401  everything that any method imports belongs to the interpreter's share
    import diffusers  # noqa: F401
    from accelerate import Accelerator  # noqa: F401
    from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    torch.randn(8, 8, device=args.device) @ torch.randn(8, 8, device=args.device)
    stages = Stages(args.device)
    if count == "bytes":
        sys.setrecursionlimit(10_000)  # the tree of events is as deep as the calls
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            left = run_method(name, settings, args, stages)
        persistent = persistent_tensors(*left) if isinstance(left, tuple) else {}
        result = count_bytes(recorded, settings, persistent)
    else:
        run_method(name, settings, args, stages)
        result = dict(baseline=stages.baseline, stages=stages.found)
    print(json.dumps(result))


def measure_memory(world: str, precision: str, args: argparse.Namespace) -> dict:
    """{method: {"rss" or "cuda": ..., "bytes": ...}}"""
    results = {}
    for name in args.methods:
        results[name] = {}
        for count in ["cuda"] if args.device == "cuda" else ["rss", "bytes"]:
            command = [sys.executable, __file__, "--child", name, count, "--worlds", world, "--precisions", precision, "--device",
                       args.device, "--folder", str(args.folder), "--photos", str(args.photos), "--memory_steps",
                       str(args.memory_steps)]
            run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if run.returncode:
                results[name][count] = dict(error=run.stderr.strip().splitlines()[-1])
            else:
                results[name][count] = json.loads(run.stdout.splitlines()[-1])
            print(f"{world} {precision} {name} {count}: {json.dumps(results[name][count])[:300]}", file=sys.stderr, flush=True)
    return results


# ----------------------------------------------------------------------------------------------------- time


def measure_time(world: str, precision: str, args: argparse.Namespace) -> dict:
    """{method: seconds a step, one per round}. Methods take turns, so that what disturbs the machine disturbs all."""
    methods, seconds = {}, {}
    for name in args.methods:
        settings = training_arguments(world, precision, str(args.folder), args, *getattr(METHODS[name], "extra", ()))
        methods[name] = METHODS[name](settings, args.device)
        methods[name].load()
    count = SETTINGS[world][2]
    for turn in range(-1, args.rounds):
        for name, method in methods.items():
            if args.device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(count):
                method.step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds.setdefault(name, []).append((time.perf_counter() - started) / count)
        print(f"{world} {precision} round {turn}:", {name: round(each[-1], 4) for name, each in seconds.items()}, file=sys.stderr)
    return seconds


@torch.no_grad()
def byte_floor(world: str, precision: str, args: argparse.Namespace) -> dict:
    """Packed weights, and the largest input plus output of any one layer at n + 1 samples: no loop can do with less."""
    settings = training_arguments(world, precision, str(args.folder), args)
    method = ThisProject(settings, args.device)
    method.load()
    packed = sum(tensor.nbytes for part in (method.model.unet, method.model.text_encoder)
                 for tensor in [*part.parameters(), *part.buffers()])
    largest = [0, ""]

    def look(name, module, inputs, output):
        size = sum(each.nbytes for each in [*inputs, output] if isinstance(each, torch.Tensor))
        if size > largest[0]:
            largest[:] = size, name

    for name, module in method.model.unet.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output, name=name: look(name, module, inputs, output))
    method.step()
    return dict(packed=packed, activations=largest[0], layer=largest[1])


# ----------------------------------------------------------------------------------------------------- the report


def gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.3f}"


def markdown_of(results: dict, args: argparse.Namespace) -> str:
    text = []
    for key, found in results.items():
        world, precision = key.split()
        title = {"miniature": "The miniature", "sd15": "Stable Diffusion v1.5's shape, 512 x 512"}[world]
        text.append(f"\n## {title}, activations in {precision}\n\nn = 2: three candidates a step.\n")
        if "time" in found:
            floor = found["time"].get("floor")
            ours = found["time"].get("zoodip")
            rows = []
            for name, seconds in found["time"].items():
                ratios = [f"{median(a / b for a, b in zip(seconds, other, strict=True)):.2f}" if other else ""
                          for other in (floor, ours)]
                rows.append([METHODS[name].label, f"{median(seconds):.4g}", f"{min(seconds):.4g} to {max(seconds):.4g}", *ratios,
                             f"{METHODS[name].forwards / median(seconds):.3g}"])
            text.append(table(["method", "seconds a step (median)", "range", "of the floor", "of this project",
                               "UNet samples forward/s"], rows))
            text.append(f"\n{args.rounds} rounds; ratios are medians over the rounds.\n")
        if "memory" in found and args.device == "cpu":
            rows = []
            for name, counts in found["memory"].items():
                peaks, stages = counts["bytes"].get("peaks", {}), counts["rss"].get("stages", {})
                row = [METHODS[name].label, f"**{gigabytes(max(peaks.values()))}**" if peaks else "not measured"]
                row += [gigabytes(peaks.get(stage)) for stage in ("encode", "load", "train", "save")]
                row += [gigabytes(stages.get(stage, {}).get("rss")) for stage in ("encode", "load", "train")]
                row += [f"{sum(stages.get(stage, {}).get('seconds', 0) for stage in ('encode', 'load')):.1f}"]
                rows.append(row)
            text.append("Live tensor bytes at the peak of each stage, and peak resident memory above the interpreter's, GB:\n")
            text.append(table(["method", "bytes, all", "encode", "load", "train", "save", "RSS: encode", "load", "train",
                               "s to load and encode"], rows))
            baselines = [counts["rss"]["baseline"]["rss"] for counts in found["memory"].values() if "baseline" in counts["rss"]]
            if baselines:
                text.append(f"\nThe interpreter with its libraries: {gigabytes(median(baselines))} GB.")
            floor = found["byte_floor"]
            text.append(f"Byte floor: {gigabytes(floor['packed'] + floor['activations'])} GB, packed weights "
                        f"{gigabytes(floor['packed'])} and the largest layer's input and output "
                        f"{gigabytes(floor['activations'])} (`{floor['layer']}`).\n")
            for name in ("zoodip", "zoodip_one"):
                items = found["memory"].get(name, {}).get("bytes", {}).get("items", {})
                if items:
                    large = {what: size for what, size in items.items() if size >= 1_000_000}
                    rows = [[what.replace("|", "/"), f"{size / 1e6:.1f}"] for what, size in large.items()]
                    rows += [["everything smaller", f"{(sum(items.values()) - sum(large.values())) / 1e6:.1f}"],
                             ["**together**", f"**{sum(items.values()) / 1e6:.1f}**"]]
                    text.append(f"What the peak is made of, {METHODS[name].label}:\n\n" + table(["", "MB"], rows) + "\n")
        if "memory" in found and args.device == "cuda":
            rows = []
            for name, counts in found["memory"].items():
                for stage, numbers in counts["cuda"].get("stages", {}).items():
                    counters = [gigabytes(numbers[what]) for what in ("allocated", "reserved", "nvidia_smi")]
                    rows.append([METHODS[name].label, stage, *counters])
            text.append(table(["method", "stage", "allocated, GB", "reserved, GB", "nvidia-smi, GB"], rows))
    return "\n".join(text)


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.child:
        return child(args)
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / "sd15-shape"
        if "sd15" in args.worlds and not (args.folder / "model_index.json").exists():
            build_folder(args.folder)
        results = {}
        for world in args.worlds:
            for precision in args.precisions or (["fp16"] if args.device == "cuda" else SETTINGS[world][1]):
                found = results[f"{world} {precision}"] = {}
                if not args.skip_time:
                    found["time"] = measure_time(world, precision, args)
                if not args.skip_memory:
                    found["memory"] = measure_memory(world, precision, args)
                    if args.device == "cpu":
                        found["byte_floor"] = byte_floor(world, precision, args)
                name = "speed_memory" if args.device == "cpu" else "speed_memory_cuda"
                write_report(name, args, results, markdown_of(results, args), args.device, args.output, show=False)
        print(markdown_of(results, args))


if __name__ == "__main__":
    cli(main, parse_args())
