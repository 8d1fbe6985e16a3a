"""What MkDocs does not do by itself.

- README, CONTRIBUTING, CHANGELOG and the examples' README stay where GitHub wants them and are pages of the site too.
- A `<picture>` with a light and a dark source, as GitHub reads it, follows the switch of the site.
- Beside every page lies its Markdown; llms.txt lists these, llms-full.txt holds them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FROM_ROOT = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "examples.md": "examples/README.md",
}
PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="(?P<dark>[^"]+)"[^>]*>\s*'
    r'<img (?=[^>]*alt="(?P<alt>[^"]*)")[^>]*src="(?P<light>[^"]+)"[^>]*>\s*</picture>'
)
#: a link of a page to one of these, where they are outside of docs/
FROM_PAGE = re.compile(r"\]\(((?:\.\./)+)(" + "|".join(map(re.escape, FROM_ROOT.values())) + r")")
PAGES = {source: name for name, source in FROM_ROOT.items()}
API = re.compile(r"<!-- api: (?P<module>[\w.]+) (?P<pattern>\S+) -->")
BOTH = r"![\g<alt>](\g<light>#only-light)![\g<alt>](\g<dark>#only-dark)"
MARKS = re.compile(r"^<!-- /?[\w:]+ -->\n?", re.MULTILINE)

written: dict[str, str] = {}  # source of a page -> its Markdown
order: list[Page] = []


def on_files(files: Files, config: MkDocsConfig) -> Files:
    written.clear()
    for name, source in FROM_ROOT.items():
        text = seen_from_docs((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    return files


def seen_from_docs(text: str) -> str:
    """The links of a page in the root, from docs/."""
    for name, source in FROM_ROOT.items():
        text = text.replace(f"]({source}", f"]({name}")
    return re.sub(r'(\]\(|src="|srcset=")docs/', r"\1", text)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    order[:] = nav.pages


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    markdown = API.sub(api_names, FROM_PAGE.sub(lambda m: f"]({m[1][3:]}{PAGES[m[2]]}", markdown))
    plain = PICTURE.sub(r"![\g<alt>](\g<light>)", markdown)
    written[page.file.src_uri] = api_spelled_out(MARKS.sub("", plain))
    return PICTURE.sub(BOTH, markdown)


def api_names(match: re.Match[str]) -> str:
    """`::: name` for everything that a module exports, or that is defined within it, if its name fits."""
    module, pattern = package()[match["module"].removeprefix("liger_kernel.")], match["pattern"]
    names = [
        f"{module.path}.{name}" for name in module.exports or () if re.fullmatch(pattern, str(name))
    ]
    return "\n\n".join(
        f"::: {name}" for name in names or sorted(defined(module, pattern), key=short)
    )


def short(name: str) -> str:
    return name.rpartition(".")[2].lower()


def defined(module: Any, pattern: str) -> Iterator[str]:
    for name, member in module.members.items():
        if member.is_alias:
            continue
        if member.is_module:
            yield from defined(member, pattern)
        elif (member.is_class or member.is_function) and re.fullmatch(pattern, name):
            yield member.path


def api_spelled_out(markdown: str) -> str:
    """Signature and docstring in the place of `::: name`."""

    def of(match: re.Match[str]) -> str:
        found: Any = package()[match["name"].removeprefix("liger_kernel.")]
        found = found.final_target if found.is_alias else found
        signed = found.members.get("__init__", found) if found.is_class else found
        text = [f"## {match['name']}", "", "```python", signature(found.name, signed), "```", ""]
        return "\n".join([*text, found.docstring.value if found.docstring else ""])

    text = re.sub(r"^::: (?P<name>[\w.]+)(?:\n+ +.*)*", of, markdown, flags=re.MULTILINE)
    return re.sub(r"\[(`[\w.]+`)\]\[[\w.]+\]", r"\1", text)


def signature(name: str, found: Any) -> str:
    parameters = [p for p in getattr(found, "parameters", ()) if p.name not in ("self", "cls")]
    stars = {"variadic positional": "*", "variadic keyword": "**"}
    shown = [
        stars.get(p.kind.value, "")
        + p.name
        + ("" if p.default is None or p.kind.value in stars else f"={p.default}")
        for p in parameters
    ]
    return f"{name}({', '.join(shown)})"


_package: list[griffe.Module] = []


def package() -> griffe.Module:
    if not _package:
        extensions = griffe.load_extensions(str(ROOT / "docs" / "tooling" / "docstrings.py"))
        loaded: Any = griffe.load(
            "liger_kernel", search_paths=[ROOT / "src"], extensions=extensions
        )
        _package.append(loaded)
    return _package[0]


def first_sentence(markdown: str) -> str:
    """Of the first paragraph that is neither title, table, code, picture nor list."""
    for block in re.split(r"\n\s*\n", markdown):
        if block.strip() and not block.startswith(("#", "|", "```", "!", "- ", "<", ":::")):
            said = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(block.split()))
            return re.split(r"(?<=[.?])\s", said)[0].rstrip(":")
    return ""


def on_post_build(config: MkDocsConfig) -> None:
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    section: Any = None
    for page in order:
        text, name = written[page.file.src_uri], page.file.src_uri
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
        if page.parent is not section:
            section = page.parent
            lines += ["", f"## {section.title}", ""] if section else [""]
        lines.append(f"- [{page.title}]({name}): {first_sentence(text)}")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole = "\n\n".join(f"<!-- {p.file.src_uri} -->\n\n{written[p.file.src_uri]}" for p in order)
    (site / "llms-full.txt").write_text(whole + "\n", encoding="utf-8")
