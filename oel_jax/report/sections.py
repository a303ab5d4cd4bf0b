"""The sections of the report page as HTML; every text that is not ours is escaped."""

import json
from collections.abc import Sequence
from html import escape
from types import SimpleNamespace
from typing import Any

from oel_jax.config.defaults import as_json, default
from oel_jax.config.fields import leaves
from oel_jax.config.negative_control import announcement
from oel_jax.report import charts, run_data
from oel_jax.report.charts import Point, Series
from oel_jax.report.gains import mean_error, points
from oel_jax.report.run_data import Evaluation, RunData
from oel_jax.runs.metrics import duration
from oel_jax.runs.stages import NAMES, stages_of

_SHOWN_LINES = 40  # knowledge lines of a round that are shown without unfolding


def percent(rate: float) -> str:
    """A fraction as '5.5 %'."""
    return f"{100 * rate:.1f} %"


def interval(result: dict[str, Any]) -> str:
    """'[3.6, 8.4] %', the 95 % interval of an evaluation."""
    low, high = result["ci95"]
    return f"[{100 * low:.1f}, {100 * high:.1f}] %"


def table(
    caption: str, headers: Sequence[str], rows: Sequence[Sequence[object]], names: int = 1
) -> str:
    """A table that scrolls inside itself when it is too wide; cells are escaped.

    Args:
      names: how many columns, from the first, hold words; the others hold numbers.
    """

    def line(cells: Sequence[object], tag: str) -> str:
        kinds = [' class="name"'] * names + [""] * (len(cells) - names)
        shown = (f"<{tag}{k}>{escape(str(c))}</{tag}>" for c, k in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    head, body = line(headers, "th"), "".join(line(row, "td") for row in rows)
    return (
        f'<p class="soft">{escape(caption)}</p><div class="wide"><table class="numbers wrap">'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


# --- headline -------------------------------------------------------------------------------------


def headline(run: RunData, versions: dict[str, str], more: Sequence[tuple[str, str]] = ()) -> str:
    """Name, game, model, dates, and from where to where the pass rate went.

    Args:
      more: (large, small) texts of further cards.
    """
    config = run.config
    control = config.get("negative_control", "none")
    warning = announcement(SimpleNamespace(negative_control=control)).strip()
    stages = run.manifest["stages"]
    ended = max((entry["finished_at"] for entry in stages), default=None)
    dates = f"begun {_date(run.manifest.get('created_at'))}"
    dates += f", last stage finished {_date(ended)}" if ended else ", no stage is finished yet"
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    preset = config.get("preset", "default")
    facts = f"{config['game']['name'] or 'conversations'}, model {config['model']['path']}"
    facts += f", preset {preset}" if preset != "default" else ""
    facts += f", seed {config.get('seed', 0)}"
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f"<p>{escape(facts)}</p>",
        f'<p class="soft">{escape(dates)}. This page was made with {escape(made)}.</p>',
    ]
    if warning:
        parts.insert(1, f'<p class="warning" role="alert">{escape(warning)}</p>')
    state = _state(run)
    return (
        "".join(parts)
        + _cards(run, more)
        + (f'<p class="soft">{escape(state)}</p>' if state else "")
    )


def _date(text: Any) -> str:
    """'2026-11-24T08:10:41+00:00' -> '2026-11-24 08:10 UTC'."""
    return f"{str(text)[:16].replace('T', ' ')} UTC" if text else "at an unknown time"


def _cards(run: RunData, more: Sequence[tuple[str, str]]) -> str:
    plain = run.of_kind("start", "consolidated")
    cards = list(more)
    for evaluation in [plain[0], plain[-1]] if len(plain) > 1 else plain:
        rate, ends = percent(evaluation.result["pass_rate"]), interval(evaluation.result)
        cards.append((rate, f"pass rate, {evaluation.title}; 95 % interval {ends}"))
    if len(plain) > 1:
        gain = 100 * (plain[-1].result["pass_rate"] - plain[0].result["pass_rate"])
        cards.append((f"{gain:+.1f}", "points gained, without knowledge in the prompt"))
    if plain:
        tokens = [f"{e.result['response_tokens']:.1f}" for e in plain]
        change = f"{tokens[0]} → {tokens[-1]}" if len(tokens) > 1 else tokens[0]
        cards.append((change, "tokens per answer"))
    seconds = sum(entry["seconds"] for entry in run.manifest["stages"])
    cards.append((duration(seconds), "in finished stages (h:min:s or min:s)"))
    items = (f"<li><b>{escape(big)}</b><span>{escape(small)}</span></li>" for big, small in cards)
    return f'<ul class="cards">{"".join(items)}</ul>'


def _state(run: RunData) -> str:
    """What is missing of the run, '' when it is complete."""
    asked = run.config.get("rounds", 0)
    open_rounds = []
    for number in range(1, max([asked, *run.rounds]) + 1):
        done = run.seconds(number)
        stages = [stage.name for stage in stages_of(run.config)]
        if len(done) < len(stages):
            what = ", ".join(stage for stage in stages if stage in done) or "nothing"
            open_rounds.append(f"round {number} ({what} done)")
    return f"Not finished: {'; '.join(open_rounds)}." if open_rounds else ""


# --- curves ---------------------------------------------------------------------------------------


def results(run: RunData) -> str:
    """Pass rates and answer lengths over rounds, as curves and as numbers."""
    if not run.evaluations:
        return "<h2>Results</h2><p>Nothing has been evaluated yet.</p>"
    curves = [_pass_rates(run), _accumulation(run), _lengths(run)]
    rows = [
        [
            evaluation.title,
            percent(evaluation.result["pass_rate"]),
            interval(evaluation.result),
            _unseen(evaluation),
            f"{evaluation.result['response_tokens']:.1f}",
            f"{evaluation.result['turns']:.2f}",
        ]
        for evaluation in run.evaluations
    ]
    last = run.evaluations[-1].result
    note = f"{last['games']} games each on {last['boards']} distinct boards; intervals are "
    note += "clustered by board. Unseen: held-out boards that deployment had not shown by then."
    headers = ["policy", "pass rate", "95 % interval", "unseen boards", "tokens", "turns"]
    grid = f'<div class="charts">{"".join(curves)}</div>'
    return f"<h2>Results</h2>{grid}{table(note, headers, rows)}{_both_gains(run)}"


def _both_gains(run: RunData) -> str:
    """The gain in context next to the gain after consolidation, round by round."""
    if not any(one["in_context"] for one in run.gains):
        return ""
    rows = []
    for one in run.gains:
        error = "-" if one["error"] is None else f"{100 * one['error']:+.1f}"
        shown = (
            points(g["gain"], g["ci95"]) if g else "-" for g in (one["in_context"], one["after"])
        )
        rows.append([f"round {one['round']}", *shown, error])
    mean = mean_error(run.gains)
    caption = (
        "What knowledge gained in the prompt (pre-flight, its own boards), and what the model "
        "gained after consolidation, without it (held-out boards, to the model before). "
        "95 % intervals."
    )
    if mean is not None:
        caption += f" Mean difference, without its sign: {100 * mean:.1f} points."
    heads = ["", "gain in context", "gain after consolidation", "difference"]
    return table(caption, heads, rows)


def _unseen(evaluation: Evaluation) -> str:
    part = evaluation.result.get("unseen", {"maps": 0})
    return f"{percent(part['pass_rate'])} {interval(part)}" if part["maps"] else "-"


def _rounds_axis(run: RunData) -> charts.Axis:
    end = max([1, *run.rounds])
    return charts.count_axis("rounds of consolidation", 0, end, {0: "start"})


def _rate_point(x: float, title: str, result: dict[str, Any]) -> Point:
    note = f"{title}: {percent(result['pass_rate'])} {interval(result)}"
    return Point(x, result["pass_rate"], *result["ci95"], note=note)


def _levels(run: RunData) -> list[tuple[str, float]]:
    last = run.evaluations[-1].result
    named = (("random policy", "random_policy"), ("perfect play", "perfect_play"))
    return [(f"{name}, {percent(last[key])}", last[key]) for name, key in named if key in last]


def _pass_rates(run: RunData) -> str:
    groups = (
        ("without knowledge", ("start", "consolidated"), False),
        ("knowledge in context, before consolidation", ("in_context",), True),
    )
    series = [
        Series(
            name,
            [_rate_point(e.x, e.title, e.result) for e in run.of_kind(*kinds)],
            colour,
            dashed,
        )
        for colour, (name, kinds, dashed) in enumerate(groups)
    ]
    y = charts.percent_axis("pass rate")
    return charts.line_chart("Pass rate", series, _rounds_axis(run), y, _levels(run))


def _lengths(run: RunData) -> str:
    series = []
    for colour, (name, kinds) in enumerate(
        (
            ("without knowledge", ("start", "consolidated")),
            ("knowledge in context", ("in_context",)),
        )
    ):
        points = [
            Point(e.x, value, note=f"{e.title}: {value:.1f} tokens")
            for e in run.of_kind(*kinds)
            for value in [e.result["response_tokens"]]
        ]
        series.append(Series(name, points, colour, dashed=colour == 1))
    y = charts.value_axis("tokens", [p.y for line in series for p in line.points])
    return charts.line_chart("Tokens per answer", series, _rounds_axis(run), y)


def _accumulation(run: RunData) -> str:
    """Pass rate with the knowledge of the first n trajectories; n = 0 is without knowledge."""
    series = []
    for index, (number, measured) in enumerate(run.curves.items()):
        points = [
            _rate_point(n, f"round {number}, {n} trajectories", result) for n, result in measured
        ]
        for before in run.of_kind("start", "consolidated"):
            if before.x == number - 1:
                points.insert(0, _rate_point(0, f"round {number}, no knowledge", before.result))
        series.append(Series(f"round {number}", points, index))
    if not series:
        return ""
    most = max(int(point.x) for line in series for point in line.points)
    x = charts.count_axis("trajectories that the knowledge was drawn from", 0, most)
    y = charts.percent_axis("pass rate")
    return charts.line_chart("Accumulation, in context", series, x, y, _levels(run))


def training(run: RunData) -> str:
    """Loss, KL and entropies of every optimizer step, rounds one after another."""
    rows = [row for row in run.rows if row["stage"] == "consolidate"]
    if not rows:
        return ""
    # As many as were made, should the config ask for fewer by now.
    steps = max([run.config["consolidate"]["steps"], *(row["step"] for row in rows)])
    pictures = [
        _steps_chart(rows, steps, title, names)
        for title, names in (
            ("Loss and KL", {"loss": "loss", "kl": "KL per token"}),
            ("Entropy", {"student_entropy": "student", "teacher_entropy": "teacher"}),
            ("Tokens per answer in training", {"response_tokens": "student"}),
        )
    ]
    odd = sum(run_data.number(value) is None for row in rows for value in row["values"].values())
    note = f"<p>{odd} values are not finite and are left out of the curves.</p>" if odd else ""
    note += (
        '<p class="soft">Dotted vertical lines separate rounds.</p>' if len(run.rounds) > 1 else ""
    )
    return f'<h2>Consolidation</h2><div class="charts">{"".join(pictures)}</div>{note}'


def _steps_chart(rows: list[dict], steps: int, title: str, names: dict[str, str]) -> str:
    series = []
    for colour, (key, name) in enumerate(names.items()):
        points = [
            Point((row["round"] - 1) * steps + row["step"], value)
            for row in rows
            if (value := run_data.number(row["values"].get(key))) is not None
        ]
        series.append(Series(name, points, colour, dashed=colour == 1, dots=len(points) < 2))
    values = [point.y for line in series for point in line.points]
    last = max(row["round"] for row in rows)
    x = charts.count_axis("optimizer step", 0, last * steps)
    dividers = [number * steps for number in range(1, last)]
    return charts.line_chart(title, series, x, charts.value_axis(title, values), dividers=dividers)


# --- time and tokens ------------------------------------------------------------------------------


def costs(run: RunData) -> str:
    """Seconds, of it compiling, and generated tokens per stage."""
    rows = []
    for number in [0, *run.rounds]:
        times, tokens = run_data.stage_times(run, number), run_data.generated_tokens(run, number)
        for stage in (stage for stage in NAMES if stage in times):
            seconds, compiled = times[stage]
            rows.append(
                [
                    f"round {number}" if number else "start",
                    stage,
                    f"{seconds:.1f}",
                    "-" if compiled is None else f"{compiled:.1f}",
                    f"{tokens[stage]:,}" if stage in tokens else "-",
                ]
            )
    if not rows:
        return ""
    headers = ["", "stage", "seconds", "of it compiling", "tokens written"]
    caption = "Wall-clock time of finished stages, and the tokens that the model wrote in them."
    return f"<h2>Time and tokens</h2>{table(caption, headers, rows, names=2)}"


# --- knowledge ------------------------------------------------------------------------------------


def knowledge(run: RunData) -> str:
    """The K texts of each round, and the lines that came, stayed and went."""
    if not run.texts:
        return ""
    parts = ["<h2>Knowledge</h2>"]
    before: list[str] | None = None
    for number, texts in run.texts.items():
        lines = run_data.knowledge_lines(texts, before)
        before_count = len(before) if before is not None else None
        rows = [_line_row(line, len(texts), before_count) for line in lines]
        marks = [line.mark for line in lines]
        counts = [f"{marks.count(mark)} {mark}" for mark in ("new", "kept", "gone")]
        changes = f"; since round {number - 1}: {', '.join(counts)}" if before is not None else ""
        distinct = sum(line.chains > 0 for line in lines)
        parts.append(
            f"<h3>Round {number}</h3><p>{len(texts)} texts, {distinct} distinct lines{changes}.</p>"
        )
        parts.append(_gains(run.preflights.get(number)))
        parts.append(_lines_table(rows[:_SHOWN_LINES], before is not None))
        if rows[_SHOWN_LINES:]:
            more = _lines_table(rows[_SHOWN_LINES:], before is not None)
            parts.append(
                f"<details><summary>{len(rows) - _SHOWN_LINES} more lines</summary>{more}</details>"
            )
        whole = "".join(
            f'<div><p class="soft">chain {chain}</p><pre class="words">'
            f"{escape(text) or '(empty)'}</pre></div>"
            for chain, text in enumerate(texts)
        )
        parts.append(
            f"<details><summary>The {len(texts)} texts of round {number}</summary>"
            f'<div class="texts">{whole}</div></details>'
        )
        before = texts
    return "".join(parts)


def _gains(preflight: dict[str, Any] | None) -> str:
    """What each text gained in context before it was consolidated."""
    if preflight is None:
        return ""
    rows = [
        [f"chain {text['chain']}", percent(text["pass_rate"]), *_points(text)]
        for text in preflight["texts"]
    ]
    rows.append(["all: the gain in context", "", *_points(preflight)])
    caption = (
        f"Pre-flight: {preflight['games']} boards with each text; without knowledge "
        f"{percent(preflight['without']['pass_rate'])}."
    )
    return table(caption, ["text", "pass rate", "gain", "95 % interval"], rows)


def _points(result: dict[str, Any]) -> list[str]:
    low, high = result["ci95"]
    return [f"{100 * result['gain']:+.1f} points", f"[{100 * low:+.1f}, {100 * high:+.1f}]"]


def _line_row(line: run_data.Line, count: int, before_count: int | None) -> str:
    mark, cells = line.mark, f"<td>{line.chains} of {count}</td>"
    if before_count is not None:
        cells = (
            f'<td><span class="mark {mark}">{mark}</span></td><td>{line.before} of {before_count}'
            f"</td>{cells}"
        )
    return f'<tr class="{mark}">{cells}<td class="text">{escape(line.text)}</td></tr>'


def _lines_table(rows: list[str], compared: bool) -> str:
    names = ["", "texts before", "texts now"] if compared else ["texts"]
    head = "".join(f"<th>{name}</th>" for name in names) + '<th class="text">line</th>'
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- games ----------------------------------------------------------------------------------------


def viewer(run: RunData) -> str:
    """The empty viewer; viewer.js fills it from `games_json`."""
    if not any(evaluation.games for evaluation in run.evaluations):
        return (
            "<h2>Games</h2><p>No whole games were kept: nothing has been evaluated yet, or it was "
            "by an older version.</p>"
        )
    selects = "".join(
        f'<label>{name}<select data-is="{key}"></select></label>'
        for name, key in (("board", "board"), ("left", "left"), ("right", "right"))
    )
    panes = '<div class="pair {0}"><div class="pane" data-is="left-{1}"></div>'
    panes += '<div class="pane" data-is="right-{1}"></div></div>'
    return (
        '<h2>Games</h2><section id="viewer"><p class="soft">The same board, played by two '
        "policies: the first evaluation seed of the first held-out boards.</p>"
        f'<div class="controls">{selects}</div>'
        '<div class="steps"><button type="button" data-is="back" '
        'aria-label="turn before">←</button>'
        '<button type="button" data-is="next" aria-label="next turn">→</button>'
        '<span data-is="counter" aria-live="polite"></span></div>'
        f"{panes.format('screen', 'pane')}{panes.format('print', 'print')}"
        "<noscript><p>The game viewer needs JavaScript.</p></noscript></section>"
    )


def games_json(run: RunData) -> str:
    """What viewer.js reads, as JSON that cannot end its script element.

    {"evaluations": [{"title", "knowledge", "games"}], "before": index, "after": index}; the pair
    that is shown first is the start next to the last consolidated model.
    """
    shown = [evaluation for evaluation in run.evaluations if evaluation.games]
    names = ("map", "passed", "tokens", "turns", "outcome")
    evaluations = [
        {
            "title": evaluation.title,
            "knowledge": evaluation.games[0]["knowledge"],  # the first seed plays with one text
            "games": [{name: game[name] for name in names} for game in evaluation.games],
        }
        for evaluation in shown
    ]
    plain = [i for i, evaluation in enumerate(shown) if evaluation.kind != "in_context"] or [0]
    pair = {"before": plain[0], "after": plain[-1] if len(plain) > 1 else len(shown) - 1}
    text = json.dumps({"evaluations": evaluations} | pair)  # ASCII: no line separators either
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- config ---------------------------------------------------------------------------------------


def settings(run: RunData) -> str:
    """Every config field; bold where it is not the default of this version."""
    usual = leaves(as_json(default()))
    rows = []
    for path, value in leaves(run.config).items():
        changed = ' class="changed"' if usual.get(path) != value else ""
        shown = escape(json.dumps(value, ensure_ascii=False))
        was = escape(json.dumps(usual[path], ensure_ascii=False)) if path in usual else "-"
        rows.append(
            f"<tr><td{changed}>{escape(path)}</td>"
            f'<td class="text{" changed" if changed else ""}">{shown}</td>'
            f'<td class="text">{was if changed else ""}</td></tr>'
        )
    changes = "".join(
        f"<li>{escape(_date(change['at']))}: {escape(path)}: "
        f"{escape(json.dumps(pair['old']))} → {escape(json.dumps(pair['new']))}</li>"
        for change in run.manifest.get("config_changes", [])
        for path, pair in change["fields"].items()
    )
    changes = f"<p>Changed while the run went on:</p><ul>{changes}</ul>" if changes else ""
    return (
        "<h2>Config</h2><details><summary>All fields; those that differ from the defaults are bold"
        '</summary><div class="wide"><table class="numbers"><thead><tr><th>field</th>'
        '<th class="text">value</th><th class="text">default</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>{changes}"
    )
