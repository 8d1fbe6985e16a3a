"""`python -m tests.release`: wheel and sdist are built, looked into, installed where nothing else is, and used.

Without a network: the build runs with what is installed, and the new environments see torch, and then everything, in
the site-packages of this one. Prints one line for each check; stops at the first that fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "liger_kernel"
SITE = Path(sysconfig.get_path("purelib"))
EXTRAS = {"cli", "cuda", "dev", "docs", "rocm", "transformers", "xpu"}

#: of an environment that has torch and what torch needs
ALONE = """
import importlib.metadata, importlib.resources, importlib.util, pathlib, sys
import torch, liger_kernel
from liger_kernel import functional

folder = pathlib.Path(liger_kernel.__file__).parent
assert folder.parent == pathlib.Path(sys.argv[1]), folder
assert liger_kernel.__version__ == importlib.metadata.version("liger-kernel") == sys.argv[2]
assert importlib.metadata.version("liger_kernel") == sys.argv[2]
assert (folder / "py.typed").is_file()
assert not any(importlib.util.find_spec(name) for name in ("triton", "transformers", "peft", "tests", "benchmark"))
x, w = torch.randn(6, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
loss = functional.fused_linear_cross_entropy(functional.rms_norm(x, torch.ones(32)), w, torch.arange(6))[0]
loss.backward()
assert x.grad.isfinite().all() and w.grad.isfinite().all()

import liger_kernel.transformers
try:
    liger_kernel.transformers.apply_liger_kernel_to_llama
except ImportError as error:
    assert "pip install liger-kernel[transformers]" in str(error), error
else:
    raise AssertionError("entry points need transformers")
"""
#: of one that has everything
WITH_ALL = """
import torch, liger_kernel
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
ids = torch.arange(24).view(2, 12)
stock = model(input_ids=ids, labels=ids).loss
report = liger_kernel.patch(model)
assert {"loss", "norm", "mlp"} <= {row.kind for row in report.replaced}, report
optimizer = torch.optim.SGD(model.parameters(), 0.1)
loss = model(input_ids=ids, labels=ids).loss
assert abs(loss - stock) < 1e-3
loss.backward()
optimizer.step()
assert model(input_ids=ids, labels=ids).loss < loss
"""


def fail(message: str) -> None:
    sys.exit(f"release check: {message}")


def check_names(names: Iterable[str], version: str) -> list[str]:
    """What is wrong with the files of a wheel."""
    names = sorted(names)
    info = f"{PACKAGE}-{version}.dist-info"
    found = [
        f"{n} does not belong into it" for n in names if n.split("/")[0] not in (PACKAGE, info)
    ]
    wanted = [
        f"{PACKAGE}/py.typed",
        f"{PACKAGE}/__init__.py",
        f"{info}/METADATA",
        f"{info}/licenses/LICENSE",
    ]
    source = {
        p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / PACKAGE).rglob("*.py")
    }
    found += [f"{n} is missing" for n in (*wanted, *sorted(source)) if n not in names]
    return found + [
        f"{n} is compiled or cached" for n in names if re.search(r"__pycache__|\.(pyc|so)$", n)
    ]


def check_metadata(text: str, version: str) -> list[str]:
    """What is wrong with the METADATA of a wheel; what an index would refuse raises."""
    metadata = Metadata.from_email(text, validate=True)
    found = []
    if (metadata.name, str(metadata.version)) != ("liger-kernel", version):
        found.append(f"it is {metadata.name} {metadata.version}, not liger-kernel {version}")
    if metadata.description_content_type is None or not metadata.description:
        found.append("it has no description")
    if set(metadata.provides_extra or ()) != EXTRAS:
        found.append(f"its extras are {metadata.provides_extra}")
    always = [
        r for r in metadata.requires_dist or () if not (r.marker and "extra" in str(r.marker))
    ]
    if [r.name for r in always] != ["torch"]:
        found.append(
            f"it needs {', '.join(map(str, always))}: more than torch, whose triton must stay"
        )
    if (
        f"[Unreleased] - {version}" not in (log := (ROOT / "CHANGELOG.md").read_text())
        and f"[{version}]" not in log
    ):
        found.append(f"CHANGELOG.md has no section for {version}")
    return found


def needed_by(name: str) -> set[str]:
    """Top-level files and folders in site-packages of a distribution and of what it needs here."""
    pending, seen, entries = [name], set(), set()
    while pending:
        one = pending.pop()
        try:
            dist = importlib.metadata.distribution(one)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if one in seen or one == "triton":
            continue
        seen.add(one)
        entries |= {file.parts[0] for file in dist.files or () if file.parts[0] != ".."}
        for text in dist.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return entries


def clean() -> dict[str, str]:
    """The environment without what shows Python the source tree: pip would take us for installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def environment(folder: Path, wheel: Path, program: str, version: str, everything: bool) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python*/site-packages")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "--python",
        python,
    ]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True, env=clean())
    if everything:
        (site / "beside.pth").write_text(f"{SITE}\n")
    else:
        for entry in needed_by("torch"):
            (site / entry).symlink_to(SITE / entry)
    # -I: nothing from the environment, the user's site-packages or this folder
    done = subprocess.run([python, "-I", "-c", program, site, version], cwd=folder, check=False)
    if done.returncode:
        fail(f"the installed wheel does not work (torch {'and all' if everything else 'alone'})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the wheel and the sdist here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = (arguments.out or Path(scratch, "dist")).resolve()
        tree = Path(
            scratch, "tree"
        )  # setuptools writes into the source tree, and believes what it finds there
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist")
        )
        # wheel from the sdist: what the sdist lacks, the wheel lacks
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree]
        done = subprocess.run(build, capture_output=True, text=True, check=False, env=clean())
        if done.returncode:
            fail(f"the build failed\n{done.stdout}{done.stderr}")
        version = re.findall(
            r'^__version__ = "(.+)"', (ROOT / "src" / PACKAGE / "__init__.py").read_text(), re.M
        )[0]
        wheel, sdist = (
            out / f"{PACKAGE}-{version}-py3-none-any.whl",
            out / f"{PACKAGE}-{version}.tar.gz",
        )
        print(
            f"built {wheel.name} ({wheel.stat().st_size >> 10} KiB) and {sdist.name} ({sdist.stat().st_size >> 10} KiB)"
        )
        with zipfile.ZipFile(wheel) as archive:
            found = check_names(archive.namelist(), version)
            found += check_metadata(
                archive.read(f"{PACKAGE}-{version}.dist-info/METADATA").decode(), version
            )
        with tarfile.open(sdist) as archive:
            tops = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
        found += [
            f"{n} is in the sdist" for n in sorted(tops & {"tests", "benchmark", "docs", ".venv"})
        ]
        if found:
            fail("\n  ".join(["what was built is wrong:", *found]))
        print("files and metadata are right")
        for program, everything in ((ALONE, False), (WITH_ALL, True)):
            environment(Path(scratch, f"env{everything}"), wheel, program, version, everything)
            print(f"works beside torch {'and all that is here' if everything else 'alone'}")


if __name__ == "__main__":
    main()
