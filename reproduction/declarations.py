"""Definitions of columns, plots, rows and tables: the vocabulary in which experiments.py is written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """How a score is printed. `plain`: as the median, lowest and highest value, if an interval would be meaningless."""

    heading: str
    digits: int = 3
    lower_is_better: bool = False
    plain: bool = False

    def number(self, value: float, sign: bool = False) -> str:
        """As the paper prints it: .759."""
        value = round(value, self.digits) + 0.0  # no minus sign before zero
        text = f"{value:+.{self.digits}f}" if sign else f"{value:.{self.digits}f}"
        return re.sub(r"^([+-]?)0\.", r"\1.", text)


COLUMNS = {
    "CLIP-T": Column("CLIP-T"), "CLIP-I": Column("CLIP-I"), "DINO": Column("DINO"), "attributes": Column("attributes right"),
    "attributes_corrected": Column("attributes right, the classifier's errors taken out"),
    "likeness": Column("CLIP-I from floor (0) to ceiling (1)"),
    "loss": Column("loss, t in [500, 900)", 5, lower_is_better=True), "loss_all": Column("loss, all t", 5, lower_is_better=True),
    "loss_at": Column("loss at equal forwards", 5, lower_is_better=True),
    "loss_path": Column("mean loss on the way there", 5, lower_is_better=True), "gap_closed": Column("share of the gap closed"),
    "DINO_inter": Column("DINO_inter", lower_is_better=True), "CLIP_inter": Column("CLIP_inter", lower_is_better=True),
    "removed": Column("share of the buffer's directions removed"), "removed_least": Column("least", plain=True),
    "removed_most": Column("most", plain=True), "refreshes": Column("refreshes", 0, plain=True),
    "momentum_removed": Column("share of the first moment removed"), "v_zero": Column("share of Adam's v that is 0"),
    "step": Column("step", 0, plain=True), "forwards": Column("forwards", 0, plain=True),
    "peak_memory_gb": Column("memory, GB", 2, plain=True),
    "stored_kb": Column("stored, KB", 1, lower_is_better=True, plain=True), "steps_per_second": Column("steps/s", 2, plain=True),
    "minutes": Column("minutes", 1, plain=True), "load": Column("load before", 2, plain=True),
    "scene": Column("scene right"), "accessory": Column("accessory right"),
    "drift": Column("drift: attributes with the class word alone", lower_is_better=True),
    "drift_CLIP-I": Column("drift: CLIP-I", lower_is_better=True), "drift_DINO": Column("drift: DINO", lower_is_better=True),
    "travel": Column("rate x steps / median scale", 2, plain=True), "trained": Column("trained numbers", 0, plain=True),
}  # fmt: skip
QUALITY = ("CLIP-T", "CLIP-I", "DINO")
# in addition to the paper's scores; attributes only on the miniature
OUR_SCORES = ("likeness", "attributes", "attributes_corrected", "loss", "loss_all")
COST = ("peak_memory_gb", "stored_kb", "steps_per_second", "minutes", "forwards")
OBEYED = ("scene", "accessory")  # what the prompt asks for besides the subject, on the miniature
AT_THE_END = "stopped at the end"  # a row of `stats.STOPS`
DRIFT = ("drift", "drift_CLIP-I", "drift_DINO")  # how much of the subject now appears for prompts with the class word alone
CLAIM_COLUMNS = (*QUALITY, *OUR_SCORES, "loss_at", "loss_path", "DINO_inter", "CLIP_inter", "removed", *DRIFT, "steps_per_second",
                 "stored_kb")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Plots: what each shows; `plots.draw` draws it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plot:
    file: str


@dataclass(frozen=True)
class HeatMaps(Plot):
    """One map per score over a grid of rows. `x` and `y` are (name, values); `label` names the row of a cell."""

    scores: tuple[str, ...]
    x: tuple[str, tuple]
    y: tuple[str, tuple]
    label: str


@dataclass(frozen=True)
class Histograms(Plot):
    """For each row, one histogram of a list that its runs hold."""

    values: str
    labels: tuple[str, str]


@dataclass(frozen=True)
class Scatter(Plot):
    """`points`: world -> label -> ((table, row) that gives CLIP-I, row of this table that gives the memory)."""

    points: dict[str, dict[str, tuple[tuple[str, str], str]]]


@dataclass(frozen=True)
class PictureGrid(Plot):
    """For each subject and prompt: a reference, and the first picture of a run of each row in `columns` (heading -> label)."""

    columns: dict[str, str]
    prompts: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def scores(text_score: float, image_score: float, dino: float, **more: float) -> dict:
    """Published figures of a row."""
    return {"CLIP-T": text_score, "CLIP-I": image_score, "DINO": dino, **more}


@dataclass(frozen=True)
class Row:
    """`method`: one of `runs.METHODS`, `runs.UNTRAINED` or `runs.RENDERED`."""

    label: str
    flags: dict = field(default_factory=dict)  # as in the paper; `runs.make_spec` scales those that depend on the world's size
    method: str = "zoodip"
    published: dict = field(default_factory=dict)  # score -> the paper's figure
    published_for: str = ""  # a setting of the paper's figure that is not the row's
    rate_of: str | None = None  # learns at this system's rate in the world; one of SYSTEMS
    rate_factor: float = 1.0  # multiplies that rate
    of_grid: bool = False  # uses the rate that the grid starts from, not the one chosen on it
    spread_of: tuple[str, ...] = ()  # has no run: the standard deviation of each score over these rows, run by run
    at: str = "last"  # the token that is scored; best: the snapshot with the best pictures, chosen on other pictures
    variation: tuple[str, ...] = ()  # from `variations.py`: which parts of the method are replaced
    against: str | None = None  # the row from which its differences are printed, if not that of its table


@dataclass(frozen=True)
class Control:
    """A row of Fig. 8 for a token that learns nothing: its `kind` in `controls.control_removed` and its `size` (tau, d).

    The default size is the world's. With a `share`, the row is just that share, and there is no token.
    """

    label: str
    kind: str = ""
    size: tuple[int, int] | None = None
    share: float | None = None
    variation: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """One table. `kind`: scores, inter, cost, or none to draw no pictures."""

    name: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    kind: str = "scores"
    paper_subjects: tuple[str, ...] = ("shiny_sneaker",)  # with Stable Diffusion v1.5
    breeds: int | None = None  # on the miniature: how many, from the first; None: all twelve
    seeds: int = 1  # per subject; with one or two subjects at least three, except in a grid
    worlds: tuple[str, ...] = ("miniature", "sd15")
    on_request: bool = False  # runs only if it is named
    grid: bool = False  # rows are cells of a plane, whose spread is compared with that of noise
    along: bool = False  # also scores pictures of the snapshots, to see when to stop
    with_cost: bool = False  # each row also has runs that measure speed and memory
    chooses_rates: bool = False  # for SYSTEMS, on separate subjects; `rates.py` records the choice
    gap: tuple[str, str] | None = None  # rows whose losses are the two ends of the gap; the others close a share of it
    controls: tuple[Control, ...] = ()  # rows without a run
    against: str | None = None  # the row from which the differences of those that name none are printed, with intervals
    stops: str | None = None  # the row that is scored at the steps that `stats.STOPS` chooses
    plot: Plot | None = None
    curves: str | None = None  # title of its panel among the learning curves
    note: str = ""

    def is_default_in(self, world: str) -> bool:
        """Whether it runs in a world if no tables are named."""
        return world in self.worlds and not self.on_request

    @property
    def heading(self) -> str:
        number = "Table " if re.fullmatch("S?[0-9]+", self.name) else ""
        return f"{number}{self.name}: {self.title}".replace("Fig8", "Figure 8")
