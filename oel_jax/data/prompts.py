"""Every prompt of the method, byte for byte (spec 4.4, 6.1, 8.1 and Appendix A).

Templates are data: their wording, slips included, is that of the released code, and the tests
compare each with its SHA-256. A backslash at a line's end joins it with the next one. Text from
outside (boards, responses, knowledge) is put in as it is: braces in it mean nothing, and a
placeholder in it stays text.

A game prompt is head + situation + tail, where the situation ends in one newline. Nothing here
imports JAX or knows a particular game.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from oel_jax.base import paths
from oel_jax.base.errors import UserError

HEAD = """\
You are an agent playing a game on a grid, acting as a reasoning engine.

Current situation:
"""

KNOWLEDGE_HEAD = """\
You are an agent playing a game on a grid, acting as a reasoning engine.

Your decisions are based on the experience you have learned about the game's rules or \
strategies. This experience is only a guess of how the game works, and the rules and strategies \
may be incomplete or incorrect.

Given experience for rules or strategies you have learned:
{experience}

Current situation:
"""

# For games without a grid (config `game.wrapper`); the rest is the paper's.
PLAIN_HEAD = HEAD.replace(" playing a game on a grid,", " playing a game,")
PLAIN_KNOWLEDGE_HEAD = KNOWLEDGE_HEAD.replace(" playing a game on a grid,", " playing a game,")
WRAPPERS = {"grid": (HEAD, KNOWLEDGE_HEAD), "plain": (PLAIN_HEAD, PLAIN_KNOWLEDGE_HEAD)}

TAIL = (
    "\n\nWhat action do you take? "
    "(Remember to wrap your final answer of the action in square brackets)"
)

NO_PREVIOUS = "No previous experience."

GAME_V3 = """\
You are an AI language model that continuously refines its internal experience.
Here is the interaction history (the game environment (input) and your response and action \
(output)):
{LATEST_EXPERIENCE}

Here is the previous experience:
# Experience
{PREVIOUS_EXPERIENCE}

Your task:
Based on the multi-round interaction history and the previous experience, generate experience \
for future learning. You should conduct a deep, comparative analysis to infer the game rules and \
the fundamental principles behind winning and losing. Using the interaction history and \
environment feedback, hypothesize the game rules and effective winning strategies, and organize \
these insights into experience items that help the player succeed in the game.

Rules:
- The experience you generate will be directly appended to the previous experience. Do not \
repeat the previous experience. Make sure the newly generated experience is different from the \
previous experience.
- Your generated experience should be possible rules, instructions or winning strategies for the \
game. The experience should be generally useful rather than only applicable for the current map \
(board).

After careful reasoning step by step, output the final additional experience.
"""

GAME_V4 = """\
You are an AI language model that continuously refines its internal experience.
Here is the interaction history (the game environment (input) and your response and action \
(output)):
{LATEST_EXPERIENCE}

Here is the previous experience:
# Experience
{PREVIOUS_EXPERIENCE}

Your task:
Based on the multi-round interaction history and the previous experience, generate experience \
for future learning. You should conduct a deep, comparative analysis to infer the game rules and \
the fundamental principles behind winning and losing. Using the interaction history and \
environment feedback, hypothesize the game rules and effective winning strategies, and organize \
these insights into 1-2 concise, high-level, and widely applicable experience items that help \
the player succeed in the game.

Rules:
- The experience you generate MUST be formatted strictly as a markdown item which starts with "- \
EXPERIENCE ITEM:":
- EXPERIENCE ITEM: ...
- EXPERIENCE ITEM: ...
- The experience you generate will be directly appended to the previous experience. Do not \
repeat the previous experience. Make sure the newly generated experience is different from the \
previous experience.
- Your generated experience should be possible rules, instructions or winning strategies for the \
game. The experience should be generally useful rather than only applicable for the current map \
(board).

After careful reasoning step by step, output the final result in exactly this format:

Additional Experience (Rules or Strategies):
# Experience
- EXPERIENCE ITEM: ...
"""

MATH_V3 = """\

You are an AI language model that continuously refines its internal experience.

