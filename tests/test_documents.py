"""Every command that a document prints is run, every link leads somewhere, every Python snippet holds.

What takes minutes is run as printed by `make longtest`; by default something smaller takes its place (`instead`), which
the test's name shows. `NEVER` says what is not run, and why.
"""

import ast
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import small_adapters
import torch

from finetune.cli import main
from finetune.lm import presets
from finetune.lm.io import hf_llama
from finetune.lm.llama import LlamaConfig
from finetune.runs import registry

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location("run_page", ROOT / "scripts/run_page.py")
run_page = importlib.util.module_from_spec(specification)
specification.loader.exec_module(run_page)

FOLDERS = ("", "learning/", "modules/*/*/", "modules/*/*/*/", "csrc/emulator/")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md"))
FINETUNE = "python -m finetune "
PROGRAMS = ("python ", "make ", "pytest ", "source ", "pre-commit ", ".venv/bin/python ")

NEVER = {
    "source .venv/bin/activate": "it changes a shell",
    "pre-commit install": "it changes the checkout",
    "python scripts/pictures.py RUN NAME.png": "it writes into the checkout",
    "pytest -m gpu": "needs a GPU; without one its tests are skipped",
    ".venv/bin/python -m pytest tests/ops/test_ops.py -k <op>": "the tests are run by themselves",
}
# What the default tests run in place of a command that takes longer; a run becomes a `small` one.
SMALLER = {
    "bench <op>": "bench --help",
    "bench --keep": "bench --help",
    "bench a2c_vs_sb3": "bench a2c_vs_sb3 --horizon 4 --rounds 1 --steps 64",
    "bench ppo_vs_sb3": "bench ppo_vs_sb3 --horizon 8 --epochs 1 --rounds 1 --updates 1",
    "bench nanogpt_vs_torch": "bench nanogpt_vs_torch --threads 1 --steps 12",
    "bench dit_vs_torch": "bench dit_vs_torch --model XXS --side 8 --patch 2 --threads 1 --steps 3",
    "run blip2 --data pairs.jsonl --encoder contrast": "run blip2 --data pairs.jsonl --encoder digits",
    "bench sft_vs_trl": "bench sft_vs_trl --help",
    "bench llava_vs_transformers": "bench llava_vs_transformers --help",
    "bench cql_vs_d3rlpy": "bench cql_vs_d3rlpy --help",
    "serve --model smollm2": "serve --help",  # it ends when it is told to (tests/inference/test_server.py)
    "serve --model smollm2 --quantize int8 --cache int8": "serve --help",
    "serve --model smollm2 --adapter docs=RUN": "serve --help",
    "chat --model smollm2": "chat --help",  # it talks with a person (tests/inference/test_terminal.py)
    "kernels faults": "kernels faults --help",
    "kernels faults <op>": "kernels faults --help",
    "kernels static": "kernels static --help",
    "kernels trace attention": "kernels trace rms_norm",
    "kernels trace <op>": "kernels trace rms_norm",
    "kernels levels": "kernels levels transpose --level 2",
    "kernels levels matmul": "kernels levels transpose --level 2",
    # a checkpoint of the hub, and photographs
    "run llava --data rows.jsonl --encoder openai/clip-vit-base-patch32 --projector-steps 200": "run llava --help",
    "generate --model RUN --image photo.jpg --prompt 'What is in the picture?'": "generate --help",
    "run diffusion --images mnist --levels 3": "run diffusion --levels 3",  # 5,000 images are measured at length
    "run mdp --world taxi": "run mdp --help",
    # it starts from a run
    "run rlhf --start '<RUN>' --reward gold --reward-clip 0 --beta 0 --steps 20 --unfinished 0 "
    "--beyond 0 --lr 3e-3 --warmup 2": "run rlhf --help",
    "smoke": "smoke --help",
    "caption RUN FILE '…'": "caption --help",  # of a run that read images (tests/modules/test_blip2.py)
    "drill check softmax": "drill check --help",  # a draft that is not written is red (tests/drills)
    "drill check softmax --lang zh": "drill check --help",
}
STEPS = {"cuda": "5", "td_learning": "8"}  # of the runs here, one of each experiment; else 2
SETTINGS = {
    "actor_critic": "--warmup 300 --repeats 1 --eval-episodes 2 --critic-steps 1",
    "bcq": "--rows 300 --fqe-steps 2 --eval-episodes 2 --sweep 0,1",
    "blip2": "--count 100 --stage2-steps 2 --language-steps 2 --dim 16 --layers 1 --batch 16 --stage2-batch 8",
    "cql": "--updates 5 --data-steps 500 --fqe-steps 1 --eval-episodes 2",
    "dit": "--samples 20 --sample-steps 2 --judge-steps 5 --batch 8 --vae-steps 3",
    "diffusion": "--batch 8 --samples 20 --oracle-steps 5 --bound-rows 0 --no-exhibits --sample-steps 2 --width 8",
    "dpo": "--sft-steps 60 --prompts 60 --eval-prompts 30 --samples 4",
    "flamingo": "--copy-steps 3 --episodes 20 --batch 4 --lesson 2",
    "grpo": "--sft-steps 20",
    "inference": "--train-steps 3 --requests 100 --rounds 2",
    "llava": "--text-steps 2 --count 40 --eval-rows 8 --batch 4",
    "megatron": "--compare 1 --batch 4 --dim 16",
    "mdp": "--rollouts 100 --rollout-steps 100 --pairs 10",
    "rlhf": "--sft-steps 20 --reward-steps 4 --prompts 40 --answers 2 --eval-prompts 10 --eval-answers 2 --samples 4 "
    "--beyond 2 --batch 8",
    "policy_gradient": "--episodes 2 --max-episode-steps 30 --eval-episodes 2 --corridor-steps 2 --score-episodes 1000 "
    "--variance-groups 10",
    "ppo": "--repeats 1 --eval-episodes 2 --max-episode-steps 20 --ablation-seeds 2 --ablation-updates 2 --horizon 16 "
    "--sft-steps 20",
    "td_learning": "--cliff-runs 4 --cliff-episodes 40 --bias-runs 50 --bias-episodes 40 --car-runs 1 --car-episodes 5 "
    "--taxi-runs 2 --taxi-steps 500 --runs 10 --dqn-steps 64 --world-steps 40",
}


