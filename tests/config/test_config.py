"""Every config field has a rule, every rule bites, and the recipes are Table 4's."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from oel_jax import environments
from oel_jax.base.errors import UserError
from oel_jax.config.budgets import chain_seeds, extraction_template, extractor_budget, play_budget
from oel_jax.config.checks import validate
from oel_jax.config.defaults import as_json, default
from oel_jax.config.field import PURPOSES
from oel_jax.config.fields import FIELDS, leaves
from oel_jax.config.fields_run import MAX_TURNS
from oel_jax.config.fit import validate_against_model
from oel_jax.config.presets import apply_preset
from oel_jax.data import prompts
from oel_jax.models.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.py"))


def load(path: Path, preset: str | None = None):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


def change(path: str, value):
    """The default config with one field set, types unchecked (as a config file could do)."""
    config = default()
    group, _, field = path.rpartition(".")
    with config.ignore_type():
        (config[group] if group else config)[field] = value
    return config


def test_every_field_is_in_the_table():
    assert set(leaves(default().to_dict())) == set(FIELDS)


def test_every_default_is_what_its_rule_allows_and_every_field_is_explained():
    for path, field in FIELDS.items():
        assert field.rule(field.default) is None and field.rule.words, path
        assert len(field.doc) > 5 and field.purpose in PURPOSES, path


@pytest.mark.parametrize(
    "path, value",
    [
        ("seed", -1),
        ("seed", 2**31),
        ("seed", True),
        ("rounds", 0),
        ("rounds", 1.5),
        ("preset", "mine"),
        ("compilation_cache", 5),
        ("model.path", "  "),
        ("model.dtype", "float16"),
        ("model.thinking", 1),
        ("model.attention_block", 0),
        ("mesh.fsdp", 0),
        ("mesh.fsdp", -2),
        ("mesh.tp", -1),
        ("game.name", "chess"),
        ("game.layout", "fancy"),
        ("sampler.slots", 0),
        ("sampler.max_len", -1),
        ("sampler.max_len", 8192),
        ("deploy.games_per_step", 0),
        ("deploy.temperature", 0.0),
        ("deploy.temperature", float("nan")),
        ("deploy.top_p", 0.0),
        ("deploy.top_p", 1.01),
        ("deploy.top_k", -1),
        ("extract.chains", 0),
        ("extract.n", 26),
        ("extract.n", "25"),
        ("extract.version", "v2"),
        ("extract.l_max", 0),
        ("extract.max_prompt", 8192),
        ("extract.trajectories", "all"),
        ("extract.outcome", "score"),
        ("extract.item_marker", " "),
        ("extract.item_marker", "a\nb"),
        ("extract.template_file", "no/such/file.txt"),
        ("extract.unfinished_thought", "ask"),
        ("extract.history_markers", "both"),
        ("extract.truncate", "middle"),
        ("extract.experience", "all"),
        ("extract.deduplicate", 1),
        ("extract.no_op", "yes"),
        ("preflight.games", -1),
        ("preflight.games", 1.5),
        ("preflight.on_harm", "ask"),
        ("preflight.least_gain", 1.01),
        ("preflight.least_gain", float("nan")),
        ("consolidate.steps", 0),
        ("consolidate.learning_rate", 0.0),
        ("consolidate.learning_rate", -1e-6),
        ("consolidate.learning_rate", float("inf")),
        ("consolidate.b2", 1.0),
        ("consolidate.clip_norm", 0.0),
        ("consolidate.token_budget", 3583),
        ("consolidate.drop_remainder", -1),
        ("consolidate.drop_remainder", True),
        ("consolidate.knowledge_rng", "other"),
        ("consolidate.moments_dtype", "int8"),
        ("consolidate.teacher_dtype", "float16"),
        ("consolidate.offload", ("moments",)),
        ("lora.rank", 1.5),
        ("lora.alpha", -1.0),
        ("lora.targets", ("q", "x")),
        ("loss.top_k", 0),
        ("loss.temperature", 0.0),
        ("loss.aggregation", "mean"),
        ("evaluate.maps", 129),
        ("evaluate.seeds", 0),
        ("evaluate.seed_mode", "fixed"),
        ("evaluate.curve", (0, 5)),
        ("evaluate.curve", (5, 1)),
        ("evaluate.curve", (5, 26)),
        ("log.tensorboard", "yes"),
        ("log.console_every", -1.0),
    ],
)
def test_a_wrong_value_is_refused_by_field_and_value(path, value):
    with pytest.raises(UserError) as caught:
        validate(change(path, value))
    assert path in str(caught.value)
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


def test_bounds_themselves_are_allowed():
    for path, value in [
        ("seed", 2**31 - 1),
        ("mesh.fsdp", -1),
        ("deploy.top_p", 1),
        ("extract.n", 1),
        ("consolidate.token_budget", 3584),
        ("sampler.max_len", 8193),
        ("evaluate.curve", [1, 25]),
        ("log.console_every", 0),
    ]:
        validate(change(path, value))


def test_an_unknown_field_is_refused_with_the_nearest_name():
    config = default()
    with config.unlocked():
        config.consolidate.learning_rat = 1.0
    with pytest.raises(UserError, match=r"learning_rat is not a field.*consolidate.learning_rate"):
        validate(config)


def test_a_missing_field_is_refused():
    config = default()
    with config.unlocked():
        del config.loss.chunk
    with pytest.raises(UserError, match=r"config\.loss\.chunk is missing"):
        validate(config)


def test_registered_games_are_accepted():
    config = default()
    config.game.name = "maze"
    validate(config, games=("frozen_lake", "maze"))
    with pytest.raises(UserError, match="frozen_lake, sokoban"):
        validate(config)


def test_presets_are_the_columns_of_section_12():
    paper = apply_preset(default(), "paper")
    released = apply_preset(default(), "released")
    # field -> default, paper, released; typed from the table, not from the code
    columns = {
        "deploy.games_per_step": (64, 64, 128),
        "extract.n_run": (25, 25, 50),  # spec 2.1: 50 / 25 for this recipe
        "preflight.games": (16, 0, 0),
        "loss.aggregation": ("token_mean", "seq_mean", "micro_token_mean"),
        "loss.temperature": (0.7, 1.0, 0.7),
        "loss.correction": ("none", "none", "none"),
        "extract.trajectories": ("per_chain", "shared", "per_chain"),
        "extract.outcome": ("full", "none", "full"),
        "extract.item_marker": (
            "- EXPERIENCE ITEM:",
            "-- EXPERIENCE ITEM:",
            "- EXPERIENCE ITEM:",
        ),
        "extract.history_markers": ("text", "text", "tokens"),
        "extract.template_file": (None, "paper", None),
        "extract.unfinished_thought": ("drop", "drop", "keep"),
        "extract.truncate": ("tail", "head", "tail"),
        "evaluate.unseen_split": (True, False, False),
        "evaluate.seed_mode": ("independent", "independent", "constant"),
        "game.layout": ("released", "paper", "released"),
        "consolidate.keep_fp32_master": (False, False, False),
        "consolidate.drop_remainder": (0, 0, 16),
        "rounds": (2, 3, 2),
        "preset": ("default", "paper", "released"),
    }
    usual = leaves(default().to_dict())
    for index, config in ((0, default()), (1, paper), (2, released)):
        expected = usual | {field: values[index] for field, values in columns.items()}
        assert leaves(config.to_dict()) == expected
        validate(config)
    sokoban = default()
    sokoban.game.name = "sokoban"
    assert apply_preset(sokoban, "released").rounds == 3
    with pytest.raises(UserError, match="'best' is unknown.*paper"):
        apply_preset(default(), "best")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", [None, "paper", "released", "recommended"])
def test_config_files_are_valid_under_every_preset(path, preset):
    config = load(path, preset)
    validate(config)
    assert config.preset == (preset or "default")


@pytest.mark.parametrize(
    "name, recipe",
    [
        (
            "frozen_lake_qwen3_1p7b",
            ("Qwen/Qwen3-1.7B", "frozen_lake", True, "v3", False, 15, 2048, 5e-6, 20, 2),
        ),
        (
            "frozen_lake_qwen3_4b",
            ("Qwen/Qwen3-4B", "frozen_lake", True, "v4", True, 25, 8192, 1e-6, 20, 2),
        ),
        (
            "frozen_lake_qwen3_8b",
            ("Qwen/Qwen3-8B", "frozen_lake", True, "v4", True, 50, 8192, 1e-6, 100, 2),
        ),
        (
            "sokoban_qwen3_4b_instruct",
            ("Qwen/Qwen3-4B-Instruct-2507", "sokoban", False, "v4", True, 50, 8192, 1e-6, 100, 3),
        ),
    ],
)
def test_recipes_are_table_4(name, recipe):
    c = load(ROOT / "configs" / f"{name}.py")
    e, t = c.extract, c.consolidate
    found = (c.model.path, c.game.name, c.model.thinking, e.version, e.previous, e.n, e.l_max)
    assert (*found, t.learning_rate, t.steps, c.rounds) == recipe
    assert (e.chains, c.deploy.games_per_step, c.loss.top_k, c.loss.temperature) == (
        10,
        64,
        256,
        0.7,
    )
    assert (t.b1, t.b2, t.eps, t.weight_decay, t.clip_norm) == (0.9, 0.999, 1e-8, 0.01, 1.0)
    assert (c.sampler.max_response, MAX_TURNS, c.evaluate.maps) == (1024, 5, 128)
    assert MAX_TURNS == environments.MAX_TURNS
    assert (c.deploy.temperature, c.deploy.top_p, c.deploy.top_k) == (0.7, 1.0, 0)
    for group in (c.extract, c.evaluate):
        assert (group.temperature, group.top_p, group.top_k) == (0.7, 0.8, 20)


def test_budgets_are_those_of_spec_4_5():
    c = default()
    assert play_budget(c, False) == (2560, 1024)
    assert play_budget(c, True) == (10752, 1024)
    assert extractor_budget(c) == (16896, 8192)
    c.extract.l_max, c.extract.previous = 2048, False
    assert play_budget(c, True) == (4608, 1024)
    assert extractor_budget(c) == (8704, 2048)
    c.extract.max_prompt = 900
    assert extractor_budget(c) == (900, 2048)


def test_chain_seeds():
    assert chain_seeds(default()) == list(range(50, 501, 50))


def test_extraction_template_variants(tmp_path):
    c = default()
    assert extraction_template(c) is None
    c.extract.item_marker = "* FACT:"
    text = extraction_template(c)
    assert text.count("* FACT:") == 4 and "EXPERIENCE ITEM" not in text
    c = default()
    c.extract.template_file = "paper"
    assert "Based on the multi-round interaction history, generate" in (extraction_template(c))
    c.extract.version = "v3"
    assert "(previous experience, the game environment (input)" in (extraction_template(c))
    own = tmp_path / "own.txt"
    own.write_text("Log: {LATEST_EXPERIENCE}\nNothing else")
    c.extract.template_file = str(own)
    with pytest.raises(UserError, match=r"own\.txt.*PREVIOUS_EXPERIENCE"):
        validate(c)


def test_nothing_new_needs_previous_knowledge():
    c = default()
    c.extract.no_op = True
    validate(c)
    c.extract.previous = False
    with pytest.raises(UserError, match=r"config\.extract\.no_op is True.*extract\.previous=False"):
        validate(c)


@pytest.mark.parametrize("kind", ["raw", "none"])
@pytest.mark.parametrize("field", ["model_path", "knowledge_from"])
def test_experience_that_no_extractor_writes_has_no_extractor(kind, field):
    c = default()
    c.extract.experience, c.extract[field] = kind, "somewhere"
    with pytest.raises(UserError, match=rf"extract\.{field} is 'somewhere'.*experience='{kind}'"):
        validate(c)


@pytest.mark.parametrize("version", ["v3", "v4"])
@pytest.mark.parametrize("template", [None, "paper"])
def test_one_sentence_more_says_how_to_write_nothing(version, template):
    c = default()
    c.extract.version, c.extract.template_file = version, template
    plain = extraction_template(c)
    if plain is None:
        plain = {"v3": prompts.GAME_V3, "v4": prompts.GAME_V4}[version]
    c.extract.no_op = True
    sentence = "If the interaction history teaches nothing beyond the previous experience, answer "
    assert extraction_template(c) == f"{plain}\n{sentence}exactly: NO NEW EXPERIENCE\n"
    validate(c)


def test_repeated_deploy_boards_are_remarked():
    c = default()
    c.consolidate.steps = 100
    assert not validate(c)
    c.deploy.games_per_step = 128
    assert "12944" in validate(c)[0]  # 16 of them for the pre-flight


MODEL = ModelConfig.from_hf(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 304,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
)


@pytest.mark.parametrize(
    "fields, devices, message",
    [
        ({"loss.top_k": 305}, 1, r"config\.loss\.top_k is 305.*304"),
        ({"evaluate.top_k": 301}, 1, r"config\.evaluate\.top_k is 301.*300"),
        ({}, 8, r"mesh\.fsdp=1 x config\.mesh\.tp=1.*8 device"),
        ({"mesh.fsdp": -1, "mesh.tp": 3}, 8, r"tp to one of \[1, 2, 4, 8\]"),
        ({"mesh.fsdp": -1, "mesh.tp": 4}, 8, r"tp=4 does not divide.*kv_heads = 2.*\[1, 2\]"),
        ({"mesh.fsdp": -1, "sampler.slots": 12}, 8, r"fsdp=8 does not divide.*slots = 12"),
        (
            {"mesh.fsdp": -1, "sampler.prefill_rows": 4},
            8,
            r"fsdp=8 .*prefill_rows = 4.*\[1, 2, 4\]",
        ),
        (
            {"mesh.fsdp": -1, "sampler.slots": 7, "sampler.prefill_rows": 7},
            7,
            r"fsdp=7 does not divide.*hidden_size = 64",
        ),
        ({"extract.l_max": 30000}, 1, r"extract\.l_max.* 40960 positions"),
    ],
)
def test_what_does_not_fit_the_model_or_the_devices(fields, devices, message):
    config = default()
    for path, value in fields.items():
        group, _, field = path.rpartition(".")
        config[group][field] = value
    with pytest.raises(UserError, match=message):
        validate_against_model(config, MODEL, 300, devices)


def test_what_fits_the_model_and_the_devices():
    config = default()
    validate_against_model(config, MODEL, 300, 1)
    config.mesh.fsdp, config.mesh.tp = -1, 2
    validate_against_model(config, MODEL, 300, 8)


def test_json_form_has_only_json_types():
    config = default()
    config.evaluate.curve = (1, 2)
    assert as_json(config)["evaluate"]["curve"] == [1, 2]


# Settings that do not go together, one of each message of that kind.
CLASHES = [
    {"extract.experience": "own_game", "negative_control": "foreign_top_k"},
    {"extract.experience": "own_game", "consolidate.mode": "off_policy"},
    {"extract.experience": "own_game", "evaluate.curve": (1,)},
    {"extract.experience": "hindsight", "consolidate.mode": "sft"},
    {"extract.experience": "coach", "evaluate.in_context": True},
    {"extract.experience": "coach", "extract.template_file": "paper"},
    {"extract.experience": "coach", "extract.history_markers": "tokens"},
    {"extract.experience": "raw", "extract.drop_quotes": True},
    {"extract.experience": "own_game", "extract.review": True},
    {"extract.experience": "raw", "extract.model_path": "nano"},
    {"extract.experience": "none", "extract.knowledge_from": "runs/x"},
    {"extract.knowledge_from": "runs/x", "extract.model_path": "nano"},
    {"extract.no_op": True, "extract.previous": False},
    {"extract.n": 26},
    {"extract.max_prompt": 100},
    {"sampler.max_len": 100},
    {"consolidate.token_budget": 100},
    {"consolidate.mode": "sft", "loss.divergence": "forward"},
    {"consolidate.mode": "sft", "loss.support": "union"},
    {"consolidate.mode": "sft", "loss.correction": "renorm"},
    {"consolidate.mode": "sft", "consolidate.teacher": "ema"},
    {"consolidate.teacher": "ema", "consolidate.retention": "plain"},
    {"consolidate.teacher": "ema", "consolidate.offload": ("teacher",)},
    {"model.dtype": "float32", "consolidate.offload": ("masters",)},
    {"loss.aggregation": "micro_token_mean"},
    {"loss.support": "full", "loss.correction": "tail"},
    {"loss.support": "teacher"},
    {"loss.correction": "renorm", "loss.top_k": 1},
    {"guard.skill_drop": 0.1},
    {"evaluate.steps": (20,)},
    {"lora.rank": 4, "consolidate.teacher_dtype": "float32"},
    {"lora.rank": 4, "consolidate.offload": ("masters",)},
    {"lora.rank": 4, "consolidate.teacher": "ema"},
    {"lora.rank": 4, "consolidate.keep_fp32_master": True},
    {"lora.rank": 4, "guard.skill_drop": 0.1, "evaluate.skills": True},
]
_LITERAL = r"'[^']*'|\d[\d.]*|True|False|None|\(\)"


def advised(message: str) -> list[tuple[str, object]]:
    """(field, value) of everything that a message says a field must or can be."""
    found = [
        (field, ast.literal_eval(value))
        for field, value in re.findall(
            rf"([a-z_]+\.[a-z_]+|negative_control)=({_LITERAL})", message
        )
    ]
    wrong = re.match(r"config\.(\S+) is .*?; it must be (?:at (?:least|most) )?(.*)", message)
    if wrong:
        values = re.match(rf"(?:(?:{_LITERAL})(?: or |, )?)*", wrong[2])[0]
        found += [(wrong[1], ast.literal_eval(v)) for v in re.findall(_LITERAL, values)]
    return found


@pytest.mark.parametrize("clash", CLASHES, ids=lambda clash: " ".join(clash))
def test_advice_is_not_refused(clash):
    """Whatever value a message names is one that its field may have; one of them is the way out."""
    config = default()
    config.update_from_flattened_dict(clash)
    with pytest.raises(UserError) as caught:
        validate(config)
    message = str(caught.value)
    for field, value in advised(message):
        must = FIELDS[field].rule(value)
        assert must is None, f"{message!r} names {value!r} for {field}, which must be {must}"
    outcomes = set()
    for field, value in advised(message):
        with config.ignore_type():
            changed = config.copy_and_resolve_references()
            changed.update_from_flattened_dict({field: value})
        try:
            validate(changed)
            outcomes.add("accepted")
        except UserError as error:
            outcomes.add("another matter" if str(error) != message else "the same again")
    relative = "at most config" in message or "below config" in message or "without '" in message
    assert outcomes & {"accepted", "another matter"} or relative, message
