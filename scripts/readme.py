"""Renews the generated parts of README.md (the table of modules); `--check` only says whether they are current."""

import sys
from pathlib import Path

from finetune.registry import modules

README = Path(__file__).parents[1] / "README.md"


def table() -> str:
    rows = ["| module | group | what you do in it |", "|---|---|---|"]
    rows += [f"| [{m.name}](modules/{m.group}/{m.name}) | {m.group} | {m.summary} |" for m in modules()]
    return "\n".join(rows)


def main() -> int:
    text = README.read_text()
    before, rest = text.split("<!-- modules -->\n", 1)
    after = rest.split("<!-- /modules -->", 1)[1]
    new = f"{before}<!-- modules -->\n{table()}\n<!-- /modules -->{after}"
    if "--check" in sys.argv:
        if new != text:
            print("README.md is not current: python scripts/readme.py")
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
