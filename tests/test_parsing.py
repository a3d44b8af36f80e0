"""Marks that a parser inserts: the conversion of sentences as spaCy 3.8.18 parses them, and spaCy itself if it is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from zoodip import parsing
from zoodip.errors import InputError
from zoodip.marks import parse_marks
from zoodip.parsing import MODEL, Word, mark_prompt, mark_words, replace_learned

# (marked prompt; for each of its words: part of speech, relation, head), recorded from en_core_web_sm 3.8.0
PARSED = {
    "two subjects with what they wear, then a place": (
        "a [cat* wearing sunglasses] and a [dog* wearing a red hat] on the grass", """
        DET det 1, NOUN ROOT 1, VERB acl 1, NOUN dobj 2, CCONJ cc 3, DET det 6, NOUN conj 3, VERB acl 6, DET det 10, ADJ amod 10,
        NOUN dobj 7, ADP prep 10, DET det 13, NOUN pobj 11"""),
    "a learned word; the second subject hangs on the first one's hat": (
        "a [<sks>* wearing a red hat] and a [blue critter* with yellow spots] in the snow", """
        DET det 1, NOUN ROOT 1, VERB acl 1, DET det 5, ADJ amod 5, NOUN dobj 2, CCONJ cc 5, DET det 9, ADJ amod 9, NOUN conj 5,
        ADP prep 9, ADJ amod 12, NOUN pobj 10, ADP prep 12, DET det 15, NOUN pobj 13"""),
    "what a photo is of": ("a photo of a [red dog*], a [white cat*] and an [orange fox*] in the forest", """
        DET det 1, NOUN ROOT 1, ADP prep 1, DET det 5, ADJ amod 5, NOUN pobj 2, PUNCT punct 5, DET det 9, ADJ amod 9,
        NOUN appos 5, CCONJ cc 9, DET det 13, ADJ amod 13, NOUN conj 9, ADP prep 13, DET det 16, NOUN pobj 14"""),
    "several things each": (
        "the [dog* wearing a red hat and pink glasses] and a [blue cat* with yellow spots and green eyes] on the beach", """
        DET det 1, NOUN ROOT 1, VERB acl 1, DET det 5, ADJ amod 5, NOUN dobj 2, CCONJ cc 5, ADJ amod 8, NOUN conj 5, CCONJ cc 8,
        DET det 12, ADJ amod 12, NOUN conj 8, ADP prep 12, ADJ amod 15, NOUN pobj 13, CCONJ cc 15, ADJ amod 18, NOUN conj 15,
        ADP prep 15, DET det 21, NOUN pobj 19"""),
    "the verb's subject": ("a [cat*] sits beside a brown dog", """
        DET det 1, NOUN nsubj 2, VERB ROOT 2, ADP prep 2, DET det 6, ADJ amod 6, NOUN pobj 3"""),
    "a tagger's mistake": ("a [red chubby dog*] in a yellow shirt and a [blue bench*]", """
        DET det 3, ADJ amod 2, PROPN compound 3, NOUN ROOT 3, ADP prep 3, DET det 7, ADJ amod 7, NOUN pobj 4, CCONJ cc 7,
        DET det 11, ADJ amod 11, NOUN conj 3"""),
    "no subject": ("in the snow", "ADP ROOT 0, DET det 2, NOUN pobj 0"),
}  # fmt: skip


def sentence(marked: str, parse: str) -> list[Word]:
    """The words of a prompt; a comma counts as a word."""
    plain = marked.translate({ord(mark): None for mark in "[]*"})
    texts = plain.replace(",", " ,").split()
    relations = [entry.split() for entry in parse.split(",")]
    words, position = [], 0
    for text, (pos, dep, head) in zip(texts, relations, strict=True):
        position = plain.index(text, position) + len(text)
        words.append(Word(text, " " if plain[position : position + 1] == " " else "", pos, dep, int(head)))
    return words


@pytest.mark.parametrize("case", PARSED)
def test_marks_of_a_parsed_sentence(case):
    marked, parse = PARSED[case]
    assert mark_words(sentence(marked, parse)) == marked
    parse_marks(marked)  # and the marks are valid


def test_a_learned_word_is_parsed_as_a_noun_that_every_parser_knows():
    plain, learned = replace_learned("a <sks> and a <cat-toy> and <sks>", ["<sks>", "<cat-toy>"])
    assert plain == "a dog and a dog and dog" and learned == {2: "<sks>", 12: "<cat-toy>", 20: "<sks>"}
    assert replace_learned("a <sks>", []) == ("a <sks>", {})


def test_without_spacy_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)  # as if it were not installed
    parsing.load_spacy.cache_clear()
    assert mark_prompt("a [red cat*]") == "a [red cat*]"  # has marks: nothing is parsed
    with pytest.raises(InputError, match=rf'pip install -e "\.\[parse\]" && python -m spacy download {MODEL}') as error:
        mark_prompt("a red cat")
    assert "\n" not in str(error.value)


if find_spec("spacy") and find_spec(MODEL):  # optional, and in no requirements: without it there is no such test

    @pytest.mark.parametrize("case", PARSED)
    def test_spacy_itself(case):
        parsing.load_spacy.cache_clear()
        marked, parse = PARSED[case]
        plain = marked.translate({ord(mark): None for mark in "[]*"})
        assert parsing.parse_with_spacy(plain, ["<sks>"]) == sentence(marked, parse)
        if case != "no subject":
            assert mark_prompt(plain, ["<sks>"]) == marked
