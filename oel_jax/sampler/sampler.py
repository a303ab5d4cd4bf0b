"""Host side of the sampler: requests go in, completions come out, slots refill as they free up."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import jax
import numpy as np

from oel_jax.models.config import ModelConfig
from oel_jax.models.decoder import Params
from oel_jax.models.lengths import padded_length
from oel_jax.models.shared_prefix import encode_prefix
from oel_jax.parallel.mesh import device_bytes, put_batch
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.decode import decode
from oel_jax.sampler.pace import Pace
from oel_jax.sampler.prefill import Piece, extend
from oel_jax.sampler.requests import Completion, Request, RequestError, RequestProgress, Sampling
from oel_jax.sampler.reuse import ReusingScheduler
from oel_jax.sampler.sampling import RowSampling
from oel_jax.sampler.scheduler import Assignment, Entry, PromptPiece, Rows, Scheduler
from oel_jax.sampler.slots import (
    Admission,
    admit,
    copy_slots,
    empty_state,
    put_prefix,
    read_responses,
    release,
)

ROUND_WIDTHS = (64, 1024)  # what is sorted with `SamplerConfig.any_settings`, or all
MOST_WIDTHS = 8  # numbers of candidates that decoding is compiled for at once, see `_widths`


class Sampler:
    """A fixed set of slots on a mesh.

    `submit` queues requests; `poll` fills free slots, decodes up to `decode_steps` tokens and
    returns what finished. The parameters are an argument of `poll`: the sampler reads the very
    arrays the trainer updates (a caller that changes them calls `forget`).

    Nothing that depends on what else is in the batch changes a result: prompts are padded to a
    length that follows from their own, travel in batches of `prefill_rows`, and reuse only what
    their own session and their own prefix say. Requests with different sampling settings share
    the slots.

    With `overlap`, `poll` does not wait for the decoding it starts: the caller plays its games and
    makes its next prompts meanwhile, and gets the answers of one call from the next. The device
    then never waits for the host, and a finished slot is refilled one dispatch later.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: jax.sharding.Mesh,
        config: SamplerConfig,
        *,
        limit: int,
        stop_ids: Sequence[int],
        sampling: Sampling | None = None,
    ):
        """Allocate the caches.

        Args:
          limit: ids >= limit (padding rows of the embedding) are never sampled.
          stop_ids: tokens that end a response, unless its request names others.
          sampling: of requests that bring no settings.

        Raises:
          ValueError: the config does not fit the mesh.
        """
        config.check(mesh.shape["fsdp"])
        config = replace(config, stops=max(config.stops, len(stop_ids)))
        self.cfg, self.mesh, self.config, self.limit = cfg, mesh, config, limit
        self.sampling, self.stop_ids = sampling or Sampling(), tuple(stop_ids)
        self.sampling.check()
        self._recent_widths = [self._width(self.sampling)]
        if config.any_settings:
            self._recent_widths = sorted({0, *map(self._rounded, (1, *ROUND_WIDTHS, 1 << 30))})
        self._in_flight = False
        self._pace = Pace(config.decode_steps, config.seconds)
        self.progress: list[RequestProgress] = []  # of the last `poll`, with `config.follow`
        self._safe_place: Callable[[], None] = lambda: None
        self._schedule = (ReusingScheduler if config.reuse else Scheduler)(
            slots=config.slots,
            devices=mesh.shape["fsdp"],
            prefixes=config.prefixes,
            longest_prefix=config.longest_prefix,
            prefill_rows=config.prefill_rows,
            prefill_chunk=config.prefill_chunk,
        )
        self.generated = 0  # tokens of finished completions, over the sampler's life
        self.written = 0  # the same and the tokens so far of completions that are not finished
        self.encoded = 0  # prompt tokens that went through the model, padding not counted
        with jax.set_mesh(mesh):
            self._state = empty_state(cfg, mesh, config)

    @property
    def busy(self) -> bool:
        """Whether anything is queued or running."""
        return self._schedule.busy

    @property
    def bytes(self) -> int:
        """Bytes of the caches and all other state on one device."""
        return device_bytes(self._state)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
          RequestError: an empty prompt, one that does not fit into the cache with its budget, or
            sampling settings that make no sense.
        """
        for request in requests:
            self.check(request)
            self._schedule.pending.append(request)

    def poll(self, params: Params) -> list[Completion]:
        """Fill free slots, decode once, return the completions (possibly none)."""
        overlap = self.config.overlap
        self.progress = []
        with jax.set_mesh(self.mesh):
            done = self._wait() if overlap and self._in_flight else []
            if self._schedule.pending:
                self._fill(params)
            running = self._schedule.running()
            self._in_flight = bool(running)
            if running:
                self._pace.begin()
                self._state = self._decode(params, running)
                self._pace.started()
            return done if overlap or not running else self._wait()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Give up these very requests (the objects that were submitted), pending or running.

        Their slots are free at once. What has finished, or is not known, is left alone.
        """
        freed = self._schedule.withdraw(requests)
        if freed:
            with jax.set_mesh(self.mesh):
                marks = np.zeros(self.config.slots, bool)
                marks[freed] = True
                self._state = release(self._state, put_batch(self.mesh, marks))

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

    def drafts(self) -> tuple[int, int]:
        """(tokens drafted, drafted tokens kept) over the sampler's life."""
        proposed, accepted = jax.device_get(self._state.drafts).tolist()
        return proposed, accepted

    def drop(self) -> None:
        """Let go of the caches: the sampler is of no further use."""
        self._state = None

    def forget(self) -> None:
        """Drop everything kept for reuse: call it when the parameters have changed."""
        self._schedule.forget()

    # --- what a request asks for

    def check(self, request: Request) -> None:
        """Raises RequestError as `submit` does; queues nothing."""
        most = self.config.response
        if not request.prompt:
            raise RequestError("an empty prompt cannot be sampled from: give at least one token")
        if not 1 <= request.max_new <= most:
            raise RequestError(
                f"a request asks for {request.max_new} new tokens; this sampler gives 1 to {most}"
            )
        need = len(request.prompt) + request.max_new - self._schedule.shared(request)
        if need > self.config.length:
            raise RequestError(
                f"a prompt of {len(request.prompt)} tokens plus {request.max_new} new ones does "
                f"not fit into the cache of {self.config.length} tokens per slot"
            )
        self._sampling(request).check()
        ends = len(self._stop_ids(request))
        if ends > self.config.stops:
            raise RequestError(f"{ends} stop ids; this sampler has room for {self.config.stops}")

    def _sampling(self, request: Request) -> Sampling:
        return self.sampling if request.sampling is None else request.sampling

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        return self.stop_ids if request.stop_ids is None else tuple(request.stop_ids)

    def _width(self, sampling: Sampling) -> int:
        width = sampling.candidates(self.cfg.vocab_size)
        return self._rounded(width) if self.config.any_settings and width > 1 else width

    def _rounded(self, width: int) -> int:
        vocabulary = self.cfg.vocab_size
        if width == 1:
            return 1
        return min((w for w in ROUND_WIDTHS if width <= w < vocabulary), default=vocabulary)

    def _widths(self, running: Sequence[int]) -> tuple[int, ...]:
        """Numbers of candidates that decoding has to know, sorted.

        They are static, so what was asked for recently stays among them: requests of two kinds that
        take turns compile one program, in which the kind that is not there costs nothing.
        """
        slots = self._schedule.slots
        asked = {self._width(self._sampling(slots[index].running)) for index in running}
        older = [width for width in self._recent_widths if width not in asked]
        recent = [*older[max(0, len(older) + len(asked) - MOST_WIDTHS) :], *sorted(asked)]
        self._recent_widths = recent
        return tuple(sorted(recent))

    # --- what the device does

    def _decode(self, params: Params, running: Sequence[int]):
        return decode(
            self.cfg,
            params,
            self._state,
            np.int32(self._pace.steps),
            limit=self.limit,
            widths=self._widths(running),
            draft=self.config.draft,
        )

    def _wait(self) -> list[Completion]:
        """Wait for the decoding under way and collect what it finished."""
        waited = not self._state.done.is_ready()
        done = self._collect()
        self._pace.decoded(waited)
        return done

    def _fill(self, params: Params) -> None:
        """Put as many pending requests as possible into slots and encode their prompts."""
        more = True
        while more:
            work = self._schedule.assign()
            self._enter(params, work)
            more = work.more

    def _enter(self, params: Params, work: Assignment) -> None:
        """Do what has to be done before these entries decode."""
        for number, prefix in work.loads:
            self._load(number, prefix, params)
        length = self._state.cache.keys.shape[2]
        for width, rows in self._schedule.donations(work.entries, length):
            self._copy(width, [(row, entry, entry.donor) for row, entry in rows])
        for number, size, rows in self._schedule.prefills(work.entries):
            self._encode(params, number, size, rows)
        for width, rows in self._schedule.copies(work.entries, length):
            self._copy(width, [(row, entry, entry.source) for row, entry in rows])
        for rows in self._schedule.batches(work.entries):
            self._admit(rows)

    def _load(self, number: int, prefix: tuple[int, ...], params: Params) -> None:
        """Encode a shared prefix into a place that nothing running reads."""
        longest = self.config.longest_prefix
        if len(prefix) > longest:
            raise ValueError(f"a prefix of {len(prefix)} tokens; room for {longest}")
        width = min(padded_length(len(prefix)), self._state.bank.keys.shape[2])
        block = self.config.block
        cache = encode_prefix(self.cfg, self.mesh, params, prefix, width=width, block=block)
        self._state = put_prefix(self._state, np.int32(number), cache)
        self.encoded += len(prefix)

    def _encode(self, params: Params, number: int, size: int, rows: Rows[PromptPiece]) -> None:
        """One dispatch: pieces of prompts, padded to `size`, into their slots."""
        count = self.config.prefill_rows
        tokens = np.zeros((count, size), np.int32)
        length, column, shared = (np.zeros(count, np.int32) for _ in range(3))
        slot = self._no_slots()
        for row, piece in rows:
            tokens[row, : len(piece.ids)] = piece.ids
            length[row], column[row] = len(piece.ids), piece.entry.start + piece.first
            slot[row], shared[row] = self._on_device(piece.slot), piece.entry.shared
            self.encoded += len(piece.ids)
        arrays = put_batch(self.mesh, (tokens, length, column, slot, shared))
        self._pace.encode()
        self._state = extend(self.cfg, params, self._state, Piece(*arrays, np.int32(number)))
        if self._pace.encoding(count * size):
            jax.block_until_ready(self._state.done)
            self._pace.encoded()
            self._safe_place()

    def _copy(self, width: int, rows: Sequence[tuple[int, Entry, int]]) -> None:
        """Equal prompts and beginnings are encoded once: these entries copy them from slots."""
        source, target = self._no_slots(), self._no_slots()
        for row, entry, origin in rows:
            source[row] = self._on_device(origin)
            target[row] = self._on_device(entry.slot)
        both = put_batch(self.mesh, (source, target))
        self._state = copy_slots(self._state, *both, width=width)

    def _admit(self, rows: Rows[Entry]) -> None:
        """Let a batch decode."""
        count = self.config.prefill_rows
        slot = self._no_slots()
        last, column, shared, budget = (np.zeros(count, np.int32) for _ in range(4))
        key = np.zeros((count, 2), np.uint32)
        sampling = [self.sampling] * count
        stops = np.full((count, self.config.stops), -1, np.int32)
        for row, entry in rows:
            request = entry.request
            slot[row], key[row] = self._on_device(entry.slot), request.key
            last[row], column[row] = entry.own[-1], len(entry.own) - 1
            shared[row], budget[row] = entry.shared, request.max_new
            sampling[row], ends = self._sampling(request), self._stop_ids(request)
            stops[row, : len(ends)] = ends
        how = RowSampling.of(sampling, self.cfg.vocab_size)
        new = Admission(slot, last, column, shared, key, budget, how, stops)
        self._state = admit(self._state, put_batch(self.mesh, new))

    def _no_slots(self) -> np.ndarray:
        """The slots of a batch whose rows are all padding."""
        return np.full(self.config.prefill_rows, self._schedule.per_device, np.int32)

    def _on_device(self, slot: int) -> int:
        """A slot's number within its device."""
        return slot % self._schedule.per_device

    def _collect(self) -> list[Completion]:
        """Fetch the slots that have just finished and free them."""
        done, count = jax.device_get((self._state.done, self._state.count))
        running = self._schedule.running()
        self.written = self.generated + int(count[running].sum())
        if self.config.follow:
            self.progress = self._news(running, count)
        finished = [i for i in running if done[i]]
        if not finished:
            return []
        ids, log_probs = jax.device_get((self._state.response, self._state.log_prob))
        completions = []
        for index in finished:
            length = int(count[index])
            response = ids[index, :length].tolist()
            request = self._schedule.finish(index, response)
            completions.append(
                Completion(
                    tag=request.tag,
                    ids=response,
                    log_probs=log_probs[index, :length].copy(),
                    stopped=response[-1] in self._stop_ids(request),
                )
            )
            self.generated += length
        return completions

    def _news(self, running: Sequence[int], count: np.ndarray) -> list[RequestProgress]:
        """What the last dispatch added to the responses of these slots."""
        slots, most = self._schedule.slots, self.config.response
        width = min(most, self.config.decode_steps * (1 + self.config.draft))
        first = np.array([min(len(slot.response), most - width) for slot in slots], np.int32)
        read = read_responses(self._state, put_batch(self.mesh, first), width=width)
        ids, log_probs = jax.device_get(read)
        news = []
        for index in running:
            slot = slots[index]
            new = slice(len(slot.response) - first[index], count[index] - first[index])
            found = ids[index, new].tolist()
            if found:
                slot.response += found
                news.append(RequestProgress(slot.running.tag, found, log_probs[index, new].copy()))
        return news
