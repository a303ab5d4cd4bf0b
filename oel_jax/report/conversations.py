"""Chat rounds in the summary, in the console's table and on the page. Imports no JAX, no game."""

from collections.abc import Mapping
from html import escape
from typing import Any

from oel_jax.base.files import read_json
from oel_jax.runs.metrics import table as plain_table
from oel_jax.runs.workdir import Workdir, samples_of

# Evaluation -> what was measured, in the order in which they are shown.
POLICIES = {
    "conversations_before": "before",
    "conversations_in_context": "before, knowledge in context",
    "conversations_consolidated": "after consolidation",
}
_SHOWN = 8  # answers that are shown side by side without unfolding


def numbers_of(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that were measured, by their short names."""
    found = {
        name: result[name]
        for name in ("response_tokens", "cut_off", "score")
        if result.get(name) is not None
    }
    for name in ("kl", "approved", "general"):
        if result.get(name):
            key = "kl" if name == "kl" else "log_prob"
            found[name if name == "kl" else f"{name}_log_prob"] = result[name][key]
    return found


def read_round(workdir: Workdir, number: int) -> dict[str, dict[str, Any]]:
    """Evaluation -> its result, of those that a chat round has made."""
    files = {name: workdir.evaluation(number, name) for name in POLICIES}
    return {name: read_json(file) for name, file in files.items() if file.exists()}


def read_answers(workdir: Workdir, number: int) -> dict[str, list[dict[str, Any]]]:
    """Evaluation -> the held-out turns with the policy's answers."""
    files = {name: samples_of(workdir.evaluation(number, name)) for name in POLICIES}
    return {name: read_json(file)["answers"] for name, file in files.items() if file.exists()}


# Header of a column -> (short name, how it is shown).
_COLUMNS = {
    "tokens/answer": ("response_tokens", "{:.1f}"),
    "cut off": ("cut_off", "{:.1%}"),
    "KL to the teacher": ("kl", "{:.4f}"),
    "approved answers": ("approved_log_prob", "{:.4f}"),
    "general text": ("general_log_prob", "{:.4f}"),
    "score": ("score", "{:.4g}"),
}
_OPTIONAL = ("approved answers", "score")


def rows_of(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of a round's evaluations; columns that nothing was measured for are out."""
    numbers = {POLICIES[name]: numbers_of(result) for name, result in results.items()}
    columns = {
        header: (name, form)
        for header, (name, form) in _COLUMNS.items()
        if header not in _OPTIONAL or any(name in one for one in numbers.values())
    }
    rows = [
        [
            title,
            *(form.format(one[name]) if name in one else "-" for name, form in columns.values()),
        ]
        for title, one in numbers.items()
    ]
    return list(columns), rows


def round_table(workdir: Workdir, number: int) -> str:
    """The table that ends chat round `number`, which is evaluated."""
    results = read_round(workdir, number)
    headers, rows = rows_of(results)
    last = results["conversations_consolidated"]
    seconds = (f"{stage} {value:.0f}" for stage, value in workdir.seconds(number).items())
    return (
        f"{plain_table(rows, [f'round {number}', *headers])}\n"
        f"{last['answers']} answers in {last['conversations']} held-out conversations; texts: mean "
        "log-probability of a token\n"
        f"seconds per stage: {', '.join(seconds)}"
    )


def summary_of(workdir: Workdir, number: int) -> dict[str, Any]:
    """What summary.json says of a chat round."""
    return {POLICIES[name]: numbers_of(one) for name, one in read_round(workdir, number).items()}


# --- the page -------------------------------------------------------------------------------------


def results(workdir: Workdir, rounds: int) -> str:
    """Numbers and answers of all chat rounds, as HTML."""
    from oel_jax.report.sections import table

    parts = ["<h2>Held-out conversations</h2>"]
    for number in range(1, rounds + 1):
        measured = read_round(workdir, number)
        if not measured:
            continue
        headers, rows = rows_of(measured)
        one = next(iter(measured.values()))
        caption = (
            f"Round {number}: {one['answers']} answers in {one['conversations']} conversations "
            "that nothing was learned from. KL per token, in nats. Texts: mean log-probability of "
            "a token."
        )
        parts.append(table(caption, ["policy", *headers], rows))
        parts.append(_side_by_side(read_answers(workdir, number), number))
    if len(parts) == 1:
        parts.append("<p>Nothing has been evaluated yet.</p>")
    return "".join(parts)


def cards(workdir: Workdir, rounds: int) -> list[tuple[str, str]]:
    """(large, small) text: how answers changed from the first round's start to now."""
    measured = [read_round(workdir, number) for number in range(1, rounds + 1)]
    first = next((m["conversations_before"] for m in measured if "conversations_before" in m), {})
    last = next(
        (m["conversations_consolidated"] for m in measured[::-1] if m.get(_LAST)),
        {},
    )
    before, after = numbers_of(first), numbers_of(last)
    found = []
    for name, form, what in (
        ("response_tokens", "{:.1f}", "tokens per held-out answer"),
        ("cut_off", "{:.0%}", "of held-out answers cut off"),
        ("kl", "{:.3f}", "KL per token to the policy that reads the knowledge"),
    ):
        if name in before and name in after:
            found.append((f"{form.format(before[name])} → {form.format(after[name])}", what))
    return found


_LAST = "conversations_consolidated"


def _side_by_side(answers: Mapping[str, list[dict[str, Any]]], number: int) -> str:
    """The same turn answered before and after."""
    before, after = answers.get("conversations_before"), answers.get(_LAST)
    if not before or not after:
        return ""
    pairs = [_pair(old, new) for old, new in zip(before, after, strict=True)]
    head = "<tr><th>conversation</th><th>before</th><th>after</th></tr>"

    def whole(rows: list[str]) -> str:
        return (
            f'<div class="wide"><table class="numbers wrap answers"><thead>{head}</thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    shown = f"<h3>Round {number}: answers side by side</h3>{whole(pairs[:_SHOWN])}"
    if pairs[_SHOWN:]:
        more = len(pairs) - _SHOWN
        shown += f"<details><summary>{more} more answers</summary>{whole(pairs[_SHOWN:])}</details>"
    return shown


def _pair(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    said = "\n\n".join(f"{one['role']}: {one['content']}" for one in old["messages"])
    cells = "".join(
        f'<td class="text"><p class="soft">{one["tokens"]} tokens'
        f'{"" if one["stopped"] else ", cut off"}</p><pre class="words">{escape(one["answer"])}'
        "</pre></td>"
        for one in (old, new)
    )
    # A long conversation scrolls in its cell, by the keyboard too.
    talk = f'<pre class="words" tabindex="0">{escape(said)}</pre>'
    return f'<tr><td class="text">{talk}</td>{cells}</tr>'
