"""The learning path's short commands: `python run.py --list`, `python run.py --module sft --toy [--key value …]`."""

import sys

from finetune.cli import main

USAGE = "usage: python run.py --list | --module NAME [--toy] [--key value …]"


def translate(argv: list[str]) -> list[str]:
    """The same as arguments of `python -m finetune`."""
    rest = list(argv)
    if "--list" in rest:
        rest.remove("--list")
        return ["list", *rest]
    for i, word in enumerate(rest):
        if word == "--module" and i + 1 < len(rest):
            return ["run", rest[i + 1], *rest[:i], *rest[i + 2 :]]
        if word.startswith("--module="):
            return ["run", word.removeprefix("--module="), *rest[:i], *rest[i + 1 :]]
    print(USAGE, file=sys.stdout if {"-h", "--help"} & {*rest} else sys.stderr)
    sys.exit(0 if {"-h", "--help"} & {*rest} else 2)


if __name__ == "__main__":
    sys.exit(main(translate(sys.argv[1:])))
