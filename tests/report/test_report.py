"""The report page: one file that shows the files' numbers, and takes outside text for text."""

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
from tiers import HANG
from tiny_run import copy_of, go, opened, policy_of, tiny_config

from oel_jax import environments
from oel_jax.base.files import read_json, write_json
from oel_jax.data.trajectory_files import read as read_games
from oel_jax.report import charts, figure
from oel_jax.report import page as report
from oel_jax.report.run_data import collect, generated_tokens, knowledge_lines, stage_times
from oel_jax.runs.workdir import Workdir, samples_of

evaluation = importlib.import_module("oel_jax.actor.evaluate")
HOSTILE = (
    "</script></pre><img src=x onerror=\"document.title='owned'\"><b>&lt;H&gt; \u2028 ${title}"
)


class Reader(HTMLParser):
    """Tags with attributes, visible text, and what is inside script and style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.raw, self._inside = [], "", {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside = f"{tag} {dict(attributes).get('type', '')}".strip()

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside:
            self.raw[self._inside] = self.raw.get(self._inside, "") + text
        else:
            self.text += text

    @property
    def games(self):
        return json.loads(self.raw["script application/json"])


def read_page(root) -> Reader:
    return Reader((root / "report.html").read_text(encoding="utf-8"))


def made(root) -> Reader:
    report.write(Workdir(root))
    return read_page(root)


def percent(rate):
    return f"{100 * rate:.1f} %"


# --- the page -------------------------------------------------------------------------------------


def test_a_run_writes_a_page_that_needs_nothing_else(finished_run):
    page = read_page(finished_run)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form"), tag
        assert not {"src", "href", "style"} & attributes.keys(), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert "url(" not in text


def test_its_policy_allows_its_own_script_and_style_alone(finished_run):
    page = read_page(finished_run)
    (policy,) = (
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for part, inside in (("script-src", "script"), ("style-src", "style")):
        (allowed,) = re.findall(rf"{part} '(sha256-[^']+)'", policy)
        assert allowed == report._source_hash(page.raw[inside])


def test_the_numbers_are_those_of_the_files(finished_run):
    page, place = read_page(finished_run), finished_run / "round_001" / "evaluate"
    text = " ".join(page.text.split())
    files = {
        "start": finished_run / "evaluate" / "start.json",
        "round 1, knowledge in context": place / "in_context.json",
        "after round 1": place / "consolidated.json",
    }
    html = (finished_run / "report.html").read_text(encoding="utf-8")
    for name, file in files.items():
        result = read_json(file)
        low, high = (f"{100 * end:.1f}" for end in result["ci95"])
        row = [percent(result["pass_rate"]), f"[{low}, {high}] %"]
        assert f"{name}</td><td>{row[0]}</td><td>{row[1]}</td>" in html
        assert f"<td>{result['response_tokens']:.1f}</td>" in html
    assert "random policy, 1.7 %" in text and "perfect play, 100.0 %" in text
    for title in ("Pass rate", "Tokens per answer", "Loss and KL", "Entropy"):
        assert f"<h3>{title}</h3><svg" in html
    assert "Accumulation" not in text  # no curve was asked for
    assert "Not finished" not in text and "negative control" not in text
    assert f"jax {importlib.import_module('jax').__version__}" in text


def test_times_and_tokens_are_those_of_the_stages(finished_run):
    run, place = collect(Workdir(finished_run)), finished_run / "round_001"
    tokens = generated_tokens(run, 1)
    stop = {3}  # the nano tokenizer's end of a turn
    games_played = [
        g for file in (place / "trajectories").glob("*.jsonl") for g in read_games(file)
    ]
    answers = [turn.response_ids for game in games_played for turn in game.turns]
    assert tokens["deploy"] == sum(len(ids) - (ids[-1] in stop) for ids in answers)
    steps = [read_json(file) for file in (place / "knowledge").glob("chain_*/step_*.json")]
    assert tokens["extract"] == sum(step["response_tokens"] for step in steps)
    results = [read_json(place / "evaluate" / f"{n}.json") for n in ("in_context", "consolidated")]
    expected = sum(r["response_tokens"] * r["turns"] * r["games"] for r in results)
    assert tokens["evaluate"] == pytest.approx(expected, abs=0.5)
    rows = [r["values"] for r in run.rows if r["stage"] == "consolidate"]
    expected = sum(row["prefixes"] * row["response_tokens"] for row in rows)
    assert len(rows) == 3 and tokens["consolidate"] == pytest.approx(expected, abs=0.5)
    times = stage_times(run, 1)
    assert {s: seconds for s, (seconds, _) in times.items()} == Workdir(finished_run).seconds(1)
    assert all(0 <= compiled <= seconds + 1 for seconds, compiled in times.values())


def test_unfinished_runs_have_a_page(finished_run, tmp_path):
    everything = ("deploy", "extract", "consolidate", "evaluate")
    for count in range(5):
        root = copy_of(finished_run, tmp_path / str(count), *everything[4 - count :])
        text = " ".join(made(root).text.split())
        done = ", ".join(everything[: 4 - count]) or "nothing"
        assert (f"round 1 ({done} done)" in text) == (count > 0)
        assert ("Knowledge" in text) == (count < 3)
    (root / "evaluate" / "start.json").unlink()
    assert "Nothing has been evaluated yet" in made(root).text
    # an evaluation of an older version, and one without knowledge in context
    root = copy_of(finished_run, tmp_path / "old")
    (root / "round_001" / "evaluate" / "in_context.json").unlink()
    for file in root.rglob("*.samples.json"):
        file.unlink()
    text = made(root).text
    assert "No whole games were kept" in text and "after round 1" in text
    assert "round 1, knowledge in context" not in text


def hostile_copy(finished_run, root):
    """The run as if its model, its knowledge and its games had been made to break the page."""
    copy_of(finished_run, root)
    knowledge = root / "round_001" / "knowledge" / "knowledge.json"
    texts = {"texts": [HOSTILE, "H loses \ud800"]}  # half a surrogate pair
    knowledge.write_text(json.dumps(read_json(knowledge) | texts))
    for file in root.rglob("*.samples.json"):
        kept = read_json(file)["games"]
        kept[0] |= {"outcome": HOSTILE, "knowledge": HOSTILE}
        kept[0]["turns"][0] |= {"response": HOSTILE, "observation": HOSTILE, "action": HOSTILE}
        write_json(file, {"games": kept})
    config = read_json(root / "config.json")
    config["model"]["path"] = HOSTILE
    write_json(root / "config.json", config)
    return root


def test_hostile_text_stays_text(finished_run, tmp_path):
    page, plain = made(hostile_copy(finished_run, tmp_path / "run")), read_page(finished_run)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert page.text.count(HOSTILE) == 3  # the model, a line, a whole text
    assert "H loses ?" in page.text
    assert page.raw["script"] == plain.raw["script"]
    for shown in page.games["evaluations"]:
        assert shown["games"][0]["turns"][0]["response"] == HOSTILE
        assert shown["knowledge"] == HOSTILE


def test_a_negative_control_is_called_one(finished_run, tmp_path):
    root = copy_of(finished_run, tmp_path / "run")
    config = read_json(root / "config.json") | {"negative_control": "foreign_top_k"}
    write_json(root / "config.json", config)
    page = made(root)
    assert "negative control 'foreign_top_k': this run is broken on purpose" in page.text
    assert ("p", {"class": "warning", "role": "alert"}) in page.tags


def test_the_command_and_what_it_refuses(finished_run, tmp_path, capsys):
    root = copy_of(finished_run, tmp_path / "run")
    (root / "report.html").unlink()
    assert report.main([f"--workdir={root}"]) == 0
    assert (root / "report.html").is_file()
    assert report.main([f"--workdir={tmp_path / 'no'}"]) == 2
    assert "--workdir=" in capsys.readouterr().err and not (tmp_path / "no").exists()
    (root / "evaluate" / "start.json").write_text("{")
    assert report.main([f"--workdir={root}"]) == 2
    assert "start.json" in capsys.readouterr().err


def test_it_needs_no_jax():
    code = (
        "import sys, oel_jax.report.page; print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.stdout == "[]\n", done.stderr


# --- its parts ------------------------------------------------------------------------------------


def test_what_changed_between_two_rounds():
    before = ["a\nb\na", "b\n\n c"]
    lines = knowledge_lines(["b\nd\nb", " d", "c\nd"], before)
    shown = [(line.text, line.chains, line.before, line.mark) for line in lines]
    assert shown == [
        ("d", 3, 0, "new"),
        ("b", 1, 2, "kept"),
        ("c", 1, 1, "kept"),
        ("a", 0, 1, "gone"),
    ]
    first = knowledge_lines(before, None)
    assert [(line.text, line.before, line.mark) for line in first] == [
        ("b", None, ""),
        ("a", None, ""),
        ("c", None, ""),
    ]


def test_a_curve_goes_through_its_points():
    line = charts.Series("<x>", [charts.Point(0, 0.0), charts.Point(2, 1.0, 0.5, 1.0)])
    x, y = charts.Axis("x", 0, 4, [(0, "0")]), charts.percent_axis("y")
    picture = charts.line_chart("<title>", [line], x, y)
    assert "<h3>&lt;title&gt;</h3>" in picture and "&lt;x&gt;" in picture
    left, right = charts._LEFT, charts.WIDTH - charts._RIGHT
    top, bottom = charts._TOP, charts.HEIGHT - charts._BOTTOM
    middle, half = (left + right) / 2, (top + bottom) / 2
    assert f'class="line" d="M{left}.0 {bottom}.0L{middle} {top}.0"' in picture
    assert f'class="interval" d="M{middle} {half}V{top}.0' in picture
    assert charts.line_chart("empty", [charts.Series("x", [])], x, y) == ""


@pytest.mark.parametrize("top", [1e-7, 0.03, 0.9, 1, 7, 26, 999, 123_456])
def test_ticks_are_round_distinct_and_cover_the_values(top):
    axis = charts.value_axis("x", [top / 3, top])
    values = [value for value, _ in axis.ticks]
    assert axis.low == 0 and axis.high >= top * (1 - 1e-9) and 2 <= len(values) <= 7
    assert len({text for _, text in axis.ticks}) == len(values)
    assert all(float(text.replace(",", "")) == pytest.approx(value) for value, text in axis.ticks)


def test_the_picture_for_tensorboard_has_every_point_in_its_place(finished_run):
    evaluations = collect(Workdir(finished_run)).evaluations
    picture = Image.open(io.BytesIO(report.figure(Workdir(finished_run))))
    assert picture.size == (figure.WIDTH, figure.HEIGHT)
    last = {e.kind: e for e in evaluations}
    assert last.keys() == {"start", "in_context", "consolidated"}
    for kind, colour in (
        ("start", "#0b62a8"),
        ("consolidated", "#0b62a8"),
        ("in_context", "#c2570c"),
    ):
        at = figure.place(last[kind].x, last[kind].result["pass_rate"], 1)
        assert picture.getpixel(tuple(map(round, at))) == ImageColor.getrgb(colour), kind
    assert figure.place(0, 0.75, 2)[1] < figure.place(0, 0.25, 2)[1]
    assert (
        figure.place(0, 0, 2)[0]
        < figure.place(1, 0, 2)[0]
        == sum(figure.place(x, 0, 2)[0] / 2 for x in (0, 2))
    )


def test_tensorboard_gets_games_lengths_settings_and_the_picture(finished_run, tmp_path):
    root = copy_of(finished_run, tmp_path / "run", "evaluate")
    go(root, tiny_config(log__tensorboard=True))
    events = EventAccumulator(str(root / "tensorboard")).Reload()
    assert events.Images("figures/pass_rate")[0].encoded_image_string == report.figure(
        Workdir(root)
    )
    shown = events.Tensors("evaluate/game")[-1].tensor_proto.string_val[0].decode()
    game = read_json(root / "round_001/evaluate/consolidated.samples.json")["games"][0]
    for text in (game["turns"][0]["response"], game["outcome"].strip().splitlines()[0]):
        assert text in shown
    buckets = tensor_util.make_ndarray(
        events.Tensors("evaluate/response_tokens_histogram")[-1].tensor_proto
    )
    result = read_json(root / "round_001/evaluate/consolidated.json")
    assert buckets[:, 2].sum() == pytest.approx(result["turns"] * result["games"])
    assert events.Scalars("final/pass_rate")[0].value == pytest.approx(result["pass_rate"])


# --- whole games of an evaluation -----------------------------------------------------------------


def start_evaluation(root, **changes):
    with opened(root, tiny_config(**changes)) as run:
        file = run.workdir.start_evaluation
        evaluation.evaluate(run, policy_of(run, 1), file, round_number=0, name="start", label="x")
    return read_json(samples_of(file))["games"]


def test_every_evaluation_keeps_its_first_games_and_they_can_be_played_again(finished_run):
    place = finished_run / "round_001" / "evaluate"
    text = read_json(finished_run / "round_001/knowledge/chain_00/step_002.json")["text"]
    files = [finished_run / "evaluate" / "start.json"]
    files += [place / "in_context.json", place / "consolidated.json"]
    seeds = environments.heldout_seeds(4)
    for file in files:
        result, kept = read_json(file), read_json(samples_of(file))["games"]
        assert [game["map"] for game in kept] == [0, 1, 2, 3]
        for game, seed, won in zip(kept, seeds, result["passed"][0], strict=True):
            again = environments.make("frozen_lake", seed)
            assert game["board"] == again.board_id()
            for turn in game["turns"]:
                assert turn["observation"] == again.observation()
                assert turn["action"] == again.step(turn["response"])
            assert again.done and game["outcome"] == again.outcome()
            assert game["passed"] == again.passed == (won == "1")
            assert len(game["tokens"]) == len(game["turns"])
            assert game["knowledge"] == (text if file.stem == "in_context" else "")
    listed = {
        entry["path"]
        for stage in read_json(finished_run / "manifest.json")["stages"]
        for entry in stage["files"]
    }
    assert {samples_of(file).relative_to(finished_run).as_posix() for file in files} <= listed


def test_an_interrupted_evaluation_keeps_the_same_games(finished_run, tmp_path, monkeypatch):
    expected = read_json(finished_run / "evaluate" / "start.samples.json")["games"]
    recording = importlib.import_module("oel_jax.actor.recording")
    play, seen = recording.play, []

    def killed_after_three(*arguments):
        for played in play(*arguments):
            seen.append(played)
            yield played
            if len(seen) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(recording, "play", killed_after_three)
    with pytest.raises(KeyboardInterrupt):
        start_evaluation(tmp_path / "run")
    log = tmp_path / "run" / "evaluate" / "start.games.jsonl"
    kept = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("text" in record for record in kept)
    assert not (tmp_path / "run" / "evaluate" / "start.samples.json").exists()
    monkeypatch.setattr(recording, "play", play)
    # A log of an older version has no words: such games are played again.
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    old = [{k: v for k, v in record.items() if k != "text"} for record in kept]
    (tmp_path / "old/evaluate/start.games.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in old)
    )
    for root in (tmp_path / "run", tmp_path / "old"):
        assert start_evaluation(root) == expected
        result = (root / "evaluate" / "start.json").read_bytes()
        assert result == (finished_run / "evaluate" / "start.json").read_bytes()
        assert not (root / "evaluate" / "start.games.jsonl").exists()


def test_at_most_so_many_boards_are_kept(tmp_path):
    kept = start_evaluation(tmp_path, evaluate__maps=8, evaluate__seeds=1)
    assert [game["map"] for game in kept] == list(range(evaluation.SAMPLED))


def test_a_run_with_a_curve_shows_it(finished_run, tmp_path):
    root = copy_of(finished_run, tmp_path / "run", "evaluate")
    go(root, tiny_config(evaluate__curve=(1, 2)), change=True)
    page = read_page(root)
    assert "Accumulation, in context" in page.text
    ((number, measured),) = collect(Workdir(root)).curves.items()
    place = root / "round_001" / "evaluate"
    assert number == 1
    assert measured == [
        (1, read_json(place / "curve_001.json")),
        (2, read_json(place / "in_context.json")),
    ]
    assert "Changed while the run went on" in page.text


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome is installed")

    def opened_page(file: Path, profile: Path) -> tuple[str, str]:
        """(the page after its script ran, what the console said)."""
        done = subprocess.run(
            [
                found,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={profile}",
                "--virtual-time-budget=2000",
                "--enable-logging=stderr",
                "--dump-dom",
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        return done.stdout, "\n".join(console)

    return opened_page


def test_it_opens_without_console_errors(finished_run, tmp_path, browser):
    shown, console = browser(finished_run / "report.html", tmp_path)
    assert console == ""
    text = Reader(shown).text
    start = read_json(finished_run / "evaluate" / "start.samples.json")["games"][0]
    assert (
        start["turns"][0]["response"] in text and start["turns"][0]["observation"].strip() in text
    )
    assert f"turn 1 of {max(len(game['turns']) for game in first_pair(finished_run))}" in text


def first_pair(root):
    files = [root / "evaluate/start.samples.json"]
    files.append(root / "round_001/evaluate/consolidated.samples.json")
    return [read_json(file)["games"][0] for file in files]


def test_hostile_text_does_nothing_in_a_browser(finished_run, tmp_path, browser):
    root = hostile_copy(finished_run, tmp_path / "run")
    report.write(Workdir(root))
    shown, console = browser(root / "report.html", tmp_path / "profile")
    page = Reader(shown)
    assert console == "" and "<title>run: OEL run</title>" in shown
    assert "img" not in {tag for tag, _ in page.tags}
    # The static ones, and on both sides observation, answer and action, once more for the printer.
    assert page.text.count(HOSTILE) >= 3 + 2 * 2 * 3
    # The test can fail: the same page with the text let through does raise its voice.
    (tmp_path / "bad.html").write_text(
        (root / "report.html").read_text().replace("<main>", f"<main>{HOSTILE}")
    )
    assert "Content Security Policy" in browser(tmp_path / "bad.html", tmp_path / "profile")[1]
