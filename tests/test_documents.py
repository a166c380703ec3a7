"""Every command that a document prints: that it exists, and takes the words it is given. Nothing is trained."""

import re
import shlex
from pathlib import Path

import pytest

from finetune import config, registry
from finetune.cli import app
from finetune.memory import cli as memory

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("learning/*.md"), *ROOT.glob("modules/*/*/*/README.md")])


def commands(page):
    """The lines of a page's shell blocks that begin with a command of ours."""
    for body in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["python", "-m", "finetune"]:
                yield words[3:]


CASES = [pytest.param(words, id=" ".join(words)) for page in PAGES for words in commands(page)]


def test_documents_print_commands():
    assert len(CASES) > 20


@pytest.mark.parametrize("words", CASES)
def test_a_printed_command_is_understood(words):
    context = app.make_context("finetune", list(words))
    name, command, rest = app.resolve_command(context, [*context._protected_args, *context.args])
    if name == "kernels":
        group = command.make_context(name, rest, parent=context)
        name, command, rest = command.resolve_command(group, [*group._protected_args, *group.args])
        context = group
    inner = command.make_context(name, rest, parent=context)  # unknown options and missing arguments raise
    given = inner.params
    if given.get("module"):
        registry.find(given["module"])
    if name == "run" and not given["help_"]:
        config.given(registry.load(registry.find(given["module"])).Config, list(given["rest"]))
    if name == "memory":
        model, *options = given["rest"]
        memory.plan(model, [word for word in options if word not in memory.MODES])
    if name == "compare":
        for module in given["modules"]:
            registry.find(module)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
