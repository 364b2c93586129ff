"""Sizes of images: buckets that a stage can train on, pictures of other sizes than squares."""

import types

import pytest

from imagen_jax import schema, stage_sizes
from imagen_jax.stage import create_stage
from tests import tiny


def stage(name, side, low, factor, crop=0, buckets=None):
    model = types.SimpleNamespace(factor=factor)
    buckets = buckets or ((crop or side,) * 2,)
    fields = dict(name=name, image_size=side, lowres_size=low, crop_size=crop, buckets=buckets)
    return types.SimpleNamespace(model=model, **fields)


PAPER = [stage("base", 64, 0, 8), stage("sr_1", 256, 64, 16), stage("sr_2", 1024, 256, 16, 256)]


@pytest.mark.parametrize(
    "text", ["", "64", "64x", "64x0", "-8x8", "64x64x3", "6.4x64", "64X64", "²x8"]
)
def test_a_size_that_is_none_is_refused(text):
    """Catches a traceback, and a size of 0 pixels."""
    assert stage_sizes.parse("192x256") == (192, 256)
    with pytest.raises(ValueError, match="--size .* is not HEIGHTxWIDTH in pixels"):
        stage_sizes.parse(text)


def test_each_stage_gets_its_share_of_the_size():
    """Catches height and width exchanged, and the size of the last stage given to all."""
    assert stage_sizes.of_stages(PAPER, None) == [(64, 64), (256, 256), (1024, 1024)]
    assert stage_sizes.of_stages(PAPER, (640, 1664)) == [(40, 104), (160, 416), (640, 1664)]
    assert stage_sizes.of_stages(PAPER[:2], (160, 416)) == [(40, 104), (160, 416)]
    assert stage_sizes.of_stages(PAPER[:1], (40, 104)) == [(40, 104)]


@pytest.mark.parametrize(
    ("stages", "step"),
    [
        (PAPER, 128),
        (PAPER[:2], 32),
        (PAPER[:1], 8),
        (PAPER[1:], 64),
        (PAPER[2:], 16),
        ([stage("low", 64, 16, 2)], 4),
    ],
)
def test_sizes_are_multiples_of_what_the_stages_need(stages, step):
    """Catches a factor of one stage that is not counted in pixels of the last one, and a low-res
    input with half a pixel: brute force over sides.
    """

    def works(side):
        last = stages[-1].image_size
        whole = [divmod(side * each.image_size, last) for each in stages]
        low = side * stages[0].lowres_size % last
        return not low and all(
            rest == 0 and own % each.model.factor == 0 for (own, rest), each in zip(whole, stages)
        )

    assert [side for side in range(1, 4 * step) if works(side)] == [step, 2 * step, 3 * step]
    assert stage_sizes.step_of(stages) == step


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((200, 256), "192x256 and 224x256"), ((8, 100), "32x96 and 32x128")],
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(size, nearest):
    """Catches an error inside the network, after the text was encoded; a nearest size of 0."""
    message = rf"{size[0]}x{size[1]} does not fit .* base, sr_1: .* multiples of 32, .* {nearest}$"
    with pytest.raises(ValueError, match=message):
        stage_sizes.of_stages(PAPER[:2], size)


def test_sizes_without_training_are_named():
    """Catches a warning about trained sizes, crops, or none about a square of a bucket stage."""
    wide = stage("wide", 64, 0, 8, buckets=((40, 104), (104, 40)))
    sizes = stage_sizes.of_stages(PAPER, (640, 1664))
    found = stage_sizes.untrained([wide, *PAPER[1:]], sizes)
    assert (
        "sr_1 (160x416; trained on 256x256)" in found
        and "wide" not in found
        and "sr_2" not in found
    )
    assert stage_sizes.untrained(PAPER, stage_sizes.of_stages(PAPER, None)) == ""
    assert "wide (64x64; trained on 40x104, 104x40)" in stage_sizes.untrained([wide], [(64, 64)])


def test_the_factor_is_that_of_the_network():
    """Catches a factor without the patches, or with one level too few."""
    base, sr = (create_stage(tiny.config(name)) for name in ("base_64", "sr_256"))
    assert (base.model.factor, sr.model.factor) == (2, 4)
    assert create_stage(tiny.config("base_64", model__patch=4)).model.factor == 8
    demo = schema.complete(tiny.config("base_64", "demo"))
    assert create_stage(demo).model.factor == 4


@pytest.mark.parametrize("bucket", [(6, 8), (8, 6)])
def test_a_bucket_that_the_network_cannot_halve_is_refused(bucket):
    """Catches an error without the bucket, when the step is compiled."""
    sizes = [[16, 16], [12, 20], list(bucket)]
    message = f"has {bucket[0]}x{bucket[1]}, but sr_tiny needs sides divisible by 4, the factor"
    with pytest.raises(ValueError, match=message):
        create_stage(tiny.config("sr_256", data__buckets=sizes))
    assert create_stage(tiny.config("sr_256", data__buckets=sizes[:2])).buckets == (
        (16, 16),
        (12, 20),
    )


def test_a_batch_of_a_bucket_has_low_res_images_of_its_shape():
    """Catches height and width exchanged, or the square's low-res image."""
    shapes = create_stage(tiny.config("sr_256")).batch_shapes(3, (12, 20))
    assert shapes["image"][0] == (3, 12, 20, 3) and shapes["lowres"][0] == (3, 6, 10, 3)
