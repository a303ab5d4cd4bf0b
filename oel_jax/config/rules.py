"""What each config field may be: one rule per field, used by `oel_jax.config.defaults.validate`."""

import math
import re
from collections.abc import Callable
from typing import Any

from oel_jax.config.choices import CORRECTIONS, SUPPORTS
from oel_jax.config.negative_control import CONTROLS
from oel_jax.machine import paths

PRESETS = ("default", "paper", "released", "recommended")
AUTO = "auto"  # a field that oel_jax/plan/auto.py decides at the start
HELD_OUT_BOARDS = 128  # evaluation seeds of spec 3.2

Rule = Callable[[Any], str | None]  # a value -> what it must be, or None if it is right


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Rule:
    bounds = f"{'above' if open_low else 'at least'} {low:.10g}"
    bounds += f" and at most {high:.10g}" if high < math.inf else ""

    def check(value: Any) -> str | None:
        right = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (value > low if open_low else value >= low)
            and value <= high
        )
        return None if right else f"a number {bounds}"

    return check


def _integer(low: int, high: float = math.inf) -> Rule:
    in_range = _number(low, high)

    def check(value: Any) -> str | None:
        wrong = in_range(value)
        if not wrong and isinstance(value, int):
            return None
        return (wrong or in_range(math.nan)).replace("a number", "an integer")

    return check


def _choice(*values: Any) -> Rule:
    def check(value: Any) -> str | None:
        # `is`-like type check: True must not pass for 1
        right = any(value == v and type(value) is type(v) for v in values)
        return None if right else " or ".join(map(repr, values))

    return check


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "a text that is not empty"


def _any_text(value: Any) -> str | None:
    return None if isinstance(value, str) else "a text"


def _path(value: Any) -> str | None:
    return _text(value) or paths.wrong(value)


def _path_or_empty(value: Any) -> str | None:
    return _any_text(value) or (paths.wrong(value) if value else None)


# What JAX itself can keep compiled programs in, and the package it needs for that beside etils.
BUCKETS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}


def _cache(value: Any) -> str | None:
    kind = paths.scheme(value) if isinstance(value, str) else None
    in_full = kind in BUCKETS and value.lower().startswith(f"{kind}://")
    return None if in_full else _path_or_empty(value)


def _one_line(value: Any) -> str | None:
    right = _text(value) is None and "\n" not in value and value == value.strip()
    return None if right else "one line of text without space at its ends"


def _steps(value: Any) -> str | None:
    right = isinstance(value, (tuple, list)) and all(type(item) is int for item in value)
    right = right and list(value) == sorted(set(value)) and all(item >= 1 for item in value)
    return None if right else "increasing integers of at least 1, e.g. (1, 5, 25)"


def _band(value: Any) -> str | None:
    right = isinstance(value, (tuple, list)) and len(value) in (0, 2)
    right = right and all(type(item) in (int, float) and math.isfinite(item) for item in value)
    if right and (not value or 0 <= value[0] < 1 < value[1]):
        return None
    return "() or (low, high) with low below 1 and high above 1, e.g. (0.5, 2.0)"


_FLAG = _choice(True, False)
_POSITIVE = _integer(1)
_TEMPERATURE = _number(0, open_low=True)  # greedy decoding: top_k=1
_TOP_P = _number(0, 1, open_low=True)
_DTYPE = _choice("float32", "bfloat16")


_ADAPTABLE = ("q", "k", "v", "o", "gate", "up", "down")  # as lm.model.ADAPTABLE
_AWAY = ("optimizer", "masters", "teacher")


def _some(*among: str) -> Rule:
    def check(value: Any) -> str | None:
        names = value.split(",") if isinstance(value, str) else []
        right = names and set(names) <= set(among) and len(names) == len(set(names))
        return None if right else f"some of {','.join(among)}, with commas and no spaces"

    return check


def _offload(value: Any) -> str | None:
    wrong = None if value == "none" else _some(*_AWAY)(value)
    return wrong and f"'none' or {wrong}"


def _profile(value: Any) -> str | None:
    try:
        traced_steps(value)
    except ValueError:
        return "'' or 'step:FIRST..LAST' with 1 <= FIRST <= LAST, e.g. 'step:10..12'"
    return None


def traced_steps(text: str) -> range:
    """The optimizer steps that `config.profile` asks for: 'step:10..12' -> range(10, 13).

    Raises:
      ValueError: it is neither '' nor of that form.
    """
    if text == "":
        return range(0)
    found = re.fullmatch(r"step:([1-9]\d*)\.\.([1-9]\d*)", text) if type(text) is str else None
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(text)
    return range(int(found[1]), int(found[2]) + 1)


def _or_auto(rule: Rule) -> Rule:
    def check(value: Any) -> str | None:
        wrong = None if value == AUTO and type(value) is str else rule(value)
        return wrong and f"{wrong}, or {AUTO!r}"

    return check


def _count_or_minus_one(value: Any) -> str | None:
    wrong = None if value == -1 and type(value) is int else _integer(1)(value)
    return wrong and f"{wrong}, or -1 for all devices that config.mesh.tp leaves"


