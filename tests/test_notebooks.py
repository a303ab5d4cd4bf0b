"""Every notebook runs from top to bottom."""

import contextlib
import io
import json
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
    assert "gold" in shown.getvalue()


def test_there_are_notebooks():
    assert NOTEBOOKS
