"""Which seeds are played when (spec 3.2). Both games use the same lists.

    held-out     468382021 + 78025 + 1000 i              i = 0 .. 127
    extraction   468382021 + 78025 + 500000 r + 1000 i   i = 128 .. 128 + n - 1, for every chain
    deploy       505019424 + 90039 + 100000 + 10000000 (r - 1) + 1000 j,   j in [s B, (s + 1) B)

with round r and step s counted from 1 and B games per step. At B = 128 and 100 steps the deploy
seeds of neighbouring rounds overlap (a property of the released script); at the paper's B = 64 they
do not.
"""

HELDOUT_GAMES = 128
_HELDOUT_BASE = 468382021 + 78025
_DEPLOY_BASE = 505019424 + 90039 + 100000


def _at_least(name: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
    return value


def heldout_seeds(count: int = HELDOUT_GAMES) -> list[int]:
    """The first `count` held-out seeds (all 128 by default); independent of round and chain."""
    _at_least("count", count, 1)
    if count > HELDOUT_GAMES:
        raise ValueError(f"there are {HELDOUT_GAMES} held-out games, asked for {count}")
    return [_HELDOUT_BASE + 1000 * i for i in range(count)]


def extraction_seeds(round: int, n: int) -> list[int]:
    """The `n` extraction seeds of a round (from 1); every chain plays the same ones."""
    _at_least("round", round, 1)
    _at_least("n", n, 1)
    base = _HELDOUT_BASE + 500000 * round
    return [base + 1000 * i for i in range(HELDOUT_GAMES, HELDOUT_GAMES + n)]


def deploy_seeds(round: int, step: int, games_per_step: int = 64) -> list[int]:
    """The deploy seeds of one step (from 1) of a round (from 1)."""
    _at_least("round", round, 1)
    _at_least("step", step, 1)
    size = _at_least("games_per_step", games_per_step, 1)
    base = _DEPLOY_BASE + 10000000 * (round - 1)
    return [base + 1000 * j for j in range(step * size, (step + 1) * size)]
