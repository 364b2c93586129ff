"""Retrieval among all images of prepared data."""

import numpy as np

from imagen_jax.evals import data_suite, nearest
from imagen_jax.evals.row_shards import rows_per_shard

SIZE = 40


class Gallery:
    """`RealImages` that count how often each one is read."""

    def __init__(self, images):
        self.identity = {}
        self.images, self.reads = images, np.zeros(len(images), int)

    def __len__(self):
        return len(self.images)

    def image(self, index):
        self.reads[index] += 1
        return self.images[index]

    def check(self):
        pass

    check_sizes = check


def ranks(pictures, own, gallery):
    unchecked = getattr(data_suite.ranks, "__wrapped__", data_suite.ranks)
    return unchecked(pictures, own, gallery)


def test_ranks_by_chunks_are_those_of_all_distances(monkeypatch):
    """Catches images at the ends of chunks that are left out or counted twice, own images of
    another picture, ties that count for the sample, a gallery that is read for each group of
    pictures, and an array that grows with the gallery.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (23, SIZE, SIZE, 3), np.uint8)
    images[7] = images[3]  # a tie
    own = rng.integers(0, 23, 11)
    own[0] = 3
    pictures = (images[own] // 64 + rng.integers(0, 250, images[own].shape)).astype(np.uint8)
    want = nearest.ranks(nearest.distances(pictures, images), own)
    assert len(set(want.tolist())) > 3
    monkeypatch.setattr(data_suite, "CHUNK", 4)
    shapes, distances = [], nearest.distances

    def recorded(samples, some):
        shapes.append((len(samples), len(some)))
        return distances(samples, some)

    monkeypatch.setattr(nearest, "distances", recorded)
    gallery = Gallery(images)
    found = ranks(pictures, own, gallery)
    assert found.tolist() == [[rank, 23] for rank in want.tolist()]
    assert np.array(shapes).max() <= 4
    reads = gallery.reads - np.bincount(own, minlength=23)  # once more as an own image
    assert reads.tolist() == [1] * 23


def test_a_pass_compares_as_many_pictures_as_fit():
    """Catches a gallery that is read for every 512 pictures, and pictures that do not fit into
    memory.
    """
    rows = lambda size: rows_per_shard(30_000, 2, 1, data_suite.pictures_at_once(size))
    assert [rows(64), rows(1024), rows(50_000)] == [15_000, 341, 1]
