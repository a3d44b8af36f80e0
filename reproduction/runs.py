"""What a run is: a specification with a hash, the command line that does it, the files that it leaves, and their content.

A run is a JSON-serialisable dict (world, model, method, subject, seed, flags); the hash of its content names its folder under
<output>/runs. There it leaves what it learned (a token, or what `TUNED` names), result.json once it has learned and been judged
and, for each evaluation of its pictures, scores-<hash of the evaluation>.json and the folder pictures-<the same hash>. Existing
files are not made again, so any interrupted command continues, several machines can share or merge their folders, and tables that
need the same run share it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import train_zoodip
from reproduction.declarations import Row
from reproduction.tuning_experiments import SYSTEMS
from reproduction.worlds import World
from trainers import diffusekrona, dreambooth, gauss_newton, gf_ti, qlora, textual_inversion, tuneqdm

# Each is a module with `parse_args(argv)`, `main(args) -> exit code` and the files of a `zoodip.run.Run`.
METHODS = {"zoodip": train_zoodip, "ti": textual_inversion, "gf_ti": gf_ti, "gauss_newton": gauss_newton,
           "dreambooth": dreambooth, "qlora": qlora, "tuneqdm": tuneqdm, "diffusekrona": diffusekrona}  # fmt: skip
# Nothing is learned: the token of the class word or those of a full description; or the model itself, in a script's bits.
UNTRAINED = {"initial": train_zoodip, "described": train_zoodip, "untuned": qlora, "untuned_integers": tuneqdm}
RENDERED = ("renders", "other_renders")  # without a model: true pictures of the subject or of the others
# The methods that tune weights, with what they leave; they name the subject by an identifier and its class word.
TUNED = {dreambooth: "unet", qlora: "pytorch_lora_weights.safetensors", tuneqdm: "tuned_scales.safetensors",
         diffusekrona: "pytorch_lokr_weights.safetensors"}  # fmt: skip

SNAPSHOTS = 8  # tokens of a run shown by the learning curve, in addition to the first
QUICK_SPEEDUP = 4  # factor by which --quick reduces the steps
ALONG_SEEDS = (1000, 0)  # for pictures of snapshots: the first seed chooses the best, the second is scored


@dataclass
class Settings:
    """The settings given by a command's flags, as every worker receives them."""

    world: World
    output: Path
    model: str
    model_id: str  # identifies the weights, in every hash
    clip: str | None
    dino: str | None
    subjects: tuple[str, ...] | None = None  # instead of the world's or the experiment's
    seeds: tuple[int, ...] | None = None
    rates: dict[str, float] = field(default_factory=dict)  # chosen for the systems of weight tuning; they override the world's
    extra: dict = field(default_factory=dict)  # flags of train_zoodip.py for every run
    given: dict = field(default_factory=dict)  # flags that replace the world's model, scorers and files, for the report
    missing: set[str] = field(default_factory=set)  # scorers that are not available
    quick: bool = False
    dry_steps: int | None = None
    redraw: bool = False  # draw missing pictures of scored runs
    images: int = 2
    inference_steps: int = 25
    inter_images: int = 50
    eval_samples: int = 64
    threads: int = 1

    def prompts(self, subject: str, kind: str = "scores") -> list[str]:
        """The prompts of an evaluation: all, or every third for snapshots."""
        return self.world.prompts(subject)[: 1 if self.dry_steps else None : 3 if kind == "along" else 1]

    def folder(self, spec: dict) -> Path:
        return self.output / "runs" / digest(spec)

    def rate(self, row: Row) -> dict:
        """The learning rate of a row that uses the rate of a system, as a flag."""
        if row.rate_of is None:
            return {}
        rates = {system: published for system, (_, _, published) in SYSTEMS.items()} | self.world.start_rates
        rates |= {} if row.of_grid else self.rates
        return dict(learning_rate=float(f"{rates[row.rate_of] * row.rate_factor:.3g}"))


# ---------------------------------------------------------------------------------------------------------------------
# Specifications
# ---------------------------------------------------------------------------------------------------------------------


def digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def script_of(method: str) -> ModuleType:
    """The script of a method or, for an untrained one, the script whose starting point it is."""
    return METHODS[method] if method in METHODS else UNTRAINED[method]


