"""What the commands share of their command lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmark import sources

OPTIONS: dict[str, dict[str, Any]] = {
    "json": {"type": Path, "help": "default: benchmark/results/<gpu>.json"},
    "base": {"help": "also measure this commit, or the source tree in this folder"},
    "peer-site": {"help": "folder with peers, as `pip install --target` makes it"},
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and ends with 2."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m benchmark {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def only(self, what: str, given: Iterable[str], known: Iterable[str]) -> None:
        if unknown := sorted(set(given) - set(known)):
            self.error(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")

    def exist(self, paths: Iterable[Path]) -> None:
        if absent := [str(path) for path in paths if not path.exists()]:
            self.error(f"no file {', '.join(absent)}")


class MeasuringParser(Parser):
    """With --device, and whichever of --json, --base and --peer-site the command has."""

    def __init__(self, command: str, description: str | None, *options: str) -> None:
        super().__init__(command, description)
        self.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
        for option in options:
            self.add_argument(f"--{option}", **OPTIONS[option])

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        args = self.parse_args(argv)
        if args.device == "cuda" and not torch.cuda.is_available():
            self.error("torch sees no GPU; --device cpu checks the program itself")
        base = getattr(args, "base", None)
        if base and not (sources.is_tree(base) or sources.is_commit(base)):
            self.error(
                f"--base {base} is neither a folder with src/liger_kernel nor a commit that git finds here"
            )
        return args

    def listed(
        self, args: argparse.Namespace, what: str, given: str, known: Iterable[str]
    ) -> list[str]:
        """The parts of `given`, of those known; --base adds its own."""
        names = given.split(",")
        self.only(what, names, known)
        for name, option in (("incumbent", "peer_site"), ("base", "base")):
            if name in names and not getattr(args, option):
                self.error(
                    f"{what} {name} needs --{option.replace('_', '-')}: it has our import name"
                )
        return names + ["base"] * (args.base is not None and "base" not in names)
