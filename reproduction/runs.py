"""What the suite runs: two worlds, a run as a specification with a hash, its execution in worker processes.

A run is a JSON-able dict (world, model, method, subject, seed, flags); the hash of its content names its folder under
<output>/runs. There it leaves learned_embeds.safetensors, result.json once it has learned, and scores-<hash of the
evaluation>.json once its pictures are scored. What is there is not done again, so any interrupted command continues, several
machines may share or merge their folders, and tables that ask for the same run share it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_zoodip as zoodip  # noqa: E402
from benchmarks.common import ROOT, environment, merge_batches  # noqa: E402
from miniature import world as critters  # noqa: E402
from miniature.make_subject import SCENES, make_subject  # noqa: E402
from reproduction import evaluate, gf_ti, textual_inversion  # noqa: E402
from train_zoodip import Batch, Data, FrozenModel, InputError  # noqa: E402

SNAPSHOTS = 8  # tokens of a run that the learning curve shows, beside the first
QUICK_SPEEDUP = 4  # --quick has so many times fewer steps
EVALUATION_BATCH = 16  # samples per forward when judging a loss; changes only rounding

PARSERS = {"zoodip": zoodip.parse_args, "initial": zoodip.parse_args, "ti": textual_inversion.parse_args,
           "gf_ti": gf_ti.parse_args}
UNUSED = {"zoodip": (), "initial": (), "ti": textual_inversion.UNUSED, "gf_ti": gf_ti.UNUSED}
SCRIPTS = {"zoodip": "train_zoodip.py", "ti": "reproduction/textual_inversion.py", "gf_ti": "reproduction/gf_ti.py"}

# ---------------------------------------------------------------------------------------------------------------------
# Worlds
# ---------------------------------------------------------------------------------------------------------------------

# Those of DreamBooth's prompts for live subjects that the miniature world has words for, and what they ask for.
MINIATURE_PROMPTS = {
    "a {} in the jungle": ("scene", "forest"), "a {} in the snow": ("scene", "snow"), "a {} on the beach": ("scene", "beach"),
    "a {} on a cobblestone street": ("scene", "cobblestone street"), "a {} on top of pink fabric": ("scene", "pink fabric"),
    "a {} on top of a wooden floor": ("scene", "wooden floor"), "a {} with a city in the background": ("scene", "city"),
    "a {} with a mountain in the background": ("scene", "mountain"),
    "a {} with a blue house in the background": ("scene", "blue house"), "a {} wearing a red hat": ("accessory", "red hat"),
    "a {} wearing a santa hat": ("accessory", "santa hat"), "a {} wearing a rainbow scarf": ("accessory", "rainbow scarf"),
    "a {} wearing pink glasses": ("accessory", "pink glasses"), "a {} wearing a yellow shirt": ("accessory", "yellow shirt"),
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """Where the runs happen, and the settings there that stand for the paper's."""

    name: str
    model: str
    width: int  # of a token; what the paper gives for 768 scales with it: tau, GF-TI's intrinsic dimension
    methods: dict[str, dict]  # flags of each method
    subjects: tuple[str, ...]
    seeds: tuple[int, ...]
    images: int  # pictures per prompt
    inference_steps: int
    guidance: float
    clip: str
    dino: str | None
    cost_steps: int  # of the runs that measure time and memory
    seconds_per_step: float  # of a step whatever its candidates, and
    seconds_per_forward: float  # of each sample: for the estimate of --dry_run

    def scaled(self, value: int) -> int:
        return max(2, round(value * self.width / 768))


