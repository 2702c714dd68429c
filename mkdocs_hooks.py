"""Puts pages into the site that lie outside of docs/, and makes links that are right in the repository right there.

README.md becomes the first page. Links are written for readers of the repository, so a page in docs/ has links such as
`../README.md#citation` or `../benchmark/results/speed/speed.md`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parent
PAGES = {"README.md": "index.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    results = [path for path in (ROOT / "benchmark" / "results").rglob("*") if path.suffix in (".md", ".png")]
    for path in [*(ROOT / name for name in PAGES), *results, ROOT / "examples" / "tour.ipynb"]:
        name = path.relative_to(ROOT).as_posix()
        file = File(PAGES.get(name, name), None, config.site_dir, config.use_directory_urls)
        file.abs_src_path = str(path)
        files.append(file)
    return files


def repository_path(path: str) -> str:
    """Where a page of the site lies in the repository."""
    outside = {page: name for name, page in PAGES.items()}
    return outside.get(path, path if path.startswith("benchmark/") else f"docs/{path}")


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site."""
    return PAGES.get(path, path.removeprefix("docs/"))


def on_page_markdown(markdown, page, config, files):
    folder = posixpath.dirname(repository_path(page.file.src_uri))

    def replaced(match: re.Match) -> str:
        target = site_path(posixpath.normpath(posixpath.join(folder, match[2])))
        here = posixpath.dirname(page.file.src_uri) or "."
        return match[1] + posixpath.relpath(target, here) + match[3]

    return LINK.sub(replaced, markdown)


def on_page_content(html, page, config, files):
    """Docstrings write types as transformers does, (`str`, *optional*); mkdocstrings shows them unrendered."""
    if page.file.src_uri != "api.md":
        return html
    return re.sub(r"\(<code>[^<]*</code>", lambda match: match[0].replace("`", "").replace("*", ""), html)
