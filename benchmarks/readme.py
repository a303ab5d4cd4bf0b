"""The tables of measurements in README.md, made from the records in `benchmarks/results/`.

    python -m benchmarks.readme [--check]

`--check` changes nothing and exits 1 when the table is not what the records say.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.side_by_side import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- made by python -m benchmarks.readme -->", "<!-- end of the table -->"


def rows(results: Path) -> list[str]:
    """A Markdown row for each bar of each record, in the order of the files' names."""
    found = []
    for file in sorted(results.glob("*.json")):
        record = json.loads(file.read_text())
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


def compiled(results: Path) -> list[str]:
    """A Markdown row for each program that was compiled for a device that was not at hand."""
    found = []
    for file in sorted(results.glob("compile_*.json")):
        record = json.loads(file.read_text())
        settings = record["settings"]
        where = f"{settings['model']}, {settings['target']}, tp {settings['tp']}"
        for name, one in record["programs"].items():
            sizes = (one["argument_bytes"] / 1e9, one["temporary_bytes"] / 1e9)
            cells = [where, name, f"{one['compile_seconds']:.0f} s", *(f"{n:.2f}" for n in sizes)]
            found.append("| " + " | ".join(cells) + " |")
    return found


def table(results: Path = RESULTS) -> str:
    """What was measured, then what was only compiled."""
    head = [
        "| measured side by side | value | bar | settings | where, when |",
        "|---|---|---|---|---|",
    ]
    lines = [*head, *rows(results)]
    if programs := compiled(results):
        lines += [
            "",
            "Compiled ahead of time on two CPU cores for devices that were not at hand (a "
            "compiler's word, not a measurement; GB per device):",
            "",
            "| model, target | program | to compile | arguments GB | temporaries GB |",
            "|---|---|---|---|---|",
            *programs,
        ]
    return "\n".join(lines)


def replaced(text: str, new: str) -> str:
    """`text` with what stands between the marks replaced.

    Raises:
      ValueError: a mark is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if the table is out of date")
    options = parser.parse_args()
    old = README.read_text()
    new = replaced(old, table())
    if options.check:
        print("up to date" if new == old else "out of date: run python -m benchmarks.readme")
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
