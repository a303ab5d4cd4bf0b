"""Look at the training data of the nano models: worlds in which symbols mean something else.

    python -m oel_jax.nano.worlds --show 5 [--task=extract_frozen_lake] [--seed=0]

Worlds are made by `lake` and `room`, played by `players`, and turned into prompts and replies by
`examples`.
"""

import argparse
import random
import sys

from oel_jax.base.errors import UserError
from oel_jax.nano.examples import TASKS, draw_example, draw_task


def main() -> None:
    """Show some training examples."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--show", type=int, default=5, help="how many examples")
    parser.add_argument("--task", default="", help="only this task: " + ", ".join(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.task and options.task not in TASKS:
        raise UserError(f"--task={options.task} does not exist; choose one of {', '.join(TASKS)}")
    if options.show < 1:
        raise UserError(f"--show={options.show} must be at least 1")
    rng = random.Random(options.seed)
    for _ in range(options.show):
        example = draw_task(rng, options.task) if options.task else draw_example(rng)
        mode = "thinking" if example.thinking else "non-thinking"
        print(f"===== {example.task} ({mode})\n{example.prompt}\n----- reply\n{example.reply}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
