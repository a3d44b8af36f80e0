"""Reports what binding's records say: tables, paired differences, and whether aims are reached. Reads records.json.xz alone."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from reproduction.binding_judges import score
from reproduction.binding_rows import CORE
from reproduction.binding_sets import SETS, Task, tasks_of
from reproduction.binding_steps import draw_figure, table_of_steps
from zoodip.errors import InputError
from zoodip.files import write_atomically
from zoodip.records import mean_interval, table

MAIN = {"S1": "right", "S2": "right", "S3": "owner", "S4": "owner", "S5": "looks"}  # the score whose differences are shown
LEGEND = """The sets of prompts:

- S1: two creatures of different colours, in a scene
- S2: a learned breed and a creature of another colour
- S3: as S1, with an accessory on one of the two
- S4: as S2, with an accessory on each
- S5: one creature, fully described, which shows whether a method does harm

Per cent; mean ± half width of a 95 % interval over prompts (S2, S4: over the twelve breeds), each the mean of its
pictures. Differences are paired by prompt or breed. **right**: the two halves are read as the two colours, in either order;
**in_order**: the same, from left to right; **first**, **second**: that colour is read in at least one half; **leak**: both
halves are read as one colour; **owner**: an accessory is more likely on its own half than on the other (a tie counts
half), **margin**: by how much, **alone**: it is read on its own half and not on the other; **looks**: the attributes of the
breed on its half (S2, S4) or of the description (S5); **other**: the other creature's colour on its half; **pattern_leak**: the
other creature has the breed's pattern (for breeds that have one); **scene**: the scene is read in every half; **uninvited**:
halves with an accessory that nobody asked for; **empty**, **several**: halves without a creature, with two or more;
**empty_left**: left halves without; **one_each**: one creature in every half; **right_one_each**: **right** and **one_each**.
Passes: samples through the UNet per picture. The second table of a set shows what a method may harm.

