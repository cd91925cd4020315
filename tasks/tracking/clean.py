"""Files on their way out, without the secrets."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from specs.schema.redaction import SHORTEST_SECRET, redact
from tasks.tracking.settings import Refused

LARGEST_TEXT = 32 * 2**20
"""Larger files are weights and are not searched, in bytes."""


def clean_copy(source: Path, target: Path, secrets: Iterable[str]) -> Path:
    """``source`` itself where it can be sent as it is under the name of ``target``, else a copy without the secrets.

    Args:
        source: a file or folder.
        target: where the copy goes, if one is needed.
        secrets: values that must not be sent, in plain, JSON, HTML or URL form.

    Raises:
        Refused: a secret stands in a file that is not text.
    """
    forms = sorted({form for secret in secrets if len(secret) >= SHORTEST_SECRET for form in _forms(secret)}, key=len)
    files = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if path.is_file()]
    tainted = {path: text for path in files if (text := _tainted(path, forms)) is not None}
    if not tainted and (source.is_dir() or source.name == target.name):
        return source
    if source.is_file():
        shutil.copyfile(source, target)
    else:
        shutil.copytree(source, target)
    for path, text in tainted.items():
        place = target if path == source else target / path.relative_to(source)
        place.write_text(redact(text, forms))
    return target


def _forms(secret: str) -> set[str]:
    return {secret, json.dumps(secret)[1:-1], html.escape(secret), quote(secret, safe="")}


def _tainted(path: Path, forms: list[str]) -> str | None:
    if not forms or path.stat().st_size > LARGEST_TEXT:
        return None
    content = path.read_bytes()
    if not any(form.encode() in content for form in forms):
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        reason = (
            f"{path.name} holds a secret (the value of an environment variable that the spec names) and is not text"
        )
        raise Refused(f"{reason}; keep the value out of what the spec reads, and run it again") from None
