"""Marks inserted by a parser: "a cat wearing a hat and a dog" becomes "a [cat* wearing a hat] and a [dog*]".

spaCy is optional and imported only here. A parser guesses; the marks show what it guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

from zoodip.errors import InputError

MODEL = "en_core_web_sm"
STAND_IN = "dog"  # a noun that the parser knows, in place of a learned word
PICTURES = {"photo", "picture", "painting", "drawing", "image", "photograph", "rendering", "sketch"}  # these show the subject
BELONGING = {"with", "of"}  # other prepositions say where something is, which is not an attribute
NOUNS = ("NOUN", "PROPN")
MODIFIERS = {"amod", "compound", "nmod", "nummod", "npadvmod", "acl", "relcl"}


@dataclass(frozen=True)
class Word:
    """A word of a parsed sentence. Part-of-speech and dependency labels are those of spaCy's English models."""

    text: str
    space: str  # between this word and the next
    pos: str
    dep: str
    head: int  # index in the sentence of the word that it depends on; its own index if it is the root


def mark_prompt(text: str, placeholders: Sequence[str] = ()) -> str:
    """The prompt with marks; a prompt that already has marks is returned as it is. Raises InputError."""
    if re.search(r"[\[\]*]", text):
        return text
    marked = mark_words(parse_with_spacy(text, placeholders))
    if marked == text:
        raise InputError(f"the prompt {text!r}: spaCy finds no subject in it; mark the groups, as in a [red dog*] and a [cat*]")
    return marked


def mark_words(words: Sequence[Word]) -> str:
    """The text of a parsed sentence with a group around each of its subjects."""
    found = {noun: belonging(words, noun) for noun in subjects(words)}
    first, last = {min(group) for group in found.values()}, {max(group) for group in found.values()}
    return "".join(
        "[" * (i in first) + word.text + "*" * (i in found) + "]" * (i in last) + word.space for i, word in enumerate(words)
    )


def children(words: Sequence[Word], i: int) -> Iterator[int]:
    return (k for k, word in enumerate(words) if word.head == i != k)


def subjects(words: Sequence[Word]) -> list[int]:
    """The nouns that a prompt is about: its head or its verb's subject, what a photo shows, and everything joined to them."""
    waiting, found = [i for i, word in enumerate(words) if word.head == i], set()
    while waiting:
        i = waiting.pop()
        below = list(children(words, i))
        if words[i].pos not in NOUNS:
            waiting += [k for k in below if words[k].dep in ("nsubj", "nsubjpass")]
            continue
        waiting += [k for k in below if words[k].dep in ("conj", "appos")]
        if words[i].text.lower() in PICTURES:
            of = [k for k in below if words[k].dep == "prep" and words[k].text == "of"]
            waiting += [k for each in of for k in children(words, each) if words[k].dep == "pobj"]
        else:
            found.add(i)
    # "a dog with a hat and a cat with spots": a parser may join the cat to the hat, but a noun that has something is a subject
    found |= {i for i, word in enumerate(words) if word.dep == "conj" and word.pos in NOUNS and has_something(words, i)}
    return sorted(found)


def has_something(words: Sequence[Word], noun: int) -> bool:
    below = [words[k] for k in children(words, noun)]
    return any(word.dep == "acl" or (word.dep == "prep" and word.text == "with") for word in below)


def belonging(words: Sequence[Word], noun: int) -> list[int]:
    """The indices of a group's words, without gaps: the noun, its modifiers, and what it wears or has."""
    others = set(subjects(words)) - {noun}
    below, waiting = {noun}, [noun]
    while waiting:
        i = waiting.pop()
        for k in children(words, i):
            own = words[k].dep in MODIFIERS if i == noun else words[k].dep not in ("prep", "punct")
            if k not in others and (own or (words[k].dep == "prep" and words[k].text in BELONGING)):
                below.add(k)
                waiting.append(k)
    first = last = noun
    while first - 1 in below:
        first -= 1
    while last + 1 in below:
        last += 1
    while words[last].dep in ("cc", "punct"):  # "... and", whose other side is a group of its own
        last -= 1
    return list(range(first, last + 1))


def replace_learned(text: str, placeholders: Sequence[str]) -> tuple[str, dict[int, str]]:
    """(the text with each learned word replaced by a noun that every parser knows, {where that begins: the learned word})."""
    learned, plain, position = {}, "", 0
    for match in re.finditer("|".join(map(re.escape, placeholders)) or r"(?!)", text):
        plain += text[position : match.start()]
        learned[len(plain)] = match.group()
        plain, position = plain + STAND_IN, match.end()
    return plain + text[position:], learned


def parse_with_spacy(text: str, placeholders: Sequence[str]) -> list[Word]:
    """The words of a text. Raises InputError if spaCy or its model is not installed."""
    plain, learned = replace_learned(text, placeholders)
    return [Word(learned.get(each.idx) or each.text, each.whitespace_, each.pos_, each.dep_, each.head.i)
            for each in load_spacy()(plain)]  # fmt: skip


@lru_cache(maxsize=1)
def load_spacy():
    """spaCy's small English model. Raises an InputError that says what to install."""
    how = f'pip install -e ".[parse]" && python -m spacy download {MODEL}'
    try:
        return import_module("spacy").load(MODEL, exclude=["ner", "lemmatizer"])
    except ImportError:
        raise InputError(f"--parse spacy: spaCy is not installed; run {how}, or mark the groups yourself") from None
    except OSError:
        raise InputError(f"--parse spacy: its model {MODEL} is not installed; run {how}, or mark the groups yourself") from None
