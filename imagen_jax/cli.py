"""Shared by the commands: flags, one-line errors with exit codes, logging, JAX settings."""

import contextlib
import errno
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import app, flags

from imagen_jax import caption_text, config_options, distributed, exit_codes, interrupts, schema
from imagen_jax.distributed import watch
from imagen_jax.storage import FREE_SPACE, is_away

log = logging.getLogger(__name__)

COMPILE_CACHE = "compile_cache"
MOST_PICTURES = 10_000_000  # of a command, which holds a row of each in memory
CONFIGS = {"config", "cascade"}  # flags that name a config file
HELP = {"--help", "-help", "-h", "-?", "--helpshort", "--helpfull", "--helpxml"}
# Exceptions raised while parsing flags or executing a config file.
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
    NameError,
    LookupError,
    AssertionError,
    RuntimeError,
)
_READERS = ("absl", "importlib", "ml_collections", "imagen_jax")  # packages that execute configs
# Advice per file-system error.
ADVICE = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "raise the limit with `ulimit -f`, or use a file system for larger files",
    errno.EROFS: "give a directory that can be written to",
    errno.EACCES: "check its permissions, or give another path",
    errno.EPERM: "check its permissions, or give another path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
    errno.EPIPE: "the program that read the output has ended; write the output to a file",
    errno.EMFILE: "raise the limit with `ulimit -n`",
}
# Status codes that JAX reports if another process or the network failed.
UNREACHABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED")


def run(
    define_flags: Callable[[], None], main: Callable[..., int | None], positional: bool = False
) -> None:
    """Parses the flags of `define_flags`, calls `main` and exits with its return value (None: 0).

    positional: `main` takes the list of positional arguments; otherwise these are an error.

    Flags are global and commands share flag names, so each command defines its flags when it runs,
    not when it is imported. `guard` handles errors.
    """
    escape_unprintable()
    interrupts.repeat_lost()
    others = set(flags.FLAGS)
    define_flags()
    # --help lists the flags of the command's own module only; some are defined in other modules.
    for name in set(flags.FLAGS) - others:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def guarded(argv):
        if positional:
            return guard(lambda: main(argv[1:]))
        if len(argv) > 1:
            return fail(f"unexpected argument {argv[1]!r}; options start with --, see --help")
        return guard(main)

    try:
        app.run(guarded, flags_parser=parse)
    except SystemExit as ended:
        if ended.code == 1 and HELP.intersection(sys.argv[1:]):  # absl's code after --help
            sys.exit(0)
        raise


def guard(main: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Calls `main` and returns the exit code; an expected error is one line on standard error.

    interrupted: the message after Ctrl-C.

    imagen_jax/exit_codes.py lists the exit codes. Unexpected errors propagate. If
    IMAGEN_JAX_TRACEBACK is set, all errors propagate except Ctrl-C.
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
    """Makes print() escape characters that the terminal cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def explain(error: BaseException) -> tuple[str, int] | None:
    """(message with advice, exit code) of an expected error; None for an unexpected one."""
    if explanation := _explain_device(error):
        return explanation
    if isinstance(error, MemoryError):
        reason = f" ({error})" if str(error) else ""
        advice = "use smaller batches or a machine with more memory"
        return f"out of host memory{reason}: {advice}", exit_codes.FAILED
    if exit_codes.is_expected(error):
        message = describe(error) if isinstance(error, OSError) else str(error)
        return message, exit_codes.of(error)
    return None


def describe(error: OSError) -> str:
    """The message of a file-system error: path, cause and advice."""
    if error.strerror is None:
        return str(error)
    path = f"{error.filename}: " if error.filename is not None else ""
    retry = "the file system did not answer; run the same command again"
    advice = retry if is_away(error) else ADVICE.get(error.errno, "")
    return f"{path}{error.strerror}" + (f"; {advice}" if advice else "")


def _explain_device(error: BaseException) -> tuple[str, int] | None:
    """`explain` for JAX errors: missing devices, device memory exhausted, lost connections."""
    if not isinstance(error, (RuntimeError, AssertionError)) or "jax" not in sys.modules:
        return None
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    if exit_codes.runtime_status(error):
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
    # An AssertionError without text: JAX found no device for JAX_PLATFORMS.
    if not first:
        try:
            check_platform()
        except ValueError as absent:
            return str(absent), exit_codes.INVALID
    return None


def check_platform() -> None:
    """Raises ValueError if no platform of $JAX_PLATFORMS has a device here.

    Without this check, JAX_PLATFORMS=cuda on a machine without a GPU runs on the CPU without a
    warning. The check initialises JAX: a multi-process run calls it after
    jax.distributed.initialize.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if not wanted or "cpu" in wanted.split(","):
        return
    import jax

    try:
        absent = jax.default_backend() == "cpu"
    except AssertionError:  # no CPU platform either
        absent = True
    if absent:
        raise ValueError(
            f"JAX_PLATFORMS={wanted}, but JAX found no such device: install its driver and JAX's"
            " plugin for it, or set JAX_PLATFORMS=cpu to run on the CPU"
        )


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: list[str]) -> list[str]:
    """Parses flags and executes the config file that --config names.

    An error in either ends the process with one line.
    """
    try:
        arguments = flags.FLAGS(config_options.last_values(argv, CONFIGS))
        for name in CONFIGS & set(flags.FLAGS):
            hasattr(flags.FLAGS[name].value, "to_json")  # raises for a file that was not loaded
        return arguments
    except FLAG_ERRORS as error:
        if os.environ.get("IMAGEN_JAX_TRACEBACK"):
            raise
        sys.exit(fail(cause(error)))


