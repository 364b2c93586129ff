r"""The 64x64 base model, trained on whole images of several aspect ratios: base_64 with buckets.

    python -m imagen_jax.train --config configs/recipes/buckets_base_64.py \
        --config.data.path=PREPARED --workdir WORKDIR
    python -m imagen_jax.train --config configs/recipes/buckets_base_64.py:demo \
        --config.data.path=data/emoji --workdir runs/base_buckets --minutes 5

CPU: the second command trains `:demo`, base_64.py:demo with the sizes 12x20, 16x16 and 20x12. The
images of data/emoji are squares, so all of its batches are 16x16: give data of your own with other
aspect ratios.

Data: any that prepare_data keeps in their aspect ratio. Each batch has images of one size. With
buckets_sr_256.py it is a cascade for `sample --size HEIGHTxWIDTH`: sizes that are four times those
below, such as 288x224. Validation and sample grids use centre squares.

It differs from base_64.py in data.buckets only: seven sizes of about 64^2 pixels, 40x104, 48x88,
56x72, 64x64, 72x56, 88x48 and 104x40. The train step is compiled once for each.

Hardware: as base_64.py, whose images have about as many pixels.
Expect: not trained yet, so no loss is known.
Recorded: `:demo` on pictures from 1:3 to 3:1, BENCHMARKS.md, "Several aspect ratios".

Variants: `:demo` for two CPU cores and `:tiny` for tests, as in base_64.py.
"""

from ml_collections import ConfigDict

from configs import base_64, defaults
from configs.recipes import check_variant

STEPS = {"": 8, "demo": 4, "tiny": 2}  # the factors of the networks


def get_config(arg: str = "") -> ConfigDict:
    """The complete config: base_64 with buckets; `arg` is "", "demo" or "tiny"."""
    check_variant(arg)
    c = base_64.get_config(arg).unlock()
    c.name = f"buckets_{c.name}"
    c.data.buckets = defaults.buckets(c.data.image_size, STEPS[arg])
    return c.lock()
