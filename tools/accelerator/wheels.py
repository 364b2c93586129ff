"""Wheels of the requirements that an image with JAX, PyTorch and transformers lacks.

They are downloaded where there is a network, and installed into a separate directory where there is
none. A package that is installed already is skipped, whatever its version.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64",
             "manylinux2014_x86_64", "manylinux1_x86_64")  # fmt: skip
WHEELS = (
    "jaxtyping", "wadler_lindig", "ml_collections", "safetensors", "etils", "importlib_resources",
    # Training: data, log and progress.
    "array_record", "grain", "cloudpickle", "portpicker", "psutil",
    "tensorflow-datasets", "tensorflow-metadata",
    "googleapis-common-protos", "dm-tree", "attrs", "wrapt", "immutabledict", "promise",
    "simple-parsing", "docstring_parser", "termcolor", "toml", "six", "requests", "tensorboardX",
    "tqdm",
    # Tests.
    "beartype", "pytest-timeout", "pytest-xdist", "execnet",
)  # fmt: skip
SOURCE_ONLY = ("promise",)  # published without a wheel; pure Python


def download(directory: Path) -> int:
    """Downloads the wheels; their total size in bytes."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    binary = [name for name in WHEELS if name not in SOURCE_ONLY]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    target += [word for platform in PLATFORMS for word in ("--platform", platform)]
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*pip, "download", "--no-deps", "-q", "-d", directory, *target, *binary], check=True
    )
    subprocess.run([*pip, "wheel", "--no-deps", "-q", "-w", directory, *SOURCE_ONLY], check=True)
    return sum(file.stat().st_size for file in directory.glob("*.whl"))


def install(directory: Path, site: Path) -> list[Path]:
    """Installs the missing packages into `site`; their wheels."""
    missing = [w for w in sorted(directory.glob("*.whl")) if not present(w.name.partition("-")[0])]
    if not missing or pip_install(missing, site):
        return missing
    # One that this Python cannot use does not keep the others out.
    return [wheel for wheel in missing if pip_install([wheel], site)]


def pip_install(wheels: list[Path], site: Path) -> bool:
    """Installs wheels without a network; whether it succeeded."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", site, *wheels]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        print(f"pip install: {done.stderr.strip()[-300:]}", flush=True)
    return not done.returncode


def present(name: str) -> bool:
    """Whether a distribution of this name is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
