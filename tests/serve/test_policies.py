"""One policy takes the place of another while clients ask; real models, real files."""

import threading
from time import monotonic

import numpy as np
import pytest

from oel_jax.base.errors import UserError
from oel_jax.models.language_model import load_model
from oel_jax.runs import acceptance
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler
from oel_jax.serve.engine import Engine
from oel_jax.serve.guard import GuardLimits, Record, why_worse
from oel_jax.serve.policies import ExchangeRules, Policies
from oel_jax.testing import write_dummy_model

SIZES = SamplerConfig(slots=4, prefill_rows=4, length=128, response=40, decode_steps=3)
SAMPLING = Sampling(0.9)
FAST = dict(period=0.02, grace=0.05)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_dummy_model(tmp_path_factory.mktemp("policies") / "start")


@pytest.fixture
def workdir(tmp_path, start):
    with Workdir(tmp_path / "run").open({"model": {"path": str(start)}, "rounds": 9}) as opened:
        yield opened


def consolidated(workdir, number):
    write_dummy_model(workdir.policy(number), seed=number)
    workdir.finish(number, "consolidate", [workdir.policy(number)], 1.0)


def serving(workdir, waiting=1000, **how):
    def serve(model, name):
        return Engine(model, name, SIZES, sampling=SAMPLING, waiting=waiting)

    first = acceptance.newest_policy(workdir)
    how = ExchangeRules(**FAST | how)
    return Policies(lambda p: load_model(p.path), serve, first, workdir=workdir, how=how)


def until(condition, what):
    """Wait for something that must come; the limit only ends a test that has failed."""
    end = monotonic() + 300
    while not condition():
        assert monotonic() < end, what
        threading.Event().wait(0.01)


def request(index, prompt=20, new=16):
    ids = np.random.default_rng(index).integers(8, 90, prompt).tolist()
    return Request(ids, request_key("client", index), new, stop_ids=())


def plain(path, requests):
    model = load_model(path)
    sampler = Sampler(
        model.cfg,
        model.mesh,
        SIZES,
        limit=model.vocab_limit,
        stop_ids=model.tokenizer.stop_ids,
        sampling=SAMPLING,
    )
    return [done.ids for done in sampler.generate(model.params, requests)]


class Clients:
    """Threads that ask one after the other until they are told to stop."""

    def __init__(self, policies, count=6):
        self.policies, self.answers = policies, []
        self._over, self._lock = threading.Event(), threading.Lock()
        self._errors = []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, first):
        index = first
        try:
            while not self._over.is_set():
                answer = self.policies.engine(key=f"user {index}").submit(request(index))
                assert answer.wait(300)
                with self._lock:
                    self.answers.append((index, answer))
                index += 10
        except Exception as error:
            self._errors.append(error)

    def stop(self):
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert not self._errors
        return self.answers


def test_no_request_is_lost_while_policies_change(workdir):
    """Each answer is whole and is that of the one policy that it names."""
    policies = serving(workdir)
    clients = Clients(policies)
    for number in (1, 2, 3):
        consolidated(workdir, number)
        until(lambda n=number: policies.names() == [f"round_{n:03d}"], "the swap")
        seen = len(clients.answers)
        until(lambda n=seen: len(clients.answers) > n + 6, "answers after the swap")
    answers = clients.stop()
    until(lambda: len(policies.engines) == 1, "replaced policies are dropped")
    assert policies.close(300)
    assert {answer.finish for _, answer in answers} == {"length"}
    paths = {"round_000": acceptance.accepted_policies(workdir)[-1].path}
    paths |= {f"round_{n:03d}": str(workdir.policy(n)) for n in (1, 2, 3)}
    assert {answer.policy for _, answer in answers} == set(paths)
    for name, path in paths.items():
        mine = [(index, answer) for index, answer in answers if answer.policy == name]
        expected = plain(path, [request(index) for index, _ in mine])
        assert [answer.ids for _, answer in mine] == expected
    report = policies.report()
    assert sum(counts["answers"] for counts in report.values()) == len(answers)


def test_a_request_that_was_on_its_way_is_taken_by_the_old_policy(workdir):
    policies = serving(workdir, grace=300)
    engine = policies.engine()
    consolidated(workdir, 1)
    until(lambda: policies.names() == ["round_001"], "the swap")
    late = engine.submit(request(0))
    assert late.wait(300) and (late.policy, late.finish) == ("round_000", "length")
    assert policies.engine("round_000") is None
    assert policies.rollback("asked") == ("round_001", "round_000")
    assert policies.engine() is engine  # it was still there
    assert policies.close(300)


def test_a_rollback_lasts_and_the_next_policy_is_taken(workdir):
    consolidated(workdir, 1)
    policies = serving(workdir)
    assert policies.rollback("it rambles") == ("round_001", "round_000")
    assert policies.names() == ["round_000"]
    assert acceptance.refused(workdir)["round_001"]["reason"] == "it rambles"
    with pytest.raises(UserError, match="first policy"):
        policies.rollback("again")
    consolidated(workdir, 2)
    until(lambda: policies.names() == ["round_002"], "the next policy")
    assert policies.close(300)
    again = serving(workdir)
    assert again.names() == ["round_002"]
    assert again.close(300)


def test_a_broken_policy_is_said_once_and_not_taken(workdir, caplog):
    policies = serving(workdir)
    write_dummy_model(workdir.policy(1), seed=1)
    workdir.finish(1, "consolidate", [workdir.policy(1)], 1.0)
    weights = workdir.policy(1) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    until(lambda: "round_001" in caplog.text, "the word")
    weights.write_bytes(whole[:-9] + b"\0" * 9)
    until(lambda: "has changed" in caplog.text, "the second word")
    looks = len(caplog.records)
    for _ in range(3):
        policies._wake.set()
        until(lambda: not policies._wake.is_set(), "a look")
    assert policies.names() == ["round_000"]
    assert len(caplog.records) == looks == 2
    answer = policies.engine().submit(request(0))
    assert answer.wait(300) and answer.finish == "length"
    assert policies.close(300)


