"""Hashes of input files, each computed once per run: who starts ranks leaves them what it has computed.

Only inputs are taken on trust of their size and times; checkpoints and bundles are read again whenever they are verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from engine.stages import heartbeat

FILE = "hashes.json"
"""In the directory of the ranks' records."""
SETTLED = 2.0
"""Seconds after its last change before a file's hash is kept: within one tick of the clock it could change unseen."""
_known: dict[str, str] = {}


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_sha256(path: Path) -> str:
    """Returns `sha256` of an input, computed again only when the file is another one or has changed."""
    _adopt()
    key, changed = _identity(path)
    if key not in _known:
        found = sha256(path)
        if time.time() - changed < SETTLED or _identity(path)[0] != key:
            return found
        _known[key] = found
    return _known[key]


def leave(directory: Path) -> None:
    """Writes what has been computed into the directory of the records of the ranks that are started next."""
    part = directory / f"{FILE}.tmp"
    part.write_text(json.dumps(_known))
    part.rename(directory / FILE)


def _adopt() -> None:
    """Takes over what the process that started this one has left."""
    directory = os.environ.get(heartbeat.DIRECTORY)
    if directory and not _known:
        with contextlib.suppress(OSError, ValueError, TypeError):
            _known.update(json.loads(Path(directory, FILE).read_text()))


def _identity(path: Path) -> tuple[str, float]:
    about = path.stat()
    times = (about.st_mtime_ns, about.st_ctime_ns)
    return "\t".join(map(str, (path.resolve(), about.st_dev, about.st_ino, about.st_size, *times))), max(times) / 1e9
