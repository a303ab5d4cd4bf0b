"""A trajectory as the extractor reads it. Imports no JAX."""

import json
from collections.abc import Iterator

from oel_jax.data.messages import Message
from oel_jax.data.prompts import conversation_history, extraction_history
from oel_jax.data.trajectories import Trajectory

FEEDBACK = "feedback of the user"


def history(trajectory: Trajectory, *, outcome_mode: str = "full", reactions: bool = False) -> str:
    """What knowledge is drawn from: rounds of a game, or the messages of a conversation.

    A conversation whose messages are game prompts (it has a wrapper) is shown as a game; what was
    said after its last answer is the outcome.

    Args:
        outcome_mode: of a game, see `prompts.extraction_history`.
        reactions: of a conversation only what was said about the answers: what a user wrote after
            one, in the next message or as feedback.
    """
    if trajectory.id is not None and not trajectory.wrapper:
        return _of_conversation(trajectory, reactions)
    outcome = trajectory.outcome
    if outcome is None:
        outcome = trajectory.turns[-1].feedback
    return extraction_history(trajectory.exchanges(), outcome or "", outcome_mode=outcome_mode)


def _of_conversation(trajectory: Trajectory, reactions: bool) -> str:
    if not reactions:
        return conversation_history(list(_parts(trajectory)))
    said = [trajectory.feedback(turn).strip() for turn in range(len(trajectory.turns))]
    return "\n".join(f'- "{text}"' for text in said if text)


def _parts(trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    """(who, text) of all that was said in a conversation."""
    for turn in trajectory.turns:
        for message in (*turn.messages, turn.shown):
            text = words_of(message)
            if text.strip():
                yield message["role"], text
        if turn.feedback:
            yield FEEDBACK, turn.feedback
    if trajectory.outcome:
        yield "outcome", trajectory.outcome


def words_of(message: Message) -> str:
    """The text of a message, its calls of tools in brackets."""
    calls = [
        f"[calls {call['function']['name']}: "
        f"{json.dumps(call['function'].get('arguments', {}), ensure_ascii=False)}]"
        for call in message.get("tool_calls", ())
    ]
    return "\n".join([message["content"], *calls] if message["content"] else calls)