def test_a_canary_gets_its_share_by_user_and_is_promoted(workdir):
    policies = serving(workdir, canary=0.3, guard=GuardLimits(answers=20))
    consolidated(workdir, 1)
    until(lambda: policies.names() == ["round_000", "round_001"], "the canary")
    users = [f"user {i}" for i in range(400)]
    first = [policies.engine(key=user).policy_name for user in users]
    assert first == [policies.engine(key=user).policy_name for user in users]
    assert 0.2 < first.count("round_001") / len(users) < 0.4
    assert policies.engine("round_001").policy_name == "round_001"
    for name in ("round_000", "round_001"):
        for one in [policies.engine(name).submit(request(i)) for i in range(20)]:
            assert one.wait(300)
    until(lambda: policies.names() == ["round_001"], "the promotion")
    assert policies.close(300)


@pytest.mark.parametrize("how", [{}, {"canary": 0.5}], ids=str)
def test_a_policy_that_answers_at_length_is_rolled_back(workdir, how):
    policies = serving(workdir, guard=GuardLimits(answers=4, length=1.5), **how)
    old = policies.engine()
    for one in [old.submit(request(i, new=8)) for i in range(4)]:
        assert one.wait(300)
    consolidated(workdir, 1)
    until(lambda: "round_001" in policies.names(), "the new policy")
    new = policies.engine("round_001")
    for one in [new.submit(request(i, new=30)) for i in range(4)]:
        assert one.wait(300) and one.policy == "round_001"
    until(lambda: policies.names() == ["round_000"], "the rollback")
    assert "30 tokens, 8 before" in acceptance.refused(workdir)["round_001"]["reason"]
    assert policies.close(300)


def test_a_policy_whose_engine_fails_is_rolled_back(workdir):
    policies = serving(workdir)
    consolidated(workdir, 1)
    until(lambda: policies.names() == ["round_001"], "the swap")
    engine = policies.engine()
    engine.model.params = {}
    for index in range(3):
        answer = engine.submit(request(index))
        assert answer.wait(300) and answer.finish == "error"
    until(lambda: policies.names() == ["round_000"], "the rollback")
    assert "failed" in acceptance.refused(workdir)["round_001"]["reason"]
    assert policies.engine().submit(request(9)).wait(300)
    assert policies.close(300)


def test_a_policy_that_was_judged_is_trusted(workdir):
    policies = serving(workdir, guard=GuardLimits(answers=4, length=1.5))
    for one in [policies.engine().submit(request(i, new=8)) for i in range(4)]:
        assert one.wait(300)
    consolidated(workdir, 1)
    until(lambda: policies.names() == ["round_001"], "the swap")
    for one in [policies.engine().submit(request(i, new=9)) for i in range(4)]:
        assert one.wait(300)
    until(lambda: policies._before is None, "the judgement")
    for one in [policies.engine().submit(request(i, new=30)) for i in range(8)]:
        assert one.wait(300)
    policies._wake.set()
    until(lambda: not policies._wake.is_set(), "another look")
    assert policies.names() == ["round_001"]
    assert policies.close(300)


def test_a_shadow_answers_unseen(workdir):
    policies = serving(workdir, shadow=True, guard=GuardLimits(answers=6))
    consolidated(workdir, 1)
    until(lambda: len(policies.engines) == 2, "the shadow")
    assert policies.names() == ["round_000"] and policies.engine("round_001") is None
    for one in [policies.engine(key="u").submit(request(i)) for i in range(6)]:
        assert one.wait(300) and one.policy == "round_000"
    until(lambda: policies.names() == ["round_001"], "the promotion")
    assert policies.report()["round_001"]["answers"] == 6
    policies.note_feedback("round_001")
    assert policies.report()["round_001"]["feedback"] == 1
    assert policies.close(300)


def test_settings_that_make_no_sense_are_named():
    for bad in ({"canary": 1.0}, {"canary": -0.1}, {"canary": 0.1, "shadow": True}, {"period": 0}):
        with pytest.raises(UserError):
            ExchangeRules(**bad)


def filled(finishes, window=10):
    record = Record(window)
    for finish, tokens in finishes:
        record.add(finish, tokens)
    return record


@pytest.mark.parametrize(
    ("new", "word"),
    [
        ([("stop", 10)] * 10, ""),
        ([("stop", 19)] * 10, ""),
        ([("stop", 21)] * 10, "tokens"),
        ([("length", 10)] * 4 + [("stop", 10)] * 6, "cut off"),
        ([("length", 10)] * 3 + [("stop", 10)] * 7, ""),
        ([("error", 0)] * 2 + [("stop", 10)] * 8, "error"),
        ([("error", 0)] * 10, "error"),
        ([("length", 10)] * 9, ""),  # too few
        ([("length", 10)] * 30 + [("stop", 10)] * 10, ""),  # only the last ones count
        ([("cancelled", 99)] * 10 + [("stop", 10)] * 10, ""),
    ],
)
def test_the_guard_judges_by_the_last_answers(new, word):
    old = filled([("length", 10)] + [("stop", 10)] * 9)
    why = why_worse(filled(new), old, GuardLimits(answers=10))
    assert (word in why) if word else why == ""
    assert why_worse(filled(new), old, GuardLimits(answers=0)) == ""
