"""Ranks are started, called and ended together: what fails is named, and nothing hangs or stays behind."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import on_ranks
import pytest

from finetune.distributed.launch import RankFailed, Ranks
from finetune.errors import UserError


@contextmanager
def ended_within(seconds):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def gone(pids, within=10.0):
    until = time.monotonic() + within
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_results_come_rank_by_rank_and_lines_with_the_rank(tmp_path):
    lines = []
    with Ranks(2, on_line=lambda rank, text: lines.append((rank, text)), folder=tmp_path) as ranks:
        assert ranks.call(on_ranks.number, add=5) == [5, 6]
        with pytest.raises(UserError, match=r"^6 heads are refused$"):
            ranks.call(on_ranks.refuse)
        assert ranks.call(on_ranks.number) == [0, 1], "a refusal by all ranks ends none"
        pids = ranks.call(on_ranks.pids)
    assert gone(pids)
    assert sorted(set(lines)) == [(0, "rank 0 of 2"), (1, "rank 1 of 2")]
    assert (tmp_path / "rank_1.log").read_text() == "rank 1 of 2\n" * 2
    with pytest.raises(UserError, match="have ended"):
        ranks.call(on_ranks.number)


def test_two_launches_do_not_meet():
    with Ranks(2) as one, Ranks(2) as other:
        assert one.store.port != other.store.port
        for ranks in (one, other, one):
            assert ranks.call(on_ranks.every_collective)[0][0]["started sum"].tolist() == [1.0] * 3


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(victim):
    with Ranks(2, on_line=lambda *_: None) as ranks:
        pids = ranks.call(on_ranks.pids)
        with ended_within(20), pytest.raises(RankFailed) as e:
            ranks.call(on_ranks.die_in_a_collective, victim)
    assert f"rank {victim} was killed by SIGKILL" in str(e.value)
    assert re.search(r"all_reduce of \[(7, 2|5)\] float32 over dp \(ranks \[0, 1\]\) \(its call \d+\)", str(e.value))
    assert "\n" not in str(e.value)
    assert gone(pids)


def test_an_error_on_one_rank_ends_the_others():
    for function, said in (
        (on_ranks.fail_on_one, "rank 1: ZeroDivisionError: a mistake in the code"),
        (on_ranks.refuse_on_one, "rank 1 alone refuses"),
    ):
        with Ranks(2, on_line=lambda *_: None) as ranks:
            pids = ranks.call(on_ranks.pids)
            with ended_within(20), pytest.raises(RankFailed, match=said):
                ranks.call(function)
        assert gone(pids)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (on_ranks.different_shapes, r"rank 0 calls all_reduce of \[4\] .*; rank 1 calls all_reduce of \[5\]"),
        (on_ranks.different_order, r"rank 0 calls all_reduce of \[4\] .*; rank 1 calls all_gather of \[4\]"),
    ],
)
def test_different_calls_are_named_before_they_start(function, said):
    with (
        Ranks(2, check=True, on_line=lambda *_: None) as ranks,
        ended_within(20),
        pytest.raises(RankFailed, match=said),
    ):
        ranks.call(function)


def test_a_collective_that_the_others_do_not_join_times_out():
    with (
        Ranks(2, timeout=2, on_line=lambda *_: None) as ranks,
        ended_within(20),
        pytest.raises(RankFailed, match=r"rank 0: all_reduce of \[2, 3\] float32 over tp \(ranks \[0, 1\]\) failed"),
    ):
        ranks.call(on_ranks.other_group)


STARTER = """
import sys, on_ranks
from finetune.distributed.launch import Ranks
if __name__ == "__main__":
    with Ranks(2) as ranks:
        print(*ranks.call(on_ranks.pids), flush=True)
        ranks.call(on_ranks.sleep, 60)
"""


def heeds_interrupts():
    """In a child: SIGINT is ignored by what a shell starts in the background, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_starter(number, tmp_path):
    (tmp_path / "starter.py").write_text(STARTER)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    starter = subprocess.Popen(
        [sys.executable, tmp_path / "starter.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=environment, start_new_session=True, preexec_fn=heeds_interrupts,
    )  # fmt: skip
    pids = list(map(int, starter.stdout.readline().split()))
    assert len(pids) == 2
    os.killpg(starter.pid, number) if number == signal.SIGINT else starter.send_signal(number)
    with starter:
        assert starter.wait(20) != 0
    assert gone(pids)
