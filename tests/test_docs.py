"""The site, README and CONTRIBUTING: they build, and every link, anchor and command in them is there."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FROM_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")
SOURCES = [*(ROOT / name for name in FROM_ROOT), *sorted(DOCS.rglob("*.md"))]
README_LINES = 150

Findings = list[str]


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(text: str) -> Iterator[str]:
    """What stands in fences and in code spans, line by line."""
    for fence in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from fence.splitlines()
    without = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without))


# --- what a page of the repository may say --------------------------------------------------------


def broken_links(page: Path) -> Findings:
    """Of the sources, as GitHub follows them; anchors are looked at in the built site."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    inside = (link.partition("#")[0] for link in found if "://" not in link)
    return [link for link in inside if link and not (page.parent / link).exists()]


def unknown_commands(text: str, targets: set[str]) -> Findings:
    """`make` targets, `python -m` modules, commands and options of `benchmark` and `liger_kernel` that do not exist."""
    findings = []
    for line in code(text):
        for target in re.findall(r"(?:^|[\s;&(])make ([a-z][\w-]*)", line):
            if target not in targets:
                findings.append(f"make {target}")
        for module, rest in re.findall(r"python3? -m ([\w.]+)([^|;&#]*)", line):
            if module in PROGRAMS:
                findings += unknown_to(module, rest.split())
            elif not has_module(module):
                findings.append(f"python -m {module}")
        for rest in re.findall(r"^(?:\$ )?liger_kernel ([a-z][^|;&#]*)", line):
            findings += unknown_to("liger_kernel", rest.split())
        findings += re.findall(r"^liger-kernel [a-z][\w-]*", line)  # the command has another name
    return findings


def has_module(name: str) -> bool:
    parts = name.split(".")
    places = (ROOT.joinpath(*parts), ROOT.joinpath("src", *parts))
    if any(p.with_suffix(".py").is_file() or (p / "__main__.py").is_file() for p in places):
        return True
    try:
        return parts[0] not in ("tests", *PROGRAMS) and importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


#: what has commands, each with a --help
PROGRAMS = ("benchmark", "liger_kernel")


def unknown_to(program: str, words: list[str]) -> Findings:
    if not words or not re.fullmatch(r"[a-z][\w-]*", words[0]):
        return []
    command, *rest = words
    known = options_of(program, command)
    if known is None:
        return [f"{program} {command}"]
    given = {word.partition("=")[0] for word in rest if word.startswith("--")}
    return [f"{program} {command} {option}" for option in sorted(given - known)]


@functools.cache
def options_of(program: str, command: str) -> frozenset[str] | None:
    """The options of a command, None where there is no such command."""
    if not has_module(program):
        return None
    shown, status = io.StringIO(), 0
    with contextlib.ExitStack() as inside:
        inside.enter_context(mock.patch.dict(os.environ, COLUMNS="200"))
        inside.enter_context(contextlib.redirect_stdout(shown))
        inside.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            status = importlib.import_module(f"{program}.__main__").main([command, "--help"])
        except SystemExit as ended:
            status = ended.code  # type: ignore[assignment]
    return None if status else frozenset(re.findall(r"--[\w-]+", shown.getvalue()))


def missing_paths(text: str) -> Findings:
    """Files and folders of the repository that a code span names."""
    pattern = r"(?:(?:src|tests|benchmark|examples|\.ci)/[\w./-]*|docs/[\w/-]+\.\w+)"
    named = {
        match
        for line in code(text)
        for match in re.findall(rf"(?<![\w/.-]){pattern}(?![\w<*/{{])", line)
    }
    return sorted(path for path in named if not (ROOT / path).exists())


def wrong_python(text: str) -> Findings:
    """Python that cannot be read, or imports from this library what it does not have."""
    findings = []
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            findings.append(f"{error}: {block}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("liger_kernel"):
                module = importlib.import_module(str(node.module))
                findings += [
                    f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)
                ]
    return findings


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE))


