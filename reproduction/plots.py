"""Draws the plots that `experiments.py` declares, from what `plans.collect` gives of their tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from pathlib import Path
from textwrap import fill

import numpy as np

from reproduction.declarations import COLUMNS, HeatMaps, Histograms, PictureGrid, Plot, Scatter
from reproduction.memory_claims import MEASURED_AS, measured_memory
from reproduction.runs import Settings, pictures_path
from reproduction.scores import slug
from reproduction.stats import Records, printed_spread, values_of
from zoodip.files import write_image
from zoodip.pictures import picture_sheet
from zoodip.records import mean_interval
from zoodip.subject import find_images, open_image

Collect = Callable[[str], dict[str, Records]]  # name of a table -> its rows


def new_plot(rows: int, columns: int, size: tuple[float, float], **more):
    """A figure and its axes, row by row; `size` is that of one axis, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, **more)
    return figure, list(axes.flat)


def save_plot(figure, path: Path) -> None:
    """Save a figure with its legends below the axes and their labels, where they cover nothing."""
    from matplotlib import pyplot

    size = 6  # points, the unit of the distance below
    for axis in figure.axes:
        if names := axis.get_legend_handles_labels()[1]:
            columns = 1 if max(map(len, names)) > 45 else 2  # characters for which half of an axis has room
            reach = (axis.get_window_extent().y0 - axis.get_tightbbox().y0) * 72 / figure.dpi  # points that they reach down
            axis.legend(fontsize=size, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 0),
                        borderaxespad=reach / size + 0.5)  # fmt: skip
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@singledispatch
def draw(plot: Plot, name: str, collect: Collect, settings: Settings, path: Path) -> bool:
    """Draw the plot of table `name` -> whether there was anything to draw."""
    raise NotImplementedError(type(plot))


