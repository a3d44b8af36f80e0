"""Prompts with marked groups, "a [<sks>* wearing a red hat] and a [blue critter*]", parsed into strings and spans.

Brackets hold a group, and a star follows its noun. Nothing is guessed from grammar: the marks say who is bound to what.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zoodip.errors import InputError

Span = tuple[int, int]  # first character, and the one after the last
ARTICLE = re.compile(r"(?<!\w)(?:an?|the|my|one)\s+$", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """One pair of brackets."""

    phrase: Span  # in the prompt
    noun: Span  # in the prompt, within `phrase`
    anchor: str  # the phrase alone, with the article that precedes its bracket: "a blue critter with yellow spots"
    anchor_phrase: Span  # in `anchor`
    bare: str  # the noun alone, with a fitting article: "a critter"
    bare_noun: Span  # in `bare`


@dataclass(frozen=True)
class MarkedPrompt:
    marked: str  # as given
    prompt: str  # without marks
    clean: str  # every group reduced to its noun: "a <sks> and a critter on the grass"
    groups: tuple[Group, ...]


def parse_marks(marked: str, placeholders: Sequence[str] = (), expand: Callable[[str], str] = lambda text: text) -> MarkedPrompt:
    """Parse a marked prompt. A group that contains exactly one of `placeholders`, once, needs no star.

    `expand` is applied to the words: a pipeline's `maybe_convert_prompt`, which writes out a token of several vectors (all
    of them are then the noun). Raises an InputError that shows the place.
    """
    check_marks(marked)
    prompt = clean = ""
    groups, position = [], 0
    for match in re.finditer(r"\[([^\]]*)\]", marked):
        before = marked[position : match.start()]
        article = found.group() if (found := ARTICLE.search(before)) else ""
        head, position = expand(before.removesuffix(article)), match.end()
        first, noun, last = (expand(text) for text in split_at_noun(match.group(1).strip(), marked, placeholders))
        prompt += head + article
        start, noun_start = len(prompt), len(prompt + first)
        prompt += first + noun + last
        fitting = fit_article(article, noun)
        clean += head + fitting + noun
        groups.append(
            Group(
                phrase=(start, len(prompt)),
                noun=(noun_start, noun_start + len(noun)),
                anchor=article + first + noun + last,
                anchor_phrase=(len(article), len(article + first + noun + last)),
                bare=fitting + noun,
                bare_noun=(len(fitting), len(fitting + noun)),
            )
        )
    tail = expand(marked[position:])
    return MarkedPrompt(marked, prompt + tail, clean + tail, tuple(groups))


def check_marks(marked: str) -> None:
    """Check that brackets close, do not nest, and contain every star. Raises an InputError that shows the place."""
    opened = None
    for i, character in enumerate(marked):
        if character == "[":
            if opened is not None:
                raise InputError(f"the prompt {marked!r}: the bracket at {marked[i:]!r} is inside another; groups do not nest")
            opened = i
        elif character == "]":
            if opened is None:
                raise InputError(f"the prompt {marked!r}: the bracket at {marked[i:]!r} closes nothing; write a group as [group]")
            opened = None
        elif character == "*" and opened is None:
            raise InputError(
                f"the prompt {marked!r}: the star at {marked[: i + 1]!r} is outside brackets; put brackets around its group"
            )
    if opened is not None:
        raise InputError(f"the prompt {marked!r}: the bracket at {marked[opened:]!r} is never closed; add a ]")


def split_at_noun(phrase: str, marked: str, placeholders: Sequence[str]) -> tuple[str, str, str]:
    """A group's words before its noun, the noun, and the words after it, without the star. Raises InputError."""
    where = f"the prompt {marked!r}, group [{phrase}]"
    if not phrase:
        raise InputError(f"the prompt {marked!r}: empty brackets; put a group's words in them, with a star after its noun")
    if phrase.count("*") > 1:
        raise InputError(f"{where}: has {phrase.count('*')} stars; put only one, after the noun")
    if "*" in phrase:
        match = re.fullmatch(r"(.*?)([^\s*]+)\*(.*)", phrase, re.DOTALL)
        if match is None or match[3][:1].isalnum():
            raise InputError(
                f"{where}: the star does not follow a whole word; put it right after the noun, as in [blue critter*]"
            )
        return match[1], match[2], match[3]
    found = [word for word in placeholders for _ in range(phrase.count(word))]
    if len(found) != 1:
        words = phrase.split()
        raise InputError(f"{where}: does not say which word is its noun; put a star after it, as in [{' '.join(words)}*]")
    first, noun, last = phrase.partition(found[0])
    return first, noun, last


def fit_article(article: str, noun: str) -> str:
    """ "an " before "critter" becomes "a ", because the adjective that required it is gone. Other articles stay."""
    if article.strip().lower() not in ("a", "an"):
        return article
    letter = re.search(r"\w", noun)
    fitting = "an " if letter and letter.group().lower() in "aeiou" else "a "
    return fitting.capitalize() if article[0].isupper() else fitting
