"""Host side of the sampler: requests go in, completions come out, slots refill as they free up."""

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.errors import UserError
from oel_jax.lm.config import ModelConfig
from oel_jax.lm.model import Params
from oel_jax.lm.sampling import Sampling
from oel_jax.lm.slots import Admission, decode, empty_state, prefill
from oel_jax.parallel.mesh import put_batch


def request_key(*parts: object) -> np.ndarray:
    """Raw threefry key [2] uint32 that depends on `parts` alone (purpose, round, seed, turn ...).

    The token index is folded in on the device (spec section 5 [D]).
    """
    text = "\x1f".join(str(part) for part in parts)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32).copy()


@dataclass(frozen=True)
class Request:
    """One generation: prompt ids, random key and budget; `tag` is handed back untouched."""

    prompt: Sequence[int]
    key: np.ndarray
    max_new: int
    tag: Any = None


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
      ids: response ids, the stop token included.
      log_probs: float32 [len(ids)], at the sampling temperature before top-k and top-p.
      stopped: a stop token ended it (False: the budget did).
    """

    tag: Any
    ids: list[int]
    log_probs: np.ndarray
    stopped: bool


def _bucket(length: int, longest: int) -> int:
    """Padded prompt length: powers of two from 32, and the halves between them."""
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


class Sampler:
    """A fixed set of slots on a mesh.

    `submit` queues requests; `poll` fills free slots, decodes up to `decode_steps` tokens and
    returns what finished. The parameters are an argument of `poll`: the sampler reads the very
    arrays the trainer updates.

    Prompts are padded to a bucket that depends on their own length only, and always travel in
    batches of `prefill_rows`: no shape, hence no result, depends on what else is in the batch.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: jax.sharding.Mesh,
        *,
        slots: int,
        max_len: int,
        max_new: int,
        how: Sampling,
        limit: int,
        stop_ids: Sequence[int],
        dtype: Any = jnp.float32,
        decode_steps: int = 16,
        prefill_rows: int = 8,
        block: int = 512,
    ):
        """Allocate the cache: slots x max_len tokens.

        Raises:
          UserError: slots or prefill_rows are not a multiple of the mesh's 'fsdp' size.
        """
        fsdp = mesh.shape["fsdp"]
        for name, value in (("slots", slots), ("prefill_rows", prefill_rows)):
            if value < 1 or value % fsdp:
                raise UserError(
                    f"config.sampler.{name}={value} must be a positive multiple of "
                    f"config.mesh.fsdp={fsdp}"
                )
        self.cfg, self.mesh, self.how, self.limit = cfg, mesh, how, limit
        self.stop_ids = tuple(stop_ids)
        self.max_len, self.max_new = max_len, max_new
        self.decode_steps, self.prefill_rows, self.block = decode_steps, prefill_rows, block
        self._pending: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._free = list(range(slots))[::-1]
        self._slots = slots
        self.generated = 0  # tokens, over the sampler's life
        with jax.set_mesh(mesh):
            self._state = empty_state(cfg, mesh, slots, max_len, max_new, dtype)

    @property
    def busy(self) -> bool:
        """Whether anything is queued or running."""
        return bool(self._pending or self._running)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
          UserError: an empty prompt, or one that cannot fit into the cache with its budget.
        """
        for request in requests:
            need = len(request.prompt) + request.max_new
            if not request.prompt:
                raise UserError("an empty prompt cannot be sampled from: give at least one token")
            if not 1 <= request.max_new <= self.max_new:
                raise UserError(
                    f"a request asks for {request.max_new} new tokens; this sampler gives "
                    f"1 to {self.max_new} (config.sampler.max_response, config.extract.l_max)"
                )
            if need > self.max_len:
                raise UserError(
                    f"a prompt of {len(request.prompt)} tokens plus {request.max_new} new ones "
                    f"does not fit into the cache of {self.max_len}: raise "
                    f"config.sampler.max_prompt (games) or config.extract.max_prompt (extractor), "
                    f"or config.sampler.max_len if it is set"
                )
            self._pending.append(request)

    def poll(self, params: Params) -> list[Completion]:
        """Fill free slots, decode once, return the completions (possibly none)."""
        with jax.set_mesh(self.mesh):
            while self._pending and self._free:
                self._admit(params)
            if not self._running:
                return []
            self._state = decode(
                self.cfg,
                params,
                self._state,
                np.int32(self.decode_steps),
                how=self.how,
                limit=self.limit,
                stop_ids=self.stop_ids,
            )
        return self._collect()

    def generate(self, params: Params, requests: Sequence[Request]) -> list[Completion]:
        """Run all requests; completions in the order of the requests."""
        self.submit(Request(r.prompt, r.key, r.max_new, index) for index, r in enumerate(requests))
        results: list[Completion | None] = [None] * len(requests)
        while self.busy:
            for done in self.poll(params):
                tag = requests[done.tag].tag
                results[done.tag] = Completion(tag, done.ids, done.log_probs, done.stopped)
        return results  # type: ignore[return-value]

    def _admit(self, params: Params) -> None:
        """Prefill one batch: the pending requests that share the first one's bucket."""
        size = _bucket(max(len(self._pending[0].prompt) - 1, 1), self.max_len)
        room = min(self.prefill_rows, len(self._free))
        batch: list[Request] = []
        later: deque[Request] = deque()
        while self._pending and len(batch) < room:
            request = self._pending.popleft()
            fits = _bucket(max(len(request.prompt) - 1, 1), self.max_len) == size
            (batch if fits else later).append(request)
        self._pending.extendleft(reversed(later))
        rows = self.prefill_rows
        tokens = np.zeros((rows, size), np.int32)
        numbers = np.zeros((rows, 3), np.int32)  # length, last, budget
        slot = np.full(rows, self._slots, np.int32)
        keys = np.zeros((rows, 2), np.uint32)
        for row, request in enumerate(batch):
            prompt = np.asarray(request.prompt, np.int32)
            tokens[row, : len(prompt) - 1] = prompt[:-1]
            numbers[row] = len(prompt) - 1, prompt[-1], request.max_new
            slot[row], keys[row] = self._free.pop(), request.key
            self._running[int(slot[row])] = request
        new = Admission(
            tokens=tokens,
            length=numbers[:, 0].copy(),
            last=numbers[:, 1].copy(),
            slot=slot,
            key=keys,
            budget=numbers[:, 2].copy(),
        )
        new = put_batch(self.mesh, new)
        self._state = prefill(self.cfg, params, self._state, new, block=self.block)

    def _collect(self) -> list[Completion]:
        """Fetch the slots that have just finished and free them."""
        done = np.asarray(self._state.done)
        finished = [slot for slot in self._running if done[slot]]
        if not finished:
            return []
        count, ids, log_probs = jax.device_get(
            (self._state.count, self._state.response, self._state.log_prob)
        )
        completions = []
        for slot in finished:
            request, length = self._running.pop(slot), int(count[slot])
            response = ids[slot, :length].tolist()
            completions.append(
                Completion(
                    tag=request.tag,
                    ids=response,
                    log_probs=log_probs[slot, :length].copy(),
                    stopped=response[-1] in self.stop_ids,
                )
            )
            self._free.append(slot)
            self.generated += length
        return completions
