# SPDX-License-Identifier: MIT
"""Which sources there are, and what a kernel file is made of, as one hash."""

import hashlib
import re
from pathlib import Path


def sources(csrc: Path, *patterns: str) -> list[str]:
    """The files below `csrc` that match a pattern."""
    return sorted(str(path) for pattern in patterns for path in csrc.glob(pattern))


def parts(file: str, csrc: Path) -> list[str]:
    """A source and all that it includes of `csrc`, with the sources of those headers: paths below csrc."""
    found, waiting = set(), {file}
    while waiting:
        each = waiting.pop()
        found.add(each)
        included = re.findall(r'^\s*#\s*include\s*"([^"]+)"', (csrc / each).read_text(), re.MULTILINE)
        folder, _, name = each.rpartition("/")
        stem = name.partition(".")[0]
        own = [f"{folder}/{stem}{suffix}" for suffix in (".cpp", ".cu")]
        waiting |= {path for path in (*included, *own) if (csrc / path).is_file()} - found
    return sorted(found)


def source_hash(file: str, csrc: Path) -> str:
    """SHA-256 of the names and contents of `parts`, its first 16 digits."""
    digest = hashlib.sha256()
    for part in parts(file, csrc):
        digest.update(part.encode() + b"\0" + (csrc / part).read_bytes() + b"\0")
    return digest.hexdigest()[:16]
