"""The worlds in which runs happen: the bundled miniature, or Stable Diffusion v1.5 on DreamBooth's photographs.

A world defines what the paper's settings correspond to there, and has subjects, prompts, and pictures to learn from and judge on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from miniature.captions import class_caption, describe
from miniature.classifier import load_classifier
from miniature.critters import breed_by_name, held_out_breeds, spare_breeds
from miniature.drawing import render
from miniature.make_subject import SCENES as TRAINING_SCENES
from miniature.make_subject import make_subject
from miniature.rendering import to_float
from miniature.words import ACCESSORIES, CLASS_NOUN, SCENES
from miniature.world import scene_spec
from reproduction.prompts import DreamBoothPrompts, parse_dreambooth_prompts, read_text
from zoodip.arguments import DEFAULT_MODEL
from zoodip.errors import InputError
from zoodip.files import write_atomically
from zoodip.records import ROOT
from zoodip.subject import find_images

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dinov2-base"
WITH_MINIATURE_ONLY = ("miniature",)
DREAMBOOTH = tuple(
    "backpack backpack_dog bear_plushie berry_bowl can candle cat cat2 clock colorful_sneaker dog dog2 dog3 dog5 dog6 dog7 "
    "dog8 duck_toy fancy_boot grey_sloth_plushie monster_toy pink_sunglasses poop_emoji rc_car red_cartoon robot_toy "
    "shiny_sneaker teapot vase wolf_plushie".split())  # fmt: skip


# Steps as published; the settings beside them are the scripts' own.
TUNERS = {"dreambooth": dict(max_train_steps=400), "qlora": dict(max_train_steps=500), "tuneqdm": dict(max_train_steps=400),
          "diffusekrona": dict(max_train_steps=500), "untuned": {}, "untuned_integers": {}}  # fmt: skip


class World:
    """What the two worlds have in common."""

    name: str
    model: str
    width: int  # of a token; what the paper gives for 768 scales with it: tau and GF-TI's intrinsic dimension
    methods: dict[str, dict]  # flags of each method
    start_rates: dict[str, float] = {}  # of `tuning_experiments.SYSTEMS` if not the published ones: a grid's middle
    grid_subjects: tuple[str, ...] = ()  # on which rates are chosen
    subjects: tuple[str, ...]
    paper_subjects = False  # whether tables use their `paper_subjects` instead of the world's subjects
    seeds: tuple[int, ...] = (0, 1, 2)
    images: int  # pictures per prompt
    scheduler: str  # one of `zoodip.model.SCHEDULERS`, for this many
    inference_steps: int
    guidance: float
    clip: str
    dino: str | None
    judged_on: str  # what the losses are on
    cost_steps: int  # of the runs that measure time and memory
    seconds_per_step: float  # per step, whatever its candidates, and
    seconds_per_forward: float  # per sample, on
    speed_of: str  # this machine: for the estimate of --dry_run
    picture_bytes: float  # of a picture's file, and
    unet_bytes: float  # of a tuned UNet's, for the same estimate
    caveats = ""  # printed before the tables; {steps} and {rate} are ZOODiP's

    data: Path  # folder of the subjects' folders
    captions: Path
    other_captions: Path  # the same with an article before the word where it has none, and vice versa

    def scaled(self, value: int) -> int:
        return max(2, round(value * self.width / 768))

    def steps_of_paper(self, steps: int) -> int:
        """The steps here that correspond to `steps` of the paper's 30,000 for ZOODiP."""
        return round(steps * self.methods["zoodip"]["max_train_steps"] / 30000)

    def prepare(self, subjects: Iterable[str]) -> None:
        """Make the subjects' pictures and captions ready. Raises InputError for a subject that does not exist."""
        raise NotImplementedError

    def write_other_captions(self) -> None:
        text = self.captions.read_text(encoding="utf-8")
        other = re.sub(r"(\ban? )?\{\}", lambda found: "{}" if found[1] else "a {}", text)
        self.other_captions.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.other_captions, other.encode())

    def class_word(self, subject: str) -> str:
        raise NotImplementedError

    def prompts(self, subject: str) -> list[str]:
        """The prompts of a subject, each with one {} for the token or class word."""
        raise NotImplementedError

    def description(self, subject: str) -> str:
        """The words that fully describe a subject. Raises InputError if they are not known."""
        raise InputError(f"{self.name}: there is no description of {subject}; make other tables (--tables)")

    def judging_subject(self, subject: str) -> str:
        """The name of the folder, next to the subject's, with the pictures on which the loss of its tokens is judged."""
        return subject

    def renders(self, subject: str, others: bool, images: int) -> list[list[Image.Image]]:
        """True pictures [prompt][image] of a subject, or of the others, showing what the prompts ask for.

        Raises InputError if there are none.
        """
        raise InputError(f"{self.name}: there are no true pictures of {subject} for the prompts; make other tables (--tables)")

    def picture_scores(self, pictures: dict[str, list[Image.Image]], subject: str) -> dict[str, float]:
        """Scores of pictures {prompt: [one for each seed]} in addition to those of CLIP and DINO."""
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# The miniature
# ---------------------------------------------------------------------------------------------------------------------

