"""Server side: knowledge from trajectories (paper Eq. 1, spec section 6).

K chains accumulate in lock-step. At step i the extractor reads the i-th game of each chain (and,
if configured, the chain's knowledge so far), and what it writes is appended:

    e'_i ~ pi_extract(. | tau_i, e_{i-1})        e_i = [e_{i-1}; e'_i]

Where the extractor does not see previous knowledge, all calls are independent and several steps
are generated as one batch. The text after every step has its own file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_collections

from oel_jax.base import preemption
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json, write_json
from oel_jax.chat.tokenizer import Tokenizer, load_tokenizer
from oel_jax.config.budgets import (
    drops_quotes,
    extraction_domain,
    extraction_template,
    extractor_budget,
)
from oel_jax.config.choices import PER_TURN
from oel_jax.data import answers, knowledge, prompts
from oel_jax.data.history import history
from oel_jax.data.trajectories import Trajectory
from oel_jax.data.trajectory_files import Stored, TrajectoryStore, read
from oel_jax.learner.coach import coach
from oel_jax.learner.contexts import (
    copy_of_another_run,
    games_of_chain,
    write_empty_texts,
    write_raw_trajectories,
)
from oel_jax.learner.history import with_markers
from oel_jax.learner.turn_contexts import count_contexts
from oel_jax.logs.quotes import Source, drop_lines
from oel_jax.models.language_model import LanguageModel
from oel_jax.parallel import processes
from oel_jax.runs.console import Progress, waiting
from oel_jax.runs.keys import chain_key
from oel_jax.runs.metrics import Metrics, NoMetrics, printable
from oel_jax.runs.policies import load_extractor, policy_directory
from oel_jax.runs.samplers import build_sampler, extraction_layout, extraction_width, sampling
from oel_jax.runs.session import Run
from oel_jax.runs.workdir import Workdir
from oel_jax.sampler.requests import Completion, Request


@dataclass
class _Chain:
    """One chain: its games and its knowledge so far."""

    number: int
    games: list[Trajectory]
    text: str = ""
    done: int = 0


def extract(run: Run, round_number: int) -> list[Path]:
    """Grow the K texts of a round; returns the files. Finished steps are not done again."""
    config = run.config.extract
    numbers = range(config.chains)
    for_answers: list[Path] = []
    if config.knowledge_from or config.experience != "knowledge":
        fill = {"knowledge": copy_of_another_run, "raw": write_raw_trajectories}
        fill_in = fill.get(config.experience, write_empty_texts)
        work = partial(fill_in, run.config, run.workdir, round_number)
        processes.first_does("texts are filled in", work)
        if config.experience == "coach":
            for_answers = coach(run, round_number)
    else:
        _grow(run, round_number, processes.share(numbers))
        with waiting(f"round {round_number} extract: other processes write"):
            processes.wait("chains are grown")
    if processes.is_first():
        if config.knowledge_from or config.experience != "knowledge" or processes.count() > 1:
            steps = range(1, config.n_run + 1)
            _log(run.metrics, config, run.workdir, round_number, steps)
        _finish(run.metrics, config, run.workdir, round_number)
        if config.experience in PER_TURN:
            _check_answers(run, round_number)
    steps = range(1, config.n_run + 1)
    files = [run.workdir.knowledge_step(round_number, k, step) for k in numbers for step in steps]
    return [run.workdir.knowledge(round_number), *files, *for_answers]


def _check_answers(run: Run, round_number: int) -> None:
    """How many of the deployed answers have a context for themselves; UserError if none has."""
    config, place = run.config, run.workdir.trajectories(round_number)
    store = TrajectoryStore(place)
    tokenizer = load_tokenizer(policy_directory(config, run.workdir, round_number), run.today)
    answered = informed = tokens = 0
    for path in store.files("deploy"):
        episodes = [Stored(path, game) for game in read(path)]
        found = count_contexts(config, run.workdir, round_number, episodes, tokenizer)
        answered, informed, tokens = answered + found[0], informed + found[1], tokens + found[2]
    kind = config.extract.experience
    if not informed:
        raise UserError(
            f"{place}: none of the {answered} deployed answers has a context of "
            f"config.extract.experience={kind!r}, so there is nothing to consolidate. 'hindsight' "
            "needs conversations that continue after an answer, feedback, or an outcome "
            "(config.extract.outcome); any kind needs a config.extract.l_max that its texts fit "
            "into"
        )
    values = {"informed": (informed, answered), "context_tokens": (tokens, informed)}
    run.metrics.rewind("contexts", round_number, round_number - 1)
    run.metrics.scalars("contexts", round_number, values, round=round_number)
    print(
        f"{informed} of {answered} deployed answers have a context of their own ({kind}), "
        f"{tokens / informed:.1f} tokens on average; answers without one are left out"
    )


def _grow(run: Run, round_number: int, numbers: Sequence[int]) -> None:
    """Grow these chains in lock-step."""
    config = run.config.extract
    if not numbers:  # more processes than chains
        return
    extractor = load_extractor(run.config, run.workdir, round_number, run.host, today=run.today)
    chains = [_open_chain(run.config, run.workdir, round_number, number) for number in numbers]
    sizes = extraction_layout(run.config, run.host.shape["fsdp"], len(chains))
    width, budget = extraction_width(run.config), sizes.response
    opened = extractor.tokenizer.opens_thought(thinking=run.config.model.thinking)
    player = extractor.tokenizer
    if config.model_path:
        policy = policy_directory(run.config, run.workdir, round_number)
        player = load_tokenizer(policy, run.today)
    sampler = build_sampler(run.config, extractor, run.host, sampling(config), sizes)
    first, alone = min(chain.done for chain in chains), processes.count() == 1
    if alone:
        # A kill may have come before the metrics.
        _log(run.metrics, config, run.workdir, round_number, range(1, first + 1))
    label = f"round {round_number} extract"
    done = sum(chain.done for chain in chains)
    calls = config.n_run * len(chains)
    safe_place = partial(preemption.stop_if_noticed, "finished texts are kept")
    with (
        Progress(calls, "calls", label, every=run.config.log.console_every, done=done) as progress,
        preemption.holding(),
    ):
        progress.follow(lambda: (calls - done) * budget, tokens=lambda: sampler.written)
        for start in range(first + 1, config.n_run + 1, width):
            safe_place()
            steps = range(start, min(start + width, config.n_run + 1))
            requests = [
                _request(run.config, extractor, player, round_number, chain, step)
                for chain in chains
                for step in steps
                if step > chain.done
            ]
            for answer in sampler.generate(extractor.params, requests, safe_place):
                chain, step = answer.tag
                file = run.workdir.knowledge_step(round_number, chain.number, step)
                _absorb(run.config, extractor.tokenizer, file, answer, opened)
                progress.update()
            if alone:  # otherwise other processes have some of the chains
                _log(run.metrics, config, run.workdir, round_number, steps)


def _open_chain(
    config: ml_collections.ConfigDict, workdir: Workdir, round_number: int, number: int
) -> _Chain:
    """A chain's games, and the text of its last finished step."""
    chain = _Chain(number, games_of_chain(config, workdir, round_number, number))
    while chain.done < config.extract.n_run:
        file = workdir.knowledge_step(round_number, number, chain.done + 1)
        if not file.exists():
            break
        chain.text = read_json(file)["text"]
        chain.done += 1
    return chain


