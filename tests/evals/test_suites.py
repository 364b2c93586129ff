"""Prompt suites: draws, checksums, reference images, and the embedded suite."""

import hashlib
import json
import re
from collections import Counter

import pytest

from imagen_jax.data.sources import caption_files
from imagen_jax.evals import suites
from tests.data.sources.test_caption_files import drawbench_rows, gpic_lines, table
from tests.data.sources.test_coco import FILE


def write_coco(path, order=range(40)):
    """40 captions of 20 images, with the annotations in this order."""
    images = [{"id": n, "file_name": FILE(n)} for n in range(20)]
    annotations = [{"image_id": n % 20, "id": 100 + n, "caption": f"gem {n}"} for n in order]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "captions.json")


def ids(suite):
    return [prompt.id for prompt in suite.prompts]


def test_draws_are_nested(coco):
    """Catches a draw that starts anew for each count: FID-10K would not be a part of FID-30K."""
    whole = suites.load_suite("coco", file=coco, count=40, seed=5)
    assert sorted(ids(whole)) == list(range(100, 140)) and ids(whole) != sorted(ids(whole))
    for count in (1, 7, 39):
        assert (
            suites.load_suite("coco", file=coco, count=count, seed=5).prompts
            == (whole.prompts[:count])
        )
    assert ids(suites.load_suite("coco", file=coco, count=7, seed=6)) != ids(whole)[:7]


def test_a_draw_is_this_one(coco, tmp_path):
    """Catches another random number generator, and a draw by position in the file."""
    expected = sorted(range(100, 140), key=lambda n: hashlib.sha256(f"3/{n}".encode()).hexdigest())[
        :4
    ]
    assert expected == [113, 112, 128, 120]
    assert ids(suites.load_suite("coco", file=coco, count=4, seed=3)) == expected
    reverse = write_coco(tmp_path / "reverse.json", range(39, -1, -1))
    assert ids(suites.load_suite("coco", file=reverse, count=4, seed=3)) == expected


def test_draws_are_uniform():
    """Catches a rank that prefers some ids: each of 10 is first for about a tenth of all seeds."""
    first = Counter(
        suites.select(map(caption_files.Caption, range(10), "abcdefghij"), 1, seed, "")[0][0].id
        for seed in range(400)
    )
    assert all(20 < first[n] < 60 for n in range(10))


def test_a_draw_of_coco_is_of_30_000(coco):
    """Catches a suite that is called FID-30K with fewer prompts."""
    with pytest.raises(
        ValueError, match="has 40 prompts, but 30,000 are to be drawn: .* at most 40"
    ):
        suites.load_suite("coco", file=coco)
    with pytest.raises(ValueError, match="the number of prompts is 0: give 1 or more"):
        suites.load_suite("coco", file=coco, count=0)


def test_the_identity(coco):
    """Catches a checksum that depends on anything but ids, texts and categories in order."""
    suite = suites.load_suite("coco", file=coco, count=2, seed=3)
    assert suite.prompts[0] == suites.Prompt(113, "gem 13", "", "")
    content = '[113, "gem 13", ""]\n[112, "gem 12", ""]\n'
    assert suite.identity["prompts_sha256"] == hashlib.sha256(content.encode()).hexdigest()
    with open(coco, "rb") as file:
        assert suite.identity["sha256"] == hashlib.sha256(file.read()).hexdigest()
    assert suite.identity["file"] == coco
    assert [suite.identity[name] for name in ("count", "available", "seed")] == [2, 40, 3]
    assert "without replacement" in suite.identity["protocol"]
    assert json.loads(json.dumps(suite.identity)) == suite.identity


def test_a_whole_list_has_no_seed(tmp_path):
    """Catches a list that is shuffled, or named after a seed that has no effect."""
    file = tmp_path / "prompts.txt"
    file.write_text("a red gem\n\na blue gem\na red gem\n")
    suite = suites.load_suite("prompts", file=str(file), seed=9)
    assert [prompt.text for prompt in suite.prompts] == ["a red gem", "a blue gem", "a red gem"]
    assert suite.identity["seed"] is None
    assert suite.identity["repeated_texts"] == 1
    assert suite.identity["notes"] == {"blank_line": 1}
    file.write_text("\n")
    with pytest.raises(ValueError, match="prompts.txt has no prompt: give a file with prompts"):
        suites.load_suite("prompts", file=str(file))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "val2014"
    folder.mkdir()
    for n in range(20):
        (folder / FILE(n)).touch()
    return folder


def test_each_prompt_has_its_image(coco, images):
    """Catches an image that is not the one the caption describes, and a reference of the drawn
    images alone.
    """
    suite = suites.load_suite("coco", file=coco, images=str(images), count=7)
    assert [prompt.image for prompt in suite.prompts] == [FILE(n % 20) for n in ids(suite)]
    assert suite.images == str(images) and suite.identity["images_in_folder"] == 20
    without = suites.load_suite("coco", file=coco, count=7)
    assert suite.identity["prompts_sha256"] == without.identity["prompts_sha256"]


