"""Users who do not exist: they ask everyday questions and want short answers.

    python -m oel_jax.testing.synthetic_users --model=DIR --out=chats.jsonl

writes logs of a model's own conversations with them, one JSON object a line, as OpenAI's messages
with a user and a feedback text. A user complains about an answer of more than `SHORT` words, in the
conversation or afterwards, and is glad of a shorter one. Questions, users and what they say follow
from the seed; the answers are the model's. Needs no network.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oel_jax.base.errors import UserError

SHORT = 25  # words of an answer that is not too long
PER_USER = 4  # conversations of one user

_TOPICS = (
    "bread", "tea", "coffee", "rice", "soap", "candles", "glass", "paper", "honey", "cheese",
    "salt", "butter", "chocolate", "bicycles", "trains", "bridges", "umbrellas", "mirrors",
    "clocks", "pencils", "windows", "batteries", "magnets", "rainbows", "thunder", "snow", "tides",
    "volcanoes", "deserts", "forests", "rivers", "glaciers", "bees", "owls", "dolphins", "spiders",
    "cats", "horses", "penguins", "butterflies", "roses", "tomatoes", "apples", "mushrooms",
    "cotton", "wool", "pianos", "guitars", "chess", "football", "swimming", "sleep", "dreams",
    "laughter", "vaccines", "antibiotics", "eyeglasses", "teeth", "muscles", "the moon",
)  # fmt: skip
_QUESTIONS = (
    "What should I know about {0}?",
    "Can you explain {0} to me?",
    "Why are people interested in {0}?",
    "What is the history of {0}?",
    "Tell me something about {0}.",
    "How would you describe {0} to a child?",
    "What is special about {0}?",
    "I have to talk about {0} tomorrow. What can I say?",
    "What do {0} and everyday life have to do with each other?",
    "Is there anything surprising about {0}?",
)
_TOO_LONG = (
    "That is far too long. Please answer in one short sentence.",
    "Too many words. I only want one short sentence.",
    "I stopped reading halfway. One short sentence is enough for me.",
    "Please keep it short: one sentence, no lists, no details.",
    "This answer is too long for me. Next time say it in one short sentence.",
    "I have no time for so much text. Give me a single short sentence.",
    "Way too much text! A one-sentence answer would have been better.",
    "Can you be brief? One short sentence, please.",
)
_SHORT_ENOUGH = (
    "Thank you, short and clear. I like that.",
    "Great, one short sentence is just what I wanted.",
    "Perfect, that was quick to read.",
    "Thanks! Short answers like this help me most.",
)

Message = dict[str, str]
Answer = Callable[[Sequence[Sequence[Message]]], list[str]]


class Wish(NamedTuple):
    """What one synthetic conversation will be about.

    Attributes:
      asks_again: an answer that is too long is answered by a message; else by feedback alone.
    """

    id: str
    user: str
    question: str
    asks_again: bool


def wishes(count: int, seed: int) -> list[Wish]:
    """The questions of `count` conversations, no question twice.

    Raises:
      UserError: there are not so many questions.
    """
    everything = [question.format(topic) for topic in _TOPICS for question in _QUESTIONS]
    if not 1 <= count <= len(everything):
        raise UserError(f"{count} synthetic conversations: choose from 1 to {len(everything)}")
    rng = random.Random(f"synthetic users {seed}")
    return [
        Wish(f"s{seed}-{n:04d}", f"user-{seed}-{n // PER_USER:03d}", question, rng.random() < 0.5)
        for n, question in enumerate(rng.sample(everything, count))
    ]


def is_short(answer: str) -> bool:
    """Whether the users are content with an answer."""
    return 0 < len(answer.split()) <= SHORT


def conversations(count: int, seed: int, answer: Answer) -> list[dict[str, Any]]:
    """The rows of a log.

    Args:
      answer: conversations that end with a user's message -> the answer to each.
    """
    rng = random.Random(f"what users say {seed}")
    asked = wishes(count, seed)
    talks = [[{"role": "user", "content": wish.question}] for wish in asked]
    _add_answers(talks, answer)
    unhappy = [
        talk
        for wish, talk in zip(asked, talks, strict=True)
        if wish.asks_again and not is_short(talk[-1]["content"])
    ]
    for talk in unhappy:
        talk.append({"role": "user", "content": rng.choice(_TOO_LONG)})
    _add_answers(unhappy, answer)
    rows = []
    for wish, talk in zip(asked, talks, strict=True):
        content = is_short(talk[-1]["content"])
        said = rng.choice(_SHORT_ENOUGH if content else _TOO_LONG)
        row = {"id": wish.id, "user": wish.user, "messages": talk, "feedback": said}
        rows.append(row | ({"approved": True} if content else {}))
    return rows


def _add_answers(talks: Sequence[list[Message]], answer: Answer) -> None:
    if talks:
        for talk, text in zip(talks, answer(talks), strict=True):
            talk.append({"role": "assistant", "content": text})


def sampled_answers(directory: str, seed: int, *, tokens: int = 128, slots: int = 16) -> Answer:
    """Answers of a model, at temperature 0.7.

    Args:
      directory: as for `load_model`.
      tokens: of an answer, at most.
    """
    from oel_jax.chat.render import render
    from oel_jax.data.messages import Dialogue
    from oel_jax.models.language_model import load_model
    from oel_jax.sampler.config import SamplerConfig
    from oel_jax.sampler.requests import Request, Sampling, request_key
    from oel_jax.sampler.sampler import Sampler

    model = load_model(directory)
    tokenizer = model.tokenizer

    def answer(talks: Sequence[Sequence[Message]]) -> list[str]:
        requests = [
            Request(
                render(tokenizer, Dialogue(tuple(talk)), thinking=False),
                request_key("synthetic", seed, talk[0]["content"], len(talk)),
                tokens,
            )
            for talk in talks
        ]
        sizes = SamplerConfig(
            slots=slots,
            length=max(len(request.prompt) for request in requests) + tokens,
            response=tokens,
            prefill_rows=min(8, slots),
            decode_steps=16,
            overlap=False,
        )
        sampler = Sampler(
            model.cfg,
            model.mesh,
            sizes,
            limit=model.vocab_limit,
            stop_ids=tokenizer.stop_ids,
            sampling=Sampling(0.7),
        )
        answers = sampler.generate(model.params, requests)
        return [tokenizer.decode(done.ids).strip() or "..." for done in answers]

    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m oel_jax.testing.synthetic_users",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--model", required=True, help="who answers: a directory or a hub id")
    parser.add_argument("--out", required=True, help="the file to write, JSON lines")
    parser.add_argument("--conversations", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    given = parser.parse_args(arguments)
    try:
        answer = sampled_answers(given.model, given.seed, tokens=given.tokens)
        rows = conversations(given.conversations, given.seed, answer)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        Path(given.out).write_text("".join(lines), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    glad = sum(row.get("approved", False) for row in rows)
    print(f"{given.out}: {len(rows)} conversations, {glad} end with a short answer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