# Those of DreamBooth's prompts for live subjects for which the miniature world has words, and what they ask for.
MINIATURE_PROMPTS = {
    "a {} in the jungle": ("scene", "forest"), "a {} in the snow": ("scene", "snow"), "a {} on the beach": ("scene", "beach"),
    "a {} on a cobblestone street": ("scene", "cobblestone street"), "a {} on top of pink fabric": ("scene", "pink fabric"),
    "a {} on top of a wooden floor": ("scene", "wooden floor"), "a {} with a city in the background": ("scene", "city"),
    "a {} with a mountain in the background": ("scene", "mountain"),
    "a {} with a blue house in the background": ("scene", "blue house"), "a {} wearing a red hat": ("accessory", "red hat"),
    "a {} wearing a santa hat": ("accessory", "santa hat"), "a {} wearing a rainbow scarf": ("accessory", "rainbow scarf"),
    "a {} wearing pink glasses": ("accessory", "pink glasses"), "a {} wearing a yellow shirt": ("accessory", "yellow shirt"),
}  # fmt: skip
ATTRIBUTES = ("shape", "colour", "pattern", "pattern_colour", "ears", "tail", "eyes")


class Miniature(World):
    """The bundled model on breeds that it has never seen. Pictures are rendered into <output>/data."""

    name, model, width = "miniature", str(ROOT / "miniature" / "model"), 256
    methods = {
        "zoodip": dict(use_cc=True, max_train_steps=1000, learning_rate=1e-2, tau=43, quantization="nf4"),
        "ti": dict(max_train_steps=1000, learning_rate=5e-3, quantization="nf4"),
        # the paper's 13,000 to ZOODiP's 30,000
        "gf_ti": dict(max_train_steps=433, intrinsic_dim=85, quantization="nf4"),
        "initial": dict(use_cc=True), "described": dict(use_cc=True),
        "gauss_newton": dict(use_cc=True),
        # a quarter fewer numbers than LoRA r = 2, to whose size (8, 64) is nearest: the table KronA has both
        **TUNERS, "diffusekrona": TUNERS["diffusekrona"] | dict(a1=4, a2=16),
    }  # fmt: skip
    # 3 to 30 times the published ones, at which so small a model hardly changes. They were best on a first grid on ronfo and
    # zafpux, which are reported breeds: so these are only the middles of a grid, and the choice is made on spare breeds.
    start_rates = {"DreamBooth": 1.5e-4, "QLoRA": 6.67e-4, "PEQA": 1e-5, "PEQA, 4 bit": 1.7e-4, "TuneQDM": 3e-5,
                   "TuneQDM, 4 bit": 5.1e-4, "DiffuseKronA": 2e-3}  # fmt: skip
    grid_subjects = ("dixpi", "vakvik")  # spare breeds, on which nothing is reported
    subjects = tuple(breed.name for breed in held_out_breeds())
    # 25 steps of PNDM give half of the pictures a wrong colour; these 15 are as good as 50 of PNDM (miniature/schedulers.json)
    images, scheduler, inference_steps, guidance = 2, "dpmsolver++", 15, 5.0
    clip, dino = str(ROOT / "miniature" / "clip"), None
    judged_on = "unseen pictures"
    cost_steps, seconds_per_step, seconds_per_forward, speed_of = 200, 0.023, 0.0127, "one of two busy CPU cores"
    picture_bytes, unet_bytes = 7e3, 23e6
    caveats = """Subjects are breeds that the miniature has never seen. The scorer is the miniature's own CLIP, and the
miniature's attribute classifier reads whether the subject's looks are right. The losses are on renders that no run saw, in
scenes that no run saw. There is no DINO for this world. The published figures beside ours are Stable Diffusion v1.5's on
photographs: their level cannot be compared, but the order of rows can. What does not carry over between the scales:

- the token has 256 numbers, not 768: tau and GF-TI's intrinsic dimension are a third of the paper's;
- {steps} steps at learning rate {rate} instead of 30,000 at 0.005; GF-TI's and TI's steps are reduced with them;
- the base is NF4 here and INT8 in the paper (Table S8 has both); activations are fp32, so a small mu is not drowned in rounding;
- CLIP-I and the loss need not agree: a token of lower loss can draw worse pictures. Look at the sheets;
- speeds are those of a small model on one CPU thread, the paper's those of a large one on a GPU;
- 16 x 16 latents lose their layout at earlier timesteps than 64 x 64 ones: PUTS's bounds need not be the best here;
- a small model has less redundancy to spare for 4 bits than one of 860 M weights."""

    def __init__(self, output: Path, data: Path, prompts: Path):
        self.data, self.captions, self.other_captions = (output / "data", output / "data" / "cc.json",
                                                         output / "data" / "other_cc.json")  # fmt: skip

    def prepare(self, subjects: Iterable[str]) -> None:
        known = {breed.name for breed in (*held_out_breeds(), *spare_breeds())}
        if unknown := set(subjects) - known:
            raise InputError(f"--subjects: {', '.join(sorted(unknown))} are not held out; choose from {', '.join(sorted(known))}")
        captions = {}
        for subject in sorted(set(subjects)):
            for name, make in ((subject, make_subject), (self.judging_subject(subject), make_unseen)):
                captions[name] = render_once(self.data / name, lambda folder, s=subject, m=make: m(s, folder))
        if self.captions.exists():  # from an earlier command with other subjects
            captions = json.loads(self.captions.read_text()) | captions
        write_atomically(self.captions, (json.dumps(captions, indent=1) + "\n").encode())
        self.write_other_captions()

    def class_word(self, subject: str) -> str:
        return CLASS_NOUN

    def prompts(self, subject: str) -> list[str]:
        return list(MINIATURE_PROMPTS)

    def description(self, subject: str) -> str:
        return describe(breed_by_name(subject).critter)

    def judging_subject(self, subject: str) -> str:
        return f"{subject}-unseen"

    def renders(self, subject: str, others: bool, images: int) -> list[list[Image.Image]]:
        """The others take turns, so that each appears about equally often; places and details are only this table's."""
        breeds = [breed for breed in held_out_breeds() if (breed.name != subject) == others]
        rng = np.random.default_rng([2, others, [breed.name for breed in held_out_breeds()].index(subject)])
        pictures = []
        for p, (kind, wanted) in enumerate(MINIATURE_PROMPTS.values()):
            pictures.append([])
            for i in range(images):
                scene = wanted if kind == "scene" else str(rng.choice(SCENES))
                accessory = wanted if kind == "accessory" else "nothing"
                breed = breeds[(p * images + i) % len(breeds)]
                pictures[-1].append(render(scene_spec(breed, scene, accessory, rng=rng), size=64))
        return pictures

    def picture_scores(self, pictures: dict[str, list[Image.Image]], subject: str) -> dict[str, float]:
        """Shares of the pictures in which the classifier reads the subject's attributes, and what the prompt asks for.

        attributes_corrected: the same with the classifier's own errors taken out, (p - false) / (right - false) by attribute
        (Rogan and Gladen 1978). It is unbiased, so it may be slightly above 1.
        """
        critter = breed_by_name(subject).critter
        names = [name for name in ATTRIBUTES if not (name == "pattern_colour" and critter.pattern == "plain")]
        right: dict[str, list[bool]] = {name: [] for name in (*names, "scene", "accessory")}
        for prompt, row in pictures.items():
            kind, wanted = MINIATURE_PROMPTS[prompt]
            for read in classifier().read(pixels_of(row)):
                for name in names:
                    right[name].append(read[name] == getattr(critter, name))
                right[kind].append(read[kind] == wanted)
        shares = {name: float(np.mean(values)) for name, values in right.items() if values}
        corrected = []
        for name in names:
            hit, false = classifier_rates()[name, getattr(critter, name)]
            corrected.append((shares[name] - false) / (hit - false))
        return {"attributes": float(np.mean([shares[name] for name in names])), "attributes_corrected": float(np.mean(corrected)),
                **{name: shares[name] for name in ("scene", "accessory") if name in shares}}  # fmt: skip