Here is the latest interaction (the user's question and your answer):
{LATEST_EXPERIENCE}

Here is the previous experience:
# Experience
{PREVIOUS_EXPERIENCE}

Your task:
Based on the latest interaction and the previous experience, generate an additional experience \
for future learning. The experience you generate will be directly appended to the previous \
experience.

After careful reasoning step by step, output the final additional experience.
"""

MATH_V4 = """\

You are an AI language model that continuously refines its internal experience.

Here is the latest interaction (the user's question and your answer):
{LATEST_EXPERIENCE}

Here is the previous experience:
# Experience
{PREVIOUS_EXPERIENCE}

Your task:
Based on the latest interaction and the previous experience, generate an additional experience \
for future learning.

Rules:
- The experience you generate MUST be formatted strictly as a markdown list where each item \
starts with "- EXPERIENCE ITEM:", one per line:
- EXPERIENCE ITEM: ...
- EXPERIENCE ITEM: ...
- EXPERIENCE ITEM: ...
- The experience you generate will be directly appended to the previous experience.
- The change should introduce a general, high-level, widely applicable insight, not a detail \
from the specific interaction. The updated experience must remain concise, structured, and \
meaningful.
- If the new insight conflicts with any previous experience item, you are can describe the \
conflict and provide a resolution in the new item.

After careful reasoning step by step, output the final result in exactly this format:

Additional Experience:
# Experience
- EXPERIENCE ITEM: ...
- EXPERIENCE ITEM: ...
- EXPERIENCE ITEM: ...
"""

MATH_SOLVE = """\
Given previous learned experience:
# Experience
{experience}

Solve the new problem and explain what part of experience you use and how you use it in the \
reasoning process:
{prompt}"""

# Conversations: ours, since the paper has none.
_CHAT_HEAD = """\
You are an AI language model that continuously refines its internal experience.
Here is a conversation with a user (your answers are those of "assistant"; what the user said \
about an answer comes after it):
{LATEST_EXPERIENCE}

Here is the previous experience:
# Experience
{PREVIOUS_EXPERIENCE}

Your task:
Based on the conversation and the previous experience, generate experience for future \
conversations: what would have served this user better, and what did this user like? Pay attention \
to what the user says about your answers: their length, their form, their tone, and whether they \
were right. \
"""
_CHAT_RULES = """\
- The experience you generate will be directly appended to the previous experience. Do not repeat \
the previous experience.
- Write instructions for how to answer that are useful with any user and any question. Leave out \
the subject of this conversation, names and quotations.
"""

CHAT_V3 = (
    _CHAT_HEAD
    + "Write it as a few short instructions.\n\nRules:\n"
    + _CHAT_RULES
    + "\nOutput only the additional experience.\n"
)

CHAT_V4 = (
    _CHAT_HEAD
    + """\
Write it as 1-2 concise experience items.

Rules:
- The experience you generate MUST be formatted strictly as a markdown item which starts with "- \
EXPERIENCE ITEM:":
- EXPERIENCE ITEM: ...
- EXPERIENCE ITEM: ...
"""
    + _CHAT_RULES
    + """
Output the final result in exactly this format:

Additional Experience:
# Experience
- EXPERIENCE ITEM: ...
"""
)

# For small models, which read what users said about answers and nothing else.
REACTIONS_V3 = """\
A user said about an answer:

{LATEST_EXPERIENCE}

Rewrite what the user wants as one instruction that begins with "Please"."""

_TEMPLATES = {
    "game": {"v3": GAME_V3, "v4": GAME_V4},
    "math": {"v3": MATH_V3, "v4": MATH_V4},
    "chat": {"v3": CHAT_V3, "v4": CHAT_V4},
    "reactions": {"v3": REACTIONS_V3},
}
_LATEST, _PREVIOUS = "{LATEST_EXPERIENCE}", "{PREVIOUS_EXPERIENCE}"
OUTCOME_MODES = ("full", "text_only", "none")


def _fill(template: str, values: dict[str, str]) -> str:
    """Replace every key of `values` in one pass, so that inserted text is never searched again."""
    keys = "|".join(re.escape(key) for key in values)
    return re.sub(keys, lambda match: values[match[0]], template)


def play_prompt(situation: str, knowledge: str = "", wrapper: str = "grid") -> str:
    """The user message of one turn (spec 4.4; with knowledge, spec 8.1 step 4).

    Args:
        situation: the game's text so far, ending in one newline (`Game.situation`).
        knowledge: knowledge text for the front of the prompt; '' gives the form without knowledge.
        wrapper: config `game.wrapper`, a key of `WRAPPERS`.
    """
    head, told = WRAPPERS[wrapper]
    return (_fill(told, {"{experience}": knowledge}) if knowledge else head) + situation + TAIL


def situation_of(message: str, wrapper: str = "grid") -> str | None:
    """The situation in a user message that `play_prompt` made without knowledge; None in others."""
    head = WRAPPERS[wrapper][0]
    if not message.startswith(head) or not message.endswith(TAIL):
        return None
    if len(message) < len(head) + len(TAIL):
        return None
    return message[len(head) : len(message) - len(TAIL)]


def math_prompt(problem: str, knowledge: str = "") -> str:
    """The user message for a mathematics problem (spec 10.3); without knowledge the problem."""
    if not knowledge:
        return problem
    return _fill(MATH_SOLVE, {"{experience}": knowledge, "{prompt}": problem})


def check_template(template: str, where: str = "extract.template_file") -> str:
    """Return the template if it holds both placeholders; otherwise UserError naming `where`."""
    missing = [key for key in (_LATEST, _PREVIOUS) if key not in template]
    if missing:
        raise UserError(
            f"{where}: the extraction template lacks {' and '.join(missing)}; "
            f"it must contain both {_LATEST} and {_PREVIOUS}"
        )
    return template


def load_template(path: str | Path) -> str:
    """Read the user's extraction template (config `extract.template_file`).

    Raises UserError when the file is missing, is not UTF-8 or lacks a placeholder.
    """
    where = f"extract.template_file {path}"
    try:
        template = paths.local(path, "extract.template_file").read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    return check_template(template, where)


def built_in_template(domain: str, version: str) -> str:
    """The extraction template of a domain; UserError for an unknown domain or version."""
    if domain not in _TEMPLATES:
        raise UserError(f"extract.domain must be one of {', '.join(_TEMPLATES)}; got {domain!r}")
    if version not in _TEMPLATES[domain]:
        there = " or ".join(map(repr, _TEMPLATES[domain]))
        raise UserError(
            f"extract.version must be {there}, the versions with a template; got {version!r}"
        )
    return _TEMPLATES[domain][version]


def extraction_prompt(
    history: str,
    previous: str,
    *,
    version: str,
    template: str | None = None,
    domain: str = "game",
) -> str:
    """The extractor's user message (spec 6.1, step 4).

    Args:
        history: what the knowledge is to be drawn from (`extraction_history`, `math_history`).
        previous: knowledge so far; '' where there is none or the recipe does not show it.
        version: 'v3' (unstructured) or 'v4' (items); picks the template.
        template: the user's template instead, with both placeholders.
        domain: 'game', 'math', 'chat' or 'reactions'.

    Raises UserError for an unknown version or domain, or a template without its placeholders.
    """
    built_in = built_in_template(domain, version)
    template = built_in if template is None else check_template(template)
    return _fill(template, {_LATEST: history, _PREVIOUS: previous or NO_PREVIOUS})


def extraction_history(
    turns: Sequence[tuple[str, str]], outcome: str, *, outcome_mode: str = "full"
) -> str:
    """One game as the extractor reads it (spec 6.1, step 3).

    Args:
        turns: (observation, raw response) of every turn, in order.
        outcome: the outcome text of the game (spec 3.7).
        outcome_mode: 'full'; 'text_only' drops the `Final Result` line and keeps the environment's
            own words; 'none' ends after the last response (spec 12, row 5).

    Raises UserError for another `outcome_mode`.
    """
    shown = shown_outcome(outcome, outcome_mode)
    history = "".join(
        f"\nRound{t}_Input: {observation}\n\nRound{t}_Output: {response}"
        for t, (observation, response) in enumerate(turns)
    )
    if outcome_mode == "none":
        return history
    return f"{history}\n\n\n{shown}\n"


def shown_outcome(outcome: str, outcome_mode: str) -> str:
    """What is shown of how a game ended; '' with 'none'. See `extraction_history`.

    Raises UserError for another `outcome_mode`.
    """
    if outcome_mode not in OUTCOME_MODES:
        raise UserError(
            f"extract.outcome must be one of {', '.join(OUTCOME_MODES)}; got {outcome_mode!r}"
        )
    if outcome_mode == "text_only":
        return re.sub(r"\A(Summary:\n)Final Result: [^\n]*\n", r"\1", outcome)
    return "" if outcome_mode == "none" else outcome


def conversation_history(parts: Sequence[tuple[str, str]]) -> str:
    """One conversation as the extractor reads it.

    Args:
        parts: (who, text) in order, for instance ("user", "Hello"); what a user said about an
            answer is by "feedback of the user".
    """
    return "\n" + "\n\n".join(f"{who}: {text.strip()}" for who, text in parts) + "\n"


def math_history(problem: str, response: str) -> str:
    """One solved problem as the extractor reads it (spec 10.3)."""
    return f"Input: {problem}\nOutput: {response}"
