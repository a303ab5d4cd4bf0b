"""The contexts of a round: what the teacher reads in addition to what the student reads.

Each source of texts is a kind of context (`oel_jax.data.messages.Context`):

    knowledge   the K texts that `extract` wrote, or that another run wrote (spec 10.5)
    raw         whole games in their place
    none        nothing: a control

Kinds that belong to single answers are in `turn_contexts`.

Whole games, texts of another run, and empty texts fill the files that `extract` would have filled,
so that everything after it is the same.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

import ml_collections

from oel_jax.base import paths
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.chat.tokenizer import Tokenizer, load_tokenizer
from oel_jax.config import negative_control
from oel_jax.config.choices import PER_TURN
from oel_jax.config.old_values import saved_config
from oel_jax.data import knowledge
from oel_jax.data.history import history
from oel_jax.data.messages import Context
from oel_jax.data.trajectories import Trajectory
from oel_jax.data.trajectory_files import TrajectoryStore, read
from oel_jax.parallel import processes
from oel_jax.runs.policies import policy_directory
from oel_jax.runs.workdir import Workdir


def write_raw_trajectories(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int
) -> None:
    """The first i games of a chain, whole, as its text after step i.

    The histories are those that an extractor would read, one after the other, cut to `l_max` from
    the newest line back (the v3 rule).
    """
    settings = config.extract
    tokenizer = load_tokenizer(policy_directory(config, workdir, round_number))

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    for chain in range(settings.chains):
        games = games_of_chain(config, workdir, round_number, chain)
        text = ""
        for step, game in enumerate(games, start=1):
            told = history(game, outcome_mode=settings.outcome)
            text = knowledge.truncate(
                text + told, settings.l_max, count, "v3", keep=settings.truncate
            )
            write_json(
                workdir.knowledge_step(round_number, chain, step),
                _record(chain, step, text, told, count(text)),
            )


def games_of_chain(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int, chain: int
) -> list[Trajectory]:
    """The trajectories that the text of a chain is drawn from, in the order of its steps."""
    source = 0 if config.extract.trajectories == "shared" else chain
    store = TrajectoryStore(workdir.trajectories(round_number))
    return read(store.path("extract", source))[: config.extract.n_run]


def _record(chain: int, step: int, text: str, added: str, tokens: int) -> dict[str, Any]:
    """A step as `extract` saves it; nothing was generated."""
    return {
        "chain": chain,
        "step": step,
        "text": text,
        "parsed": added,
        "response": "",
        "thought_finished": True,
        "stopped": True,
        "response_tokens": 0,
        "knowledge_tokens": tokens,
    }


def empty_on_purpose(config: ml_collections.ConfigDict) -> bool:
    """Whether the K texts are to be empty."""
    return config.extract.experience in ("none", *PER_TURN)


def write_empty_texts(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int
) -> None:
    """K empty texts: a control, in which the teacher knows no more than the student.

    Also where each answer has a context for itself, see `turn_contexts`.
    """
    for chain in range(config.extract.chains):
        for step in range(1, config.extract.n_run + 1):
            write_json(
                workdir.knowledge_step(round_number, chain, step),
                _record(chain, step, "", "", 0),
            )


def copy_of_another_run(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int
) -> None:
    """Copy what the run in `extract.knowledge_from` knew in the same round.

    Raises:
      UserError: it has not extracted in that round, or has fewer chains or steps.
    """
    check_other_run(config, rounds=round_number)
    other = Workdir(config.extract.knowledge_from)
    for chain in range(config.extract.chains):
        for step in range(1, config.extract.n_run + 1):
            write_json(
                workdir.knowledge_step(round_number, chain, step),
                read_json(other.knowledge_step(round_number, chain, step)),
            )


def check_other_run(config: ml_collections.ConfigDict, rounds: int | None = None) -> None:
    """Refuse an `extract.knowledge_from` that cannot serve; nothing is checked if it is None.

    Args:
      rounds: rounds that must be there; None = all of the config's.

    Raises:
      UserError: no workdir, not far enough, or other chains.
    """
    path = config.extract.knowledge_from
    if not path:
        return
    field = f"config.extract.knowledge_from={path}"
    if not (paths.local(path, "config.extract.knowledge_from") / "manifest.json").is_file():
        raise UserError(f"{field}: there is no run; give the --workdir of one")
    other = Workdir(path)
    for number in range(1, (rounds or config.rounds) + 1):
        if not other.finished(number, "extract"):
            raise UserError(
                f"{field}: round {number} has no finished extract stage; let that run continue, or "
                "lower config.rounds"
            )
    has = saved_config(other.config_file)["extract"]
    for name in ("chains", "n_run"):
        if has[name] < config.extract[name]:
            raise UserError(
                f"{field}: it has config.extract.{name}={has[name]}, this run wants "
                f"{config.extract[name]}; set it to at most {has[name]}"
            )


def texts_of_round(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int, tokenizer: Tokenizer
) -> list[str]:
    """The K texts of the round, stripped and cut to l_max (spec 8.1 step 3).

    With `extract.review` they are those that were approved.

    With `extract.experience='none'` all of them are empty, as the config asks; where each answer
    has a context for itself, one empty text takes their place.

    Raises:
      UserError: all are empty against the config's wish, so there is nothing to learn; or they
        are not those that were approved.
    """
    extract = config.extract
    path = (workdir.approved if extract.review else workdir.knowledge)(round_number)
    found = processes.json_from_first(path)
    if extract.review and found["sha256"] != digest_of(found["texts"]):
        raise UserError(
            f"{path} has changed since its texts were approved; delete it, approve the texts with "
            "`oel review`, and run the same command again"
        )
    texts = [
        knowledge.truncate(
            text.strip(),
            extract.l_max,
            lambda piece: len(tokenizer.encode(piece)),
            "v4",
            keep=extract.truncate,
            marker=extract.item_marker,
        )
        for text in found["texts"]
    ]
    if empty_on_purpose(config):
        return texts[:1] if extract.experience in PER_TURN else texts
    if not any(texts):
        raise UserError(
            f"{path}: all {len(texts)} knowledge texts are empty, so there is nothing to "
            f"consolidate. Look at the extractor's answers in {path.parent}; a longer "
            "config.extract.l_max, config.extract.version='v3' or a larger config.extract.n may "
            "help, then run again with a new --workdir"
        )
    empty = [index for index, text in enumerate(texts) if not text]
    if empty:
        print(
            f"knowledge of chain(s) {empty} is empty: decision points that draw it are distilled "
            "from the teacher without knowledge"
        )
    return negative_control.teacher_texts(config, round_number, texts)


def digest_of(texts: Sequence[str]) -> str:
    """SHA-256 of some texts, in hexadecimal."""
    return hashlib.sha256(json.dumps(list(texts)).encode("utf-8")).hexdigest()


def contexts_of_round(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int, tokenizer: Tokenizer
) -> list[Context]:
    """The contexts that all decision points of a round draw from; see `texts_of_round`."""
    texts = texts_of_round(config, workdir, round_number, tokenizer)
    return [context_of(config, text) for text in texts]


def context_of(config: ml_collections.ConfigDict, text: str) -> Context:
    """One of the K texts as a model reads it (`extract.place`)."""
    kind = config.extract.experience
    return Context(kind if kind in ("knowledge", "raw") else "none", text, config.extract.place)


def draw_texts(round_number: int, step: int, count: int, texts: int) -> list[int]:
    """Number of the text that each of `count` decision points (or games) gets (spec 8.1)."""
    rng = random.Random(step + 1000 * round_number)
    return [rng.choice(range(texts)) for _ in range(count)]
