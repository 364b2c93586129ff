r"""The 64->256 model of the paper for one epoch of GPIC: 100M images, 473M parameters.

    python -m imagen_jax.train --config configs/recipes/gpic_sr_256.py \
        --config.data.path=data/gpic --workdir runs/gpic_sr
    python -m imagen_jax.train --config configs/recipes/gpic_sr_256.py:demo \
        --config.data.path=data/emoji --workdir runs/sr_64 --minutes 5

CPU: the second command is sr_256.py:demo, on data/emoji of the README.

Data: docs/data-recipes.md, "GPIC". The cascade of gpic_base_64.py and this stage has images of the
size of GPIC's baseline, whose FD-DINOv2 of 76.25, at w = 6.25, is the number to beat (arXiv
2605.30341). The same page has the evaluation. Sweep the guidance weights of both stages and the
level of noise on the low-res image.

There is no recipe for 1024 pixels: images of GPIC have 479x587 pixels on average, and training
enlarges none. The network, the batch and the optimizer are those of sr_256.py. One epoch has 48,829
steps instead of 2.5M, so the warm-up takes 2,500 steps instead of 10,000.

Hardware: 1.4 hours on v5e:16x16, 366 chip-hours, from the planned step time of sr_256.py.
Expect: not trained yet, so no loss or score is known.
Recorded: BENCHMARKS.md, "Planned, not run: the recipes for GPIC".

Variants: `:demo` for two CPU cores and `:tiny` for tests, as in sr_256.py.
"""

from ml_collections import ConfigDict

from configs import sr_256
from configs.recipes import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """The complete config: sr_256 with the changes below; `arg` is "", "demo" or "tiny"."""
    check_variant(arg)
    c = sr_256.get_config(arg).unlock()
    c.name = f"gpic_{c.name}"
    if not arg:
        c.optim.warmup = 2_500
        c.train.update(steps=48_829, save_every=2_000)
    return c.lock()
