"""tools/scaling.py: which slices it asks for, and what it makes of their plans."""

import pytest

from imagen_jax.hardware import topology
from tools import scaling


@pytest.mark.parametrize("chip, chips, slices", [("v5p", 8, 1), ("v5p", 2048, 1), ("v4", 1024, 1), ("v5e", 256, 1), ("v5e", 2048, 8), ("v6e", 512, 2)])
def test_topologies(chip, chips, slices):
    """Catches cores taken for chips, and a slice that does not exist."""
    place = topology.parse(scaling.topology_name(chip, chips))
    assert (place.chip.name, place.chips, place.slices) == (chip, chips, slices)


def test_slices_that_do_not_exist():
    """Catches 384 chips planned as 256."""
    with pytest.raises(ValueError, match="multiple of 256"):
        scaling.topology_name("v5e", 384)


def planned(chips, batch, compute, traffic, exposed=0.0):
    step = max(compute, traffic) + exposed
    time = {"compute_s": compute, "parameter_traffic_s": traffic, "exposed_traffic_s": exposed, "update_s": 0.0, "step_s": step, "mfu": 0.5}
    return {"chips": chips, "topology": f"v5p:{chips}", "mesh": {"data": chips}, "batch": batch, "time": time}


def test_efficiency():
    """Catches efficiency by step time where the batch changes, hidden traffic counted, and traffic that is not hidden left out."""
    rows = scaling.compared([planned(8, 64, 0.1, 0.05), planned(64, 512, 0.1, 0.05, 0.1), planned(64, 64, 0.02, 0.05)])
    assert [row["efficiency_hidden"] for row in rows] == pytest.approx([1.0, 0.5, 0.1 / 0.05 / 8])
    assert [row["efficiency_in_turn"] for row in rows] == pytest.approx([1.0, 0.15 / 0.25, 0.15 / 0.07 / 8])
    assert scaling.table(rows).count("\n") == 4 and scaling.picture(rows, "title")[:4] == b"\x89PNG"
