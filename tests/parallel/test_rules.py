"""The rule table of shardings."""

import pytest
from jax import P

from oel_jax.parallel.mesh import spec


def test_names_become_mesh_axes():
    assert spec("vocab", "embed") == P("tp", "fsdp")
    assert spec("batch", None, "heads", None) == P("fsdp", None, "tp", None)
    assert spec() == P()


@pytest.mark.parametrize("names", [("batch", "embed"), ("heads", None, "mlp"), ("vocab",) * 2])
def test_two_dimensions_on_one_axis_are_refused(names):
    with pytest.raises(ValueError, match="split twice over one mesh axis"):
        spec(*names)


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError, match="rows"):
        spec("rows")