@draw.register
def heat_maps(plot: HeatMaps, name: str, collect: Collect, settings: Settings, path: Path) -> bool:
    """One panel for each score that some run has; bright is good; a cell without a run stays blank.

    Each panel says what noise alone would make of equal cells, because the colours span the cells however close their values are.
    """
    rows, (x_name, xs), (y_name, ys) = collect(name), plot.x, plot.y
    labels = [[plot.label.format(x=x, y=y) for x in xs] for y in ys]
    maps = {score: np.array([[np.mean(values_of(rows.get(label, {}), score) or [np.nan]) for label in line] for line in labels])
            for score in plot.scores}  # fmt: skip
    maps = {score: values for score, values in maps.items() if np.isfinite(values).any()}
    if not maps:
        return False
    figure, axes = new_plot(1, len(maps), (4.6, 3.4))
    for axis, (score, values) in zip(axes, maps.items(), strict=True):
        colours = "viridis_r" if COLUMNS[score].lower_is_better else "viridis"
        picture = axis.imshow(values, cmap=colours, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(j, i, COLUMNS[score].number(value), ha="center", va="center", fontsize=7, color="white",
                          bbox=dict(facecolor="black", alpha=0.3, linewidth=0, pad=1))  # fmt: skip
        axis.set_xticks(range(len(xs)), [f"{value:g}" for value in xs])
        axis.set_yticks(range(len(ys)), [f"{value:g}" for value in ys])
        axis.set(xlabel=f"{x_name}\n{noise_of_cells(rows, score)}", ylabel=y_name, title=COLUMNS[score].heading)
        figure.colorbar(picture, ax=axis)
    save_plot(figure, path)
    return True


def noise_of_cells(rows: dict[str, Records], score: str) -> str:
    """The scale of a grid's differences beside that of noise; empty if it cannot be determined."""
    spread = printed_spread(rows, score)
    return "" if spread is None else f"standard deviation of the cells {spread[0]}, of noise alone {spread[1]}"


@draw.register
def histograms(plot: Histograms, name: str, collect: Collect, settings: Settings, path: Path) -> bool:
    """Shares of each row's values per bin, one panel below the other, so that none hides another."""
    series = {label: [value for record in records.values() for value in record.get(plot.values, [])]
              for label, records in collect(name).items()}  # fmt: skip
    series = {label: values for label, values in series.items() if values}
    tau = settings.world.scaled(128)
    figure, axes = new_plot(len(series), 1, (6, 1.5), sharex=True)
    for k, (axis, (label, values)) in enumerate(zip(axes, series.items(), strict=True)):
        axis.hist(values, (np.arange(tau + 2) - 0.5) / tau, weights=np.full(len(values), 1 / len(values)), color=f"C{k}")
        axis.axvline(np.mean(values), color="black", linewidth=1, linestyle=":")
        axis.set_title(f"{label} (mean {np.mean(values):.3f})", fontsize=8)
        axis.set_ylabel(plot.labels[1], fontsize=7)
    axes[-1].set_xlabel(plot.labels[0])
    save_plot(figure, path)
    return True


@draw.register
def scatter(plot: Scatter, name: str, collect: Collect, settings: Settings, path: Path) -> bool:
    """CLIP-I with its interval against peak memory, for the points of which both are known; those without memory are named.

    The miniature's memory is the interpreter's, whatever the method: its quality is shown against Stable Diffusion v1.5's memory.
    """
    own, measured = settings.world.name == "sd15", measured_memory()
    found, unmeasured = {}, []
    for label, ((table, row), cost_row) in plot.points[settings.world.name].items():
        quality = values_of(collect(table).get(row, {}), "CLIP-I")
        gigabytes = measured.get(MEASURED_AS.get(label, ""))
        memory = values_of(collect(name).get(cost_row, {}), "peak_memory_gb") if own else [gigabytes] if gigabytes else []
        if quality and memory:
            found[label] = (float(np.mean(memory)), *mean_interval(quality))
        elif quality:
            unmeasured.append(label)
    if len(found) < 2:  # nothing to compare
        return False
    figure, (axis,) = new_plot(1, 1, (6.6, 4))
    for label, (memory, quality, width) in found.items():
        axis.errorbar(memory, quality, yerr=width if np.isfinite(width) else None, fmt="o", label=label, capsize=2)
    what = "peak memory" if own else "memory at Stable Diffusion v1.5's size, as nvidia-smi shows it"
    left_out = fill(f"not shown, as their memory was not measured: {'; '.join(unmeasured)}", 90) if unmeasured else ""
    axis.set_xlabel(f"{what}, GB\n{left_out}".strip())
    axis.set_ylabel("CLIP-I" if own else "CLIP-I of the miniature's pictures")
    axis.set_xlim(0, 1.1 * max(memory for memory, _, _ in found.values()))
    save_plot(figure, path)
    return True


@draw.register
def pictures(plot: PictureGrid, name: str, collect: Collect, settings: Settings, path: Path) -> bool:
    """One line for each subject and prompt. A grid that is there stays if pictures of some runs are not on this machine."""
    rows, blocks, wanted = collect(name), [], 0
    first = {label: {subject: record for (subject, _), record in reversed(rows.get(label, {}).items())}
             for label in plot.columns.values()}  # fmt: skip
    for subject in next(iter(first.values())):
        references = find_images(settings.world.data / subject) if (settings.world.data / subject).is_dir() else []
        for k, prompt in enumerate(plot.prompts[: len(references)]):
            found = [picture_of(records[subject]["spec"], prompt, settings)
                     for records in first.values() if subject in records]  # fmt: skip
            if len(found) < len(plot.columns):  # some column has no run yet
                continue
            wanted += 1
            drawn = [open_image(picture) for picture in found if picture is not None]
            if len(drawn) == len(found):
                blocks.append(([open_image(references[k]), *drawn], prompt.replace("{}", "<sks>")))
    if blocks and (len(blocks) == wanted or not path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, picture_sheet(blocks, headings=["a reference", *plot.columns]))
    return path.exists()


def picture_of(spec: dict, prompt: str, settings: Settings, kind: str = "scores") -> Path | None:
    """The first scored picture of a prompt, if it is on this machine."""
    folder = pictures_path(settings.folder(spec), settings, kind)
    return next(iter(sorted(folder.glob(f"{slug(prompt)}-0-*.png"))), None)


ON_SHEETS = 6  # pictures per subject, beside a reference


def row_sheet(records: Records, settings: Settings, kind: str, path: Path) -> bool:
    """Draw pictures of a table row, a line per subject -> whether there is a sheet. `kind`: which pictures.

    One that is there stays if pictures of some subjects are not on this machine.
    """
    blocks, subjects = [], dict.fromkeys(subject for subject, _ in records)
    for subject in subjects:
        spec = next(record["spec"] for (of, _), record in records.items() if of == subject)
        if kind == "inter":
            folder = pictures_path(settings.folder(spec), settings, kind)
            found = sorted(folder.glob("*.png"))[:ON_SHEETS]
        else:
            prompts = settings.prompts(subject)
            count = min(ON_SHEETS, len(prompts))
            shown = [prompts[k * len(prompts) // count] for k in range(count)]
            found = [picture for prompt in shown if (picture := picture_of(spec, prompt, settings, kind)) is not None]
        if found and (settings.world.data / subject).is_dir():
            reference = find_images(settings.world.data / subject)[0]
            blocks.append(([open_image(picture) for picture in (reference, *found)], subject))
    if blocks and (len(blocks) == len(subjects) or not path.exists()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, picture_sheet(blocks, columns=2, cell=64, gap=3))
    return path.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Learning curves
# ---------------------------------------------------------------------------------------------------------------------


def learning_curves(rows: dict[str, Records], score: str = "loss") -> dict[str, tuple]:
    """{row: (forwards, mean score, half width)} over subjects, each the mean of its seeds; points without the score are left out.

    The half width is that of the subjects' own shapes, after their levels are taken out. With fewer than three subjects it is 0,
    which draws no band: the interval of two is thirteen standard errors wide.
    """
    lines = {}
    for label, records in rows.items():
        curves: dict[str, list[list[float]]] = {}
        forwards: list[int] = []
        for (subject, _), record in records.items():
            points = [point for point in record.get("curve", []) if score in point]
            if len(points) > 1 and (not forwards or len(points) == len(forwards)):
                forwards = forwards or [point["unet_forwards"] for point in points]
                curves.setdefault(subject, []).append([point[score] for point in points])
        if curves:
            values = np.array([np.mean(of_subject, axis=0) for of_subject in curves.values()])  # [subjects, points]
            shapes = values - values.mean(1, keepdims=True)
            narrowed = np.sqrt(1 - 1 / len(forwards))  # by taking out the mean of as many points (Morey 2008)
            widths = np.array([mean_interval(list(column))[1] / narrowed if len(values) > 2 else 0.0 for column in shapes.T])
            lines[label] = (forwards, values.mean(0), widths)
    return lines


CURVE_SCORES = {"loss": "loss on {}", "CLIP-I": "CLIP-I of pictures", "attributes": "attributes right"}


def draw_curves(panels: dict[str, dict[str, Records]], judged_on: str, path: Path) -> None:
    """{title: rows}: the loss and scores of pictures against the forwards used; one column per table.

    `judged_on`: what the loss is on.
    """
    lines = {(score, title): learning_curves(rows, score) for score in CURVE_SCORES for title, rows in panels.items()}
    shown = [score for score in CURVE_SCORES if score == "loss" or any(lines[score, title] for title in panels)]
    figure, axes = new_plot(len(shown), len(panels), (3.9, 3.3))
    for axis, (score, title) in zip(axes, ((score, title) for score in shown for title in panels), strict=True):
        if not lines[score, title]:
            axis.set_visible(score == "loss")
            continue
        for k, label in enumerate(lines["loss", title]):  # a row has one colour in all panels, and one legend
            if label in lines[score, title]:
                x, mean, width = lines[score, title][label]
                name = label if score == "loss" else None
                axis.plot(x, mean, marker=".", markersize=4, linewidth=1, label=name, color=f"C{k}")
                axis.fill_between(x, mean - width, mean + width, alpha=0.15, color=f"C{k}")
        axis.set(title=title if score == "loss" else "", xlabel="forwards used", ylabel=CURVE_SCORES[score].format(judged_on))
    save_plot(figure, path)
