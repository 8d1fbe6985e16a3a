"""The docstrings of the house as Markdown, and what no signature shows: the options that a loss is declared with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Attributes|Call|Options|Returns|Raises|Differs from \w+):\s*(.*)")
ENTRY = re.compile(r"((?:\w+, )*\w+): ")


def as_markdown(text: str, names: Iterable[str] = ()) -> str:
    """`Args:` and the like in bold, each argument an item; `names` are those that may begin one within a line."""
    known = "|".join(names)
    more = re.compile(rf"\. (?=(?:(?:{known}), )*(?:{known}): )") if known else None
    lines: list[str] = []
    listing = False
    for line in text.splitlines():
        bare, depth = line.strip(), len(line) - len(line.lstrip())
        if section := SECTION.fullmatch(line):
            listing = not section[2]
            lines += ["", f"**{section[1]}**: {section[2]}".rstrip(), *([""] if listing else [])]
        elif listing and depth == 4:
            for item in more.sub(".\n", bare).split("\n") if more else [bare]:
                name = ENTRY.match(item)
                coded = ", ".join(f"`{n}`" for n in name[1].split(", ")) if name else ""
                lines.append(f"- {coded}: {item[name.end() :]}" if name else f"- {item}")
        else:
            listing = listing and depth > 0
            lines.append(f"    {bare}" if listing else bare)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def options_of(loss: griffe.Class) -> griffe.Class | None:
    """X where the constructor of a class is declared by `@takes(X)`."""
    init = loss.members.get("__init__")
    for decorator in getattr(init, "decorators", ()):
        if found := re.fullmatch(r"takes\((\w+)\)", str(decorator.value)):
            made: Any = loss.module[found[1]]
            return made.final_target if made.is_alias else made
    return None


def declared(loss: griffe.Class, options: griffe.Class) -> None:
    """The fields of the options become the parameters of the constructor, their docstrings a section."""
    init: Any = loss.members["__init__"]
    fields: Any = [
        m for m in options.members.values() if m.is_attribute and m.annotation is not None
    ]
    fields = [f for f in fields if f.value is not None and "ClassVar" not in str(f.annotation)]
    keyword = griffe.ParameterKind.positional_or_keyword
    of_self = griffe.Parameter("self", kind=griffe.ParameterKind.positional_only)
    made = [
        griffe.Parameter(f.name, annotation=f.annotation, kind=keyword, default=f.value)
        for f in fields
    ]
    init.parameters = griffe.Parameters(of_self, *made)
    names = {f.name for f in fields}
    texts = [c.docstring.value for c in (options, *options.mro()) if c.docstring]
    items = [f"    {line}" for text in texts for line in options_lines(text, names)]
    said = [loss.docstring.value] if loss.docstring else []
    said += ["", *called(loss), "", "Options:", *items] if items else ["", *called(loss)]
    loss.docstring = griffe.Docstring("\n".join(said), parent=loss)


def called(loss: griffe.Class) -> list[str]:
    """What a call takes and returns: as `compute`, which the base class calls with the options, or as `forward`."""
    of = [
        c.members[name]
        for name in ("compute", "forward")
        for c in (loss, *loss.mro())
        if name in c.members
    ]
    for function in (f for f in of if f.is_function):
        taken = [p for p in function.parameters if p.name not in ("self", "cls", "options")]
        if not any(p.kind.value.startswith("variadic") for p in taken):
            shown = (p.name if p.default is None else f"{p.name}={p.default}" for p in taken)
            returns = next(
                (f.docstring.value for f in of if f.name == function.name and f.docstring), ""
            )
            return ["Call: " + f"`loss({', '.join(shown)})`", "", returns]
    return []


def options_lines(text: str, names: set[str]) -> list[str]:
    """One line for each option that the loss has, as `ENTRY` reads it; other sentences are left out."""
    joined = re.sub(r"\n(?!\w+(?:, \w+)*: |\n)", " ", text)
    joined = re.sub(rf"\. (?=(?:\w+, )*(?:{'|'.join(names)}): )", ".\n", joined)
    found = [(line, ENTRY.match(line)) for line in joined.splitlines()]
    return [line for line, name in found if name and set(name[1].split(", ")) <= names]


def switches(folder: Path) -> Iterator[str]:
    """The options that the sites bring, as `patch` adds them to its docstring when it is imported."""
    for file in sorted(folder.glob("*.py")):
        found = re.findall(
            r'Option\("(\w+)", (True|False), "([^"]*)"\)', file.read_text(encoding="utf-8")
        )
        yield from (f"{name}: {text} Default: {default}." for name, default, text in found)


class House(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        patch: Any = pkg["transformers.patching.patch"]
        options = "\n    ".join(switches(pkg["transformers.patching.sites"].filepath.parent))
        patch.docstring.value = patch.docstring.value.replace("{options}", options)
        names = "|".join(map(str, pkg["functional"].exports or ()))
        self.functional, self.links = (
            f"{pkg.name}.functional",
            re.compile(rf"`{pkg.name}\.ops\.({names})`"),
        )
        self._visit(pkg)

    def _visit(self, found: griffe.Object) -> None:
        for member in list(found.members.values()):
            if member.is_alias:
                continue
            if member.is_class and (options := options_of(member)) is not None:
                declared(member, options)
            if member.docstring:
                member.docstring.value = self.links.sub(
                    rf"[`\1`][{self.functional}.\1]", member.docstring.value
                )
                signed: Any = member.members.get("__init__", member) if member.is_class else member
                names = [p.name for p in getattr(signed, "parameters", ()) if p.name.isidentifier()]
                member.docstring.value = as_markdown(member.docstring.value, names)
            self._visit(member)
