"""An evaluation for people: a short table, and the loss by log-SNR as a picture. Both read the result that the JSON file holds."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

Result = Mapping[str, Any]


def table(measures: Result) -> str:
    """The overall numbers of each measure, a line each; +- is one standard error, [] a 95 % interval."""
    lines = [line for name, found in measures.items() for line in LINES[name](found)]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)


def _loss(found: Result) -> Iterator[tuple[str, str]]:
    for split, curve in found.items():
        yield f"loss, {split}", _mean(curve["overall"])


def _sensitivity(found: Result) -> Iterator[tuple[str, str]]:
    for told in [name for name in found if name != "split"]:
        for kind, curve in found[told].items():
            yield f"loss rise, {told} {kind}", _difference(curve["overall"])


def _denoising(found: Result) -> Iterator[tuple[str, str]]:
    yield "squared error, bicubic", _mean(found["bicubic"])
    for level in ("drawn", "clean"):
        yield f"squared error, x-hat, low-res {level}", f"{_mean(found[level]['x_hat']['overall'])}; better by {_difference(found[level]['gain']['overall'])}"


def _consistency(found: Result) -> Iterator[tuple[str, str]]:
    for name in ("samples", "bicubic"):
        psnr = found[name]["psnr"]
        yield f"shrunk {name} to low-res", f"{_mean(found[name]['mae'])} of 255, PSNR {'infinite' if psnr is None else f'{psnr:.1f} dB'}"


def _detail(found: Result) -> Iterator[tuple[str, str]]:
    for text in [name for name in found if name in ("right", "shuffled", "null")]:
        right = found[text]
        yield (
            f"detail, {text} text",
            f"correlation {_mean(right['own'])}, with others' {_mean(right['other'])}; of {right['top5']['n']} {_proportions(right)}",
        )
    for name in [name for name in found if name.startswith("right_minus_")]:
        yield f"detail, {name.replace('_', ' ')}", _difference(found[name])


def _retrieval(found: Result) -> Iterator[tuple[str, str]]:
    for split, texts in found.items():
        for text, score in texts.items():
            yield f"retrieval, {split}, {text} text", f"of {score['gallery']} images: {_proportions(score)}"


LINES = {
    "loss": _loss,
    "sensitivity": _sensitivity,
    "denoising": _denoising,
    "consistency": _consistency,
    "detail": _detail,
    "retrieval": _retrieval,
}


def _value(x: float | None) -> str:
    return "undefined" if x is None else f"{x:.4g}"


def _mean(found: Result) -> str:
    return f"{_value(found['mean'])} +- {_value(found['se'])}"


def _difference(found: Result) -> str:
    ratio = found["ratio"]
    return _mean(found) + ("" if ratio is None else f" ({ratio:.1f} standard errors)")


def _proportions(found: Result) -> str:
    return ", ".join(
        f"top-{k} {100 * p['rate']:.1f} % [{100 * p['low']:.1f}, {100 * p['high']:.1f}]" for k, p in ((1, found["top1"]), (5, found["top5"]))
    )


def loss_plot(measures: Result) -> bytes:
    """A PNG file's content: the loss by log-SNR of each split and, where measured, its rise under each control, with standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sensitivity = measures.get("sensitivity", {})
    curves = [
        ("loss", measures["loss"]),
        *((f"loss rise, {told}", kinds) for told, kinds in sensitivity.items() if told != "split"),
    ]
    figure = Figure(figsize=(5 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
        for name, curve in lines.items():
            known = [b for b in curve["bins"] if b["mean"] is not None]
            x, y, error = ([b[key] or 0.0 for b in known] for key in ("logsnr_centre", "mean", "se"))
            axes.errorbar(x, y, yerr=error, label=name, marker="o", markersize=3, capsize=2)
        axes.set(title=title, xlabel="log-SNR")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()
