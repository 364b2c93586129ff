"""Reads the command lines of launch, launch.sweep and launch.status with absl flags.

Each call has its own flag values instead of absl's global ones, because a command line also has
arguments that are not flags of launch (config fields, a command and its options, work directories).
"""

import sys
from collections.abc import Callable, Sequence

from absl import flags

from imagen_jax import cli

CONTINUE = "run the same command again to continue"
CHECKOUT = (
    "Run it in the root directory of a checkout: configs/ and launch/ are not part of the installed"
    " package."
)


class _Help(flags.BooleanFlag):
    """--help prints a description and all flags, then exits with 0."""

    def __init__(self, description: str, values: flags.FlagValues):
        super().__init__("help", False, "print this text and exit", short_name="h")
        self._description, self._values = description, values

    def parse(self, argument: str) -> None:
        super().parse(argument)
        if self.value:
            text = self._values.get_help(include_special_flags=False)
            print(f"{self._description.strip()}\n\n{CHECKOUT}\n{text}")
            sys.exit(0)


def parse(
    argv: Sequence[str], define_flags: Callable[[flags.FlagValues], None], description: str
) -> tuple[flags.FlagValues, list[str]]:
    """Parses a command line: (flag values, the remaining arguments in order).

    define_flags: defines flags in the values that it is given. description: what --help prints
    first. Raises ValueError for a flag that lacks a value or has an invalid one.
    """
    values = flags.FlagValues()
    define_flags(values)
    flags.DEFINE_flag(_Help(description, values), values, module_name=__name__)
    values.set_gnu_getopt()  # flags may follow other arguments
    try:
        return values, values(["launch", *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ValueError(cli.cause(error)) from error


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Calls `main` with `argv` (None: the process's own); the exit code.

    Expected errors are printed as one line on standard error.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return cli.guard(lambda: main(arguments), f"interrupted; {CONTINUE}")
