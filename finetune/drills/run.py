"""Checking an answer in a process of its own, and saying in words how it did."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune.drills.catalog import Drill, case_name
from finetune.drills.child import WALL

SECONDS = 60.0  # of the processor, for all cases of a drill, PyTorch's start included

WORDS = {
    "en": {
        "green": "green: {passed} cases",
        "score": "memory on the last case: {yours} sectors of 32 bytes in {requests} requests, at least {least}; the "
        "solution {solution} in {their_requests} · bank conflicts: {conflicts}, the solution {their_conflicts}",
        "slow": "the results are right, but there are too many {counted} on the last case: {found}, at most {most}",
        "red": "red at case {number}, “{case}”",
        "input": "input:",
        "printed": "printed:",
        "mistake": "This is what you get when {mistake}",
        "missing": "there is no function or class `{name}` in the file",
        "unwritten": "it raises NotImplementedError: write the body first",
        "raised": "line {line}: {error}",
        "changed": "it changes its input; compute the result in new memory",
        "no_gradient": "no gradient flows through the result: it was detached, or made by an operation without one",
        "kind": "result{place} is of type {found}; expected {expected}",
        "shape": "result{place} has shape {found}; expected {expected}",
        "dtype": "result{place} is {found}; expected {expected}",
        "length": "result{place} has {found} items; expected {expected}",
        "value": "result{place} is {found}; expected {expected}",
        "nan": "result{place}{index} is NaN; expected {expected:.7g} ({count} of {of} elements are wrong)",
        "element": "result{place}{index} is {found:.7g}; expected {expected:.7g} within {allowed:.1e} ({count} of {of} "
        "elements are wrong)",
        "time": "line {line}: still running after {seconds:.0f} s; a loop that does not end?",
        "crash": "line {line}: the process crashed ({signal})",
        "ended": "the process ended without a result (exit code {code}): {said}",
    },
    "zh": {
        "green": "通过：{passed} 个用例",
        "score": "最后一个用例的访存：{requests} 次请求共 {yours} 个 32 字节扇区，最少 {least}；"
        "参考解 {their_requests} 次请求共 {solution} 个 · bank 冲突：{conflicts}，参考解 {their_conflicts}",
        "slow": "结果正确，但最后一个用例的 {counted} 太多：{found}，最多 {most}",
        "red": "第 {number} 个用例未通过：“{case}”",
        "input": "输入：",
        "printed": "打印的内容：",
        "mistake": "这正是以下错误的结果：{mistake}",
        "missing": "文件里没有函数或类 `{name}`",
        "unwritten": "抛出了 NotImplementedError：先写函数体",
        "raised": "第 {line} 行：{error}",
        "changed": "它修改了输入；请把结果写到新的内存里",
        "no_gradient": "梯度无法流过结果：被 detach 了，或由不可导的操作得到",
        "kind": "结果{place}的类型是 {found}，应为 {expected}",
        "shape": "结果{place}的形状是 {found}，应为 {expected}",
        "dtype": "结果{place}是 {found}，应为 {expected}",
        "length": "结果{place}有 {found} 项，应有 {expected} 项",
        "value": "结果{place}是 {found}，应为 {expected}",
        "nan": "结果{place}{index} 是 NaN，应为 {expected:.7g}（{of} 个元素中 {count} 个不对）",
        "element": "结果{place}{index} 是 {found:.7g}，应为 {expected:.7g}，容差 {allowed:.1e}"
        "（{of} 个元素中 {count} 个不对）",
        "time": "第 {line} 行：{seconds:.0f} 秒后仍在运行；死循环？",
        "crash": "第 {line} 行：进程崩溃（{signal}）",
        "ended": "进程没有给出结果就结束了（退出码 {code}）：{said}",
    },
}  # fmt: skip


def check(drill: Drill, answer: Path, seconds: float = SECONDS) -> dict[str, Any]:
    """The verdict on an answer: `ok`, `passed` (cases), and of a failure `what`, `details`, `case`, `input`,
    `mistake`, `line`, `printed`."""
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder) / "verdict.json"
        words = [sys.executable, "-m", "finetune.drills.child", drill.name, answer, verdict, seconds]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        process = subprocess.Popen(
            [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            said, errors = process.communicate(timeout=WALL * seconds + 10)
        except subprocess.TimeoutExpired:  # it caught the signal, or its children hold the pipe
            said, errors = "", ""
        finally:
            stop(process)
        if verdict.exists():
            found: dict[str, Any] = json.loads(verdict.read_text(encoding="utf-8"))
            found["printed"] = (found.get("printed", "") + said)[-2000:]
            return found
    return {"ok": False, "passed": 0, "printed": said[-2000:], **death(process.returncode, errors, answer, seconds)}


def stop(process: subprocess.Popen[str]) -> None:
    """Ends the process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def death(code: int | None, errors: str, answer: Path, seconds: float) -> dict[str, Any]:
    """Why there is no verdict, from the exit code and what faulthandler wrote."""
    found = re.search(rf'File "{re.escape(str(answer))}", line (\d+)', errors)
    line = int(found[1]) if found else None
    if "Timeout (" in errors or code in (None, -signal.SIGKILL, -signal.SIGPROF):
        return {"what": "time", "details": {"seconds": seconds}, "line": line}
    if code < 0:
        return {"what": "crash", "details": {"signal": signal.Signals(-code).name}, "line": line}
    last = next((each for each in reversed(errors.splitlines()) if each.strip()), "")
    return {"what": "ended", "details": {"code": code, "said": last[:300]}, "line": line}


def told(drill: Drill, verdict: dict[str, Any], lang: str) -> list[tuple[str, str]]:
    """(line, style) of a verdict in words."""
    words = WORDS[lang]
    if verdict["ok"]:
        lines = [(words["green"].format(passed=verdict["passed"]), "bold green")]
        if score := verdict.get("score"):
            yours, theirs = score["yours"], score["solution"]
            text = words["score"].format(
                yours=yours["sectors"], requests=yours["requests"], conflicts=yours["conflicts"],
                solution=theirs["sectors"], their_requests=theirs["requests"], their_conflicts=theirs["conflicts"],
                least=score["least"]["sectors"],
            )  # fmt: skip
            lines.append((text, ""))
        return lines
    lines = []
    if verdict.get("case"):
        lines.append(
            (words["red"].format(number=verdict["passed"] + 1, case=case_name(verdict["case"], lang)), "bold red")
        )
    details = {"place": "", "line": "?"} | verdict["details"]
    if verdict.get("line"):
        details["line"] = verdict["line"]
    if "index" in details:
        details["index"] = str(details["index"]) if details["index"] else ""
    nowhere = verdict["what"] == "raised" and not verdict.get("line")  # in what calls the code, as for a missing method
    lines.append((details["error"] if nowhere else words[verdict["what"]].format(**details), "red"))
    if verdict.get("input") and verdict["what"] not in ("unwritten", "missing"):
        lines += [(words["input"], "dim"), (verdict["input"], "")]
    if verdict.get("mistake") not in (None, "", drill.text.planted):  # a planted bug is for the learner to name
        text = getattr(drill.text.mistakes[verdict["mistake"]], lang)
        lines.append((words["mistake"].format(mistake=text), "yellow"))
    if verdict.get("printed"):
        lines += [(words["printed"], "dim"), (verdict["printed"].rstrip(), "")]
    return lines
