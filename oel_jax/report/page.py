"""The report page of a run or study: one HTML file that needs no network and no other file.

    python -m oel_jax.report --workdir=runs/nano        # writes runs/nano/report.html

Every run writes it after each round, and every study at its end. It shows what is there, so it can
be made during a run or after it was stopped. Texts of trajectories and knowledge are outside
text: they are escaped, and the page's own policy (CSP) allows no script and no style but its own.
Imports no JAX.
"""

import argparse
import base64
import hashlib
import platform
import sys
from collections.abc import Sequence
from html import escape
from importlib import metadata, resources
from pathlib import Path
from string import Template

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import write_bytes
from oel_jax.config.chat_checks import is_chat
from oel_jax.report import conversations, sections, studies
from oel_jax.report.figure import pass_rates
from oel_jax.report.run_data import collect
from oel_jax.runs.workdir import Workdir


def page(workdir: Workdir) -> str:
    """The whole page.

    Raises:
      UserError: the workdir holds no run, or one of its files is damaged.
    """
    run = collect(workdir)
    chat, rounds = is_chat(run.config), len(run.rounds)
    body = [
        sections.headline(run, _versions(), conversations.cards(workdir, rounds) if chat else ()),
        conversations.results(workdir, rounds) if chat else sections.results(run),
        sections.training(run),
        sections.costs(run),
        sections.knowledge(run),
        "" if chat else sections.viewer(run),
        sections.settings(run),
    ]
    title = f"{run.name}: OEL run"
    return _filled(title, "\n".join(part for part in body if part), sections.games_json(run))


def study_page(root: Path) -> str:
    """The whole page of a study.

    Raises:
      UserError: it has no results yet, or they are damaged.
    """
    return _filled(*studies.body(root), "{}")


def _filled(title: str, body: str, games: str) -> str:
    """The template with these parts; `body` and `games` are escaped already."""
    parts = resources.files("oel_jax.report")
    style, script, template = (
        parts.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "viewer.js", "page.html")
    )
    return Template(template).substitute(
        title=escape(title),
        style=style,
        style_hash=_source_hash(style),
        script=script,
        script_hash=_source_hash(script),
        games=games,
        body=body,
    )


def write(workdir: Workdir) -> Path:
    """Write the page to `workdir.report_file`, replacing it at once; returns the path."""
    # Half of a surrogate pair can come out of a JSON file, but UTF-8 cannot hold it.
    write_bytes(workdir.report_file, page(workdir).encode("utf-8", "replace"))
    return workdir.report_file


def write_study(root: Path) -> Path:
    """Write the page of a study to its workdir; returns the path."""
    file = Workdir(root).report_file
    write_bytes(file, study_page(root).encode("utf-8", "replace"))
    return file


def figure(workdir: Workdir) -> bytes:
    """The pass rates of the page as a PNG; at least one evaluation must be there."""
    return pass_rates(collect(workdir).evaluations)


def _versions() -> dict[str, str]:
    names = ("oel_jax", "jax")
    versions = {"Python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # run from a checkout, or made where JAX is not needed
    return versions


def _source_hash(text: str) -> str:
    """What a content security policy calls an inline script or style."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--workdir", type=paths.argument, required=True, help="of the run or study")
    given = parser.parse_args(arguments)
    try:
        if studies.is_study(given.workdir):
            file = write_study(given.workdir)
        else:
            file = write(Workdir(given.workdir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {file}")
    return 0
