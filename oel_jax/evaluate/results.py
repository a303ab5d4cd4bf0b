"""What an evaluation leaves: scores with intervals, and which documents were passed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from oel_jax.evaluate.responses import Answer
from oel_jax.report.intervals import board_clustered_interval, student_t_quantile

# The metric a task is known by, where it is not the first of its list.
_HEADLINES = {"ifeval": "prompt_level_strict_acc"}


def summarise(
    name: str, evaluated: Mapping[str, Any], answers: Sequence[Answer], truncated: int
) -> dict[str, Any]:
    """The result of one policy on one name of --lm_eval_tasks, in plain JSON types.

    Args:
      name: a task, group or tag.
      evaluated: what `lm_eval.evaluator.evaluate` returned, samples included.
      answers: all responses that were made for it.
      truncated: prompts that lost their beginning.

    Returns:
      `scores`: one entry for a task or for a group that the harness averages, else one per task;
      `metrics`: every metric of every task; each with value, standard error, 95 % interval
      and n. `per_sample`: 0/1 strings (or numbers) of each metric in the order of the documents.
      Intervals are Wilson's where the metric is a share of documents, else value +- t * stderr.
    """
    metrics, per_sample = [], {}
    for task, values in sorted(evaluated["results"].items()):
        samples = evaluated["samples"].get(task, [])
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            flags = _by_document(samples, metric, chosen)
            n = int(evaluated["n-samples"][task]["effective"]) if samples else _documents(evaluated)
            stderr = values.get(f"{metric}_stderr,{chosen}")
            entry = {"task": task, "metric": metric, "filter": chosen, "value": _finite(value)}
            entry |= _uncertainty(value, stderr, flags, n) | {"n": n}
            metrics.append(entry)
            if flags is not None:
                per_sample.setdefault(task, {})[f"{metric},{chosen}"] = _compact(flags)
    result = {"name": name, "scores": _headlines(name, metrics), "metrics": metrics}
    if answers:
        result |= {
            "response_tokens": float(np.mean([answer.tokens for answer in answers])),
            "cut_by_budget": sum(not answer.stopped for answer in answers),
        }
    return result | {"truncated_prompts": truncated, "per_sample": per_sample}


def _headlines(name: str, metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first metric of `name` itself, else of each of its tasks."""
    first: dict[str, Any] = {}
    for entry in metrics:
        task = entry["task"]
        if entry["metric"] == _HEADLINES.get(task, entry["metric"]):
            first.setdefault(task, entry)
    return [dict(first[name])] if name in first else [dict(entry) for entry in first.values()]


def _documents(evaluated: Mapping[str, Any]) -> int:
    """Documents of all tasks together: what a group's value is made of."""
    return sum(int(counts["effective"]) for counts in evaluated["n-samples"].values())


def _by_document(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> list | None:
    """One value per document, or None for a metric that documents have no value of."""
    of_filter = [sample for sample in samples if sample["filter"] == chosen]
    if not of_filter or not all(metric in sample for sample in of_filter):
        return None
    of_filter.sort(key=lambda sample: sample["doc_id"])
    return [sample[metric] for sample in of_filter]


def _is_flag(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or (
        isinstance(value, (int, float, np.number)) and float(value) in (0.0, 1.0)
    )


def _compact(values: Sequence[Any]) -> str | list[Any]:
    """'0110' for flags; a string for each document where it has several; otherwise numbers."""
    if all(_is_flag(value) for value in values):
        return "".join("01"[int(value)] for value in values)
    return [_compact(v) if isinstance(v, (list, tuple)) else _plain(v) for v in values]


def _plain(value: Any) -> Any:
    number = isinstance(value, (int, float, np.number, np.bool_))
    return _finite(float(value)) if number else str(value)


def _finite(value: float) -> float | str:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else str(float(value))


def _uncertainty(value: float, stderr: Any, flags: Sequence[Any] | None, n: int) -> dict[str, Any]:
    """`stderr` as the harness gives it (None: it has none), and `ci95`."""
    known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
    found: dict[str, Any] = {"stderr": float(stderr) if known else None, "ci95": None}
    if flags and all(_is_flag(flag) for flag in flags):
        passes = np.array(flags, dtype=np.float64)
        if math.isclose(float(passes.mean()), value, abs_tol=1e-9):
            # Documents take the place of boards, and each is its own cluster.
            _, low, high = board_clustered_interval(passes[None], list(map(str, range(n))))
            return found | {"ci95": [low, high]}
    if known and n > 1 and math.isfinite(value):
        half = student_t_quantile(0.975, n - 1) * float(stderr)
        found["ci95"] = [float(value - half), float(value + half)]
    return found
