"""Turn source code and questions about it into plain words that a small embedder can match.

A tokenizer trained on a few megabytes sees no common piece in `read_jsonFile2` and "reads a JSON file". So identifiers
are split and lower-cased, punctuation and Python keywords dropped. A document says each word once, because only its
first ~96 tokens are embedded and repetition would push words out.
Pure functions: the same text gives the same words on every machine and Python version.
"""

import re
from functools import lru_cache

# Written out, not `keyword.kwlist`: the list grows with Python, prepared data must not.
PYTHON_KEYWORDS = frozenset(
    {
        *("False", "None", "True", "and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del"),
        *("elif", "else", "except", "finally", "for", "from", "global", "if", "import", "in", "is", "lambda"),
        *("nonlocal", "not", "or", "pass", "raise", "return", "try", "while", "with", "yield"),
    }
)
_DROPPED = frozenset(word.lower() for word in PYTHON_KEYWORDS)

_TOKEN = re.compile(r"[^\W_]+")  # letters and digits of any script: snake_case is split here
_ASCII_PART = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")  # HTTPServer2 -> HTTP, Server, 2


def split_words(text: str) -> list[str]:
    """Split text into lower-case words, in order: snake_case, CamelCase and digits apart; punctuation dropped.

    A run of letters and digits with any non-ASCII character stays one word, since case says nothing there.
    """
    return [word for token in _TOKEN.findall(text) for word in _split_token(token)]


@lru_cache(maxsize=100_000)
def _split_token(token: str) -> tuple[str, ...]:
    if token.isascii():
        return tuple(part.lower() for part in _ASCII_PART.findall(token))
    return (token.lower(),)


def prepare_query(text: str) -> str:
    """Prepare a question or a sentence: split words without Python keywords, order and repetitions kept."""
    return " ".join(word for word in split_words(text) if word not in _DROPPED)


def prepare_code(text: str) -> str:
    """Prepare a document (source code): split words without Python keywords, each once, in order of first use."""
    return " ".join(dict.fromkeys(word for word in split_words(text) if word not in _DROPPED))
