"""Which public names of the incumbent are there: `python -m tests.compatibility --write` renews docs/compatibility.md.

`incumbent_signatures.txt` lists the names, each under the module that it is imported from. Every one is looked up as a
user would import it, so aliases count, and whatever an earlier import happens to leave behind does not: run it in a
process of its own. Of what is there, the parameters are compared; each difference is explained in `ON_PURPOSE`.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch

from tests.on_purpose import ABSENT, BEHAVIOURS, PARAMETERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "liger_kernel"
NAMES_FILE = Path(__file__).with_name("incumbent_signatures.txt")
#: names that are to come: none may be added to it
MISSING_FILE = Path(__file__).with_name("missing_names.txt")
PAGE = ROOT / "docs" / "compatibility.md"
README = ROOT / "README.md"
MARK = "compatibility"

Name = tuple[str, str]  # module, name
Differing = dict[str, list[tuple[str, str]]]  # "module.name" -> (theirs, ours)

_STARS = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}

#: area -> the "module name" of a row; the first that matches
AREAS = {
    "entry points": r"\S+ (_?apply|revert)_liger_kernel\w*|\S+ AutoLigerKernelForCausalLM",
    "functional": r"liger_kernel\.(transformers\.)?functional ",
    "chunked losses": r"liger_kernel\.chunked_loss\b",
    "model forwards and outputs": r"liger_kernel\.transformers\.model\.",
    "modules": r"liger_kernel\.transformers\b",
    "ops": r"liger_kernel\.ops\b",
    "others": "",
}


@dataclass(frozen=True)
class Entry:
    """A name, and the calls that its line shows: method ("" for the function or the class itself) -> parameters."""

    name: Name
    calls: dict[str, str]


def read_entries(text: str) -> list[Entry]:
    """`module: names`, continued on indented lines; an indented line with parentheses is one name; `#` is a comment."""
    entries, module = [], ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if not line.startswith(" "):
            module, _, line = line.partition(":")
        calls = re.findall(r"(\w+)\(([^()]*(?:\(\)[^()]*)*)\)", line)
        for name in re.findall(r"\w+", line.split("(")[0])[:1] if calls else line.split():
            methods = {method if method != name else "": rest for method, rest in calls}
            entries.append(Entry((module, name), methods))
    return entries


def is_there(module: str, name: str) -> bool:
    """Whether `from module import name` works. What is broken, rather than absent, raises."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
    return hasattr(found, name)


def parameters(text: str) -> list[Parameter]:
    function = eval(f"lambda {text}: None", {"torch": torch})
    return list(inspect.signature(function).parameters.values())


def ours(found: Any, method: str) -> list[Parameter]:
    """What the same call of ours takes. `apply` that autograd gives takes what `forward` takes after ctx."""
    autograd = method == "apply" and issubclass(found, torch.autograd.Function)
    autograd = autograd and method not in vars(found)
    function = getattr(found, "forward" if autograd else method) if method else found
    taken = list(inspect.signature(function).parameters.values())
    while method and taken and taken[0].name in ("self", "cls", "ctx"):
        del taken[0]
    # a default of None may stand for an attribute of the class
    return [
        p.replace(default=getattr(found, p.name, None)) if p.default is None else p for p in taken
    ]


def differences(
    theirs: list[Parameter], ours: list[Parameter], by_name: bool = True
) -> Iterator[tuple[str, str]]:
    """What a caller who knows theirs runs into, as (theirs, ours); without `by_name`, one who passes by position."""
    if not by_name:
        renamed = {a.name: b.name for a, b in zip(ours, theirs, strict=False)}
        ours = [p.replace(name=renamed.get(p.name, p.name)) for p in ours]
    here, there = ({_STARS.get(p.kind, "") + p.name: p for p in side} for side in (ours, theirs))
    anything = {"*", "**"} <= {_STARS.get(p.kind) for p in ours}
    missing = [name for name in there if name not in here and not anything]
    if missing:
        yield f"`{', '.join(missing)}`", "not taken"
    for name, p in here.items():
        if name in there:
            wanted = there[name].default
            if wanted not in (p.empty, ...) and repr(p.default) != repr(wanted):
                yield f"`{name}={wanted!r}`", f"`{name}={p.default!r}`"
        elif p.default is p.empty and p.kind not in _STARS:
            yield "", f"needs `{name}`"
    order, wanted = (
        [n for n, p in side.items() if p.kind <= p.POSITIONAL_OR_KEYWORD] for side in (here, there)
    )
    if not missing and not anything and order[: len(wanted)] != wanted:
        yield f"`{', '.join(wanted)}`", f"`{', '.join(order)}`"