The rows plain, phrase, merge, full, control and published are the methods of docs/binding.md. Ceiling: each half is drawn from
its own creature's prompt. ETS, end token substitution: the states of end and padding tokens are those of a prompt of the bare
nouns. Noun: as phrase, but the states of a group's other words are erased. "Noun, losses for bias": the same without the bias,
whose work control's losses on the latents do. The rows C to F are without the pose loss, as in the ToMe paper: compare them with
"full without pose"."""
COUNTED = {"0": "without a creature", "1": "with one", "2": "with two or more"}
HARMED = ("right_one_each", "one_each", "several", "empty", "uninvited", "scene")
FEWEST = 12  # values that decide an aim; a few equal ones would have an interval of width 0
AIM_HEADER = ["aim", "weights", "figure", "reached"]
COST_HEADER = ["row", "forward", "backward", "seconds", "in plain pictures"]

Scores = dict[str, list[float]]  # {prompt or breed: scores of its pictures}


def write_records(path: Path, records: dict) -> None:
    write_atomically(path, lzma.compress(json.dumps(records).encode()))


def read_records(path: Path) -> dict:
    """Raises InputError."""
    try:
        return json.loads(lzma.decompress(path.read_bytes()))
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{path}: not a valid file of records ({error}); make it without --report_only") from error


class Table:
    """The records of one set and quantisation, for the prompts that every row has."""

    def __init__(self, set_name: str, records: Sequence[dict]):
        self.set_name, self.rows = set_name, list(dict.fromkeys(record["row"] for record in records))
        tasks = {task.prompt: task for split in ("test", "development") for task in tasks_of(set_name, split)}
        pictures = [{(record["prompt"], record["seed"]) for record in records if record["row"] == row} for row in self.rows]
        self.common = set.intersection(*pictures)
        self.records = [record for record in records if (record["prompt"], record["seed"]) in self.common]
        if unknown := {prompt for prompt, _ in self.common} - tasks.keys():
            raise InputError(
                f"records.json.xz: {sorted(unknown)[0]!r} is not a prompt of {set_name}; the file is from another version"
            )
        self.scores: dict[str, dict[str, Scores]] = {row: {} for row in self.rows}  # {row: {score: ...}}
        for record in self.records:
            task: Task = tasks[record["prompt"]]
            for name, value in score(task, record["halves"]).items():
                self.scores[record["row"]].setdefault(name, {}).setdefault(task.unit, []).append(value)

    def means(self, row: str, name: str) -> dict[str, float]:
        return {unit: float(np.mean(values)) for unit, values in self.scores[row][name].items()}

    def difference(self, row: str, other: str, name: str) -> list[float]:
        ours, theirs = self.means(row, name), self.means(other, name)
        return [ours[unit] - theirs[unit] for unit in ours]

    def cost(self, row: str, name: str) -> float:
        return float(np.mean([record[name] for record in self.records if record["row"] == row]))

    def text(self) -> str:
        main, names = MAIN[self.set_name], list(self.scores[self.rows[0]])
        lines = []
        for row in self.rows:
            cells = [interval(self.means(row, name).values()) for name in names]
            for other in ("plain", "control"):
                known = other in self.rows and row != other
                cells.append(interval(self.difference(row, other, main), "+") if known else "")
            lines.append([row, *cells, *(f"{self.cost(row, name):.0f}" for name in ("forwards", "backwards"))])
        header = ["row", *names, f"{main} - plain", f"{main} - control", "forward", "backward"]
        prompts = len({prompt for prompt, _ in self.common})
        text = f"{prompts} prompts, {len(self.common)} pictures a row.\n\n{table(header, lines)}"
        others = [row for row in self.rows if row != "plain"]
        if "plain" not in self.rows or not others:
            return text
        harmed = [name for name in HARMED if name in names]
        lines = [[row, *(interval(self.difference(row, "plain", name), "+") for name in harmed)] for row in others]
        return f"{text}\n\n{table(['minus plain', *harmed], lines)}"

    def alike(self, row: str, other: str) -> tuple[int, int]:
        """(pictures that are read alike in both rows, pictures)."""
        words: list[dict] = [
            {(record["prompt"], record["seed"]): [{name: value for name, value in half.items() if isinstance(value, str)}
                                                  for half in record["halves"]]
             for record in self.records if record["row"] == name}
            for name in (row, other)
        ]  # fmt: skip
        return sum(words[0][key] == words[1][key] for key in words[0]), len(words[0])


def interval(values: Iterable[float], sign: str = "") -> str:
    mean, half = mean_interval([100 * value for value in values])
    return f"{mean:{sign}.0f}" if np.isnan(half) else f"{mean:{sign}.0f} ± {half:.0f}"


def tables_of(pictures: Sequence[dict], rows: Sequence[str] | None = None) -> dict[tuple[str, str], Table]:
    """{(set, quantization): table of all rows, or of `rows`}, without tables in which no prompt has every row."""
    found, chosen = {}, [record for record in pictures if rows is None or record["row"] in rows]
    for set_name, quantization in dict.fromkeys((record["set"], record["quantization"]) for record in chosen):
        here = [record for record in chosen if (record["set"], record["quantization"]) == (set_name, quantization)]
        made = Table(set_name, here)
        if made.common:
            found[set_name, quantization] = made
    return dict(sorted(found.items(), key=lambda item: (item[0][1] != "none", SETS.index(item[0][0]))))


# ------------------------------------------------------------------------------------------------------------------- aims


def too_few(values: Sequence[float]) -> str | None:
    """What is said of an aim that so few values cannot decide."""
    return f"cannot be told from {len(values)} values" if len(values) < FEWEST else None


def verdict(values: Sequence[float], bound: float) -> str:
    """Whether the mean is at least `bound`, as far as its interval can tell."""
    if few := too_few(values):
        return few
    mean, half = mean_interval(values)
    points = f"{100 * mean:+.0f} points" if bound <= 0 else f"{100 * mean:.0f} %"
    return "yes" if mean - half >= bound else "no" if mean + half < bound else f"cannot be told, the mean is {points}"


def above_control(values: Sequence[float]) -> str:
    """Whether `full` was shown to be worth its backward passes."""
    if few := too_few(values):
        return few
    mean, half = mean_interval(values)
    return "yes" if mean - half > 0 else "it was not shown to be: use `phrase`, which needs no backward pass"


def aims(found: dict[tuple[str, str], Table], costs: dict) -> list[list[str]]:
    """[aim, unquantised or NF4, figure, verdict] of each aim; all were set before anything was drawn."""
    lines = []
    for (set_name, quantization), made in found.items():
        for name, row, other, bound, text in AIMS:
            if name != set_name or row not in made.rows or (other and other not in made.rows):
                continue
            main = MAIN[set_name]
            values = made.difference(row, other, main) if other else list(made.means(row, main).values())
            said = above_control(values) if other == "control" else verdict(values, bound)
            if name == "S5":
                alike, of = made.alike(row, str(other))
                said += f"; a phrase that begins the prompt stays as it is: {alike} of {of} pictures are read alike"
            lines.append([text, quantization, interval(values, "+" if other else ""), said])
    if ratio := cost_ratios(costs).get("phrase"):
        mean, half = mean_interval(ratio)
        reached = "yes" if mean + half <= 1.3 else "no" if mean - half > 1.3 else "cannot be told"
        lines.append(["a picture with phrase costs at most 1.3 plain ones", "none", f"{mean:.2f} ± {half:.2f}", reached])
    return lines


AIMS = (  # set, row, the row it is compared with, least value of the set's main score, in words
    ("S1", "phrase", None, 0.85, "phrase has both colours right in at least 85 % of S1"),
    ("S4", "phrase", None, 0.85, "phrase has accessories on their owners in at least 85 % of S4"),
    ("S5", "phrase", "plain", -0.02, "phrase does no harm on S5: it is within 2 points of plain"),
    ("S1", "full", "control", 0.0, "full is above its control on S1"),
)


def cost_ratios(costs: dict) -> dict[str, list[float]]:
    """{row: processor time of its pictures as multiples of plain ones, prompt by prompt}."""
    plain = {each["prompt"]: each["seconds"] for each in costs["pictures"] if each["row"] == "plain"}
    found: dict[str, list[float]] = {}
    for each in costs["pictures"]:
        found.setdefault(each["row"], []).append(each["seconds"] / plain[each["prompt"]])
    return found


def cost_lines(costs: dict) -> list[list[str]]:
    lines = []
    for row, ratios in cost_ratios(costs).items():
        mean, half = mean_interval(ratios)
        of = [each for each in costs["pictures"] if each["row"] == row]
        seconds = float(np.mean([each["seconds"] for each in of]))
        lines.append([row, str(of[0]["forwards"]), str(of[0]["backwards"]), f"{seconds:.2f}", f"{mean:.2f} ± {half:.2f}"])
    return lines


# ------------------------------------------------------------------------------------------------------------------ report


def introduction(records: dict) -> str:
    arguments, counter = records["arguments"], records["counter"]
    measured = {name: records["costs"].get(name, records[name]) for name in ("device", "commit")}
    right = ", ".join(f"{100 * share:.0f} % of halves {COUNTED[count]}" for count, share in counter["right"].items())
    drawn = ", ".join(f"{good} of {of} {COUNTED[count]}" for count, (good, of) in counter["drawn"].items())
    judged = ", ".join(f"{name} {100 * share:.0f} %" for name, share in counter["classifier"].items())
    seeds: dict[tuple[str, str], set[int]] = {}
    for picture in records["pictures"]:
        seeds.setdefault((picture["set"], picture["prompt"]), set()).add(picture["seed"])
    noises = {(set_name, frozenset(own)) for (set_name, _), own in seeds.items()}
    each = "prompt of a set" if len(noises) == len(seeds) else "few prompts"
    of_prompts = "the same for every prompt" if len({own for _, own in noises}) == 1 else f"other ones for every {each}"
    commits, devices = (
        ", ".join(sorted({picture.get(name) or records[name] for picture in records["pictures"]}))
        for name in ("commit", "device")
    )
    return f"""# Binding on the miniature ({arguments["split"]} prompts)

