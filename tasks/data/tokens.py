"""The tokenizer of a model folder as data preparation needs it: its fast core and its special tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.context import StepError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Encoding, Tokenizer


_SPECIAL = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class TextTokenizer:
    """A fast tokenizer with the ids of its special tokens, None where it has none.

    Args:
        core: of the texts that the model is given.
        bos: begins a text.
        eos: ends a text.
        pad: fills up a row.
        unknown: stands for what the vocabulary does not have.
        folder: where it lies.
        writes: of the texts that the model writes; ``core`` itself but for a translator with two vocabularies of
            pieces.
    """

    core: Tokenizer
    bos: int | None
    eos: int | None
    pad: int
    unknown: int | None
    folder: Path
    writes: Tokenizer

    @cached_property
    def _bytes_of_id(self) -> np.ndarray | None:
        """Bytes that each id stands for, where the tokenizer spells one byte as one character; else None."""
        import numpy as np

        if "ByteLevel" not in _kinds(json.loads(self.core.to_str()).get("decoder")):
            return None
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        table = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, number in vocabulary.items():
            table[number] = len(token)
        for number, added in self.core.get_added_tokens_decoder().items():
            table[number] = len(added.content.encode())
        return table

    def ends(self, text: str, encoding: Encoding) -> np.ndarray:
        """For each token the bytes of ``text`` up to its end, int64; never decreasing.

        A byte-level vocabulary says exactly how many bytes a token stands for. For any other (and for a tokenizer that
        adds or drops characters) it follows from the offsets; a character that is split into several tokens then
        counts for the first of them.
        """
        import numpy as np

        total = len(text.encode())
        if self._bytes_of_id is not None:
            ends = np.cumsum(self._bytes_of_id[encoding.ids])
            if len(ends) and ends[-1] == total:
                return ends
        starts_of = np.zeros(len(text) + 1, dtype=np.int64)
        np.cumsum(_utf8_lengths(text), out=starts_of[1:])
        offsets = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        return np.maximum.accumulate(starts_of[offsets])


def open_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of the model folder ``path``, without truncation and padding.

    Raises:
        StepError: the folder has no readable ``tokenizer.json``.
    """
    core = _core(path, "tokenizer.json")
    if core is None:
        raise StepError(f"{path} has no tokenizer.json; import the model through a spec, which writes one")
    special = _special_tokens(path)
    bos, eos, pad, unknown = (core.token_to_id(special[name]) if name in special else None for name in _SPECIAL)
    padding = pad if pad is not None else eos if eos is not None else 0
    return TextTokenizer(core, bos, eos, padding, unknown, path, _core(path, "target_tokenizer.json") or core)


def _core(path: Path, name: str) -> Tokenizer | None:
    from tokenizers import Tokenizer

    file = path / name
    if not file.is_file():
        return None
    try:
        core = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise StepError(f"{file} cannot be read: {error}") from error
    core.no_truncation()  # sentence-transformers saves both with the tokenizer
    core.no_padding()
    return core


def _special_tokens(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            try:
                config: dict[str, Any] = json.loads((path / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise StepError(f"{path / name} is not JSON: {error}") from error
            for kind in _SPECIAL:
                token = config.get(f"{kind}_token")
                if isinstance(token, dict):
                    token = token.get("content")
                if isinstance(token, str):
                    found[kind] = token
    return found


def _kinds(part: Any) -> set[str]:
    if isinstance(part, dict):
        nested = [kind for value in part.values() for kind in _kinds(value)]
        return {str(part.get("type")), *nested}
    if isinstance(part, list):
        return {kind for entry in part for kind in _kinds(entry)}
    return set()


def _utf8_lengths(text: str) -> np.ndarray:
    """UTF-8 bytes of every character."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
