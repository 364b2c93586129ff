"""`rate export`: the plain manifest, which is read again, and GenEval's folders."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.data.sources.caption_files import GENEVAL
from tests.evals.rating import studies, test_study


def pixel(path):
    with Image.open(path) as image:
        return np.asarray(image)[0, 0].tolist()


def test_a_manifest_is_read_again(tmp_path):
    """Catches pictures of other prompts, checksums of other bytes, and prompts left out."""
    (tmp_path / "prompts.txt").write_text("\n".join(test_study.PROMPTS))
    test_study.write_pictures(tmp_path / "ours", 0, prompts=3, each=2)
    suite = ["--suite=prompts", f"--suite_file={tmp_path / 'prompts.txt'}"]
    first, second = tmp_path / "first", tmp_path / "second"
    for source, output in ((tmp_path / "ours", first), (first, second)):
        studies.call("export", [f"--pictures={source}", *suite, f"--output={output}"])
    lines = (first / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt_id"] for row in rows] == [0, 0, 1, 1, 2, 2]
    for k, row in enumerate(rows):
        assert row["prompt"] == test_study.PROMPTS[row["prompt_id"]]
        content = (first / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        original = tmp_path / "ours" / f"{row['prompt_id']:05d}_{k % 2}.png"
        assert pixel(first / row["file"]) == pixel(original)
    assert (second / "manifest.jsonl").read_text().splitlines() == lines


def write_geneval(path):
    """A list with the sizes of GenEval's. Returns the prompts."""
    tags = [tag for tag, size in GENEVAL.items() for _ in range(size)]
    rows = [{"tag": tag, "include": [], "prompt": f"{tag} {n}"} for n, tag in enumerate(tags)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_geneval_folders(tmp_path):
    """Catches a picture in the folder of another prompt, and an incomplete set that is written."""
    rows = write_geneval(tmp_path / "geneval.jsonl")
    ours = tmp_path / "ours"
    ours.mkdir()
    for n in range(len(rows)):
        color = np.array([n % 256, n // 256, 7], np.uint8)
        Image.fromarray(np.tile(color, (4, 4, 1))).save(ours / f"{n}.png")
    options = [
        f"--pictures={ours}",
        "--suite=geneval",
        f"--suite_file={tmp_path / 'geneval.jsonl'}",
    ]
    options += ["--layout=geneval", f"--output={tmp_path / 'out'}"]
    studies.call("export", options)
    for n in (0, 300, 552):
        folder = tmp_path / "out" / f"{n:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == rows[n]
        assert pixel(folder / "samples" / "0000.png") == [n % 256, n // 256, 7]
    (ours / "300.png").unlink()
    with pytest.raises(ValueError, match="1 of 553 prompts have fewer than 1 pictures"):
        studies.call("export", [*options[:-1], f"--output={tmp_path / 'again'}"])
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layout=geneval"], "--layout geneval needs --suite geneval"),
        (["--pictures="], "--pictures PATH is needed"),
    ],
)
def test_mistakes_of_an_export(tmp_path, options, message):
    """Catches files that are written before the mistake is found."""
    (tmp_path / "prompts.txt").write_text("\n".join(test_study.PROMPTS))
    test_study.write_pictures(tmp_path / "ours", 0)
    suite = ["--suite=prompts", f"--suite_file={tmp_path / 'prompts.txt'}"]
    arguments = [f"--pictures={tmp_path / 'ours'}", *suite, f"--output={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=message):
        studies.call("export", [*arguments, *options])
    assert not (tmp_path / "out").exists()
