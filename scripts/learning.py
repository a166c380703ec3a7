"""Writes the pages of learning/ from learning/path.toml, the modules and the memory formulas; --check only compares."""

import sys

from finetune.interview import cheat_sheet, path


def main() -> int:
    stale = {
        name: text
        for name, text in (path.pages() | cheat_sheet.pages()).items()
        if not (path.FOLDER / name).exists() or (path.FOLDER / name).read_text(encoding="utf-8") != text
    }
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"learning/{name} is not current: python scripts/learning.py")
        return int(bool(stale))
    for name, text in stale.items():
        (path.FOLDER / name).write_text(text, encoding="utf-8")
        print(f"learning/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
