"""What can be grepped of the project's layout rules."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.environment import CPU_LEVELS

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.parent for path in ROOT.glob("modules/*/*/*/module.toml"))
PEERS = ("transformers", "peft", "trl", "diffusers", "d3rlpy", "stable_baselines3", "torchrl", "accelerate", "datasets")


# The rooms of finetune/, the lowest first: a file imports from its own room and from those before it.
ROOMS = (
    "errors", "environment", "ops", "runs", "optim", "kernels", "lm", "lm/io", "peft", "distributed", "data",
    "diffusion", "vision", "inference", "rl", "rl/envs", "rl/agents", "rl/tabular", "alignment", "memory", "chat",
    "interview", "drills", "merge", "export", "sample", "caption",
    "look", "serve", "terminal", "doctor", "smoke", "cli",
)  # fmt: skip
# Deep reinforcement learning and environments know nothing of tables.
APART = {"rl/envs": {"rl/agents", "rl/tabular"}, "rl/agents": {"rl/tabular"}}


def tracked() -> list[Path]:
    out = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if out.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in out.stdout.splitlines() if (ROOT / line).is_file()]


def sources() -> dict[str, list[str]]:
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines if line and not line.startswith("#")}


# Native calls that are no ops: a pass over a whole model, and the file that makes it.
WHOLE_PASSES = {"llama_step": "finetune/inference/native.py"}


def test_sources_txt_equals_the_disk():
    ops = set(sources())
    assert ops
    for op in ops:
        for path in (
            f"csrc/cpu/{op}.cpp",
            f"csrc/bindings/{op}.cpp",
            f"csrc/include/finetune/{op}.h",
            WHOLE_PASSES.get(op, f"finetune/ops/{op}.py"),
        ):
            assert (ROOT / path).exists(), f"sources.txt names {op} but {path} is missing"
    assert {p.stem for p in (ROOT / "csrc/cpu").glob("*.cpp")} - {"dispatch"} == ops
    assert {p.stem for p in (ROOT / "csrc/bindings").glob("*.cpp")} - {"library"} == ops
    assert {p.stem.removesuffix("_hopper") for p in (ROOT / "csrc/cuda").glob("*.cu")} <= ops
    assert {p.stem for p in (ROOT / "finetune/ops").glob("[a-z]*.py")} == ops - {*WHOLE_PASSES}
    assert all(set(levels) <= set(CPU_LEVELS) and "portable" in levels for levels in sources().values())


def imports(path: Path) -> set[Path]:
    """The files of the project that this one imports, also within functions; not those for type checkers alone."""

    def file(name: str) -> Path | None:
        stem = ROOT / name.replace(".", "/")
        return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None)

    def nodes(node: ast.AST):
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
                yield child
                yield from nodes(child)

    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            found |= {file(f"{node.module}.{alias.name}") or file(node.module) for alias in node.names}
    return {p for p in found if p and p.is_relative_to(ROOT / "finetune")} - {path}


def room(path: Path) -> str:
    """The longest name in ROOMS that the file lies under."""
    name = path.relative_to(ROOT / "finetune").with_suffix("").as_posix()
    return max((r for r in ROOMS if name == r or name.startswith(f"{r}/")), key=len)


PYTHON = {p: imports(p) for p in (ROOT / "finetune").rglob("*.py") if p.parent != ROOT / "finetune" or p.stem[0] != "_"}


def test_no_import_circle():
    try:
        graphlib.TopologicalSorter(PYTHON).prepare()
    except graphlib.CycleError as e:
        pytest.fail(" → ".join(str(p.relative_to(ROOT)) for p in e.args[1]))


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_arrows_between_rooms_go_down(path):
    here = room(path)
    for used in PYTHON[path]:
        there = room(used)
        assert ROOMS.index(there) <= ROOMS.index(here), f"{here} is below {there}"
        assert there not in APART.get(here, ()), f"{here} imports {there}"


def test_torch_headers_only_in_bindings():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and path.parent.name != "bindings":
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_no_file_over_700_lines():
    code = [p for p in tracked() if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".txt", ".toml", ".md")]
    assert code
    assert not [f"{p}: {n}" for p in code if (n := len(p.read_text().splitlines())) > 700 and "assets" not in p.parts]


def test_peers_are_never_the_implementation():
    pattern = re.compile(rf"^\s*(?:import|from)\s+({'|'.join(PEERS)})\b", re.MULTILINE)
    for path in [*ROOT.glob("finetune/**/*.py"), *ROOT.glob("modules/**/*.py")]:
        assert not (found := pattern.search(path.read_text())), f"{path} imports {found}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_every_module_has_its_files(module):
    for name in ("README.md", "module.toml", "interview.toml", "code/main.py"):
        assert (module / name).exists(), f"{module.name} lacks {name}"
    for name in ("data", "models", "checkpoints", "output"):
        assert (module / name).is_dir(), f"{module.name} lacks the folder {name}"
    assert not (module / "code/__init__.py").exists(), "it would shadow the standard library's `code`"
    others = "|".join(re.escape(m.name) for m in MODULES if m != module)
    for path in module.glob("code/*.py"):
        text = path.read_text()
        assert "sys.path" not in text, f"{path} edits sys.path"
        assert not others or not re.search(rf"modules[./].*\b({others})\b", text), f"{path} imports another module"


def test_readme_is_current():
    check = subprocess.run([sys.executable, "scripts/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_tree_in_the_readme_exists():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```text tree\n(.*?)```", text, re.DOTALL)
    assert tree, "the README has no tree"
    names = [line.split()[0] for line in tree[1].splitlines() if line.strip()]
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), f"the README's tree names {name}"


def test_one_torch_version_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count('"torch==2.13.0"') == 2, "pinned in build and run-time requirements"
    assert "torch==2.13.0" in (ROOT / "Makefile").read_text()
    import torch

    assert torch.__version__.startswith("2.13.0")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_a_default_run_has_three_to_six_results(module):
    """As the README shows it; equalities, z-scores and controls are checks."""
    block = re.search(r"<!-- measured -->(.*?)<!-- /measured -->", (module / "README.md").read_text(), re.DOTALL)
    if block is None:  # cuda's results are its ladders; a draft has none yet
        assert module.name == "cuda" or 'status = "draft"' in (module / "module.toml").read_text()
        return
    rows = re.findall(r"^\w+ +[-\d.]\S*( ±.*| .*)$", block[1].split("result  ")[1], re.MULTILINE)
    assert 3 <= len(rows) <= 6