def tunes_weights(method: str) -> bool:
    return method not in RENDERED and script_of(method) in TUNED


def learned_path(spec: dict, settings: Settings) -> Path:
    """The file or folder that a run leaves."""
    return settings.folder(spec) / TUNED.get(script_of(spec["method"]), "learned_embeds.safetensors")


def stored_bytes(spec: dict, settings: Settings) -> int:
    """The size of what a run leaves; 0 if nothing was learned and the model is unchanged."""
    path = learned_path(spec, settings)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*")))


def parse(method: str, argv: list[str]) -> argparse.Namespace:
    """A run's arguments, read by its method's own parser, which exits with one line if one is wrong."""
    return script_of(method).parse_args(argv)


def word_flag(method: str) -> str:
    """The flag that takes the word for the subject's class."""
    return "--class_word" if tunes_weights(method) else "--initializer_token"


@lru_cache
def flag_names(method: str) -> set[str]:
    return set(vars(parse(method, ["--train_data_dir", "x", word_flag(method), "x"])))


def make_spec(
    settings: Settings, method: str, subject: str, seed: int, flags: dict, cost: bool = False, variation: tuple[str, ...] = ()
) -> dict:
    """The specification of a run; `flags` are the paper's, and those that depend on the size of a token are scaled here.

    paper_steps: steps in proportion to the paper's 30,000 for ZOODiP. mu: left out where it is the script's own default, so that
    the run is that of the other tables. For runs that measure cost, the seed is the round; they have no learning rate, on which
    cost does not depend, so that rows that differ in nothing else share them.
    """
    world = settings.world
    if method in RENDERED:
        return dict(world=world.name, method=method, subject=subject, seed=seed, flags={})
    scaled = {name: world.scaled(value) if name in ("tau", "intrinsic_dim") else value for name, value in flags.items()}
    if (paper_steps := scaled.pop("paper_steps", None)) is not None:
        scaled["max_train_steps"] = world.steps_of_paper(paper_steps)
    extra = {name: value for name, value in settings.extra.items() if name in flag_names(method)}
    all_flags = world.methods[method] | extra
    if scaled.get("mu") == 1e-3 and "mu" not in all_flags and all_flags.get("mixed_precision") != "bf16":
        del scaled["mu"]
    all_flags |= scaled
    if "max_train_steps" in all_flags:
        steps = settings.dry_steps or round(all_flags["max_train_steps"] / (QUICK_SPEEDUP if settings.quick else 1))
        all_flags["max_train_steps"] = settings.dry_steps or steps_of_cost(method, world) if cost else steps
    if cost:
        all_flags.pop("learning_rate", None)
    if settings.dry_steps and "num_class_images" in all_flags:
        all_flags["num_class_images"] = settings.dry_steps
    spec = dict(world=world.name, model=settings.model_id, method=method, subject=subject, seed=seed, flags=all_flags)
    return spec | ({"cost": True} if cost else {}) | ({"variation": sorted(variation)} if variation else {})


