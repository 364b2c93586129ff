"""The command line of every verb: flags, one-line errors with exit codes, logging, JAX settings."""

import argparse
import errno
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

from imagen_jax import caption_text, exit_codes, schema
from imagen_jax.storage import check_local, is_away

log = logging.getLogger(__name__)

COMPILE_CACHE = "compile_cache"
# Exceptions of flags, and of a config file that a flag names.
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
# Errors of the file system: what to do about each.
ADVICE = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some space, then run the same command again",
    errno.EROFS: "give a directory that can be written to",
    errno.EACCES: "check its permissions, or give another path",
    errno.EPERM: "check its permissions, or give another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EMFILE: "raise the limit with `ulimit -n`",
}
# JAX reports these when another process or the network failed.
UNREACHABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")


def run(define_flags: Callable[[], None], main: Callable[[], int | None]) -> None:
    """Parses the flags of `define_flags`, calls `main` and exits with its result (None: 0).

    Flags are global and several verbs have flags of the same name, so a verb defines its flags when
    it runs, not when it is imported. For errors see `guard`.
    """
    escape_unprintable()
    define_flags()

    def guarded(argv):
        if len(argv) > 1:
            return fail(f"unexpected argument {argv[1]!r}; options start with --, see --help")
        return guard(main)

    app.run(guarded, flags_parser=parse)


def guard(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Calls `main` and returns the exit code; an expected error is one line on standard error.

    interrupted: the line after Ctrl-C.

    The codes are those of imagen_jax/exit_codes.py. An unexpected error is raised.
    IMAGEN_JAX_TRACEBACK=1 raises every error.
    """
    try:
        return main() or 0
    except KeyboardInterrupt:
        return fail(interrupted, exit_codes.INTERRUPTED)
    except Exception as error:
        explanation = explain(error)
        if explanation is None or os.environ.get("IMAGEN_JAX_TRACEBACK"):
            raise
        return fail(*explanation)


def escape_unprintable() -> None:
    """Lets print() escape characters that the terminal's encoding lacks instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def explain(error: BaseException) -> tuple[str, int] | None:
    """(message that says what to do, exit code) of an expected error, None for any other."""
    if explanation := _explain_device(error):
        return explanation
    if isinstance(error, MemoryError):
        reason = f" ({error})" if str(error) else ""
        advice = "use smaller batches or a machine with more memory"
        return f"out of host memory{reason}: {advice}", exit_codes.FAILED
    if isinstance(error, exit_codes.EXPECTED):
        message = describe(error) if isinstance(error, OSError) else str(error)
        return message, exit_codes.of(error)
    return None


def describe(error: OSError) -> str:
    """An error of the file system with the file's name and what to do about it."""
    if error.strerror is None:
        return str(error)
    path = f"{error.filename}: " if error.filename is not None else ""
    retry = "the file system did not answer; run the same command again"
    advice = retry if is_away(error) else ADVICE.get(error.errno, "")
    return f"{path}{error.strerror}" + (f"; {advice}" if advice else "")


def _explain_device(error: BaseException) -> tuple[str, int] | None:
    """`explain` for the errors of JAX: absent devices, no device memory, lost connections."""
    if not isinstance(error, (RuntimeError, AssertionError)) or "jax" not in sys.modules:
        return None
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        if first.startswith("RESOURCE_EXHAUSTED"):
            advice = "use a smaller batch size, or more or larger devices"
            return f"out of device memory: {advice} ({first})", exit_codes.INVALID
        if first.startswith(UNREACHABLE):
            return f"{first}; run the same command again", exit_codes.FAILED
    if first.startswith("Unable to initialize backend"):
        unknown = "not in the list of known backends" in text
        reason = re.sub(r" \((set JAX_PLATFORMS|you may need).*", "", first)
        code = exit_codes.INVALID if unknown else exit_codes.FAILED
        return f"{reason}; set JAX_PLATFORMS=cpu to run on the CPU", code
    if not first:  # jax asserts that it has initialised a device
        try:
            check_platform()
        except ValueError as absent:
            return str(absent), exit_codes.INVALID
    return None


def check_platform() -> None:
    """Raises ValueError if no platform of $JAX_PLATFORMS has a device here.

    With CUDA and no GPU, JAX would compute on the CPU without a warning. Initialises JAX, so in a
    run of several processes it comes after jax.distributed.initialize.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if not wanted or "cpu" in wanted.split(","):
        return
    import jax

    try:
        absent = jax.default_backend() == "cpu"
    except AssertionError:  # there is no other platform either
        absent = True
    if absent:
        raise ValueError(
            f"JAX_PLATFORMS={wanted}, but JAX finds no such device: install its driver and JAX's"
            " plugin for it, or set JAX_PLATFORMS=cpu to run on the CPU"
        )


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(message))


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: list[str]) -> list[str]:
    """Parses flags and the config file they name; an error in either is one line."""
    try:
        return flags.FLAGS(argv)
    except FLAG_ERRORS as error:
        if os.environ.get("IMAGEN_JAX_TRACEBACK"):
            raise
        sys.exit(fail(cause(error)))


def cause(error: Exception) -> str:
    """The message of an error, without a config file's traceback and a KeyError's quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # ml_collections quotes its message twice.
    if near := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
        return f"the config has no field {near[2]!r}; did you mean {near[1]!r}?"
    if isinstance(error, (KeyError, AttributeError)) and (name := text.strip("'\"")).isidentifier():
        return f"the config has no field {name!r}"
    _, traceback, after = text.rpartition("Traceback (most recent call last):")
    return after.strip().splitlines()[-1] if traceback and after.strip() else text


def stage_config(config: Any, flag: str = "--config") -> dict[str, Any]:
    """A stage's config as a complete plain dict. Raises ValueError for any other config.

    flag: the command-line flag that gave it.
    """
    parts = {"data", "model", "optim", "mesh", "train"}
    # set() raises for a config that cannot be read.
    if not hasattr(config, "to_json") or not parts <= set(config):
        raise ValueError(
            f"{flag} is not the config of a stage, such as configs/base_64.py or configs/sr_256.py"
        )
    return schema.complete(json.loads(config.to_json()), flag, new=True)


def data_config(config: Any, flag: str = "--config") -> dict[str, Any]:
    """`stage_config` of a training. Raises ValueError if its data.path is empty."""
    plain = stage_config(config, flag)
    if not plain["data"]["path"]:
        raise ValueError(
            f"{flag}.data.path is empty: give the directory that imagen_jax.prepare_data made"
        )
    return plain


def check_directory(flag: str, path: str) -> None:
    """Raises ValueError if `path` is a URL, a file, or inside a file. Creates nothing."""
    check_local(f"--{flag}", path)
    while path and not os.path.exists(path):
        path = os.path.dirname(path.rstrip("/"))
    if path and not os.path.isdir(path):
        raise ValueError(f"--{flag} {path} is a file; give a directory")


def make_directory(flag: str, path: str) -> None:
    """Creates the directory of results that take long to compute, before the computation.

    Raises ValueError if no file can be written there.
    """
    check_directory(flag, path)
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"--{flag} {path} cannot be written to: {error.strerror}; give another directory"
        ) from error


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """Returns the prompts, cleaned by the rules of `caption_text`; warns of removed characters.

    Raises:
      ValueError: a prompt is empty or not valid Unicode.
    """
    cleaned = []
    for prompt in prompts:
        text, removed = caption_text.clean(prompt)
        if not text:
            raise ValueError(f"prompt {prompt!r} is empty: give some text")
        if not caption_text.is_text(text):
            raise ValueError(f"prompt {prompt!r} is not valid Unicode: give it as UTF-8")
        if removed:
            log.warning("warning: removed %s from the prompt %r", removed, text)
        cleaned.append(text)
    return cleaned