def pixels_of(images: list[Image.Image]) -> torch.Tensor:
    """float [N, 3, 64, 64] in [-1, 1], as the classifier reads them."""
    arrays = [np.array(image.convert("RGB").resize((64, 64))) for image in images]
    return to_float(torch.from_numpy(np.stack(arrays)))


@lru_cache
def classifier_rates(count: int = 1000) -> dict[tuple[str, str], tuple[float, float]]:
    """{(attribute, value): (share read as this value if it is true, and if not)} on renders the classifier never saw."""
    from miniature.measures import fresh_renders

    images, specs = fresh_renders(count)
    read = [reading for chunk in images.split(125) for reading in classifier().read(chunk)]
    rates = {}
    for name in ATTRIBUTES:
        known = [(getattr(spec.critter, name), reading[name]) for spec, reading in zip(specs, read, strict=True)
                 if not (name == "pattern_colour" and spec.critter.pattern == "plain")]  # fmt: skip
        for value in classifier().labels[name]:
            hits = [said == value for true, said in known if true == value]
            false = [said == value for true, said in known if true != value]
            if hits:
                rates[name, value] = float(np.mean(hits)), float(np.mean(false))
    return rates


@lru_cache
def classifier():
    return load_classifier(ROOT / "miniature" / "classifier")


