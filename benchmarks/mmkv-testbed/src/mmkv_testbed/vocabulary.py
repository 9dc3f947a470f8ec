"""The closed vocabulary of the testbed: one word, one token."""

from __future__ import annotations

from typing import Final

PAD: Final = "<pad>"
BOS: Final = "<bos>"
EOS: Final = "<eos>"
IMAGE: Final = "<image>"
UNKNOWN: Final = "<unk>"
SPECIAL: Final = (PAD, BOS, EOS, IMAGE, UNKNOWN)

PROMPT: Final = ("value", "describe", "of", "?", "answer", ":")
DIGITS: Final = tuple("0123456789")
LETTERS: Final = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "cyan")
GRID: Final = 24
ROWS: Final = tuple(f"row{i}" for i in range(GRID))
COLUMNS: Final = tuple(f"col{i}" for i in range(GRID))
BLANK: Final = "blank"
SYMBOLS: Final = tuple("#+-=/*%!")
_FILLERS: Final = (
    "please kindly now then well so look at this page with care take your time and reply in short plain words"
)
FILLERS: Final = tuple(_FILLERS.split())
MORE_PROMPT: Final = ("pair", "list", "locate", "within")
IMAGE_NAMES: Final = ("image1", "image2", "image3")
RULINGS: Final = ("lines", "columns", "diagonals")
"""The paper's ruling, one per arrangement; never said, but what the vision tower is taught to say of a cell."""

WORDS: Final = (
    *SPECIAL,
    *PROMPT,
    *DIGITS,
    *LETTERS,
    *COLOURS,
    *ROWS,
    *COLUMNS,
    BLANK,
    *SYMBOLS,
    *FILLERS,
    *MORE_PROMPT,
    *IMAGE_NAMES,
    *RULINGS,
)
TOKEN_ID: Final = {word: index for index, word in enumerate(WORDS)}


def encode(words: tuple[str, ...]) -> list[int]:
    """Token ids of `words`; an unknown word is a `KeyError`, never `<unk>`."""
    return [TOKEN_ID[word] for word in words]
