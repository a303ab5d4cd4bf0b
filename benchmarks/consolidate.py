"""One consolidation step against a torch implementation of the released algorithm.

    python -m benchmarks.consolidate [--model=25m|DIR] [--knowledge=8192] [--prefixes=64]

Both sides take the same weights, prefixes and responses (the student's rollouts are not part of
this) and make one AdamW update on the top-k reverse KL. The peer does what the released code does,
with care: a student pass for the top-k ids, a teacher pass over knowledge, prompt and response, a
student pass with its backward pass; batches sorted by length, logits of response positions only,
the head of the vocabulary in chunks. Ours reads each knowledge text once a round, packs, and forms
ids, look-up, loss and gradient in one pass.

A round has `--steps` such steps, and its texts are encoded once: that time is spread over them.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from benchmarks.bounds import head_flops, parameters, rates, token_flops
from benchmarks.models import SHAPES, random_model
from benchmarks.side_by_side import Bar, finish, race, ratio, spread
from oel_jax.base.errors import UserError
from oel_jax.distill.aggregation import sample_weights
from oel_jax.distill.optimizer import make_optimizer
from oel_jax.distill.packing import Sample, Shape, fill, plan
from oel_jax.distill.step import StepConfig, accumulate, update, zeros_like
from oel_jax.distill.topk_kl import KLConfig
from oel_jax.learner.memory import peak_memory
from oel_jax.models.decoder import CachedPrefix, KeyValues, forward
from oel_jax.models.language_model import LanguageModel, load_model
from oel_jax.models.lengths import padded_length
from oel_jax.models.shared_prefix import encode_prefix
from oel_jax.parallel.mesh import put_batch
from oel_jax.runs.profiling import compile_seconds

TOP_K, TEMPERATURE, RATE = 256, 0.7, 1e-6


@dataclass(frozen=True)
class Work:
    """What both sides are given: texts [K, tokens] and samples; sample i is read with one text."""

    texts: np.ndarray
    samples: list[Sample]


def work(options, vocabulary: int) -> Work:
    """Random texts, prompts of `prompt` tokens and answers of `answer`, both give or take half."""
    draw = np.random.default_rng(0)
    texts = draw.integers(0, vocabulary, (options.texts, options.knowledge))
    samples = []
    for index in range(options.prefixes):
        lengths = [
            int(draw.integers(n - n // 2, n + n // 2 + 1)) for n in (options.prompt, options.answer)
        ]
        prompt, response = (draw.integers(0, vocabulary, n).tolist() for n in lengths)
        blank = np.zeros(len(response), np.float32)
        text = index % options.texts
        samples.append(Sample(prompt, prompt, options.knowledge, response, blank, text))
    return Work(texts, samples)


class Ours:
    """The step as `oel_jax.learner.consolidate` makes it."""

    def __init__(self, model: LanguageModel, given: Work, budget: int, remat: str):
        self.model, self.given, self.budget = model, given, budget
        self.student = jax.tree.map(jnp.copy, model.params)
        section = {"learning_rate": RATE, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
        section |= {"weight_decay": 0.01, "moments_dtype": "float32"}
        self.tx = make_optimizer(SimpleNamespace(**section))
        self.state = jax.jit(self.tx.init)(self.student)
        kl = KLConfig(TOP_K, TEMPERATURE, chunk=512)
        self.step = StepConfig(model.cfg, kl, jnp.float32, remat, 256)
        self.caches: list[KeyValues] = []
        self.loss = None

    def encode(self) -> None:
        """Read all knowledge texts, as once in a round."""
        self.caches = []
        for text in self.given.texts:
            width = padded_length(len(text), 64)
            cache = encode_prefix(
                self.model.cfg, self.model.mesh, self.model.params, text, width=width
            )
            self.caches.append(jax.block_until_ready(cache))

    def batches(self) -> tuple[Shape, list]:
        """The packed micro-batches of the step."""
        samples = self.given.samples
        shape, planned = plan(samples, self.budget, 1)
        weights = sample_weights(samples, "token_mean")
        mesh = self.model.mesh
        return shape, [
            (text, put_batch(mesh, fill(samples, weights, rows, shape))) for text, rows in planned
        ]

    def __call__(self) -> None:
        gradients, total = zeros_like(self.student), 0.0
        with jax.set_mesh(self.model.mesh):
            for text, batch in self.batches()[1]:
                gradients, sums = accumulate(
                    gradients,
                    self.student,
                    self.model.params,
                    self.caches[text],
                    batch,
                    step=self.step,
                )
                total += sums.loss
            self.student, self.state, _ = update(
                self.student, self.state, gradients, tx=self.tx, clip_norm=1.0
            )
            jax.block_until_ready(self.student)
        self.loss = float(total) if self.loss is None else self.loss


class CachedTeacher:
    """The teacher's pass alone, packed, on cached texts."""

    def __init__(self, ours: Ours):
        self.ours, (_, self.batches) = ours, ours.batches()

    def __call__(self) -> None:
        ours = self.ours
        with jax.set_mesh(ours.model.mesh):
            for text, batch in self.batches:
                out = _read(
                    ours.model.cfg, ours.model.params, batch.teacher, ours.caches[text], 256
                )
            jax.block_until_ready(out)


