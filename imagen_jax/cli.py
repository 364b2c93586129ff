"""What every verb's command line has in common: errors of the user's making end in one line, not in
a traceback; logging; the compile cache.
"""

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from imagen_jax import exit_codes, schema

COMPILE_CACHE = "compile_cache"
# What flags, and a config file that they name, raise.
FLAG_ERRORS = (
    flags.Error,
    ValueError,
    OSError,
    AttributeError,
    KeyError,
    TypeError,
    SyntaxError,
    ImportError,
    ArithmeticError,
)


def run(define_flags: Callable[[], None], main: Callable[[], int | None]) -> None:
    """Parses the flags that `define_flags` defines, calls `main` and exits with what it returns
    (None: 0).

    Flags are global and verbs have some of the same names, so a verb defines its own when it is run
    and not when it is imported.

    An expected error is printed as one line and exits with its code in imagen_jax/exit_codes.py.
    IMAGEN_JAX_TRACEBACK=1 shows the traceback.
    """

    define_flags()

    def guarded(argv):
        if len(argv) > 1:
            return fail(f"unexpected argument {argv[1]!r}; options start with --, see --help")
        try:
            return main() or 0
        except KeyboardInterrupt:
            return fail("interrupted", exit_codes.INTERRUPTED)
        except exit_codes.EXPECTED as error:
            if os.environ.get("IMAGEN_JAX_TRACEBACK"):
                raise
            return fail(str(error), exit_codes.of(error))

    app.run(guarded, flags_parser=parse)


class Parser(argparse.ArgumentParser):
    """For command lines without absl's flags: what is wrong with one is one line, without the
    usage.
    """

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(message))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: list[str]) -> list[str]:
    """Flags and the config file they name; what is wrong with either is one line."""
    try:
        return flags.FLAGS(argv)
    except FLAG_ERRORS as error:
        if os.environ.get("IMAGEN_JAX_TRACEBACK"):
            raise
        sys.exit(fail(cause(error)))


def cause(error: Exception) -> str:
    """What went wrong, without the traceback that reading a config file puts before it and the
    quotes of a KeyError.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if near := re.search(
        r'Did you mean "(\w+)" instead of "(\w+)"', text
    ):  # ml_collections, quoted twice
        return f"the config has no field {near[2]!r}; did you mean {near[1]!r}?"
    if isinstance(error, (KeyError, AttributeError)) and (name := text.strip("'\"")).isidentifier():
        return f"the config has no field {name!r}"
    _, traceback, after = text.rpartition("Traceback (most recent call last):")
    return after.strip().splitlines()[-1] if traceback and after.strip() else text


def stage_config(config: Any, flag: str = "--config") -> dict[str, Any]:
    """A stage's config, plain and complete. Raises ValueError for another config.

    `flag` is the command-line flag that gave it.
    """
    if not hasattr(config, "to_json") or not {"data", "model", "optim", "mesh", "train"} <= set(
        config
    ):  # a config that cannot be read raises here
        raise ValueError(
            f"{flag} is not the config of a stage, such as configs/base_64.py or configs/sr_256.py"
        )
    return schema.complete(json.loads(config.to_json()), flag, new=True)


def data_config(config: Any, flag: str = "--config") -> dict[str, Any]:
    """`stage_config` of a run, which needs data. Raises ValueError if it names none."""
    plain = stage_config(config, flag)
    if not plain["data"]["path"]:
        raise ValueError(
            f"{flag}.data.path is empty: give the directory that imagen_jax.prepare_data made"
        )
    return plain


def check_directory(flag: str, path: str) -> None:
    """Raises ValueError if something other than a directory has this name, or a part of it."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path.rstrip("/"))
    if path and not os.path.isdir(path):
        raise ValueError(f"--{flag} {path} is a file; give a directory")


def make_directory(flag: str, path: str) -> None:
    """Makes the directory of results that take long, before they are computed. Raises ValueError if
    nothing can be written there.
    """
    check_directory(flag, path)
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"--{flag} {path} cannot be written to: {error.strerror}") from error


def check_prompts(prompts: Iterable[str]) -> None:
    """Raises ValueError for a prompt that nothing can be drawn from."""
    for prompt in prompts:
        if not prompt.strip() or not prompt.isprintable():
            raise ValueError(f"prompt {prompt!r} is empty or not printable text")


def fail(message: str, code: int = 2) -> int:
    """Prints `error: message`, on one line, on standard error and returns the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def log_to_stderr() -> None:
    """The package's log at INFO, everything else at WARNING: orbax reports every file at INFO."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("imagen_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)


def call(command: Sequence[str]) -> int:
    """Runs a process to its end and returns its exit code.

    SIGINT and SIGTERM are passed on, so that a training can save, and raise KeyboardInterrupt when
    it has ended.
    """
    received = []
    process = subprocess.Popen(command)

    def pass_on(number, _):
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
    return code


def define_compile_cache() -> None:
    """The flag of verbs that compile."""
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/imagen_jax")
    flags.DEFINE_string(
        COMPILE_CACHE,
        default,
        "directory of compiled programs, empty for none; $JAX_COMPILATION_CACHE_DIR sets the"
        " default",
    )
    flags.FLAGS.register_key_flag_for_module(
        sys.argv[0], flags.FLAGS[COMPILE_CACHE]
    )  # --help lists the verb's own flags only


def set_up_jax() -> None:
    """Before a verb's first computation: programs are kept in --compile_cache, and the CPU is a
    device beside those of $JAX_PLATFORMS.
    """
    directory = flags.FLAGS[COMPILE_CACHE].value
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory) or None)
    platforms = jax.config.jax_platforms
    if platforms and "cpu" not in platforms.split(
        ","
    ):  # one that is listed later is not computed on by itself
        jax.config.update("jax_platforms", f"{platforms},cpu")