def _request(
    config: ml_collections.ConfigDict,
    extractor: LanguageModel,
    player: Tokenizer,
    round_number: int,
    chain: _Chain,
    step: int,
) -> Request:
    """The extractor call of one step (spec 6.1 steps 3 to 5); `player` wrote the responses."""
    settings, thinking = config.extract, config.model.thinking
    game = chain.games[step - 1]

    def shown(turns: list[tuple[str, str]]) -> str:
        outcome = game.outcome or ""
        return message(prompts.extraction_history(turns, outcome, outcome_mode=settings.outcome))

    def message(told: str) -> str:
        return prompts.extraction_prompt(
            told,
            chain.text if settings.previous else "",
            version=settings.version,
            template=extraction_template(config),
            domain=extraction_domain(config),
        )

    if settings.history_markers == "tokens":
        text = with_markers(shown, game, player, extractor.tokenizer)
    else:
        text = message(
            history(game, outcome_mode=settings.outcome, reactions=settings.history == "reactions")
        )
    ids = extractor.tokenizer.chat(text, thinking=thinking)
    key = chain_key(config, chain.number, "extractor", round_number, step)
    return Request(ids, key, extractor_budget(config)[1], (chain, step))


def _absorb(
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    file: Path,
    answer: Completion,
    opened: bool,
) -> None:
    """Clean, parse, append, truncate and save one answer (spec 6.1 steps 6 to 9).

    `parsed` in the file is what was appended, without what `drop_quotes`, `no_op` and `deduplicate`
    took away.

    Args:
      tokenizer: the extractor's.
    """
    chain, step = answer.tag
    drops, config = drops_quotes(config), config.extract
    response = tokenizer.decode(answer.ids)
    stripped, finished = answers.split_thought(response, config.unfinished_thought, opened=opened)
    parsed = knowledge.parse(stripped or "", config.version, config.item_marker)
    upkeep: dict[str, Any] = {}
    if drops:
        parsed, quoting = drop_lines(parsed, Source(chain.games[step - 1]))
        upkeep["quotes"] = len(quoting)
        upkeep["quoting"] = [[line, list(map(str, why))] for line, why in quoting]
    if config.no_op:
        parsed, upkeep["no_new"] = knowledge.without_no_op(
            stripped or "", parsed, config.item_marker
        )
    if config.deduplicate:
        parsed, upkeep["duplicates"] = knowledge.deduplicate(chain.text, parsed, config.item_marker)
    text = knowledge.append(chain.text, parsed)
    chain.text = knowledge.truncate(
        text,
        config.l_max,
        lambda piece: len(tokenizer.encode(piece)),
        config.version,
        keep=config.truncate,
        marker=config.item_marker,
    )
    chain.done = step
    write_json(
        file,
        {
            "chain": chain.number,
            "step": step,
            "text": chain.text,
            "parsed": parsed,
            "response": response,
            "thought_finished": finished,
            "stopped": answer.stopped,
            "response_tokens": len(answer.ids) - answer.stopped,
            "knowledge_tokens": len(tokenizer.encode(chain.text)),
        }
        | upkeep,
    )


