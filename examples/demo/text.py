"""Real text that is on every machine with Python: the standard library's sources and docstrings."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

#: left out: other people's packages, and tests, which Linux distributions do not ship
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
#: smaller than the smallest vocabulary asked for (32,000 merges) needs
MIN_TEXT_BYTES = 1_000_000
#: tokenizer, tokens, losses, plots: 30 MB in all; leave some room
MIN_FREE_BYTES = 200_000_000
END_OF_FILE = "<|end|>"
LEAST_VOCABULARY = 256 + 1


class DemoError(Exception):
    """Something the user can put right; shown without a traceback."""


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"{path} cannot be made ({error}). Name another folder with --output."
        ) from error


def check_free_disk(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DemoError(
            f"{folder} has {free / 1e6:.0f} MB free, the demo needs {needed / 1e6:.0f} MB. "
            "Free some space, or name another folder with --output."
        )


def find_text(root: Path | None = None, min_bytes: int = MIN_TEXT_BYTES) -> list[Path]:
    """The .py files below `root` (default: the standard library of this Python), in a fixed order."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if path.is_file() and not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    ]
    found = sum(path.stat().st_size for path in files)
    if found < min_bytes:
        raise DemoError(
            f"No text found: {root} holds {len(files)} .py files with {found / 1e6:.1f} MB, at least "
            f"{min_bytes / 1e6:.1f} MB are needed. Name a folder that holds more with --text."
        )
    return files


def read(files: list[Path]) -> Iterator[str]:
    for path in files:
        yield path.read_text(encoding="utf-8", errors="replace")


def tokenize(files: list[Path], vocabulary: int, tokenizer_file: Path) -> Tensor:
    """Train a byte-level BPE tokenizer on `files`, write it to `tokenizer_file`, return all token ids as int32 (N,)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read(files), trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise DemoError(
            f"The text yields {tokenizer.get_vocab_size()} tokens only, {vocabulary} are wanted. "
            "Name a folder that holds more text with --text."
        )
    end = tokenizer.encode(END_OF_FILE).ids
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(read(files))):
        ids += encoding.ids + end
    tokenizer.save(str(tokenizer_file))
    return torch.tensor(ids, dtype=torch.int32)


def prepare(
    cache: Path, vocabulary: int, root: Path | None = None, min_bytes: int = MIN_TEXT_BYTES
) -> Path:
    """The file with the token ids of the text, made on the first call, found in `cache` on the next."""
    if vocabulary < LEAST_VOCABULARY:
        raise DemoError(
            f"--vocabulary {vocabulary} is below {LEAST_VOCABULARY}: the bytes, and the end of a file."
        )
    files = find_text(root, min_bytes)
    size = sum(path.stat().st_size for path in files)
    key = f"bpe-{vocabulary}-python-{platform.python_version()}-{len(files)}-files-{size}-bytes"
    tokens_file = cache / key / "tokens.pt"
    if not tokens_file.exists():
        make_folder(tokens_file.parent)
        check_free_disk(cache)
        tokens = tokenize(files, vocabulary, tokens_file.with_name("tokenizer.json"))
        unfinished = tokens_file.with_suffix(f".{os.getpid()}")
        torch.save(tokens, unfinished)
        unfinished.replace(tokens_file)  # an interrupted run leaves no half file behind
    return tokens_file