def render_once(folder: Path, make: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    """The captions of `make(folder)`; its pictures appear in `folder` all at once, because another shard may be reading there."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    captions = make(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # it already exists
        shutil.rmtree(temporary)
    return captions


def make_unseen(subject: str, folder: Path, count: int = 16) -> dict[str, str]:
    """Render a breed in the scenes that `make_subject` leaves out, to judge tokens on -> the captions."""
    breed = breed_by_name(subject)
    rng = np.random.default_rng([1, [each.name for each in (*held_out_breeds(), *spare_breeds())].index(subject)])
    scenes = [scene for scene in SCENES if scene not in TRAINING_SCENES]
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i in range(count):
        spec = scene_spec(breed, scenes[i % len(scenes)], str(rng.choice(ACCESSORIES)), rng=rng)
        render(spec, size=256).save(folder / f"{i:02}.png")
        captions[f"{i:02}.png"] = class_caption(spec, "{}")
    return captions


# ---------------------------------------------------------------------------------------------------------------------
# Stable Diffusion v1.5 and DreamBooth's photographs
# ---------------------------------------------------------------------------------------------------------------------


class StableDiffusion15(World):
    """The paper's model and subjects: `data` holds DreamBooth's folders, `prompts` is its prompts_and_classes.txt."""

    name, model, width = "sd15", DEFAULT_MODEL, 768
    methods = {
        "zoodip": dict(use_cc=True, max_train_steps=30000, learning_rate=5e-3, quantization="int8"),
        "ti": dict(max_train_steps=5000, quantization="int8"),
        "gf_ti": dict(max_train_steps=13000, quantization="int8"), "initial": dict(use_cc=True, quantization="int8"),
        **TUNERS,
    }  # fmt: skip
    subjects, paper_subjects = ("shiny_sneaker",), True
    images, scheduler, inference_steps, guidance = 5, "pndm", 50, 7.5  # the paper's
    clip, dino = CLIP, DINO
    judged_on = "the photographs learned from"
    cost_steps, seconds_per_step, seconds_per_forward, speed_of = 200, 0.016, 0.016, "the paper's RTX 3090"  # Table S6
    picture_bytes, unet_bytes = 450e3, 1.72e9
    caveats = """The losses are on the photographs that the runs learn from, because a subject has no others: a low loss shows
that a run fits these, and only pictures show whether it knows the subject."""

    def __init__(self, output: Path, data: Path, prompts: Path):
        self.data, self.captions, self.prompts_file = data, ROOT / "cc.json", prompts
        self.other_captions = output / "data" / "other_cc.json"

    @cached_property
    def dreambooth(self) -> DreamBoothPrompts:
        return parse_dreambooth_prompts(read_text(self.prompts_file))

    def prepare(self, subjects: Iterable[str]) -> None:
        for subject in subjects:
            self.dreambooth.of(subject)
            if not (self.data / subject).is_dir():
                raise InputError(
                    f"--data {self.data}: has no folder {subject}; dataset/README.md says how to get the paper's subjects"
                )
            find_images(self.data / subject, "data")
        self.write_other_captions()

    def class_word(self, subject: str) -> str:
        return self.dreambooth.of(subject)[0]

    def prompts(self, subject: str) -> list[str]:
        return self.dreambooth.of(subject)[1]


WORLDS: dict[str, type[World]] = {world.name: world for world in (Miniature, StableDiffusion15)}
