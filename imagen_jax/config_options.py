"""Options that set fields of a config, such as --config.optim.lr=3e-4, on a command line."""

from collections.abc import Collection, Sequence


def last_values(argv: Sequence[str], configs: Collection[str]) -> list[str]:
    """The arguments without options of config fields that a later option sets again.

    ml_collections joins the values of all options of a tuple field. Of other fields the last value
    counts anyway.

    configs: names of the flags of config files, such as "config".
    """
    options: list[list[str]] = []  # each with its value, which may be the next argument
    for argument in argv:
        before = options[-1] if options else [""]
        is_value = len(before) == 1 and "=" not in before[0] and not argument.startswith("--")
        if is_value and _field(before[0], configs):
            before.append(argument)
        else:
            options.append([argument])
    last = {field: i for i, option in enumerate(options) if (field := _field(option[0], configs))}
    return [
        argument
        for i, option in enumerate(options)
        if last.get(_field(option[0], configs), i) == i
        for argument in option
    ]


def _field(argument: str, configs: Collection[str]) -> str:
    """The field that an argument sets, such as "config.optim.lr"; "" if it sets none."""
    name = argument.partition("=")[0].lstrip("-")
    flag, dot, _ = name.partition(".")
    return name if argument.startswith("-") and dot and flag in configs else ""
