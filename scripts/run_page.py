"""`python scripts/run_page.py learning/attention.md`: runs a page's Python snippets, one after the other."""

import re
import sys
from pathlib import Path
from typing import Any


def snippets(page: Path) -> list[tuple[int, str]]:
    """(line, code) of each ```python block; the code is on the same line as in the page, for tracebacks."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    lines = [(text.count("\n", 0, m.start(1)), m[1]) for m in found]
    return [(line, "\n" * line + code) for line, code in lines]


def run(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    found = snippets(page)
    for line, code in found:
        print(f"line {line + 1}")
        exec(compile(code, str(page), "exec"), names)
    print(f"{page}: all {len(found)} snippets hold")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    if not Path(sys.argv[1]).is_file():
        print(f"error: there is no {sys.argv[1]}", file=sys.stderr)
        sys.exit(2)
    run(Path(sys.argv[1]))