def area_of(name: Name) -> str:
    return next(area for area, form in AREAS.items() if re.match(form, " ".join(name)))


def totals(found: dict[Name, bool]) -> str:
    """The sentence for README."""
    there, left_out = sum(found.values()), sum(map(is_left_out, found))
    return (
        f"{there} of the {len(found)} public functions and classes of `liger-kernel` 0.8.5 can be imported\n"
        f"from the same paths; {len(found) - there - left_out} are still missing, {left_out} are left out on purpose. "
        "[Compatibility](docs/compatibility.md) lists all."
    )


def is_left_out(name: Name) -> bool:
    return any(re.fullmatch(pattern, ".".join(name)) for pattern in ABSENT)


def to_come() -> list[Name]:
    """What `MISSING_FILE` lists."""
    return [entry.name for entry in read_entries(MISSING_FILE.read_text(encoding="utf-8"))]


def missing(found: dict[Name, bool]) -> list[Name]:
    return [name for name, there in found.items() if not there and not is_left_out(name)]


def faults(found: dict[Name, bool]) -> Iterator[str]:
    """Names that are neither there, nor left out on purpose, nor to come; and what is said of a name that is there."""
    listed = to_come()
    for name in found.keys() | set(listed):
        where, there = ".".join(name), found.get(name, True)
        if there and name in listed:
            yield f"{where} is in {MISSING_FILE.name}, and there"
        elif there and is_left_out(name):
            yield f"{where} is in ABSENT, and there"
        elif not there and is_left_out(name) == (name in listed):
            yield f"{where} is missing"
    for pattern in ABSENT:
        if not any(re.fullmatch(pattern, ".".join(name)) for name in found):
            yield f"{pattern} of ABSENT is the name of nothing"


MOVING = (
    "Code that was written for `liger-kernel` keeps its imports and its calls, where this page does not say otherwise.",
    "",
    "## How to move",
    "",
    "1. `pip uninstall liger-kernel`, then [install](start.md#1-install) this library, which has the same import name.",
    "2. Leave your code as it is: `use_liger_kernel=True`, `apply_liger_kernel_to_*`, modules, functions and autograd",
    "   Functions are found where they were, if the list below says *there*. Anything else is an ImportError or an",
    "   AttributeError, as for any name that a package does not have.",
    "3. Look through [different on purpose](#different-on-purpose) for what you use.",
    "4. In new code, [`liger_kernel.patch(model)`](api/patch.md) does it for any model, and says what it did.",
    "   There `outputs.logits` is a tensor that is computed when it is read; behind the old entry points it is None.",
    "",
    "The way back is step 1 the other way round.",
    "",
)


def listed(names: Iterable[Name]) -> list[str]:
    """One line per module."""
    by_module: dict[str, list[str]] = {}
    for module, name in names:
        by_module.setdefault(module, []).append(f"`{name}`")
    return [f"- `{module}`: {', '.join(found)}" for module, found in sorted(by_module.items())]


