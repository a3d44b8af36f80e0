"""Learned words in prompts: read from embedding files, checked against a tokenizer, and written out where a prompt has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from zoodip.errors import InputError
from zoodip.files import why_unreadable
from zoodip.marks import MarkedPrompt, parse_marks
from zoodip.prompts import SHARED_KEY, read_embedding

NAMED = re.compile(r"(.+)=(<[^<>]+>)")  # FILE=<word>: the word is in angle brackets at the end, as a path may contain =
WORD = re.compile(r"<[^<>\s]+>")  # what looks like a learned word


@dataclass
class Embedding:
    path: Path
    word: str
    vectors: Tensor  # [V, d]

    @property
    def pieces(self) -> list[str]:
        """The tokens of its vectors, as diffusers names them."""
        return [self.word, *(f"{self.word}_{i}" for i in range(1, len(self.vectors)))]

    def refused(self, fault: str) -> InputError:
        return InputError(f"--embedding {self.path}: {fault}; call it otherwise: --embedding '{self.path}=<my-word>'")


def read_embeddings(entries: Sequence[str]) -> list[Embedding]:
    """The embeddings of FILE or FILE=<word> entries. Raises InputError."""
    found: dict[str, Embedding] = {}
    for entry in entries:
        match = NAMED.fullmatch(entry)
        path = Path(match[1] if match else entry)
        key = key_of(path)
        one = Embedding(path, match[2] if match else key, read_embedding(path, None)[0])
        if one.word == SHARED_KEY:
            raise InputError(
                f"--embedding {path}: does not name its word; give the run's learned_embeds.safetensors, or name it: "
                f"--embedding '{path}=<my-word>'"
            )
        if one.word != one.word.lower() or re.search(r"[\s\[\]*]", one.word):  # prompts are lower-cased, and * and [] are marks
            raise one.refused(f"its word {one.word!r} cannot stand in a prompt (upper case, a space, a bracket or a star)")
        if one.word in found:
            raise one.refused(f"its word {one.word} is also that of {found[one.word].path}")
        found[one.word] = one
    return list(found.values())


def key_of(path: Path) -> str:
    """The key of the only tensor in an embedding file. Raises InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"--embedding {path}: cannot be read ({why_unreadable(path, error)}); give a learned_embeds.safetensors"
        ) from None
    if len(names) != 1:
        raise InputError(f"--embedding {path}: holds {len(names)} tensors; give a file with one learned word")
    return names[0]


def add_words(tokenizer, embeddings: Sequence[Embedding], width: int) -> None:
    """Add the words to a model's tokenizer. Raises InputError if it has one already, or the model's words have another width."""
    for one in embeddings:
        if one.vectors.shape[1] != width:
            raise InputError(
                f"--embedding {one.path}: its vectors have {one.vectors.shape[1]} numbers, but this model's words have {width}; "
                "give an embedding for the same kind of model"
            )
        vocabulary = tokenizer.get_vocab()
        for piece in one.pieces:
            if piece in vocabulary or f"{piece}</w>" in vocabulary:
                raise one.refused(f"{piece!r} is already a word of this tokenizer")
        tokenizer.add_tokens(one.pieces)


def added_words(tokenizer) -> list[str]:
    return [word for word in tokenizer.added_tokens_encoder if word not in tokenizer.all_special_tokens]


def expand(tokenizer, text: str) -> str:
    """The text with learned words of several vectors written out, as diffusers' pipelines do. Raises InputError if it has an
    unknown word."""
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    check_words(tokenizer, text)
    # cast: the library returns a list only for a list
    return cast(str, TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer))


def check_words(tokenizer, text: str) -> None:
    """Raises InputError if a <word> of the text is unknown to the tokenizer, which would read it as letters."""
    if "{}" in text:
        raise InputError(f"the prompt {text!r}: {{}} stands for nothing here; write the learned word itself, or its noun")
    words = WORD.findall(text)
    unknown = [word for word in words if word not in tokenizer.get_vocab()]
    if unknown:
        known = ", ".join(added_words(tokenizer)) or "none"
        raise InputError(
            f"the prompt {text!r}: no embedding holds {unknown[0]} (loaded: {known}); give its file as --embedding, or correct it"
        )


def parse_prompts(tokenizer, marked: Sequence[str], clean: Sequence[str] | None) -> list[MarkedPrompt]:
    """Parse marked prompts, writing out learned words of several vectors; `clean` replaces their clean prompts. Raises
    InputError."""
    for text in marked:
        check_words(tokenizer, text)  # here in the whole, as parts of it are expanded
    write_out = partial(expand, tokenizer)
    prompts = [parse_marks(text, added_words(tokenizer), write_out) for text in marked]
    if clean is None:
        return prompts
    return [replace(prompt, clean=write_out(text)) for prompt, text in zip(prompts, clean, strict=True)]
