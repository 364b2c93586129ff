"""The results of a study as text, JSON and figures."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imagen_jax import pictures
from imagen_jax.evals.rating.analysis import OVERALL
from imagen_jax.evals.rating.protocols import QUESTIONS
from imagen_jax.storage import write_atomically, write_json

RESULT, PREFERENCE, CATEGORIES = "analysis.json", "preference.png", "categories.png"
FIGURE_ORDER = ("alignment", "fidelity", "photorealism")  # of Imagen's figure 3, from the left
COLUMNS = 4  # panels in a row
LETTERS_PER_INCH = 14  # of titles
COLORS = {"first": "#2f6db3", "tie": "#c9c9c9", "second": "#d98032"}


def text(result: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"study {result['study'][:12]}: {result['trials']:,} trials in {result['files']:,} files,"
        f" {result['skipped']:,} of them skipped"
    )
    for system in result["systems"]:
        sizes, shown = (", ".join(sorted(system.get(name, ()))) for name in ("sizes", "shown"))
        if sizes != shown:
            yield f"  {system['name']}: pictures of {sizes} were shown at {shown} (bicubic)"
    for problem in result["problems"]:
        yield f"  note: {problem}"
    yield from _control_lines(result["controls"])
    for label, name in (
        ("all raters", "all_raters"),
        ("raters who pass", "filtered"),
    ):
        for question, found in result[name].items():
            yield ""
            yield f"{question}, {label}"
            if "pairs" in found:
                yield from _pair_lines(question, found, with_categories=name == "all_raters")
            else:
                yield from _score_lines(found)


def _control_lines(controls: Mapping[str, Any]) -> Iterator[str]:
    unchecked = controls["without_controls"]
    yield (
        f"right answers to control trials: {_percent(controls['right'])}; same answers to repeats:"
        f" {_percent(controls['same_on_repeat'])}"
    )
    yield (
        f"{controls['kept']} of {controls['raters']} raters pass: at least"
        f" {100 * controls['threshold']:.0f} % right"
        f"{f', or no control trials ({unchecked})' if unchecked else ''}"
    )


def _percent(found: Mapping[str, Any] | None) -> str:
    """A rate with its interval in percent."""
    if found is None:
        return "no data"
    return f"{100 * found['rate']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _pair_lines(question: str, found: Mapping[str, Any], with_categories: bool) -> Iterator[str]:
    for pair in found["pairs"]:
        whole = pair[OVERALL]
        yield (
            f"  {pair['first']} against {pair['second']}: {whole['votes']:,} votes,"
            f" {whole['prompts']} prompts, {whole['raters']} raters"
        )
        yield f"    prefer {pair['first']:<20} {_percent(whole['rates']['first'])}"
        if QUESTIONS[question].has_ties:
            yield f"    neither{'':<20} {_percent(whole['rates']['tie'])}"
        yield f"    prefer {pair['second']:<20} {_percent(whole['rates']['second'])}"
        test = whole["sign_test"]
        yield (
            f"    prompts won {test['first']} to {test['second']}, {test['equal']} equal; sign test"
            f" p = {test['p']:.2g}"
        )
        if with_categories and len(pair["categories"]) > 1:
            for name, own in pair["categories"].items():
                rates = own["rates"]
                yield (
                    f"      {name:<22} {_percent(rates['first'])} against"
                    f" {_percent(rates['second'])}"
                )
    yield f"  left side preferred: {_percent(found['side_bias'])}; {_alpha(found)}"
    yield from _strength_lines(found.get("strengths"))


def _alpha(found: Mapping[str, Any]) -> str:
    alpha = found["alpha"]
    return f"Krippendorff's alpha {'not defined' if alpha is None else f'{alpha:.3f}'}"


def _strength_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    if "undefined" in found:
        yield f"  strengths (Davidson): {found['undefined']}"
        return
    ranked = sorted(found["systems"].items(), key=lambda item: -item[1]["log_strength"])
    for name, own in ranked:
        yield (
            f"  log strength (Davidson) of {name:<20} {own['log_strength']:+.3f}"
            f" [{own['low']:+.3f}, {own['high']:+.3f}]"
        )


def _score_lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, own in found["systems"].items():
        groups = {OVERALL: own[OVERALL]} | own["categories"]
        for group, mean in groups.items():
            yield (
                f"  {name:<20} {group:<12} {mean['mean']:.1f} of 100"
                f" [{mean['low']:.1f}, {mean['high']:.1f}], {mean['n']:,} answers"
            )
    yield f"  {_alpha(found)}"


def write(result: Mapping[str, Any], output: Path) -> list[Path]:
    """Writes the result and its figures. Returns the files."""
    write_json(output / RESULT, result)
    files = [output / RESULT]
    for name, figure in ((PREFERENCE, preference_figure), (CATEGORIES, category_figure)):
        if drawn := figure(result):
            write_atomically(output / name, pictures.figure_png(drawn))
            files.append(output / name)
    return files


def _questions(result: Mapping[str, Any]) -> list[str]:
    """The questions about pairs that have votes, in the order of the figure."""
    return [name for name in FIGURE_ORDER if name in result["all_raters"]]


def preference_figure(result: Mapping[str, Any]) -> Any:
    """Bars as in Imagen's figure 3: a panel per pair, preference rates with 95 % intervals.

    None without votes on pairs.
    """
    from matplotlib.figure import Figure

    questions = _questions(result)
    if not questions:
        return None
    found = result["all_raters"]
    pairs = [(pair["first"], pair["second"]) for pair in found[questions[0]]["pairs"]]
    columns = min(COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(1.2 + 2.6 * columns, 3.4 * rows), layout="constrained")
    _write_title(figure, result)
    for number, pair in enumerate(pairs, 1):
        axes = figure.add_subplot(rows, columns, number)
        for i, question in enumerate(questions):
            own = next(p for p in found[question]["pairs"] if (p["first"], p["second"]) == pair)
            rates = own[OVERALL]["rates"]
            for side, shift in (("first", -0.2), ("second", 0.2)):
                axes.bar(i + shift, 100 * rates[side]["rate"], 0.38, color=COLORS[side])
                _whisker(axes, i + shift, rates[side])
        axes.set(xticks=range(len(questions)), ylim=(0, 100), xlim=(-0.6, len(questions) - 0.4))
        axes.set_xticklabels([name.capitalize() for name in questions])
        handles = [axes.bar(0, 0, color=COLORS[side]) for side in ("first", "second")]
        axes.legend(
            handles, map(_plain, pair), loc="upper center", ncols=2, frameon=False, fontsize=8
        )
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        if (number - 1) % columns == 0:
            axes.set_ylabel("preference rate (%)")
    return figure


def _plain(text: str) -> str:
    """Text for matplotlib, which would read a part between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def _write_title(figure: Any, result: Mapping[str, Any]) -> None:
    """The title of the result, in lines that fit the width of the figure."""
    width = int(LETTERS_PER_INCH * figure.get_size_inches()[0])
    lines = textwrap.wrap(result.get("title", ""), width)
    figure.suptitle(_plain("\n".join(lines)), fontsize=9)


