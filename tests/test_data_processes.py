"""A run on a mixture, in two image sizes, that encodes its captions itself, and its evaluation:
the numbers of several processes are those of one.
"""

import json

import numpy as np
import pytest

from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.run_log import VALIDATION, read_metrics
from tests import processes, tiny
from tests.data import synthetic
from tests.data.synthetic_source import prepare
from tests.test_several_texts import LENGTH
from tests.weights.test_encoder_families import write

DEVICES = 4
SIZES = ((32, 32), (32, 64))

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def write_texts(root, first: int):
    """Data with texts alone: squares and pictures twice as wide."""
    folder = root / "folder"
    folder.mkdir(parents=True)
    lines = []
    for i in range(first, first + 14):
        height, width = SIZES[i % 2]
        image = np.repeat(synthetic.gradient(height, i), width // height, axis=1)
        (folder / f"{i:03d}.png").write_bytes(synthetic.encode(image))
        lines.append({"file": f"{i:03d}.png", "captions": [f"picture number {i}"]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(folder, root / "data", Encoders({}))
    return root / "data"


def evaluate(checkpoint, data, output, count: int) -> float:
    """The held-out loss with text features that the processes compute."""
    command = ["-m", "imagen_jax.evaluate", f"--checkpoint={checkpoint}", f"--data={data}"]
    command += ["--measures=loss", "--rows=4", "--bins=2", "--batch_size=4", f"--output={output}"]
    processes.finish(processes.start(lambda _: command, output, count, DEVICES), output)
    result = json.loads((output / "evaluation.json").read_text())
    assert result["provenance"]["text_features"] == "computed"
    return result["loss"]["heldout"]["overall"]["mean"]


def test_several_processes_train_and_evaluate_as_one(tmp_path):
    """Catches processes that choose different buckets or sets at a step, or encode other captions,
    and collectives that not all of them call.
    """
    paths = [write_texts(tmp_path / name, first) for name, first in (("one", 0), ("two", 50))]
    encoder = write(tmp_path / "clip", "clip")
    options = [
        f"--config={tiny.ROOT}/configs/base_64.py:tiny",
        f"--config.data.mixture=(('{paths[0]}', 1.0), ('{paths[1]}', 2.0))",
        "--config.data.buckets=((8, 8), (8, 16))",
        "--config.text.dim=24",
        f"--config.data.text_length={LENGTH}",
        "--config.text.online=True",
        f"--config.text.online_encoder={encoder}",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=2",
        "--config.mesh.fsdp_min_elements=64",
        "--config.train.validate_every=4",
        "--config.train.validate_rows=4",
        "--config.train.sample_every=0",
        "--config.train.save_every=2",
        *(f"--config.{n.replace('__', '.')}={v}" for n, v in tiny.ONE_LEVEL_UNET.items()),
    ]

    def train(workdir, count, steps):
        command = ["-m", "imagen_jax.train", *options, f"--workdir={workdir}"]
        command.append(f"--config.train.steps={steps}")
        processes.finish(processes.start(lambda _: command, workdir, count, DEVICES), workdir)

    alone, several = tmp_path / "alone", tmp_path / "several"
    train(alone, 1, 6)
    train(several, 1, 2)
    train(several, 2, 6)
    losses = [[row["loss"] for row in read_metrics(run)] for run in (alone, several)]
    assert len(losses[0]) == len(losses[1]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-4)
    rows = [read_metrics(run, VALIDATION) for run in (alone, several)]
    (last,), (other,) = ([row for row in each if row["step"] == 4] for each in rows)
    assert last.keys() == other.keys() and "data/heldout/ema/loss" in last
    for name in last:
        if "_se" not in name and "rise" not in name:
            np.testing.assert_allclose(last[name], other[name], rtol=1e-3, err_msg=name)
    errors = [evaluate(alone, paths[0], tmp_path / f"out_{count}", count) for count in (1, 2)]
    np.testing.assert_allclose(*errors, rtol=1e-4)
