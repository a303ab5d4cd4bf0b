"""The policies that a server answers with, and how one takes the place of another.

A thread looks for a newer accepted policy in the workdir, checks its files against the manifest,
loads it and lets it answer once; only then it gets requests. Answers that run end with the policy
they began with: its engine takes what was already on its way to it, and is dropped when all that
has ended. For this time two policies are in memory.

    at once          the new policy takes all requests; the guard compares it with the one before
    canary=0.1       it first gets this share of the conversations, until the guard has judged it
    shadow=True      it first answers all requests too, and only counts are kept of that
"""

import hashlib
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from oel_jax.base.errors import UserError
from oel_jax.models.language_model import LanguageModel
from oel_jax.runs import acceptance
from oel_jax.runs.acceptance import Policy
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.requests import Request, RequestError
from oel_jax.serve.answer import Answer
from oel_jax.serve.engine import Engine, Full, Unavailable
from oel_jax.serve.guard import GuardLimits, Record, why_worse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExchangeRules:
    """How policies are exchanged.

    Attributes:
      period: seconds between two looks at the workdir.
      canary: share of the conversations that a new policy gets until it is judged; 0: all, at once.
      shadow: it answers beside the current one until it is judged, unseen. Not with a canary.
      guard: when a new policy is rolled back. A canary or shadow that passes becomes the current
        one; without a guard (`answers=0`) it stays what it is until the next policy comes.
      grace: seconds for which a policy that was replaced still takes requests that were on their
        way to it.
    """

    period: float = 3.0
    canary: float = 0.0
    shadow: bool = False
    guard: GuardLimits = GuardLimits()
    grace: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.canary < 1:
            raise UserError(f"canary is {self.canary}; it must be a share from 0 to below 1")
        if self.canary and self.shadow:
            raise UserError("a new policy can be a canary or a shadow, not both")
        if self.period <= 0 or self.grace < 0:
            raise UserError("period must be above 0 and grace at least 0 seconds")


@dataclass
class _Retired:
    engine: Engine
    since: float


