"""The card of a nano model: what it does without knowledge, with some, with all, as extractor.

    python -m oel_jax.nano.card --size=small [--seeds=10 | --quick] [--check] [--out=DIR]
    python -m oel_jax.nano.card --model=runs/nano/round_003/policy --out=DIR

Measures (`measure` says how) and writes card.md and card.json, which keeps what pre-training noted
there, into --out, by default the model's own directory. `--check` exits 1 when a line misses its
bar; bad input exits 2.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from oel_jax import environments
from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object
from oel_jax.environments.seeds import HELDOUT_GAMES
from oel_jax.models.bundled import model_dir
from oel_jax.models.config import ModelConfig
from oel_jax.nano import pretrain
from oel_jax.nano.measure import Line, measure
from oel_jax.nano.players import GAMES
from oel_jax.nano.reader import TEMPERATURE, Reader, check_family
from oel_jax.runs.metrics import table

# Lowest and highest value of a line that `--check` accepts, per size.
Bars = Mapping[str, tuple[float, float]]
_FULL: Bars = {
    "frozen_lake: no knowledge": (0.04, 0.12),
    "frozen_lake: gold": (0.90, 1.0),
    "frozen_lake: gold, long list": (0.90, 1.0),
    "frozen_lake: extraction on win": (0.95, 1.0),
    "frozen_lake: extraction on win, with previous": (0.95, 1.0),
    "frozen_lake: extraction on lose": (0.95, 1.0),
    "frozen_lake: extraction on lose, with previous": (0.95, 1.0),
    "frozen_lake: other worlds, gold": (0.90, 1.0),
    "frozen_lake: swapped world, gold": (0.90, 1.0),
    "sokoban: no knowledge": (0.0, 0.264),  # uniformly random play (0.164) and 10 points
    "sokoban: gold": (0.55, 1.0),
    "sokoban: gold, long list": (0.55, 1.0),
    "sokoban: extraction on win": (0.95, 1.0),
    "sokoban: extraction on win, with previous": (0.95, 1.0),
    "sokoban: other worlds, gold": (0.55, 1.0),  # not more is asked of the real boards
    "instructions": (0.90, 1.0),
}
_TINY: Bars = {  # what half the parameters reach with room to spare
    **{name: _FULL[name] for name in _FULL if not name.endswith("previous")},
    "sokoban: extraction on win": (0.90, 1.0),
}
BARS: Mapping[str, Bars] = {"tiny": _TINY, "small": _FULL, "medium": _FULL}
OTHER_SHAPES = "small"  # whose bars hold for a shape that is none of the family's sizes


def size_of(cfg: ModelConfig) -> str:
    """The member of the family that has this shape; '' when none has."""
    shape = (cfg.hidden_size, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    for name, size in pretrain.SIZES.items():
        if shape == (size.hidden, size.layers, size.heads, size.kv_heads):
            return name
    return ""


def missed(lines: Mapping[str, Line], bars: Bars) -> list[str]:
    """One sentence for every line that is outside its bar or was not measured."""
    found = []
    for name, bar in bars.items():
        if name not in lines:
            found.append(f"{name}: not measured (bar {_bar(bar)})")
        elif not bar[0] <= lines[name].value <= bar[1]:
            found.append(f"{name}: {_percent(lines[name].value)} (bar {_bar(bar)})")
    return found


# --- how a card looks


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bar(bar: tuple[float, float]) -> str:
    low, high = (f"{100 * edge:.3g} %" for edge in bar)
    if bar[1] == 1.0:
        return f"at least {low}"
    return f"{low} to {high}" if bar[0] else f"at most {high}"


HEADERS = ("line", "value", "95 % interval", "n", "bar", "")


def rows(lines: Mapping[str, Line], bars: Bars) -> list[tuple[str, ...]]:
    """The cells of the table, one row per line, in the order of `HEADERS`.

    The last cell tells whether the bar is met; lines of one game follow each other.
    """
    found = []
    for name in sorted(lines, key=_place):
        line = lines[name]
        if line.unit == "tokens":
            cells = f"{line.value:.1f} tokens", f"{line.low:.1f} to {line.high:.1f}"
        else:
            cells = _percent(line.value), f"{100 * line.low:.1f} to {100 * line.high:.1f} %"
        bar = ("", "")
        if name in bars:
            bar = (_bar(bars[name]), "MISSED" if missed(lines, {name: bars[name]}) else "met")
        found.append((name, *cells, str(line.n), *bar))
    return found


def _place(name: str) -> int:
    """Order of the groups of lines: each game with and without thinking, then the rest."""
    groups = [f"{game}{mode}:" for game in GAMES for mode in ("", ", not thinking")]
    return next((i for i, group in enumerate(groups) if name.startswith(group)), len(groups))


def markdown(card: Mapping[str, Any], lines: Mapping[str, Line], bars: Bars) -> str:
    """The text of card.md."""
    measured, made = card["measured"], card.get("run", {})
    trained = f", {card.get('step')} steps with seed {made['seed']}" if "seed" in made else ""
    limits = [
        f"{name} {_percent(bounds.floor)} and {_percent(bounds.ceiling)}"
        for name in GAMES
        if (bounds := environments.bounds(name))
    ]
    table_rows = ["| " + " | ".join(cells) + " |" for cells in rows(lines, bars)]
    return f"""\
