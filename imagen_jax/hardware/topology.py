"""Names of hardware as people write them, and the compile-only devices behind them: nothing here
needs the hardware.

v5e:16x16, 2xv5p:4x4x8 (two slices)          chip and torus
v5litepod-256, v5e-256, v6e-256              a count of chips
v4-512, v5p-256, 2xv5p-256                   a count of cores, two a chip
h100-256, a100:32x8 (nodes x GPUs)           GPUs
"""

import dataclasses
import math
import os
import re
from typing import Any

from imagen_jax.hardware import gpus
from imagen_jax.hardware.chips import Chip, by_name

ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6litepod": "v6e"}
# The torus of a slice by its chips (the supported configurations of
# docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e).
FLAT = {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
}
CUBES = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
}
MOST_SLICES = 64
TORI = {"v4": CUBES, "v5p": CUBES, "v5e": FLAT, "v6e": FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal parts, joined by the data-centre network; a part is a torus of chips, or of a
    GPU cluster (nodes, GPUs a node).
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[Any]:
        """Compile-only devices, one a chip. Raises ValueError if the compiler for them is not
        installed or knows no such topology.
        """
        os.environ.setdefault(
            "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
        )  # several processes may compile at once
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # It warns of hardware that is not there, and looks for what a TPU machine says of itself.
        for name, value in {
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        }.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        name, options = self._as_the_compiler_says()
        try:
            return list(
                topologies.get_topology_desc(name, platform=self.chip.platform, **options).devices
            )
        except Exception as error:  # jaxlib raises whatever the plugin does
            extra = {"tpu": "tpu", "cuda": "gpu-plan"}[self.chip.platform]
            raise ValueError(
                f"cannot compile for {self}: {error}. The compiler comes with pip install"
                f" 'imagen_jax[{extra}]'"
            ) from error

    def _as_the_compiler_says(self) -> tuple[str, dict[str, Any]]:
        if self.chip.platform == "cuda":
            return self.chip.name, {
                "topology": f"{self.slices}x{'x'.join(map(str, self.shape))}",
                "target_config": gpus.target(self.chip),
            }
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # one device a chip, as on a real v4
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}", options


def smallest_shape(chip: Chip, chips: int = 4) -> tuple[int, ...]:
    """The smallest slice of a TPU with so many chips; of 4, the smallest that has links."""
    return next(shape for count, shape in TORI[chip.name].items() if count >= chips)


def parse(text: str) -> Topology:
    """The topology of a name. Raises ValueError that says what names there are."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
    if not found:
        raise ValueError(
            f"--topology {text!r} is no topology; write v5e:16x16, 2xv5p:4x4x8, v5litepod-256,"
            " v4-512 (cores) or h100-64"
        )
    chip = by_name(ALIASES.get(found[2], found[2]))
    slices = int(found[1] or 1)
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
    else:
        shape = _shape(text, chip, int(found[4]) // chip.cores)
    if chip.platform == "cuda" and len(shape) == 1:
        shape = _shape(text, chip, shape[0])
    if not 1 <= slices <= MOST_SLICES:
        raise ValueError(f"--topology {text}: {slices} slices; 1 to {MOST_SLICES} are possible")
    if chip.platform == "tpu":
        _check_torus(text, chip, shape)
    elif len(shape) != 2 or shape[0] < 1 or not 1 <= shape[1] <= chip.chips_per_host:
        raise ValueError(
            f"--topology {text}: write nodes x GPUs of a node, of which there are up to"
            f" {chip.chips_per_host}, such as {chip.name}:4x8"
        )
    return Topology(chip, shape, slices)


def _check_torus(text: str, chip: Chip, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a slice that cannot be had: of v4 and v5p larger ones are made of cubes
    of 4x4x4 chips.
    """
    known = list(TORI[chip.name].values())
    if len(shape) != len(known[0]):
        raise ValueError(
            f"--topology {text}: a torus of {chip.name} has {len(known[0])} sides, such as"
            f" {known[-2]}"
        )
    cubes = (
        len(shape) == 3
        and all(side >= 4 and side % 4 == 0 for side in shape)
        and math.prod(shape) <= max(TORI[chip.name])
    )
    if not cubes and shape not in known:
        names = ", ".join("x".join(map(str, torus)) for torus in known)
        raise ValueError(
            f"--topology {text}: there is no such slice of {chip.name}; slices are"
            f" {names}{' and other multiples of 4x4x4' if len(shape) == 3 else ''}"
        )


def _shape(text: str, chip: Chip, chips: int) -> tuple[int, ...]:
    if chip.platform == "cuda":
        if chips > chip.chips_per_host and chips % chip.chips_per_host:
            raise ValueError(
                f"--topology {text}: {chips} GPUs are no whole number of nodes of"
                f" {chip.chips_per_host}"
            )
        return max(1, chips // chip.chips_per_host), min(chips, chip.chips_per_host)
    if chips not in TORI[chip.name]:
        raise ValueError(
            f"--topology {text}: {chips} chips of {chip.name} are no slice; slices have"
            f" {', '.join(map(str, TORI[chip.name]))} chips"
        )
    return TORI[chip.name][chips]
