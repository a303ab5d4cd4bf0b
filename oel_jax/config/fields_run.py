"""Fields of the whole run: model, mesh, game, sampler, and what is printed."""

from oel_jax.config.field import ABLATION, COMPUTE, IO, METHOD, NOTHING, Field, none_was
from oel_jax.config.negative_control import CONTROLS
from oel_jax.config.rules import (
    CACHE,
    DEVICES,
    DTYPE,
    FLAG,
    PATH,
    POSITIVE,
    PRESETS,
    PROFILE,
    TEXT,
    TEXTS,
    choice,
    integer,
    number,
    or_auto,
    or_none,
)

# Most turns of a game: as in environments.protocol, which is out of reach here because the
# learner, which never imports a game, reads this module.
MAX_TURNS = 5

# Slots by default, and where 'auto' cannot tell or at most.
AUTO_SLOTS = 64

_MEMORY, _SPEED, _DEVICES = (
    "memory against speed",
    "speed only",
    "the same computation on other devices",
)

RUN = (
    Field(
        "seed",
        0,
        integer(0, 2**31 - 1),
        METHOD,
        "loop seed: every random key of the run derives from it",
    ),
    Field(
        "rounds",
        2,
        POSITIVE,
        METHOD,
        "rounds of deploy, extract, consolidate, evaluate; may be raised later",
        free="more rounds extend a run; with fewer, those that are there stay",
    ),
    Field(
        "preset",
        "default",
        choice(*PRESETS),
        IO,
        "the preset that this config started from; set by apply_preset",
        NOTHING,
    ),
    Field(
        "compilation_cache",
        None,
        or_none(CACHE),
        IO,
        "where XLA's compiled programs are kept: a directory, or a bucket (gs://, s3://, az://) "
        "if the package that JAX needs for it is there; None = ~/.cache/oel_jax/xla, 'off' = not",
        free="where compiled programs are kept",
        convert=none_was(""),
    ),
    Field(
        "profile",
        None,
        or_none(PROFILE),
        IO,
        "'step:10..12' traces these optimizer steps for TensorBoard's profiler; None = none",
        free="what is traced during the run",
        convert=none_was(""),
    ),
    Field(
        "negative_control",
        "none",
        choice("none", *CONTROLS),
        ABLATION,
        "breaks the method on purpose, see oel_jax/config/negative_control.py",
    ),
)

MODEL = (
    Field(
        "model.path",
        "Qwen/Qwen3-4B",
        PATH,
        METHOD,
        "'nano', 'nano:tiny' (bundled), a directory, or a hub id",
        NOTHING,  # the content of its files counts
    ),
    Field(
        "model.dtype",
        "bfloat16",
        DTYPE,
        METHOD,
        "compute dtype of student, teacher and sampler; masters are float32",
    ),
    Field(
        "model.thinking",
        True,
        FLAG,
        METHOD,
        "thinking flag of the chat template, in play and in extraction",
    ),
    Field(
        "model.attention_block",
        256,
        POSITIVE,
        COMPUTE,
        "queries in a tile of attention: memory against speed",
        free=_MEMORY,
    ),
    Field(
        "model.check_weights",
        True,
        FLAG,
        IO,
        "refuse weights that are NaN or infinite, naming the tensor",
        NOTHING,
        free="what is refused when a model is loaded",
    ),
)

# Both may be 'auto': what the planner finds quickest (oel_jax/plan/auto.py).
MESH = (
    Field(
        "mesh.fsdp",
        1,
        or_auto(DEVICES),
        COMPUTE,
        "devices that split parameters and batch; -1 = all that tp leaves, 'auto' = planned",
        free=_DEVICES,
    ),
    Field(
        "mesh.tp",
        1,
        or_auto(POSITIVE),
        COMPUTE,
        "devices that split heads, MLP width and vocabulary; 'auto' = planned",
        free=_DEVICES,
    ),
)

GAME = (
    Field(
        "game.name",
        "frozen_lake",
        or_none(TEXT),
        METHOD,
        "'frozen_lake', 'sokoban', or a game that you registered; None = a chat round, which has "
        "no game: its trajectories are conversations (config.logs)",
    ),
    Field(
        "game.module",
        None,
        or_none(PATH),
        IO,
        "Python file that registers a game of your own; None = none",
        free="where the file of a game is; its name and turns stay",
        convert=none_was(""),
    ),
    Field(
        "game.max_turns",
        MAX_TURNS,
        POSITIVE,
        METHOD,
        "most turns of a game; only a game of your own has others",
    ),
    Field(
        "game.wrapper",
        "grid",
        choice("grid", "plain"),
        METHOD,
        "first line of play prompts: 'grid' (paper), or 'plain' without a grid",
    ),
    Field(
        "game.layout",
        "released",
        choice("released", "paper"),
        METHOD,
        "prompt layout: 'released' (with its quirks) or 'paper'",
    ),
)

