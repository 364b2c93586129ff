"""Mutation test: puts small random faults into copies of the tree and runs the tests.

    python tools/mutate.py --seed 0 --count 10
    python tools/mutate.py --seed 1 --count 30 --files imagen_jax/diffusion/*.py

Mutations are drawn uniformly from all arithmetic, comparison and boolean operators, signs, numbers,
booleans and compared strings in imagen_jax/diffusion/, imagen_jax/models/ and
imagen_jax/sharding.py. Docstrings, annotations and messages are excluded. The working tree is never
changed. For each mutation, the tests that TARGETS names for its file run until the first failure. A
mutation that no test detects is reported as a survivor, even if it cannot change any result. Prints
one line per mutation and a summary, the latter also as one line of JSON.
"""

import argparse
import ast
import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ("imagen_jax/diffusion/*.py", "imagen_jax/models/*.py", "imagen_jax/sharding.py")
TREE = (
    "imagen_jax",
    "configs",
    "tests",
    "tools",
    "launch",
    "pyproject.toml",
    "setup.py",
)  # what the tests need of the tree

# Tests of a file: its own first, because they are quick and most likely to fail, then those of what
# is built on it.
WHOLE_SAMPLER = ["tests/diffusion/test_sampler.py", "tests/diffusion/test_exact_scores.py"]
TARGETS = {
    "imagen_jax/diffusion/schedule.py": ["tests/diffusion/test_schedule.py", *WHOLE_SAMPLER],
    "imagen_jax/diffusion/process.py": ["tests/diffusion/test_process.py", *WHOLE_SAMPLER],
    "imagen_jax/diffusion/conditioning.py": [
        "tests/diffusion/test_conditioning.py",
        "tests/diffusion/test_loss.py",
        *WHOLE_SAMPLER,
    ],
    "imagen_jax/diffusion/guidance.py": ["tests/diffusion/test_guidance.py", *WHOLE_SAMPLER],
    "imagen_jax/diffusion/loss.py": ["tests/diffusion/test_loss.py"],
    "imagen_jax/diffusion/sampler.py": WHOLE_SAMPLER,
    "imagen_jax/diffusion/": ["tests/diffusion"],
    "imagen_jax/models/": ["tests/models"],
    "imagen_jax/sharding.py": ["tests/test_sharding.py"],
    "imagen_jax/evals/distances/": ["tests/evals/distances"],
    "imagen_jax/evals/keyed_rows.py": ["tests/evals/test_keyed_rows.py"],
}

# Each operator and what it may become.
OPERATORS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.MatMult: [ast.Mult],
    ast.BitOr: [ast.BitAnd],
    ast.BitAnd: [ast.BitOr],
    ast.LShift: [ast.RShift],
    ast.RShift: [ast.LShift],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.USub: [ast.UAdd],
    ast.Not: [None],
    ast.Invert: [None],
}


@dataclasses.dataclass(frozen=True)
class Site:
    """An expression of a file that can be mutated: its span and the replacement texts."""

    file: str
    line: int
    end_line: int
    start: int  # in bytes, as ast counts columns
    end: int
    choices: tuple[str, ...]


def rewritten(node: ast.expr, **changes) -> str:
    """Source of `node` with some fields changed, in parentheses."""
    fields = {name: getattr(node, name) for name in node._fields} | changes
    return f"({ast.unparse(ast.fix_missing_locations(type(node)(**fields)))})"


