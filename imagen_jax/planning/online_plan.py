"""The plan of text encoders that run in the training (`text.online`): memory and time per step.

The encoders are sharded over the mesh of the training, and encode the global batch before its step,
each by a program of its own, on captions padded to the length of the stage's input.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh

from imagen_jax.hardware.topology import Topology
from imagen_jax.online_text import check_sizes, named_encoders
from imagen_jax.planning import encoder_plan
from imagen_jax.text_inputs import TextInput
from imagen_jax.weights.text_encoders import check_length

# Parts of a train step's memory that stay on the chips while captions are encoded.
RESIDENT = ("parameters", "EMA", "optimizer", "EMA tracks", "batch")
WEIGHTS, BEYOND = "text encoders", "text encoding"  # parts of the memory
log = logging.getLogger("imagen_jax.plan")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A text encoder of a stage.

    input: the stage's input that it feeds. given: what names it, with its choice of features.
    network: None if its sizes are unknown here.
    """

    input: TextInput
    given: str
    network: nn.Module | None


def find_encoders(config: Mapping[str, Any], given: str) -> list[Encoder]:
    """The encoders of a stage's inputs, in their order.

    config: complete config of the stage. given: as `text.online_encoder`; the short names of
        `text/sizes.py` are known as well.

    Raises ValueError if the encoders are not those of the stage's inputs, or read shorter texts.
    """
    encoders = []
    for one, name in named_encoders(config, given):
        network = encoder_plan.known_network(name)
        encoders.append(Encoder(one, name, network))
        if network is None:
            log.warning("the sizes of the text encoder %s are unknown; it is not planned", name)
            continue
        check_sizes(one, network.config, name)
        check_length(one.length, network.config.max_length, name, one.length_field)
    return encoders


def plan_online(
    encoders: Sequence[Encoder],
    topology: Topology,
    mesh: Mesh,
    rows: int,
    cache: str,
) -> dict[str, Any]:
    """Memory and time of encoding a global batch on the mesh of the training.

    rows: captions of the batch. cache: directory of cached costs.

    Returns a dict with "encoders" (name, tokens, and `encoder_plan.encoding` of each), "unknown"
    (encoders that are not planned), and of all encoders "weights" (bytes on a chip), "seconds" per
    step, and "is_bound" (True for GPUs: a lower bound).
    """
    planned, unknown = [], []
    for encoder in encoders:
        if encoder.network is None:
            unknown.append(encoder.given)
            continue
        length = encoder.input.length
        log.info("compiling the text encoder %s for %d chips", encoder.given, mesh.size)
        dtype = encoder_plan.DTYPE
        costs = encoder_plan.encoding(encoder.network, dtype, topology, mesh, rows, length, cache)
        planned.append({"name": encoder.given, "tokens": length} | costs)
    return {
        "encoders": planned,
        "unknown": unknown,
        "weights": sum(row["weights"] for row in planned),
        "seconds": sum(row["seconds"] for row in planned),
        "is_bound": topology.chip.platform != "tpu",
        "shards": mesh.shape["fsdp"],
    }


def with_encoders(memory: Mapping[str, Any], online: Mapping[str, Any]) -> dict[str, Any]:
    """The memory of a train step together with that of its encoders.

    The weights of all encoders stay on the chips. While one encodes, the training state is there,
    but no gradients and activations.

    memory: the entry "memory" of a plan. online: the result of `plan_online`.
    """
    parts, weights = memory["parts"], online["weights"]
    resident = sum(size for part, size in parts.items() if part in RESIDENT)
    step = memory["peak"] + weights
    encoding = max(
        (resident + weights - row["weights"] + row["peak"] for row in online["encoders"]),
        default=0,
    )
    peak = max(step, encoding)
    added = {WEIGHTS: weights} | ({BEYOND: encoding - step} if encoding > step else {})
    fits = memory["fits"] and peak <= memory["limit"]
    return {**memory, "fits": fits, "peak": peak, "parts": parts | added}


def weights_on_a_chip(config: Mapping[str, Any], mesh: Mesh) -> int:
    """Bytes on a chip of the weights of a config's encoders; 0 without text.online."""
    text = config["text"]
    encoders = find_encoders(config, text["online_encoder"]) if text["online"] else []
    return sum(
        encoder_plan.sharded_bytes(encoder.network, mesh)
        for encoder in encoders
        if encoder.network is not None
    )
