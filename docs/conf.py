"""The READMEs and learning pages as a static site: `make docs` builds it into build/docs and checks every link."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "finetune"
author = "the finetune authors"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/index.md", "*.md", "learning/*.md", "modules/**/*.md", "csrc/emulator/README.md"]
exclude_patterns = ["build", ".venv*", ".github", "modules/*/*/*/output"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "finetune"
suppress_warnings = ["myst.header", "toc.not_included"]  # a README may begin with a picture


def links(app, name: str, text: list[str]) -> None:
    """Turns repository links into site links: a folder becomes its README or plain text, a line of a file the file."""
    here = (ROOT / name).parent

    def target(found: re.Match) -> str:
        label, path, anchor = found.groups()
        if (here / path).is_dir():
            readme = here / path / "README.md"
            return f"[{label}]({path.rstrip('/')}/README.md)" if readme.is_file() else label
        line = anchor and re.fullmatch(r"#L\d+(-L\d+)?", anchor)
        return f"[{label}]({path})" if line and (here / path).is_file() else found[0]

    text[0] = re.sub(r"(?<!!)\[([^\]\n]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)", target, text[0])


def setup(app) -> None:
    app.connect("source-read", links)
