"""An earlier result in the output directory: a new one may replace it only with the same settings.

More metrics or other networks are no other settings: the pictures are the same.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from imagen_jax import schema
from imagen_jax.distributed import agreement
from imagen_jax.encoder_identity import SAME_TEXT, from_record
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import exists, read_json

ADVICE = "give another --output, or remove it"


def check(path: AnyPath, described: Mapping[str, Any], axes: Collection[str] = ()) -> None:
    """Raises ValueError in all processes if the result at `path` is of other pictures.

    All processes call it; process 0 reads the file. described: as of `suite_evaluation.drawn_from`.
    axes: of a grid, such as "base.w".
    """
    agreement.check_in_first(lambda: _check(path, described, axes))


def _check(path: AnyPath, described: Mapping[str, Any], axes: Collection[str]) -> None:
    if not exists(path):
        return
    found = read_json(path, ADVICE)
    try:
        before = facts(found["provenance"])
        axes = {*axes, *found.get("grid", ())}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a complete result of evaluate --cascade: {ADVICE}"
        ) from error
    now = facts(json.loads(json.dumps(described)))
    differ = [name for name in now | before if before.get(name) != now.get(name)]
    if differ := [name for name in differ if name not in axes]:
        raise ValueError(f"{path} is of other settings ({', '.join(differ)} differ): {ADVICE}")


def facts(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of everything in a result's provenance that determines its pictures.

    Settings of a stage are named STAGE.FIELD. Raises KeyError and the like for a damaged one.
    """
    # Older records list the stages that were wanted, not those that ran.
    stages = provenance["stages"][: len(provenance["checkpoints"])]
    found = {
        "the prompts of --suite": provenance["suite"]["prompts_sha256"],
        "--per_prompt": provenance["pictures"]["per_prompt"],
        "--seed": provenance["pictures"]["seeds"],
        "--stages": stages,
        "text encoder": {
            name: [identity.get(field) for field in SAME_TEXT]
            for name, identity in from_record(provenance["encoder"]).items()
        },
    }
    for name, checkpoint in zip(stages, provenance["checkpoints"]):
        found[f"{name}.checkpoint"] = [checkpoint["sha256"], checkpoint["which"]]
        sampling = schema.complete_sampling(provenance["config"][name]["sampling"], name)
        found |= {f"{name}.{field}": value for field, value in sampling.items()}
    return found
