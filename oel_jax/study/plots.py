"""The pictures of a study, PNG and SVG. The only place that imports matplotlib."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from oel_jax.study.definitions import Plot, Study
from oel_jax.study.results import RATES, Cell, Results

# Told apart without colour vision too (Okabe and Ito), and each with its own marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
_INK, _FAINT = "#222222", "#DDDDDD"


def draw(results: Results, directory: Path) -> list[Path]:
    """Draw every plot of the study that has numbers; returns the files."""
    files = []
    for plot in results.study.plots:
        cells = _cells(results, plot)
        if not cells:
            continue
        figure = _dots(results.study, plot, cells) if plot.kind == "dots" else _line(plot, cells)
        for ending in ("png", "svg"):
            files.append(directory / f"{plot.name}.{ending}")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(files[-1], dpi=150, metadata={"Date": None} if ending == "svg" else {})
    return files


def _cells(results: Results, plot: Plot) -> list[list[Cell | None]]:
    """[variant][measure], without variants that have none of the measures."""
    names = plot.variants or tuple(variant.name for variant in results.study.variants)
    rows = [[results.cells.get((name, measure)) for measure in plot.measures] for name in names]
    return [row for row in rows if any(row)]


def _axes(width: float, height: float, title: str):
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _reach(cell: Cell) -> tuple[float, float]:
    """Lengths of the interval below and above the mean."""
    n = cell.number
    return (n.mean - n.low, n.high - n.mean) if n.low is not None else (0.0, 0.0)


def _dots(study: Study, plot: Plot, cells: list[list[Cell | None]]) -> Figure:
    """A row per variant and measure: mean, interval, and the paper's number where it has one."""
    shown = sum(cell is not None for row in cells for cell in row)
    figure, axes = _axes(7.5, 1.3 + 0.3 * shown + 0.12 * len(cells), plot.title)
    place, labels, places, paper = 0.0, [], [], False
    for row in cells:
        for column, cell in enumerate(row):
            if cell is None:
                continue
            below, above = _reach(cell)
            axes.errorbar(
                cell.number.mean,
                place,
                xerr=[[below], [above]],
                fmt=_MARKERS[column % len(_MARKERS)],
                color=_COLOURS[column % len(_COLOURS)],
                capsize=3,
                markersize=6,
            )
            if cell.paper is not None:
                axes.plot(cell.paper, place, "|", color=_INK, markersize=14, markeredgewidth=2)
                paper = True
            labels.append(f"{cell.variant}: {cell.measure}")
            places.append(place)
            place += 1.0
        place += 0.4
    axes.set_yticks(places, labels)
    axes.set_ylim(place - 0.6, -0.8)
    axes.grid(axis="x", color=_FAINT)
    _scale(axes, cells, "x")
    note = "bars: 95 % intervals" + ("; black strokes: the paper's numbers" if paper else "")
    seeds = f"{study.name}:{study.preset}, {len(study.seeds)} loop seed(s)"
    figure.text(1, 0, f"{note}. {seeds}", ha="right", va="bottom", fontsize=7, color="#666666")
    axes.set_xlabel(axes.get_xlabel() + "\n", fontsize=9, color=_INK)
    return figure


def _line(plot: Plot, cells: list[list[Cell | None]]) -> Figure:
    """A line per variant through the measures, with a band for its interval."""
    count = len(plot.measures)
    figure, axes = _axes(max(6.0, 2.5 + 0.62 * count), 4.2, plot.title)
    cuts = [0, *plot.breaks, count]
    for index, row in enumerate(cells):
        colour, name = _COLOURS[index % len(_COLOURS)], next(c for c in row if c).variant
        for first, last in zip(cuts, cuts[1:], strict=False):
            places = [i for i in range(first, last) if row[i] is not None]
            if not places:
                continue
            numbers = [row[i].number for i in places]
            means = [number.mean for number in numbers]
            axes.plot(
                places,
                means,
                color=colour,
                marker=_MARKERS[index % len(_MARKERS)],
                markersize=5,
                label=name if first == 0 else None,
            )
            below = [mean - _reach(row[i])[0] for i, mean in zip(places, means, strict=True)]
            above = [mean + _reach(row[i])[1] for i, mean in zip(places, means, strict=True)]
            axes.fill_between(places, below, above, color=colour, alpha=0.15, linewidth=0)
            axes.vlines(places, below, above, color=colour, alpha=0.5, linewidth=1)
    for cut in plot.breaks:
        axes.axvline(cut - 0.5, color=_FAINT, linewidth=1)
    slant = max(map(len, plot.labels or plot.measures)) * count > 70
    axes.set_xticks(
        range(count),
        plot.labels or plot.measures,
        rotation=35 if slant else 0,
        ha="right" if slant else "center",
    )
    axes.grid(axis="y", color=_FAINT)
    _scale(axes, cells, "y")
    if len(cells) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def _scale(axes, cells: list[list[Cell | None]], which: str) -> None:
    """Percent from 0 on for pass rates, plain numbers for the rest."""
    values = {cell.value for row in cells for cell in row if cell}
    axis, limits = getattr(axes, f"{which}axis"), getattr(axes, f"set_{which}lim")
    if values <= set(RATES):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        high = getattr(axes, f"get_{which}lim")()[1]
        limits(0, min(1.02, high))
        name = " and ".join(sorted(value.replace("_", " ") for value in values))
        axis.set_label_text(f"{name} (bands: 95 % intervals)" if which == "y" else name)
    else:
        name = next(iter(values)).replace("_", " ") if len(values) == 1 else "value"
        if any(m and m.number.mean < 3 and m.value == "response_tokens" for r in cells for m in r):
            name += ", start = 1"
        axis.set_label_text(name)
