"""Host side of the sampler: requests go in, completions come out, slots refill as they free up."""

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from oel_jax.errors import UserError
from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params
from oel_jax.models.shared_prefix import common_prefix, encode_prefix, padded_length
from oel_jax.parallel.mesh import device_bytes, put_batch
from oel_jax.sampler.pace import Pace
from oel_jax.sampler.requests import Completion, Request
from oel_jax.sampler.sampling import Sampling
from oel_jax.sampler.slots import (
    Admission,
    Piece,
    admit,
    copy_slots,
    decode,
    empty_state,
    extend,
    put_prefix,
)


@dataclass
class _Slot:
    """What the host knows of a slot.

    Attributes:
      running: the request that decodes in it.
      session: whose last prompt and response lie in it.
      held: the ids in its cache, behind the shared part.
      shared: how much of the prefix its session reads.
    """

    running: Request | None = None
    session: Hashable = None
    held: Sequence[int] = ()
    shared: int = 0


@dataclass(frozen=True)
class _Entry:
    """A request on its way into a slot.

    Attributes:
      own: prompt ids behind the shared part.
      start: how many of them are in the slot already.
      source: the slot of an equal prompt that enters at the same time; -1: none.
    """

    request: Request
    slot: int
    shared: int
    own: Sequence[int]
    start: int
    source: int = -1

    @property
    def missing(self) -> Sequence[int]:
        """Ids to be encoded: the last prompt token is left for decoding."""
        return self.own[self.start : -1]


@dataclass(frozen=True)
class _Part:
    """A piece of an entry's missing ids, from number `first` on."""

    entry: _Entry
    first: int
    ids: Sequence[int]

    @property
    def slot(self) -> int:
        return self.entry.slot

    @property
    def size(self) -> int:
        """Tokens that it is padded to."""
        return padded_length(len(self.ids))


_InSlot = TypeVar("_InSlot", _Entry, _Part)