# Card of the nano model {measured["size"] or "(another shape)"}

{measured["parameters"]:,} parameters{trained}. Measured with `python -m oel_jax.nano.card \
--seeds={measured["seeds"]} --seed={measured["seed"]}` at temperature {TEMPERATURE} on the \
{HELDOUT_GAMES} held-out boards of the real games. Intervals take games on one board as one \
cluster; look-ups, instructions and other worlds are independent (Wilson). Uniformly random and \
perfect play pass: {"; ".join(limits)}.

| {" | ".join(HEADERS)} |
|---|---|---|---|---|---|
{chr(10).join(table_rows)}
"""


# --- files and command line


def pretraining_notes(directory: Path) -> dict[str, Any]:
    """What pre-training wrote into card.json (nothing for a policy that a run exported).

    Raises:
      UserError: the file is damaged.
    """
    path = directory / "card.json"
    notes = read_object(path) if path.is_file() else {}
    notes.pop("measured", None)
    return notes


def _prepare(out: Path) -> None:
    """Make sure, before anything is measured, that the card can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"--out={out} cannot be written; choose another directory")


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def make_card(
    directory: Path, out: Path, *, seeds: int, seed: int = 0
) -> tuple[dict[str, Line], Bars]:
    """Measure the model in `directory`, print the table, write card.json and card.md into `out`.

    Returns the lines, and the bars that the model's size has to pass.

    Raises:
      UserError: not a model of the nano family, damaged files, or `out` cannot be written.
    """
    check_family(directory)
    notes = pretraining_notes(directory)
    reader = Reader(directory, seed=seed)
    _prepare(out)
    size = size_of(reader.model.cfg)
    bars = BARS[size or OTHER_SHAPES]
    began = time.monotonic()
    lines = measure(reader, seeds)
    measured = {
        "size": size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(reader.model.params)),
        "seeds": seeds,
        "seed": seed,
        "temperature": TEMPERATURE,
        "seconds": round(time.monotonic() - began, 1),
        "too_long_prompts": reader.too_long,
        "made_with": pretrain.made_with(),
        "lines": {name: _json(line) for name, line in lines.items()},
        "missed": missed(lines, bars),
    }
    card = {**notes, "measured": measured}
    _write(out / "card.json", json.dumps(card, indent=2) + "\n")
    _write(out / "card.md", markdown(card, lines, bars))
    print(table(rows(lines, bars), HEADERS))
    if reader.too_long:
        print(f"{reader.too_long} prompts did not fit and count as failures: the games ramble")
    print(f"wrote {out / 'card.json'} and {out / 'card.md'}")
    return lines, bars


def _json(line: Line) -> dict[str, Any]:
    edges = [round(line.low, 4), round(line.high, 4)]
    return {"value": round(line.value, 4), "ci95": edges, "n": line.n, "unit": line.unit}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.nano.card", description=(__doc__ or "").partition("\n")[0]
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=paths.argument, help="model directory")
    which.add_argument("--size", help="a bundled model: " + ", ".join(pretrain.SIZES))
    parser.add_argument("--seeds", type=int, default=10, help="plays of each held-out board")
    parser.add_argument("--quick", action="store_true", help="the same as --seeds=2")
    parser.add_argument("--seed", type=int, default=0, help="another one draws everything afresh")
    parser.add_argument("--out", type=paths.argument, help="default: the model's own directory")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    given = parser.parse_args(arguments)
    try:
        if given.seeds < 1:
            raise UserError(f"--seeds={given.seeds} must be at least 1")
        directory = given.model or model_dir(given.size)
        seeds = 2 if given.quick else given.seeds
        lines, bars = make_card(directory, given.out or directory, seeds=seeds, seed=given.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    below = missed(lines, bars)
    if given.check and below:
        print("outside its bar:\n  " + "\n  ".join(below), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