def test_missing_images_are_one_error(coco, images):
    """Catches an error for the first missing image alone, or a pair that is left out."""
    for n in range(5):
        (images / FILE(n)).unlink()
    with pytest.raises(ValueError, match=r"^5 of the reference images are not in .*\.jpg, \.\.\.;"):
        suites.load_suite("coco", file=coco, images=str(images), count=40)
    for n in range(1, 5):
        (images / FILE(n)).touch()
    message = f"1 of the reference images are not in {images}: {FILE(0)}; copy them there, or give"
    with pytest.raises(ValueError, match=re.escape(message)):
        suites.load_suite("coco", file=coco, images=str(images), count=40)


def test_the_folder_of_images(coco, tmp_path):
    """Catches 30,000 missing images where the folder is wrong."""
    (tmp_path / "empty" / "val2014").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no images .*: give the folder that holds them, not"):
        suites.load_suite("coco", file=coco, images=str(tmp_path / "empty"), count=1)
    with pytest.raises(ValueError, match="is not a folder: give the folder of the reference"):
        suites.load_suite("coco", file=coco, images=coco, count=1)


def test_a_fixed_list_of_coco(tmp_path, images):
    """Catches a fixed list that is shuffled or cut to a draw."""
    file = tmp_path / "list.csv"
    file.write_text("image_id,text\n4,gem\n2,red gem\n")
    suite = suites.load_suite("coco", file=str(file), images=str(images))
    assert suite.prompts == (
        suites.Prompt(0, "gem", "", FILE(4)),
        suites.Prompt(1, "red gem", "", FILE(2)),
    )
    assert suite.identity["seed"] is None and "fixed list" in suite.identity["protocol"]


def test_gpic_images_are_named_by_key(tmp_path, monkeypatch):
    """Catches keys without a suffix that are all reported as missing."""
    monkeypatch.setattr(caption_files, "GPIC", 40)
    file, folder = tmp_path / "gpic.jsonl", tmp_path / "test"
    file.write_text("\n".join(gpic_lines(40)))
    folder.mkdir()
    drawn = suites.load_suite("gpic", file=str(file), count=2)
    for prompt, suffix in zip(drawn.prompts, (".jpg", ".png")):
        (folder / f"{prompt.id:x}{suffix}").touch()
    suite = suites.load_suite("gpic", file=str(file), images=str(folder), count=2)
    assert [prompt.image[-4:] for prompt in suite.prompts] == [".jpg", ".png"]
    assert suite.categories() == {"short": 2}


def test_a_reference_without_pairs(tmp_path, images):
    """Catches prompts that are paired with images by order."""
    file = tmp_path / "drawbench.csv"
    file.write_text(table(drawbench_rows()))
    suite = suites.load_suite("drawbench", file=str(file), images=str(images))
    assert {prompt.image for prompt in suite.prompts} == {""} and suite.images == str(images)
    assert suite.categories() == caption_files.DRAWBENCH


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("cocos", "", "there is no suite 'cocos': choose one of coco, .* or data"),
        ("drawbench", "", "the suite drawbench needs a file: docs/evaluation.md says where"),
        ("drawbench", "no/such.csv", "no/such.csv is not a file: docs/evaluation.md says where"),
        ("coco", "gs://bucket/captions.json", "is a URL, only local paths work"),
        ("embedded", "x.csv", "the embedded suite has its own file: leave out x.csv"),
    ],
)
def test_wrong_calls(name, file, message):
    """Catches a traceback for a file that is not there."""
    with pytest.raises(ValueError, match=message):
        suites.load_suite(name, file=file)


def test_the_embedded_suite():
    """Catches a prompt that is changed, added or repeated: results would not compare."""
    suite = suites.load_suite("embedded")
    texts = [prompt.text for prompt in suite.prompts]
    assert len({text.lower().rstrip(".") for text in texts}) == len(texts) == 200
    assert suite.categories() == caption_files.EMBEDDED
    assert sorted(caption_files.EMBEDDED.values()) == sorted(caption_files.DRAWBENCH.values())
    assert suite.identity["notes"] == {} and suite.identity["file"] == suites.EMBEDDED
    assert suite.identity["prompts_sha256"] == (
        "883113272230dd50e7dceff038e4cffead7d6ef6b059908a5a69ece48c299e30"
    )


def test_the_embedded_categories_hold_what_they_say():
    """Catches a prompt in the wrong category of the embedded suite."""
    by_category = {}
    for prompt in suites.load_suite("embedded").prompts:
        by_category.setdefault(prompt.category, []).append(prompt.text)
    assert all(text.count('"') in (2, 4) for text in by_category["Text"])
    assert all(" " not in text for text in by_category["Rare Words"])
    assert all(len(text.split()) >= 12 for text in by_category["Descriptions"])
    assert all(len(text.split()) >= 15 for text in by_category["Compositional"])
    numbers = "one two three four five six seven eight nine ten".split()
    counted = [re.findall(r"\w+", text.lower()) for text in by_category["Counting"]]
    assert all(set(numbers) & set(words) for words in counted)
    assert {word for words in counted for word in words} >= set(numbers)
