"""The provenance of a result besides its settings: versions, code, devices."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from imagen_jax import __version__

PACKAGES = ("jax", "flax", "numpy", "grain", "Pillow")


def software() -> dict[str, Any]:
    """The versions of this package, of Python and of the libraries, and the code's commit."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    own = {"imagen_jax": __version__, "python": platform.python_version()}
    return {"versions": own | versions, "commit": commit()}


def commit() -> str | None:
    """The commit of the checkout that the package runs from, with "+changes" if files differ.

    None if it is not a checkout, or git is not installed.
    """
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    run = lambda *words: subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        changed = run("status", "--porcelain", "--untracked-files=no")
        return run("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def devices() -> str:
    """The number and kind of the devices of all processes."""
    processes = jax.process_count()
    among = f" of {processes} processes" if processes > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{among}"
