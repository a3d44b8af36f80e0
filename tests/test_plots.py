"""The plots of the reproduction suite: what they say, and that nothing in them is hidden."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import gpu
from reproduction import memory_claims, plots
from reproduction.declarations import HeatMaps, Scatter
from reproduction.experiments import BY_NAME, QUALITY_AND_MEMORY
from reproduction.stats import spread_of_cells


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, still open to be looked at."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    pyplot.close("all")


def records(score: str, *values: float) -> dict:
    return {(f"breed {i}", 0): {score: value} for i, value in enumerate(values)}


def assert_nothing_is_covered(figure) -> None:
    """No legend covers its own or another panel's axes, and all of it is on the picture."""
    figure.canvas.draw()
    axes = [box for axis in figure.axes for box in (axis.get_window_extent(), axis.xaxis.label.get_window_extent())]
    for axis in figure.axes:
        if legend := axis.get_legend():
            box = legend.get_window_extent()
            assert not any(box.overlaps(other) for other in axes)
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_grids_show_the_scale_of_noise(tmp_path, drawn):
    """The spread of the cells stands beside that of noise on equal ones, as in the report; neither is shown for one breed."""
    plot = HeatMaps("grid.png", ("CLIP-I",), ("x", (1, 2)), ("y", (1, 2)), "{x} {y}")
    rows = {"1 1": records("CLIP-I", 0.4, 0.5), "2 1": records("CLIP-I", 0.41, 0.53), "1 2": records("CLIP-I", 0.44, 0.5),
            "2 2": records("CLIP-I", 0.4, 0.48)}  # fmt: skip
    assert plots.draw(plot, "4", lambda name: rows, SimpleNamespace(), tmp_path / "grid.png")
    between, noise = (f"{value:.4f}"[1:] for value in spread_of_cells(rows, "CLIP-I"))
    assert drawn[0].axes[0].get_xlabel() == f"x\nstandard deviation of the cells {between}, of noise alone {noise}"
    one = {name: records("CLIP-I", next(iter(found.values()))["CLIP-I"]) for name, found in rows.items()}
    assert plots.draw(plot, "4", lambda name: one, SimpleNamespace(), tmp_path / "one.png")
    assert drawn[1].axes[0].get_xlabel() == "x\n"


def test_quality_stands_beside_the_memory_of_stable_diffusion(tmp_path, drawn, monkeypatch):
    """On the miniature every process is as large as the interpreter: the figures are those of Stable Diffusion v1.5's shape."""
    systems = {"ZOODiP, NF4": dict(nvidia_smi=6e8), "gradient TI, NF4": dict(nvidia_smi=2e9), "GF-TI, INT8": dict(error="none")}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(dict(results=dict(systems=systems))))
    monkeypatch.setattr(memory_claims.measured_memory, "__defaults__", (file,))
    points = {name: (("S8", name), name) for name in ("ZOODiP, NF4", "TI, NF4", "ZOODiP, INT8", "GF-TI, NF4 (memory: INT8)")}
    rows = {name: records("CLIP-I", 0.4, 0.5, 0.6) for name in points}
    own = {name: {("breed 0", 0): dict(peak_memory_gb=0.5)} for name in points}
    plot = Scatter("quality_memory.png", dict(miniature=points, sd15=points))

    def draw(world: str) -> bool:
        settings = SimpleNamespace(world=SimpleNamespace(name=world))
        return plots.draw(plot, "2", lambda name: rows if name == "S8" else own, settings, tmp_path / f"{world}.png")

    def shown(figure) -> dict[str, float]:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        return {label: float(handle[0].get_xdata()[0]) for handle, label in zip(handles, labels, strict=True)}

    assert draw("miniature") and draw("sd15")
    assert shown(drawn[0]) == {"ZOODiP, NF4": 0.6, "TI, NF4": 2.0}  # the others were not measured
    assert shown(drawn[1]) == dict.fromkeys(points, 0.5)
    assert "Stable Diffusion" in drawn[0].axes[0].get_xlabel() and "Stable" not in drawn[1].axes[0].get_xlabel()
    words = " ".join(drawn[0].axes[0].get_xlabel().split())
    assert words.endswith("not shown, as their memory was not measured: ZOODiP, INT8; GF-TI, NF4 (memory: INT8)")
    assert "not shown" not in drawn[1].axes[0].get_xlabel()
    for figure in drawn:
        assert_nothing_is_covered(figure)
    file.write_text(json.dumps(dict(results={})))
    assert not draw("miniature")  # one point or none compares nothing


def test_every_point_of_the_plot_names_a_measured_system():
    assert set(QUALITY_AND_MEMORY["miniature"]) <= set(memory_claims.MEASURED_AS)
    assert set(memory_claims.MEASURED_AS.values()) <= set(gpu.SYSTEMS)


@pytest.mark.parametrize("world", ["miniature", "sd15"])
def test_points_of_one_plot_are_of_the_same_subjects(world):
    tables = [BY_NAME[table] for (table, _), _ in QUALITY_AND_MEMORY[world].values()]
    assert len({table.breeds if world == "miniature" else table.paper_subjects for table in tables}) == 1


def test_legends_cover_no_curve(tmp_path, drawn):
    def curves(*labels: str) -> dict:
        curve = [dict(unet_forwards=i, loss=1 / (1 + i)) for i in range(4)]
        return {label: {(f"breed {k}", 0): dict(curve=curve) for k in range(3)} for label in labels}

    panels = {"method": curves("TI, as published", "TI, ZOODiP's weights, captions, timesteps",
                               "GF-TI, as published, 20 forwards a step (the script)",
                               "GF-TI, as published, 30 forwards a step (the paper)", "ZOODiP"),
              "estimator": curves("RGE", "SPSA"), "directions n": curves("n = 1")}  # fmt: skip
    plots.draw_curves(panels, "the photographs learned from", tmp_path / "curves.png")
    assert drawn[0].axes[0].get_ylabel() == "loss on the photographs learned from"
    assert all(axis.get_legend() for axis in drawn[0].axes)
    legends = [axis.get_legend().get_window_extent() for axis in drawn[0].axes]
    assert all(0 <= legend.x0 and legend.x1 <= drawn[0].bbox.width for legend in legends)
    assert_nothing_is_covered(drawn[0])
