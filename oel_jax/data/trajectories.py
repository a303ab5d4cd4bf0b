"""Trajectories: the one thing that crosses from the user side to the server side.

A trajectory is a conversation or a game: a list of turns. A turn is what the policy read, what it
answered, and what followed. A file is JSON Lines in UTF-8: one trajectory per line, lines ending in
"\\n". Schema `oel.trajectory/2`; keys marked * may be left out, no others are allowed:

    schema     "oel.trajectory/2"
    policy     string, who answered, for instance "round_001"; not empty
    purpose    "extract" (knowledge is drawn from it), "deploy" (its answers are trained on) or
               "demonstrate" (played with knowledge, for the off-policy baselines)
    game*      string, the game's name; not empty
    seed*      integer in [0, 2^63): which board it was
    id*        string, what identifies a conversation; not empty
    parent*    string, id of the exchange that this one continues (below)
    conversation*  string, the conversation that an exchange belongs to, where its source names one
    user*      string, opaque id of the user who was answered; not empty
    round*     integer from 1
    chain*     integer from 0: extraction chain
    wrapper*   string: the last user message of each turn was shown in this wrapper of the paper
    context*   object: kind, text, place; what the policy read in addition (see data/messages.py)
    tools*     list of objects: tools that the policy could call
    outcome*   string, how it ended, in words
    turns      list, not empty; per turn:
        continues*     true: the messages are those of the turn before, its answer, then `messages`;
                       left out: the turn begins anew
        messages       list, not empty: the (new) messages, see data/messages.py
        kept_ids*      integer from 0: how many ids of the turn before (prompt and response) the
                       prompt begins with; only where `continues`
        prompt_ids*    list of integers in [0, 2^31), the rest of what the model read
        response       string, the decoded response (thought included)
        response_ids*  list of integers in [0, 2^31), the sampled ids, stop id included
        answer*        message by which later turns show the response, if it is another than
                       {"role": "assistant", "content": response}
        feedback*      string, what followed the response and is in no later message
        action*        string, the parsed action of a game
        observation*   string, what the game said before this turn (extraction history)
        id*            string, what identifies this exchange; not empty
        policy*        string, who answered this turn, if another than `policy` above; not empty
        time*          string, when the answer was finished: ISO 8601 in UTC, "2026-01-31T12:00:00Z"
        sampling*      object, how the answer was sampled: temperature, top_k, top_p, seed, ...
        approved*      true: a user has approved of the answer; evaluation asks how likely it is
        finish*        "stop", "length", "tool_calls" or "cancelled": how the answer ended

An exchange is a conversation of one turn: one request and its answer. An exchange with a `parent`
continues another: its first turn has `continues`, its `messages` are those that came after the
parent's answer, and `kept_ids` counts ids of the parent's turn. So a growing conversation that is
stored exchange by exchange takes space in proportion to its length. What such an exchange read is
known only together with its parents; `oel_jax.data.conversations` puts them together.

A trajectory has either an `id`, or `game` and `seed`; a game has also `round`, `outcome`, and per
turn `action` and `observation`. Ids are there where our own sampler answered: `prompt_ids` and
`response_ids` together, or neither.

There is no reward or score, on purpose: learning uses text feedback only, so an unknown key such as
"reward" is refused rather than ignored. A game is identified by (game, seed, policy, round,
purpose, chain), a conversation by (id, policy, purpose), and a file holds it once. Strings are
plain text from outside; they must be encodable in UTF-8. Files of schema 1 are read as well, see
data/schema_1.py.

Since a turn stores what is new, a conversation of n turns takes space in proportion to n.

Nothing here imports JAX. Source: spec, section 7.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from oel_jax.data.messages import Context, Dialogue, Message, answer_message, latest

T = TypeVar("T")

SCHEMA = "oel.trajectory/2"
PURPOSES = ("extract", "deploy", "demonstrate")
FINISHES = ("stop", "length", "tool_calls", "cancelled")


def _ids(values: Iterable[Any] | None) -> tuple[int, ...] | None:
    """Token ids as Python ints, whatever integer type they come in (NumPy scalars too)."""
    return None if values is None else tuple(operator.index(value) for value in values)


@dataclass(frozen=True)
class Turn:
    """One answer and what is new before it; the fields are those of the schema.

    Id sequences of any integer type are accepted. Whole messages and ids of a turn:
    `Trajectory.points`. To make turns: `Transcript`.
    """

    messages: tuple[Message, ...]
    response: str
    continues: bool = False
    kept_ids: int = 0
    prompt_ids: tuple[int, ...] | None = None
    response_ids: tuple[int, ...] | None = None
    answer: Message | None = None
    feedback: str | None = None
    action: str | None = None
    observation: str | None = None
    id: str | None = None
    policy: str | None = None
    time: str | None = None
    sampling: Mapping[str, Any] | None = None
    finish: str | None = None
    approved: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "prompt_ids", _ids(self.prompt_ids))
        object.__setattr__(self, "response_ids", _ids(self.response_ids))

    @property
    def shown(self) -> Message:
        """The response as later turns show it."""
        return answer_message(self.response) if self.answer is None else self.answer


def altered(one: T, **changes: Any) -> T:
    """A turn or trajectory with some fields changed; the values must be of the fields' own types.

    `dataclasses.replace` without its conversions, which take most of the time where many small
    ones are changed.
    """
    new = object.__new__(type(one))
    new.__dict__.update(one.__dict__, **changes)
    return new


class DecisionPoint(NamedTuple):
    """What the policy read before one answer: what consolidation trains on.

    Attributes:
        dialogue: all messages, not only the new ones.
        prompt_ids: what the model read; None where another model than ours answered.
        episode: index of the trajectory in the sequence given to `decision_points`.
        turn: counts from 0.
    """

    dialogue: Dialogue
    prompt_ids: tuple[int, ...] | None
    episode: int
    turn: int


@dataclass(frozen=True, repr=False)
class Trajectory:
    """One finished game or conversation; the fields are those of the schema."""

    policy: str
    purpose: str
    turns: tuple[Turn, ...]
    game: str | None = None
    seed: int | None = None
    id: str | None = None
    round: int | None = None
    chain: int | None = None
    wrapper: str | None = None
    context: Context | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    outcome: str | None = None
    parent: str | None = None
    conversation: str | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        object.__setattr__(self, "tools", tuple(self.tools))

    def __repr__(self) -> str:
        """One line for notebooks, without the texts and ids of the turns."""
        name = f"{self.game} seed {self.seed}" if self.id is None else repr(self.id)
        what = f"{name}, {self.policy}, round {self.round}, {self.purpose}"
        return f"Trajectory({what}, {len(self.turns)} turns, {self.outcome!r})"

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the trajectory within a file."""
        if self.id is not None:
            return (self.id, self.policy, self.purpose)
        return (self.game, self.seed, self.policy, self.round, self.purpose, self.chain)

    def points(self, episode: int = 0) -> Iterator[DecisionPoint]:
        """The whole messages and prompt ids of each turn, in order.

        Raises ValueError for an exchange that continues another: only part of its messages is here.
        """
        if self.parent is not None:
            raise ValueError(
                f"the exchange {self.id!r} continues {self.parent!r}, whose messages are not here; "
                "read both with oel_jax.data.conversations"
            )
        messages: tuple[Message, ...] = ()
        ids: tuple[int, ...] = ()  # of the turn before, response included
        wrapper = self.wrapper or ""
        for number, turn in enumerate(self.turns):
            messages = (*messages, *turn.messages) if turn.continues else turn.messages
            prompt = turn.prompt_ids
            if prompt is not None:
                prompt = (*ids[: turn.kept_ids], *prompt)
            dialogue = Dialogue(messages, wrapper, self.tools)
            yield DecisionPoint(dialogue, prompt, episode, number)
            messages = (*messages, turn.shown)
            ids = () if prompt is None else (*prompt, *(turn.response_ids or ()))

    def exchanges(self) -> list[tuple[str, str]]:
        """(what was said to the policy, what it answered) of every turn, for the extractor."""
        return [
            (latest(turn.messages) if turn.observation is None else turn.observation, turn.response)
            for turn in self.turns
        ]

    def feedback(self, turn: int) -> str:
        """What followed an answer: its feedback, else what came next, else the outcome."""
        if self.turns[turn].feedback is not None:
            return self.turns[turn].feedback
        if turn + 1 < len(self.turns):
            return self.exchanges()[turn + 1][0]
        return self.outcome or ""


