"""One user cannot steer a knowledge text, however many of the conversations are theirs."""

from collections import Counter

import pytest

from oel_jax.actor.snapshot import _chain, _New
from oel_jax.base.errors import UserError
from oel_jax.config import default
from oel_jax.data.messages import user
from oel_jax.data.trajectories import Trajectory, Transcript


def talk(number, who):
    transcript = Transcript()
    transcript.add([user(f"hi {number}")], "hello")
    turns = transcript.turns
    return Trajectory(policy="p", purpose="deploy", turns=turns, id=f"c{number}", user=who)


def chain_of(pool, number, **fields):
    config = default()
    config.game.name = None
    for name, value in ({"n": 4, "n_run": 8} | fields).items():
        config.extract[name] = value
    return _chain(config, 1, number, pool, _New())


# One user with 90 % of the conversations.
LOUD = [talk(number, "loud" if number % 10 else f"quiet {number}") for number in range(200)]


@pytest.mark.parametrize("share", [0.01, 0.125, 0.3, 0.5, 0.99, 1.0])
def test_a_user_with_nine_of_ten_conversations_has_its_share_of_every_chain(share):
    most = 0
    for number in range(30):
        chain = chain_of(LOUD, number, user_share=share)
        assert len({one.id for one in chain}) == len(chain) == 8
        counts = Counter(one.user for one in chain)
        assert max(counts.values()) <= max(1, int(share * 8 + 1e-9))
        most = max(most, counts["loud"])
    assert most == max(1, int(share * 8 + 1e-9))  # and the share is used: it is no smaller


def test_conversations_without_a_user_count_as_many_users():
    nobody = [talk(number, None) for number in range(20)]
    assert len(chain_of(nobody, 0, user_share=0.1)) == 8


def test_too_few_other_users_are_named_with_the_field():
    pool = [talk(number, "loud" if number else "quiet") for number in range(50)]
    with pytest.raises(UserError, match=r"of 2 user\(s\).*user_share=0\.25 one user may have 2"):
        chain_of(pool, 0, user_share=0.25)
