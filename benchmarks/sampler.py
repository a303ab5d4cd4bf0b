"""Games played by the sampler against transformers' `generate`: the same weights and prompts.

    python -m benchmarks.sampler [--model=25m|DIR] [--knowledge=2048] [--games=64] [--turns=5]

Both sides play `games` games of `turns` turns at temperature 0.7. A prompt is a knowledge text,
one of 19 openings, and a history that grows by `step` tokens a turn; an answer has exactly
`answer` tokens. transformers gets each turn as one batch, padded on the left, with its own cache;
ours keeps the knowledge once for all games and the history in the slots.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks import side_by_side
from benchmarks.bounds import head_flops, parameters, position_bytes, rates, token_flops
from benchmarks.models import SHAPES, random_model
from benchmarks.side_by_side import Bar, finish, race, ratio, spread
from oel_jax.base.errors import UserError
from oel_jax.learner.memory import peak_memory
from oel_jax.models.config import ModelConfig
from oel_jax.models.language_model import DTYPES, LanguageModel, load_model
from oel_jax.runs.profiling import compile_seconds
from oel_jax.sampler.config import SamplerConfig
from oel_jax.sampler.requests import Request, Sampling, request_key
from oel_jax.sampler.sampler import Sampler

OPENINGS, OPENING, STEP = 19, 160, 100  # a Frozen Lake board in Qwen3's tokens is about 90


def prompts(knowledge: int, games: int, turns: int, vocabulary: int) -> np.ndarray:
    """Whole histories [games, tokens]; the prompt of turn t is the first `length(t)` tokens."""
    draw = np.random.default_rng(0)
    text = draw.integers(0, vocabulary, knowledge)
    openings = draw.integers(0, vocabulary, (OPENINGS, OPENING))
    rest = draw.integers(0, vocabulary, (games, STEP * (turns - 1)))
    return np.stack([np.concatenate([text, openings[g % OPENINGS], rest[g]]) for g in range(games)])


def length(knowledge: int, turn: int) -> int:
    """Tokens of the prompt at a turn, counted from 0."""
    return knowledge + OPENING + STEP * turn


class Ours:
    """The sampler as the package uses it."""

    def __init__(
        self,
        model: LanguageModel,
        history: np.ndarray,
        knowledge: int,
        turns: int,
        new: int,
        dtype: str = "float32",
    ):
        self.model, self.history, self.turns, self.new = model, history, turns, new
        self.knowledge = knowledge
        self.prefix = tuple(history[0, :knowledge].tolist())
        self.sampler = Sampler(
            model.cfg,
            model.mesh,
            SamplerConfig(
                slots=len(history),
                length=length(0, turns - 1) + new,
                response=new,
                dtype=DTYPES[dtype],
                decode_steps=new,
                prefill_rows=min(16, len(history)),
                longest_prefix=knowledge,
            ),
            sampling=Sampling(0.7),
            limit=model.cfg.vocab_size,
            stop_ids=(),
        )

    def __call__(self) -> None:
        """Play all games; nothing is left over from the call before."""
        self.sampler.forget()
        self.sampler.submit(self._request(game, 0) for game in range(len(self.history)))
        while self.sampler.busy:
            for done in self.sampler.poll(self.model.params):
                game, turn = done.tag
                assert len(done.ids) == self.new
                if turn + 1 < self.turns:
                    self.sampler.submit([self._request(game, turn + 1)])

    def _request(self, game: int, turn: int) -> Request:
        ids = self.history[game, : length(self.knowledge, turn)].tolist()
        key = request_key("benchmark", game, turn)
        return Request(ids, key, self.new, (game, turn), prefix=self.prefix, session=game)


class Transformers:
    """`generate` with its own cache, one batch a turn."""

    def __init__(self, directory: Path, history: np.ndarray, knowledge: int, turns: int, new: int):
        import torch
        import transformers

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        )
        self.model = self.model.to(self.device).eval()
        self.history, self.knowledge, self.turns, self.new = history, knowledge, turns, new

    def warm_up(self) -> None:
        """Every kernel once."""
        self._play(2, 1)

    def __call__(self) -> None:
        self._play(len(self.history), self.turns)

    def _play(self, games: int, turns: int) -> None:
        torch = self.torch
        torch.manual_seed(0)
        for turn in range(turns):
            histories = self.history[:games, : length(self.knowledge, turn)]
            ids = torch.tensor(histories, device=self.device)
            with torch.no_grad():
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=0.7,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=self.new,
                    max_new_tokens=self.new,
                    pad_token_id=0,
                    use_cache=True,
                )
            assert out.shape[1] == ids.shape[1] + self.new


def bound(cfg: ModelConfig, options, itemsize: int) -> float:
    """Seconds that the games need at least, at the device's measured rates.

    Every distinct prompt token goes through the layers once, at the rate of large products. Every
    decoding pass of all games reads the weights, the knowledge once, and each game's own history,
    at the rate of a large copy.
    """
    device = rates()
    openings = min(OPENINGS, options.games)
    fresh = options.knowledge + openings * OPENING + options.games * STEP * (options.turns - 1)
    encoding = fresh * token_flops(cfg, options.knowledge / 2) / device.flops
    own = sum(length(0, turn) + options.answer / 2 for turn in range(options.turns))
    held = options.turns * options.knowledge + options.games * own
    read = options.turns * parameters(cfg) * itemsize + held * position_bytes(cfg, itemsize)
    each = token_flops(cfg, options.knowledge + own / options.turns) + head_flops(cfg)
    computed = options.turns * options.games * each / device.flops
    return encoding + options.answer * max(read / device.bytes, computed)


def main() -> int:
    """Command line; returns the exit status."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="25m", help=f"a directory or {', '.join(SHAPES)}")
    parser.add_argument("--peer", default="transformers", choices=("transformers", "none"))
    parser.add_argument("--knowledge", type=int, default=2048, help="tokens; 0: without")
    parser.add_argument("--games", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--answer", type=int, default=32, help="tokens of every answer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(options.model)
        if not directory.is_dir():
            directory = random_model(options.model, Path(scratch))
        model = load_model(directory)
        shape = (options.knowledge, options.games, options.turns)
        history = prompts(*shape, model.cfg.vocab_size)
        rest = (history, options.knowledge, options.turns, options.answer)
        sides = {"ours": Ours(model, *rest)}
        if options.peer == "transformers":
            sides["transformers"] = Transformers(directory, *rest)
        count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        print(f"{options.model}: {count / 1e6:.1f}M parameters, {options.games} games")
        compiled = compile_seconds()
        seconds = race(sides, options.repeats)
        compiled = compile_seconds() - compiled
    tokens = options.games * options.turns * options.answer
    least = bound(model.cfg, options, itemsize=4)
    rows = [
        [name, f"{min(some):.2f}", f"{tokens / min(some):.0f}", f"{least / min(some):.0%}"]
        for name, some in seconds.items()
    ]
    bars, measured = [], {"seconds": seconds, "tokens": tokens, "parameters": count}
    measured |= {"bound_seconds": least, "compile_seconds": compiled}
    encoded = sides["ours"].sampler.encoded / (options.repeats + 1)
    whole = sum(length(options.knowledge, t) for t in range(options.turns)) * options.games
    print(f"prompt tokens encoded by ours: {encoded:.0f} of {whole} ({encoded / whole:.1%})")
    print(f"bound: {least:.2f} s; compiling took {compiled:.1f} s; {peak_memory()}")
    if "transformers" in seconds:
        found = ratio(seconds["transformers"], seconds["ours"])
        print(f"transformers / ours, per generated token: {spread(found)}")
        measured["ratio"] = found
        what = "in-context" if options.knowledge else "without knowledge"
        target = 8.0 if options.knowledge else 2.0
        bars.append(Bar(f"{what}, transformers / ours per generated token", found[0], target))
    settings = {"model": Path(options.model).name, "knowledge": options.knowledge}
    settings |= {"games": options.games, "turns": options.turns, "answer": options.answer}
    headers = ["side", "best seconds", "tokens/s", "of the bound"]
    return finish("sampler", settings, rows, headers, bars, measured, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