def lines(text):
    """The commands of a page: the lines of its shell blocks, and what stands in backticks."""
    for body in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from (line for line in body.splitlines() if line.strip())
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (code for code in re.findall(r"`([^`\n]+)`", text) if code.startswith(PROGRAMS) and " " in code)


def plain(line):
    """A command without its comment, spaced and quoted in one way."""
    return shlex.join(shlex.split(line, comments=True)).replace("'<op>'", "<op>")


COMMANDS = [*dict.fromkeys(plain(line) for page in PAGES for line in lines(page.read_text(encoding="utf-8")))]
OURS = [c.removeprefix(FINETUNE) for c in COMMANDS if c.startswith(FINETUNE)]


AN_ENVIRONMENT = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class MyEnv(gymnasium.Env):
    def __init__(self, size=4, noisy=True):
        self.observation_space, self.action_space = Box(0, 1, (size,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return self.np_random.random(self.observation_space.shape, np.float32), {}

    def step(self, action):
        self.age += 1
        seen = self.np_random.random(self.observation_space.shape, np.float32)
        return seen, float(action), self.age == 20, False, {}


gymnasium.register("MyEnv-v0", MyEnv)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder to run commands in, with the modules, but none of their runs."""
    folder = tmp_path_factory.mktemp("documents")
    for info in registry.modules():
        copy = folder / "modules" / info.group / info.name
        (copy / "output").mkdir(parents=True)
        for path in info.folder.iterdir():
            if path.name not in ("output", "checkpoints", "models", "data"):
                (copy / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_MODULES", str(folder / "modules"))
        patch.setenv("FINETUNE_DATA", str(folder / "data"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(folder)
        for name in ("my_module.py", "my_file.py"):
            (folder / name).write_text(AN_ENVIRONMENT)
        shape = hf_llama.write_config(LlamaConfig(**presets.LLAMA["smollm2-135m"]), torch.float32)
        (folder / "config.json").write_text(json.dumps(shape))
        yield folder


@pytest.fixture(scope="module")
def a_run(place):
    """name → folder of a small finished run of the module."""
    made = {}

    def run(name):
        if name not in made:
            (module,) = place.glob(f"modules/*/*/{name}")
            made[name] = module / "output/small"
            assert main([*small(name), "--out", str(made[name])]) == 0
        return made[name]

    return run


@pytest.fixture(scope="module")
def an_adapter(place):
    small_adapters.adapter_run(place)


def small(name, *settings):
    """A run of what the settings ask for, but of the least size."""
    steps = "2" if "--experiment" in settings else STEPS.get(name, "2")
    return ["run", name, "--toy", *settings, "--steps", steps, *SETTINGS.get(name, "").split()]


def data_file(path):
    """What a command's --data names: the suffix says what is wanted."""
    if path.name == "pairs.jsonl":
        from PIL import Image

        for k in range(24):
            Image.new("RGB", (40, 32), (10 * k, 100, 250 - 10 * k)).save(path.with_name(f"{k}.png"))
        ask = {"role": "user", "content": "<image>\nWhat is it?"}
        rows = [
            {"image": f"{k}.png", "messages": [ask, {"role": "assistant", "content": f"shade {k}"}]} for k in range(24)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".jsonl":
        rows = [{"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.name == "steps.npz":
        from finetune.rl.envs import logged_data

        logged_data.generate("CartPole-v1", "medium", 300, 0).save(path)
    elif path.name == "photos":
        from PIL import Image

        for k in range(24):
            (path / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (10 * k, 100, 250 - 10 * k)).save(path / "ab"[k % 2] / f"{k}.png")
    elif path.suffix == ".npz":
        import numpy as np

        chances = np.random.default_rng(0).dirichlet(np.ones(5), (5, 2))  # (states, actions, states)
        np.savez(path, P=chances, R=np.arange(10.0).reshape(5, 2), gamma=0.9)
    else:
        from pydoc_data.topics import topics

        path.write_text("\n".join(topics.values())[:60_000])


def instead(command):
    """The words that the default tests run for a command of ours."""
    words = shlex.split(SMALLER.get(command, command))
    if words[0] != "run" or "--help" in words:
        return words
    return small(words[1], *(word for word in words[2:] if word != "--toy"))


UNENDING = ("serve", "chat", "drill check")  # they wait for somebody
TAKES_LONG = [c for c in OURS if instead(c) != shlex.split(c) and "<" not in c and not c.startswith(UNENDING)]


def named(command):
    words = shlex.join(instead(command))
    return command if words == command else f"{command} → {words}"


@pytest.mark.parametrize("command", [pytest.param(c, id=named(c)) for c in OURS])
def test_a_printed_command_runs(command, place, a_run, monkeypatch, capsys, request):
    words = instead(command)
    if words[0] == "run" and words == small(words[1]):
        a_run(words[1])
        return
    if words[0] == "run" and "--help" not in words:
        words += ["--out", str(place / "runs" / str(OURS.index(command)))]
    if words[0] == "brief":
        a_run(words[1])
    if {"merge", "--compare", "export"} & set(words):
        request.getfixturevalue("an_adapter")  # RUN
    elif words[0] == "generate":
        if "smollm2" in words:
            request.getfixturevalue("smollm2")
        for name, text in (("nanogpt", "modules/pre_train/llm/nanogpt/output/RUN"), ("sft", "RUN")):
            words = [word.replace(text, str(a_run(name))) if text in word else word for word in words]
    if words[0] == "sample":
        words[1] = str(a_run("diffusion"))
    if words[0] == "generate":
        words += ["--max-new-tokens", "2"]
    if words[0] == "quiz":
        monkeypatch.setattr("sys.stdin", io.StringIO("\n" + "y\nn\n" * 10))
    if "--data" in words:
        data_file(place / words[words.index("--data") + 1])
    assert main(words) == 0
    out = capsys.readouterr().out
    if words[0] == "brief":
        assert "{" not in out
    if words[0] == "quiz":
        assert ("问题" if "zh" in words else "questions") in out or "nothing is due" in out


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", TAKES_LONG)
def test_a_command_runs_as_it_is_printed(command, place):
    words = shlex.split(command)
    if "--data" in words:
        data_file(place / words[words.index("--data") + 1])
    done = subprocess.run([sys.executable, "-m", "finetune", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- other programs' commands


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(FINETUNE)])
def test_other_commands(command, capsys):
    if command in NEVER:
        pytest.skip(f"not run: {command}: {NEVER[command]}")
    words = shlex.split(command)
    if words[0] == "make":  # its tests, its benches, its installation: only that the target is there
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[1] == "scripts/run_page.py":
        run_page.run(ROOT / words[2])
        assert "snippets hold" in capsys.readouterr().out
    else:  # the scripts that write pages: here they must find nothing to write
        assert words[:1] == ["python"]
        done = subprocess.run([sys.executable, words[1], "--check"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_lists_name_what_is_printed():
    assert len(COMMANDS) > 60
    assert set(NEVER) <= set(COMMANDS)
    assert set(SMALLER) <= set(OURS)


# --- pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_both_languages_have_the_same_pages_and_snippets():
    """A page's Chinese twin has its headings and links to code, and the same snippets but for their comments."""
    pages = [page for page in [ROOT / "README.md", *ROOT.glob("learning/*.md")] if ".zh-CN" not in page.name]
    assert len(pages) >= 5
    for page in pages:
        twin = page.with_name(page.name.replace(".md", ".zh-CN.md"))
        texts = [path.read_text(encoding="utf-8") for path in (page, twin)]
        assert len({tuple(re.findall(r"^#+ ", text, re.MULTILINE)) for text in texts}) == 1, page.name
        assert len({tuple(re.findall(r"arXiv:\d+\.\d+", text)) for text in texts}) == 1, page.name
        programs = [{line.split("#")[0].split("--lang")[0].strip() for line in lines(text)} for text in texts]
        assert {line.replace(".md", ".zh-CN.md") for line in programs[0]} == {
            line if ".zh-CN" in line else line.replace(".md", ".zh-CN.md") for line in programs[1]
        }, page.name
        mine, theirs = ([code for _, code in run_page.snippets(path)] for path in (page, twin))
        for one, other in zip(mine, theirs, strict=True):
            assert ast.dump(ast.parse(one)) == ast.dump(ast.parse(other)), page.name


def test_a_wrong_snippet_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n```python\nx = 1\n```\n```sh\nfalse\n```\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run_page.run(page)
    assert error.traceback[-1].lineno + 1 == 9, "the line of the page"
