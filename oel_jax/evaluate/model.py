"""A policy as a model of lm-evaluation-harness, over our sampler and our forward pass.

Importing this module registers the model class `oel_jax`, so that the harness can make one itself:

    import lm_eval, oel_jax.evaluate.model
    lm_eval.simple_evaluate(model="oel_jax", model_args="path=DIR,dtype=float32", tasks=["ifeval"])

The harness hands prompts over as one string, chat template included. Our tokenizers never read a
control token out of a string, since a task's text could hold one. So the ids of a prompt in its
template are kept here under the string that shows them, and anything else is plain text.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_collections
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from oel_jax.base.errors import UserError
from oel_jax.base.files import read_object
from oel_jax.chat.control_tokens import Part
from oel_jax.config.defaults import default
from oel_jax.data.answers import OPEN, answer_of, leaves_open
from oel_jax.evaluate.likelihood import score
from oel_jax.evaluate.responses import Answer, Place, Responses, prompt_digest
from oel_jax.models.language_model import LanguageModel, load_model
from oel_jax.runs.console import Progress
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Completion, Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

MAX_NEW = 256  # tokens of an answer where a task does not say: the harness's own default
_MAX_NEW_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Generation:
    """How one answer is made.

    Attributes:
      how: sampling settings; temperature 0 is greedy.
      max_new: tokens, at most.
      until: the answer is cut before the first of these texts. A stop token ends it anyway.
    """

    how: Sampling
    max_new: int
    until: tuple[str, ...]


def generation(arguments: Mapping[str, Any], task: str | None) -> Generation:
    """Read a task's `generation_kwargs` as the harness's own models do.

    Without `do_sample` a task samples if its temperature is above 0; `do_sample: false` is greedy
    whatever the temperature.

    Raises:
      UserError: an argument that the sampler does not have, or a value out of range.
    """
    left = dict(arguments)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    lengths = [left.pop(name, None) for name in _MAX_NEW_NAMES]
    max_new = int(next((length for length in lengths if length is not None), MAX_NEW))
    temperature, sampled = left.pop("temperature", None), left.pop("do_sample", None)
    if temperature is None:
        temperature = 1.0 if sampled else 0.0
    temperature = 0.0 if sampled is False else float(temperature)
    top_p, top_k = (left.pop(name, None) for name in ("top_p", "top_k"))
    top_p, top_k = 1.0 if top_p is None else float(top_p), int(top_k or 0)
    # Values that switch something off ask for nothing.
    off = {"num_beams": 1, "min_p": 0, "repetition_penalty": 1}
    asked = [f"{n}={v!r}" for n, v in sorted(left.items()) if n not in off or off[n] != v]
    if asked:
        raise UserError(
            f"--lm_eval_tasks: task {task} asks for {', '.join(asked)}, which oel_jax's sampler "
            "does not have; leave the task out"
        )
    if max_new < 1 or temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UserError(
            f"--lm_eval_tasks: task {task} asks for max_gen_toks={max_new}, temperature="
            f"{temperature}, top_p={top_p}, top_k={top_k}; these must be at least 1, at least 0, "
            "above 0 and at most 1, and at least 0"
        )
    how = Sampling(0.0) if temperature == 0.0 else Sampling(temperature, top_k, top_p)
    return Generation(how, max_new, tuple(text for text in until if text))


def answer_text(raw: str, until: Sequence[str], *, opened: bool) -> str:
    """What is scored of a response: without its thought, cut before the first of `until`.

    An unfinished thought is no answer: ''.

    Args:
      opened: the prompt ends inside a thought, which the template has begun.
    """
    text = answer_of(raw, opened=opened)
    for stop in until:
        text = text.partition(stop)[0]
    return text


@dataclass(frozen=True)
class _Prompt:
    """A prompt up to its last control token, as ids, and the plain text after that.

    Attributes:
      first: the plain text begins its own text: no control token of a template before it.
      opened: the prompt ends inside a thought, which the chat template has begun.
    """

    head: tuple[int, ...]
    tail: str
    first: bool = True
    opened: bool = False


@register_model("oel_jax")
class PolicyLM(LM):
    """A loaded model that answers the harness's three kinds of requests.

    Attributes:
      truncated: prompts that were too long and lost their beginning, over the object's life.
      responses: where answers are kept as they are finished, and found again by a resumed run.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        seed: int = 42,
        truncate: bool = False,
        sampler: ml_collections.ConfigDict | None = None,
        block: int = 256,
        responses: Responses | None = None,
        label: str = "lm_eval",
        console_every: float = 5.0,
    ):
        """Wrap `model`.

        Args:
          seed: of all answers. An answer's key depends on it, the task and the document alone.
          truncate: a prompt that does not fit loses its oldest tokens, as in the harness's own
            models; otherwise it is refused.
          sampler: a config's `sampler` section; what it says of lengths is about games and unused.
          block: query block of the attention.
          label: of the progress lines, written every `console_every` seconds.
        """
        super().__init__()
        self.model, self.seed, self.truncate, self.block = model, seed, truncate, block
        self.sampler_config = default().sampler if sampler is None else sampler
        self.responses = Responses() if responses is None else responses
        self.label, self.console_every = label, console_every
        self.truncated = 0
        self._chats: dict[str, _Prompt] = {}
        file = model.directory / "tokenizer_config.json"
        config = read_object(file) if file.is_file() else {}
        named = config.get("bos_token")
        named = named["content"] if isinstance(named, Mapping) else named
        texts = {token.text: token.id for token in model.tokenizer.control.values()}
        begin = texts.get(named)
        self._begin = () if begin is None or config.get("add_bos_token") is False else (begin,)
        # Comes before a text that nothing precedes.
        self._prefix = model.tokenizer.stop_ids[0] if begin is None else begin

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "PolicyLM":
        """The harness's `model_args`: `path=DIR_OR_HUB_ID,dtype=float32,seed=42`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "PolicyLM":
        """The same as a dict; the harness's own batch size and device have no meaning here."""
        arguments = dict(arg_dict)
        unknown = sorted(set(arguments) - {"path", "dtype", "seed", "truncate"})
        if unknown or "path" not in arguments:
            raise UserError(
                f"model_args={arg_dict}: give path=DIR_OR_HUB_ID and, if wanted, dtype, seed and "
                "truncate; nothing else"
            )
        model = load_model(arguments.pop("path"), dtype=arguments.pop("dtype", "bfloat16"))
        return cls(model, **arguments)

    # --- prompts

    @property
    def tokenizer_name(self) -> str:
        """Only the harness's request cache asks for it."""
        return str(self.model.directory)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """One user message in the model's template with thinking off, as a string.

        A system message is put at the head of the user's text, since not every template knows one.
        The start of an answer, where a task gives it, follows the template as plain text.

        Raises:
          UserError: more than one turn, or no chat template.
        """
        messages = list(chat_history)
        start = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        roles = [message["role"] for message in messages]
        if roles not in (["user"], ["system", "user"]) or bool(start) == add_generation_prompt:
            raise UserError(
                f"the chat template is filled with one user message, not with {roles}; call the "
                "harness with fewshot_as_multiturn=False"
            )
        tokenizer = self.model.tokenizer
        text = "\n\n".join(message["content"] for message in messages)
        parts = tokenizer.chat_parts(text, thinking=False)
        tail = parts.pop() if parts and isinstance(parts[-1], str) else ""
        # The start of an answer may end the thought that the template has begun, or begin one.
        begun = OPEN if tokenizer.opens_thought(thinking=False) else ""
        opened, head = leaves_open(begun + start), tuple(tokenizer.encode_parts(parts))
        prompt = _Prompt(head, tail + start, not parts, opened)
        shown = self._shown(parts) + prompt.tail
        if self._chats.setdefault(shown, prompt) != prompt:
            raise UserError(f"two prompts of a task look alike but differ in their ids: {shown!r}")
        return shown

    def _shown(self, parts: Sequence[Part]) -> str:
        """A prompt as text, control tokens written out."""
        return "".join(part if isinstance(part, str) else part.text for part in parts)

    def _prompt(self, context: str) -> _Prompt:
        return self._chats.get(context) or _Prompt(self._begin if context else (), context)

    def _ids(self, prompt: _Prompt) -> list[int]:
        tail = self.model.tokenizer.encode(prompt.tail, first=prompt.first)
        return [*prompt.head, *tail] or [self._prefix]

    def _fit(self, ids: Sequence[int], room: int, task: str | None, what: str) -> list[int]:
        """`ids`, or their last `room` ones."""
        if len(ids) <= room:
            return list(ids)
        most = self.model.cfg.max_positions
        if not self.truncate or room < 1:
            raise UserError(
                f"--lm_eval_tasks: task {task} has a prompt of {len(ids)} tokens, which with "
                f"{what} does not fit into the {most} positions of {self.model.directory}; lower "
                "--max_gen_toks, or give --truncate_prompts to drop the oldest tokens of such "
                "prompts"
            )
        self.truncated += 1
        return list(ids[-room:])

    # --- answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Sample an answer to each `(context, generation_kwargs)`.

        The sampler knows stop tokens, not stop texts: an answer that meets one of `until` is cut
        afterwards, and the tokens after it were made in vain.

        Raises:
          UserError: a prompt that does not fit, or an argument that the sampler does not have;
            both before the first token is sampled.
        """
        places = _places(requests)
        wanted = [generation(request.args[1], request.task_name) for request in requests]
        room = self.model.cfg.max_positions
        asked = [self._prompt(request.args[0]) for request in requests]
        prompts = [
            self._fit(
                self._ids(prompt), room - how.max_new, request.task_name, f"{how.max_new} new ones"
            )
            for request, how, prompt in zip(requests, wanted, asked, strict=True)
        ]
        digests = [prompt_digest(ids) for ids in prompts]
        answers = [self.responses.find(*at) for at in zip(places, digests, strict=True)]
        todo: dict[Sampling, list[int]] = defaultdict(list)
        for index, answer in enumerate(answers):
            if answer is None:
                todo[wanted[index].how].append(index)
        done = sum(answer is not None for answer in answers)
        with self._progress(len(requests), "answers", done) as progress:
            for how, indices in todo.items():
                queue = [
                    Request(
                        prompts[i],
                        request_key(self.seed, "lm_eval", *places[i]),
                        wanted[i].max_new,
                        tag=i,
                    )
                    for i in indices
                ]
                for completion in self._sample(how, queue, progress):
                    answer = self._answer(completion)
                    self.responses.add(places[completion.tag], digests[completion.tag], answer)
                    answers[completion.tag] = answer
                    progress.update()
        return [
            answer_text(answer.response, how.until, opened=prompt.opened)
            for answer, how, prompt in zip(answers, wanted, asked, strict=True)
        ]

    def _answer(self, completion: Completion) -> Answer:
        text = self.model.tokenizer.decode(completion.ids)
        return Answer(text, len(completion.ids), completion.stopped)

    def _sample(self, how: Sampling, queue: Sequence[Request], progress: Progress):
        """Yield the completions as they are finished."""
        s, model = self.sampler_config, self.model
        devices = model.mesh.shape["fsdp"]
        slots = min(s.slots, -(-len(queue) // devices) * devices)
        sampler = Sampler(
            model.cfg,
            model.mesh,
            SamplerConfig(
                slots=slots,
                length=max(len(request.prompt) + request.max_new for request in queue),
                response=max(request.max_new for request in queue),
                dtype=model.params["embed"].dtype,
                decode_steps=s.decode_steps,
                prefill_rows=min(s.prefill_rows, slots),
                prefill_chunk=s.prefill_chunk,
                block=self.block,
                overlap=s.overlap,
            ),
            sampling=how,
            limit=model.vocab_limit,
            stop_ids=model.tokenizer.stop_ids,
        )
        progress.follow(tokens=lambda: sampler.written)
        sampler.submit(queue)
        while sampler.busy:
            yield from sampler.poll(model.params)

    # --- likelihoods

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) of each pair.

        Blanks at the end of a context count to the continuation, and both are tokenised in one
        piece, as the harness's own models do.

        Raises:
          UserError: a pair that does not fit into the model's positions.
        """
        room = self.model.cfg.max_positions
        pairs = []
        for request in requests:
            context, continuation = self._pair(*request.args)
            left = room - len(continuation) + 1  # the last token is not read
            what = f"{len(continuation)} to be scored"
            pairs.append((self._fit(context, left, request.task_name, what), continuation))
        with self._progress(len(pairs), "continuations") as progress:
            scored = score(self.model, pairs, block=self.block, done=progress.update)
        return [(one.total, one.greedy) for one in scored]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prompt = self._prompt(context)
        encode = partial(self.model.tokenizer.encode, first=prompt.first)
        count = len(prompt.head) + len(encode(prompt.tail.rstrip()))
        whole = [*prompt.head, *encode(prompt.tail + continuation)]
        return whole[:count] or [self._prefix], whole[count:]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of whole texts; what exceeds the positions is scored window by window."""
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.model.tokenizer.encode(request.args[0]),
                prefix_token=self._prefix,
                max_seq_len=self.model.cfg.max_positions,
                context_len=1,
            )
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(index)
        with self._progress(len(pairs), "windows") as progress:
            scored = score(self.model, pairs, block=self.block, done=progress.update)
        totals = [0.0] * len(requests)
        for index, one in zip(owners, scored, strict=True):
            totals[index] += one.total
        return totals

    def _progress(self, total: int, unit: str, done: int = 0) -> Progress:
        return Progress(total, unit, self.label, every=self.console_every, done=done)


def _places(requests: Sequence[Instance]) -> list[Place]:
    """What tells requests apart; one that a task repeats comes several times."""
    seen: Counter[tuple] = Counter()
    places = []
    for request in requests:
        at = (request.task_name, request.doc_id, request.idx)
        places.append(Place(*at, repeat=seen[at]))
        seen[at] += 1
    return places
