"""The ladder of the cuda module: every level right at every size, each idea worth what its page says, faults caught."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from finetune import cli
from finetune.errors import UserError
from finetune.kernels import alone
from finetune.kernels.cuda_toolkit import tool
from finetune.kernels.emulator import ROOT
from finetune.runs import registry
from finetune.runs.run import execute

INFO = registry.find("cuda")
cuda = registry.load(INFO)
level_code = sys.modules["finetune_modules.cuda.level"]
LEVELS = [pytest.param(level, id=f"{level.topic}-{level.number}") for level in cuda.levels()]
each_level = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture(scope="module")
def climbed():
    return {topic: cuda.climb(topic) for topic in cuda.TOPICS}


def named(climbed, topic):
    return {count.name: count for count in climbed[topic]}


# --- Right


@each_level
def test_every_size(level):
    kernel = level_code.load(level)
    for sizes in cuda.ODD[level.topic]:
        problem = cuda.TOPICS[level.topic](*sizes)
        problem.check(problem.run(kernel))


@pytest.mark.slow
@each_level
def test_every_order_and_both_kinds_of_copies(level):
    kernel = level_code.load(level)
    for order in (0, 1, 2):
        for eager in (False, True):
            kernel.controls.set_order(order)
            kernel.controls.set_eager(eager)
            try:
                for sizes in cuda.ODD[level.topic]:
                    problem = cuda.TOPICS[level.topic](*sizes, seed=order)
                    problem.check(problem.run(kernel))
            finally:
                kernel.controls.set_order(0)
                kernel.controls.set_eager(False)


@pytest.mark.parametrize("name", ["online", "warp_shuffles", "vectorized", "registers"])
def test_softmax_of_large_logits(name):
    level = next(level for level in cuda.levels("softmax") if level.name == name)
    problem = cuda.TOPICS["softmax"](5, 67)
    problem.inputs[0].uniform_(-1e4, 1e4, generator=torch.Generator().manual_seed(0))
    problem.check(problem.run(level_code.load(level)))


def test_the_check_can_fail():
    problem = cuda.TOPICS["transpose"](5, 7)
    right = problem.exact().float()
    problem.check(right)
    right[3, 2] += 1e-4
    with pytest.raises(ValueError, match="away from float64"):
        problem.check(right)
    right[3, 2] = float("nan")
    with pytest.raises(ValueError, match="inf away"):
        problem.check(right)


@each_level
def test_faults_are_caught(level):
    """Each deliberate fault of a level, switched on, is rejected at one of the sizes: by the emulator or by numbers."""
    kernel = level_code.load(level)
    assert level.faults
    for fault in level.faults:
        caught, reached = False, False
        for sizes in reversed(cuda.ODD[level.topic]):
            problem = cuda.TOPICS[level.topic](*sizes)
            kernel.controls.set_bug(fault)
            try:
                problem.check(problem.run(kernel))
            except (alone.Fault, ValueError):
                caught = True
                break
            finally:
                reached |= kernel.controls.bug_reached()
                kernel.controls.set_bug("")
        assert reached, f"no size comes by {fault}"
        assert caught, f"{fault} survives"


def test_a_fault_names_the_line_of_the_kernel():
    level = cuda.levels("transpose")[1]
    kernel = level_code.load(level)
    kernel.controls.set_bug("transpose.no_barrier")
    try:
        with pytest.raises(alone.Fault, match=r"level_02_shared_tile\.cu:\d+.*(race|uninitialized|undefined)"):
            cuda.TOPICS["transpose"](33, 40).run(kernel)
    finally:
        kernel.controls.set_bug("")


# --- What each idea is worth


def test_transpose(climbed):
    c = named(climbed, "transpose")
    assert c["naive"].sectors >= 4 * c["shared_tile"].sectors
    assert c["shared_tile"].excess == 31 * (c["shared_tile"].ideal // 2), "every read of a column takes 32 rounds"
    for name in ("padded", "swizzled"):
        assert c[name].excess == 0
        assert c[name].bytes == c[name].least_bytes


def test_reduction(climbed):
    c = named(climbed, "reduction")
    assert c["atomics"].atomics == 8 * c["shared_tree"].atomics, "one for a block of eight warps"
    assert c["shared_tree"].excess > 0
    assert c["sequential"].excess == 0
    assert c["shuffles"].barriers * 8 < c["sequential"].barriers
    assert c["grid_stride"].atomics == 0
    assert c["grid_stride"].requests * 4 <= c["shuffles"].requests


def test_softmax(climbed):
    c = named(climbed, "softmax")
    assert c["three_passes"].sectors * 3 == c["online"].sectors * 4, "three reads and a write, then two and a write"
    assert c["online"].sectors == 8 * c["warp_shuffles"].sectors
    assert c["vectorized"].requests * 4 == c["warp_shuffles"].requests
    assert c["registers"].bytes == c["registers"].least_bytes


def test_matmul(climbed):
    c = named(climbed, "matmul")
    assert c["naive"].sectors > 5 * c["coalesced"].sectors
    assert c["coalesced"].sectors > 10 * c["shared_tile"].sectors
    assert c["vectorized"].sectors == c["shared_tile"].sectors
    assert c["vectorized"].requests < c["shared_tile"].requests / 3
    assert c["register_tile"].wavefronts < c["vectorized"].wavefronts / 5
    assert c["cp_async"].sectors == c["register_tile"].sectors
    assert c["cp_async"].cp_async > 0
    assert c["mma"].wavefronts < c["cp_async"].wavefronts / 8
    assert c["mma"].mma * 2 * 16 * 8 * 16 == c["mma"].flops
    assert c["mma"].sectors * 100 < c["naive"].sectors
    assert all(c[name].excess == 0 for name in ("shared_tile", "register_tile", "cp_async", "mma"))


def test_attention(climbed):
    c = named(climbed, "attention")
    assert c["materialized"].sectors > 10 * c["online_softmax"].sectors
    assert c["online_softmax"].sectors > 3 * c["flash_fp32"].sectors
    assert c["flash_fp32"].sectors > 5 * c["flash_mma"].sectors
    assert c["flash_fp32"].wavefronts > 20 * c["flash_mma"].wavefronts
    assert c["flash_mma"].mma * 2 * 16 * 8 * 16 == c["flash_mma"].flops
    assert c["cp_async"].sectors == c["flash_mma"].sectors
    assert c["cp_async"].cp_async > 0
    assert c["split_kv"].blocks == 2 * c["cp_async"].blocks, "128 keys are two splits"
    assert c["split_kv"].mma == c["flash_mma"].mma
    assert c["hopper"].sectors == c["flash_mma"].sectors
    assert c["hopper"].ldmatrix == c["hopper"].mma == 0
    assert c["hopper"].wgmma * 2 * 64 * 64 * 16 == c["hopper"].flops
    assert all(count.excess == 0 for count in c.values())


def test_splits_cost_little_in_decoding():
    """One query on 512 keys: eight times the blocks, and hardly more traffic."""
    problem = cuda.TOPICS["attention"](2, 1, 512, 64)
    split, whole = (cuda.measure(level, problem) for level in (cuda.levels("attention")[i] for i in (5, 4)))
    assert split.blocks == 8 * whole.blocks
    assert split.sectors < 1.1 * whole.sectors


def test_without_the_swizzle_ldmatrix_conflicts(climbed):
    level = cuda.levels("matmul")[-1]
    kernel = level_code.load(level)
    kernel.controls.set_counting(True)
    kernel.controls.set_bug("matmul.no_swizzle_on_read")
    try:
        cuda.TOPICS["matmul"](*cuda.SIZES["small"]["matmul"]).run(kernel)
        rows = [row for row in kernel.controls.statistics() if row["kind"] == "ldmatrix"]
    finally:
        kernel.controls.set_bug("")
        kernel.controls.set_counting(False)
    assert max(row["units"] / row["ideal"] for row in rows) == 8
    assert named(climbed, "matmul")["mma"].excess == 0


def test_lines_add_up(climbed):
    level = cuda.levels("transpose")[1]
    rows = cuda.lines(level, cuda.TOPICS["transpose"](*cuda.SIZES["small"]["transpose"]))
    count = named(climbed, "transpose")["shared_tile"]
    assert sum(row["units"] for row in rows if row["kind"].startswith("global")) == count.sectors
    assert sum(row["units"] for row in rows if row["kind"].startswith("shared")) == count.wavefronts
    assert all("tile" in row["source"] for row in rows if row["kind"].startswith("shared"))


# --- The page, the run


def test_the_readme_shows_what_is_measured(climbed):
    text = (INFO.folder / "README.md").read_text(encoding="utf-8")
    for topic, counts in climbed.items():
        assert cuda.page_table(topic, counts) in text, f"python -m finetune kernels levels {topic} --markdown"


@each_level
def test_levels_are_short_and_alone(level):
    text = level.path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert set(re.findall(r'#include "(.+?)"', text)) <= {
        f"device/{name}.cuh" for name in ("launch", "ptx", "ptx_hopper", "vector")
    }
    assert text.startswith("// ")
    assert [line.number for line in cuda.levels(level.topic)] == list(range(1, len(cuda.levels(level.topic)) + 1))


def test_toy_run(tmp_path):
    config = cuda.Config(topics="transpose,softmax", size="small", threads=1)
    summary = execute(INFO, config, tmp_path / "run", toy=True)
    assert summary["passed"]
    assert summary["metrics"]["transpose_padded_conflicts"] == 0
    assert summary["baseline"]["transpose_padded_conflicts"] > 0
    tables = json.loads((tmp_path / "run/samples.json").read_text())
    assert [len(table["rows"]) for table in tables] == [4, 5]
    for picture in ("roofline.png", "levels.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 20_000


def test_nothing_climbed_is_nothing_gained(tmp_path):
    summary = execute(INFO, cuda.Config(topics="transpose", size="small", steps=0, threads=1), tmp_path / "run")
    assert summary["passed"] is False
    assert summary["checks"]["transpose_fewer_sectors"]["value"] == 1


@pytest.mark.parametrize(
    ("change", "message"), [({"topics": "matmull"}, "--topics: 'matmull'"), ({"size": "huge"}, "--size 'huge'")]
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        cuda.Config(**change)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb")
def test_a_debugger_stops_in_a_kernel():
    """As the README shows it."""
    commands = [
        "set breakpoint pending on", "set print thread-events off", "tbreak level_02_shared_tile.cu:22", "run",
        "print emulator::self->index", "print tile[0][0]",
    ]  # fmt: skip
    words = [word for command in commands for word in ("-ex", command)]
    line = [sys.executable, "-m", "finetune", "kernels", "levels", "transpose", "--level", "2", "--debug"]
    done = subprocess.run(["gdb", "-q", "-batch", *words, "--args", *line], cwd=ROOT, capture_output=True, text=True)
    first = cuda.TOPICS["transpose"](*cuda.SIZES["small"]["transpose"]).inputs[0][0, 0].item()
    assert "level_02_shared_tile.cu:22" in done.stdout
    assert "$1 = {x = 31, y = 7, z = 0}" in done.stdout
    printed = re.search(r"\$2 = (\S+)", done.stdout)
    assert printed
    assert float(printed[1]) == pytest.approx(first)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["matmull"], "no topic 'matmull'.*matmul"),
        (["matmul", "--level", "9"], "--level 9: name a topic, and a level from 1"),
        (["--debug"], "--debug needs a topic"),
    ],
)
def test_bad_words_on_the_command_line(words, message, capsys):
    assert cli.main(["kernels", "levels", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_line_shows_levels(capsys, climbed):
    assert cli.main(["kernels", "levels", "transpose", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["transpose"]
    assert [row["sectors"] for row in rows] == [count.sectors for count in climbed["transpose"]]
    assert cli.main(["kernels", "levels", "transpose", "--level", "2", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert any(row["units"] == 32 * row["ideal"] for row in lines if row["ideal"])


@pytest.mark.slow
@pytest.mark.skipif(tool("nvcc") is None, reason="needs nvcc: pip install -e '.[test]'")
@each_level
def test_nvcc_compiles_it_without_spills(level):
    command = [
        tool("nvcc"),
        "-std=c++20",
        "-gencode=arch=compute_90a,code=sm_90a" if level.name == "hopper" else "-arch=sm_80",
        "-Icsrc/include",
        "-Icsrc/cuda",
        "-Xptxas",
        "-v",
        "-c",
        level.path,
    ]
    done = subprocess.run([*map(str, command), "-o", "/dev/null"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert spills
    assert set(spills) == {"0"}, done.stderr
