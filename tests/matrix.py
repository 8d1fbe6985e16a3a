"""`python -m tests.matrix [row ...] [-- arguments of pytest]`: the rows of `matrix.txt`, each in its own environment.

    python -m tests.matrix                                     all rows, about 20 minutes each on two cores
    python -m tests.matrix oldest newest -- -k rms_norm -x     two rows, a sample of their tests
    python -m tests.matrix -- tests/test_frameworks.py         all rows, one file

A row runs what depends on releases, of each parametrised test one case in six (MATRIX_EVERY=1: all). Environments
are made in .venv/matrix when they are needed, and kept: remove those of "newest" when there is something newer. A row
without its Python fails, and says so; put it on PATH.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
#: what depends on releases
_OPS = ["tests/ops", "tests/loss_head", "tests/chunked_loss", "tests/backends"]
_MODELS = ["tests/transformers", "tests/cli", "tests/test_frameworks.py"]
#: the variable that says how many cases of a test there are for one that runs; of the zoo and of named tests all run
EVERY = "MATRIX_EVERY"
TESTS = {
    "zoo": ["tests/transformers/test_zoo.py"],
    "ops": _OPS,
    "models": [*_MODELS, "--ignore", "tests/transformers/test_zoo.py"],
    "all": [*_OPS, *_MODELS, "--ignore", "tests/transformers/test_zoo.py"],
}
SAME = "."
#: without the package kernels: the releases of transformers want different versions of it, or break on a new one
BESIDE = "import site, sys; sys.modules['kernels'] = None; site.addsitedir({!r})\n"


class Row(NamedTuple):
    name: str
    python: str
    torch: str
    triton: str
    transformers: str
    tests: str

    @property
    def packages(self) -> list[str]:
        """Requirements of what differs from .venv."""
        wanted = {"torch": self.torch, "triton": self.triton, "transformers": self.transformers}
        return [
            name if version == "newest" else f"{name}=={version}"
            for name, version in wanted.items()
            if version != SAME
        ]


def rows(text: str) -> list[Row]:
    return [Row(*line.split()) for line in text.splitlines() if line and not line.startswith("#")]


ROWS = rows(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """As a plugin of pytest: the first case of each test, and then one in so many."""
    every, seen = int(os.environ[EVERY]), collections.Counter[str]()
    kept, dropped = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        (dropped if seen[function] % every else kept).append(item)
        seen[function] += 1
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


class NotRun(Exception):
    """Why a row was not run."""


def environment(row: Row, base: Path) -> Path:
    """Its interpreter, made where there is none yet; rows of the same releases share it."""
    releases = (row.python, row.torch, row.triton, row.transformers)
    folder = base / "-".join("here" if release == SAME else release for release in releases)
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    beside = row.python == SAME
    interpreter = sys.executable if beside else shutil.which(f"python{row.python}")
    if interpreter is None:
        raise NotRun(f"there is no python{row.python} on PATH")
    make = [interpreter, "-m", "venv", *(["--without-pip"] if beside else []), folder]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "--quiet",
    ]
    # `--upgrade`: what lies beside satisfies "newest"
    wanted = row.packages if beside else [*row.packages, "-e", f"{ROOT}[dev]"]
    try:
        subprocess.run(make, check=True)
        if beside:
            [site] = folder.glob("lib/python*/site-packages")
            (site / "beside_torch.pth").write_text(BESIDE.format(sysconfig.get_path("purelib")))
        if row.packages:
            subprocess.run([*pip, "install", "--upgrade", *wanted], check=True)
    except subprocess.CalledProcessError as error:
        raise NotRun(f"its environment could not be made: {error}") from error
    ready.touch()
    return python


def run(row: Row, arguments: list[str], base: Path) -> str | None:
    """What went wrong, or None."""
    try:
        python = environment(row, base)
    except NotRun as error:
        return f"not run: {error}"
    own = any((ROOT / argument.partition("::")[0]).exists() for argument in arguments)
    variables = {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "ZOO": "all"}
    variables[EVERY] = "1" if own or row.tests == "zoo" else os.environ.get(EVERY, "6")
    targets = [] if own else TESTS[row.tests]
    parallel = [] if arguments else ["-n", "logical", "--maxprocesses", "8"]
    command = [
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.matrix",
        *parallel,
        *targets,
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False)
    return f"failed with {done.returncode}" if done.returncode else None


def main(arguments: list[str], base: Path = ROOT / ".venv" / "matrix") -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, more = arguments[:cut], arguments[cut + 1 :]
    unknown = sorted({*names} - {row.name for row in ROWS})
    if unknown:
        print(
            f"Unknown rows: {', '.join(unknown)}; known: {', '.join(r.name for r in ROWS)}.",
            file=sys.stderr,
        )
        return 2
    results = {}
    for row in ROWS:
        if not names or row.name in names:
            print(f"== {' '.join(row)}", flush=True)
            results[row.name] = run(row, more, base)
    for name, result in results.items():
        print(f"{name:<20} {result or 'passed'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
