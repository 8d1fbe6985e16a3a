"""The rules of the house that a program can check. `python tests/test_layout.py --write-api` renews public_api.txt.

Every rule is a function from a tree to a list of findings; every one is also shown a tree that breaks it.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "liger_kernel"
API_FILE = Path(__file__).with_name("public_api.txt")
API_MODULES = tuple(
    f"{PACKAGE}{end}"
    for end in (
        "",
        ".ops",
        ".chunked_loss",
        ".functional",
        ".transformers",
        ".transformers.functional",
        ".transformers.monkey_patch",
    )
)

#: a package may import those before it, never one after it
LAYERS = (
    "_core",
    "backends",
    "ops",
    "loss_head",
    "chunked_loss",
    "distributed",
    "transformers",
    "megatron",
    "cli",
    "compat",
)
#: outside the layers: what only tests and benchmarks import
TEST_ONLY = "testing"
#: commands that run the ops' cases; nothing imports them until they are asked for
RUN_CASES = ("cli/bench.py", "cli/selftest.py")
#: ops without kernels of their own: they are built from a sibling's
OPS_WITHOUT_KERNELS = frozenset(
    {
        "fused_neighborhood_attention",
        "gated_mlp",
        "lora_mlp",
        "multi_token_attention",
        "tiled_mlp",
    }
)
OP_FILES = ("__init__.py", "reference.py", "cases.py", "contract.py", "triton.py")
KERNEL_SIDE = ("contract.py", "triton.py")
#: rooms in `ops/` that ops share, or where the incumbent has some
FAMILIES = frozenset({"divergences", "experimental", "norms"})
KERNEL_FILES = ("triton.py", "kernels.py", "clusters.py")

MAX_LINES, MAX_KERNEL_FILE_LINES, MAX_FUNCTION_LINES = 500, 700, 80
#: where a device may be called by its name
MAY_SAY_CUDA = ("backends/", "utils.py")

Findings = list[str]


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def source(root: Path) -> Path:
    return root / "src" / PACKAGE


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything imported anywhere in the file, `a.b.c` for `from a.b import c`."""
    package = module_name(root, path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def op_folders(root: Path) -> list[Path]:
    ops = source(root) / "ops"
    folders = (p for p in ops.iterdir() if p.is_dir() and any(p.glob("*.py")))
    return sorted(p for p in folders if p.name not in FAMILIES)


# --- the rules ------------------------------------------------------------------------------------


def ops_complete(root: Path) -> Findings:
    """Every op of `OPS` has its folder with the same files, and every folder is in `OPS`."""
    listed = {
        node.value
        for statement in parse(source(root) / "ops" / "__init__.py").body
        if isinstance(statement, ast.AnnAssign | ast.Assign)
        and isinstance(statement.value, ast.Dict)
        if "OPS"
        in ast.unparse(
            statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        )
        for node in statement.value.keys
        if isinstance(node, ast.Constant)
    }
    folders = {p.name: p for p in op_folders(root)}
    findings = [
        f"ops/{op}: in OPS, but there is no such folder" for op in sorted(listed - folders.keys())
    ]
    findings += [f"ops/{op}: not in OPS" for op in sorted(folders.keys() - listed)]
    for op in sorted(listed & folders.keys()):
        for file in OP_FILES:
            exempt = file in KERNEL_SIDE and op in OPS_WITHOUT_KERNELS
            if not exempt and not (folders[op] / file).is_file():
                findings.append(f"ops/{op}: {file} is missing")
    return findings


def import_directions(root: Path) -> Findings:
    findings = []
    for path in python_files(root, "src"):
        where = path.relative_to(source(root))
        own = where.parts[0] if len(where.parts) > 1 else None
        if own is not None and own not in (*LAYERS, TEST_ONLY):
            findings.append(f"{where}: {own!r} has no place in LAYERS of test_layout.py")
        for line, name in imports(root, path):
            parts = name.split(".")
            other = parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None
            if own in LAYERS and other in LAYERS and LAYERS.index(other) > LAYERS.index(own):
                findings.append(f"{where}:{line}: {own} must not import {name}")
    return findings


def file_roles(root: Path) -> Findings:
    """What reference.py, kernel files and run-time code may import."""
    findings = []
    stdlib_or_torch = {*sys.stdlib_module_names, "torch"}
    for path in python_files(root, "src"):
        where = path.relative_to(source(root))
        is_op_file = where.parts[0] == "ops" and len(where.parts) > 2
        for line, name in imports(root, path):
            first, parts = name.split(".")[0], name.split(".")
            at = f"{where}:{line}"
            if is_op_file and path.name == "reference.py":
                sibling = re.fullmatch(rf"{PACKAGE}\.ops\.\w+\.reference(\.\w+)*", name)
                if first not in stdlib_or_torch and not sibling:
                    findings.append(f"{at}: reference.py imports torch only, not {name}")
            if path.name in KERNEL_FILES and first == PACKAGE and "reference" in parts:
                findings.append(f"{at}: kernels never import the reference")
            run_time = path.name != "cases.py" and where.parts[0] != TEST_ONLY
            run_time = run_time and where.as_posix() not in RUN_CASES
            if run_time and first == PACKAGE and {TEST_ONLY, "cases"} & set(parts):
                findings.append(f"{at}: {name} is for tests and benchmarks")
            if (
                first == "triton"
                and path.name not in KERNEL_FILES
                and line in top_level_lines(path)
            ):
                findings.append(f"{at}: triton is imported at module level by kernel files only")
    return findings


def top_level_lines(path: Path) -> set[int]:
    """Lines of statements that run when the module is imported (also inside `if` and `try`)."""
    lines: set[int] = set()
    pending: list[ast.AST] = [parse(path)]
    while pending:
        for child in ast.iter_child_nodes(pending.pop()):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                lines |= {child.lineno} if isinstance(child, ast.stmt) else set()
                pending.append(child)
    return lines


def sizes(root: Path) -> Findings:
    findings = []
    for path in python_files(root, "src", "tests", "benchmark", "examples"):
        where = path.relative_to(root)
        length = len(path.read_text(encoding="utf-8").splitlines())
        allowed = MAX_KERNEL_FILE_LINES if path.name in KERNEL_FILES else MAX_LINES
        if length > allowed:
            findings.append(f"{where}: {length} lines, at most {allowed}")
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and not is_kernel:
                findings.append(
                    f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
                )
    return findings


def one_tolerance(root: Path) -> Findings:
    """`atol`, `rtol` as argument, parameter or name: nowhere but in `testing`."""
    findings = []
    for path in python_files(root, "src", "tests", "benchmark", "examples"):
        if path.is_relative_to(source(root) / TEST_ONLY):
            continue
        for node in ast.walk(parse(path)):
            name = getattr(node, "arg", None) or getattr(node, "id", None)
            if name in ("atol", "rtol"):
                findings.append(
                    f"{path.relative_to(root)}:{node.lineno}: {name}; use assert_no_worse"
                )
    return findings


def devices_by_name(root: Path) -> Findings:
    """No string "cuda" or "cuda:0", no `is_cuda`, and no comparison of a device's type, outside of `backends/`."""
    findings = []
    for path in python_files(root, "src"):
        where = path.relative_to(source(root)).as_posix()
        if where.startswith(MAY_SAY_CUDA):
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Constant) and re.fullmatch(r"cuda(:\d+)?", str(node.value)):
                findings.append(
                    f"{where}:{node.lineno}: {node.value!r}; ask the tensor's device or the backend"
                )
            compared = isinstance(node, ast.Compare) and ".device.type" in ast.unparse(node.left)
            if compared or (isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_xpu")):
                findings.append(
                    f"{where}:{node.lineno}: {ast.unparse(node)}; ask backends.facts_of"
                )
    return findings


def no_circles(root: Path) -> Findings:
    """No file of the library imports itself by way of others, not even inside a function; for types it may.

    `from a.b import c` needs the file of `a.b.c`, if that is one, and else that of `a.b`.
    """
    files = {module_name(root, path): path for path in python_files(root, "src")}
    needs: dict[str, set[str]] = {}
    for module, path in files.items():
        for_types = type_checking_lines(path)
        named = (name for line, name in imports(root, path) if line not in for_types)
        needs[module] = {n if n in files else n.rpartition(".")[0] for n in named} - {module}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        return [f"a circle of imports: {' <- '.join(error.args[1])}"]
    return []


def type_checking_lines(path: Path) -> set[int]:
    """Lines that only a type checker runs."""
    blocks = (
        statement
        for node in ast.walk(parse(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
    )
    return {line for b in blocks for line in range(b.lineno, (b.end_lineno or b.lineno) + 1)}


RULES: tuple[Callable[[Path], Findings], ...] = (
    ops_complete,
    import_directions,
    file_roles,
    sizes,
    one_tolerance,
    devices_by_name,
    no_circles,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule: Callable[[Path], Findings]) -> None:
    findings = rule(ROOT)
    assert not findings, "\n" + "\n".join(findings)


# --- the rules bite -------------------------------------------------------------------------------


CLEAN = {
    "src/liger_kernel/__init__.py": "",
    "src/liger_kernel/backends/gpu.py": "DEVICE = 'cuda'\nx.is_cuda",
    "src/liger_kernel/ops/__init__.py": "OPS: dict[str, tuple[str, ...]] = {'norm': ('LigerNorm',)}",
    "src/liger_kernel/ops/norm/__init__.py": "from liger_kernel.ops.norm import reference",
    "src/liger_kernel/ops/norm/reference.py": "import math\nimport torch.nn.functional as F",
    "src/liger_kernel/ops/norm/cases.py": "from liger_kernel.testing import OpCase",
    "src/liger_kernel/ops/norm/contract.py": "",
    "src/liger_kernel/ops/norm/triton.py": "import triton\nfrom liger_kernel.backends import gpu",
    "src/liger_kernel/testing/__init__.py": "def close(a, b, atol): ...",
    "src/liger_kernel/cli/selftest.py": "from liger_kernel.testing import OpCase",
    "src/liger_kernel/transformers/norm.py": "from liger_kernel.ops import norm\ndef f():\n    import triton",
    "tests/test_norm.py": "x = torch.empty(2, device='cuda')",
}
LONG = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_clean_tree(rule: Callable[[Path], Findings], tmp_path: Path) -> None:
    assert rule(plant(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("rule", "file", "content", "finding"),
    [
        (ops_complete, "ops/extra/__init__.py", "", "ops/extra: not in OPS"),
        (ops_complete, "ops/__init__.py", "OPS = {'norm': (), 'rope': ()}", "ops/rope: in OPS"),
        (ops_complete, "ops/__init__.py", "OPS = {}", "ops/norm: not in OPS"),
        (import_directions, "_core/x.py", "from liger_kernel import ops", "_core must not"),
        (import_directions, "ops/norm/x.py", "from ...transformers import norm", "ops must not"),
        (
            import_directions,
            "ops/norm/x.py",
            "def f():\n  import liger_kernel.chunked_loss.dpo",
            "must not",
        ),
        (import_directions, "surprise/x.py", "", "no place in LAYERS"),
        (file_roles, "ops/norm/reference.py", "import numpy", "not numpy"),
        (
            file_roles,
            "ops/norm/reference.py",
            "from . import triton",
            "not liger_kernel.ops.norm.triton",
        ),
        (
            file_roles,
            "ops/norm/triton.py",
            "from liger_kernel.ops.norm.reference import f",
            "never import",
        ),
        (file_roles, "ops/norm/triton.py", "from . import reference", "never import the reference"),
        (file_roles, "ops/norm/__init__.py", "from .cases import SPEC", "is for tests"),
        (file_roles, "transformers/x.py", "import liger_kernel.testing", "is for tests"),
        (file_roles, "cli/env.py", "import liger_kernel.testing", "is for tests"),
        (import_directions, "transformers/x.py", "from liger_kernel import cli", "must not import"),
        (
            file_roles,
            "ops/norm/__init__.py",
            "try:\n  import triton.language as tl\nfinally: pass",
            "module level",
        ),
        (sizes, "x.py", "x = 1\n" * (MAX_LINES + 1), "501 lines"),
        (sizes, "ops/norm/triton.py", "x = 1\n" * (MAX_KERNEL_FILE_LINES + 1), "701 lines"),
        (sizes, "x.py", LONG, "f has 81 lines"),
        (
            one_tolerance,
            "../../tests/test_x.py",
            "torch.allclose(a, b, atol=1e-3)",
            "test_x.py:1: atol",
        ),
        (one_tolerance, "x.py", "def f(rtol=0): ...", "rtol"),
        (devices_by_name, "ops/x.py", "x = f('cuda')", "'cuda'"),
        (devices_by_name, "ops/x.py", "x = y == 'cuda:0'", "'cuda:0'"),
        (devices_by_name, "ops/x.py", "if x.is_cuda: pass", "x.is_cuda; ask"),
        (devices_by_name, "ops/x.py", "y = x.device.type != 'cpu'", "ask backends.facts_of"),
        (no_circles, "ops/norm/reference.py", "def f():\n  from . import x", "ops.norm <- "),
        (no_circles, "backends/gpu.py", "import liger_kernel.ops.norm.triton", "circle"),
    ],
)
def test_rule_sees_a_violation(
    rule: Callable[[Path], Findings], file: str, content: str, finding: str, tmp_path: Path
) -> None:
    findings = rule(plant(tmp_path, {**CLEAN, f"src/liger_kernel/{file}": content}))
    assert any(finding in f for f in findings), findings


def test_kernels_may_be_long(tmp_path: Path) -> None:
    planted = plant(tmp_path, {**CLEAN, "src/liger_kernel/x.py": f"@triton.jit\n{LONG}"})
    assert sizes(planted) == []


def test_types_may_go_in_a_circle(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import op\n"
    planted = plant(tmp_path, {**CLEAN, "src/liger_kernel/ops/norm/reference.py": text})
    assert no_circles(planted) == []
    at_run_time = {"src/liger_kernel/ops/norm/reference.py": text + "from . import op"}
    assert no_circles(plant(tmp_path, at_run_time))


def test_missing_file_of_an_op(tmp_path: Path) -> None:
    planted = plant(tmp_path, CLEAN)
    (planted / "src/liger_kernel/ops/norm/cases.py").unlink()
    assert ops_complete(planted) == ["ops/norm: cases.py is missing"]


# --- the public API -------------------------------------------------------------------------------


def describe(name: str, value: object) -> str | None:
    """One line for a public name; None for what merely passes through (modules, names of others and of `_core`)."""
    home = getattr(value, "__module__", None)
    foreign = home is not None and not str(home).startswith(PACKAGE)
    if inspect.ismodule(value) or foreign or str(home).startswith(f"{PACKAGE}._core"):
        return None
    if inspect.isclass(value) and "apply" in vars(value):
        name, value = f"{name}.apply", vars(value)["apply"].__func__
    elif not callable(value):
        return f"{name}: {type(value).__name__}"
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return name
    empty = inspect.Parameter.empty
    bare = [p.replace(annotation=empty) for p in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=bare, return_annotation=empty)}"


def public_api() -> str:
    lines = []
    for module_path in API_MODULES:
        if importlib.util.find_spec(module_path) is None:
            continue
        module = importlib.import_module(module_path)
        declared = {*getattr(module, "__all__", ())} - {"__version__"}
        lines.append(f"# {module_path}")
        for name in sorted(declared | {n for n in dir(module) if not n.startswith("_")}):
            value = getattr(module, name)
            # a package passes on what its modules define; what a module imports is its own affair
            imported = getattr(value, "__module__", module_path) != module_path
            if hasattr(module, "__path__") or name in declared or not imported:
                lines += filter(None, [describe(name, value)])
    return re.sub(r" at 0x[0-9a-f]+", "", "\n".join(lines)) + "\n"


def test_public_api() -> None:
    pytest.importorskip("transformers")
    expected = API_FILE.read_text(encoding="utf-8").splitlines()
    found = public_api().splitlines()
    changed = [f"gone: {x}" for x in expected if x not in found] + [
        f"new: {x}" for x in found if x not in expected
    ]
    assert found == expected, "\n".join(
        ["", *changed, "If that is meant: python tests/test_layout.py --write-api"]
    )


def test_describe_shows_what_callers_depend_on() -> None:
    class Legacy:
        __module__ = PACKAGE

        @staticmethod
        def apply(X: int, eps: float = 1e-6) -> int:
            return X

    assert describe("Legacy", Legacy) == "Legacy.apply(X, eps=1e-06)"
    assert describe("OPS", {}) == "OPS: dict"
    assert describe("Path", Path) is None


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-api"]:
        sys.exit("usage: python tests/test_layout.py --write-api")
    sys.path[0] = str(ROOT)  # this script's own folder holds a package named transformers
    API_FILE.write_text(public_api(), encoding="utf-8")
    print(f"wrote {API_FILE}")