def new_constants(value: object) -> list[object]:
    """Replacements of a number or boolean: neighbours and the double; none for others."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return sorted({value + 1.0, value * 2.0} - {value})
    return []


def choices_of(node: ast.AST) -> list[str]:
    """The source texts that may replace this expression; empty if none may."""
    match node:
        case ast.BinOp():
            return [rewritten(node, op=op()) for op in OPERATORS[type(node.op)]]
        case ast.BoolOp():
            return [rewritten(node, op=op()) for op in OPERATORS[type(node.op)]]
        case ast.UnaryOp(op=op) if type(op) in OPERATORS:
            return [
                rewritten(node, op=new()) if new else f"({ast.unparse(node.operand)})"
                for new in OPERATORS[type(op)]
            ]
        case ast.Compare():
            swapped = lambda i, op: node.ops[:i] + [op()] + node.ops[i + 1 :]
            return [
                rewritten(node, ops=swapped(i, new))
                for i, op in enumerate(node.ops)
                for new in OPERATORS[type(op)]
            ]
        case ast.Constant():
            return [f"({value!r})" for value in new_constants(node.value)]
    return []


def is_optional_type(node: ast.AST) -> bool:
    """Whether an expression is an optional type, `Text = Float[Array, "b l e"] | None`."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.BitOr)
        and isinstance(node.right, ast.Constant)
        and node.right.value is None
    )


class SiteFinder(ast.NodeVisitor):
    """Collects the sites of one file. Annotations, docstrings and f-strings are not visited."""

    def __init__(self, file: str):
        self.file, self.sites = file, []

    def visit(self, node: ast.AST):
        if is_optional_type(node):
            return
        self.add(node, choices_of(node))
        super().visit(node)

    def add(self, node: ast.AST, choices: list[str]):
        if choices:
            self.sites.append(
                Site(
                    self.file,
                    node.lineno,
                    node.end_lineno,
                    node.col_offset,
                    node.end_col_offset,
                    tuple(choices),
                )
            )

    def visit_AugAssign(self, node: ast.AugAssign):
        as_expression = ast.BinOp(left=node.target, op=node.op, right=node.value)
        self.add(
            node, [f"{ast.unparse(node.target)} = {text}" for text in choices_of(as_expression)]
        )
        self.visit(node.value)

    def visit_Compare(self, node: ast.Compare):
        for operand in [node.left, *node.comparators]:
            if isinstance(operand, ast.Constant) and isinstance(operand.value, str):
                self.add(operand, [f"({operand.value + '_'!r})"])
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign):
        if node.value:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg):
        pass

    def visit_FunctionDef(self, node: ast.FunctionDef):
        for child in [
            *node.decorator_list,
            *node.args.defaults,
            *filter(None, node.args.kw_defaults),
            *node.body,
        ]:
            self.visit(child)

    def visit_JoinedStr(self, node: ast.JoinedStr):
        pass


def find_sites(files: list[str]) -> list[Site]:
    sites = []
    for file in files:
        finder = SiteFinder(file)
        finder.visit(ast.parse((ROOT / file).read_bytes()))
        sites += finder.sites
    return sites


def mutate(source: bytes, site: Site, text: str) -> bytes:
    """The source with the site's span replaced by `text`. Raises SyntaxError if invalid."""
    lines = source.splitlines(keepends=True)
    before, after = lines[site.line - 1][: site.start], lines[site.end_line - 1][site.end :]
    changed = (
        b"".join(lines[: site.line - 1])
        + before
        + text.encode()
        + after
        + b"".join(lines[site.end_line :])
    )
    ast.parse(changed)
    return changed


def targets_of(file: str) -> list[str]:
    for prefix, tests in TARGETS.items():
        if file.startswith(prefix):
            return tests
    raise SystemExit(
        f"no tests are named for {file}: add it to TARGETS in {pathlib.Path(__file__).name}"
    )


