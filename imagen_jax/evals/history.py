"""evaluations.jsonl of `evaluate --follow`: one line for each evaluated checkpoint of a workdir."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_jax.storage import check_object, write_atomically

FILE = "evaluations.jsonl"
PROVENANCE = {  # the fields of a line that settings are compared with
    "provenance.config.sampling": dict,
    "provenance.data.manifest_hash": str,
    "provenance.checkpoint.which": str,
    "provenance.sampling": dict,
}
log = logging.getLogger("imagen_jax.evals.history")


def last_provenance(file: Path) -> dict[str, Any] | None:
    """The provenance of the last complete line; None if there is no line or no file.

    Raises ValueError if the line is damaged.
    """
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    if not lines:
        return None
    return _line(file, len(lines), lines[-1], PROVENANCE)["provenance"]


def steps(file: Path) -> set[int]:
    """The steps with a complete line in `file`.

    Removes an incomplete last line, which a killed process leaves. Raises ValueError if another
    line is damaged.
    """
    content = file.read_bytes() if file.is_file() else b""
    complete = content[: content.rfind(b"\n") + 1]
    if complete != content:
        log.warning("%s: removed an incomplete last line", file)
        write_atomically(file, complete)
    lines = enumerate(complete.split(b"\n")[:-1], 1)
    return {_line(file, number, line, {"step": int})["step"] for number, line in lines}


def append(file: Path, result: Mapping[str, Any]) -> None:
    """Appends one line and syncs it to disk."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _line(file: Path, number: int, line: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """The object in a line. Raises ValueError that names file and line."""
    label, remedy = f"{file}, line {number},", "remove the line, or give another --output"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is not valid JSON ({error}); {remedy}") from error
    check_object(label, content, fields, remedy)
    return content
