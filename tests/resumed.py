"""For module tests: a run that is cut off in the middle and resumed ends as one that nobody interrupted."""

import json
from contextlib import contextmanager

import pytest

from finetune.runs.run import Run, execute


class Cut(Exception):
    pass


@contextmanager
def cut_off(calls):
    """What runs inside ends, and has to, at its `calls`-th log."""
    keep, seen = Run.log, []

    def log(self, step, **metrics):
        seen.append(step)
        if len(seen) == calls:
            raise Cut
        return keep(self, step, **metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(Cut):
            yield


def resumes_to_the_same_bytes(info, config, folder, calls):
    """Cuts the run at its `calls`-th log; compares metrics.csv and what was judged."""
    execute(info, config, folder / "whole", toy=True)
    with cut_off(calls):
        execute(info, config, folder / "cut", toy=True)
    summary = execute(info, config, folder / "cut", toy=True, resume=True)
    whole = json.loads((folder / "whole/summary.json").read_text())
    assert (folder / "cut/metrics.csv").read_bytes() == (folder / "whole/metrics.csv").read_bytes()
    timed = {name for name in whole["metrics"] if "faster" in name or "per_second" in name}
    assert {k: v for k, v in summary["metrics"].items() if k not in timed} == {
        k: v for k, v in whole["metrics"].items() if k not in timed
    }