def decision_points(trajectories: Sequence[Trajectory]) -> list[DecisionPoint]:
    """All decision points, ordered by trajectory, then by turn (spec 7); nothing is filtered."""
    return [
        point
        for episode, trajectory in enumerate(trajectories)
        for point in trajectory.points(episode)
    ]


class Transcript:
    """Collects the turns of one trajectory and keeps of each what is new.

    transcript = Transcript()
    transcript.add([user("Hello")], "Hi!", prompt_ids=ids, response_ids=sampled)
    Trajectory(policy="round_001", purpose="deploy", id="talk 1", turns=transcript.turns)
    """

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._messages: tuple[Message, ...] = ()
        self._ids: tuple[int, ...] = ()

    def add(
        self,
        messages: Sequence[Message],
        response: str,
        *,
        prompt_ids: Iterable[Any] | None = None,
        response_ids: Iterable[Any] | None = None,
        **facts: Any,
    ) -> Turn:
        """Add a turn.

        Args:
            messages: all that the policy read, not only what is new.
            response: what it answered.
            prompt_ids: all ids that the model read.
            response_ids: the sampled ids.
            facts: `answer`, `feedback`, `action`, `observation`, `id`, `policy`, `time`,
                `sampling`, `finish`.
        """
        messages, prompt, kept = tuple(messages), _ids(prompt_ids), 0
        before = len(self._messages)
        continues = 0 < before < len(messages) and messages[:before] == self._messages
        if continues and prompt is not None:
            limit = min(len(self._ids), len(prompt))
            kept = next((i for i in range(limit) if self._ids[i] != prompt[i]), limit)
        turn = Turn(
            messages=messages[before:] if continues else messages,
            response=response,
            continues=continues,
            kept_ids=kept,
            prompt_ids=None if prompt is None else prompt[kept:],
            response_ids=response_ids,
            **facts,
        )
        self.turns.append(turn)
        self._messages = (*messages, turn.shown)
        self._ids = () if prompt is None else (*prompt, *(turn.response_ids or ()))
        return turn
