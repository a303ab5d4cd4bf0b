"""Contexts that belong to single answers: what the teacher reads for one decision point alone.

    own_game    the whole game or conversation that the answer is from, to its end
    hindsight   what came after the answer, without any words of the policy
    coach       a text that the extractor wrote for this very answer, see `coach`

A decision point whose context is empty (nothing came after its answer; the coach wrote nothing) is
left out: its teacher would know no more than the student.
"""

from collections.abc import Callable, Sequence
from functools import partial

import ml_collections

from oel_jax.base.errors import UserError
from oel_jax.chat.tokenizer import Tokenizer
from oel_jax.config.choices import PER_TURN
from oel_jax.data import knowledge
from oel_jax.data.hindsight import hindsight, later_parts
from oel_jax.data.history import history
from oel_jax.data.messages import Context
from oel_jax.data.trajectories import DecisionPoint, Trajectory, decision_points
from oel_jax.data.trajectory_files import Stored
from oel_jax.learner.coach import written_texts
from oel_jax.runs.workdir import Workdir


def points_to_learn(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    round_number: int,
    episodes: Sequence[Stored],
    tokenizer: Tokenizer,
) -> tuple[list[DecisionPoint], list[Context | None]]:
    """The decision points that these trajectories give, and the context of each.

    None means one of the round's shared contexts; then all points are there.

    Args:
      tokenizer: the policy's; contexts are cut to `extract.l_max` of its tokens.

    Raises:
      UserError: with 'coach': the text of an answer is missing.
    """
    games = [stored.trajectory for stored in episodes]
    points = decision_points(games)
    kind = config.extract.experience
    if kind not in PER_TURN:
        return points, [None] * len(points)
    text_of = _TEXTS[kind](config, workdir, round_number, episodes, tokenizer)
    texts = [text_of(point) for point in points]
    place = config.extract.place
    kept = [(point, text) for point, text in zip(points, texts, strict=True) if text]
    return [point for point, _ in kept], [Context(kind, text, place) for _, text in kept]


def count_contexts(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    round_number: int,
    episodes: Sequence[Stored],
    tokenizer: Tokenizer,
) -> tuple[int, int, int]:
    """(answers of these trajectories, those with a context, tokens of all contexts)."""
    answers = sum(len(stored.trajectory.turns) for stored in episodes)
    _, contexts = points_to_learn(config, workdir, round_number, episodes, tokenizer)
    return answers, len(contexts), sum(len(tokenizer.encode(each.text)) for each in contexts)


_TextOf = Callable[[DecisionPoint], str]


def _whole(
    config: ml_collections.ConfigDict,
    _workdir: Workdir,
    _round_number: int,
    episodes: Sequence[Stored],
    tokenizer: Tokenizer,
) -> _TextOf:
    """The history that an extractor would read, cut to `l_max` from the newest line back."""
    settings = config.extract
    count = partial(_count, tokenizer)

    def whole(game: Trajectory) -> str:
        text = history(game, outcome_mode=settings.outcome).strip()
        return knowledge.truncate(text, settings.l_max, count, "v3", keep=settings.truncate)

    texts = [whole(stored.trajectory) for stored in episodes]
    return lambda point: texts[point.episode]


def _hindsight(
    config: ml_collections.ConfigDict,
    _workdir: Workdir,
    _round_number: int,
    episodes: Sequence[Stored],
    tokenizer: Tokenizer,
) -> _TextOf:
    """What came after the answer, its end cut off beyond `l_max`."""
    settings = config.extract

    def text_of(point: DecisionPoint) -> str:
        game = episodes[point.episode].trajectory
        parts = later_parts(game, point.turn, outcome_mode=settings.outcome)
        return hindsight(parts, settings.l_max, partial(_count, tokenizer))

    return text_of


def _coach(
    _config: ml_collections.ConfigDict,
    workdir: Workdir,
    round_number: int,
    episodes: Sequence[Stored],
    _tokenizer: Tokenizer,
) -> _TextOf:
    """What `coach` wrote; it cut it to `l_max` itself."""
    files = {path: workdir.coach(round_number, path) for path in {each.path for each in episodes}}
    written = {path: written_texts(file) for path, file in files.items()}

    def text_of(point: DecisionPoint) -> str:
        path, game = episodes[point.episode]
        text = written[path].get((game.key, point.turn))
        if text is None:
            raise UserError(
                f"{files[path]} has no text for answer {point.turn + 1} of {game!r}; run the "
                "extract stage again"
            )
        return text

    return text_of


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text))


_TEXTS = {"own_game": _whole, "hindsight": _hindsight, "coach": _coach}