MINIATURE = World(
    "miniature", str(ROOT / "miniature" / "model"), 256,
    methods={
        "zoodip": dict(max_train_steps=1000, learning_rate=1e-2, tau=43),
        "ti": dict(max_train_steps=1000, learning_rate=5e-3),
        "gf_ti": dict(max_train_steps=433, intrinsic_dim=85),  # the paper's 13,000 to ZOODiP's 30,000
        "initial": {},
    },
    subjects=tuple(breed.name for breed in critters.held_out_breeds()[:4]), seeds=(0, 1, 2), images=2, inference_steps=25,
    guidance=5.0, clip=str(ROOT / "miniature" / "clip"), dino=None, cost_steps=60, seconds_per_step=0.014,
    seconds_per_forward=0.0065,
)  # fmt: skip
SD15 = World(
    "sd15", zoodip.DEFAULT_MODEL, 768,
    methods={
        "zoodip": dict(max_train_steps=30000, quantization="int8"), "ti": dict(max_train_steps=5000, quantization="int8"),
        "gf_ti": dict(max_train_steps=13000, quantization="int8"), "initial": dict(quantization="int8"),
    },
    subjects=("shiny_sneaker",), seeds=(0, 1, 2), images=5, inference_steps=50, guidance=7.5, clip=evaluate.CLIP,
    dino=evaluate.DINO, cost_steps=200, seconds_per_step=0.016, seconds_per_forward=0.016,  # Table S6, RTX 3090
)  # fmt: skip
WORLDS = {world.name: world for world in (MINIATURE, SD15)}
DREAMBOOTH = tuple(
    "backpack backpack_dog bear_plushie berry_bowl can candle cat cat2 clock colorful_sneaker dog dog2 dog3 dog5 dog6 dog7 "
    "dog8 duck_toy fancy_boot grey_sloth_plushie monster_toy pink_sunglasses poop_emoji rc_car red_cartoon robot_toy "
    "shiny_sneaker teapot vase wolf_plushie".split())


@dataclass
class Settings:
    """What a command's flags say, as every worker gets it."""

    world: World
    output: Path
    data: Path  # sd15: folder of the subjects' folders
    prompts: Path | None  # sd15: prompts_and_classes.txt
    model: str
    model_id: str  # identifies the weights, in every hash
    clip: str | None
    dino: str | None
    subjects: tuple[str, ...] | None = None  # instead of the world's or the experiment's
    seeds: tuple[int, ...] | None = None
    extra: dict = field(default_factory=dict)  # flags of train_zoodip.py for every run
    missing: set[str] = field(default_factory=set)  # scorers that are not to be had
    quick: bool = False
    dry_steps: int | None = None
    images: int = 2
    inference_steps: int = 25
    inter_images: int = 50
    eval_samples: int = 64
    threads: int = 1

    def class_word(self, subject: str) -> str:
        return critters.CLASS_NOUN if self.miniature else self.dreambooth.classes[subject]

    def prompts_of(self, subject: str) -> list[str]:
        if self.miniature:
            prompts = list(MINIATURE_PROMPTS)
        else:
            prompts = self.dreambooth.of(subject)[1]
        return prompts[:1] if self.dry_steps else prompts

    @property
    def miniature(self) -> bool:
        return self.world.name == "miniature"

    @property
    def dreambooth(self) -> evaluate.DreamBoothPrompts:
        return read_dreambooth(self.prompts)

    def folder(self, spec: dict) -> Path:
        return self.output / "runs" / digest(spec)


@lru_cache
def read_dreambooth(path: Path) -> evaluate.DreamBoothPrompts:
    return evaluate.parse_dreambooth_prompts(evaluate.read_text(path, "prompts"))


def prepare_data(settings: Settings, subjects: Iterable[str]) -> None:
    """Refuse subjects that are not there; of the miniature, render them. Raises InputError."""
    if not settings.miniature:
        for subject in subjects:
            settings.dreambooth.of(subject)
            zoodip.find_images(settings.data / subject)
        return
    known = {breed.name for breed in critters.held_out_breeds()}
    if unknown := set(subjects) - known:
        raise InputError(f"--subjects: {', '.join(sorted(unknown))} are not held out; choose from {', '.join(sorted(known))}")
    captions = {}
    for subject in sorted(set(subjects)):
        for name, make in ((subject, make_subject), (f"{subject}-unseen", make_unseen)):
            captions[name] = render_once(settings.output / "data" / name, lambda folder, s=subject, m=make: m(s, folder))
    path = settings.output / "data" / "cc.json"
    if path.exists():  # of an earlier command with other subjects
        captions = json.loads(path.read_text()) | captions
    zoodip.write_atomically(path, (json.dumps(captions, indent=1) + "\n").encode())


