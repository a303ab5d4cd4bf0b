"""Every notebook runs from top to bottom."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict = {}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"], "commit notebooks without outputs"
                exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), names)
    SHOWS[path.stem](shown.getvalue())


def shows_that_knowledge_helps(text):
    won = {name: int(n) for name, n in re.findall(r"^(without|gold) +(\d+)/12 won$", text, re.M)}
    assert won["gold"] >= 9 and won["without"] <= 4, text


# What each notebook must print to have shown its point.
SHOWS = {"one_round_by_hand": shows_that_knowledge_helps}


def test_every_notebook_says_what_it_shows():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWS)