@pytest.mark.parametrize("page", SOURCES, ids=ids)
def test_a_page_names_what_exists(page: Path) -> None:
    pytest.importorskip("transformers")
    text = page.read_text(encoding="utf-8")
    assert broken_links(page) == []
    assert unknown_commands(text, make_targets()) == []
    assert wrong_python(text) == []
    if page.name not in ("models.md", "compatibility.md"):
        assert missing_paths(text) == []


def test_planted_faults_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('[a](none.md#x) [b](https://elsewhere.org/x) [c](#here) <img src="none.svg">')
    assert broken_links(page) == ["none.md", "none.svg"]
    commands = (
        "`make nothing` `make test` `python -m benchmark walk` `python -m benchmark run --walk`"
    )
    commands += " `python -m liger_kernel no-such` `liger_kernel`"
    commands += " `liger-kernel env`"
    commands += "\n```sh\nPYTHONPATH=src python3 -m tests.no_such  # make sense\nliger_kernel no-such\n```\n"
    assert unknown_commands(commands, {"test"}) == [
        "make sense", "python -m tests.no_such", "liger_kernel no-such",
        "make nothing", "benchmark walk", "benchmark run --walk", "liger_kernel no-such",
        "liger-kernel env",
    ]  # fmt: skip
    assert missing_paths("`src/liger_kernel/none.py`, `tests/ops/<op>`, `docs/design.md`") == [
        "src/liger_kernel/none.py"
    ]
    assert wrong_python("```python\nfrom liger_kernel.functional import rms_norm, none\n```") == [
        "liger_kernel.functional.none"
    ]
    (fault,) = wrong_python("```python\nx = = 1\n```")
    assert "invalid syntax" in fault


def test_readme_is_short_and_opens_with_pictures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    before_the_table = text.partition("<!-- benchmark:")[0]
    assert before_the_table.count("<picture>") == 3
    for command in ("make demo", "make test", "make check"):
        assert command in text


# --- the site -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Where a page of the site leads to, what it loads, and the anchors in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {given[name] or "" for name in ("id", "name") if name in given}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loads.append(str(given["src"]))
        if (
            tag == "link"
            and given.get("href")
            and given.get("rel") not in ("canonical", "next", "prev")
        ):
            self.loads.append(str(given["href"]))