def render_once(folder: Path, make: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """The captions of `make(folder)`, whose pictures appear in `folder` all at once: another shard may be reading there."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    captions = make(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # it is there already
        shutil.rmtree(temporary)
    return captions


def make_unseen(subject: str, folder: Path, count: int = 16) -> dict[str, str]:
    """Renders of a breed in the scenes that `make_subject` leaves out, to judge a token on -> their captions."""
    breed = critters.breed_by_name(subject)
    rng = np.random.default_rng([1, [each.name for each in critters.held_out_breeds()].index(subject)])
    scenes = [scene for scene in critters.SCENES if scene not in SCENES]
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i in range(count):
        spec = critters.scene_spec(breed, scenes[i % len(scenes)], str(rng.choice(critters.ACCESSORIES)), rng=rng)
        critters.render(spec, size=256).save(folder / f"{i:02}.png")
        captions[f"{i:02}.png"] = critters.class_caption(spec, "{}")
    return captions


# ---------------------------------------------------------------------------------------------------------------------
# Specifications
# ---------------------------------------------------------------------------------------------------------------------


def digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def make_spec(settings: Settings, method: str, subject: str, seed: int, flags: dict, cost: bool = False) -> dict:
    """The specification of a run; `flags` are the paper's, and those that go with the size of a token are scaled here."""
    world = settings.world
    scaled = {name: world.scaled(value) if name in ("tau", "intrinsic_dim") else value for name, value in flags.items()}
    extra = {name: value for name, value in settings.extra.items() if name not in UNUSED[method]}
    captions = {"use_cc": True} if method in ("zoodip", "initial") else {}
    all_flags = {**captions, **world.methods[method], **extra, **scaled}
    if method != "initial":
        steps = settings.dry_steps or round(all_flags["max_train_steps"] / (QUICK_SPEEDUP if settings.quick else 1))
        all_flags["max_train_steps"] = (settings.dry_steps or world.cost_steps) if cost else steps
    spec = dict(world=world.name, model=settings.model_id, method=method, subject=subject, seed=seed, flags=all_flags)
    return spec | {"cost": True} if cost else spec


def spec_args(spec: dict, settings: Settings) -> argparse.Namespace:
    """The arguments of the run's own script, checked by its own parser."""
    return PARSERS[spec["method"]](spec_argv(spec, settings))


def spec_argv(spec: dict, settings: Settings, data: str | None = None) -> list[str]:
    """The command line of a run. `data`: another folder of pictures than the subject's."""
    root = settings.output / "data" if settings.miniature else settings.data
    argv = ["--pretrained_model_name_or_path", settings.model, "--train_data_dir", str(root / (data or spec["subject"])),
            "--initializer_token", settings.class_word(spec["subject"]), "--seed", str(spec["seed"]),
            "--cc_file", str(root / "cc.json" if settings.miniature else ROOT / "cc.json"),
            "--output_dir", str(settings.folder(spec))]
    for name, value in spec["flags"].items():
        if isinstance(value, bool):
            argv += [f"--{name}"] if value else [f"--no-{name}"] if name == "use_cc" else []
        else:
            argv += [f"--{name}", str(value)]
    return argv


def evaluation(settings: Settings, kind: str) -> dict:
    """What decides the scores of pictures beside the token: `scores`, or `inter` (diversity)."""
    images = settings.images if kind == "scores" else settings.inter_images
    clip, dino = (Path(name).name if name else None for name in (settings.clip, settings.dino))
    return dict(kind=kind, images=images, steps=settings.inference_steps, guidance=settings.world.guidance, clip=clip, dino=dino,
                prompts=1 if settings.dry_steps else None)


@dataclass
class Job:
    """A run and the evaluations that some table wants of it."""

    spec: dict
    kinds: set[str]

    def done(self, settings: Settings) -> bool:
        folder = settings.folder(self.spec)
        return (folder / "result.json").exists() and all(scored(folder, settings, kind) for kind in self.kinds)


def scores_path(folder: Path, settings: Settings, kind: str) -> Path:
    return folder / f"scores-{digest(evaluation(settings, kind))}.json"


def scored(folder: Path, settings: Settings, kind: str) -> bool:
    """Is every score there that can be had? One that a missing scorer left out is made up for when it is no longer missing."""
    path = scores_path(folder, settings, kind)
    if not path.exists():
        return False
    names = {"scores": ("CLIP-I", "DINO"), "inter": ("CLIP_inter", "DINO_inter")}[kind]
    wanted = {name for name, scorer in zip(names, (settings.clip, settings.dino), strict=True)
              if scorer and scorer not in settings.missing}
    return wanted <= set(json.loads(path.read_text())["scores"])


def read_run(spec: dict, settings: Settings) -> dict | None:
    """result.json with all scores that are there; None where the run is not done."""
    folder = settings.folder(spec)
    if not (folder / "result.json").exists():
        return None
    record = json.loads((folder / "result.json").read_text())
    for kind in ("scores", "inter"):
        if (path := scores_path(folder, settings, kind)).exists():
            record.update(json.loads(path.read_text())["scores"])
    return record


def estimated_seconds(job: Job, settings: Settings) -> float:
    """A guess from the world's measured speed; loading and judging included roughly."""
    world, spec = settings.world, job.spec
    args = spec_args(spec, settings)
    if spec["method"] == "initial":
        steps, calls, forwards = 0, 0, 0
    elif spec["method"] == "ti":
        steps, calls, forwards = args.max_train_steps, 1, 3  # a backward pass is two forwards
    elif spec["method"] == "gf_ti":
        steps, calls, forwards = args.max_train_steps, args.population if args.mode == "published" else 1, args.population
    else:
        steps, calls = args.max_train_steps, 1
        forwards = 2 * args.n if args.estimator == "spsa" else args.n + 1
    seconds = 5 + steps * (calls * world.seconds_per_step + forwards * args.train_batch_size * world.seconds_per_forward)
    if spec.get("cost"):
        return seconds + 15
    judged = (SNAPSHOTS + 2) * settings.eval_samples
    for kind in job.kinds:
        pictures = evaluation(settings, kind)["images"] * (len(settings.prompts_of(spec["subject"])) if kind == "scores" else 1)
        judged += pictures * settings.inference_steps * 2
    return seconds + judged * world.seconds_per_forward


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def load_modules(folder: Path, variant: str | None, quantization: str, precision: str, device: torch.device):
    """Text encoder and UNet, kept for the worker's next run."""
    how = (variant, quantization, zoodip.DTYPES[precision], device)
    return (zoodip.load_frozen(folder, "text_encoder", *how, skip=("embeddings.token_embedding.",)),
            zoodip.load_frozen(folder, "unet", *how))


@lru_cache(maxsize=64)
def encode(folder: Path, variant: str | None, paths: tuple[Path, ...], resolution: int, center_crop: bool,
           device: torch.device) -> torch.Tensor:
    vae = zoodip.load_frozen(folder, "vae", variant, "none", torch.float32, device, skip=("decoder.", "post_quant_conv."))
    return zoodip.encode_images(vae, list(paths), resolution, center_crop)


def load(args: argparse.Namespace, device: torch.device) -> tuple[zoodip.Inputs, FrozenModel, Data]:
    """As `train_zoodip.load_model`, from what this worker already has in memory."""
    inputs = zoodip.read_inputs(args)
    zoodip.resolve_defaults(args, inputs.folder, device)
    latents = encode(inputs.folder, args.variant, tuple(inputs.subject.paths), args.resolution, args.center_crop, device)
    text_encoder, unet = load_modules(inputs.folder, args.variant, args.quantization, args.mixed_precision, device)
    model = FrozenModel(unet, text_encoder, inputs.prompts.rows.to(device), args.candidates_per_forward)
    return inputs, model, Data(latents, inputs.choices, inputs.prompts, zoodip.load_scheduler(inputs.folder))


@dataclass
class Snapshot:
    step: int
    forwards: int
    theta: torch.Tensor  # [V, d]


@dataclass
class Learned:
    """What a method leaves: tokens along the way, the last one the result, and the seconds it took."""

    snapshots: list[Snapshot]
    seconds: float
    details: dict = field(default_factory=dict)


class CountingSubspace(zoodip.SubspaceGradient):
    """Subspace Gradient that remembers how many directions each refresh removes (Fig. 8)."""

    def __init__(self, tau: int, nu: float, dim: int):
        super().__init__(tau, nu, dim)
        self.removed = []

    def append(self, token: torch.Tensor) -> None:
        super().append(token)
        if len(self.token_history) == 0:
            self.removed.append(len(self.projection))


def learn_zoodip(args: argparse.Namespace, accelerator, inputs: zoodip.Inputs, model: FrozenModel, data: Data) -> Learned:
    """`train_zoodip.train` itself, continuing from its checkpoint where an earlier worker was interrupted."""
    folder, every = Path(args.output_dir), max(1, args.max_train_steps // SNAPSHOTS)
    args.eval_steps, args.save_steps, args.checkpoints_total_limit = 0, every, 1
    args.resume_from_checkpoint = "latest" if zoodip.list_checkpoints(folder) else None
    zo, generator = zoodip.ZOAdam(inputs.initial_token, args), torch.Generator().manual_seed(args.seed)
    zo.subspace = CountingSubspace(args.tau, args.nu, zo.theta.numel())
    fingerprint = {"images or captions": inputs.subject.fingerprint,
                   "model weights": zoodip.model_digest(inputs.folder, args.variant)}
    progress = zoodip.resume(args, fingerprint, zo, generator)
    recorder = zoodip.Recorder(args, accelerator, fingerprint, data.scheduler.config.prediction_type)
    if progress.step < args.max_train_steps or not (folder / "run.json").exists():  # else only the judging was interrupted
        with zoodip.StopSignal() as stop:
            zoodip.train(args, accelerator, model, data, zo, generator, progress, recorder, None, stop)
    if progress.step < args.max_train_steps:
        raise KeyboardInterrupt
    run = json.loads((folder / "run.json").read_text())
    snapshots = [Snapshot(0, 0, inputs.initial_token)]
    per_step = progress.forwards // progress.step
    for step in sorted({*range(every, args.max_train_steps, every), args.max_train_steps}):
        name = "learned_embeds" if step == args.max_train_steps else f"learned_embeds-steps-{step}"
        token = evaluate.read_token(folder / f"{name}.safetensors", args.placeholder_token)
        snapshots.append(Snapshot(step, step * per_step, token))
    rate = run["steps_per_second"]
    return Learned(snapshots, args.max_train_steps / rate if rate else 0.0,
                   dict(removed=zo.subspace.removed, skipped_steps=progress.skipped))


def learn_ti(args: argparse.Namespace, accelerator, inputs: zoodip.Inputs, model: FrozenModel, data: Data) -> Learned:
    tokens, started = [], time.perf_counter()
    _, curve, _ = textual_inversion.invert(
        model, data, inputs.initial_token, args, args.max_train_steps, args.learning_rate,
        lambda theta: tokens.append(theta.clone()) or 0.0, max(1, args.max_train_steps // SNAPSHOTS), show_bar=False)
    snapshots = [Snapshot(row["step"], row["unet_forwards"], token) for row, token in zip(curve, tokens, strict=True)]
    return Learned(snapshots, time.perf_counter() - started)


def learn_gf_ti(args: argparse.Namespace, accelerator, inputs: zoodip.Inputs, model: FrozenModel, data: Data) -> Learned:
    every, snapshots, started = max(1, args.max_train_steps // SNAPSHOTS), [], time.perf_counter()
    fixed_set = zoodip.evaluation_batches(data.latents, data.choices, data.prompts, data.scheduler, args)

    def on_generation(generation: int, forwards: int, theta: torch.Tensor) -> None:
        if generation % every == 0 or generation == args.max_train_steps:
            snapshots.append(Snapshot(generation, forwards, theta))

    basis = gf_ti.make_basis(gf_ti.vocabulary(inputs.folder, args.variant), args)
    gf_ti.evolve(gf_ti.noisy_losses(model, data, args), inputs.initial_token, basis, args,
                 lambda token: model.mean_loss(fixed_set, token), on_generation, show_bar=False)
    return Learned(snapshots, time.perf_counter() - started)


def learn_nothing(args: argparse.Namespace, accelerator, inputs: zoodip.Inputs, model: FrozenModel, data: Data) -> Learned:
    return Learned([Snapshot(0, 0, inputs.initial_token)], 0.0)


LEARNERS: dict[str, Callable[..., Learned]] = {
    "zoodip": learn_zoodip, "ti": learn_ti, "gf_ti": learn_gf_ti, "initial": learn_nothing}  # fmt: skip


def judging_sets(spec: dict, settings: Settings, device: torch.device) -> tuple[FrozenModel, dict[str, list[Batch]]]:
    """The model with the judging captions, and fixed (picture, timestep, noise) triples: "loss" over the timesteps of PUTS, and
    "loss_all" over all of them, as a set from PUTS's own timesteps would favour PUTS.

    Of the miniature renders that no run sees, in scenes that no run sees; of DreamBooth the subject's own pictures. Always with
    comprehensive captions, whatever the run learned with.
    """
    flags = {name: spec["flags"][name] for name in zoodip.SETTINGS if name in spec["flags"] and name in JUDGED_FLAGS}
    plain = dict(spec, method="zoodip", seed=0, flags=flags | {"use_cc": True, "num_eval_samples": settings.eval_samples})
    data = f"{spec['subject']}-unseen" if settings.miniature else None
    args = zoodip.parse_args(spec_argv(plain, settings, data=data))
    _, model, data = load(args, device)
    sets = {}
    for name, span in (("loss", (500, 900)), ("loss_all", (0, 1000))):
        args.t_min, args.t_max = span
        batches = zoodip.evaluation_batches(data.latents, data.choices, data.prompts, data.scheduler, args)
        sets[name] = merge_batches(batches, EVALUATION_BATCH)
    return model, sets


JUDGED_FLAGS = ("revision", "variant", "quantization", "mixed_precision", "placeholder_token", "num_vectors", "resolution",
                "center_crop")  # what the model and the pictures are; not how the run learned


def learn(spec: dict, settings: Settings) -> None:
    """Do the run and judge its tokens: learned_embeds.safetensors, then result.json."""
    folder = settings.folder(spec)
    folder.mkdir(parents=True, exist_ok=True)
    args = spec_args(spec, settings)
    lock = zoodip.lock_output(folder)
    write_json(folder / "spec.json", spec)
    accelerator = zoodip.make_accelerator(args)
    inputs, model, data = load(args, accelerator.device)
    learned = LEARNERS[spec["method"]](args, accelerator, inputs, model, data)
    if spec["method"] != "zoodip":
        if spec["method"] != "initial":
            textual_inversion.forget_unused(args, spec["method"])
        metadata = zoodip.embedding_metadata(args, learned.snapshots[-1].step, data.scheduler.config.prediction_type,
                                             inputs.initial_token.shape[-1])
        zoodip.save_embedding(folder / "learned_embeds.safetensors", args, learned.snapshots[-1].theta, metadata)
    judge, sets = judging_sets(spec, settings, accelerator.device)
    curve = [dict(step=snapshot.step, unet_forwards=snapshot.forwards, loss=judge.mean_loss(sets["loss"], snapshot.theta),
                  token_norm=snapshot.theta.norm(dim=1).mean().item()) for snapshot in learned.snapshots]
    last = learned.snapshots[-1]
    write_json(folder / "result.json", dict(
        spec=spec, **environment(str(accelerator.device)), seconds=round(learned.seconds, 3),
        steps_per_second=round(last.step / learned.seconds, 3) if learned.seconds else None, forwards=last.forwards,
        stored_bytes=(folder / "learned_embeds.safetensors").stat().st_size, loss=curve[-1]["loss"],
        loss_all=judge.mean_loss(sets["loss_all"], last.theta), curve=curve, **learned.details))  # fmt: skip
    lock.close()


def measure_cost(spec: dict, settings: Settings) -> None:
    """A few steps by the method's own script in a fresh process that has the machine to itself: speed and peak memory."""
    folder = settings.folder(spec)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "spec.json", spec)
    keep_quiet = ["--eval_steps", "0"] + (["--checkpointing_steps", "0"] if spec["method"] == "zoodip" else [])
    process = subprocess.run([sys.executable, str(ROOT / SCRIPTS[spec["method"]]), *spec_argv(spec, settings), *keep_quiet],
                             cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise InputError(f"{spec['method']} ended with {process.returncode}: {(process.stderr.strip() or '-').splitlines()[-1]}")
    run = json.loads((folder / "run.json").read_text())
    names = ("steps_per_second", "peak_memory_gb", "device", "versions", "commit")
    write_json(folder / "result.json", dict(
        spec=spec, **{name: run[name] for name in names}, forwards=run["unet_forwards"],
        stored_bytes=(folder / "learned_embeds.safetensors").stat().st_size))  # fmt: skip


@lru_cache
def scorer(name: str | None, device: torch.device) -> evaluate.Scorer | None:
    return evaluate.load_scorer(name, device)


@lru_cache
def attribute_classifier(folder: Path):
    from miniature.classifier import load_classifier

    return load_classifier(folder)


def attribute_scores(pictures: list[list], subject: str) -> dict[str, float]:
    """Shares of the miniature's pictures in which its classifier reads the subject's attributes, and what the prompt asks."""
    classifier = attribute_classifier(ROOT / "miniature" / "classifier")
    critter = critters.breed_by_name(subject).critter
    names = [name for name in ("shape", "colour", "pattern", "pattern_colour", "ears", "tail", "eyes")
             if not (name == "pattern_colour" and critter.pattern == "plain")]
    right = {"attributes": [], "scene": [], "accessory": []}
    for (kind, wanted), row in zip(MINIATURE_PROMPTS.values(), pictures, strict=False):  # a dry run has fewer prompts
        pixels = torch.stack([torch.from_numpy(np.array(image.resize((64, 64)))).permute(2, 0, 1) for image in row])
        for read in classifier.read(pixels / 127.5 - 1):
            right["attributes"] += [read[name] == getattr(critter, name) for name in names]
            right[kind].append(read[kind] == wanted)
    return {name: float(np.mean(values)) for name, values in right.items() if values}


def score(spec: dict, settings: Settings, kind: str) -> None:
    """Draw and score a finished run's token: scores-<hash>.json and, of `scores`, the contact sheet."""
    folder, how, subject = settings.folder(spec), evaluation(settings, kind), spec["subject"]
    args = spec_args(spec, settings)
    device = zoodip.make_accelerator(args).device
    inputs, model, _ = load(args, device)
    theta = evaluate.read_token(folder / "learned_embeds.safetensors", args.placeholder_token)
    drawer = evaluate.Drawer(args, model, inputs.folder, how["steps"], how["guidance"], 16 if args.resolution <= 128 else 2)
    clip, dino = (scorer(None if name in settings.missing else name, device) for name in (settings.clip, settings.dino))
    if kind == "inter":
        (row,) = drawer.pictures(theta, [evaluate.INTER_PROMPT], range(how["images"]), folder / "pictures")
        scores = evaluate.score_diversity(row, clip, dino)
    else:
        prompts, word = settings.prompts_of(subject), settings.class_word(subject)
        pictures = drawer.pictures(theta, prompts, range(how["images"]), folder / "pictures")
        references = [zoodip.open_image(path) for path in inputs.subject.paths]
        scores = evaluate.score_pictures(pictures, references, [text.replace("{}", word) for text in prompts], clip, dino)
        if settings.miniature:
            scores.update(attribute_scores(pictures, subject))
        zoodip.write_image(folder / "sheet.png", evaluate.contact_sheet(references, pictures, prompts))
    write_json(scores_path(folder, settings, kind), dict(evaluation=how, scores=scores, **environment(str(device))))


def write_json(path: Path, content: dict) -> None:
    zoodip.write_atomically(path, (json.dumps(content) + "\n").encode())


# ---------------------------------------------------------------------------------------------------------------------
# Many runs
# ---------------------------------------------------------------------------------------------------------------------


def do(job: Job, settings: Settings) -> None:
    """What is not there yet of one job."""
    folder = settings.folder(job.spec)
    if not (folder / "result.json").exists():
        measure_cost(job.spec, settings) if job.spec.get("cost") else learn(job.spec, settings)
    for kind in sorted(job.kinds):
        if not scored(folder, settings, kind):
            score(job.spec, settings, kind)


def start_worker(threads: int) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # bars of several workers on one terminal are noise
    torch.set_num_threads(threads)
    zoodip.quiet_libraries()


interrupted = False  # of this worker: the pool would still hand it the job that it has already fetched


def do_in_worker(job: Job, settings: Settings) -> str | None:
    """None, or why the job failed; its log is in its folder."""
    global interrupted
    log = io.StringIO()
    try:
        if interrupted:
            raise KeyboardInterrupt
        with redirect_stderr(log):
            do(job, settings)
        return None
    except KeyboardInterrupt:
        interrupted = True
        raise
    except (Exception, SystemExit) as error:  # one broken run must not end the others
        text = log.getvalue() + traceback.format_exc()
        folder = settings.folder(job.spec)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.log").write_text(text)
        return f"{type(error).__name__}: {error}"


def run_jobs(jobs: list[Job], settings: Settings, workers: int) -> list[str]:
    """Do all jobs that are not done -> one line per failure. Runs that measure cost come last, one at a time."""
    waiting = [job for job in jobs if not job.done(settings)]
    waiting.sort(key=lambda job: (str(job.spec["flags"].get("quantization")), job.spec["subject"]))  # a worker keeps its model
    together, alone = ([job for job in waiting if bool(job.spec.get("cost")) is cost] for cost in (False, True))
    failures = []
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", smoothing=0, desc="runs") as bar:
        if together:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, context, start_worker, (settings.threads,)) as pool:
                futures = {pool.submit(do_in_worker, job, settings): job for job in together}
                try:
                    for future in as_completed(futures):
                        report(futures[future], future.result(), settings, failures)
                        bar.update()
                except BrokenProcessPool:
                    raise InputError("a worker was killed, perhaps for want of memory; try fewer --jobs") from None
                except KeyboardInterrupt:
                    tqdm.write("interrupted: saving; the same command continues", file=sys.stderr)
                    pool.shutdown(cancel_futures=True)
                    raise
        for job in alone:
            report(job, do_in_worker(job, settings), settings, failures)
            bar.update()
    return failures


def report(job: Job, failure: str | None, settings: Settings, failures: list[str]) -> None:
    if failure is not None:
        spec = job.spec
        failures.append(f"{spec['method']} {spec['subject']} seed {spec['seed']}: {failure} ({settings.folder(spec)}/error.log)")
        tqdm.write(failures[-1], file=sys.stderr)