# Where the conversations of a chat round come from.
LOGS = (
    Field(
        "logs.path",
        (),
        TEXTS,
        METHOD,
        "files of conversations: paths or globs; () = only those that a server has recorded in the "
        "workdir",
        NOTHING,
        free="a round takes what is new, wherever it is",
    ),
    Field(
        "logs.wrapper",
        None,
        or_none(choice("paper")),
        METHOD,
        "'paper': each turn's last user message is a game prompt in the paper's wrapper "
        "(config.game.wrapper), and knowledge goes where it is in games; None = plain messages",
    ),
    Field(
        "logs.leave_out",
        None,
        or_none(TEXT),
        METHOD,
        "with logs.wrapper: a text of the first prompt, such as rules, that the extractor does "
        "not see; None = it sees all",
    ),
    Field(
        "logs.feedback_fields",
        ("feedback",),
        TEXTS,
        METHOD,
        "text fields of a row or message that hold what a user said about an answer",
    ),
    Field(
        "logs.redact",
        True,
        FLAG,
        METHOD,
        "take e-mail addresses, numbers of phones and cards, IP addresses and keys out of imported "
        "texts",
    ),
    Field(
        "logs.heldout",
        0.1,
        number(0, 0.9, open_low=True),
        METHOD,
        "share of users (of conversations without a user) that is only evaluated on",
    ),
    Field(
        "logs.policy",
        "any",
        choice("any", "current"),
        METHOD,
        "whose answers a round learns from: 'current' = only conversations that the round's own "
        "policy answered",
    ),
    Field(
        "logs.idle",
        0.0,
        number(0, 1e9),
        METHOD,
        "seconds without an answer after which a conversation counts as finished; others wait for "
        "the next look",
    ),
    Field(
        "logs.wait",
        0,
        integer(0),
        METHOD,
        "new conversations that a round waits for; 0 = it takes what is there",
        free="when a round begins",
    ),
)

SAMPLER = (
    Field(
        "sampler.slots",
        AUTO_SLOTS,
        or_auto(POSITIVE),
        COMPUTE,
        "sequences generated at once; 'auto' = planned",
        free="a game's randomness does not depend on who else is in the batch",
    ),
    Field(
        "sampler.max_len",
        None,
        or_none(POSITIVE),
        COMPUTE,
        "cache length per slot in tokens; None = what the stage's budgets need",
        free="room in the cache, not content",
        convert=none_was(0),
    ),
    Field(
        "sampler.decode_steps",
        32,
        POSITIVE,
        COMPUTE,
        "tokens decoded per dispatch; speed only",
        free=_SPEED,
    ),
    Field(
        "sampler.prefill_rows",
        8,
        POSITIVE,
        COMPUTE,
        "prompts encoded per dispatch; speed only",
        free=_SPEED,
    ),
    Field(
        "sampler.weights",
        "split",
        choice("split", "whole"),
        COMPUTE,
        "'split' as they are trained: gathered for every token; 'whole' on each device of "
        "mesh.fsdp: faster on several devices, where it fits in addition to the student",
        free=_MEMORY,
    ),
    Field(
        "sampler.overlap",
        True,
        FLAG,
        COMPUTE,
        "games are stepped while others decode; speed only",
        free=_SPEED,
    ),
    Field(
        "sampler.prefill_chunk",
        512,
        POSITIVE,
        COMPUTE,
        "longer prompts are encoded in pieces of so many tokens; memory only",
        free=_MEMORY,
    ),
    Field(
        "sampler.max_prompt",
        2560,
        POSITIVE,
        METHOD,
        "play prompt without knowledge, in tokens: 512 per turn (spec 4.5)",
    ),
    Field("sampler.max_response", 1024, POSITIVE, METHOD, "tokens of one response in a game"),
)

LOG = (
    Field(
        "log.tensorboard",
        True,
        FLAG,
        IO,
        "write event files in addition to metrics.jsonl",
        free="what is printed and drawn",
    ),
    Field(
        "log.console_every",
        5.0,
        number(0),
        IO,
        "seconds between progress lines",
        free="what is printed and drawn",
    ),
)
