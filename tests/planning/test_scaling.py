"""tools/scaling.py: the slices that it plans for, and the comparison of their plans."""

import json

import pytest

from imagen_jax.hardware import topology
from tools import scaling


@pytest.mark.parametrize(
    "chip, chips, slices",
    [
        ("v5p", 8, 1),
        ("v5p", 2048, 1),
        ("v4", 1024, 1),
        ("v5e", 256, 1),
        ("v5e", 2048, 8),
        ("v6e", 512, 2),
    ],
)
def test_topologies(chip, chips, slices):
    """Catches cores counted as chips, and a slice that does not exist."""
    hardware = scaling.slices_of(chip, chips)
    assert (hardware.chip.name, hardware.chips, hardware.slices) == (
        chip,
        chips,
        slices,
    ) and topology.parse(str(hardware)) == hardware


@pytest.mark.parametrize(
    "chip, chips, message",
    [
        ("v5e", 384, "--chips 384: .* multiple of 256"),
        ("v5p", 3, "--chips 3: there is no slice of 3 v5p chips"),
        ("v5e", 256 * 65, "--chips 16640: 65 slices"),
    ],
)
def test_slices_that_do_not_exist(chip, chips, message):
    """Catches 384 chips planned as 256, and an error about --topology for a wrong --chips."""
    with pytest.raises(ValueError, match=f"^{message}"):
        scaling.slices_of(chip, chips)


@pytest.mark.parametrize(
    "mesh, chip, chips, fsdp",
    [
        ((16, 1), "v5p", 8, 8),
        ((16, 1), "v5p", 2048, 16),
        ((3, 1), "v5p", 8, 1),
        ((16, 2), "v5p", 8, 4),
        ((512, 1), "v5e", 512, 256),
        ((-1, 1), "v5p", 8, -1),
    ],
)
def test_fsdp_on_few_chips(mesh, chip, chips, fsdp):
    """Catches an fsdp that the chips of the other axes or of one slice do not allow, and -1 read as
    1.
    """
    assert (
        scaling.fsdp_on(
            {"data": -1, "fsdp": mesh[0], "model": 1, "spatial": mesh[1]},
            scaling.slices_of(chip, chips),
        )
        == fsdp
    )


def test_a_batch_that_would_be_replaced(tmp_path, capsys):
    """Catches a config field that is silently ignored."""
    with pytest.raises(SystemExit):
        scaling.main(
            [
                "--config=configs/base_64.py:tiny",
                "--rows=8",
                f"--output={tmp_path}",
                "--config.data.batch_size=3",
            ]
        )
    assert "follows from --rows or --batch" in capsys.readouterr().err


def planned(chips, batch, compute, gathers, sums=0.0):
    step = max(compute, gathers) + sums
    time = {
        "compute_s": compute,
        "gathers_s": gathers,
        "sums_s": sums,
        "exposed_traffic_s": 0.0,
        "update_s": 0.0,
    }
    time |= {"step_s": step, "in_turn_s": compute + gathers + sums, "mfu": 0.5}
    return {
        "chips": chips,
        "topology": f"v5p:{chips}",
        "mesh": {"data": chips},
        "batch": batch,
        "time": time,
    }


def test_efficiency():
    """Catches efficiency by step time where the batch changes, overlapped communication counted,
    and exposed communication left out.
    """
    rows = scaling.compared(
        [planned(8, 64, 0.1, 0.05), planned(64, 512, 0.1, 0.05, 0.1), planned(64, 64, 0.02, 0.05)]
    )
    assert [row["efficiency_beside"] for row in rows] == pytest.approx([1.0, 0.5, 0.1 / 0.05 / 8])
    assert [row["efficiency_in_turn"] for row in rows] == pytest.approx(
        [1.0, 0.15 / 0.25, 0.15 / 0.07 / 8]
    )
    assert scaling.table(rows).count("\n") == 4 and scaling.picture(rows, "title")[:4] == b"\x89PNG"


def test_a_plan_of_an_earlier_version_is_made_again(tmp_path):
    """Catches times without the parts that the table shows, and a plan that does not fit, and so
    has no times, made again for ever.
    """
    assert not scaling.is_planned(tmp_path)
    for content, enough in (
        ({"time": {"compute_s": 1.0, "parameter_traffic_s": 1.0}}, False),
        (planned(8, 64, 0.1, 0.05), True),
        ({"memory": {}}, True),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        assert scaling.is_planned(tmp_path) == enough
