r"""The base model of the paper for one epoch of GPIC: 100M images, 64x64, 2.26B parameters.

    python -m imagen_jax.train --config configs/recipes/gpic_base_64.py \
        --config.data.path=data/gpic --workdir runs/gpic_base
    python -m imagen_jax.train --config configs/recipes/gpic_base_64.py:demo \
        --config.data.path=data/emoji --workdir runs/base --minutes 5

CPU: the second command is base_64.py:demo, on data/emoji of the README.

Data: docs/data-recipes.md, "GPIC". Evaluation of the cascade with gpic_sr_256.py: the same page.
The number to beat is FD-DINOv2 76.25, at w = 6.25, of GPIC's baseline JiT-T2I (arXiv 2605.30341): a
pixel-space model of 1.1B parameters at 256x256, trained for one epoch too. It has 87.8 at w = 4 and
204.0 at w = 1.75, so sweep w. Real images have 7.44.

The network, the batch and the optimizer are those of base_64.py. One epoch has 48,829 steps instead
of 2.5M, so the warm-up takes 2,500 steps instead of 10,000. Captions are truncated to 128 tokens of
T5; the baseline reads 300 of its own encoder. Only the long captions, 9 %, can have more than 128,
and each token takes 8 kB of disk. More epochs: --config.train.steps=97658.

Hardware: 4.5 hours on v5e:16x16, 1,139 chip-hours, from the planned step time of base_64.py.
Expect: not trained yet, so no loss or score is known.
Recorded: BENCHMARKS.md, "Planned, not run: the recipes for GPIC".

Variants: `:demo` for two CPU cores and `:tiny` for tests, as in base_64.py.
"""

from ml_collections import ConfigDict

from configs import base_64
from configs.recipes import check_variant


def get_config(arg: str = "") -> ConfigDict:
    """The complete config: base_64 with the changes below; `arg` is "", "demo" or "tiny"."""
    check_variant(arg)
    c = base_64.get_config(arg).unlock()
    c.name = f"gpic_{c.name}"
    if not arg:
        c.optim.warmup = 2_500
        c.train.update(steps=48_829, save_every=2_000)
    return c.lock()
