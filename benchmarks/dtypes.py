"""The sampler in float32 against the sampler in bfloat16: the same model, prompts and tokens.

    python -m benchmarks.dtypes [--model=25m|DIR] [--games=8] [--turns=2]

A bfloat16 program must not be slower than a float32 one by more than its conversions of one block
of keys at a time. Before caches were stored as bits on a CPU it was 20 times slower.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks import side_by_side
from benchmarks.models import random_model
from benchmarks.sampler import Ours, prompts
from benchmarks.side_by_side import Bar, finish, race, ratio, spread
from oel_jax.base.errors import UserError
from oel_jax.models.language_model import load_model

DTYPES = ("float32", "bfloat16")


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument(
        "--model", default="25m", help="a directory, or a shape with random weights"
    )
    parser.add_argument("--games", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--answer", type=int, default=64, help="tokens of every answer")
    parser.add_argument("--knowledge", type=int, default=512, help="tokens that all games share")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(options.model)
        if not directory.is_dir():
            directory = random_model(options.model, Path(scratch))
        models = {dtype: load_model(directory, dtype=dtype) for dtype in DTYPES}
    vocabulary = models["float32"].vocab_limit
    history = prompts(options.knowledge, options.games, options.turns, vocabulary)
    rest = (history, options.knowledge, options.turns, options.answer)
    sides = {dtype: Ours(model, *rest, dtype=dtype) for dtype, model in models.items()}
    seconds = race(sides, options.repeats)
    tokens = options.games * options.turns * options.answer
    found = ratio(seconds["float32"], seconds["bfloat16"])
    print(f"float32 / bfloat16, per generated token: {spread(found)}")
    rows = [
        [name, f"{min(took):.2f}", f"{tokens / min(took):.1f}"] for name, took in seconds.items()
    ]
    bars = [Bar("float32 / bfloat16 per generated token", found[0], 0.7)]
    settings = {"model": Path(options.model).name, "games": options.games, "turns": options.turns}
    settings |= {"answer": options.answer, "knowledge": options.knowledge}
    measured = {"seconds": seconds, "tokens": tokens, "ratio": found}
    headers = ["dtype", "best seconds", "tokens/s"]
    return finish("dtypes", settings, rows, headers, bars, measured, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