class Policies:
    """Engines by policy: the current one, perhaps one on trial, and those that are draining.

    All methods may be called from any thread; only `rollback` can take long (it may load).
    """

    def __init__(
        self,
        load: Callable[[Policy], LanguageModel],
        serve: Callable[[LanguageModel, str], Engine],
        first: Policy,
        *,
        workdir: Workdir | None = None,
        how: ExchangeRules = ExchangeRules(),
    ):
        """Load and serve the first policy; follow the workdir, if there is one.

        Args:
          load: reads a policy's files.
          serve: an engine for a model, with this policy name.

        Raises:
          UserError: the first policy cannot be loaded.
        """
        self._load, self._serve, self._workdir, self.how = load, serve, workdir, how
        self._lock = threading.RLock()  # for the fields below; nothing slow is done with it held
        self._exchanging = threading.Lock()  # held by whoever loads or puts in a policy
        self._records: dict[str, Record] = {}
        self._retired: list[_Retired] = []
        self._trial: Engine | None = None
        self._before: str | None = None  # whom the newest one is compared with, until judged
        self._paths: dict[str, Policy] = {}
        self._said: set[str] = set()
        self._wake, self._closing = threading.Event(), False
        self._current = self._ready(first)
        self._thread = threading.Thread(target=self._follow, name="policies", daemon=True)
        self._thread.start()

    # --- what the server asks

    def engine(self, name: str | None = None, *, key: str | None = None) -> Engine | None:
        """Who answers a request.

        Args:
          name: of a policy; None: the current one or, for its share of the requests, the canary.
          key: of a conversation or user: equal keys get equal policies while these are there.

        Returns: None if no policy of this name takes requests.
        """
        with self._lock:
            live = {one.policy_name: one for one in (self._current, self._seen_trial()) if one}
            if name is not None:
                return live.get(name)
            if self._seen_trial() and _share(key) < self.how.canary:
                return self._trial
            return self._current

    def names(self) -> list[str]:
        """Policies that take requests, the current one first."""
        with self._lock:
            return [one.policy_name for one in (self._current, self._seen_trial()) if one]

    def rollback(self, reason: str) -> tuple[str, str]:
        """Refuse the newest policy: that on trial, or else the current one, for good.

        Returns: (the refused policy, the one that answers now).

        Raises:
          UserError: there is no earlier policy, or it cannot be loaded.
        """
        with self._exchanging:
            return self._roll_back(reason)

    def note_feedback(self, policy: str) -> None:
        """Count a feedback text to an answer of this policy."""
        with self._lock:
            self._record(policy).feedback += 1

    def report(self) -> dict[str, dict[str, float]]:
        """Counts of every policy that has answered since the server started."""
        with self._lock:
            return {name: record.as_json() for name, record in self._records.items()}

    @property
    def healthy(self) -> bool:
        """Whether the current policy answers."""
        return self._current.healthy

    @property
    def engines(self) -> list[Engine]:
        """All that hold memory: current, on trial, draining."""
        with self._lock:
            live = [one for one in (self._current, self._trial) if one]
            return live + [one.engine for one in self._retired]

    def close(self, seconds: float = 30.0) -> bool:
        """Stop following; finish what runs, at most for so long. Whether all could be finished."""
        self._closing = True
        self._wake.set()
        until = monotonic() + seconds
        for engine in self.engines:
            engine.drain()
        whole = all([engine.close(until - monotonic()) for engine in self.engines])
        self._thread.join()
        return whole

    # --- the thread

    def _follow(self) -> None:
        while not self._closing:
            self._wake.wait(self.how.period)
            self._wake.clear()
            if self._closing:
                return
            try:
                with self._exchanging:
                    self._judge()
                    self._let_go()
                    if self._workdir is not None:
                        self._look()
            except UserError as error:
                self._say(str(error))
            except Exception:
                logger.exception("the policies could not be exchanged; the current one serves on")

    def _look(self) -> None:
        """Take the newest accepted policy in, if it is not there."""
        for name in acceptance.incomplete_policies(self._workdir):
            self._say(f"{name} is recorded, but its files are not whole; it is not taken")
        for policy in acceptance.accepted_policies(self._workdir):
            if policy.name in (one.policy_name for one in (self._trial, self._current) if one):
                return
            if policy.name in self._said:  # it could not be loaded
                continue
            try:
                acceptance.check_policy(self._workdir, policy.name)
                engine = self._ready(policy)
            except (UserError, _Broken) as error:
                self._said.add(policy.name)
                self._say(f"{policy.name} is not taken: {error}")
                continue
            self._take(engine)
            return

    def _take(self, engine: Engine) -> None:
        with self._lock:
            if self._closing:
                engine.drain()
                return
            old_trial, self._trial = self._trial, None
            if self.how.canary or self.how.shadow:
                self._trial = engine
                self._before = self._current.policy_name
            else:
                self._before, old = self._current.policy_name, self._current
                self._current = engine
                self._retire(old)
            self._current.shadow = self._copy if self.how.shadow and self._trial else None
            if old_trial:
                self._retire(old_trial)
        part = (
            f" {self.how.canary:.0%} of conversations," if self._trial and self.how.canary else ""
        )
        part = " unseen," if self._trial and self.how.shadow else part
        logger.warning(
            "policy %s answers now,%s before it %s", engine.policy_name, part, self._before
        )

    def _judge(self) -> None:
        """Roll the newest policy back if it fails or answers worse; once judged, it is trusted."""
        newest = self._trial or self._current
        if self._before is None:
            return
        if not newest.healthy:
            self._roll_back("its engine has failed too often; see the log")
            return
        with self._lock:
            new, old = self._record(newest.policy_name), self._record(self._before)
            worse = why_worse(new, old, self.how.guard)
            most = self.how.guard.answers
            enough = most and min(new.shares()[0], old.shares()[0]) >= most
        if worse:
            self._roll_back(f"guard: {worse}")
        elif self._trial and enough:
            with self._lock:
                old_engine, self._current = self._current, self._trial
                self._trial, old_engine.shadow = None, None
                self._retire(old_engine)
                self._before = None
            logger.warning("policy %s has passed its trial and takes all", newest.policy_name)
        elif enough:
            self._before = None

    def _roll_back(self, reason: str) -> tuple[str, str]:
        newest = self._trial or self._current
        name = newest.policy_name
        if self._trial is None:
            earlier = self._earlier(name)
            back = self._resume(earlier.name) or self._ready(earlier)
        if self._workdir is not None:
            acceptance.refuse_policy(self._workdir, name, reason)
        with self._lock:
            if self._trial is not None:
                self._trial, self._current.shadow = None, None
            else:
                self._current, self._before = back, None
            self._retire(newest)
            now = self._current.policy_name
        logger.warning("policy %s is refused (%s); %s answers now", name, reason, now)
        return name, now

    def _earlier(self, name: str) -> Policy:
        """The accepted policy before this one."""
        if self._workdir is None:
            raise UserError("there is one policy only: nothing to roll back to")
        for policy in acceptance.accepted_policies(self._workdir):
            if policy.name < name:
                return policy
        raise UserError(f"{name} is the first policy: nothing to roll back to")

    def _resume(self, name: str) -> Engine | None:
        """A replaced policy that still takes requests, to be the current one again."""
        with self._lock:
            for one in self._retired:
                if one.engine.policy_name == name and one.engine.open:
                    self._retired.remove(one)
                    return one.engine
        return None

    def _retire(self, engine: Engine) -> None:
        self._retired.append(_Retired(engine, monotonic()))

    def _let_go(self) -> None:
        """Drop replaced policies when their answers have ended."""
        with self._lock:
            retired = list(self._retired)
        for one in retired:
            idle = one.engine.live == 0 and monotonic() - one.since >= self.how.grace
            if idle or not one.engine.healthy:
                one.engine.drain()
        with self._lock:
            self._retired = [one for one in self._retired if not one.engine.drained]

    # --- engines

    def _ready(self, policy: Policy) -> Engine:
        """Load a policy and let it answer once: its programs are compiled then."""
        engine = self._serve(self._load(policy), policy.name)
        self._paths[policy.name] = policy
        if why := engine.warm_up():
            engine.drain()
            raise _Broken(f"it cannot answer ({why}); see the log")
        engine.ended = self._ended
        return engine

    def _ended(self, answer: Answer) -> None:
        """Called by the engine's thread for every finished answer."""
        with self._lock:
            self._record(answer.policy).add(answer.finish, answer.generated)

    def _record(self, name: str) -> Record:
        return self._records.setdefault(name, Record(self.how.guard.answers))

    def _copy(self, request: Request) -> None:
        """Called for every request that the current policy took: the shadow answers it too."""
        trial = self._trial
        if trial is not None:
            try:
                trial.submit(request)
            except (Full, Unavailable, RequestError):  # it is only looked at, it may miss some
                return

    def _seen_trial(self) -> Engine | None:
        return None if self.how.shadow else self._trial

    def _say(self, text: str) -> None:
        """Once."""
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)


class _Broken(Exception):
    """A policy that loads and cannot answer."""


def _share(key: str | None) -> float:
    """A number in [0, 1) that depends on the key alone; a random one without."""
    data = secrets.token_bytes(8) if key is None else key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64
