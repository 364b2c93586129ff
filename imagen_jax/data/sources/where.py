"""Conditions on the metadata of items: `--where "width >= 256 and punsafe < 0.1"`.

Conditions are evaluated by simpleeval, which runs no code: comparisons, arithmetic, `and`, `or`,
`not`, `in`, and the functions of FUNCTIONS.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

import simpleeval

from imagen_jax.data.sources.source import Fault

FUNCTIONS = {"abs": abs, "len": len, "lower": str.lower, "max": max, "min": min}
FILTERED, UNDECIDED = "filtered", "filter_undecided"


class Where:
    """A condition. Items without a value for one of its names are left out, with the reason."""

    def __init__(self, text: str):
        """Raises ValueError if the text is no condition."""
        self.text = text
        self._eval = simpleeval.EvalWithCompoundTypes(functions=FUNCTIONS)
        try:
            self._tree = self._eval.parse(text)
            nodes = list(ast.walk(self._tree))
            _check_nodes(nodes)
            names = {node.id for node in nodes if isinstance(node, ast.Name)}
            self.names = sorted(names - FUNCTIONS.keys())
        except (SyntaxError, simpleeval.InvalidExpression, ValueError) as error:
            raise ValueError(f"--where {text!r} is no condition: {error}") from error
        if not self.names:
            raise ValueError(f"--where {text!r} names no field of the metadata")

    def __reduce__(self):
        """Worker processes parse the text again."""
        return Where, (self.text,)

    def fault(self, metadata: Mapping[str, Any]) -> Fault | None:
        """Why an item is left out; None if it is kept."""
        missing = [name for name in self.names if _is_missing(metadata.get(name))]
        if missing:
            return Fault(UNDECIDED, f"no {', '.join(missing)}")
        self._eval.names = {name: metadata[name] for name in self.names}
        try:
            kept = self._eval.eval(self.text, previously_parsed=self._tree)
        except Exception as error:  # simpleeval raises those of Python too, such as TypeError
            return Fault(UNDECIDED, f"{type(error).__name__}: {error}"[:200])
        if kept:
            return None
        values = ", ".join(f"{name} = {metadata[name]!r:.40}" for name in self.names)
        return Fault(FILTERED, values)


def _check_nodes(nodes: Sequence[ast.AST]) -> None:
    for node in nodes:
        if isinstance(node, ast.Attribute):
            raise ValueError(f"a name has no part {node.attr!r}")
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") not in FUNCTIONS:
            raise ValueError(f"functions are {', '.join(FUNCTIONS)}")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
