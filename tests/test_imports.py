"""The library imports anywhere: without triton, transformers or a GPU; and brings in nothing but torch and itself."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

MODULES = [
    name
    for name in (
        "liger_kernel",
        "liger_kernel.ops",
        "liger_kernel.chunked_loss",
        "liger_kernel.transformers",
        "liger_kernel.cli.app",
        "liger_kernel.env_report",
    )
    if importlib.util.find_spec(name) is not None
]

PROGRAM = """
import importlib.machinery, json, sys

blocked = set(sys.argv[1].split(","))

find_spec = importlib.machinery.PathFinder.find_spec

def find_spec_if_installed(name, path=None, target=None):
    return None if name.partition(".")[0] in blocked else find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec_if_installed)  # some call it on an instance
import torch

before = set(sys.modules)
for name in sys.argv[2].split(","):
    importlib.import_module(name)
print(json.dumps({
    "imported": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "cuda_started": torch.cuda.is_initialized(),
}))
"""


def import_in_a_new_process(blocked: str, modules: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, blocked, ",".join(modules)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_blocker_blocks() -> None:
    assert "No module named 'psutil'" in import_in_a_new_process("psutil", ["psutil"]).stderr


@pytest.mark.parametrize("blocked", ["triton,transformers,peft,trl,accelerate", "nothing"])
def test_imports(blocked: str) -> None:
    done = import_in_a_new_process(blocked, MODULES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["cuda_started"]
    assert set(found["imported"]) - sys.stdlib_module_names == {"liger_kernel"}
