"""The file of results: `benchmark/results/<gpu>.json`.

    {"gpu": ..., "runs": {id: where and when}, "ops": [row, ...], "e2e": [row, ...], ...}

A row is one measurement; "run" in it names its entry in "runs". A new row replaces the old one with the same key.

    python -m benchmark results                            # where the results of this machine's GPU are kept
    python -m benchmark results INTO.json FROM.json ...    # merge what several processes measured on one kind of GPU
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmark import sources
from benchmark.options import Parser

FOLDER = sources.ROOT / "benchmark" / "results"
KEYS = {
    "ops": ("op", "case", "dtype", "provider", "mode"),
    "e2e": (
        *("shape", "seq", "batch", "checkpointing", "rank", "head", "weights", "ignored", "mode"),
    ),
    "sharded": ("shape", "seq", "batch", "ranks", "how", "mode"),
    "host": ("op", "case", "provider"),
    "chunked": ("loss", "case", "mode"),
}
Row = dict[str, Any]


def device_name(device: str) -> str:
    return platform.machine() + " CPU" if device == "cpu" else torch.cuda.get_device_name()


def processor() -> str:
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or device_name("cpu")


def path_of(name: str) -> Path:
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def default_path(device: str) -> Path:
    """Git ignores that of the CPU, on which commands are only tried."""
    return path_of(device_name(device))


def describe_run(device: str, **more: Any) -> dict[str, Any]:
    """Where and when: what somebody needs to repeat the measurement."""
    return {
        "gpu": device_name(device),
        "driver": _driver() if device != "cpu" else None,
        "torch": torch.__version__,
        "triton": sources.version("triton"),
        "transformers": sources.version("transformers"),
        "commit": sources.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
        **more,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def load(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"gpu": None, "runs": {}, **{kind: [] for kind in KEYS}}
    return {**empty, **json.loads(path.read_text())} if path.exists() else empty


def merge(
    content: dict[str, Any], kind: str, run: dict[str, Any], rows: list[Row]
) -> dict[str, Any]:
    """`content` with `rows` (`kind`: see `KEYS`) of `run`; runs that no row names any more are dropped.

    Raises: ValueError if the file holds the results of another GPU.
    """
    if content["gpu"] not in (None, run["gpu"]):
        raise ValueError(
            f"These results are of {content['gpu']!r}, this machine is {run['gpu']!r}; name another file with --json."
        )
    name = f"{run['date']} {run['commit'][:10]}"
    by_key = {_key(kind, row): row for row in content[kind]}
    by_key.update({_key(kind, row): {**row, "run": name} for row in rows})
    merged = {**content, "gpu": run["gpu"], kind: [by_key[key] for key in sorted(by_key)]}
    used = {row["run"] for k in KEYS for row in merged[k]}
    runs = {**content["runs"], name: run}
    merged["runs"] = {k: runs[k] for k in sorted(runs) if k in used}
    return merged


def _key(kind: str, row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEYS[kind])


def combined(content: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`content` with everything of `other`, whose rows replace those with the same key."""
    for kind in KEYS:
        for name, run in other["runs"].items():
            content = merge(content, kind, run, [row for row in other[kind] if row["run"] == name])
    return content


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(draft, path)


def keep(path: Path, kind: str, run: dict[str, Any], rows: list[Row]) -> None:
    save(path, merge(load(path), kind, run, rows))


def said(error: Exception) -> str:
    """What a row keeps of an exception."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def main(argv: list[str] | None = None) -> int:
    parser = Parser("results", __doc__)
    parser.add_argument("into", nargs="?", type=Path)
    parser.add_argument("files", nargs="*", type=Path, metavar="FROM")
    args = parser.parse_args(argv)
    if args.into is None:
        print(default_path("cuda" if torch.cuda.is_available() else "cpu"))
        return 0
    if not args.files:
        parser.error(f"no file to merge into {args.into}")
    parser.exist(args.files)
    content = load(args.into)
    for path in args.files:
        content = combined(content, load(path))
    save(args.into, content)
    print(f"{args.into}: {', '.join(f'{len(content[kind])} {kind} rows' for kind in KEYS)}")
    return 0
