"""The knowledge texts of a round with what they were drawn from, for a person to read."""

from collections.abc import Sequence

import ml_collections

from oel_jax.base.files import read_json
from oel_jax.data.history import words_of
from oel_jax.data.trajectories import Trajectory
from oel_jax.learner.contexts import games_of_chain
from oel_jax.logs.quotes import Source
from oel_jax.review.decisions import Decision
from oel_jax.runs.metrics import printable
from oel_jax.runs.workdir import Workdir

_EXCERPT = 160  # characters of the first message and of the last reply


def sheet(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    round_number: int,
    texts: Sequence[str],
    decisions: Sequence[Decision],
) -> str:
    """Markdown: each text with its state, its lines that give something away, and its sources.

    Text from outside is indented, so that nothing in it is a heading, and what a terminal would
    not print is shown as '?'.
    """
    parts = [
        f"# Knowledge texts of round {round_number}",
        "",
        f"{len(texts)} text(s), one for each chain. `oel review --workdir={workdir.root}` with "
        "`--approve`, `--reject`, `--edit` or `--text` decides; then run the same `oel run` again.",
    ]
    for chain, (text, decision) in enumerate(zip(texts, decisions, strict=True)):
        parts += ["", *_text(config, workdir, round_number, chain, text, decision)]
    return "\n".join(parts) + "\n"


def _text(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    round_number: int,
    chain: int,
    text: str,
    decision: Decision,
) -> list[str]:
    """The lines of one text."""
    used = text if decision.edited is None else decision.edited
    lines = [f"## Text {chain}: {decision.status}", ""]
    if decision.edited is not None:
        lines += ["As edited:", "", *_indented(used), "", "As the extractor wrote it:", ""]
    lines += _indented(text) or ["    (empty)"]
    if config.extract.knowledge_from:
        lines += ["", f"It is a copy from {config.extract.knowledge_from}, which has its sources."]
        return lines
    games = games_of_chain(config, workdir, round_number, chain)[: config.extract.n]
    sources = [Source(game) for game in games]
    flags = []
    for line in used.split("\n"):
        found = {str(why): None for source in sources for why in source.findings(line)}
        if found:
            flags.append(f"    {_shown(line)}  <- {_shown('; '.join(found))}")
    if flags:
        lines += ["", "**Lines that may give a trajectory away:**", "", *flags]
    users = len({game.user for game in games if game.user is not None})
    of_users = f" of {users} user(s)" if users else ""
    lines += ["", f"Drawn from {len(games)} trajectories{of_users}:", ""]
    for step, game in enumerate(games, start=1):
        lines += _source(workdir, round_number, chain, step, game)
    return lines


def _source(
    workdir: Workdir, round_number: int, chain: int, step: int, game: Trajectory
) -> list[str]:
    """A trajectory, and what was written and left out after it."""
    record = read_json(workdir.knowledge_step(round_number, chain, step))
    if game.id is None:
        name = f"{game.game}, seed {game.seed}"
    else:
        name = f"conversation {game.id}" + (f", user {game.user}" if game.user else "")
    turns = game.turns
    first = next(
        (words_of(m) for m in turns[0].messages if m["role"] == "user"),
        words_of(turns[0].messages[-1]),
    )
    last = game.feedback(len(turns) - 1) or turns[-1].response
    lines = [f"{step}. {_shown(name)}, {len(turns)} answer(s)"]
    lines += [f"    - begins: {_excerpt(first)}", f"    - ends: {_excerpt(last)}"]
    for line in filter(str.strip, record["parsed"].split("\n")):
        lines.append(f"    - gave: {_excerpt(line)}")
    for line, why in record.get("quoting", ()):
        lines.append(f"    - left out ({_shown('; '.join(why))}): {_excerpt(line)}")
    return lines


def _excerpt(text: str) -> str:
    words = " ".join(text.split())
    return _shown(words if len(words) <= _EXCERPT else f"{words[:_EXCERPT]} ...")


def _shown(text: str) -> str:
    return printable(text.replace("\n", " "))


def _indented(text: str) -> list[str]:
    return [f"    {printable(line)}" for line in text.split("\n")] if text.strip() else []
