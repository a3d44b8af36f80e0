"""The miniature's tokenizer: CLIP's byte-level byte-pair encoding, in which every known word is one token.

The merges are those of ordinary byte-pair training, run on the word list until every word is a single
symbol. Any other string still tokenises, down to single bytes, including the names of the held-out breeds,
which are not words here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MAX_LENGTH = 32
END_OF_WORD = "</w>"


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties: alphabetical), until every word is one symbol."""
    spelled = [[*word[:-1], word[-1] + END_OF_WORD] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelled for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(symbols):
        if tuple(symbols[index : index + 2]) == pair:
            merged.append(symbols[index] + symbols[index + 1])
            index += 2
        else:
            merged.append(symbols[index])
            index += 1
    return merged


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A CLIPTokenizer for which each of `words` is one token; `ValueError` if one is not."""
    words = list(words)
    merges = learn_merges(words)
    symbols = list(bytes_to_unicode().values())  # stand-ins for the 256 bytes
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *dict.fromkeys(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
    for word in words:
        if tokenizer.tokenize(word) != [word + END_OF_WORD]:
            raise ValueError(f"{word!r} became {tokenizer.tokenize(word)}, not one token: the merges conflict")
    return tokenizer


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and also `vocab.json` and `merges.txt`, which `save_pretrained` leaves out."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n", encoding="utf-8")
