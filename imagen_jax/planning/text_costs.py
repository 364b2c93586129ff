"""Compares two ways to get text features: encoded once and stored, or encoded in every step.

Stored features cost the chip-hours of encoding every caption once, and a store. Encoding in the
training (`text.online`) needs no store; it costs time in every step and memory for the weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.data.prepare.caption_estimate import StoreEstimate
from imagen_jax.data.records import EMBEDDINGS
from imagen_jax.hardware.topology import Topology
from imagen_jax.planning import encoder_plan
from imagen_jax.planning.online_plan import Encoder
from imagen_jax.planning.step_time import SECONDS_PER_HOUR
from imagen_jax.text.encoder import bucket_length

SHARD_SIZE = 4096  # captions per shard and captions per batch: the defaults of prepare_data
ENCODE_BATCH = 64


def compare(
    config: Mapping[str, Any],
    topology: Topology,
    encoders: Sequence[Encoder],
    online: Mapping[str, Any],
    captions: Sequence[int],
    tokens: float,
    step: float | None,
    cache: str,
    price: float = 0.0,
) -> dict[str, Any]:
    """The costs of stored features and of encoding in the training.

    Args:
        config: complete config of the stage.
        topology: the hardware of both.
        encoders: those of the stage; all of them have known sizes.
        online: `online_plan.plan_online` of them.
        captions: numbers of distinct captions.
        tokens: mean length of the captions in tokens; an encoder cuts it to its input's length.
        step: seconds of a train step without encoding; None if unknown.
        cache: directory of cached costs.
        price: of a chip-hour, or 0.

    Returns a dict with the assumptions, "once" (encoding on all chips), "online" (encoding in the
    training) and "rows", one for each number of captions.
    """
    once = [_once(encoder, topology, tokens, cache) for encoder in encoders]
    steps, batch = config["train"]["steps"], config["data"]["batch_size"]
    step_chip_hours = online["seconds"] * topology.chips / SECONDS_PER_HOUR
    chip_hours_per_caption = sum(
        1 / row["captions_per_s_per_chip"] / SECONDS_PER_HOUR for row in once
    )
    rows = []
    for count in captions:
        chip_hours = count * chip_hours_per_caption
        equal = chip_hours / step_chip_hours
        rows.append(
            {
                "captions": count,
                "bytes": {name: store_bytes(encoders, count, tokens, name) for name in EMBEDDINGS},
                "once_hours": chip_hours / topology.chips,
                "once_chip_hours": chip_hours,
                **({"once_money": chip_hours * price} if price else {}),
                "epochs": steps * batch / count,
                "break_even_steps": equal,
                "break_even_epochs": equal * batch / count,
            }
        )
    return {
        "tokens": tokens,
        "once": once,
        "online": {
            "names": [encoder.given for encoder in encoders],
            "seconds": online["seconds"],
            "share": online["seconds"] / step if step else None,
            "steps": steps,
            "chip_hours": steps * step_chip_hours,
            **({"money": steps * step_chip_hours * price} if price else {}),
            "weights": online["weights"],
            "is_bound": online["is_bound"],
        },
        "rows": rows,
    }


def store_bytes(encoders: Sequence[Encoder], captions: int, tokens: float, embedding: str) -> float:
    """Bytes on disk of the features of all encoders, without the texts of the captions.

    tokens: see `compare`. embedding: their dtype, of `records.EMBEDDINGS`.
    """
    stores = (
        StoreEstimate(
            captions,
            tokens=min(tokens, encoder.input.length),
            text_bytes=0,
            dim=encoder.input.dim,
            shard_size=SHARD_SIZE,
            embedding=embedding,
            pooled_dim=encoder.network.config.pooled_dim if encoder.input.name else 0,
        )
        for encoder in encoders
    )
    return sum(store.bytes for store in stores)


def _once(encoder: Encoder, topology: Topology, tokens: float, cache: str) -> dict[str, Any]:
    """Encoding captions of about `tokens` tokens with prepare_data's defaults: one pass of
    `encoder_plan.plan_encoder`, with the encoder's name.
    """
    length = bucket_length(math.ceil(min(tokens, encoder.input.length)), encoder.input.length)
    plan = encoder_plan.plan_encoder(encoder.network, topology, [length], ENCODE_BATCH, 0, cache)
    return {"name": encoder.given} | plan["passes"][0]
