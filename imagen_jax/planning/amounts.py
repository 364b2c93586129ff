"""Numbers of a report, which may be very small."""


def amount(value: float, decimals: int | None = None) -> str:
    """A number with `decimals` decimals, or with three significant digits if it is too small.

    decimals: None for two, or for none from 100 on.
    """
    if decimals is None:
        decimals = 0 if abs(value) >= 100 else 2
    if value and abs(value) < 10 ** (1 - decimals):
        return f"{value:.3g}"
    return f"{value:,.{decimals}f}"
