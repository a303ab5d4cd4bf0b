"""Games of one's own: loaded by path, tried before a model is loaded, played in a whole run."""

from pathlib import Path

import pytest
from tiny_run import go, tiny_config

import oel_jax
from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.base.files import read_json
from oel_jax.config.budgets import extractor_budget
from oel_jax.config.checks import validate
from oel_jax.data import prompts
from oel_jax.data.trajectory_files import read
from oel_jax.plan import command as plan

GUESS = Path(__file__).resolve().parents[1] / "guess_game.py"


@pytest.fixture(autouse=True, scope="module")
def same_games_afterwards():
    """Other tests know only the games that come with the package."""
    before = dict(environments._factories)
    yield
    environments._factories.clear()
    environments._factories.update(before)


def guess_config(**changes):
    fields = {
        "game__name": "guess",
        "game__module": str(GUESS),
        "game__max_turns": 8,
        "game__wrapper": "plain",
        "extract__version": "v3",
        "extract__unfinished_thought": "keep",
        "extract__max_prompt": 512,
        "consolidate__steps": 1,
        "evaluate__seeds": 1,
        "sampler__max_len": 640,
    }
    return tiny_config(**fields | changes)


@pytest.mark.e2e
def test_a_game_without_a_grid_goes_through_a_whole_run(tmp_path):
    config = guess_config(preflight__games=2)
    validate(config, games=environments.known(config.game))
    go(tmp_path, config)
    played = read(tmp_path / "round_001" / "trajectories" / "deploy_0000.jsonl")
    turns = [turn for game in played for turn in game.turns]
    assert {game.game for game in played} == {"guess"} and turns
    assert {game.wrapper for game in played} == {"plain"}
    assert not any("on a grid" in turn.messages[0]["content"] for turn in turns)
    assert max(len(game.turns) for game in played) == 8
    result = read_json(tmp_path / "round_001" / "evaluate" / "consolidated.json")
    assert 5 < result["turns"] <= 8
    assert (tmp_path / "round_001" / "policy" / "model.safetensors").exists()
    kept = read_json(tmp_path / "config.json")["game"]
    assert (kept["module"], kept["max_turns"]) == (str(GUESS), 8)


def test_the_planner_takes_it(capsys):
    config = guess_config()
    flags = [f"--config.{path}" for path in ("game.name=guess", "game.max_turns=8")]
    file = Path(__file__).resolve().parents[2] / "configs" / "nano_frozen_lake.py"
    words = [f"--config={file}", "--target=cpu:1", "--no_compile", f"--game_module={GUESS}", *flags]
    assert plan.main(words) == 0, capsys.readouterr().err
    more = extractor_budget(tiny_config(extract__max_prompt=0, extract__previous=False))[0]
    config.extract.max_prompt, config.extract.previous = 0, False
    assert extractor_budget(config)[0] - more == 3 * (config.sampler.max_response + 512)


def test_the_hint():
    with pytest.raises(UserError, match=r"'riddle'; it must be one of .*--game_module=FILE\.py"):
        validate(tiny_config(game__name="riddle"), games=environments.names())
    with pytest.raises(UserError, match=r"game\.max_turns is 8; it must be 5 for frozen_lake"):
        validate(tiny_config(game__max_turns=8))


BODY = GUESS.read_text()
FAULTS = {
    "no_outcome": ("    def outcome(", "    def end(", r"no method outcome\(\)"),
    "number": ('return f"[{guess}]"', "return guess", r"step\(\) gives 0; it must give a str"),
    "newline": ('self._history + "\\n"', "self._history", "exactly one newline"),
    "turns": ("self.turns += 1", "pass", r"turns is 0 before turn 2"),
    "endless": ("self.turns == 8", "self.turns == 9", r"not done after 8 turns.*game\.max_turns"),
    "passed": ("guess == self._secret", "int(guess == 1)", "passed is 0; it must be a bool"),
    "raises": ("found = re", "found = rx", r"step\(\) fails: NameError.*no_such\.py|raises\.py"),
    "start": ("seed // 1000 % 99", "seed // 0", "it does not start: ZeroDivisionError"),
    "board": ("return str(self._secret)", "return str(id(self))", "the same for equal seeds"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_game_is_one_message_before_anything_is_loaded(tmp_path, fault):
    old, new, message = FAULTS[fault]
    assert old in BODY
    file = tmp_path / f"{fault}.py"
    body = BODY.replace(old, new).replace('register("guess"', f'register("{fault}"')
    file.write_text(body)
    config = guess_config(game__name=fault, game__module=str(file))
    with pytest.raises(UserError, match=message):
        oel_jax.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "registers no game"),
        ("x = 1\ny = 1 / 0\n", r"ZeroDivisionError: division by zero \(m\.py, line 2\)"),
        ("import no_such_neighbour\n", "ModuleNotFoundError"),
        (None, "there is no such Python file"),
    ],
)
def test_a_wrong_file_is_one_message(tmp_path, text, message):
    if text is not None:
        (tmp_path / "m.py").write_text(text)
    with pytest.raises(UserError, match=message):
        environments.known(guess_config(game__module=str(tmp_path / "m.py")).game)


def test_a_module_next_to_the_file_can_be_imported(tmp_path):
    (tmp_path / "guess_neighbour.py").write_text("NAME = 'from_neighbour'\n")
    body = BODY.replace('register("guess"', "register(guess_neighbour.NAME")
    (tmp_path / "game.py").write_text("import guess_neighbour\n" + body)
    config = guess_config(game__module=str(tmp_path / "game.py"), game__name="from_neighbour")
    assert "from_neighbour" in environments.known(config.game)


@pytest.mark.parametrize("wrapper", list(prompts.WRAPPERS))
def test_every_wrapper_holds_situation_and_knowledge(wrapper):
    plain = prompts.play_prompt("Guess.\n", wrapper=wrapper)
    told = prompts.play_prompt("Guess.\n", "K {experience}", wrapper)
    assert "K {experience}" in told and "Guess.\n" in told and "Guess.\n" in plain
    assert ("on a grid" in told) == ("on a grid" in plain) == (wrapper == "grid")


def test_a_prompt_that_is_too_long_is_refused_before_weights_are_read(tmp_path):
    config = tiny_config(sampler__max_prompt=4, mesh__fsdp=-1)
    with pytest.raises(UserError, match=r"max_prompt is 4, but the first prompt of frozen_lake"):
        oel_jax.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