def run_tests(tree: pathlib.Path, tests: list[str], limit: float | None) -> tuple[str, float, str]:
    """("passed" | "failed" | "timeout", seconds, first failure) of the tests in a tree.

    Any other outcome of pytest, such as no tests found, ends the program.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(tree),
        "JAX_COMPILATION_CACHE_DIR": str(tree.parent / "jax_cache"),
    }
    start = time.monotonic()
    try:
        result = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "timeout", time.monotonic() - start, f"ran longer than {limit:.0f} s"
    seconds = time.monotonic() - start
    reasons = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if result.returncode not in (0, 1, 2) or (result.returncode == 2 and not reasons):
        raise SystemExit(
            f"pytest could not run {' '.join(tests)}:\n{result.stdout}\n{result.stderr}"
        )
    return "passed" if result.returncode == 0 else "failed", seconds, reasons[0] if reasons else ""


def run_baselines(tree: pathlib.Path, files: set[str]) -> dict[str, float]:
    """Seconds of each file's tests without a mutation.

    Raises SystemExit if they fail, because every mutation would then count as killed.
    """
    seconds: dict[tuple[str, ...], float] = {}
    for tests in sorted({tuple(targets_of(file)) for file in files}):
        outcome, seconds[tests], reason = run_tests(tree, list(tests), None)
        if outcome != "passed":
            raise SystemExit(f"{' '.join(tests)} fails without any fault: {reason}")
        print(f"unmutated: {' '.join(tests)} passes in {seconds[tests]:.0f} s", flush=True)
    return {file: seconds[tuple(targets_of(file))] for file in files}


def judge(
    tree: pathlib.Path, path: pathlib.Path, fault: bytes, tests: list[str], baseline: float
) -> tuple[bool, float, str]:
    """(killed, seconds, reason) of one mutated file.

    Tests that take six times as long as without the mutation count as killed.
    """
    source, limit = path.read_bytes(), max(60.0, 6 * baseline)
    while True:
        path.write_bytes(fault)
        try:
            outcome, seconds, reason = run_tests(tree, tests, limit)
        finally:
            path.write_bytes(source)
        if outcome != "timeout":
            return outcome == "failed", seconds, reason
        _, baseline, _ = run_tests(tree, tests, None)
        if 6 * baseline <= limit:
            return True, seconds, reason
        limit = 6 * baseline


def try_fault(tree: pathlib.Path, site: Site, text: str, baseline: float) -> dict[str, object]:
    """Puts one fault into the copy, runs its tests, takes it out again, and says what happened."""
    source = (tree / site.file).read_bytes()
    fault = mutate(source, site, text)
    killed, seconds, reason = judge(tree, tree / site.file, fault, targets_of(site.file), baseline)
    old = b" ".join(
        line.strip() for line in source.splitlines()[site.line - 1 : site.end_line]
    ).decode()
    new = fault.splitlines()[site.line - 1].strip().decode()
    return {
        "file": site.file,
        "line": site.line,
        "old": old,
        "new": new,
        "killed": killed,
        "by": reason,
        "seconds": round(seconds, 1),
    }


def copy_tree(destination: pathlib.Path) -> pathlib.Path:
    destination.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                destination / name,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
            )
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, destination / name)
    return destination


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument(
        "--files",
        nargs="+",
        help="draw from these files only, as paths relative to the root of the tree",
    )
    args = parser.parse_args()
    files = sorted(
        args.files
        or (str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern))
    )
    sites = find_sites(files)
    rng = random.Random(args.seed)
    drawn = [
        (site, rng.choice(site.choices)) for site in rng.sample(sites, min(args.count, len(sites)))
    ]
    print(
        f"{len(drawn)} faults of {len(sites)} places in {len(files)} files, seed {args.seed}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutate_") as scratch:
        tree = copy_tree(pathlib.Path(scratch) / "tree")
        baselines = run_baselines(tree, {site.file for site, _ in drawn})
        results = []
        for site, text in drawn:
            result = try_fault(tree, site, text, baselines[site.file])
            results.append(result)
            print(
                f"{'killed  ' if result['killed'] else 'SURVIVED'} {site.file}:{site.line}\n    -"
                f" {result['old']}\n    + {result['new']}\n    {result['by']}",
                flush=True,
            )
    killed = sum(result["killed"] for result in results)
    survivors = ", ".join(
        f"{result['file']}:{result['line']}" for result in results if not result["killed"]
    )
    print(f"{killed} of {len(results)} killed; survivors: {survivors or 'none'}")
    print(
        json.dumps({"seed": args.seed, "killed": killed, "count": len(results), "faults": results})
    )


if __name__ == "__main__":
    main()
