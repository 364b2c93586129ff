"""evaluations.jsonl of `evaluate --follow`: one line for each evaluated checkpoint of a workdir."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from imagen_jax.line_logs import LineLog, keep_lines, read_lines
from imagen_jax.object_storage import AnyPath
from imagen_jax.storage import check_object

FILE = "evaluations.jsonl"
PROVENANCE = {  # the fields of a line that settings are compared with
    "provenance.config.sampling": dict,
    "provenance.data.manifest_hash": str,
    "provenance.checkpoint.which": str,
    "provenance.sampling": dict,
}
log = logging.getLogger("imagen_jax.evals.history")


def last_provenance(file: AnyPath) -> dict[str, Any] | None:
    """The provenance of the last complete line; None if there is no line or no file.

    Raises ValueError if the line is damaged.
    """
    lines = b"".join(read_lines(file)).split(b"\n")[:-1]
    if not lines:
        return None
    return _line(file, len(lines), lines[-1], PROVENANCE)["provenance"]


def steps(file: AnyPath) -> set[int]:
    """The steps with a complete line in `file`.

    Removes an incomplete last line, which a killed process leaves. Raises ValueError if another
    line is damaged.
    """
    if keep_lines(file, lambda line: line.endswith(b"\n")):
        log.warning("%s: removed an incomplete last line", file)
    lines = enumerate(b"".join(read_lines(file)).split(b"\n")[:-1], 1)
    return {_line(file, number, line, {"step": int})["step"] for number, line in lines}


def append(file: AnyPath, result: Mapping[str, Any]) -> None:
    """Appends one line and stores it."""
    lines = LineLog(file)
    lines.append(json.dumps(result, allow_nan=False))
    lines.close()


def _line(file: AnyPath, number: int, line: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """The object in a line. Raises ValueError that names file and line."""
    label, remedy = f"{file}, line {number},", "remove the line, or give another --output"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is not valid JSON ({error}); {remedy}") from error
    check_object(label, content, fields, remedy)
    return content