def rules() -> dict[str, Rule]:
    """Field path -> rule; the tests check that every field of `default()` has one."""
    table: dict[str, Rule] = {
        "seed": _integer(0, 2**31 - 1),
        "rounds": _POSITIVE,
        "preset": _choice(*PRESETS),
        "compilation_cache": _cache,
        "negative_control": _choice("none", *CONTROLS),
        "profile": _profile,
        "mesh.fsdp": _or_auto(_count_or_minus_one),
        "sampler.slots": _or_auto(_POSITIVE),
        "log.console_every": _number(0),
    }
    groups: dict[str, dict[str, Rule]] = {
        "model": {
            "path": _path,
            "dtype": _DTYPE,
            "thinking": _FLAG,
            "attention_block": _POSITIVE,
            "check_weights": _FLAG,
        },
        "mesh": {"tp": _or_auto(_POSITIVE)},
        "game": {
            "name": _text,
            "module": _path_or_empty,
            "max_turns": _POSITIVE,
            "wrapper": _choice("grid", "plain"),
            "layout": _choice("released", "paper"),
        },
        "sampler": {
            **dict.fromkeys(
                (
                    "decode_steps",
                    "prefill_rows",
                    "prefill_chunk",
                    "max_prompt",
                    "max_response",
                ),
                _POSITIVE,
            ),
            "max_len": _integer(0),
            "overlap": _FLAG,
            "weights": _choice("split", "whole"),
        },
        "deploy": {"games_per_step": _POSITIVE},
        "extract": {
            **dict.fromkeys(("chains", "n", "n_run", "l_max"), _POSITIVE),
            "max_prompt": _integer(0),
            "draft_tokens": _integer(0, 32),
            "version": _choice("v3", "v4"),
            "previous": _FLAG,
            "trajectories": _choice("per_chain", "shared"),
            "outcome": _choice("full", "text_only", "none"),
            "history_markers": _choice("text", "tokens"),
            "item_marker": _one_line,
            "template_file": _path_or_empty,
            "unfinished_thought": _choice("drop", "keep"),
            "truncate": _choice("tail", "head"),
            "model_path": _path_or_empty,
            "experience": _choice("knowledge", "raw", "none", "own_game"),
            "knowledge_from": _path_or_empty,
            "deduplicate": _FLAG,
            "no_op": _FLAG,
        },
        "preflight": {
            "games": _integer(0),
            "on_harm": _choice("warn", "stop"),
            "least_gain": _number(-1, 1),
        },
        "consolidate": {
            **dict.fromkeys(("steps", "token_budget", "save_every"), _POSITIVE),
            "mode": _choice("on_policy", "off_policy", "sft"),
            "save_minutes": _number(0),
            "learning_rate": _number(0, 1, open_low=True),
            "b1": _number(0, 0.9999999),
            "b2": _number(0, 0.9999999),
            "eps": _number(0, 1, open_low=True),
            "weight_decay": _number(0, 1),
            "clip_norm": _number(0, open_low=True),
            "temperature": _TEMPERATURE,
            "drop_remainder": _integer(0),
            "keep_fp32_master": _FLAG,
            "remat": _choice("none", "products", "layer"),
            "knowledge_rng": _choice("released"),
            "moments_dtype": _DTYPE,
            "teacher_dtype": _choice("", "float32", "bfloat16"),
            "offload": _offload,
            "turn_fraction": _number(0, 1, open_low=True),
            "turn_floor": _number(0),
            "retention": _choice("none", "plain", "knowledge"),
            "retention_weight": _number(0),
            "teacher": _choice("frozen", "ema", "trust_region"),
            "teacher_rate": _number(0, 1, open_low=True),
        },
        "lora": {
            "rank": _integer(0),
            "alpha": _number(0, open_low=True),
            "targets": _some(*_ADAPTABLE),
        },
        "guard": {
            "response_tokens": _band,
            "entropy": _band,
            "skill_drop": _number(0, 1),
        },
        "loss": {
            "top_k": _POSITIVE,
            "temperature": _TEMPERATURE,
            "divergence": _choice("", "reverse", "forward", "jsd"),
            "support": _choice("", *SUPPORTS),
            "correction": _choice(*CORRECTIONS),
            "aggregation": _choice("token_mean", "seq_mean", "micro_token_mean", "trajectory_mean"),
            "chunk": _POSITIVE,
        },
        "evaluate": {
            "maps": _integer(1, HELD_OUT_BOARDS),
            "seeds": _POSITIVE,
            "seed_mode": _choice("independent", "constant"),
            "unseen_split": _FLAG,
            "in_context": _FLAG,
            "skills": _FLAG,
            "steps": _steps,
            "curve": _steps,
        },
        "log": {"tensorboard": _FLAG},
    }
    sampling = {"temperature": _TEMPERATURE, "top_p": _TOP_P, "top_k": _integer(0)}
    for group in ("deploy", "extract", "evaluate"):
        groups[group] |= sampling
    for group, fields in groups.items():
        table |= {f"{group}.{field}": rule for field, rule in fields.items()}
    return table