{arguments["steps"]} steps of {arguments["scheduler"].upper()}, guidance {arguments["guidance"]:g}, 64 pixels per creature,
{len(arguments["seeds"])} first noises per prompt, {of_prompts}, the same in every row; tables with every row use only the first.
The breeds' tokens were learned in 4 bits.
Pictures: {devices}, commit {commits}; read at commit {records["commit"]}.
Costs: {measured["device"]}, commit {measured["commit"]}.

The judges: the creature counter is right on {right} ({counter["fresh"]} halves of unseen renders, passed through the VAE).
On halves of drawn pictures that were counted by eye it is right on {drawn}: its columns may be off by as much.
On two renders of one scene side by side, passed through the VAE, the classifier is right on: {judged}."""


def write_report(records: dict, folder: Path) -> None:
    """Write RESULTS.md and steps.png. Raises InputError if records and prompts are of different versions."""
    found = tables_of(records["pictures"], CORE)
    others = {key: made for key, made in tables_of(records["pictures"]).items() if set(made.rows) - set(CORE)}
    text = [introduction(records), "## What was aimed at", "Yes (no): the interval lies wholly on that side of the bound."]
    text.append(table(AIM_HEADER, aims(found, records["costs"])))
    text += ["## Tables", LEGEND]
    for what, chosen in (("", found), (", every row", others)):  # the latter over fewer prompts if not all is drawn
        for (set_name, quantization), made in chosen.items():
            weights = "unquantised" if quantization == "none" else quantization.upper()
            text += [f"### {set_name}, {weights}{what}", made.text()]
            if not what and (folder / f"{set_name}-{quantization}.jpg").exists():
                text.append(f"![{set_name}, {weights}: a line for each prompt]({set_name}-{quantization}.jpg)")
    text.append(
        "## Cost\n\nProcessor seconds of one picture drawn by itself, one thread, rows in turn on some prompts; paired ratios."
    )
    text.append(table(COST_HEADER, cost_lines(records["costs"])))
    text.append(f"""## Without backpropagation

The share of a composite's semantic loss that is left after a number of forwards, in per cent of its first value; a backward
counts as two. Geometric mean and 95 % interval over {len(records["steps"]["phrase"])} groups of development prompts.""")
    text.append(table_of_steps(records["steps"]))
    text.append("![What is left of the loss](steps.png)")
    draw_figure(records["steps"], folder / "steps.png")
    write_atomically(folder / "RESULTS.md", ("\n\n".join(text) + "\n").encode())
    print(folder / "RESULTS.md")
