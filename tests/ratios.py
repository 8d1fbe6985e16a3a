"""The largest ratios of error to allowed error, as `assert_no_worse` wrote them down.

LIGER_KERNEL_RATIOS=/tmp/ratios make test
python -m tests.ratios /tmp/ratios.* [-n 20]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def largest(files: list[Path]) -> list[tuple[float, int, str, str]]:
    """(ratio, numbers compared, test, name), every pair of test and name once, the largest ratio first."""
    found: dict[tuple[str, str], tuple[float, int]] = {}
    for path in files:
        for line in path.read_text().splitlines():
            ratio, test, name, numbers = json.loads(line)
            found[test, name] = max((ratio, numbers), found.get((test, name), (0.0, 0)))
    return sorted(((*judged, *key) for key, judged in found.items()), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("-n", type=int, default=20, help="how many")
    given = parser.parse_args()
    rows = largest(given.files)
    print(f"{len(rows)} comparisons, {sum(ratio > 0.8 for ratio, *_ in rows)} above 0.8")
    for ratio, numbers, test, name in rows[: given.n]:
        print(f"{ratio:6.3f} {numbers:9}  {test}  {name}")


if __name__ == "__main__":
    main()
