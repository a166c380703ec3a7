"""Schedules as data, and the executor: order, gradients, micro-batches held, and the idle time by the formulas."""

import on_ranks
import pytest
import torch

from finetune.distributed import schedules
from finetune.distributed.schedules import Step, bubble, ideal_bubble, live, simulate
from finetune.errors import UserError

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 3, 5, 8, 12)]


def every_stage(name, stages, micro, chunks=1):
    return [schedules.steps(name, stages, micro, stage, chunks) for stage in range(stages)]


@pytest.mark.parametrize(("stages", "micro"), SIZES)
def test_every_pass_happens_once_and_nothing_waits_for_ever(stages, micro):
    plans = [("gpipe", 1), ("1f1b", 1)]
    if stages > 1 and micro % stages == 0:
        plans += [("interleaved", 2), ("interleaved", 3)]
    for name, chunks in plans:
        plan = every_stage(name, stages, micro, chunks)
        expected = sorted(Step(kind, m, c) for kind in "BF" for m in range(micro) for c in range(chunks))
        assert all(sorted(steps) == expected for steps in plan)
        assert len(simulate(plan)) == sum(map(len, plan))


@pytest.mark.parametrize(("stages", "micro"), SIZES)
def test_micro_batches_held(stages, micro):
    assert [live(s) for s in every_stage("1f1b", stages, micro)] == [min(stages - s, micro) for s in range(stages)]
    assert [live(s) for s in every_stage("gpipe", stages, micro)] == [micro] * stages


def test_idle_time_of_a_simulation_is_the_formula():
    for stages, micro in ((2, 4), (4, 8), (4, 12), (8, 16)):
        for name in ("gpipe", "1f1b"):
            plan = every_stage(name, stages, micro)
            assert bubble(simulate(plan), stages) == pytest.approx(ideal_bubble(stages, micro))
        for chunks in (2, 4):
            plan = every_stage("interleaved", stages, micro, chunks)
            assert bubble(simulate(plan), stages) == pytest.approx(ideal_bubble(stages, micro, chunks))


def test_a_schedule_that_waits_for_ever_is_found():
    plan = every_stage("1f1b", 2, 3)
    plan[1] = plan[1][::-1]
    with pytest.raises(ValueError, match="waits for ever"):
        simulate(plan)


def test_printed_order():
    assert " ".join(map(str, schedules.steps("1f1b", 4, 5, 2))) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"
    assert " ".join(map(str, schedules.steps("gpipe", 2, 2, 0))) == "F0 F1 B0 B1"
    order = " ".join(map(str, schedules.steps("interleaved", 2, 4, 1, 2)))
    assert order == "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("interleaved", 2, 5, 0, 2), "2 stages do not divide 5 micro-batches; choose a multiple of 2"),
        (("interleaved", 2, 4, 0, 1), "2 stages and 2 chunks at least, not 2 and 1"),
        (("1f1b", 2, 4, 0, 2), "1f1b has one chunk a stage, not 2"),
        (("1f1b", 2, 0, 0), "at least one micro-batch, not 0"),
        (("zero bubble", 2, 4, 0), "schedule 'zero bubble' is not one of gpipe, 1f1b, interleaved"),
    ],
)
def test_schedules_that_do_not_exist_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        schedules.steps(*arguments)


def numbers(rows):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 6, generator=g), torch.randn(rows, 6, generator=g)


@pytest.mark.parametrize(
    ("schedule", "micro", "chunks"), [("gpipe", 5, 1), ("1f1b", 5, 1), ("1f1b", 1, 1), ("interleaved", 4, 2)]
)
def test_gradients_and_order_of_the_executor(two, schedule, micro, chunks):
    """5 micro-batches of 11 rows over 2 stages: unequal ones too."""
    x, target = numbers(11)
    layers = on_ranks.blocks(2 * chunks)
    loss = on_ranks.square(torch.nn.Sequential(*layers)(x), target)
    loss.backward()
    answers = two.call(on_ranks.played, x, target, micro, schedule, chunks)
    for stage, (grads, _, order, _) in enumerate(answers):
        assert order == [str(step) for step in schedules.steps(schedule, 2, micro, stage, chunks)]
        for layer, found in zip(layers[stage::2], grads, strict=True):
            for p, grad in zip(layer.parameters(), found, strict=True):
                torch.testing.assert_close(grad, p.grad)
    torch.testing.assert_close(answers[-1][1], loss.detach())
    assert answers[0][1] == 0


def test_idle_time_with_sleeps_for_compute(four):
    """A simulation on real processes: stages sleep. The best of three takes what the formula says, or a little longer
    (a busy machine only adds)."""
    forward, backward = 0.05, 0.1
    found = {}
    for name, chunks in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2)):
        expected = ideal_bubble(4, 8, chunks)
        for _ in range(3):
            answers = four.call(on_ranks.slept, name, 8, chunks, forward / chunks, backward / chunks)
            idle = bubble([event for trace in answers for event in trace], 4)
            found[name] = min(found.get(name, idle), idle)
            if found[name] < expected + 0.1:
                break
        assert expected * 0.95 < found[name] < expected + 0.2, (name, found)
    assert found["interleaved"] < found["1f1b"] - 0.05


@pytest.mark.peer
def test_gradients_equal_torch_pipelining(two):
    x, target = numbers(12)
    ours = two.call(on_ranks.played, x, target, 4, "1f1b")
    for (grads, *_), theirs in zip(ours, two.call(on_ranks.torch_pipeline, x, target, 4), strict=True):
        for a, b in zip(grads[0], theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.peer
@pytest.mark.parametrize(("stages", "micro"), [(2, 5), (4, 8), (4, 2), (3, 3), (1, 3)])
def test_order_equals_deepspeed(stages, micro):
    """The passes of every stage in the order of DeepSpeed's TrainSchedule, and as many sends and receives."""
    theirs = pytest.importorskip("deepspeed.runtime.pipe.schedule")
    for stage in range(stages):
        found, sends = [], {"SendActivation": 0, "SendGrad": 0, "RecvActivation": 0, "RecvGrad": 0}
        counts = {"ForwardPass": 0, "BackwardPass": 0}
        for commands in theirs.TrainSchedule(micro_batches=micro, stages=stages, stage_id=stage).steps():
            for command in commands:
                name = type(command).__name__
                if name in counts:
                    found.append(f"{name[0]}{counts[name]}")
                    counts[name] += 1
                elif name in sends:
                    sends[name] += 1
        ours = schedules.steps("1f1b", stages, micro, stage)
        assert found == [str(step) for step in ours]
        forward, backward = micro * (stage < stages - 1), micro * (stage > 0)
        assert sends == {
            "SendActivation": forward, "RecvGrad": forward, "SendGrad": backward, "RecvActivation": backward,
        }  # fmt: skip
