"""How measures are found and chosen, and that nothing outside a measure knows its name."""

import ast
import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from imagen_jax.evals import measures
from imagen_jax.evals.measures import kid, measure
from tests.evals import toys

ROOT = pathlib.Path(measures.__file__).parents[3]
PACKAGE = ROOT / "imagen_jax"
OTHERS = [PACKAGE / "evaluate.py", ROOT / "launch/sweep.py", *(PACKAGE / "evals").glob("*.py")]
# The metrics of a cascade are a list of their own, and some have the name of a measure.
OF_CASCADES = {
    "evaluation_comparison.py",
    "grid_comparison.py",
    "image_metrics.py",
    "pareto.py",
    "suite_evaluation.py",
    "suite_features.py",
}
OTHERS = [path for path in OTHERS if path.name not in OF_CASCADES]
OTHERS += [PACKAGE / "evals/measures" / name for name in ("__init__.py", "measure.py")]


@pytest.fixture(autouse=True)
def quick_features(monkeypatch):
    """Features without a network: a few pixels."""
    quick = lambda: type("Quick", (), {"identity": {}, "features": staticmethod(few_pixels)})
    monkeypatch.setattr(kid, "_network", quick)
    monkeypatch.setattr(kid.network, "no_package", lambda name: "")


def few_pixels(images):
    return images.reshape(len(images), -1)[:, :5].astype(np.float32)


def test_every_file_of_the_folder_is_a_measure():
    """Catches a list of names that a new file has to be added to, and a measure that lacks a
    member."""
    files = {path.stem for path in (PACKAGE / "evals/measures").glob("*.py")}
    assert set(measures.NAMES) == files - {"__init__", "measure"} != set()
    known = measure.modules()
    assert all(isinstance(one, measure.Measure) for one in known.values())
    orders = [one.ORDER for one in known.values()]
    assert orders == sorted(set(orders))


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_names_a_measure(path):
    """Catches a special case for one measure outside its own file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {
        alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    of_a_measure = {f"{measures.__name__}.{name}" for name in measures.NAMES}
    assert not strings & set(measures.NAMES) and not modules & of_a_measure
    assert measures.__name__ not in modules or names.isdisjoint(measures.NAMES)


def test_names_are_listed_without_importing_measures():
    """Catches a command line whose --help takes as long as loading JAX."""
    source = "import sys; from imagen_jax.evals.measures import NAMES; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_measures_that_do_not_apply_are_refused_by_name():
    """Catches an unknown name passed over in silence, and super-resolution measures tried on a base
    stage."""
    toy, base, settings = toys.Toy(), toys.Base(), toys.settings()
    told = type("Told", (toys.Base,), {"reads_text": True})()
    of_super_resolution = {"denoising", "detail", "consistency"}
    assert list(measure.choose([], toy, settings)) == list(measure.modules())
    assert set(measure.choose([], told, settings)) == set(measures.NAMES) - of_super_resolution
    assert "sensitivity" not in measure.choose([], base, settings)
    assert list(measure.choose(["retrieval", "loss"], base, settings)) == ["loss", "retrieval"]
    for name, message in (("denoising", "base is a base stage"), ("los", "is unknown")):
        with pytest.raises(ValueError, match=message):
            measure.choose([name], base, settings)


def test_samples_of_another_stage_need_a_stage_that_takes_them():
    """Catches --lowres_from passed over in silence, and detail measured against images that are not
    the rows' own."""
    settings = toys.settings(lowres_from="samples.npz")
    assert "detail" not in measure.choose([], toys.Toy(), settings)
    with pytest.raises(ValueError, match="detail does not apply: it compares with true low-res"):
        measure.choose(["detail"], toys.Toy(), settings)
    with pytest.raises(ValueError, match="base is a base stage"):
        measure.choose([], toys.Base(), settings)


@pytest.mark.parametrize("stage", [toys.Toy(), toys.Base()], ids=["toy", "base"])
def test_values_of_rows_have_the_mean_that_the_result_has(stage):
    """Catches values of a row at a path where the result has another mean, or none; and columns of
    a sweep that point nowhere."""
    e = toys.evaluation(stage, kind=Plain)
    chosen = measure.choose([], e.stage, e.probe.settings)
    result = {name: one.measure(e) for name, one in chosen.items()}
    for dotted, values in measure.row_values(chosen, e).items():
        assert at(result, dotted) == pytest.approx(values.mean(), rel=1e-6), dotted
    columns = measure.columns(list(chosen))
    assert columns and all(
        at(result, c.path.replace("SPLIT", "heldout")) is not None for c in columns
    )


class Plain(toys.Drawn):
    """Errors that differ from row to row and bin to bin, without a network."""

    def errors(self, error, split, *, bins=None, **condition):
        return super().errors(error, split)[:, :1] * [[1.0] * len(bins or self.bins)]


def at(result, dotted):
    for key in dotted.split("."):
        result = result[key]
    return result


class Few(toys.Marked):
    """`n` held-out rows with these captions."""

    def __init__(self, captions):
        super().__init__()
        self._captions = np.asarray(captions)
        self.counts = {"train": toys.N, "heldout": len(captions)}
        self.gallery_rows = {split: np.arange(n) for split, n in self.counts.items()}

    def crops(self, split):
        rows = super().crops(split)
        if split == "train":
            return rows
        n = len(self._captions)
        batch = {name: values[:n] for name, values in rows.batch.items()}
        return dataclasses.replace(rows, batch=batch | {"caption_id": self._captions})

    wholes = uncropped = crops


@pytest.mark.parametrize(
    "captions, left_out",
    [
        (
            [0],
            {
                "detail",
                "sensitivity, shuffled",
                "retrieval, heldout, shuffled text",
                "kid, heldout",
            },
        ),
        (
            [0, 0],
            {
                "detail, shuffled text",
                "sensitivity, shuffled",
                "retrieval, heldout, shuffled text",
                "kid, heldout",
            },
        ),
        ([0, 1], {"kid, heldout"}),
        ([0, 1, 2], set()),
    ],
)
def test_rows_that_are_too_few_cost_what_needs_more(captions, left_out):
    """Catches an evaluation that computes the losses and then ends with an error for want of a
    second caption, and parts that are left out in silence or although they are possible.
    """
    data, toy = Few(captions), toys.Toy()
    chosen, reasons = measure.allowed(measure.choose([], toy, toys.settings()), toy, data)
    assert set(reasons) == left_out and all(reasons.values())
    e = toys.evaluation(toy, data, kind=Plain)
    results = {name: one.measure(e) for name, one in chosen.items()}
    assert ("detail" in results) == ("detail" not in left_out)
    assert ("heldout" in results["kid"]) == ("kid, heldout" not in left_out)
    shuffled = "sensitivity, shuffled" not in left_out
    assert ("shuffled" in results["retrieval"]["heldout"]) == shuffled
    assert "shuffled" in results["retrieval"]["train"]
    assert set(results["sensitivity"]["text"]) == {"null", *["shuffled"] * shuffled}
    assert measure.lines(results) and measure.row_values(chosen, e)


def test_no_measure_that_is_possible_is_an_error():
    """Catches an evaluation without a result that ends as if all was well."""
    toy, data = toys.Toy(), Few([0])
    with pytest.raises(ValueError, match="no measure is possible: detail: it comp"):
        measure.allowed(measure.choose(["detail"], toy, toys.settings()), toy, data)
