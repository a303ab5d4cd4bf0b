"""What a coach is asked: to say of one answer, after the fact, what should have been done.

The templates are this project's own. Text from outside is put in as it is: braces in it mean
nothing. Nothing here imports JAX.
"""

import re
from collections.abc import Callable, Sequence

from oel_jax.data.hindsight import longest_part
from oel_jax.data.history import words_of
from oel_jax.data.messages import Message

COACH_GAME = """\
You are an AI language model that coaches a player. You see one situation of a game, the answer \
that the player gave in it, and what came after.

The situation:
{SITUATION}

The player's answer:
{ANSWER}

What came after:
{LATER}

Your task:
Say what the player should have done in exactly this situation, and why. Use what came after as \
evidence, but write as advice before the move: the player will read it in the same situation, \
without having seen what came after.

Rules:
- Be concrete and short: at most a few sentences.
- If the answer was right, say so and say why.
- Do not repeat the situation or the answer.

After careful reasoning step by step, output the advice alone.
"""

COACH_CONVERSATION = """\
You are an AI language model that coaches an assistant. You see the beginning of a conversation, \
the answer that the assistant gave to its last message, and what came after.

The conversation:
{SITUATION}

The assistant's answer:
{ANSWER}

What came after:
{LATER}

Your task:
Say what the assistant should have answered to the last message, and why. Use what came after as \
evidence of what the user needs, but write as advice before the answer: the assistant will read it \
at the same place of the conversation, without having seen what came after.

Rules:
- Be concrete and short: at most a few sentences. Speak of content, length, tone and form where \
they matter.
- If the answer served the user well, say so and say why.
- Do not quote the conversation, and do not write the answer itself.

After careful reasoning step by step, output the advice alone.
"""

NOTHING_CAME = "(nothing)"
_SLOTS = re.compile(r"\{(?:SITUATION|ANSWER|LATER)\}")


def coach_prompt(situation: str, answer: str, later: str, *, conversation: bool) -> str:
    """The coach's user message.

    Args:
        situation: a game's situation, or the messages before the answer (`transcript`).
        answer: the answer that was given, thought included.
        later: what came after it; '' if nothing did.
        conversation: which of the two templates.
    """
    values = {"{SITUATION}": situation, "{ANSWER}": answer, "{LATER}": later or NOTHING_CAME}
    template = COACH_CONVERSATION if conversation else COACH_GAME
    return _SLOTS.sub(lambda match: values[match[0]], template)


def transcript(messages: Sequence[Message]) -> str:
    """Messages as a coach reads them, with calls of tools."""
    return "\n".join(f"[{message['role']}]: {words_of(message)}" for message in messages)


def fitted_prompt(
    situation: str,
    answer: str,
    later: str,
    *,
    conversation: bool,
    most: int,
    count: Callable[[str], int],
) -> str:
    """`coach_prompt` with at most `most` tokens.

    Where it would be longer, what came after and the answer lose their ends, down to a third of
    the room each, and then the situation loses its beginning: it is the last message that was
    answered.

    Args:
        count: tokens of a whole message in the model's template.
    """
    whole = coach_prompt(situation, answer, later, conversation=conversation)
    empty = coach_prompt("", "", NOTHING_CAME, conversation=conversation)
    if count(whole) <= most:
        return whole
    base = count("")
    room = most - count(empty)

    def tokens(text: str) -> int:
        return count(text) - base

    while room > 0:
        third = room // 3
        short_later = longest_part(later, third, tokens)
        short_answer = longest_part(answer, third, tokens)
        left = room - tokens(short_later) - tokens(short_answer)
        short = longest_part(situation, max(left, 1), tokens, keep="tail")
        made = coach_prompt(short, short_answer, short_later, conversation=conversation)
        if count(made) <= most:
            return made
        room -= max(1, count(made) - most)  # pieces merge otherwise than they count alone
    return empty
