"""COCO's annotation file, and fixed lists of its captions."""

import json
from collections import Counter

import pytest

from imagen_jax.data.sources import coco
from imagen_jax.data.sources.caption_files import Caption

FILE = "COCO_val2014_{:012d}.jpg".format
IMAGES = [{"id": 7, "file_name": FILE(7)}, {"id": 3, "file_name": FILE(3)}]
ANNOTATIONS = [
    {"image_id": 3, "id": 37, "caption": "A red gem. "},
    {"image_id": 7, "id": 38, "caption": "a  blue gem"},
    {"image_id": 3, "id": 90, "caption": "Gems"},
]


def content(images=IMAGES, annotations=ANNOTATIONS):
    return json.dumps({"info": {}, "images": images, "annotations": annotations})


@pytest.fixture
def read(tmp_path):
    def read(reader, content, name="captions.json"):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        notes = Counter()
        return list(reader(path, notes)), +notes

    return read


def test_captions_have_the_file_of_their_image(read):
    """Catches images and captions joined by order: here their orders differ."""
    captions, notes = read(coco.read_annotations, content())
    assert captions == [
        Caption(37, "A red gem.", "", FILE(3)),
        Caption(38, "a blue gem", "", FILE(7)),
        Caption(90, "Gems", "", FILE(3)),
    ]
    assert not notes


def test_captions_without_text_are_counted(read):
    """Catches an empty caption that is drawn, or left out without a word."""
    extra = [
        {"image_id": 3, "id": 1, "caption": " \u200b\n"},
        {"image_id": 3, "id": 2, "caption": "\ud83d"},
        {"image_id": 3, "id": 4, "caption": "a\u200b gem"},
    ]
    captions, notes = read(coco.read_annotations, content(annotations=ANNOTATIONS + extra))
    assert [caption.id for caption in captions] == [37, 38, 90, 4]
    assert notes == {"empty_caption": 1, "invalid_caption": 1, "removed_characters": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (content()[:-9], r"captions.json is not valid JSON \(.*\); download or copy it again"),
        ("[]", "is damaged .it is not a JSON object."),
        ('{"images": []}', "is damaged .it has no annotations."),
        (content(annotations=ANNOTATIONS * 2), "has the caption id 37 twice"),
        (content(images=IMAGES * 2), "has the image id 7 twice"),
        (content(images=IMAGES[:1]), "the caption 37 names the image 3, which is not among the"),
        (
            content(annotations=[{"image_id": 3, "id": 1, "bbox": []}]),
            "entry 0 of 'annotations' has no valid 'caption': give a file of captions, such as",
        ),
        (content(images=[{"id": 3}]), "entry 0 of 'images' has no valid 'file_name'"),
        (content(images=[3]), "entry 0 of 'images' has no valid 'id'"),
    ],
)
def test_a_wrong_annotation_file(read, text, message):
    """Catches a traceback, and an instances file or a damaged one that is drawn from."""
    with pytest.raises(ValueError, match=message):
        read(coco.read_annotations, text)