def _records(workdir: Workdir, round_number: int, chains: int, step: int) -> list[dict]:
    """The saved step of all chains."""
    return [read_json(workdir.knowledge_step(round_number, chain, step)) for chain in range(chains)]


def _log(
    metrics: Metrics | NoMetrics,
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    round_number: int,
    steps: range,
) -> None:
    """Metrics of these steps. `config`: its section `extract`."""
    for step in steps:
        records = _records(workdir, round_number, config.chains, step)
        count = len(records)
        values = {
            "knowledge_tokens": (sum(r["knowledge_tokens"] for r in records), count),
            "response_tokens": (sum(r["response_tokens"] for r in records), count),
            "unfinished_thoughts": (sum(not r["thought_finished"] for r in records), count),
            "nothing_parsed": (sum(_says_nothing(r) for r in records), count),
        }
        for name in _upkeep(records):
            values[name] = (sum(r.get(name, 0) for r in records), count)
        metrics.rewind("extract", round_number, step - 1)
        metrics.scalars("extract", step, values, round=round_number)


_UPKEEP = {
    "no_new": "answer(s) with nothing new (config.extract.no_op)",
    "quotes": "line(s) left out that give a trajectory away (config.extract.drop_quotes)",
    "duplicates": "item(s) left out that were known already (config.extract.deduplicate)",
}


def _says_nothing(record: dict) -> bool:
    """Whether an answer had no item; one that was left out on purpose had."""
    return not (record["parsed"] or any(record.get(name) for name in _UPKEEP))


def _upkeep(records: Sequence[dict]) -> list[str]:
    """What else is counted in these steps, where the config asks for it."""
    return [name for name in _UPKEEP if any(name in record for record in records)]


def _finish(
    metrics: Metrics | NoMetrics,
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    round_number: int,
) -> None:
    """Write the pool of texts after n steps and print a short overview."""
    used = _records(workdir, round_number, config.chains, config.n)
    texts = [record["text"] for record in used]
    pool = workdir.knowledge(round_number)
    write_json(pool, {"round": round_number, "n": config.n, "texts": texts})
    if config.experience in PER_TURN:
        return
    calls = unfinished = 0
    left_out = dict.fromkeys(_upkeep(used), 0)
    print(f"knowledge after {config.n} trajectories, newest line of each chain:")
    for record in used:
        chain = record["chain"]
        steps = [
            read_json(workdir.knowledge_step(round_number, chain, step))
            for step in range(1, config.n + 1)
        ]
        calls += len(steps)
        unfinished += sum(not step["thought_finished"] for step in steps)
        for name in left_out:
            left_out[name] += sum(step.get(name, 0) for step in steps)
        lines = [line for line in record["text"].split("\n") if line.strip()]
        newest = lines[-1].removeprefix(config.item_marker).strip() if lines else "(empty)"
        size = f"{len(lines)} line(s), {record['knowledge_tokens']} token(s)"
        print(f"  chain {chain}: {size}: {printable(newest[:72])}")
        name = f"knowledge/chain_{chain:02d}"
        metrics.text(name, config.n, record["text"], "extract", round_number)
    if unfinished:
        what = "dropped" if config.unfinished_thought == "drop" else "kept as knowledge"
        print(
            f"{unfinished} of {calls} extractor calls did not finish their thought within "
            f"config.extract.l_max={config.l_max} tokens; it was {what} "
            f"(config.extract.unfinished_thought)"
        )
    for name, count in left_out.items():
        print(f"{count} {_UPKEEP[name]} in {calls} extractor calls")
    empty = sum(not text for text in texts)
    if empty:
        print(f"{empty} of {len(texts)} knowledge texts are empty")