def _whisker(axes: Any, x: float, rate: Mapping[str, Any]) -> None:
    """The interval of a bar."""
    low, high = 100 * rate["low"], 100 * rate["high"]
    axes.plot([x, x], [low, high], color="black", linewidth=1.2)
    for end in (low, high):
        axes.plot([x - 0.05, x + 0.05], [end, end], color="black", linewidth=1.2)


def category_figure(result: Mapping[str, Any]) -> Any:
    """Stacked bars by category, a panel per question and pair. None with one category."""
    from matplotlib.figure import Figure

    found = result["all_raters"]
    panels = [(name, pair) for name in _questions(result) for pair in found[name]["pairs"]]
    names = _category_names([pair for _, pair in panels])
    if len(names) < 2:
        return None
    columns = len({(pair["first"], pair["second"]) for _, pair in panels})
    rows = -(-len(panels) // columns)
    size = (1.6 + 3.6 * columns, (1.1 + 0.28 * len(names)) * rows)
    figure = Figure(figsize=size, layout="constrained")
    _write_title(figure, result)
    for number, (question, pair) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        _stacked_bars(axes, names, pair["categories"])
        between = " | neither | " if QUESTIONS[question].has_ties else " | "
        title = f"{question}: {pair['first']}{between}{pair['second']}"
        axes.set_title(_plain(title), fontsize=9)
        if (number - 1) % columns:
            axes.set_yticklabels([])
    return figure


def _category_names(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for pair in pairs for name in pair["categories"]))


def _stacked_bars(axes: Any, names: Sequence[str], by_category: Mapping[str, Any]) -> None:
    """One bar per category, with the interval of the first system's rate."""
    for y, name in enumerate(names):
        left = 0.0
        if name not in by_category:
            continue
        rates = by_category[name]["rates"]
        for part in ("first", "tie", "second"):
            share = 100 * rates[part]["rate"]
            axes.barh(y, share, 0.7, left=left, color=COLORS[part])
            left += share
        axes.plot([100 * rates["first"][end] for end in ("low", "high")], [y, y], color="black")
    axes.axvline(50, color="black", linewidth=0.6, linestyle=":")
    axes.set(
        yticks=range(len(names)),
        yticklabels=list(map(_plain, names)),
        xlim=(0, 100),
        xlabel="% of votes",
    )
    axes.invert_yaxis()
