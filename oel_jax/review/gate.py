"""The stage `review`: a round waits until its knowledge texts are decided on."""

from pathlib import Path

from oel_jax.base.errors import NeedsReview, UserError
from oel_jax.base.files import write_bytes, write_json
from oel_jax.chat.tokenizer import load_tokenizer
from oel_jax.learner.contexts import digest_of
from oel_jax.parallel import processes
from oel_jax.review import decisions
from oel_jax.review.sheet import sheet
from oel_jax.runs.policies import policy_directory
from oel_jax.runs.session import Run


def check_decided(run: Run, round_number: int) -> None:
    """Write the page to read; let the round go on only if every text is decided on.

    Raises:
      NeedsReview: texts wait; the run ends with status 76.
      UserError: all texts are rejected, or one that was edited is too long or empty.
    """
    waiting, problem = processes.from_first(
        _state(run, round_number) if processes.is_first() else ([], "")
    )
    if waiting:
        root = run.workdir.root
        raise NeedsReview(
            f"round {round_number}: text(s) {', '.join(map(str, waiting))} are not decided on. "
            f"Read {run.workdir.review_page(round_number)}, decide with "
            f"`oel review --workdir={root} --approve all` (or --reject, --edit, --text), and run "
            "the same command again"
        )
    if problem:
        raise UserError(problem)


def write_page(run: Run, round_number: int) -> list[decisions.Decision]:
    """Write `review.md` and `review.json` as they are now; returns the decisions."""
    made = decisions.load(run.workdir, round_number)
    texts = decisions.written_texts(run.workdir, round_number)
    page = sheet(run.config, run.workdir, round_number, texts, made)
    decisions.save(run.workdir, round_number, made)
    write_bytes(run.workdir.review_page(round_number), page.encode("utf-8", "replace"))
    return made


def write_approved(run: Run, round_number: int) -> list[Path]:
    """Write the approved texts, by which the round goes on; returns the files of the review."""
    workdir = run.workdir

    def work() -> None:
        chosen = decisions.approved_texts(workdir, round_number)
        texts = [text for _, text, _ in chosen]
        edited = [chain for chain, _, was_edited in chosen if was_edited]
        record = {
            "round": round_number,
            "chains": [chain for chain, _, _ in chosen],
            "edited": edited,
            "sha256": digest_of(texts),
            "texts": texts,
        }
        write_json(workdir.approved(round_number), record)
        total = len(decisions.written_texts(workdir, round_number))
        print(
            f"round {round_number} review: {len(texts)} of {total} text(s) approved, "
            f"{len(edited)} of them edited (SHA-256 {record['sha256'][:12]})"
        )

    processes.first_does(f"round {round_number} is reviewed", work)
    return [
        workdir.approved(round_number),
        workdir.review(round_number),
        workdir.review_page(round_number),
    ]


def _state(run: Run, round_number: int) -> tuple[list[int], str]:
    """(texts that wait, what is wrong with those approved)."""
    made = write_page(run, round_number)
    waiting = [chain for chain, decision in enumerate(made) if decision.status == "waiting"]
    if waiting:
        return waiting, ""
    chosen = decisions.approved_texts(run.workdir, round_number)
    again = f"decide again with `oel review --workdir={run.workdir.root}`"
    if not chosen:
        return (
            [],
            f"round {round_number}: all texts are rejected, nothing is left to learn; {again}",
        )
    most = run.config.extract.l_max
    tokenizer = load_tokenizer(policy_directory(run.config, run.workdir, round_number), run.today)
    for chain, text, edited in chosen:
        length = len(tokenizer.encode(text.strip()))
        if edited and length > most:
            return [], (
                f"round {round_number}: text {chain} was edited and has {length} tokens, more than "
                f"config.extract.l_max={most}; shorten it: {again}"
            )
    return [], ""
