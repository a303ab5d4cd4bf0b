"""The sections of a study's page: verdicts, tables with intervals, plots, failed runs."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.report.sections import table

_RATES = ("pass_rate", "skill")  # shown in percent


def is_study(root: Path) -> bool:
    """Whether a workdir is that of a study."""
    return (root / "study.json").is_file()


def body(root: Path) -> tuple[str, str]:
    """(title, HTML) of the study in a workdir; every text is escaped.

    Raises:
      UserError: the study has not written its results yet, or they are damaged.
    """
    file = root / "results.json"
    if not file.exists():
        raise UserError(
            f"--workdir={root}: the study has no results.json yet; let `python -m oel_jax.study` "
            "finish, or give the workdir of one of its runs"
        )
    results = read_json(file)
    try:
        name = f"{results['study']}:{results['preset']}"
        parts = [
            f"<h1>Study {escape(name)}</h1>",
            f'<pre class="words">{escape(results["about"])}</pre>',
            _verdicts(results["expectations"], results["failed"]),
            _plots(root / "plots"),
            *_tables(results["cells"], results["baseline"]),
            f'<p class="soft">Loop seeds {escape(", ".join(map(str, results["seeds"])))}. '
            "Intervals cover 95 %: of pass rates over loop seeds and boards, of other numbers over "
            "loop seeds; differences are paired on the same seeds and boards.</p>",
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); run the study again") from error
    return f"{name}: OEL study", "\n".join(part for part in parts if part)


def _verdicts(expectations: Sequence[dict[str, Any]], failed: dict[str, str]) -> str:
    found = ""
    if expectations:
        held = sum(bool(one["held"]) for one in expectations)
        found = f"<h2>Expected and found</h2><p>{held} of {len(expectations)} held.</p><ul>"
        for one in expectations:
            verdict = "held" if one["held"] else "did not hold"
            found += f"<li><strong>{verdict}</strong>: {escape(one['name'])}"
            found += f'<br><span class="soft">{escape(one["numbers"])}</span></li>'
        found += "</ul>"
    if failed:
        rows = [[name, message] for name, message in failed.items()]
        found += "<h2>Failed runs</h2>" + table("The others went on.", ["run", "error"], rows, 2)
    return found


def _plots(directory: Path) -> str:
    shown = []
    for file in sorted(directory.glob("*.png")):
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        label = escape(file.stem.replace("_", " "))
        shown.append(f'<img class="plot" alt="{label}" src="data:image/png;base64,{data}">')
    return "<h2>Plots</h2>" + "".join(shown) if shown else ""


def _tables(cells: Sequence[dict[str, Any]], baseline: str) -> list[str]:
    """One table for each measure."""
    found = ["<h2>Numbers</h2>"]
    heads = ["variant", "mean [95 % interval]", "to start", f"to {baseline or '-'}", "paper"]
    for measure in dict.fromkeys(cell["measure"] for cell in cells):
        rows = [_row(cell) for cell in cells if cell["measure"] == measure]
        found.append(table(measure, heads, rows))
    return found


def _row(cell: dict[str, Any]) -> list[str]:
    value = cell["value"]
    differences = (_number(cell[name], value, True) for name in ("to_start", "to_baseline"))
    paper = cell["paper"]
    only = {"mean": paper, "low": None, "high": None} if paper is not None else None
    return [cell["variant"], _number(cell["number"], value), *differences, _number(only, value)]


def _number(number: dict[str, Any] | None, value: str, signed: bool = False) -> str:
    if number is None:
        return "-"
    sign = "+" if signed else ""

    def one(x: float) -> str:
        return f"{100 * x:{sign}.1f} %" if value in _RATES else f"{x:{sign}.2f}"

    if number["low"] is None:
        return one(number["mean"])
    return f"{one(number['mean'])} [{one(number['low'])}, {one(number['high'])}]"
