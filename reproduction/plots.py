"""The suite's plots, from plain arrays; nothing here knows of runs or tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np


def new_plot(columns: int = 1, size: tuple[float, float] = (4.6, 3.4)):
    """A figure and its axes in a row; `size` in inches of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(size[0] * columns, size[1]), squeeze=False)
    return figure, list(axes[0])


def save_plot(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def heat_maps(maps: dict[str, np.ndarray], headings: dict[str, str], lower_is_better: set[str], x: tuple[str, tuple],
              y: tuple[str, tuple], text: Callable[[float, str], str], path: Path) -> None:
    """One panel for each score -> [len(y), len(x)], bright is good; `text(value, score)` words a value; nan stays blank."""
    figure, axes = new_plot(len(maps))
    for axis, (score, values) in zip(axes, maps.items(), strict=True):
        picture = axis.imshow(values, cmap="viridis_r" if score in lower_is_better else "viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                axis.text(j, i, text(value, score), ha="center", va="center", fontsize=7, color="white",
                          bbox=dict(facecolor="black", alpha=0.3, linewidth=0, pad=1))
        axis.set_xticks(range(len(x[1])), [f"{value:g}" for value in x[1]])
        axis.set_yticks(range(len(y[1])), [f"{value:g}" for value in y[1]])
        axis.set(xlabel=x[0], ylabel=y[0], title=headings.get(score, score))
        figure.colorbar(picture, ax=axis)
    save_plot(figure, path)


def histograms(series: dict[str, list[float]], bins: np.ndarray, labels: tuple[str, str], path: Path) -> None:
    """Shares of each series per bin, one panel under the other, so that none hides another."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = {label: values for label, values in series.items() if values}
    figure, axes = pyplot.subplots(len(series), 1, figsize=(6, 1.3 * len(series) + 0.6), sharex=True, squeeze=False)
    for k, (axis, (label, values)) in enumerate(zip(axes[:, 0], series.items(), strict=True)):
        axis.hist(values, bins, weights=np.full(len(values), 1 / len(values)), color=f"C{k}")
        axis.axvline(np.mean(values), color="black", linewidth=1, linestyle=":")
        axis.set_title(f"{label} (mean {np.mean(values):.3f})", fontsize=8)
        axis.set_ylabel(labels[1], fontsize=7)
    axes[-1, 0].set_xlabel(labels[0])
    save_plot(figure, path)


def curves(panels: dict[str, dict[str, tuple]], labels: tuple[str, str], path: Path) -> None:
    """{panel: {line: (x [P], mean [P], half width [P])}}."""
    figure, axes = new_plot(len(panels), (3.9, 3.3))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, (x, mean, width) in lines.items():
            (line,) = axis.plot(x, mean, marker=".", markersize=4, linewidth=1, label=label)
            axis.fill_between(x, mean - width, mean + width, alpha=0.15, color=line.get_color())
        axis.set(title=title, xlabel=labels[0], ylabel=labels[1] if axis is axes[0] else "")
        if lines:
            axis.legend(fontsize=6)
    save_plot(figure, path)


def scatter(points: dict[str, tuple[float, float, float]], labels: tuple[str, str], path: Path) -> None:
    """{label: (x, y, half width of y)}."""
    figure, (axis,) = new_plot(size=(6.6, 3.4))
    for label, (x, y, width) in points.items():
        axis.errorbar(x, y, yerr=width if np.isfinite(width) else None, fmt="o", label=label, capsize=2)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    if points:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))  # beside, where it hides no interval
    save_plot(figure, path)
