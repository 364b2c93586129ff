"""Which rows an evaluation uses, and the gallery they are looked for in."""

import numpy as np
import pytest

from imagen_jax.evals import rows
from tests.data import synthetic
from tests.evals.toys import LOW, SIZE, settings


def data_of(path, **changed):
    sizes = {"image_size": SIZE, "lowres_size": 0, "crop_size": 0}
    sizes |= {"text_length": synthetic.TEXT_LENGTH, "path": str(path)}
    sizes |= {"flip": False, "caption": "first", "workers": 0, "cache_mib": 0}
    sizes |= synthetic.SQUARES
    return lambda **numbers: rows.Data(sizes | changed, settings(**numbers))


def whole_batch(read):
    return read.at(np.arange(len(read)))


def test_gallery_holds_every_image_once_where_it_is_looked_for(tmp_path, monkeypatch):
    """Catches splits in another order than counted, rows lost between chunks, and the nearest image
    fetched from the wrong split."""
    monkeypatch.setattr(rows, "CHUNK", 4)
    synthetic.write_prepared(tmp_path, images=9, size=SIZE, heldout=3)
    data = data_of(tmp_path, lowres_size=LOW, crop_size=LOW)(rows=5, samples=3, gallery=12)
    for _ in range(2):  # read, then kept
        gallery = np.concatenate(list(data.gallery(np.arange(data.gallery_size))))
        blue = [*range(9), 100, 101, 102]  # how synthetic images are told apart
        assert gallery[:, 0, 0, 2].tolist() == blue
    images = data.gallery_images(np.array([11, 8, 0]))
    assert [image[0, 0, 2] for image in images] == [102, 8, 0]
    index = data.wholes("heldout").index
    result = gallery[data.gallery_row("heldout", index)]
    assert result[:, 0, 0, 2].tolist() == (100 + index).tolist()


def test_samples_and_errors_share_their_rows(tmp_path):
    """Catches crops where whole images are compared, and other rows for samples than for errors."""
    synthetic.write_prepared(tmp_path, images=9, size=SIZE, heldout=3)
    data = data_of(tmp_path, lowres_size=LOW, crop_size=LOW)(rows=5, samples=3, gallery=12)
    assert whole_batch(data.wholes("train"))["image"].shape == (3, SIZE, SIZE, 3)
    crops, whole = whole_batch(data.crops("train")), whole_batch(data.uncropped("train"))
    assert crops["image"].shape == (5, LOW, LOW, 3) and whole["image"].shape == (5, SIZE, SIZE, 3)
    assert whole["index"].tolist() == crops["index"].tolist()
    assert set(data.wholes("train").index) <= set(crops["index"].tolist())


def test_gallery_is_limited_but_holds_what_is_looked_for(tmp_path):
    """Catches a gallery without some sample's own image, one that is read whole whatever the limit,
    and places counted in the whole."""
    synthetic.write_prepared(tmp_path, images=40, size=SIZE, heldout=20)
    data = data_of(tmp_path)(rows=6, samples=6, gallery=30)
    images = np.concatenate(list(data.gallery(np.arange(data.gallery_size))))
    assert 30 <= len(images) <= 30 + 2 * 6
    for split in data.counts:
        batch = whole_batch(data.wholes(split))
        rows_of = data.gallery_row(split, batch["index"])
        np.testing.assert_array_equal(images[rows_of], batch["image"])
        np.testing.assert_array_equal(np.stack(data.gallery_images(rows_of)), batch["image"])


@pytest.mark.parametrize("name", ["rows", "samples", "gallery", "bins", "batch_size"])
def test_numbers_of_nothing_are_refused(name):
    """Catches an evaluation of no rows that ends in a division by zero."""
    with pytest.raises(ValueError, match=f"--{name} 0 is less than 1"):
        settings(**{name: 0})