class Sampler:
    """A fixed set of slots on a mesh.

    `submit` queues requests; `poll` fills free slots, decodes up to `decode_steps` tokens and
    returns what finished. The parameters are an argument of `poll`: the sampler reads the very
    arrays the trainer updates (a caller that changes them calls `forget`).

    Nothing that depends on what else is in the batch changes a result: prompts are padded to a
    length that follows from their own, travel in batches of `prefill_rows`, and reuse only what
    their own session and their own prefix say.

    With `overlap`, `poll` does not wait for the decoding it starts: the caller plays its games and
    makes its next prompts meanwhile, and gets the answers of one call from the next. The device
    then never waits for the host, and a slot that was answered waits for one dispatch.
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
        prefill_chunk: int = 512,
        longest_prefix: int = 0,
        prefixes: int = 1,
        block: int = 256,
        overlap: bool = False,
        draft: int = 0,
    ):
        """Allocate the caches: slots x max_len and prefixes x longest_prefix tokens.

        Args:
          max_len: tokens of prompt and response behind the shared prefix.
          prefill_chunk: longer prompts are encoded in pieces of so many tokens.
          prefixes: how many shared prefixes can be in use at once; each has its part of the slots.
          draft: tokens drafted from a slot's own text and verified in each pass; 0: none.

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
        if slots // fsdp % prefixes:
            raise UserError(
                f"{slots} slots on {fsdp} device(s) cannot be shared among {prefixes} prefixes: "
                f"config.sampler.slots must be a multiple of both"
            )
        self.cfg, self.mesh, self.how, self.limit = cfg, mesh, how, limit
        self.stop_ids = tuple(stop_ids)
        self.max_len, self.max_new = max_len, max_new
        self.decode_steps, self.prefill_rows, self.block = decode_steps, prefill_rows, block
        self.prefill_chunk, self.longest_prefix = prefill_chunk, longest_prefix
        self.overlap, self.draft, self._in_flight = overlap, draft, False
        self._pace = Pace(decode_steps)
        self._safe_place: Callable[[], None] = lambda: None
        self._pending: deque[Request] = deque()
        self._slots = [_Slot() for _ in range(slots)]
        self._per_device = slots // fsdp
        self._prefixes: list[tuple[int, ...]] = [()] * prefixes
        self.generated = 0  # tokens of finished completions, over the sampler's life
        self.written = 0  # the same and the tokens so far of completions that are not finished
        self.encoded = 0  # prompt tokens that went through the model, padding not counted
        with jax.set_mesh(mesh):
            self._state = empty_state(
                cfg,
                mesh,
                slots,
                max_len,
                max_new,
                dtype,
                groups=prefixes,
                shared=longest_prefix,
                drafting=draft > 0,
            )

    @property
    def busy(self) -> bool:
        """Whether anything is queued or running."""
        return bool(self._pending) or any(slot.running for slot in self._slots)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
          UserError: an empty prompt, or one that cannot fit into the cache with its budget.
        """
        for request in requests:
            if not request.prompt:
                raise UserError("an empty prompt cannot be sampled from: give at least one token")
            if not 1 <= request.max_new <= self.max_new:
                raise UserError(
                    f"a request asks for {request.max_new} new tokens; this sampler gives "
                    f"1 to {self.max_new} (config.sampler.max_response, config.extract.l_max)"
                )
            need = len(request.prompt) + request.max_new - self._shared(request)
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
            done = self._wait() if self.overlap and self._in_flight else []
            if self._pending:
                self._fill(params)
            self._in_flight = any(slot.running for slot in self._slots)
            if self._in_flight:
                self._pace.begin()
                self._state = decode(
                    self.cfg,
                    params,
                    self._state,
                    np.int32(self._pace.steps),
                    how=self.how,
                    limit=self.limit,
                    stop_ids=self.stop_ids,
                    draft=self.draft,
                )
                self._pace.started()
            return done if self.overlap or not self._in_flight else self._wait()

    def _wait(self) -> list[Completion]:
        """Wait for the decoding under way and collect what it finished."""
        waited = not self._state.done.is_ready()
        done = self._collect()
        self._pace.decoded(waited)
        return done

    def generate(
        self,
        params: Params,
        requests: Sequence[Request],
        safe_place: Callable[[], None] = lambda: None,
    ) -> list[Completion]:
        """Run all requests; completions in the order of the requests.

        Args:
          safe_place: called every few seconds, between dispatches; it may raise what ends the work.
            The sampler is of no further use then.
        """
        self.submit(replace(request, tag=index) for index, request in enumerate(requests))
        results: list[Completion | None] = [None] * len(requests)
        self._safe_place = safe_place
        while self.busy:
            for done in self.poll(params):
                tag = requests[done.tag].tag
                results[done.tag] = replace(done, tag=tag)
            safe_place()
        self._safe_place = lambda: None
        return results  # type: ignore[return-value]

    @property
    def bytes(self) -> int:
        """Bytes of the caches and all other state on one device."""
        return device_bytes(self._state)

    def drafts(self) -> tuple[int, int]:
        """(tokens drafted, drafted tokens kept) over the sampler's life."""
        proposed, accepted = jax.device_get(self._state.drafts).tolist()
        return proposed, accepted

    def forget(self) -> None:
        """Drop everything kept for reuse: call it when the parameters have changed."""
        self._prefixes = [()] * len(self._prefixes)
        for slot in self._slots:
            slot.session = None

    # --- who enters which slot

    def _shared(self, request: Request) -> int:
        """How much of the shared prefix a prompt reads; its last token is always its own."""
        if not self.longest_prefix or not request.prefix:
            return 0
        return min(common_prefix(request.prompt, request.prefix), len(request.prompt) - 1)

    def _fill(self, params: Params) -> None:
        """Put as many pending requests as possible into slots and encode their prompts."""
        entries = self._continue() + self._begin(params)
        self._encode(params, entries)
        self._copy([entry for entry in entries if entry.source >= 0])
        for batch in self._rows_of(entries):
            self._admit(batch)

    @property
    def _devices(self) -> int:
        return len(self._slots) // self._per_device

    def _lane(self, slot: int) -> int:
        """The prefix that a slot reads."""
        return slot % self._per_device % len(self._prefixes)

    def _continue(self) -> list[_Entry]:
        """Requests whose session has a slot go there."""
        kept = {slot.session: i for i, slot in enumerate(self._slots) if slot.session is not None}
        entries, others = [], deque()
        for request in self._pending:
            index = kept.get(request.session) if request.session is not None else None
            if index is None or self._slots[index].running:
                others.append(request)
                continue
            slot, shared = self._slots[index], self._shared(request)
            own = request.prompt[shared:]
            same = shared == slot.shared and self._prefixes[self._lane(index)] == request.prefix
            start = min(common_prefix(own, slot.held), len(own) - 1) if same else 0
            if not same and shared:
                others.append(request)  # another prefix: it must go where that one is read
                slot.session = None
                continue
            entries.append(self._enter(request, index, shared, start))
        self._pending = others
        return entries

    def _begin(self, params: Params) -> list[_Entry]:
        """Requests from the front of the queue go into free slots that read their prefix."""
        free: list[list[int]] = [[] for _ in self._prefixes]
        busy = [False] * len(self._prefixes)
        # Slots with nothing worth keeping come first, and devices take turns.
        order = sorted(
            range(len(self._slots)),
            key=lambda i: (self._slots[i].session is not None, i % self._per_device),
        )
        for index in reversed(order):
            lane = self._lane(index)
            if self._slots[index].running:
                busy[lane] = True
            else:
                free[lane].append(index)
        entries: list[_Entry] = []
        leaders: dict[tuple, int] = {}
        others: deque[Request] = deque()
        while self._pending and any(free):
            request = self._pending.popleft()
            lane = self._choose(request, free, busy, params)
            if lane is None:
                others.append(request)
                continue
            busy[lane] = True
            index = free[lane].pop()
            shared = self._shared(request)
            same = (index // self._per_device, lane, shared, tuple(request.prompt))
            source = leaders.setdefault(same, index)
            entries.append(
                self._enter(request, index, shared, 0, source if source != index else -1)
            )
        self._pending.extendleft(reversed(others))
        return entries

    def _choose(
        self, request: Request, free: list[list[int]], busy: list[bool], params: Params
    ) -> int | None:
        """A lane with a free slot that reads the request's prefix, loading that if need be."""
        open_lanes = [lane for lane in range(len(free)) if free[lane]]
        if not self._shared(request):
            return max(open_lanes, key=lambda lane: len(free[lane]))
        if request.prefix in self._prefixes:
            lane = self._prefixes.index(request.prefix)
            return lane if free[lane] else None
        lane = next((lane for lane in open_lanes if not busy[lane]), None)
        if lane is not None:
            self._load(lane, request.prefix, params)
        return lane

    def _enter(
        self, request: Request, index: int, shared: int, start: int, source: int = -1
    ) -> _Entry:
        own = request.prompt[shared:]
        self._slots[index] = _Slot(request, request.session, own, shared)
        return _Entry(request, index, shared, own, start, source)

    # --- what the device does for them

    def _load(self, lane: int, prefix: tuple[int, ...], params: Params) -> None:
        """Encode a shared prefix into a lane in which nothing runs."""
        for index, slot in enumerate(self._slots):
            if self._lane(index) == lane:
                slot.session = None
        if len(prefix) > self.longest_prefix:
            raise ValueError(f"a prefix of {len(prefix)} tokens; room for {self.longest_prefix}")
        width = min(padded_length(len(prefix)), self._state.bank.keys.shape[2])
        cache = encode_prefix(self.cfg, self.mesh, params, prefix, width=width, block=self.block)
        self._state = put_prefix(self._state, np.int32(lane), cache)
        self._prefixes[lane] = prefix
        self.encoded += len(prefix)

    def _rows_of(self, entries: Sequence[_InSlot]) -> list[list[_InSlot]]:
        """Batches with at most `prefill_rows` entries, equally many rows for each device."""
        rows = self.prefill_rows // self._devices
        waiting: list[list[_InSlot]] = [[] for _ in range(self._devices)]
        for entry in entries:
            waiting[entry.slot // self._per_device].append(entry)
        count = max((-(-len(some) // rows) for some in waiting), default=0)
        return [
            [entry for some in waiting for entry in some[i * rows : (i + 1) * rows]]
            for i in range(count)
        ]

    def _places(self, batch: Sequence[_InSlot]) -> list[int]:
        """The row of each entry: rows of its slot's device."""
        rows = self.prefill_rows // self._devices
        used = [0] * self._devices
        places = []
        for entry in batch:
            device = entry.slot // self._per_device
            places.append(device * rows + used[device])
            used[device] += 1
        return places

    def _encode(self, params: Params, entries: Sequence[_Entry]) -> None:
        """Write the missing prompt tokens into the slots, piece by piece.

        Each prompt is cut by its own length: whole chunks, then the padded rest. A wave takes the
        next piece of all; pieces of one size travel together however long their prompts are.
        """
        cut = [self._pieces(entry) for entry in entries if entry.source < 0]
        for wave in zip_longest(*cut):
            sizes: dict[tuple[int, int], list[_Part]] = defaultdict(list)
            for part in wave:
                if part is not None:
                    lane = self._lane(part.slot) if part.entry.shared else -1
                    sizes[lane, part.size].append(part)
            for (lane, size), parts in sizes.items():
                for batch in self._rows_of(parts):
                    self._write(params, batch, size, max(lane, 0))

    def _pieces(self, entry: _Entry) -> list[_Part]:
        chunk, missing = self.prefill_chunk, entry.missing
        return [
            _Part(entry, first, missing[first : first + chunk])
            for first in range(0, len(missing), chunk)
        ]

    def _write(self, params: Params, batch: Sequence[_Part], size: int, lane: int) -> None:
        """One dispatch: pieces of prompts, padded to `size`, into their slots."""
        rows = self.prefill_rows
        tokens = np.zeros((rows, size), np.int32)
        length, column, shared = (np.zeros(rows, np.int32) for _ in range(3))
        slot = np.full(rows, self._per_device, np.int32)
        for row, part in zip(self._places(batch), batch, strict=True):
            tokens[row, : len(part.ids)] = part.ids
            length[row], column[row] = len(part.ids), part.entry.start + part.first
            slot[row], shared[row] = part.slot % self._per_device, part.entry.shared
            self.encoded += len(part.ids)
        arrays = put_batch(self.mesh, (tokens, length, column, slot, shared))
        self._pace.encode()
        self._state = extend(self.cfg, params, self._state, Piece(*arrays, np.int32(lane)))
        if self._pace.encoding(rows * size):
            jax.block_until_ready(self._state.done)
            self._pace.encoded()
            self._safe_place()

    def _copy(self, entries: Sequence[_Entry]) -> None:
        """Equal prompts are encoded once: the others copy them."""
        longest: dict[int, list[_Entry]] = defaultdict(list)
        for entry in entries:
            if entry.missing:
                width = min(padded_length(len(entry.missing)), self._state.cache.keys.shape[2])
                longest[width].append(entry)
        for width, some in longest.items():
            for batch in self._rows_of(some):
                source, target = (
                    np.full(self.prefill_rows, self._per_device, np.int32) for _ in range(2)
                )
                for row, entry in zip(self._places(batch), batch, strict=True):
                    source[row] = entry.source % self._per_device
                    target[row] = entry.slot % self._per_device
                both = put_batch(self.mesh, (source, target))
                self._state = copy_slots(self._state, *both, width=width)

    def _admit(self, batch: Sequence[_Entry]) -> None:
        """Let a batch decode."""
        rows = self.prefill_rows
        slot = np.full(rows, self._per_device, np.int32)
        last, column, shared, budget = (np.zeros(rows, np.int32) for _ in range(4))
        key = np.zeros((rows, 2), np.uint32)
        for row, entry in zip(self._places(batch), batch, strict=True):
            slot[row], key[row] = entry.slot % self._per_device, entry.request.key
            last[row], column[row] = entry.own[-1], len(entry.own) - 1
            shared[row], budget[row] = entry.shared, entry.request.max_new
        new = put_batch(self.mesh, (slot, last, column, shared, key, budget))
        self._state = admit(self._state, Admission(*new))

    def _collect(self) -> list[Completion]:
        """Fetch the slots that have just finished and free them."""
        done, count = jax.device_get((self._state.done, self._state.count))
        running = [i for i, slot in enumerate(self._slots) if slot.running]
        self.written = self.generated + int(count[running].sum())
        finished = [i for i in running if done[i]]
        if not finished:
            return []
        ids, log_probs = jax.device_get((self._state.response, self._state.log_prob))
        completions = []
        for index in finished:
            slot, length = self._slots[index], int(count[index])
            response = ids[index, :length].tolist()
            completions.append(
                Completion(
                    tag=slot.running.tag,
                    ids=response,
                    log_probs=log_probs[index, :length].copy(),
                    stopped=response[-1] in self.stop_ids,
                )
            )
            # The last sampled token was never read, so its keys and values are not in the cache.
            slot.running, slot.held = None, [*slot.held, *response[:-1]]
            self.generated += length
        return completions
