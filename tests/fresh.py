"""Programs in a process of their own that has PyTorch, and nothing of ours: it parts from one that imported it once."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, traceback, types
import torch

for line in sys.stdin:
    program, files = json.loads(line)
    if not (child := os.fork()):
        for number, file in zip((1, 2), files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        code, main = 1, types.ModuleType("__main__")
        sys.modules["__main__"] = main
        try:
            exec(compile(program, "<program>", "exec"), vars(main))
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE  # the server ends with its standard input, when pytest does
    return subprocess.Popen([sys.executable, "-c", _SERVER], stdin=pipe, stdout=pipe, text=True)


def in_a_new_process(program: str) -> str:
    """What it prints, if it ends well."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        server.stdin.write(json.dumps([program, [str(out), str(err)]]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline().strip()
        assert code == "0", err.read_text() or f"it ended with code {code}"
        return out.read_text().strip()
