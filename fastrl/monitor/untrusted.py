"""Text that a model wrote, made safe and readable before it reaches a terminal."""

from __future__ import annotations

import re
import unicodedata

from fastrl.chat import content_text
from fastrl.types import Messages

# Terminal escape sequences: strings (OSC, DCS, SOS, PM, APC) up to their terminator, CSI, and two-byte ones.
_ESCAPES = re.compile(
    r"(?:\x1b[\]P^_X]|[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\x9c|$)"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*[0-~]?",
    re.DOTALL,
)


def clean(text: str) -> str:
    """`text` without terminal escapes, control characters, surrogates and invisible formatting such as bidirectional
    overrides; line ends and tabs stay."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def one_line(text: str, limit: int) -> str:
    """`clean` text on one line of at most `limit` characters; what is cut from the middle becomes an ellipsis."""
    text = " ".join(clean(text).split())
    if len(text) <= limit:
        return text
    head = (limit - 3) // 3
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def question(content: str | Messages) -> str:
    """What a prompt asks: plain text, or the last message of a chat."""
    return content if isinstance(content, str) else (content_text(content[-1]) if content else "")
