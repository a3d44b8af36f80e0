"""The pages of a report: RESULTS.md and RESULTS.html show the same `Section`s, each through its own template in `templates/`."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from zoodip.files import write_atomically
from zoodip.records import table


@dataclass
class Table:
    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        return table(self.header, self.lines)


@dataclass
class Image:
    caption: str
    path: str  # relative to the report's folder


@dataclass
class Section:
    """Parts of a section, in this order; paragraphs and cells may contain `code` and **bold**."""

    title: str
    paragraphs: list[str]
    bullets: list[str] = field(default_factory=list)
    table: Table | None = None
    after: list[str] = field(default_factory=list)
    after_bullets: list[str] = field(default_factory=list)
    after_table: Table | None = None
    images: list[Image] = field(default_factory=list)
    sheets: list[Image] = field(default_factory=list)  # shown on request


def html_text(text: str) -> str:
    """HTML of `code` and **bold**; everything else is escaped."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)


def render(template: str, title: str, sections: list[Section]) -> bytes:
    """The report rendered with a template. Raises an error if the template names an undefined variable."""
    templates = FileSystemLoader(Path(__file__).resolve().parent / "templates")
    environment = Environment(loader=templates, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              autoescape=template.endswith(".html"), keep_trailing_newline=True)  # fmt: skip
    environment.filters |= dict(text=html_text, link=lambda text: re.sub(r"([\[\]])", r"\\\1", text),
                                verdict=lambda text: re.sub("[^a-z]", "-", text))  # fmt: skip
    text = environment.get_template(template).render(title=title, sections=sections)
    return (re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n").encode()


def write_pages(title: str, sections: list[Section], folder: Path) -> None:
    for template, name in (("results.md", "RESULTS.md"), ("results.html", "RESULTS.html")):
        write_atomically(folder / name, render(template, title, sections))


def shortened(commit: str) -> str:
    """The first seven digits, and whether the working tree differed from the commit."""
    digits, _, dirty = commit.partition("-")
    return digits[:7] + f"-{dirty}" * bool(dirty)


def in_words(commits: list[str]) -> str:
    """Commits as they stand in a sentence."""
    return f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
