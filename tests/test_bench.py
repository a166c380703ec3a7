"""The benches: that they refuse what is wrong, compare like with like, and report what they measured."""

import json
import math
import types

import decode_vs_llamacpp
import harness
import pytest
import torch
import trl_turns
from baselines import BASELINES

from finetune import ops
from finetune.errors import UserError


def test_every_op_has_a_baseline_and_bench_samples():
    assert set(BASELINES) == set(ops.REGISTRY)
    for op in ops.REGISTRY:
        assert harness.bench_samples(op), op
        for sample in harness.bench_samples(op).values():
            assert sample.bytes > 0, (op, sample.name)


def test_times():
    assert harness.Times.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == harness.Times(3.5, 2.0, 5.0)


def test_a_wrong_backend_is_not_timed(monkeypatch, capsys, tmp_path):
    op = ops.REGISTRY["swiglu"]
    right = op.backends["cpp"]
    wrong = ops._op.Backend(lambda gate, up: right.call(gate=gate, up=up) * 1.001, right.supports)
    monkeypatch.setitem(op.backends, "cpp", wrong)
    sample = next(iter(harness.bench_samples("swiglu")))
    status = harness.main(["swiglu", "--sample", sample, "--dtype", "f32", "--json", str(tmp_path / "out.json")])
    assert status == 1
    assert "not timed:" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["results"], len(report["refused"])) == ([], 1)


def test_a_baseline_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(BASELINES, "swiglu", lambda gate, up: {"other": lambda: gate * up})
    cell = next(harness.cells(["swiglu"], [], ["f32"], ["cpp"], [1]))
    with pytest.raises(AssertionError, match="swiglu: other computes something else"):
        harness.measure(cell, 0.01)


def test_a_slow_kernel_fails_the_check(monkeypatch, capsys):
    op = ops.REGISTRY["swiglu"]
    right = op.backends["cpp"]

    def slow(gate, up):
        for _ in range(20):
            out = right.call(gate=gate, up=up)
        return out

    monkeypatch.setitem(op.backends, "cpp", ops._op.Backend(slow, right.supports))
    sample = next(iter(harness.bench_samples("swiglu")))
    words = ["swiglu", "--sample", sample, "--dtype", "f32", "--seconds", "0.05"]
    assert harness.main(words) == 0
    assert harness.main([*words, "--check"]) == 1
    assert "slower than torch's own" in capsys.readouterr().out


def test_report(tmp_path, capsys):
    sample = next(iter(harness.bench_samples("rms_norm")))
    words = ["rms_norm", "--sample", sample, "--dtype", "f32", "--threads", "1", "--seconds", "0.05"]
    threads = torch.get_num_threads()
    assert harness.main([*words, "--json", str(tmp_path / "deep" / "out.json")]) == 0
    assert torch.get_num_threads() == threads
    report = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert [r["cell"]["work"] for r in report["results"]] == ["forward", "forward + backward"]
    for r in report["results"]:
        assert r["pairs"] >= 5
        assert r["ratio"]["p20"] <= r["ratio"]["median"] <= r["ratio"]["p80"]
    moved = report["results"][1]["bytes_per_second"]
    assert math.isfinite(moved)
    assert moved > 0
    assert {"cpu", "level", "torch"} <= set(report["machine"])
    assert "rms_norm" in capsys.readouterr().out


def test_comparison_with_an_earlier_report(tmp_path, capsys):
    sample = next(iter(harness.bench_samples("rms_norm")))
    words = ["rms_norm", "--sample", sample, "--dtype", "f32", "--seconds", "0.05"]
    old = tmp_path / "old.json"
    assert harness.main([*words, "--json", str(old)]) == 0
    report = json.loads(old.read_text())
    report["results"][0]["ratio"]["median"] = 100.0
    report["results"].append({**report["results"][0], "cell": {**report["results"][0]["cell"], "threads": 7}})
    old.write_text(json.dumps(report))
    capsys.readouterr()
    assert harness.main([*words, "--compare", str(old)]) == 0
    out = capsys.readouterr().out
    assert "100.00×" in out
    assert "-9" in out  # the ratio fell by more than nine tenths
    assert "1 cells of the earlier report were not measured now" in out
    old.write_text("[]")
    with pytest.raises(UserError, match=r"old\.json is not a report"):
        harness.main([*words, "--compare", str(old)])


# --- the step against TRL's


def test_a_kept_report_keeps_the_other_ops(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "KEPT", tmp_path)
    words = ["--dtype", "f32", "--seconds", "0.01", "--threads", "1", "--keep"]
    reports = []
    for names in (["rms_norm", "swiglu"], ["swiglu"]):
        assert harness.main([*names, *words]) == 0
        (file,) = tmp_path.glob("*.json")
        reports.append(json.loads(file.read_text())["results"])
    both, again = reports
    assert [r["cell"] for r in again] == [r["cell"] for r in both]
    assert [r["ours"] for r in again if r["cell"]["op"] == "rms_norm"] == [
        r["ours"] for r in both if r["cell"]["op"] == "rms_norm"
    ]
    assert [r for r in again if r["cell"]["op"] == "swiglu"] != [r for r in both if r["cell"]["op"] == "swiglu"]


def test_sides_that_differ_are_not_timed():
    assert trl_turns.disagreement({"ours": 2.0, "TRL": 2.0001}, 1e-4) is None
    assert "2.000300 for TRL" in trl_turns.disagreement({"ours": 2.0, "TRL": 2.0003}, 1e-4)
    assert trl_turns.disagreement({"ours": 2.0, "TRL": math.nan}, 1e-4)
    assert trl_turns.disagreement({"ours": math.nan, "TRL": 2.0}, 1e-4)


