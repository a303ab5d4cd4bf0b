"""The nano model's tokenizer: SentencePiece whose frequent phrases are single symbols.

Boilerplate sentences of the prompts, board cells and the phrases of `language` are user-defined
symbols (matched longest first, anywhere in the text), so a play prompt costs about 35 tokens in
Frozen Lake and 52 in Sokoban. Every statement of an item is one symbol. Everything else falls back
to characters, a few merges and bytes: any text round-trips exactly.
Control tokens are SentencePiece control symbols, which plain text can never produce.
"""

import io
import json
from pathlib import Path

import sentencepiece

from oel_jax.data import prompts
from oel_jax.environments.protocol import MAX_TURNS
from oel_jax.environments.textarena import GENERIC_RULES, ROUND_LIMIT
from oel_jax.nano import examples
from oel_jax.nano import language as lang

VOCABULARY = 896
CONTROL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
END_OF_TEXT = "<|endoftext|>"
STOP = "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think></think>' }}"
    "{%- endif %}"
    "{%- endif %}"
)
_RESUBMIT = "Please resubmit a valid move and remember to follow the game rules to avoid penalties."
_WALL_HIT = "You cannot move into a wall!"
_RULE = "+-----+-----+-----+"
_ACTIONS = ("up", "down", "left", "right", "w", "a", "s", "d")


def _prompt_symbols() -> list[str]:
    """Fixed pieces of the play and extraction prompts, cut where variable text meets them."""
    slot = "\x00"
    play = prompts.play_prompt(slot, slot)
    head, middle, tail = play.split(slot)
    opening = f"[GAME] {GENERIC_RULES}[GAME] Current Board:\n\n{_RULE}"
    symbols = [examples.ENGINE, head.removeprefix(examples.ENGINE).rstrip("\n"), tail]
    between = "\n" + middle.rstrip("\n").removeprefix("\n") + "\n"
    symbols += [between + opening, f"{between}[GAME] {GENERIC_RULES}\n        \n[GAME] ", between]
    symbols += [f"[GAME] {GENERIC_RULES}\n        \n[GAME] "]
    for version in ("v3", "v4"):
        before, between, after = prompts.extraction_prompt(slot, slot, version=version).split(slot)
        symbols += [before, between.lstrip("\n").rstrip("\n"), after]
    return symbols


def _end_symbols() -> list[str]:
    """How a game ends, as the extractor reads it."""
    success = "\n\n\nSummary:\nFinal Result: Success\nFeedback: Congratulations! "
    failure = "\n\n\nSummary:\nFinal Result: Failure\nFeedback: "
    return [
        f"{success}You reached the goal!\n\n",
        f"{success}You have solved the Sokoban puzzle!\n\n",
        f"{failure}You fell into a hole! Game over. You completed ",
        "% of the journey to the goal.\n\n",
        f"{failure}Invalid Move: You tried to move ",
        " but hit a wall!\n\n",
        f"{failure}Invalid Move: You cannot move into a wall!\n\n",
        f"\n\n\n{ROUND_LIMIT}\n",
        prompts.NO_PREVIOUS,
        *(f"\n\nRound{t}_Output: " for t in range(MAX_TURNS)),
        *(f"\nRound{t}_Input: " for t in range(MAX_TURNS)),
    ]


def _lake_symbols() -> list[str]:
    """Messages, positions and cells of Frozen Lake; a cell's token also says its column."""
    symbols = [
        f"\n\nAvailable Actions: {', '.join(f'[{a}]' for a in _ACTIONS)}",
        f"\nRound0_Input: [GAME] [GAME] Current Board:\n\n{_RULE}",
    ]
    symbols += [f"\nRound{t}_Input: \n" for t in range(1, MAX_TURNS)]
    for d in lang.DIRECTIONS:
        symbols += [
            f"[{d}]",
            f"\n[Player] [{d}]\n",
            f"[GAME] You moved {d} to position ",
            f"[GAME] You attempted an invalid move. Reason: You tried to move {d} but hit a wall! "
            f"{_RESUBMIT}\n[GAME] Current Board:\n\n{_RULE}",
        ]
    symbols += [
        f"({r}, {c}).\n[GAME] Current Board:\n\n{_RULE}" for r in range(3) for c in range(3)
    ]
    for c in lang.SYMBOLS + "P ":
        symbols += [f"\n|  {c}  |", f"  {c}  |", f"  {c}  |\n{_RULE}"]
    return symbols


def _room_symbols() -> list[str]:
    """Messages and cells of Sokoban; what is between two inner rows is one token."""
    symbols = [f"[GAME] You attempted an invalid move. Reason: {_WALL_HIT} {_RESUBMIT}"]
    symbols += ["\nRound0_Input: [GAME] \n        \n[GAME] "]
    for d in lang.DIRECTIONS:
        symbols += [f"[GAME] You  moved [{d}].\n[GAME] "]
        symbols += [f"[GAME] You pushed a box while moved [{d}].\n[GAME] "]
    for c in lang.SYMBOLS + "P_√":
        symbols += [f" {c}"]
    for c in lang.SYMBOLS:
        row = " ".join(c * 6)
        symbols += [f"Current Board:\n\n{row}\n{c}", f" {c}\n{c}"]
        symbols += [f" {c}\n{row}\n\nAvailable Moves: up, down, left, right"]
    return symbols


