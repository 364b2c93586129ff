"""Compares the Efficient U-Net with the ordinary U-Net: speed, FLOPs, parameters, memory.

    python -m tools.compare_unets --batch 2 --steps 10

Both are 64->256 networks at a quarter of the paper's super-resolution width (128). They take whole
256x256 images, the same text and the same low-res input, and alternate full training steps (Adam,
EMA) in one process. The ordinary network is the recipe of F.1 (multipliers 1, 2, 3, 4, three blocks
a level, attention at 32), whose first level has full resolution at 256x256. The Efficient U-Net is
F.2 with widths 32, 64, 128, 256. The paper reports 2-3 times more steps per second (B.1).
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from configs import sr_256
from imagen_jax.stage import create_stage
from imagen_jax.training import optim
from imagen_jax.training.state import initial_state
from imagen_jax.training.step import forward_flops, make_step

ORDINARY = dict(
    family="unet",
    channels=32,
    multipliers=(1, 2, 3, 4),
    blocks=3,
    attention=(False, False, False, True),
    text_attention=(False, False, False, True),
    head_channels=32,
    cond_dim=128,
    pooling="attention",
    pool_heads=4,
    res_block="biggan",
    scale_shift=True,
    patch=1,
    dropout=0.0,
    dtype="float32",
    remat="none",
)
EFFICIENT = dict(
    family="efficient_unet",
    widths=(32, 64, 128, 256),
    blocks=(2, 4, 8, 8),
    attention=("none", "none", "none", "fused"),
    heads=8,
    cond_dim=128,
    pooling="attention",
    pool_heads=4,
    residual_scale=2**-0.5,
    scale_shift=True,
    dropout=0.0,
    dtype="float32",
    remat="none",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="images a step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each, in turn")
    args = parser.parse_args()
    runs = {"ordinary": prepare(ORDINARY, args.batch), "efficient": prepare(EFFICIENT, args.batch)}
    for run in runs.values():
        advance(run)  # the first step allocates
    for _ in range(args.steps):
        for run in runs.values():
            run["seconds"].append(advance(run))
    ratios = [a / b for a, b in zip(runs["ordinary"]["seconds"], runs["efficient"]["seconds"])]
    for name, run in runs.items():
        report = {
            key: run[key] for key in ("parameters", "gflop_forward_an_image", "temporaries_mib")
        }
        print(
            json.dumps(
                {"network": name, **report, "step_s": round(statistics.median(run["seconds"]), 3)}
            )
        )
    print(
        json.dumps(
            {
                "steps_a_second_efficient_over_ordinary": {
                    "median": round(statistics.median(ratios), 2),
                    "min": round(min(ratios), 2),
                    "max": round(max(ratios), 2),
                }
            }
        )
    )


def prepare(model: dict, b: int) -> dict:
    """A compiled train step with its state and batch, and what the compiler says of it."""
    config = json.loads(sr_256.get_config().to_json()) | {"model": model}
    config["text"]["dim"], config["data"]["text_length"] = 256, 32
    stage = create_stage(config)
    optimizer = optim.make_optimizer(config["optim"], 100)
    step = make_step(
        stage, optimizer, optim.learning_rate(config["optim"], 100), config["optim"], 0
    )
    state = jax.jit(lambda: initial_state(stage, optimizer, 0))()
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 2, shape).astype(dtype)
        for name, (shape, dtype) in stage.batch_shapes(b, stage.largest_bucket).items()
    }
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return {
        "step": compiled,
        "state": state,
        "batch": batch,
        "seconds": [],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "gflop_forward_an_image": round(forward_flops(stage, stage.largest_bucket) / 1e9, 2),
        "temporaries_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20),
    }


def advance(run: dict) -> float:
    """One step; its seconds."""
    start = time.perf_counter()
    run["state"], metrics = run["step"](run["state"], run["batch"])
    jax.block_until_ready(metrics)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
