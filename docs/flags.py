"""The flag tables in docs/, generated from the parsers: `python -m docs.flags` rewrites them.

A table follows a line `<!-- flags of MODULE: GROUP -->` and lists one group of the parser that MODULE builds.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

MARK = re.compile(r"(<!-- flags of ([\w.]+): (.+) -->\n)(?:\n|\|.*\n)*")
REQUIRED = {
    "train_data_dir",
    "initializer_token",
    "class_word",
}  # by a later check, not by the parser: --save_quantized alone needs none of them


def group_actions(module: str, title: str) -> list[argparse.Action]:
    """The flags of one group of a script's parser. Raises LookupError if there is no such group."""
    groups = {group.title: group for group in importlib.import_module(module).build_parser()._action_groups}
    return groups[title]._group_actions


def table(actions: list[argparse.Action]) -> str:
    """A Markdown table: flag and choices, default, help."""
    lines = ["| flag | default | |", "|---|---|---|"]
    for action in actions:
        choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
        default = "" if action.default is None else "off" if action.default is False else f"`{action.default}`"
        default = "required" if action.dest in REQUIRED else default
        lines.append(f"| `{action.option_strings[0]}`{choices} | {default} | {action.help} |")
    return "\n".join(lines) + "\n"


def fill(text: str) -> str:
    """The page with its tables regenerated."""
    page = MARK.sub(lambda match: f"{match[1]}\n{table(group_actions(match[2], match[3]))}\n", text)
    return page.rstrip("\n") + "\n"


if __name__ == "__main__":
    for page in sorted(Path(__file__).parent.glob("*.md")):
        page.write_text(fill(page.read_text()))
