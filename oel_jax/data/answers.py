"""What of a model's response is its answer, and what is thought.

A response is the decoded text, special tokens dropped, `<think>` and `</think>` kept. The answer is
what follows the last finished thought. Where the last thought has no end, since the token limit cut
it off, there is no answer. A template may write `<think>` itself; then the response begins inside
the thought and shows only its end.

Extraction and the harness read the answer. Games read the whole response, thought included, as the
released code does (spec 3.6): an action that a cut-off thought names is played.
"""

from oel_jax.base.errors import UserError

OPEN, CLOSE = "<think>", "</think>"


def leaves_open(text: str) -> bool:
    """Whether a text ends inside a thought: its last marker is `<think>`."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def split_thought(
    response: str, unfinished: str = "drop", *, opened: bool
) -> tuple[str | None, bool]:
    """Separate the answer from the thought (spec 6.1, step 6; 12, row 8).

    Args:
        response: the decoded response.
        unfinished: what becomes of a response that ends inside a thought: 'drop' it (the paper:
            knowledge is the answer part only) or 'keep' the raw thought (released code).
        opened: the prompt ends inside a thought (`Tokenizer.opens_thought`), so that a response
            without `</think>` is an unfinished thought even though it shows no `<think>`.

    Returns:
        (what follows the last `</think>`, or the whole text where there was no thought; None when
        an unfinished thought is dropped; and whether the thought was finished).
    """
    if unfinished not in ("drop", "keep"):
        raise UserError(f"extract.unfinished_thought must be 'drop' or 'keep'; got {unfinished!r}")
    _, closed, answer = response.rpartition(CLOSE)  # without one the answer is the whole text
    finished = OPEN not in answer and (bool(closed) or not opened)
    return (answer if finished or unfinished == "keep" else None), finished


def answer_of(response: str, *, opened: bool) -> str:
    """What a response says to a task: without its thought, '' if that was not finished.

    Args:
        response: the decoded response.
        opened: the prompt ends inside a thought.
    """
    answer, _ = split_thought(response, opened=opened)
    return response if answer == response else (answer or "").lstrip()


def full_response(response: str) -> str:
    """The response with its thought: what games search for an action (spec 3.6)."""
    return response
