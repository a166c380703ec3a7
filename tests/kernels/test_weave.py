"""Deliberate faults as they are written down and woven into a copy of a source."""

import shutil
import subprocess
import sys

import pytest

from finetune.kernels import emulator, faults, weave

SOURCE = """\
__global__ void add(float* x, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  __syncthreads();  // first
  x[i] = x[i] + 1.0f;
  __syncthreads();
  if (i) wait(n); else x[0] = 2.0f;
  __syncthreads();
}
"""


def woven(tmp_path, entries, choose=weave.at_run_time):
    (tmp_path / "add.cu").write_text(SOURCE)
    (tmp_path / "add.faults").write_text(entries)
    return weave.weave(SOURCE, weave.edits_of(tmp_path).get(tmp_path / "add.cu", ()), choose)


def entry(**words):
    words = {"name": "add.f", "wrong": "everything", **words}
    return "[[fault]]\n" + "".join(f"{key} = {value!r}\n" for key, value in words.items())


def test_an_expression_and_a_statement(tmp_path):
    text = woven(
        tmp_path,
        entry(name="add.bound", line="i >= n", new="i > n") + entry(name="add.race", line="__syncthreads();  // first",
                                                                    old="__syncthreads();", new=""),
    )  # fmt: skip
    lines = text.splitlines()
    assert lines[2] == '  if ((emulator::bug("add.bound") ? i > n : i >= n)) return;'
    assert lines[3] == '  { if (emulator::bug("add.race")) {  } else { __syncthreads(); } }  // first'
    assert [line for i, line in enumerate(lines) if i not in (2, 3)] == [
        line for i, line in enumerate(SOURCE.splitlines()) if i not in (2, 3)
    ]


def test_a_statement_before_else(tmp_path):
    text = woven(tmp_path, entry(line="wait(n);", new=""))
    assert '  if (i) { if (emulator::bug("add.f")) {  } else { wait(n); } } else x[0] = 2.0f;' in text


def test_planted_alone(tmp_path):
    entries = entry(line="i >= n", new="i > n") + entry(line="wait(n);", new="")
    assert woven(tmp_path, entries, weave.planted).splitlines()[2::4] == [
        "  if ((i > n)) return;",
        "  if (i) ; else x[0] = 2.0f;",
    ]


def test_edits_within_each_other(tmp_path):
    text = woven(
        tmp_path,
        entry(name="add.no_wait", line="wait(n);", new="")
        + entry(name="add.more", line="wait(n);", old="n", new="n + 1")
        + entry(name="add.fewer", line="wait(n);", old="n", new="n - 1"),
    )
    kept = 'wait((emulator::bug("add.more") ? n + 1 : (emulator::bug("add.fewer") ? n - 1 : n)));'
    assert f'if (i) {{ if (emulator::bug("add.no_wait")) {{  }} else {{ {kept} }} }} else x[0]' in text


def test_after_and_times(tmp_path):
    lines = woven(tmp_path, entry(after="x[i] = x[i]", line="__syncthreads();", new="")).splitlines()
    assert [i for i, line in enumerate(lines) if "bug" in line] == [5]
    lines = woven(tmp_path, entry(line="__syncthreads();", new="", times=3)).splitlines()
    assert [i for i, line in enumerate(lines) if "bug" in line] == [3, 5, 7]


def test_two_entries_of_one_fault(tmp_path):
    (tmp_path / "add.cu").write_text(SOURCE)
    (tmp_path / "add.faults").write_text(
        entry(line="i >= n", new="i > n") + '[[fault]]\nname = "add.f"\nline = "wait(n);"\nnew = ""\n'
    )
    (fault,) = weave.read(tmp_path / "add.cu").faults
    assert (fault.name, fault.breaks, fault.is_slow, len(fault.edits)) == ("add.f", "everything", False, 2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (entry(line="i <= n", new="i"), "add.faults:1: add.f: 'i <= n' is 0 times in add.cu, not 1"),
        (entry(line="__syncthreads();", new=""), "add.f: '__syncthreads();' is 3 times in add.cu, not 1"),
        (entry(line="i >= n", old="m", new="i"), "'m' is 0 times in its line"),
        (entry(line="i >= n", new=""), "deletes 'i >= n', which is no statement"),
        (entry(line="i >= n", new="i > n", broken=1), "unknown keys: broken"),
        ("\n[[fault]]\nname = 'add.f'\nline = 'i >= n'\n", "add.faults:2: add.f lacks new"),
        ("[[fault]]\nname = 'add.f'\nline = 'i >= n'\nnew = 'i'\n", "must say what it breaks"),
        (entry(line="i >= n", new="i", file="sub.cu"), "is in no source: sub.cu"),
        (entry(line="const int i = threadIdx.x;", old="int i = threadIdx", new="a")
         + entry(name="add.g", line="i = threadIdx.x", new="b"), "add.g crosses add.f"),
        ("[[fault]", "add.faults: "),
    ],
)  # fmt: skip
def test_a_fault_that_does_not_fit(tmp_path, entries, message):
    with pytest.raises(weave.BadFault) as raised:
        woven(tmp_path, entries)
    assert message in str(raised.value)


def test_copies_keep_their_lines_and_are_written_once(tmp_path):
    shutil.copytree(faults.FOLDER, tmp_path / "cuda")
    weave.copy_folder(tmp_path / "cuda", tmp_path / "woven")
    source = tmp_path / "cuda/rms_norm.cu"
    copy = tmp_path / "woven/rms_norm.cu"
    first, *lines = copy.read_text().splitlines()
    assert first == f'#line 1 "{source}"'
    assert len(lines) == len(source.read_text().splitlines())
    assert any('emulator::bug("rms_norm.dw_of_the_last_row")' in line for line in lines)
    written = copy.stat().st_mtime_ns
    source.with_name("gone.cu").write_text("")
    weave.copy_folder(tmp_path / "cuda", tmp_path / "woven")
    source.with_name("gone.cu").unlink()
    weave.copy_folder(tmp_path / "cuda", tmp_path / "woven")
    assert copy.stat().st_mtime_ns == written
    assert not (tmp_path / "woven/gone.cu").exists()


def test_the_build_names_a_fault_that_does_not_fit(tmp_path):
    """As CMake calls it, after a line of rope.cu has changed under its faults."""
    folder = shutil.copytree(faults.FOLDER, tmp_path / "cuda")
    source = folder / "rope.cu"
    source.write_text(source.read_text().replace("a.inverse ? -s[j] : s[j]", "a.back ? -s[j] : s[j]"))
    done = subprocess.run([sys.executable, weave.__file__, folder, tmp_path / "woven"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("rope.faults:")
    assert "rope.no_inverse: 'turn = a.inverse ? -s[j] : s[j]' is 0 times in rope.cu" in done.stderr


def test_the_sources_do_not_know_of_their_faults():
    for folder in ("csrc/cuda", "modules/post_train/systems/cuda/code"):
        for path in (emulator.ROOT / folder).rglob("*.cu*"):
            text = path.read_text()
            assert 'bug("' not in text.lower()
            assert "Faults:" not in text
