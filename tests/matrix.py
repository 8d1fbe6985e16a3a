"""`python -m tests.matrix [row ...] [-- arguments of pytest]`: the rows of `matrix.txt`, each in its own environment.

    python -m tests.matrix                                     all rows: hours
    python -m tests.matrix oldest newest -- -k rms_norm -x     two rows, a sample of their tests
    python -m tests.matrix -- tests/test_frameworks.py         all rows, one file

Environments are made in .venv/matrix when they are needed, and kept. A row without its Python fails, and says so; put
it on PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = {
    "zoo": ["tests/transformers/test_zoo.py"],
    "ops": ["tests", "--ignore", "tests/transformers"],
    "all": ["tests"],
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


class NotRun(Exception):
    """Why a row was not run."""


def environment(row: Row, base: Path) -> Path:
    """Its interpreter; made, or made again where the row has changed."""
    folder = base / row.name
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists() and ready.read_text() == str(row):
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
    ready.write_text(str(row))
    return python


def run(row: Row, arguments: list[str], base: Path) -> str | None:
    """What went wrong, or None."""
    try:
        python = environment(row, base)
    except NotRun as error:
        return f"not run: {error}"
    variables = {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1", "ZOO": "all"}
    own = any((ROOT / argument.partition("::")[0]).exists() for argument in arguments)
    targets = [] if own else TESTS[row.tests]
    parallel = [] if arguments else ["-n", "logical", "--maxprocesses", "8"]
    command = [
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
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
