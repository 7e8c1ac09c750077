"""What documentation holds that can be tried: fenced blocks, with the marks that say how, commands and links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])
"""All documentation of the repository."""

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>run[^\n]*?) -->\n)?"
    r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int
    language: str
    text: str
    title: str | None
    """The file that the block is, below the folder that the tutorial runs in."""
    mark: str | None
    """`run`, and after a colon how: `checkout` (in the repository), `prints "TEXT"`, `until "TEXT"` (it stays running
    and the next block is for when it has said so), `where mmllm k8s is`."""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(line, found["language"], found["text"], found["title"], found["mark"])


def commands(page: Path) -> Iterator[str]:
    """Shell command lines of a page's blocks, continued lines joined, and what stands in the prose as inline code."""
    for block in blocks(page):
        if block.title is None and block.language in ("", "bash", "sh", "console"):
            yield from block.text.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))


def links(page: Path) -> Iterator[str]:
    """Targets of Markdown links and images outside of code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
