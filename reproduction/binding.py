#!/usr/bin/env python
"""Do creatures keep their own attributes? Methods of zoodip.binding on the miniature, drawn, judged and compared by prompt.

    python -m reproduction.binding --sets S1 S3 S4 S5 --output results/binding            # 96 prompts x 2 seeds, every row
    python -m reproduction.binding --sets S1 --rows plain phrase full --prompts 6 --seeds 0 --split development
    python -m reproduction.binding --sets S2 --tokens results/tokens                      # a BREED.safetensors for each breed

Sets: S1 two colours; S2 a learned breed and a colour; S3 S1 with one accessory; S4 S2 with an accessory on each; S5 one creature
(does it harm?). `development` prompts are for choosing settings, `test` prompts for one report; no prompt is in both.
A picture is judged in its two 64 x 64 halves by the miniature's classifier, and its creatures are counted by a network that
is trained on renders the first time. What is drawn is not drawn again: one command after another goes on.
Writes RESULTS.md, results.json and a sheet of each set.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from miniature.captions import compose, describe
from miniature.classifier import AttributeClassifier
from miniature.critters import breed_by_name, held_out_breeds, random_critter
from miniature.drawing import render
from miniature.words import ACCESSORIES, ACCESSORY_PHRASES, COLOURS, CONFUSING_PAIRS, SCENE_PHRASES, SCENES
from miniature.world import random_spec
from reproduction.worlds import classifier
from zoodip.arguments import new_parser
from zoodip.binding import draw_bound
from zoodip.binding_settings import CONTROL, FULL, MERGE, PHRASE, PLAIN, PUBLISHED, Settings
from zoodip.errors import InputError, prepare_environment, run_script
from zoodip.files import write_atomically, write_image, write_json
from zoodip.model import load_pipeline
from zoodip.pictures import picture_sheet
from zoodip.records import ROOT, environment, mean_interval, plain_arguments, table

SIDE = 64  # of a half, and of what the judges read
SEED = 14  # of the order of prompts
TEST_PROMPTS = 96

# Rows of the tables; the paper's ablation is A plain, B merge, C = B + L_ent, D L_ent + L_sem unmerged, E L_ent, F = B + L_sem.
# D has no composite for L_sem to improve, so it is left out.
ROWS: dict[str, Settings] = {
    "plain": PLAIN,
    "phrase": PHRASE,
    "phrase, noun only": replace(PHRASE, states="noun"),
    "phrase + ETS": replace(PHRASE, ets_step=0),
    "phrase without bias": replace(PHRASE, bias=0.0),
    "plain + bias": replace(PLAIN, bias=PHRASE.bias),
    "raw merge + ETS": replace(MERGE, merge="raw"),
    "merge": MERGE,
    "merge + entropy": replace(FULL, sem_steps=0, pose="off"),
    "entropy": replace(CONTROL, pose="off"),
    "merge + semantic": replace(FULL, map_steps=0),
    "full": FULL,
    "full without ETS": replace(FULL, ets_step=-1),
    "full, semantic alone": replace(FULL, sem="alone"),
    "control": CONTROL,
    "published": PUBLISHED,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Wanted:
    """One creature that a prompt asks for, as the judge reads it."""

    colour: str | None = None
    accessory: str | None = None
    breed: str | None = None


@dataclass(frozen=True)
class Task:
    """A prompt, and what is to be seen in its halves; S5's one creature has the square to itself."""

    prompt: str
    creatures: tuple[Wanted, ...]
    scene: str

    @property
    def unit(self) -> str:
        """What results are averaged over first: a breed's prompts are not independent."""
        return self.creatures[0].breed or self.prompt


def colour_pairs() -> list[tuple[str, str]]:
    """All ordered pairs of colours that the classifier tells apart, in a fixed order."""
    pairs = [pair for pair in permutations(COLOURS, 2) if set(pair) not in CONFUSING_PAIRS]
    return [pairs[i] for i in np.random.default_rng(SEED).permutation(len(pairs))]


