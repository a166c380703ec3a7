"""kill -9 at random moments: the resumed run ends with the same bits, and nothing is left behind."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parents[1]
SETTINGS = {
    "sft": "--steps 8 --checkpoint-every 2 --batch 1 --eval-rows 2 --eval-every 4 --samples 1 --max-length 64",
    "nanogpt": "--steps 8 --checkpoint-every 2 --layers 1 --dim 32 --heads 2 --length 16 --batch 2 --sample-tokens 4 "
    "--eval-rows 2 --eval-every 4 --data text.txt",
    "policy_gradient": "--steps 4 --checkpoint-every 1 --methods reinforce --episodes 2 --hidden 4 --corridor-steps 2 "
    "--corridor-repeats 2 --score-episodes 1000 --variance-groups 0 --eval-episodes 2 --max-episode-steps 50",
    "gae": "--steps 8 --checkpoint-every 2 --samples 2 --rows 4 --ppo-updates 2 --ppo-envs 2 --ppo-horizon 16 "
    "--ppo-hidden 4 --bench-steps 16 --bench-rows 2",
    "cql": "--steps 4 --checkpoint-every 1 --sets expert --data-steps 300 --updates 2 --fqe-steps 1 --eval-every 2 "
    "--eval-episodes 2 --hidden 8 --max-episode-steps 50",
}
TIMED = ("per_second", "faster", "seconds", "rate")  # metrics that are times


class Server:
    """tests/kill_server.py with a module loaded."""

    def __init__(self, module, folder):
        self.module = module
        (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
        command = [sys.executable, str(HERE / "kill_server.py"), module]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, out, kill=None):
        """Starts the run in `out`, or goes on with it; (exit code, seconds). Whatever is neither the end nor our kill
        fails."""
        if (out / "config.json").exists():
            words = ["--resume"]
        else:
            words = ["--toy", *SETTINGS[self.module].split(), "--threads", "1"]
        command = {"argv": ["run", self.module, *words, "--out", str(out)], "kill": kill}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        report = json.loads(self.process.stdout.readline())
        assert report["code"] in ((0,) if kill is None else (0, -9)), report["error"]
        return report["code"], report["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def left(folder):
    """What a finished run leaves, without what is a time or a place."""
    summary = json.loads((folder / "summary.json").read_text())
    metrics = {k: v for k, v in summary["metrics"].items() if not any(word in k for word in TIMED)}
    files = {"metrics.csv": (folder / "metrics.csv").read_bytes()}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = {k: v.numpy().tobytes() for k, v in load_file(path).items() if not k.startswith("clock.")}
        files[str(path.relative_to(folder))] = tensors
    tables = json.loads((folder / "samples.json").read_text()) if (folder / "samples.json").exists() else []
    rows = [{k: v for k, v in row.items() if k != "time"} for table in tables for row in table["rows"]]
    return metrics, rows, sorted(p.name for p in folder.rglob("*") if p.is_file()), files


def killed(module, folder, kills, seed):
    """Kills runs of a module `kills` times, at moments drawn over a whole run, and compares what each leaves."""
    server, rng = Server(module, folder), random.Random(seed)
    try:
        _, seconds = server.run(folder / "whole")
        whole = left(folder / "whole")
        done = attempt = 0
        while done < kills:
            attempt += 1
            out = folder / f"killed_{attempt}"
            code = -9
            while code and done < kills:
                code, _ = server.run(out, kill=rng.uniform(0, seconds))
                done += code != 0
            if code:
                server.run(out)
            assert left(out) == whole
            assert not list(out.rglob(".*"))
    finally:
        server.close()
    return attempt


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sft", "nanogpt", "cql"])
def test_killed_at_random_moments(module, tmp_path):
    killed(module, tmp_path, kills=4, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("module", SETTINGS)
def test_killed_forty_times(module, tmp_path):
    killed(module, tmp_path, kills=40, seed=1)
