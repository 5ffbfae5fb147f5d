"""A hook of mkdocs: pages link to files of the repository outside docs/, which the site then has copies of."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
FOLDER = "source"  # of the copies, in the site


def on_files(files: Files, config: Any) -> Files:
    """Adds every file that a page links to; a page keeps its links, which `on_page_markdown` redirects."""
    for page in list(files.documentation_pages()):
        for path in _outside(Path(page.abs_src_path).read_text(encoding="utf-8"), page.src_uri):
            target = f"{FOLDER}/{path}.txt"
            if files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links at the copies. A link to a file that does not exist stays as it is, and fails a strict build."""

    def redirected(found: re.Match[str]) -> str:
        path = _path(found[2], page.file.src_uri)
        if not (ROOT / path).is_file() or path.startswith("docs/"):
            return found[0]
        return found[1] + posixpath.relpath(f"{FOLDER}/{path}.txt", posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(redirected, markdown)


def _path(link: str, page: str) -> str:
    """A link's target, from the root of the repository."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def _outside(markdown: str, page: str) -> set[str]:
    paths = {_path(found[2], page) for found in LINK.finditer(markdown)}
    return {path for path in paths if not path.startswith("docs/") and (ROOT / path).is_file()}
