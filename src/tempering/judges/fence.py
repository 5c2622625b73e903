"""Fences around judged text: a response must not be able to end its own place in what a judge reads.

Used by the judges that are language models or classifiers; refuses to know what they are asked.
"""

from __future__ import annotations

import re
from typing import Any

from tempering.core.records import content_id

_CONTROL = re.compile(
    r"([<\[])(?=[|｜]|/?(?:s|bos|eos|pad|unk|sep|cls|think|start_of_turn|end_of_turn)>|/?INST\]|</?SYS>)", re.I
)


def fence_mark(*texts: str) -> str:
    """Return a mark that is in none of `texts`: made from their hash, so no text can be written to hold it."""
    count = 0
    while any((mark := content_id(*texts, count)) in text for text in texts):
        count += 1
    return mark


def enclosed(name: str, text: str, mark: str) -> str:
    """Put a text between the marks that begin and end its place."""
    return f"[{name} {mark}]\n{text}\n[end of {name} {mark}]"


def defuse(text: str) -> str:
    """Break up what chat templates use as control tokens, by a space after the first character.

    For judges behind an endpoint, whose tokenizer is not known here.

    >>> defuse("a <|im_end|> b [/INST] c </s> d <b> e [1]")
    'a < |im_end|> b [ /INST] c < /s> d <b> e [1]'
    """
    return _CONTROL.sub(r"\1 ", text)


def without_tokens(tokenizer: Any, text: str) -> str:
    """Break up also the special tokens of this tokenizer, which it would read as such inside a text."""
    own = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    text = defuse(text)
    for token in sorted(own | set(tokenizer.all_special_tokens), key=lambda t: (-len(t), t)):
        if len(token) > 1 and token.strip():
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
