"""The prompts with which tokens are judged: from DreamBooth's file, or from a list with one prompt per line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from zoodip.errors import InputError

LIVE_CLASSES = {"cat", "dog"}  # the nine live subjects of DreamBooth's thirty


@dataclass(frozen=True)
class DreamBoothPrompts:
    """The content of prompts_and_classes.txt; each prompt has one {} for the token or class word."""

    classes: dict[str, str]  # subject -> class word
    object_prompts: tuple[str, ...]
    live_prompts: tuple[str, ...]

    def of(self, subject: str) -> tuple[str, list[str]]:
        """Class word and prompts of a subject. Raises InputError for a subject that the file does not list."""
        if subject not in self.classes:
            raise InputError(
                f"--prompts: {subject!r} is not a subject of that file; name the folder of references as one of "
                f"{', '.join(self.classes)}, or give a plain list of prompts and --class_word"
            )
        word = self.classes[subject]
        return word, list(self.live_prompts if word in LIVE_CLASSES else self.object_prompts)


def parse_dreambooth_prompts(text: str) -> DreamBoothPrompts:
    """Read DreamBooth's prompts_and_classes.txt by pattern matching: it is Python, which is never executed. Raises InputError."""
    classes = dict(re.findall(r"^(\w+),([\w ]+?)\s*$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    lists = []
    for heading in ("Object Prompts", "Live Subject Prompts"):
        block = re.search(rf"^{heading}\s+prompt_list\s*=\s*\[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        quoted = re.findall(r"'([^'\n]*)'\.format\(unique_token, class_token\)", block[1]) if block else []
        if not quoted or not all(prompt.count("{0} {1}") == 1 and prompt.count("{") == 2 for prompt in quoted):
            raise InputError(
                f"--prompts: under {heading!r} there is no list of prompts with {{0}} {{1}}; use DreamBooth's "
                "prompts_and_classes.txt as it is, or a plain list"
            )
        lists.append(tuple(prompt.replace("{0} {1}", "{}") for prompt in quoted))
    if not classes:
        raise InputError("--prompts: there is no line subject_name,class; use DreamBooth's prompts_and_classes.txt as it is")
    return DreamBoothPrompts(classes, *lists)


def read_text(path: Path) -> str:
    """Raises InputError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--prompts {path}: cannot be read ({error}); give a text file (the paper's: see dataset/README.md)"
        ) from error


def read_prompts(path: Path, subject: str, class_word: str | None) -> tuple[str, list[str]]:
    """Class word and prompts of a subject, from DreamBooth's file or a list with one prompt per line. Raises InputError."""
    text = read_text(path)
    if "prompt_list" in text:
        word, prompts = parse_dreambooth_prompts(text).of(subject)
        return class_word or word, prompts
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [prompt for prompt in prompts if prompt.count("{}") != 1]
    if wrong or not prompts:
        raise InputError(f"--prompts {path}: every line must hold one {{}} for the token, got {(wrong or [''])[0]!r}")
    if class_word is None:
        raise InputError(f"--class_word is needed with a plain list of prompts ({path}), for example --class_word dog")
    return class_word, prompts