def cause(error: Exception) -> str:
    """The error's message without the config file's traceback and without a KeyError's quotes.

    A ValueError of the config file is a message to the user, so its name and place are left out.
    """
    return _message(error) + _place(error)


def _message(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
        return f"{', '.join(f'--{name}' for name in missing)} must be given"
    if unread := re.search(r"Is a directory: '(.+)'", text):
        return f"the config {unread[1]} is a directory; give a file, such as configs/base_64.py"
    # ml_collections quotes its message twice.
    if near := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
        return f"the config has no field {near[2]!r}; did you mean {near[1]!r}?"
    if isinstance(error, (KeyError, AttributeError)) and (name := text.strip("'\"")).isidentifier():
        return f"the config has no field {name!r}"
    _, traceback, after = text.rpartition("Traceback (most recent call last):")
    if not traceback or not after.strip():
        return text
    return after.strip().splitlines()[-1].removeprefix("ValueError: ")


def _place(error: Exception) -> str:
    """The place in a config file that raised the error, as " (FILE, line 3)"."""
    if isinstance(error, ValueError):
        return ""
    # ml_collections writes the traceback of a TypeError into its message.
    places = re.findall(r'File "(.+)", line (\d+)', str(error)) or [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").split(".")[0] not in _READERS
    ]
    return f" ({places[-1][0]}, line {places[-1][1]})" if places else ""


def stage_config(config: Any, flag: str = "--config") -> dict[str, Any]:
    """The config of a stage as a plain dict with all fields.

    flag: the command-line flag that set it.

    Raises ValueError if `config` is not the config of a stage, or is invalid.
    """
    parts = {"data", "model", "optim", "mesh", "train"}
    # `hasattr` comes first: set(config) raises for objects that are not configs.
    if not hasattr(config, "to_json") or not parts <= set(config):
        raise ValueError(
            f"{flag} is not the config of a stage, such as configs/base_64.py or configs/sr_256.py"
        )
    return schema.complete(json.loads(config.to_json()), flag, new=True)


def cascade_config(config: Any, flag: str = "--config") -> dict[str, Any]:
    """The completed config of a cascade, from its flag. Raises ValueError for any other config."""
    if not hasattr(config, "to_json") or "base" not in config:
        raise ValueError(f"{flag} is not the config of a cascade, such as configs/cascade.py:demo")
    return schema.complete_cascade(json.loads(config.to_json()), flag, new=True)


def check_count(prompts: int, per_prompt: int, advice: str) -> None:
    """Raises ValueError if one command would draw too many pictures.

    advice: what to do.
    """
    if (count := prompts * per_prompt) > MOST_PICTURES:
        raise ValueError(
            f"{count:,} pictures are more than one command can list in memory ({MOST_PICTURES:,}):"
            f" {advice}"
        )


def check_prompts(prompts: Iterable[str]) -> list[str]:
    """Returns the prompts, cleaned as captions are (`caption_text`); warns of removed characters.

    Raises ValueError if a prompt is empty or not valid Unicode.
    """
    cleaned = []
    for prompt in prompts:
        if not caption_text.is_text(prompt):
            with contextlib.suppress(UnicodeError):  # bytes of an argument in an ASCII locale
                prompt = os.fsencode(prompt).decode()
        text, removed = caption_text.clean(prompt)
        if not text:
            raise ValueError(f"prompt {quoted(prompt)} is empty: give some text")
        if not caption_text.is_text(text):
            raise ValueError(f"prompt {quoted(prompt)} is not valid Unicode: give it as UTF-8")
        if removed:
            log.warning("removed %s from the prompt %s", removed, quoted(text))
        cleaned.append(text)
    return cleaned


def quoted(prompt: str, most: int = 100) -> str:
    """A prompt in quotes for a message, cut to `most` characters."""
    return repr(prompt if len(prompt) <= most else f"{prompt[:most]}...")


def fail(message: str, code: int = exit_codes.INVALID) -> int:
    """Prints `error: message` as one line on standard error and returns the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def log_to_stderr() -> None:
    """Logs the package at INFO and other libraries at WARNING: orbax logs every file at INFO."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger().handlers[0].addFilter(_shorten)
    logging.getLogger("imagen_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.WARNING)


def _shorten(record: logging.LogRecord) -> bool:
    """A logging filter: one line for JAX's failing plugins and for the threads of orbax.

    The error of such a thread also reaches the caller.
    """
    if record.name.startswith(("jax.", "absl")) and record.exc_info:
        message, error = record.getMessage(), str(record.exc_info[1])
        record.msg, record.args = message if error in message else f"{message}: {error}", ()
        record.exc_info = record.exc_text = None
    return True


def call(command: Sequence[str]) -> int:
    """Runs a process to its end and returns its exit code.

    Forwards SIGINT and SIGTERM, so that a training can save, and then raises KeyboardInterrupt
    once the process has ended.
    """
    received = []
    process = subprocess.Popen(command)

    def forward(number, _):
        received.append(number)
        process.send_signal(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    previous_handlers = {number: signal.signal(number, forward) for number in signals}
    try:
        code = process.wait()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt
    return code


def define_compile_cache(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --compile_cache, for commands that compile."""
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/imagen_jax")
    flags.DEFINE_string(
        COMPILE_CACHE,
        default,
        "directory of the compilation cache; empty disables it. $JAX_COMPILATION_CACHE_DIR sets the"
        " default",
        flag_values=values,
    )


def define_processes(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of `processes`."""
    number = functools.partial(flags.DEFINE_float, flag_values=values)
    wait = "seconds to wait at the start for the other processes"
    number("host_timeout", 300.0, wait, lower_bound=1)
    lost = (
        "seconds without a heartbeat after which a process counts as lost; the log names it after"
        " half this time"
    )
    number("host_lost", 100.0, lost, lower_bound=4)


@contextlib.contextmanager
def processes(
    args: flags.FlagValues = flags.FLAGS, restart: str = watch.RESTART
) -> Iterator[watch.Watch]:
    """Sets JAX up and joins the other processes, watched in the context; restart: see `Watch`."""
    set_up_jax(args)
    distributed.start(args.host_timeout, args.host_lost)
    check_platform()
    with watch.Watch(args.host_lost, restart=restart) as watcher:
        yield watcher


def set_up_jax(args: flags.FlagValues = flags.FLAGS) -> None:
    """Enables the compilation cache and appends `cpu` to $JAX_PLATFORMS.

    Call it before the first computation of a command.
    """
    directory = args[COMPILE_CACHE].value
    import jax

    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory) or None)
    platforms = jax.config.jax_platforms
    # The CPU is last, so it is used only where code asks for it.
    if platforms and "cpu" not in platforms.split(","):
        jax.config.update("jax_platforms", f"{platforms},cpu")
