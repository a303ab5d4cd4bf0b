"""Every notebook runs from top to bottom with small settings, and shows what it says.

The cells run in this process. A cell tagged `parameters` (as papermill's) holds a notebook's
settings; the tests put smaller ones in their place right after it.
"""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
import tiny_run
from test_topk_kl import float64

from oel_jax import environments
from oel_jax.base.files import read_json, write_json
from oel_jax.config.choices import CORRECTIONS, SUPPORTS, nonsense
from oel_jax.distill.reference import divergence
from oel_jax.runs.workdir import Workdir

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
NAMES = (
    "1_the_loop_step_by_step",
    "2_what_the_knowledge_says",
    "3_the_kl_kernel",
    "4_reading_a_run",
    "5_your_own_game",
)
PNG = "image/png"


@pytest.fixture(autouse=True)
def plots():
    """Plots go nowhere, and are dropped after each test."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def cells_of(name):
    """The code cells of a notebook: (id, source, whether it holds the parameters)."""
    path = Path(__file__).resolve().parents[2] / "notebooks" / f"{name}.ipynb"
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            tags = cell["metadata"].get("tags", [])
            yield f"{name}:{cell['id']}", "".join(cell["source"]), "parameters" in tags


def run(name, **settings):
    """Run a notebook; returns its names and what it printed."""
    names: dict = {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for place, source, holds_parameters in cells_of(name):
            exec(compile(source, place, "exec"), names)
            if holds_parameters:
                assert settings.keys() <= names.keys(), "a test sets what the notebook has not"
                names |= settings
    return names, shown.getvalue()


def test_the_five_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == list(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_read_well_on_a_web_page(path):
    """Run in order, with outputs, small, and with nothing of the machine they were run on."""
    assert path.stat().st_size < 300_000
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first, *cells = notebook["cells"]
    opening = "".join(first["source"])
    assert first["cell_type"] == "markdown" and opening.startswith(f"# {path.stem[0]}. ")
    assert re.search(r"minutes? ", opening), "the first cell says how long it takes"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    pictures = [output for output in outputs if PNG in output.get("data", {})]
    assert bool(pictures) == (path.stem != NAMES[0])
    for picture in pictures:
        del picture["data"][PNG]
    text = json.dumps(notebook)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|opt|var|mnt|Users|private)\b", text)
    assert not re.search(r"https?://|\b\d+\.\d+\.\d+\.\d+\b|[A-Z]:\\\\", text)


@pytest.mark.notebook
def test_1_the_loop_step_by_step():
    names, text = run(
        NAMES[0], BOARDS=12, CHAINS=2, GAMES=2, STEPS=2, GAMES_PER_STEP=4, LEARNING_RATE=1e-3
    )
    lines = re.findall(r"^(\w[\w ,]*?) +(\d+)/12 won", text, re.M)
    won = {name: int(count) for name, count in lines}
    assert won["gold"] >= 9 and won["without"] <= 4, text
    assert won["before, without"] == won["without"]  # the same games
    assert "after, without" in won and len(names["texts"]) == 2 and len(names["losses"]) == 2
    check_the_signal(names)
    # One more update on the last batch: what it minimises must fall.
    parts = (*names["rows"], names["is_response"](names["responses"]))
    params, state, _ = names["update"](names["params"], names["state"], *parts)
    again = names["update"](params, state, *parts)[2]
    assert float(again) < names["losses"][-1]
    # The teacher has stayed what the round began with.
    same = jax.tree.map(np.array_equal, names["frozen"], names["model"].params)
    assert all(jax.tree.leaves(same))


def check_the_signal(names):
    """The per-token KL, computed from logits of rows that are not padded and not aligned."""
    model, own = names["model"], names["own"][0]

    def logits(message):
        ids = model.tokenizer.chat(message, thinking=True)
        return model.logits([[*ids, *own]])[0, len(ids) - 1 : -1]

    told = names["prompts"].play_prompt(names["situation"], names["gold"])
    kl = divergence(logits(names["message"]), logits(told), top_k=64, temperature=0.7)
    assert len(kl) == len(own) and float(kl.max()) > 1
    np.testing.assert_allclose(names["kl"], kl, atol=1e-3)


HOSTILE = "- EXPERIENCE ITEM: $x_{\x1b[31m^"  # ends a colour, begins mathematics


@pytest.mark.notebook
def test_2_what_the_knowledge_says(finished_run, tmp_path, plots):
    workdir = tiny_run.copy_of(finished_run, tmp_path / "run")
    win, lose = "- EXPERIENCE ITEM: G wins the game.", "- EXPERIENCE ITEM: H is deadly."
    texts = [win, "\n".join([lose, win, HOSTILE, lose])]
    write_json(Workdir(workdir).knowledge(1), {"round": 1, "n": 2, "texts": texts})
    before = tiny_run.contents(workdir, "**/*")
    names, text = run(NAMES[1], WORKDIR=str(workdir), MAPS=4, SEEDS=4)
    assert tiny_run.contents(workdir, "**/*") == before  # it only reads
    assert names["chain"] == 1 and "\x1b" not in text
    assert re.search(r"^ +2 +2  G wins the game\.$", text, re.M)  # in two texts, once in each

    variants, passed = names["variants"], names["passed"]
    assert variants["without 2"] == [lose, HOSTILE, lose]
    assert variants["without 4"] == [lose, win, HOSTILE]
    assert variants["no copy of: H is deadly."] == [win, HOSTILE]
    assert sum(name.startswith("only: ") for name in variants) == 3
    assert passed.keys() == variants.keys() and passed["all items"].shape == (4, 4)
    assert passed["all items"].sum() >= 12 and passed["no knowledge"].sum() <= 5

    worth = {bar[0]: bar[1:] for bar in names["bars"]}
    for index in range(4):
        difference = passed["all items"].mean() - passed[f"without {index + 1}"].mean()
        label = next(label for label in worth if label.startswith(f"{index + 1}. "))
        value, low, high, _ = worth[label]
        assert value == pytest.approx(difference) and low <= value <= high
    alone = passed["only: G wins the game."].mean() - passed["no knowledge"].mean()
    assert worth["only: G wins the game."][0] == pytest.approx(alone) and alone > 0.2
    assert worth["2. G wins the game."][0] > 0.2  # nothing else says it
    figure = plots.gcf()
    figure.savefig(io.BytesIO())  # outside text in the labels must not break the drawing
    heights = [bar.get_width() / 100 for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, [bar[1] for bar in names["bars"]], atol=1e-9)


def test_2_reads_items_of_several_lines(finished_run):
    source = next(source for _, source, _ in cells_of(NAMES[1]) if "def items_of" in source)
    function = source[source.index("def items_of") : source.index("def short")]
    names = {"marker": "- EXPERIENCE ITEM:"}
    exec(function, names)
    text = "- EXPERIENCE ITEM: one\n  goes on\n\n- EXPERIENCE ITEM: two"
    found = names["items_of"](text)
    assert [item.split() for item in found] == [
        "- EXPERIENCE ITEM: one goes on".split(),
        "- EXPERIENCE ITEM: two".split(),
    ]
    assert "\n".join(found) == text and names["items_of"]("") == []


@pytest.mark.notebook
def test_3_the_kl_kernel():
    names, text = run(
        NAMES[2],
        TOKENS=24,
        WIDTH=16,
        VOCAB=64,
        SUPPORTS=(1, 16, 64),
        KINDS=("reverse", "jsd"),
        MEMORY_TOKENS=(256,),
        MEMORY_WIDTH=16,
        MEMORY_VOCAB=20_000,
    )
    for k in names["SUPPORTS"]:  # the notebook's formula against the tests' own
        ours = names["formula"](*names["data"][:4], k)
        theirs = float64(*names["data"], k=k, tau=0.7)
        for mine, other in zip(ours[:3], theirs, strict=False):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-9)
    assert np.max(list(names["errors"].values())) < 1e-4
    assert len(names["errors"]) == 3

    useful = [
        (kind, support, correction)
        for kind in names["KINDS"]
        for support in SUPPORTS
        for correction in CORRECTIONS
        if not nonsense(kind, support, correction, names["k"])
    ]
    assert list(names["combinations"]) == useful
    assert np.max(list(names["combinations"].values())) < 1e-3
    assert text.count("refused") == 24 - len(useful) + 1  # the cells, and one reason

    off = names["off"]
    for name in CORRECTIONS:
        assert off[name]["value"][-1] < off[name]["value"][0]
        assert off[name]["gradient"][-1] < off[name]["gradient"][0]
    assert off["renorm"]["value"][0] == 1  # one token, normalised over itself
    assert names["push"]["none"] > 1e3 * max(names["push"]["renorm"], names["push"]["tail"])
    fused, plain, logits = names["memory"][256]
    assert fused < plain / 4 and fused < logits and logits == 4 * 256 * 20_000


@pytest.mark.notebook
def test_4_reading_a_run(tmp_path, plots):
    place = tmp_path / "made"  # there is no such run: the notebook makes it
    changes = tiny_run.FIELDS | {"evaluate.curve": (1,), "consolidate.steps": 2}
    names, text = run(NAMES[3], WORKDIR=str(place), CHANGES=changes)
    workdir = Workdir(place)
    assert names["finished"] == [1] and workdir.finished(1, "evaluate")
    assert re.search(r"^consolidate +round 1: +2 step\(s\): ", text, re.M)

    files = [workdir.start_evaluation]
    files += [workdir.evaluation(1, name) for name in ("curve_001", "in_context", "consolidated")]
    results = [read_json(file) for file in files]
    labels = [point[0] for point in names["points"]]
    assert labels == ["start", "1", "2", "after 1"]
    _, rates, lengths = (plots.figure(number) for number in plots.get_fignums())
    check_points(rates.axes[0], [result["pass_rate"] for result in results])
    bars = [bar for drawn in rates.axes[0].containers for bar in drawn[2][0].get_segments()]
    ends = sorted(tuple(bar[:, 1]) for bar in bars)
    np.testing.assert_allclose(ends, sorted(tuple(result["ci95"]) for result in results))
    start = results[0]["response_tokens"]
    check_points(lengths.axes[0], [result["response_tokens"] / start for result in results])

    # Lengths per board from the raw files.
    found = {}
    for number in (0, 1):
        path = workdir.trajectories(1) / f"deploy_{number:04d}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            game = json.loads(line)
            (board,) = environments.board_ids("frozen_lake", [game["seed"]])
            found.setdefault(board, []).extend(len(t["response_ids"]) for t in game["turns"])
    expected = sorted(float(np.mean(counts)) for counts in found.values())
    assert sorted(names["board_lengths"](1)) == pytest.approx(expected)

    before = tiny_run.contents(place, "**/*")
    run(NAMES[3], WORKDIR=str(place), CHANGES={})
    assert tiny_run.contents(place, "**/*") == before  # a run that is there is only read


def check_points(axes, expected):
    """The drawn points, from left to right, have these heights."""
    drawn = [container[0].get_xydata() for container in axes.containers]
    points = sorted(map(tuple, np.concatenate(drawn)))
    np.testing.assert_allclose(points, list(enumerate(expected)))


@pytest.mark.notebook
def test_5_your_own_game(tmp_path, monkeypatch, plots):
    monkeypatch.setattr(
        environments, "_factories", dict(environments._factories)
    )  # registered for this test
    changes = tiny_run.FIELDS | {"game.name": "treasure", "evaluate.unseen_split": False}
    names, text = run(NAMES[4], WORKDIR=str(tmp_path / "run"), CHANGES=changes)
    workdir = Workdir(tmp_path / "run")
    assert workdir.finished(1, "evaluate")
    path = workdir.trajectories(1) / "deploy_0000.jsonl"
    game = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert game["game"] == "treasure" and "T" in game["turns"][0]["messages"][0]["content"]
    rates = [result["pass_rate"] for result in names["rates"].values()]
    (axes,) = plots.gcf().axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(rates)
    assert "passes" in text and 0.02 < names["won"] / (128 * 20) < 0.12
    source = next(source for _, source, _ in cells_of(NAMES[4]) if "class Treasure" in source)
    body = source[source.index("class Treasure") : source.index("environments.register")]
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 45  # about forty lines


def test_5_the_game_keeps_the_rules_of_games(monkeypatch):
    monkeypatch.setattr(environments, "_factories", dict(environments._factories))
    source = next(source for _, source, _ in cells_of(NAMES[4]) if "class Treasure" in source)
    names: dict = {}
    exec(source, names)
    for seed in range(40):
        game, twin = environments.make("treasure", seed), environments.make("treasure", seed)
        assert isinstance(game, environments.Game) and game.board_id() == twin.board_id()
        assert game.situation().endswith("[d]\n") and game.situation() == twin.situation()
        board = game.board_id()
        assert sorted(board) == sorted("    " + " MMPT")
        won = [moves for moves in itertools.product(names["MOVES"], repeat=4) if wins(seed, moves)]
        assert won, f"seed {seed}: {board!r} cannot be won in four moves"
    game = environments.make("treasure", 1)
    for _ in range(environments.MAX_TURNS):
        assert not game.done and not game.passed
        assert game.step("I do not know") == environments.NO_ACTION
    assert game.done and not game.passed and "round limit" in game.outcome()


def wins(seed, moves):
    """Whether these moves win the game."""
    game = environments.make("treasure", seed)
    for move in moves:
        if not game.done:
            game.step(move)
    return game.passed and "Success" in game.outcome()
