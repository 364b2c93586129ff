"""Names of hardware topologies, and their compile-only devices. Nothing here needs the hardware.

v5e:16x16, 2xv5p:4x4x8 (two slices)    chip and torus
v5litepod-256, v5e-256, v6e-256        number of chips
v4-512, v5p-256, 2xv5p-256             number of TensorCores, two per chip
h100-256, a100:32x8 (nodes x GPUs)     GPUs
"""

import dataclasses
import math
import os
import re
from typing import Any

from imagen_jax.hardware import gpus
from imagen_jax.hardware.chips import Chip, by_name

ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6litepod": "v6e"}
# The torus of a slice by its number of chips: the supported configurations on
# docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e.
# fmt: off
FLAT = {
    1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
    256: (16, 16),
}
CUBES = {
    4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
    256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16),
}
# fmt: on
MAX_SLICES = 64
TORI = {"v4": CUBES, "v5p": CUBES, "v5e": FLAT, "v6e": FLAT}
# Lets several processes load libtpu, and keeps it from looking for a TPU machine's metadata and
# from warning that there is no TPU.
LIBTPU_WITHOUT_A_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A number of equal slices, connected by the data-centre network.

    A slice is a torus of chips. A GPU cluster is one slice of shape (nodes, GPUs per node).
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{slices}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def devices(self) -> list[Any]:
        """Compile-only devices, one per chip.

        Raises ValueError if the compiler for them is not installed or does not support the
        topology.
        """
        for variable, value in LIBTPU_WITHOUT_A_TPU.items():
            os.environ.setdefault(variable, value)
        from jax.experimental import topologies

        name, options = self._compiler_name()
        try:
            return list(
                topologies.get_topology_desc(name, platform=self.chip.platform, **options).devices
            )
        except Exception as error:  # the plugins raise errors of many types
            extra = {"tpu": "tpu", "cuda": "gpu-plan"}[self.chip.platform]
            raise ValueError(
                f"cannot compile for {self}: {error}. Install the compiler: run"
                f" pip install -e '.[{extra}]' in the checkout"
            ) from error

    def _compiler_name(self) -> tuple[str, dict[str, Any]]:
        """The topology's name for the compiler, and the options of `get_topology_desc`."""
        if self.chip.platform == "cuda":
            return self.chip.name, {
                "topology": f"{self.slices}x{'x'.join(map(str, self.shape))}",
                "target_config": gpus.target(self.chip),
            }
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # one device per chip, as on a real v4
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}", options


def smallest_shape(chip: Chip, chips: int = 4) -> tuple[int, ...]:
    """The smallest TPU slice with at least `chips` chips. 4 chips are the smallest with links."""
    return next(shape for count, shape in TORI[chip.name].items() if count >= chips)


def parse(text: str) -> Topology:
    """The topology with this name. Raises ValueError with the valid names."""
    name = re.fullmatch(
        r"(?:(?P<slices>\d+)x)?(?P<chip>[a-z]\w*?)(?::(?P<shape>\d+(?:x\d+)*)|-(?P<count>\d+))",
        text.strip().lower(),
    )
    if not name:
        raise ValueError(
            f"--topology {text!r} is not a topology; use a name such as v5e:16x16, 2xv5p:4x4x8,"
            " v5litepod-256, v4-512 (cores) or h100-64"
        )
    chip = by_name(ALIASES.get(name["chip"], name["chip"]))
    slices = int(name["slices"] or 1)
    if name["shape"]:
        shape = tuple(map(int, name["shape"].split("x")))
    else:
        shape = _shape(text, chip, int(name["count"]) // chip.cores)
    if chip.platform == "cuda" and len(shape) == 1:
        shape = _shape(text, chip, shape[0])
    if not 1 <= slices <= MAX_SLICES:
        raise ValueError(f"--topology {text}: {slices} slices; use 1 to {MAX_SLICES}")
    if chip.platform == "tpu":
        _check_torus(text, chip, shape)
    elif len(shape) != 2 or shape[0] < 1 or not 1 <= shape[1] <= chip.chips_per_host:
        raise ValueError(
            f"--topology {text}: use nodes x GPUs per node, with up to {chip.chips_per_host} GPUs"
            f" per node, such as {chip.name}:4x8"
        )
    return Topology(chip, shape, slices)


def _check_torus(text: str, chip: Chip, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a slice that is not offered.

    Larger slices of v4 and v5p consist of cubes of 4x4x4 chips.
    """
    tori = list(TORI[chip.name].values())
    if len(shape) != len(tori[0]):
        raise ValueError(
            f"--topology {text}: a torus of {chip.name} has {len(tori[0])} dimensions, such as"
            f" {'x'.join(map(str, tori[-2]))}"
        )
    cubes = (
        len(shape) == 3
        and all(side >= 4 and side % 4 == 0 for side in shape)
        and math.prod(shape) <= max(TORI[chip.name])
    )
    if not cubes and shape not in tori:
        names = ", ".join("x".join(map(str, torus)) for torus in tori)
        raise ValueError(
            f"--topology {text}: there is no such slice of {chip.name}; use one of"
            f" {names}{' or another multiple of 4x4x4' if len(shape) == 3 else ''}"
        )


def _shape(text: str, chip: Chip, chips: int) -> tuple[int, ...]:
    """The shape of a slice with this number of chips. Raises ValueError if there is none."""
    if chip.platform == "cuda":
        if chips > chip.chips_per_host and chips % chip.chips_per_host:
            raise ValueError(
                f"--topology {text}: {chips} GPUs do not fill whole nodes of {chip.chips_per_host};"
                f" use a multiple of {chip.chips_per_host}"
            )
        return max(1, chips // chip.chips_per_host), min(chips, chip.chips_per_host)
    if chips not in TORI[chip.name]:
        raise ValueError(
            f"--topology {text}: there is no slice of {chips} {chip.name} chips; slices have"
            f" {', '.join(map(str, TORI[chip.name]))} chips"
        )
    return TORI[chip.name][chips]
