"""What `rate make` writes: blind, whole, and refused for pictures that cannot be compared."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from imagen_jax.evals.rating import design, preparing, study
from tests.evals.rating import studies
from tools import simulated_raters

PROMPTS = ["a red cube", "a blue ball", "a green cone", "a white swan"]
NAMES = ("zebrafish", "okapi")


def write_pictures(directory, seed, prompts=len(PROMPTS), each=1, size=16, suffix="png"):
    """Random pictures with metadata that names their system."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for prompt in range(prompts):
        for k in range(each):
            image = Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8))
            exif = Image.Exif()
            exif[0x010E] = directory.name  # the description
            image.save(directory / f"{prompt:05d}_{k}.{suffix}", exif=exif)
    return directory


@pytest.fixture
def place(tmp_path):
    """Pictures of two systems and a list of prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    for seed, name in enumerate(NAMES):
        write_pictures(tmp_path / name, seed)
    return tmp_path


def run(place, *options, output="study", systems=NAMES):
    """The exit of `rate make` on the pictures of the fixture."""
    pictures = [f"--pictures={name}={place / name}" for name in systems]
    suite = ["--suite=prompts", f"--suite_file={place / 'prompts.txt'}"]
    options = ["--per_side=1", f"--output={place / output}", *options]
    return studies.call("make", [*pictures, *suite, *options])


def received(directory):
    """{file: content} of everything that a rater receives."""
    folder = directory / study.STUDY
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_that_raters_receive_names_a_system_or_the_key(place):
    """Catches names in pages, file names or metadata, and the seed or the key beside the page."""
    run(place, "--controls=1", "--raters=3")
    key = json.loads((place / "study" / study.KEY).read_text())
    assert [system["name"] for system in key["systems"]] == list(NAMES)
    secrets = [*NAMES, key["settings"]["seed"], "imagen"]
    files = received(place / "study")
    assert sum(path.suffix == ".png" for path in files) > 10
    for path, content in files.items():
        for secret in secrets:
            assert secret.encode() not in content.lower() and secret not in str(
                path.relative_to(place / "study")
            ), (path, secret)
        assert path.stat().st_mtime == preparing.DATE
        if path.suffix == ".html":
            trials = json.dumps(simulated_raters.read_page(path)["trials"])
            kinds = (design.REGULAR, design.IDENTICAL, design.BROKEN, design.REPEAT)
            assert not any(kind in trials for kind in kinds)
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert not image.info and not image.getexif()


def test_the_page_shows_the_pictures_of_the_key(place):
    """Catches sets that are exchanged between the key and the pictures."""
    run(place, "--controls=1", "--raters=2")
    key = json.loads((place / "study" / study.KEY).read_text())
    page = simulated_raters.read_page(place / "study" / study.STUDY / "index.html")
    assert page["study"] == key["study"]
    (run_record,) = key["runs"]
    kinds = set()
    for trial in page["trials"]:
        secret = run_record["trials"][trial["id"]]
        kinds.add(secret["kind"])
        for token in trial["sets"]:
            if secret["kind"] in (design.REGULAR, design.IDENTICAL, design.REPEAT):
                (file,) = page["pictures"][token]
                original = place / secret["sets"][token] / f"{trial['prompt']:05d}_0.png"
                with (
                    Image.open(place / "study" / study.STUDY / file) as shown,
                    Image.open(original) as drawn,
                ):
                    np.testing.assert_array_equal(np.asarray(shown), np.asarray(drawn))
    assert kinds == {design.REGULAR, design.IDENTICAL, design.BROKEN, design.REPEAT}


def test_the_same_seed_makes_the_same_study(place):
    """Catches a draw outside of the seed; without --seed, two studies differ."""
    for output, options in (("a", ["--seed=ff"]), ("b", ["--seed=ff"]), ("c", []), ("d", [])):
        run(place, "--raters=2", *options, output=output)
    files = {
        name: {path.relative_to(place / name): content for path, content in found.items()}
        for name, found in ((name, received(place / name)) for name in "abcd")
    }
    assert files["a"] == files["b"]
    assert len(files["c"].keys() & files["d"].keys()) == 1  # index.html


def test_one_file_has_its_pictures_inside(place):
    """Catches a page that needs files beside it."""
    run(place, "--single_file", "--raters=2", "--controls=0")
    (page,) = received(place / "study")
    read = simulated_raters.read_page(page)
    urls = [url for files in read["pictures"].values() for url in files]
    assert len(urls) == 8 and all(url.startswith("data:image/png;base64,") for url in urls)


MISTAKES = {
    "one system": (["zebrafish"], [], "two systems"),
    "the same name": (["okapi", "okapi"], [], "two systems are called 'okapi'"),
    "too few pictures": (NAMES, ["--per_side=4"], "zebrafish has 1 of 4 pictures"),
    "no system": ([], [], "needs two systems: give --pictures NAME=PATH for each"),
    "an unprintable name": (["okapi", "ze\nbra"], [], "cannot be the name of a system"),
    "a link as output": (NAMES, ["--output=link"], "--output link is a link"),
    "a word of the page": (["okapi", "pictures"], [], "the page itself has the word 'pictures'"),
    "a negative seed": (NAMES, ["--seed=-1"], "is negative or has more than 128 bits"),
    "no hexadecimal seed": (NAMES, ["--seed=xyz"], "not hexadecimal"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_clear_line(place, mistake, monkeypatch):
    """Catches a study that is made all the same, or half of it."""
    systems, options, message = MISTAKES[mistake]
    monkeypatch.chdir(place)
    (place / "new").mkdir()
    (place / "link").symlink_to("new")
    with pytest.raises(ValueError, match=re.escape(message)):
        run(place, *options, systems=systems)
    assert not (place / "study").exists() and not list(place.glob(".study*"))


def test_a_study_is_of_its_pictures(place):
    """Catches ratings of other pictures that count, because a study was made again by its seed."""
    run(place, "--seed=ff", "--raters=2", output="a")
    write_pictures(place / "okapi", 7)
    run(place, "--seed=ff", "--raters=2", output="b")
    one, other = (json.loads((place / name / study.KEY).read_text()) for name in "ab")
    assert one["runs"] == other["runs"] and one["study"] != other["study"]


@pytest.mark.parametrize("controls", [0, 2])
def test_no_prompt_left(place, controls):
    """Catches a study without trials, or advice about control trials."""
    write_pictures(place / "okapi", 5, size=8)
    with pytest.raises(ValueError, match="no prompt is left"):
        run(place, "--leave_out", f"--controls={controls}")
    assert not (place / "study").exists()


def test_trials_that_nobody_sees_are_told(place, capsys):
    """Catches blocks that leave out prompts unnoticed."""
    run(place, "--raters=2", "--block=2", "--controls=0", output="a")
    assert "shown to nobody" not in capsys.readouterr().out
    run(place, "--raters=1", "--block=3", "--controls=0", output="b")
    assert "1 of 4 trials are shown to nobody" in capsys.readouterr().out


def test_missing_pictures_and_other_sizes(place, capsys):
    """Catches pictures of two sizes in one trial, and prompts that are left out in silence."""
    (place / "okapi" / "00001_0.png").unlink()
    (place / "okapi" / "00002_0.png").write_bytes(b"\x89PNG broken")
    message = "2 of 4 prompts cannot be compared: 1 .okapi has 0 of 1.*2 .*cannot be used"
    with pytest.raises(ValueError, match=message):
        run(place)
    run(place, "--leave_out")
    assert "left out 2 of 4 prompts" in capsys.readouterr().err
    key = json.loads((place / "study" / study.KEY).read_text())
    assert set(key["left_out"]) == {"1", "2"}
    assert {trial["prompt"] for trial in key["runs"][0]["trials"].values()} == {0, 3}
    write_pictures(place / "okapi", 5, size=8)
    with pytest.raises(ValueError, match="zebrafish has 16x16, okapi has 8x8 .--size"):
        run(place, output="other")
    run(place, "--size=16", output="other")
    key = json.loads((place / "other" / study.KEY).read_text())
    assert [system["sizes"] for system in key["systems"]] == [{"16x16": 4}, {"8x8": 4}]
    assert [system["shown"] for system in key["systems"]] == [{"16x16": 4}] * 2


def test_an_earlier_study_is_kept(place):
    """Catches a second study over the key of the first."""
    run(place)
    before = (place / "study" / study.KEY).read_bytes()
    with pytest.raises(ValueError, match="is not empty"):
        run(place)
    assert (place / "study" / study.KEY).read_bytes() == before


def test_a_picture_that_changes_meanwhile_leaves_nothing(place, monkeypatch):
    """Catches half a study under its final name after an error or an interruption."""
    read = preparing.read_picture

    def stop(*args):
        if (place / ".study.partial").exists():
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(preparing, "read_picture", stop)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    assert not (place / "study").exists() and not (place / ".study.partial").exists()


def test_scrambled_parts_all_move():
    """Catches a broken control that looks intact."""
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    result = preparing.scramble(image, "0a")
    parts = lambda a: a.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, -1)
    assert sorted(map(bytes, parts(result))) == sorted(map(bytes, parts(image)))
    assert not any((a == b).all() for a, b in zip(parts(result), parts(image)))


def test_a_study_of_coco(place):
    """Catches references that are not those of the suite's prompts."""
    rng = np.random.default_rng(0)
    photos = place / "val2014"
    photos.mkdir()
    rows = []
    for i in range(6):
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        image.save(photos / f"{i}.png")
        rows.append(f"{i},{i}.png,photo of {['a man', 'a tree'][i % 2]} {i}")
    (place / "list.csv").write_text("image_id,file_name,text\n" + "\n".join(rows) + "\n")
    write_pictures(place / "ours", 1, prompts=6)
    options = ["--suite=coco", f"--suite_file={place / 'list.csv'}", f"--images={photos}"]
    options += [f"--pictures=ours={place / 'ours'}", "--protocol=coco", "--prompts=6"]
    studies.call("make", [*options, "--raters=2", f"--output={place / 'study'}"])
    key = json.loads((place / "study" / study.KEY).read_text())
    assert [run["part"] for run in key["runs"]] == ["photorealism", "caption"]
    categories = {trial["category"] for run in key["runs"] for trial in run["trials"].values()}
    assert categories == {"people", "no people"}
