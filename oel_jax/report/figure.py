"""The curve of pass rates as a PNG, for TensorBoard, which shows no SVG."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from oel_jax.report.run_data import Evaluation

WIDTH, HEIGHT = 1280, 800  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 120, 40, 90, 80
_INK, _GRID, _LEVEL = "#3b444d", "#d5dbe1", "#8a949e"
_GROUPS = (
    ("without knowledge", ("start", "consolidated"), "#0b62a8"),
    ("knowledge in context", ("in_context",), "#c2570c"),
)


def place(x: float, rate: float, rounds: int) -> tuple[float, float]:
    """Pixel of a pass rate (a fraction) at a place on the axis of rounds, 0 to `rounds`."""
    across = _LEFT + 30 + (WIDTH - _LEFT - _RIGHT - 60) * x / max(1, rounds)
    return across, HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * rate


def pass_rates(evaluations: Sequence[Evaluation]) -> bytes:
    """PNG of pass rates with 95 % intervals over rounds, with random policy and perfect play.

    Args:
      evaluations: at least one, by x; see `data.Evaluation`.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=28)
    rounds = max(evaluation.round for evaluation in evaluations)
    for part in range(5):
        height = place(0, part / 4, rounds)[1]
        draw.line([(_LEFT, height), (WIDTH - _RIGHT, height)], fill=_GRID, width=2)
        draw.text((_LEFT - 14, height), f"{part * 25} %", fill=_INK, font=font, anchor="rm")
    for number in range(0, rounds + 1, max(1, rounds // 10)):
        across, bottom = place(number, 0, rounds)
        name = f"round {number}" if number else "start"
        draw.text((across, bottom + 16), name, fill=_INK, font=font, anchor="mt")
    for key in ("random_policy", "perfect_play"):
        level = evaluations[-1].result.get(key)
        if level is not None:
            height = place(0, level, rounds)[1]
            for across in range(_LEFT, WIDTH - _RIGHT, 24):
                draw.line([(across, height), (across + 8, height)], fill=_LEVEL, width=3)
    for index, (name, kinds, colour) in enumerate(_GROUPS):
        left = _LEFT + 30 + index * 420
        draw.line([(left, 40), (left + 50, 40)], fill=colour, width=5)
        draw.text((left + 62, 40), name, fill=_INK, font=font, anchor="lm")
        _curve(draw, [e for e in evaluations if e.kind in kinds], rounds, colour)
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def _curve(draw, evaluations: Sequence[Evaluation], rounds: int, colour: str) -> None:
    points = [place(e.x, e.result["pass_rate"], rounds) for e in evaluations]
    for (across, _), evaluation in zip(points, evaluations, strict=True):
        ends = [place(evaluation.x, end, rounds)[1] for end in evaluation.result["ci95"]]
        draw.line([(across, ends[0]), (across, ends[1])], fill=colour, width=2)
        for end in ends:
            draw.line([(across - 10, end), (across + 10, end)], fill=colour, width=2)
    if len(points) > 1:
        draw.line(points, fill=colour, width=5, joint="curve")
    for across, height in points:
        draw.ellipse((across - 9, height - 9, across + 9, height + 9), fill=colour)