def broken_in_site(site: Path) -> Findings:
    """Links, anchors, and whatever is loaded from elsewhere or is not there."""
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    findings = []
    for path, page in pages.items():
        where = path.relative_to(site).as_posix()
        findings += [
            f"{where} loads {x}" for x in page.loads if x.startswith(("http:", "https:", "//"))
        ]
        for link in [*page.links, *page.loads]:
            if re.match(r"\w+:|//", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                findings.append(f"{where}: {link}")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                findings.append(f"{where}: no anchor in {link}")
    return findings


def navigation(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for one in entry.values() if isinstance(entry, dict) else entry:
            yield from navigation(one)


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    nav = list(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    generated = {"index.md", "contributing.md", "changelog.md", "examples.md"}
    assert sorted(nav) == sorted(pages | generated)


def test_broken_sites_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x"></a><a href="b.html#y"></a><a href="c.html"></a><a href="#z"></a>'
        '<script src="https://cdn.org/x.js"></script><a href="https://elsewhere.org"></a>'
    )
    (tmp_path / "b.html").write_text('<h2 id="x"></h2>')
    assert broken_in_site(tmp_path) == [
        "a.html loads https://cdn.org/x.js",
        "a.html: no anchor in b.html#y",
        "a.html: c.html",
        "a.html: no anchor in #z",
    ]


def wrong_in_markdown(site: Path) -> Findings:
    """A page without its Markdown or its line in llms.txt, and Markdown that only the site can read."""
    pages = {p.with_suffix(".md").relative_to(site).as_posix() for p in site.rglob("*.html")} - {
        "404.md"
    }
    index = (site / "llms.txt").read_text(encoding="utf-8")
    listed = set(re.findall(r"^- \[[^\]]+\]\((\S+)\): .{20,400}$", index, re.MULTILINE))
    findings = [f"{name}: only a page, or only in llms.txt" for name in sorted(pages ^ listed)]
    whole = (site / "llms-full.txt").read_text(encoding="utf-8")
    for name in sorted(listed):
        text = (site / name).read_text(encoding="utf-8")
        if text not in whole:
            findings.append(f"{name}: not in llms-full.txt")
        left = re.findall(r"^:::.*|<picture>|<!-- .*|\{options\}", text, re.MULTILINE)
        findings += [f"{name}: {found}" for found in left]
    return findings


def missing_from_reference(site: Path) -> Findings:
    def names(module: str, pattern: str) -> list[str]:
        found = importlib.import_module(f"liger_kernel{module}")
        return [name for name in dir(found) if re.fullmatch(pattern, name)]

    wanted = {
        "functional": importlib.import_module("liger_kernel.functional").__all__,
        "losses": importlib.import_module("liger_kernel.chunked_loss").__all__,
        "modules": names(".transformers", r"Liger\w+"),
        "incumbent": names(".transformers.functional", r"liger_\w+"),
        "patch": ["patch", "unpatch", "patched", "PatchReport"],
    }
    shown = {page: Page(site / "api" / f"{page}.html").anchors for page in wanted}
    ends = {
        page: {anchor.rpartition(".")[2] for anchor in anchors} for page, anchors in shown.items()
    }
    return [
        f"{page}: {name}"
        for page, every in wanted.items()
        for name in every
        if name not in ends[page]
    ]


def test_the_site(tmp_path: Path) -> None:
    """As `make docs` builds it: offline, strict. One test, since it takes some seconds to build."""
    pytest.importorskip("transformers")
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason="the site needs Python 3.11 or newer, and the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert broken_in_site(tmp_path) == []
    assert wrong_in_markdown(tmp_path) == []
    assert missing_from_reference(tmp_path) == []


# --- docs/tooling ---------------------------------------------------------------------------------


def tool(name: str) -> ModuleType:
    pytest.importorskip("mkdocs")
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location(name, DOCS / "tooling" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_markdown() -> None:
    text = """`x + y`, rounded once.

Args:
    x, y: (N,), any dtype,
        any strides. eps: a number.
    z: (N,). bias: (N,).

Returns: (N,)
    in the dtype of x.
Raises: TypeError for integers."""
    made = tool("docstrings").as_markdown(text, ["x", "y", "z", "bias"])
    assert made.splitlines() == [
        "`x + y`, rounded once.",
        "",
        "**Args**:",
        "",
        "- `x`, `y`: (N,), any dtype,",
        "    any strides. eps: a number.",
        "- `z`: (N,).",
        "- `bias`: (N,).",
        "",
        "**Returns**: (N,)",
        "in the dtype of x.",
        "",
        "**Raises**: TypeError for integers.",
    ]


def test_links_and_pictures_are_seen_from_the_site() -> None:
    pages = tool("pages")
    picture = (
        '<picture><source media="m" srcset="docs/a-dark.svg"><img alt="A" src="docs/a-light.svg" '
        'width="49%"></picture> [b](docs/b.md#c) [d](CONTRIBUTING.md#e)'
    )
    seen = pages.seen_from_docs(picture)
    assert "[b](b.md#c) [d](contributing.md#e)" in seen
    both = "![A](a-light.svg#only-light)![A](a-dark.svg#only-dark)"
    assert pages.PICTURE.sub(pages.BOTH, seen).startswith(both)
    assert pages.first_sentence("# T\n\n| a |\n\nOne `x.y` two.\nThree.") == "One `x.y` two."