def fail(message: str, code: int = exit_codes.INVALID) -> int:
    """Prints `error: message` as one line on standard error and returns the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def log_to_stderr() -> None:
    """Shows the package's log at INFO, others at WARNING: orbax logs every file at INFO."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].addFilter(_shorten)
    logging.getLogger("imagen_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)


def _shorten(record: logging.LogRecord) -> bool:
    """A logging filter: replaces JAX's traceback for a plugin that does not load by its message."""
    if record.name.startswith("jax.") and record.exc_info:
        record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]}", ()
        record.exc_info = record.exc_text = None
    return True


def call(command: Sequence[str]) -> int:
    """Runs a process to its end and returns its exit code.

    Passes SIGINT and SIGTERM on, so that a training can save, and raises KeyboardInterrupt after
    the process has ended.
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
    """Defines --compile_cache, for verbs that compile."""
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/imagen_jax")
    flags.DEFINE_string(
        COMPILE_CACHE,
        default,
        "directory of compiled programs, empty for none; $JAX_COMPILATION_CACHE_DIR sets the"
        " default",
    )
    # --help lists only the flags that belong to the verb's own module.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[COMPILE_CACHE])


def set_up_jax() -> None:
    """Sets the compile cache, and adds the CPU to the platforms of $JAX_PLATFORMS.

    Called before a verb's first computation.
    """
    directory = flags.FLAGS[COMPILE_CACHE].value
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory) or None)
    platforms = jax.config.jax_platforms
    # The CPU comes last, so that nothing is computed there unless a program asks for it.
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")