def steps_of_cost(method: str, world: World) -> int:
    """Steps of a run that measures cost. A step of GF-TI is a whole generation, of 20 forwards or more, so a tenth of them."""
    return max(1, world.cost_steps // 10) if "population" in flag_names(method) else world.cost_steps


def spec_argv(spec: dict, settings: Settings) -> list[str]:
    """The command line of a run."""
    world, subject = settings.world, spec["subject"]
    described = spec["method"] == "described"
    captions = world.other_captions if "article" in spec.get("variation", ()) else world.captions
    argv = ["--pretrained_model_name_or_path", settings.model, "--train_data_dir", str(world.data / subject),
            word_flag(spec["method"]), world.description(subject) if described else world.class_word(subject),
            "--seed", str(spec["seed"]), "--cc_file", str(captions), "--no-final_picture",
            "--output_dir", str(settings.folder(spec))]  # fmt: skip
    for name, value in spec["flags"].items():
        if isinstance(value, bool):
            argv += [f"--{name}"] if value else [f"--no-{name}"] if name == "use_cc" else []
        else:
            argv += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    if "after" in spec:  # it starts from another run's token
        argv += ["--initializer_token", str(settings.output / "runs" / spec["after"])]
    return argv


def spec_args(spec: dict, settings: Settings) -> argparse.Namespace:
    return parse(spec["method"], spec_argv(spec, settings))


def evaluation(settings: Settings, kind: str) -> dict:
    """What determines the scores of pictures, besides the token.

    `scores` is for the last token, `inter` for diversity, `along` for the snapshots, and `best` like `scores` for the snapshot
    that `along` chose.
    """
    images = {"inter": settings.inter_images, "along": 1}.get(kind, settings.images)
    clip, dino = (Path(name).name if name else None for name in (settings.clip, settings.dino))
    return dict(kind=kind, images=images, scheduler=settings.world.scheduler, steps=settings.inference_steps,
                guidance=settings.world.guidance, clip=clip, dino=dino, prompts=1 if settings.dry_steps else None)  # fmt: skip


@dataclass
class Job:
    """A run and the evaluations that some table needs from it."""

    spec: dict
    kinds: set[str]

    def learned(self, settings: Settings) -> bool:
        return (settings.folder(self.spec) / "result.json").exists()

    def done(self, settings: Settings) -> bool:
        return self.learned(settings) and not any(self.to_score(settings))

    def tokens(self, settings: Settings) -> list[Path]:
        """The tokens that are judged: the last and, if pictures are scored along the way, the snapshots."""
        every = "learned_embeds*.safetensors" if "along" in self.kinds else "learned_embeds.safetensors"
        return sorted(settings.folder(self.spec).glob(every))

    def to_score(self, settings: Settings) -> list[str]:
        """The missing evaluations, in the order in which they depend on one another."""
        folder = settings.folder(self.spec)
        redraw = settings.redraw and (self.spec["method"] not in METHODS or learned_path(self.spec, settings).exists())
        return [kind for kind in sorted(self.kinds) if not scored(folder, settings, kind)
                or (redraw and not pictures_path(folder, settings, kind).exists())]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is done
# ---------------------------------------------------------------------------------------------------------------------


def scores_path(folder: Path, settings: Settings, kind: str) -> Path:
    return folder / f"scores-{digest(evaluation(settings, kind))}.json"


def pictures_path(folder: Path, settings: Settings, kind: str) -> Path:
    """The folder of the pictures that were scored."""
    return folder / f"pictures-{digest(evaluation(settings, kind))}"


def scored(folder: Path, settings: Settings, kind: str) -> bool:
    """Whether all available scores exist. A score that a missing scorer left out is added once the scorer is available."""
    path = scores_path(folder, settings, kind)
    if not path.exists():
        return False
    names = ("CLIP_inter", "DINO_inter") if kind == "inter" else ("CLIP-I", "DINO")
    wanted = {name for name, scorer in zip(names, (settings.clip, settings.dino), strict=True)
              if scorer and scorer not in settings.missing}  # fmt: skip
    return wanted <= set(json.loads(path.read_text())["scores"])


def read_run(spec: dict, settings: Settings, at: str = "last") -> dict | None:
    """result.json with all existing scores; None if the run is not done. `at`: the token whose scores are read.

    commits, machines: what made any of its files; a machine is the JSON of [device, versions].
    """
    folder = settings.folder(spec)
    if not (folder / "result.json").exists():
        return None
    record = json.loads((folder / "result.json").read_text())
    files = {kind: scores_path(folder, settings, kind) for kind in ("along", "inter", "best" if at == "best" else "scores")}
    found = {kind: json.loads(path.read_text()) for kind, path in files.items() if path.exists()}
    if at == "best" and "best" not in found:
        return None
    contents = (record, *found.values())
    record["commits"] = sorted({content["commit"] for content in contents if content.get("commit")})
    record["machines"] = sorted({json.dumps([made["device"], made["versions"]]) for made in contents if "device" in made})
    for kind, content in found.items():
        if kind == "along":  # pictures of the snapshots join the points of the curve
            points = {point["step"]: point for point in content["points"]}
            record["curve"] = [point | points.get(point["step"], {}) for point in record["curve"]]
        else:
            record.update(content["scores"])
    return record


def best_step(curve: list[dict]) -> int:
    """The step whose choosing pictures are most like the subject; the first of equal steps. Without CLIP, the last step."""
    scored = [point for point in curve if "choosing" in point]
    return max(scored, key=lambda point: point["choosing"])["step"] if scored else curve[-1]["step"]