def test_ratios_are_of_the_same_step_and_leave_the_first_out():
    def steps(*seconds):
        return [
            {"seconds": s, "cpu": 2 * s, "peak": 10 * s, "growth": s, "loss": 1 + s / 1000} for s in (100.0, *seconds)
        ]

    found = trl_turns.summarize({"ours": steps(1.0, 2.0, 4.0), "TRL": steps(3.0, 2.0, 8.0)}, [[5], [7], [8], [12]])
    assert found["TRL"]["ratio"]["median"] == 2.0
    assert found["ours"]["ratio"]["median"] == 1.0
    assert found["ours"]["tokens_per_second"] == 4.0
    assert found["TRL"]["peak"] == 1000.0
    assert found["TRL"]["loss_difference"] == pytest.approx(1.008 / 1.004 - 1)


# --- decoding next to llama.cpp and transformers


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A random model of 32-wide rows as GGUF, which every side opens."""
    from small_gguf import TEXT, tiny
    from small_gguf import write as write_gguf

    from finetune.lm.tokenizer import Tokenizer

    tokenizer = Tokenizer.train([TEXT], vocab_size=300)
    path = tmp_path_factory.mktemp("bench") / "m.gguf"
    return write_gguf(path, tiny(vocab_size=tokenizer.vocab_size), "BF16", tokenizer=tokenizer)


QUICK = ["--batch", "1", "2", "--prefill", "50", "--steps", "2", "--rounds", "2", "--threads", "1"]


def decoded(path, tmp_path, against):
    words = ["--model", str(path), *QUICK, "--json", str(tmp_path / "out.json"), "--files", str(tmp_path), "--against"]
    threads = torch.get_num_threads()
    try:
        assert decode_vs_llamacpp.main([*words, *against]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "out.json").read_text())
    found = {(r["cell"]["what"], r["cell"]["format"], r["cell"]["side"]): r for r in report["results"]}
    assert len(found) == len(report["results"])
    for r in found.values():
        assert 0 < r["ratio"]["p20"] <= r["ratio"]["median"] <= r["ratio"]["p80"]
        assert r["tokens_per_second"] > 0
        assert r["of_limit"] > 0
    assert report["facts"]["read_bytes_per_second"] > 1e8
    return found, report["facts"]


@pytest.mark.peer
def test_decoding_against_transformers(small_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode_vs_llamacpp, "read_rate", lambda: 1e10)
    found, facts = decoded(small_file, tmp_path, ["transformers"])
    whats = ("batch 1", "batch 2", "prefill 50")
    wanted = {(what, format, "ours") for what in whats for format in ("bf16", "int8", "int4")}
    assert found.keys() == wanted | {(what, "bf16", "transformers") for what in whats}
    assert all(r["ratio"]["median"] == 1 for (_, _, side), r in found.items() if side == "ours")
    assert facts["bf16: divergence from transformers, nats"] < 0.01
    assert "transformers" in capsys.readouterr().out


@pytest.mark.long
def test_decoding_against_llama_cpp(small_file, tmp_path):
    pytest.importorskip("llama_cpp", reason="make longtest installs llama-cpp-python")
    found, facts = decoded(small_file, tmp_path, ["llama.cpp"])
    assert {side for _, _, side in found} == {"ours", "llama.cpp"}
    assert facts["int8: divergence from llama.cpp, nats"] < 0.05


def test_sides_with_other_weights_are_not_timed(small_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode_vs_llamacpp, "read_rate", lambda: 1e10)
    monkeypatch.setattr(decode_vs_llamacpp, "turns", lambda *_: pytest.fail("timed"))

    class Other:
        def __init__(self, source):
            pass

        def logits(self, prompt):
            return torch.arange(300.0)

    monkeypatch.setattr(decode_vs_llamacpp, "Transformers", Other)
    threads = torch.get_num_threads()
    assert decode_vs_llamacpp.main(["--model", str(small_file), *QUICK, "--against", "transformers"]) == 2
    torch.set_num_threads(threads)
    assert "not timed: bf16 of ours and transformers differ by" in capsys.readouterr().err


def test_a_ratio_is_of_the_same_round():
    seconds = {"ours": [1.0, 2.0, 4.0], "llama.cpp": [3.0, 4.0, 16.0]}
    ours, theirs = decode_vs_llamacpp.rows("batch 8", "int8", 8, seconds, {"ours": 1e9, "llama.cpp": 2e9}, 1e9, 0.1)
    assert (ours["ratio"]["median"], theirs["ratio"]["median"]) == (1, 3)
    assert (ours["tokens_per_second"], ours["of_limit"], theirs["of_limit"]) == (4, 0.5, 0.5)


def test_rounds_that_others_disturb_are_repeated(monkeypatch):
    """The third round, and the first, which warms up."""
    clock, used, calls = [0.0], [0.0], []

    def side():
        calls.append(len(calls))
        clock[0] += 1.0
        used[0] += 0.9 if len(calls) == 3 else 0.1
        return float(len(calls))

    monkeypatch.setattr(decode_vs_llamacpp, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(decode_vs_llamacpp, "others", lambda: used[0])
    seconds, noise = decode_vs_llamacpp.turns({"ours": side}, 3)
    assert sorted(seconds["ours"]) == [2, 4, 5]
    assert noise == pytest.approx(0.1)