def page(found: dict[Name, bool], differing: Differing) -> str:
    areas = {area: [name for name in found if area_of(name) == area] for area in AREAS}
    lines = [
        "# Compatibility with liger-kernel 0.8.5",
        "",
        *MOVING,
        "## What is there",
        "",
        "Generated by `python -m tests.compatibility --write`; do not edit.",
        "",
        "The public functions and classes of that package, and which of them can be imported from this library. A name",
        "counts once for each path that it is imported from. Constants and back-ends for one vendor are left out.",
        "What is there takes the same parameters in the same order with the same defaults, unless a row below says why",
        "not.",
        "",
        "| area | there | missing | left out | all |",
        "|---|--:|--:|--:|--:|",
    ]
    for area, names in [*areas.items(), ("**all**", list(found))]:
        there, left_out = sum(found[name] for name in names), sum(map(is_left_out, names))
        rest = len(names) - there - left_out
        lines.append(f"| {area} | {there} | {rest} | {left_out} | {len(names)} |")
    lines += [
        "",
        "## Different on purpose",
        "",
        "| name | incumbent | ours | why |",
        "|---|---|---|---|",
    ]
    rows = [behaviour[:4] for behaviour in BEHAVIOURS]
    for name, pairs in differing.items():
        theirs, ours = ("; ".join(filter(None, side)) for side in zip(*pairs, strict=True))
        rows.append((f"`{name}`", theirs, ours, " ".join(whys(name))))
    for name in filter(is_left_out, found):
        why = next(why for p, why in ABSENT.items() if re.fullmatch(p, ".".join(name)))
        rows.append((f"`{'.'.join(name)}`", "there", "left out", why))
    lines += [f"| {' | '.join(row)} |" for row in rows]
    there = [name for name in found if found[name]]
    for title, wanted in (("There", there), ("Missing", missing(found))):
        lines += ["", f"## {title}"] if wanted else []
        for area, names in areas.items():
            rows_of = listed(name for name in names if name in wanted)
            if rows_of:
                lines += ["", f"### {title}: {area}", "", *rows_of]
    return "\n".join(lines) + "\n"


def whys(name: str) -> list[str]:
    return [why for pattern, why in PARAMETERS.items() if re.fullmatch(pattern, name)]


def between_marks(text: str, new: str | None = None) -> str:
    """What stands between the marks of `text`, or all of `text` with `new` there instead."""
    match = re.search(rf"(<!-- {MARK} -->\n)(.*?)(\n<!-- /{MARK} -->)", text, re.DOTALL)
    if match is None:
        raise ValueError(f"no <!-- {MARK} --> in the text")
    if new is None:
        return match.group(2)
    return f"{text[: match.end(1)]}{new}{text[match.start(3) :]}"


def survey() -> dict[Name, bool]:
    return {entry.name: is_there(*entry.name) for entry in entries()}


def entries() -> list[Entry]:
    return read_entries(NAMES_FILE.read_text(encoding="utf-8"))


def compare() -> Differing:
    """The names that are there and take something else."""
    differing: Differing = {}
    for entry in entries():
        if not entry.calls or not is_there(*entry.name):
            continue
        found = getattr(importlib.import_module(entry.name[0]), entry.name[1])
        pairs: list[tuple[str, str]] = []
        for method, text in entry.calls.items():
            if method and not hasattr(found, method):
                pairs.append((f"`{method}()`", "not there"))
                continue
            pairs += differences(parameters(text), ours(found, method), method != "apply")
        if pairs:
            differing[".".join(entry.name)] = pairs
    return differing


def outdated(found: dict[Name, bool], differing: Differing) -> list[Path]:
    """The files that say something else."""
    pairs = [(PAGE, page(found, differing)), (README, totals(found))]
    read = {PAGE: lambda text: text, README: between_marks}
    return [
        path for path, wanted in pairs if read[path](path.read_text(encoding="utf-8")) != wanted
    ]


def main(arguments: list[str]) -> str | None:
    if arguments not in (["--write"], ["--check"]):
        return "usage: python -m tests.compatibility --write | --check"
    found, differing = survey(), compare()
    if unexplained := [name for name in differing if len(whys(name)) != 1]:
        return f"not explained once in tests/on_purpose.py: {', '.join(unexplained)}: {differing}"
    if arguments == ["--write"]:
        rest = [name for name in missing(found) if name in to_come()]
        lines = [f"{module}: {name}" for module, name in rest]
        head = "# Names of liger-kernel to come; `python -m tests.compatibility --write` takes out the others.\n"
        MISSING_FILE.write_text(head + "".join(f"{line}\n" for line in lines), encoding="utf-8")
        PAGE.write_text(page(found, differing), encoding="utf-8")
        readme = README.read_text(encoding="utf-8")
        README.write_text(between_marks(readme, totals(found)), encoding="utf-8")
        print(totals(found))
        return None
    if wrong := sorted(faults(found)):
        return "; ".join(wrong)
    if unused := [p for p in PARAMETERS if not any(re.fullmatch(p, name) for name in differing)]:
        return f"explain nothing in tests/on_purpose.py: {', '.join(unused)}"
    stale = ", ".join(str(path.relative_to(ROOT)) for path in outdated(found, differing))
    return f"out of date: {stale}. Renew: python -m tests.compatibility --write" if stale else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