def test_the_published_file_is_complete(read):
    """Catches a part of captions_val2014.json that is called the validation set."""
    with pytest.raises(
        ValueError, match="has 2 images instead of 40,504: download the annotations"
    ):
        read(coco.read_annotations, content(), coco.ANNOTATIONS)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Puts a small captions_val2014.json beside the list."""
    monkeypatch.setattr(coco, "VAL2014", {"images": 2, "annotations": 3})
    (tmp_path / coco.ANNOTATIONS).write_text(content(), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "name", "ids"),
    [
        ("image_id,text\n7,blue gems\n3,gem\n", "list.csv", [0, 1]),
        (",image_id,caption,extra\n0,7,blue gems,x\n1,3,gem,y\n", "list.csv", [0, 1]),
        ("case_number,prompt,coco_id\n1,blue gems,7\n2,gem,3\n", "list.CSV", [0, 1]),
        ("id\timage_id\tcaption\n38\t7\tblue gems\n90\t3\tgem\n", "list.tsv", [38, 90]),
        ('image_id\tcaption\n7\t"blue\ngems"\n3\tgem\n', "list.tsv", [0, 1]),
        (
            f"caption_id,image_id,text,file_name\n38,7,blue gems,val2014/{FILE(7)}\n90,3,gem,\n",
            "list.csv",
            [38, 90],
        ),
    ],
)
def test_lists_with_texts(read, text, name, ids):
    """Catches the columns of a published list that are not recognised, and a lost row."""
    captions, _ = read(coco.read_list, text, name)
    assert captions == [
        Caption(ids[0], "blue gems", "", FILE(7)),
        Caption(ids[1], "gem", "", FILE(3)),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ['7\t"blue gems', "3\tgem", "4\tgem"],
            r"list\.tsv:2 cannot be read .*: close every quote",
        ),
        (['7\t"blue gems', "3\tgem", '4\t"gem"'], r"list\.tsv:2 cannot be read .*: close every"),
        (
            ['7\t"blue gems', "3\tgem", '4\tgem"'],
            r"list\.tsv:2: a quote takes in the rows after it",
        ),
        (['7\t"' + "x" * 200_000, "3\tgem"], r"list\.tsv:2 cannot be read .*: close every quote"),
    ],
)
def test_an_open_quote_in_a_table_with_tabs(read, rows, message):
    """Catches rows that become part of a caption, and a traceback of the module csv."""
    with pytest.raises(ValueError, match=message):
        read(coco.read_list, "\n".join(["image_id\ttext", *rows, ""]), "list.tsv")


def test_lists_of_ids(read, beside):
    """Catches a list of ids that is not looked up in the annotation file, in the list's order."""
    captions, _ = read(coco.read_list, "image_id,caption_id\n3,90\n7,38\n", "list.csv")
    assert captions == [Caption(90, "Gems", "", FILE(3)), Caption(38, "a blue gem", "", FILE(7))]


def test_texts_are_compared_with_the_annotations(read, beside):
    """Catches a check by exact spelling: lists differ in capitals and full stops."""
    captions, _ = read(coco.read_list, "image_id,text\n7,A blue gem.\n3,a red gem\n", "list.csv")
    assert [caption.text for caption in captions] == ["A blue gem.", "a red gem"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image_id,text\n3,a blue gem\n7,a red gem\n3,Gems\n",
            r"list.csv:2: the text is not a caption of its image in .* \(rows like this: 2 of 3\):"
            " texts and image ids are in different orders",
        ),
        ("image_id,caption_id\n3,38\n", "caption 38 belongs to COCO_val2014_000000000007.jpg, not"),
        ("image_id,caption_id\n3,39\n", "list.csv:2: .* has no caption 39: give a list of"),
        (
            f"image_id,text,file_name\n3,Gems,{FILE(7)}\n",
            "has the image id 3 but the file COCO_val",
        ),
    ],
)
def test_two_orders_in_one_list(read, beside, text, message):
    """Catches captions and images joined from two sort orders: every pair would be wrong."""
    with pytest.raises(ValueError, match=message):
        read(coco.read_list, text, "list.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv is empty; download or copy it again"),
        ("image,text\n3,gem\n", "must name the columns image_id and text, or image_id and caption"),
        ("image_id,bbox\n3,1\n", "it is 'image_id,bbox'"),
        ("image_id,text,text\n3,gem,gem\n", "must name the columns image_id, text once each"),
        (
            "image_id,caption_id\n3,37\n",
            "captions_val2014.json does not exist, and the list has no",
        ),
        ("image_id,text\nthree,gem\n", "list.csv:2: image_id is 'three'; it must be an integer"),
        ("image_id,text\n3,\n", "list.csv:2: the prompt is empty"),
        ("image_id,text\n3,a gem, red\n", "list.csv:2 has 3 columns, but the first line names 2"),
        ("image_id,text,id\n3,gem,5\n3,gem,5\n", "list.csv:3 has the caption id 5 of line 2"),
    ],
)
def test_a_wrong_list(read, text, message):
    """Catches a traceback, and a list that is read in part."""
    with pytest.raises(ValueError, match=message):
        read(coco.read_list, text, "list.csv")
