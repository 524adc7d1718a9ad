"""Build hook of mkdocs: pages from notebooks and from files outside docs/, and links between all.

README.md and its like stay where readers of a repository look for them, with links that work there.
In the site they are pages, and links to files that are not pages become plain text. Notebooks are
pages with the outputs that are stored in them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

_ROOT = Path(__file__).resolve().parents[1]
_TUTORIALS = "tutorials"  # folder of the notebooks in docs/, and of their pages in the site
# Files of the repository that are pages, by their names in the site.
OUTSIDE = {
    "index.md": "README.md",
    "launching.md": "launch/README.md",
    "monitoring-files.md": "monitoring/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
_PAGES = {source: page for page, source in OUTSIDE.items()}
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
_LINK = re.compile(r"(?<!!)\[((?:!\[[^\]]*\]\([^)\s]+\)|[^\]])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that come from notebooks and from outside docs/.

    Args:
        files: Files of docs/.
        config: Of the site.

    Returns:
        All files.
    """
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(_ROOT / source).read_text()))
    for path in sorted((_ROOT / "docs" / _TUTORIALS).glob("*.ipynb")):
        text, found = MarkdownExporter().from_filename(str(path), {"unique_key": path.stem})
        files.append(File.generated(config, f"{_TUTORIALS}/{path.stem}.md", content=text))
        for name, picture in found["outputs"].items():
            files.append(File.generated(config, f"{_TUTORIALS}/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site.

    Args:
        markdown: Of the page, with links as they are in the repository.
        page: Which page.
        config: Of the site.
        files: Files of the site.

    Returns:
        The Markdown of the page in the site.
    """
    name = page.file.src_uri
    folder = posixpath.dirname(OUTSIDE.get(name, f"docs/{name}"))

    def linked(match: re.Match[str], image: str = "") -> str:
        text, target = match.groups()
        if "://" in target or target.startswith(("#", "mailto:")):
            return match.group()
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        site = _PAGES.get(path) or path.removeprefix("docs/").replace(".ipynb", ".md")
        if path not in _PAGES and not (path.startswith("docs/") and files.get_file_from_path(site)):
            if (_ROOT / path).exists():
                return text
            return match.group()  # strict mode reports it
        site = posixpath.relpath(site, posixpath.dirname(name) or ".")
        return f"{image}[{text}]({site}{'#' + anchor if anchor else ''})"

    markdown = _IMAGE.sub(lambda match: linked(match, "!"), markdown)
    return _LINK.sub(linked, markdown)
