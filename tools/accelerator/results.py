"""The results of a call, always up to date on disk: results.json, table.md, log.txt."""

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.accelerator.tables import markdown

LOG_LIMIT = 8 << 20  # bytes of log.txt


class Results:
    """The measurements so far. about: the date, commit, command and versions."""

    def __init__(self, output: Path, about: Mapping[str, Any]):
        self.output = output
        self.about = dict(about)
        self.parts: dict[str, dict[str, Any]] = {}
        output.mkdir(parents=True, exist_ok=True)
        (output / "log.txt").write_text("", encoding="utf-8")
        self.write()

    def add(
        self, part: str, name: str, status: str, seconds: float, records: Sequence[Mapping]
    ) -> None:
        """Sets one measurement of a part; facts of the device go to `about`."""
        kept = [dict(record) for record in records if record["what"] != "about"]
        for record in records:
            if record["what"] == "about" and "device" not in self.about:
                self.about |= {k: v for k, v in record.items() if k != "what"}
        entry = {"status": status, "seconds": round(seconds, 2), "records": kept}
        self.parts.setdefault(part, {})[name] = entry
        self.write()

    def extend(self, part: str, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds records to a measurement that has ended."""
        self.parts[part][name]["records"] += map(dict, records)
        self.write()

    def log(self, name: str, status: str, seconds: float, output: str) -> None:
        """Appends a process's output to log.txt, up to a size."""
        path = self.output / "log.txt"
        if path.stat().st_size < LOG_LIMIT:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"===== {name}: {status}, {seconds:.1f} s\n{output.rstrip()}\n")

    def write(self) -> None:
        """Writes results.json, then table.md, each whole."""
        content = json.dumps({"about": self.about, "parts": self.parts}, indent=1, allow_nan=False)
        self._write("results.json", content)
        try:
            page = markdown(self.about, self.parts)
        except Exception:  # a record that no table expects must not end the run
            page = "The tables cannot be made:\n\n" + traceback.format_exc()
        self._write("table.md", page)

    def _write(self, name: str, text: str) -> None:
        temporary = self.output / f".{name}.tmp"
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self.output / name)
