r"""The 64->256 model, trained on whole images of several aspect ratios: sr_256 with buckets.

    python -m imagen_jax.train --config configs/recipes/buckets_sr_256.py \
        --config.data.path=PREPARED --workdir WORKDIR
    python -m imagen_jax.train --config configs/recipes/buckets_sr_256.py:demo \
        --config.data.path=data/emoji --workdir runs/sr_buckets --minutes 5

CPU: the second command trains `:demo`, sr_256.py:demo with the sizes 48x80, 64x64 and 80x48. The
images of data/emoji are squares, so all of its batches are 64x64: give data of your own with other
aspect ratios.

Data: as buckets_base_64.py. The sizes are four times those of that config, so the low-res images
have the sizes that its stage was trained on.

It differs from sr_256.py in data.buckets only: seven sizes of about 256^2 pixels, from 160x416 to
416x160. The train step is compiled once for each.

Hardware: as sr_256.py, whose images have about as many pixels.
Expect: not trained yet, so no loss is known.
Recorded: `:demo` on pictures from 1:3 to 3:1, BENCHMARKS.md, "Several aspect ratios".

Variants: `:demo` for two CPU cores and `:tiny` for tests, as in sr_256.py.
"""

from ml_collections import ConfigDict

from configs import defaults, sr_256
from configs.recipes import buckets_base_64, check_variant


def get_config(arg: str = "") -> ConfigDict:
    """The complete config: sr_256 with buckets; `arg` is "", "demo" or "tiny"."""
    check_variant(arg)
    c = sr_256.get_config(arg).unlock()
    c.name = f"buckets_{c.name}"
    factor = c.data.image_size // c.data.lowres_size
    step = factor * buckets_base_64.STEPS[arg]
    c.data.buckets = defaults.buckets(c.data.image_size, step)
    return c.lock()