def group(noun: str, accessory: str | None) -> str:
    return f"[{noun}*{f' {ACCESSORY_PHRASES[accessory][0]}' if accessory else ''}]"


def tasks_of(name: str, split: str) -> list[Task]:
    """The prompts of one set; `development` ones share no pair, breed's colour or creature with the `test` ones."""
    rng, worn = np.random.default_rng([SEED, int(name[1])]), ACCESSORIES[1:]
    tasks = []
    if name == "S5":
        for i in range(TEST_PROMPTS + 10):
            critter, scene = random_critter(rng), SCENES[i % len(SCENES)]
            text = describe(critter).replace("critter", "critter*", 1)
            phrase = SCENE_PHRASES[scene][0]
            tasks.append(Task(f"{compose('x').split()[0] if text[0] not in 'aeiou' else 'an'} [{text}] {phrase}",
                              (Wanted(critter.colour),), scene))  # fmt: skip
    elif name in ("S1", "S3"):
        for i, (left, right) in enumerate(colour_pairs()):
            accessory = str(rng.choice(worn)) if name == "S3" else None
            on = int(rng.integers(2))
            creatures = tuple(Wanted(colour, accessory if k == on else None) for k, colour in enumerate((left, right)))
            tasks.append(two(creatures, SCENES[i % len(SCENES)]))
    else:
        for i in range(TEST_PROMPTS + 12):
            breed = held_out_breeds()[i % 12]
            others = [colour for colour in COLOURS if {colour, breed.critter.colour} not in CONFUSING_PAIRS]
            colour = str(rng.choice([colour for colour in others if colour != breed.critter.colour]))
            on = [str(each) for each in rng.choice(worn, 2, replace=False)] if name == "S4" else [None, None]
            creatures = (Wanted(breed.critter.colour, on[0], breed.name), Wanted(colour, on[1]))
            tasks.append(two(creatures, SCENES[(i + i // 12) % len(SCENES)]))
    return tasks[:TEST_PROMPTS] if split == "test" else tasks[TEST_PROMPTS:]


def two(creatures: tuple[Wanted, ...], scene: str) -> Task:
    nouns = ["<sks>" if each.breed else f"{each.colour} critter" for each in creatures]
    articles = ["an" if noun[0] in "aeiou" else "a" for noun in nouns]
    groups = [f"{a} {group(noun, each.accessory)}" for a, noun, each in zip(articles, nouns, creatures, strict=True)]
    return Task(f"{' and '.join(groups)} {SCENE_PHRASES[scene][0]}", creatures, scene)


# ---------------------------------------------------------------------------------------------------------------- judges


def counted_picture(index: int) -> tuple[Image.Image, int]:
    """A render with 0, 1 or 2 creatures. Two: the halves of two renders of one scene, which join without a seam."""
    rng = np.random.default_rng([SEED, index])
    spec = random_spec(rng, held_out=True)
    count = index % 3
    if count == 0:
        return render(replace_place(spec, -2.0), SIDE), 0
    if count == 1:
        return render(replace_place(spec, float(rng.uniform(0.25, 0.75))), SIDE), 1
    other = dataclasses.replace(random_spec(rng, held_out=True), scene=spec.scene, seed=spec.seed)
    sides = [
        render(dataclasses.replace(each, x=x, scale=float(rng.uniform(0.4, 0.52))), SIDE)
        for each, x in ((spec, 0.2), (other, 0.8))
    ]
    picture = sides[0].copy()
    picture.paste(sides[1].crop((SIDE // 2, 0, SIDE, SIDE)), (SIDE // 2, 0))
    return picture, 2


def replace_place(spec, x: float):
    return dataclasses.replace(spec, x=x)


def pixels_of(pictures: Iterable[Image.Image]) -> torch.Tensor:
    """float [N, 3, 64, 64] in [-1, 1]."""
    arrays = [np.array(picture.convert("RGB").resize((SIDE, SIDE))) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_counter(path: Path, pictures: int, epochs: int = 8) -> float:
    """Trains the network that counts creatures in a half, and writes it to `path` -> its share right on fresh renders."""
    drawn = [counted_picture(i) for i in range(pictures + pictures // 4)]
    pixels, counts = pixels_of(picture for picture, _ in drawn), torch.tensor([count for _, count in drawn])
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        counter = AttributeClassifier({"count": ("0", "1", "2")})
    optimizer = torch.optim.AdamW(counter.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(pictures, generator=generator).split(48):
            # a drawn picture is blurred and noisy beside a render
            clean = pixels[chosen].flip(-1) if torch.rand(1, generator=generator) < 0.5 else pixels[chosen]
            soft = F.avg_pool2d(F.pad(clean, (1, 1, 1, 1), mode="replicate"), 3, 1)
            blended = torch.lerp(clean, soft, torch.rand(1, generator=generator))
            noisy = blended + 0.05 * torch.randn(clean.shape, generator=generator)
            loss = F.cross_entropy(counter(noisy)["count"], counts[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = (counter.eval()(pixels[pictures:])["count"].argmax(1) == counts[pictures:]).float().mean().item()
    save_file(counter.state_dict(), path)
    return right


def load_counter(path: Path) -> AttributeClassifier:
    counter = AttributeClassifier({"count": ("0", "1", "2")})
    counter.load_state_dict(load_file(path))
    return counter.eval()


def score(task: Task, picture: Image.Image, counter: AttributeClassifier | None) -> dict[str, float]:
    """What the judges say of one picture; shares of what was asked, of 0 to 1, and what was not."""
    count = len(task.creatures)
    halves = [picture.crop((k * SIDE, 0, (k + 1) * SIDE, SIDE)) for k in range(count)]
    with torch.no_grad():
        logits = classifier()(pixels_of(halves))
        chance = logits["accessory"].softmax(1)
    read = classifier().read(pixels_of(halves))
    colours, wanted = [each["colour"] for each in read], [each.colour for each in task.creatures]
    scores: dict[str, float] = dict(
        right=colours == wanted if count == 1 else set(colours) == set(wanted), in_order=colours == wanted,
        scene=all(each["scene"] == task.scene for each in read),
    )  # fmt: skip
    if counter is not None:
        scores["one_each"] = [each["count"] for each in counter.read(pixels_of(halves))] == ["1"] * count
    if count == 2:
        scores |= dict(leak=colours[0] == colours[1], first=wanted[0] in colours, second=wanted[1] in colours)
    asked = [each.accessory for each in task.creatures]
    scores["uninvited"] = float(np.mean([each["accessory"] not in ("nothing", *asked) for each in read]))
    own = [
        float(chance[k, ACCESSORIES.index(each)] - chance[1 - k, ACCESSORIES.index(each)]) for k, each in enumerate(asked) if each
    ]
    if own:  # the judge has one label for a creature, so each accessory is compared between the halves
        scores |= dict(owner=float(np.mean([value > 0 for value in own])), owner_margin=float(np.mean(own)))
    breed = task.creatures[0].breed
    if breed:
        critter = breed_by_name(breed).critter
        names = ("colour", "pattern", "ears", "shape")
        scores["breed"] = float(np.mean([read[0][name] == getattr(critter, name) for name in names]))
        scores["pattern_leak"] = read[1]["pattern"] == critter.pattern != "plain"
    return {name: float(value) for name, value in scores.items()}


# --------------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Unit:
    """One picture."""

    set_name: str
    row: str
    task: Task
    seed: int
    quantization: str
    settings: Settings

    def stem(self) -> str:
        content = json.dumps(asdict(self), sort_keys=True)
        return f"{self.set_name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


@lru_cache(maxsize=2)
def pipeline_of(quantization: str, token: str | None):
    pipeline = load_pipeline(str(ROOT / "miniature" / "model"), quantization)
    if token:
        pipeline.load_textual_inversion(token)
    return pipeline


def draw_unit(unit: Unit, output: Path, tokens: Path | None) -> None:
    """Draw one picture: STEM.png, then STEM.json with its cost, which says that it is done."""
    torch.set_num_threads(1)
    breed = unit.task.creatures[0].breed
    pipeline = pipeline_of(unit.quantization, str(tokens / f"{breed}.safetensors") if breed and tokens else None)
    (picture,) = draw_bound(pipeline, [unit.task.prompt], settings=unit.settings, seeds=[unit.seed], height=SIDE,
                            width=SIDE * len(unit.task.creatures))  # fmt: skip
    write_image(output / "pictures" / f"{unit.stem()}.png", picture.image)
    record = dict(forwards=picture.forwards, backwards=picture.backwards, seconds=round(picture.seconds, 3))
    write_json(output / "pictures" / f"{unit.stem()}.json", dict(unit=asdict(unit), **record))


def judged(unit: Unit, output: Path, counter: AttributeClassifier | None) -> dict:
    """The record of a picture that is drawn, with its scores."""
    with Image.open(output / "pictures" / f"{unit.stem()}.png") as picture:
        scores = score(unit.task, picture, counter)
    return dict(**json.loads((output / "pictures" / f"{unit.stem()}.json").read_text()), scores=scores)


# ---------------------------------------------------------------------------------------------------------------- report


def by_unit(units: list[Unit], records: dict[Unit, dict], name: str) -> dict[str, float]:
    """{prompt, or breed: mean score of its pictures}."""
    values: dict[str, list[float]] = {}
    for unit in units:
        values.setdefault(unit.task.unit, []).append(records[unit]["scores"][name])
    return {key: float(np.mean(each)) for key, each in values.items()}


def interval(values: Iterable[float], sign: str = "") -> str:
    mean, half = mean_interval([100 * value for value in values])
    return f"{mean:{sign}.0f}" if np.isnan(half) else f"{mean:{sign}.0f} ± {half:.0f}"


def report(units: list[Unit], records: dict[Unit, dict]) -> str:
    """Markdown: a table of each set and quantisation; per cent, mean ± half width of a 95 % interval over prompts or breeds."""
    text = []
    for set_name, quantization in sorted({(unit.set_name, unit.quantization) for unit in units}):
        here = [unit for unit in units if (unit.set_name, unit.quantization) == (set_name, quantization)]
        rows = list(dict.fromkeys(unit.row for unit in here))
        names = list(records[here[0]]["scores"])
        of = {row: [unit for unit in here if unit.row == row] for row in rows}
        main = "owner" if "owner" in names else "right"
        base = {row: by_unit(of[row], records, main) for row in rows}
        lines = []
        for row in rows:
            cells = [interval(by_unit(of[row], records, name).values()) for name in names]
            for other in ("plain", "control"):
                known = other in base and row != other
                cells.append(interval((base[row][key] - base[other][key] for key in base[row]), "+") if known else "")
            cost = [f"{np.mean([records[unit][name] for unit in of[row]]):.{digits}f}" for name, digits in
                    (("forwards", 0), ("backwards", 0), ("seconds", 1))]  # fmt: skip
            lines.append([row, *cells, *cost])
        header = ["row", *names, f"{main} - plain", f"{main} - control", "forwards", "backwards", "seconds"]
        pictures = len(of[rows[0]])
        text.append(f"## {set_name}, {quantization}\n\n{pictures} pictures a row.\n\n{table(header, lines)}\n")
    return "\n".join(text)


def sheet(units: list[Unit], output: Path, most: int = 12) -> Image.Image:
    """The first prompts' pictures, a row of them for each, methods side by side."""
    rows = list(dict.fromkeys(unit.row for unit in units))
    prompts = list(dict.fromkeys((unit.task.prompt, unit.seed) for unit in units))[:most]
    blocks = []
    for prompt, seed in prompts:
        chosen = [unit for unit in units if (unit.task.prompt, unit.seed) == (prompt, seed)]
        pictures = [Image.open(output / "pictures" / f"{unit.stem()}.png") for unit in chosen]
        blocks.append((pictures, f"{prompt}, seed {seed}: {', '.join(rows)}"))
    return picture_sheet(blocks, aspect=len(units[0].task.creatures))


# ------------------------------------------------------------------------------------------------------------------ main


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sets", nargs="+", default=["S1", "S3", "S5"], choices=["S1", "S2", "S3", "S4", "S5"], help="which prompts")
    add("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="which methods")
    add("--split", default="test", choices=["test", "development"], help="prompts to report, or to choose settings on")
    add("--prompts", type=int, default=TEST_PROMPTS, help="of each set, at most")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="a picture for each; the same noise in every row")
    add("--quantization", nargs="+", default=["none"], choices=["none", "nf4"], help="of the model")
    add("--tokens", type=Path, default=None, help="folder with BREED.safetensors for the twelve breeds, for S2 and S4")
    add("--steps", type=int, default=25, help="denoising steps (DDIM)")
    add("--guidance", type=float, default=5.0, help="classifier-free guidance scale")
    add("--counter_pictures", type=int, default=6000, help="renders that the counter of creatures learns from; 0: no counter")
    add("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    add("--output", type=Path, default=Path("results/binding_evaluation"), help="folder for pictures and tables")
    add("--dry_run", action="store_true", help="print what would be drawn, and draw nothing")
    args = parser.parse_args(argv)
    for name in ("prompts", "steps", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def units_of(args: argparse.Namespace) -> list[Unit]:
    """Every picture. Raises InputError where a breed's token is missing."""
    units = []
    for set_name in args.sets:
        tasks = tasks_of(set_name, args.split)[: args.prompts]
        for breed in sorted({task.creatures[0].breed for task in tasks} - {None}):
            if args.tokens is None or not (args.tokens / f"{breed}.safetensors").is_file():
                raise InputError(
                    f"--tokens: there is no {breed}.safetensors in {str(args.tokens)!r}; {set_name} needs the token <sks> of "
                    "every held-out breed, as train_zoodip.py learns it"
                )
        units += [
            Unit(set_name, row, task, seed, quantization, replace(ROWS[row], steps=args.steps, guidance=args.guidance))
            for quantization in args.quantization for task in tasks for seed in args.seeds for row in args.rows
        ]  # fmt: skip
    return units


def main(args: argparse.Namespace) -> None:
    units, output = units_of(args), args.output
    done = lambda unit: output / "pictures" / f"{unit.stem()}.json"  # noqa: E731
    waiting = [unit for unit in units if not done(unit).exists()]
    print(f"{len(units)} pictures ({', '.join(args.sets)}; {len(args.rows)} rows), {len(waiting)} of them not drawn yet")
    if args.dry_run:
        return
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    if args.counter_pictures and not (output / "counter.json").exists():
        right = train_counter(output / "counter.safetensors", args.counter_pictures)
        write_json(output / "counter.json", dict(pictures=args.counter_pictures, right=right))
    prepare_environment()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(args.jobs, len(waiting) or 1), context) as pool:
        futures = [pool.submit(draw_unit, unit, output, args.tokens) for unit in waiting]
        for future in tqdm(futures, unit="picture"):
            future.result()
    head = (f"# Binding on the miniature ({args.split} prompts)\n\nPer cent; mean ± half width of a 95 % interval over prompts "
            "(S2, S4: breeds).\n")  # fmt: skip
    counter = network = None
    if args.counter_pictures:
        network = load_counter(output / "counter.safetensors")
        counter = json.loads((output / "counter.json").read_text())
        head += f"Creatures are counted right on {100 * counter['right']:.0f} % of fresh renders.\n"
    records = {unit: judged(unit, output, network) for unit in units}
    write_atomically(output / "RESULTS.md", f"{head}\n{report(units, records)}".encode())
    pictures = [dict(row=unit.row, **records[unit]) for unit in units]
    write_json(
        output / "results.json", dict(arguments=plain_arguments(vars(args)), **environment(), counter=counter, pictures=pictures)
    )
    for set_name in args.sets:
        write_image(output / f"{set_name}.png", sheet([unit for unit in units if unit.set_name == set_name], output))
    print(output / "RESULTS.md")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
