"""What follows from a config: token budgets (spec 4.5), seeds, and the extraction template."""

import ml_collections

from oel_jax.config.chat_checks import is_chat
from oel_jax.data import knowledge, prompts

# Row 7 of spec section 12: the wording of Figs. 11 and 10, where it differs from the released one.
_PAPER_WORDING = {
    "v3": ("(the game environment (input)", "(previous experience, the game environment (input)"),
    "v4": ("history and the previous experience, generate", "history, generate"),
}


def play_budget(config: ml_collections.ConfigDict, with_knowledge: bool) -> tuple[int, int]:
    """(longest prompt, longest response) of a game turn in tokens, with or without knowledge."""
    extra = config.extract.l_max if with_knowledge else 0
    return config.sampler.max_prompt + extra, config.sampler.max_response


def has_extractor(config: ml_collections.ConfigDict) -> bool:
    """Whether a model writes the round's texts; otherwise they are filled in without one."""
    e = config.extract
    return e.experience in ("knowledge", "coach") and not e.knowledge_from


def extractor_budget(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """(longest prompt, longest response) of an extractor call in tokens.

    Formula: (max_response + 512) per turn, 1024 for the template, and l_max when the previous
    knowledge is shown (a coach sees none). The response may be l_max long, thinking included.
    """
    e = config.extract
    history = (config.sampler.max_response + 512) * config.game.max_turns + 1024
    return e.max_prompt or history + (e.l_max if shows_previous(config) else 0), e.l_max


def drops_quotes(config: ml_collections.ConfigDict) -> bool:
    """Whether lines that give a trajectory away are left out of the texts."""
    wanted = config.extract.drop_quotes
    return is_chat(config) if wanted is None else wanted


def shows_previous(config: ml_collections.ConfigDict) -> bool:
    """Whether the extractor reads the knowledge gathered so far."""
    return config.extract.previous and config.extract.experience != "coach"


def chain_seeds(config: ml_collections.ConfigDict) -> list[int]:
    """Seeds of the K chains: 50, 100, ... (spec 2.3)."""
    return [50 * (k + 1) for k in range(config.extract.chains)]


def extraction_domain(config: ml_collections.ConfigDict) -> str:
    """Whose templates the extractor reads, as `prompts.extraction_prompt` calls them.

    Conversations whose messages are game prompts (`logs.wrapper`) are read as games.
    """
    if not is_chat(config) or config.logs.wrapper:
        return "game"
    return "chat" if config.extract.history == "whole" else "reactions"


def extraction_template(config: ml_collections.ConfigDict) -> str | None:
    """The extraction template with this config's item marker and, with `extract.no_op`, how to say
    that there is nothing new; None = the built-in one as it is.

    Raises:
      UserError: `extract.template_file` cannot be read, or lacks one of the two slots.
    """
    e = config.extract
    if e.template_file not in (None, "paper"):
        text = prompts.load_template(e.template_file)
    else:
        text = prompts.built_in_template(extraction_domain(config), e.version)
        if e.template_file == "paper":
            text = text.replace(*_PAPER_WORDING[e.version])
        elif e.item_marker == knowledge.MARKER and not e.no_op:
            return None
    text = text.replace(knowledge.MARKER, e.item_marker)
    return f"{text.rstrip()}\n\n{knowledge.NO_OP_SENTENCE}\n" if e.no_op else text