def _language_symbols() -> list[str]:
    cells = dict.fromkeys(lang.MAP.values())
    symbols = [*lang.SYMBOLS, *cells, *(f"{mark}/" for mark in cells), " ", "\n", ". ", ", ", "."]
    symbols += [*lang.BELIEF.values(), " (only", " a", " guess)", *lang.GO.values()]
    symbols += [f"{lang.TO}{symbol}{end}" for symbol in lang.SYMBOLS for end in (".", "")]
    symbols += [f"{lang.BEFORE}{symbol}." for symbol in lang.SYMBOLS]
    symbols += [lang.TO_FREE + ".", lang.TO_WALL + ".", lang.BEFORE_FREE + "."]
    symbols += [*lang.PLAN, *(f"{lang.PLAN[3]}{d}" for d in lang.DIRECTIONS)]
    symbols += [f"{c}{r}{end}" for c in "abcd" for r in range(1, 5) for end in ("", ".")]
    for phrases in lang.PHRASES.values():
        symbols += [f" {word}" for phrase in phrases for word in phrase.strip(" .").split()]
        # A whole statement is one symbol: read word by word, look-up did not emerge (README.md).
        symbols += [symbol + phrase for phrase in phrases for symbol in lang.SYMBOLS]
    symbols += [*lang.ADVICE, lang.NOTHING_NEW]
    symbols += [lang.MARKER, "\n" + lang.MARKER, lang.HEADING.rstrip("\n")]
    symbols += [lang.LAST_STEP, *lang.VERDICT.values(), lang.GLOSSARY_QUESTION]
    for word in (lang.CROSSED, lang.PUSHED, lang.BLOCKED):
        symbols += [f"{word}{symbol}." for symbol in lang.SYMBOLS]
    symbols += ["Symbols: ", ". Please ", *lang.INSTRUCTIONS.values(), "done"]
    # the brackets of a thought inside outside text (the control symbols never match there)
    return [*symbols, "user\n", "assistant\n", "<think", "</think", ">"]


def symbols() -> list[str]:
    """All user-defined symbols, without doubles."""
    every = _prompt_symbols() + _end_symbols() + _lake_symbols() + _room_symbols()
    every += _language_symbols()
    return [s for s in dict.fromkeys(every) if s]


def train(corpus: list[str]) -> bytes:
    """Train the SentencePiece model; returns the bytes of `tokenizer.model`."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCABULARY,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_number=False,
        byte_fallback=True,
        character_coverage=1.0,
        max_sentence_length=1_000_000,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=1,
        pad_piece=END_OF_TEXT,
        control_symbols=list(CONTROL),
        user_defined_symbols=[s.replace(" ", "\u2581") for s in symbols()],
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def corpus() -> list[str]:
    """Sentences for the few merges: the prompts' own words and printable characters."""
    words = "\n".join(symbols()).split()
    printable = [chr(i) for i in range(33, 127)] + ["√"]
    return [" ".join(words)] + words + printable * 2


def write(directory: Path) -> None:
    """Write tokenizer.model and tokenizer_config.json into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(train(corpus()))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": STOP,
        "pad_token": END_OF_TEXT,
        "unk_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def special_id(piece: str) -> int:
    """Id of a control token: fixed by the order in which SentencePiece lays them out."""
    return {END_OF_TEXT: 1, **{p: 2 + i for i, p in enumerate(CONTROL)}}[piece]


class Encoder:
    """Examples to token ids, straight through SentencePiece (training only)."""

    def __init__(self, directory: Path):
        self._model = sentencepiece.SentencePieceProcessor(
            model_file=str(Path(directory) / "tokenizer.model")
        )
        self._ids = {piece: self._model.piece_to_id(piece) for piece in (*CONTROL, END_OF_TEXT)}

    def prompt(self, text: str, thinking: bool = True) -> list[int]:
        """The chat prompt of one user message, ready for the reply."""
        start, end = self._ids["<|im_start|>"], self._ids["<|im_end|>"]
        return [
            start,
            *self._model.encode(f"user\n{text}"),
            end,
            *self._model.encode("\n"),
            start,
            *self._model.encode("assistant\n"),
            *([] if thinking else [self._ids["<think>"], self._ids["</think>"]]),
        ]

    def reply(self, text: str) -> list[int]:
        """A reply with its thought brackets (if any) and the stop token as control ids."""
        if not text.startswith("<think>"):
            return [*self._model.encode(text), self._ids[STOP]]
        thought, answer = text.removeprefix("<think>").split("</think>", 1)
        return [
            self._ids["<think>"],
            *self._model.encode(thought),
            self._ids["</think>"],
            *self._model.encode(answer),
            self._ids[STOP],
        ]

    def pieces(self, ids: list[int]) -> list[str]:
        """The pieces, for display."""
        return [self._model.id_to_piece(i) for i in ids]
