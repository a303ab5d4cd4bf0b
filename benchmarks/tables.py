"""The tables of measurements in docs/speed.md, made from the records in `benchmarks/results/`.

    python -m benchmarks.tables [--check]

`--check` changes nothing and exits 1 when the table is not what the records say.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.side_by_side import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "speed.md"
BEGIN, END = "<!-- made by python -m benchmarks.tables -->", "<!-- end of the table -->"


def rows(results: Path) -> list[str]:
    """A Markdown row for each bar of each record, in the order of the files' names."""
    found = []
    for file in sorted(results.glob("*.json")):
        record = json.loads(file.read_text())
        if "bars" not in record:  # a plan: nothing was measured
            continue
        settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
        cores = f", {record['cores']} cores" if record["device"] == "cpu" else ""
        for bar in record["bars"]:
            sign = "<=" if bar["most"] else ">="
            verdict = "" if bar["met"] else " (missed)"
            target = "-" if bar["target"] is None else f"{sign} {bar['target']:g}"
            cells = [
                bar["name"],
                f"{bar['value']:.2f}{verdict}",
                target,
                settings,
                f"{record['device']}{cores}, {record['date']}",
            ]
            found.append("| " + " | ".join(cells) + " |")
    return found


def planned(results: Path) -> list[str]:
    """A Markdown row for each model and target of `benchmarks.plan_table`."""
    found = []
    records = [json.loads(file.read_text()) for file in results.glob("plan_*.json")]
    for record in sorted(
        records, key=lambda r: (r["parameters"], r["device"]["memory"], r["target"])
    ):
        mesh = record["mesh"]
        most = max(record["stages"], key=lambda stage: stage["total"])
        compiled = [
            one["compiled"]["seconds"] for one in record["programs"].values() if "compiled" in one
        ]
        slots = re.search(r"sampler.slots=(\d+)", record["flags"])[1]
        cells = [
            f"{record['model'].rpartition('/')[2]}, {record['target']}",
            f"{mesh['fsdp']} x {mesh['tp']}, {slots}",
            "yes" if record["fits"] else "no",
            f"{most['total'] / 1e9:.1f} of {record['device']['memory'] / 1e9:.1f}",
            most["name"],
            f"{record['step_seconds']:.0f} s" if record["fits"] else "-",
            f"{sum(record['hours'].values()):.1f} h" if record["fits"] else "-",
            f"{sum(compiled):.0f} s" if compiled else "not compiled",
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def table(results: Path = RESULTS) -> str:
    """What was measured, then what was only planned."""
    head = [
        "| measured side by side | value | bar | settings | where, when |",
        "|---|---|---|---|---|",
    ]
    lines = [*head, *rows(results)]
    if plans := planned(results):
        lines += [
            "",
            "What the planner says of the Frozen Lake recipe (ten texts of up to 8,192 tokens) on "
            "the mesh that it recommends: bytes from the compiler for devices that were not at "
            "hand, seconds and hours estimated from peaks; nothing of this was run:",
            "",
            "| model, target | fsdp x tp, slots | fits | GB of a device at most | in the stage "
            "| a step | a round | compiled in |",
            "|---|---|---|---|---|---|---|---|",
            *plans,
        ]
    return "\n".join(lines)


def replaced(text: str, new: str) -> str:
    """`text` with what is between the marks replaced.

    Raises:
      ValueError: a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if the table is out of date")
    options = parser.parse_args()
    old = PAGE.read_text()
    new = replaced(old, table())
    if options.check:
        print("up to date" if new == old else "out of date: run python -m benchmarks.tables")
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