class UncachedTeacher:
    """The teacher's pass alone, every prompt read from its first token, in batches by length."""

    def __init__(self, ours: Ours, budget: int):
        self.ours, self.batches = ours, []
        whole = [
            [*ours.given.texts[s.knowledge], *s.suffix, *s.response[:-1]]
            for s in ours.given.samples
        ]
        whole.sort(key=len)
        # One length for all, to the next 64: one compilation and little padding.
        width = -(-len(whole[-1]) // 64) * 64
        rows = max(1, budget // width)
        for first in range(0, len(whole), rows):
            tokens = np.zeros((rows, width), np.int32)
            for row, ids in enumerate(whole[first : first + rows]):
                tokens[row, : len(ids)] = ids
            positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
            ones = np.ones_like(tokens)
            view = SimpleNamespace(tokens=tokens, positions=positions, segments=ones)
            self.batches.append(view)

    def warm_up(self) -> None:
        """Compile and run one batch; the last may have another number of rows."""
        self._read(self.batches[:1] + self.batches[-1:])

    def __call__(self) -> None:
        self._read(self.batches)

    def _read(self, batches: list) -> None:
        model = self.ours.model
        with jax.set_mesh(model.mesh):
            for view in batches:
                arrays = put_batch(model.mesh, (view.tokens, view.positions, view.segments))
                out = _read_whole(model.cfg, model.params, *arrays)
            jax.block_until_ready(out)


@partial(jax.jit, static_argnums=(0, 4))
def _read(cfg, params, view, cache, block):
    prefix = CachedPrefix(cache, view.shared)
    places = (view.tokens, view.positions, view.segments)
    return forward(cfg, params, *places, prefix=prefix, block=block)


@partial(jax.jit, static_argnums=(0,))
def _read_whole(cfg, params, tokens, positions, segments):
    return forward(cfg, params, tokens, positions, segments)


class Torch:
    """Three passes in torch, no prefix cache, as the released code has it."""

    def __init__(self, directory: Path, given: Work, budget: int):
        import torch
        import transformers

        self.torch, self.given, self.budget, self.loss = torch, given, budget, None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.student, self.teacher = (
            load(directory, dtype=torch.float32).to(self.device) for _ in range(2)
        )
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
        )

    def warm_up(self) -> None:
        """The passes of two samples; the update changes nothing that is measured."""
        everything = self.given
        self.given = Work(everything.texts, everything.samples[:2])
        first = {name: leaf.clone() for name, leaf in self.student.state_dict().items()}
        self()
        self.student.load_state_dict(first)
        self.optimizer.state.clear()
        self.given, self.loss = everything, None

    def _hidden(self, model, batch: list[Sample], before: list):
        """Hidden states that predict the responses, [tokens, D]; right padding needs no mask."""
        torch = self.torch
        rows = [[*head, *s.prompt, *s.response[:-1]] for head, s in zip(before, batch, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        starts = [len(row) - len(s.response) for row, s in zip(rows, batch, strict=True)]
        return torch.cat(
            [h[at : at + len(s.response)] for h, at, s in zip(hidden, starts, batch, strict=True)]
        )

    def _log_probs(self, model, hidden):
        return self.torch.log_softmax(model.lm_head(hidden).float() / TEMPERATURE, -1)

    def _batches(self, extra: int) -> list[list[Sample]]:
        """Samples by length, as many in a batch as the token budget holds."""
        found: list[list[Sample]] = []
        for s in sorted(self.given.samples, key=lambda s: s.student_length):
            width = s.student_length + extra
            if not found or (len(found[-1]) + 1) * width > self.budget:
                found.append([])
            found[-1].append(s)
        return found

    def __call__(self) -> None:
        torch, count = self.torch, sum(len(s.response) for s in self.given.samples)
        ids, wanted = {}, {}
        with torch.no_grad():
            for batch in self._batches(0):  # pass 1: what the student deems likely
                hidden = self._hidden(self.student, batch, [[]] * len(batch))
                parts = [self._log_probs(self.student, h).topk(TOP_K)[1] for h in hidden.split(512)]
                sizes = [len(s.response) for s in batch]
                for s, found in zip(batch, torch.cat(parts).split(sizes), strict=True):
                    ids[id(s)] = found
            for batch in self._batches(self.given.texts.shape[1]):  # pass 2: the teacher's view
                heads = [self.given.texts[s.knowledge].tolist() for s in batch]
                hidden = self._hidden(self.teacher, batch, heads)
                columns = torch.cat([ids[id(s)] for s in batch])
                parts = [
                    self._log_probs(self.teacher, h).gather(-1, c)
                    for h, c in zip(hidden.split(512), columns.split(512), strict=True)
                ]
                sizes = [len(s.response) for s in batch]
                for s, found in zip(batch, torch.cat(parts).split(sizes), strict=True):
                    wanted[id(s)] = found
        loss = 0.0
        self.optimizer.zero_grad()
        for batch in self._batches(0):  # pass 3: loss and gradient
            hidden = self._hidden(self.student, batch, [[]] * len(batch))
            columns, teacher = (torch.cat([m[id(s)] for s in batch]) for m in (ids, wanted))
            total = 0.0
            pieces = (hidden.split(512), columns.split(512), teacher.split(512))
            for h, c, t in zip(*pieces, strict=True):
                log_p = self._log_probs(self.student, h).gather(-1, c)
                total = total + (log_p.exp() * (log_p - t)).sum() / count
            total.backward()
            loss += float(total.detach())
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss if self.loss is None else self.loss


def step_flops(model: LanguageModel, given: Work) -> dict[str, float]:
    """FLOPs that each side's result needs at least: nothing recomputed, no padding, no text twice.

    The student's tokens go forward and backward (three products where forward has one), the
    teacher's forward after the cached text; logits of response positions alone.
    """
    cfg, cached = model.cfg, given.texts.shape[1]
    student = teacher = 0.0
    for s in given.samples:
        answers = len(s.response) * head_flops(cfg)
        student += 3 * (s.student_length * token_flops(cfg, s.student_length / 2) + answers)
        teacher += s.teacher_length * token_flops(cfg, cached + s.teacher_length / 2)
    whole = teacher + sum(len(s.response) for s in given.samples) * head_flops(cfg)
    step = student + whole
    return {
        "our step": step,
        "torch step": step,
        "our teacher": teacher,
        "our teacher, uncached": teacher,
    }


def arguments():
    """The command line."""
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", default="25m", help=f"a directory or {', '.join(SHAPES)}")
    parser.add_argument("--peer", default="torch", choices=("torch", "none"))
    parser.add_argument("--knowledge", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=4, help="knowledge texts of the step")
    parser.add_argument("--prefixes", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="mean tokens of a prompt")
    parser.add_argument("--answer", type=int, default=80, help="mean tokens of a response")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--token-budget", type=int, default=20_480, help="of a micro-batch")
    parser.add_argument("--remat", default="none", help="as config.consolidate.remat")
    return parser.parse_args()


def main() -> int:
    """Command line; returns the exit status."""
    options = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(options.model)
        if not directory.is_dir():
            directory = random_model(options.model, Path(scratch))
        model = load_model(directory)
        given = work(options, model.cfg.vocab_size)
        ours = Ours(model, given, options.token_budget, options.remat)
        ours.encode()
        began = time.perf_counter()
        ours.encode()
        encoding = time.perf_counter() - began
        sides = {"our step": ours, "our teacher": CachedTeacher(ours)}
        sides["our teacher, uncached"] = UncachedTeacher(ours, options.token_budget)
        if options.peer == "torch":
            sides["torch step"] = Torch(directory, given, options.token_budget)
        tokens = sum(len(s.response) for s in given.samples)
        print(f"{options.model}: {parameters(model.cfg) / 1e6:.1f}M parameters")
        compiled = compile_seconds()
        seconds = race(sides, options.repeats)
        compiled = compile_seconds() - compiled
    needed, peak = step_flops(model, given), rates().flops
    rows = []
    for name, some in seconds.items():
        share = f"{needed[name] / min(some) / peak:.0%}"
        rows.append([name, f"{min(some):.2f}", f"{tokens / min(some):.0f}", share])
    print(f"needed: {needed['our step'] / 1e12:.2f} TFLOP a step, at {peak / 1e9:.0f} GFLOP/s")
    print(f"compiling took {compiled:.1f} s; {peak_memory()}")
    measured = {"seconds": seconds, "encoding_seconds": encoding, "compile_seconds": compiled}
    measured |= {"needed_flops": needed["our step"], "measured_flops_per_second": peak}
    losses = (ours.loss, sides["torch step"].loss) if "torch step" in sides else None
    bars, ratios = compared(seconds, encoding, options, losses)
    settings = {"model": Path(options.model).name, "knowledge": options.knowledge}
    settings |= {"texts": options.texts, "prefixes": options.prefixes}
    settings |= {"prompt": options.prompt, "answer": options.answer}
    headers = ["side", "best seconds", "response tokens/s", "FLOP utilisation"]
    return finish("consolidate", settings, rows, headers, bars, measured | ratios, options)


def compared(
    seconds: dict[str, list[float]], encoding: float, options, losses: tuple | None
) -> tuple[list[Bar], dict]:
    """The ratios, with each step's share of the round's encoding on our side.

    Raises:
      UserError: the two sides computed different losses.
    """
    share = encoding / options.steps
    print(f"encoding {options.texts} texts, once a round: {encoding:.2f} s, {share:.2f} s a step")
    teacher = ratio(seconds["our teacher, uncached"], [s + share for s in seconds["our teacher"]])
    print(f"teacher uncached / cached: {spread(teacher)}")
    # A shorter prefix leaves less to save: the bars are for knowledge of the paper's length.
    long = options.knowledge >= 8192 and options.prefixes >= 64
    targets = (6.0, 3.0) if long else (None, None)
    bars = [Bar("teacher scoring, uncached / cached prefix", teacher[0], targets[0])]
    ratios = {"teacher_ratio": teacher}
    if losses is None:
        return bars, ratios
    print(f"loss of the first step: ours {losses[0]:.6f}, torch {losses[1]:.6f}")
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[1]):
        raise UserError("the two sides do not compute the same loss: nothing is compared")
    found, first = (
        ratio(seconds["torch step"], [s + extra for s in seconds["our step"]])
        for extra in (share, encoding)
    )
    print(f"torch / ours: {spread(found)}; with all encoding in one step {spread(first)}")
    bars.append(Bar("consolidation step, torch / ours", found[0], targets[1]))
    return bars, ratios | {"ratio": found, "ratio_first_step": first, "losses": losses}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
