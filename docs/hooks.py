"""Serves pages that live outside docs/, and makes links that leave docs/ work on the site.

Markdown in docs/ links other files by their real relative path, so that the links work on GitHub
too. On the site a link to a served page becomes that page, any other the file in the repository.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs import plugins
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SERVED = ("CHANGELOG.md", "CONTRIBUTING.md", "notebooks/*.ipynb", "tests/evidence/*")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)")
CODE = re.compile(r"`[^`\n]+`")


@plugins.event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    for path in sorted(path for pattern in SERVED for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in {".md", ".ipynb", ".png"}:
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    served = {file.src_uri for file in files}
    outside = page.file.src_dir == str(ROOT)
    place = page.file.src_uri if outside else f"docs/{page.file.src_uri}"

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        uri = target.removeprefix("docs/")
        if uri in served:
            return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        if os.path.exists(ROOT / target):
            return f"{config.repo_url.rstrip('/')}/blob/main/{target}"
        return match[1]

    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    return LINK.sub(rewritten, "\n".join(map(_without_escapes, markdown.split("\n"))))


def _without_escapes(line: str) -> str:
    """A table row with plain pipes in code: GitHub needs them escaped, Python-Markdown does not."""
    if not line.startswith("|"):
        return line
    return CODE.sub(lambda code: code[0].replace("\\|", "|"), line)
