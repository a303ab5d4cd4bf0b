"""Messages and context to ids: one function for the student's prompts and the teacher's."""

from typing import TYPE_CHECKING

from oel_jax.base.errors import UserError
from oel_jax.data.messages import NOTHING, Context, Dialogue, place_context

if TYPE_CHECKING:
    from oel_jax.chat.tokenizer import Tokenizer


def render(
    tokenizer: "Tokenizer", dialogue: Dialogue, context: Context = NOTHING, *, thinking: bool
) -> list[int]:
    """Ids of a prompt: the dialogue, with the context in its place, and the generation prompt.

    Text from outside never becomes a control token, wherever it is placed.

    Args:
        context: what a teacher reads in addition; by default nothing, as the student.
        thinking: thinking flag of the template.

    Raises:
        UserError: the context does not fit the dialogue (see `place_context`), or the model has no
            usable chat template, or one that leaves out a message or the tools.
    """
    messages = place_context(dialogue, context)
    if not dialogue.tools and [message["role"] for message in messages] == ["user"]:
        return tokenizer.chat(messages[0]["content"], thinking=thinking)
    made = tokenizer.render(messages, tools=dialogue.tools or None, thinking=thinking)
    unseen = [name for name in made.unseen if not name.endswith(".tool_calls")]
    if unseen:
        raise UserError(
            f"the model's chat template shows nothing of {', '.join(unseen)}; use a model whose "
            "template does, or another place for the context"
        )
    return list(made.ids)
