"""The process of one measurement: python -m tools.accelerator.task MODULE JSON.

Calls `run(emit, **arguments)` of tools.accelerator.MODULE. `emit(what, **values)` appends one JSON
line to the file named in ACCELERATOR_RECORDS (or prints it). Exit code 3: out of memory.
"""

import importlib
import json
import math
import os
import sys
import traceback
from typing import Any

OUT_OF_MEMORY = 3  # exit code
SIGNS = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "OutOfMemory")


def main() -> int:
    """The exit code."""
    module, arguments = sys.argv[1], json.loads(sys.argv[2])
    try:
        importlib.import_module(f"tools.accelerator.{module}").run(emit, **arguments)
    except Exception as error:
        traceback.print_exc()
        emit("error", message=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        return OUT_OF_MEMORY if is_out_of_memory(error) else 1
    return 0


def emit(what: str, **values: Any) -> None:
    """Appends a record. A number that is not finite becomes null."""
    line = json.dumps({"what": what} | clean(values), allow_nan=False)
    path = os.environ.get("ACCELERATOR_RECORDS")
    if not path:
        print(line, flush=True)
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def clean(value: Any) -> Any:
    """The value with NaN and infinities replaced by None."""
    if isinstance(value, dict):
        return {name: clean(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of JAX, PyTorch or Python says that memory ran out."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, MemoryError) or any(sign in text for sign in SIGNS)


if __name__ == "__main__":
    sys.exit(main())
