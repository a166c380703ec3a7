"""What the compiler made of the CUDA kernels, without a GPU: registers, spills, occupancy, instructions, access widths.

`python -m finetune kernels static` compiles csrc/cuda/<op>.cu for each architecture and reads ptxas' report and the
machine code. assets/kernels_static.json keeps the table of a known toolkit; tests hold today's against it.

A kernel's row:
    threads, registers, stack, spills (bytes), shared (bytes, static)   from ptxas
    occupancy   share of a multiprocessor's warps that fit, by registers, threads and static shared memory
                (dynamic shared memory is the launch's, and not in the binary)
    code        counts of the instructions of `COUNTED`, by the mnemonic's first word
    load, store counts of global accesses by bytes a lane: {"16": 4, "2": 8}
    around      of kernels with tensor core products: counts of the words of `AROUND` in the straight lines of code that
                hold products or exponentials: what a step of the main loop costs in addition to them. Lines that only
                some steps take, such as masks, have neither and are not counted
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.kernels import cuda_toolkit

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "assets/kernels_static.json"
FORMAT = "2"  # of a row: another number forgets the rows in build/static
ARCHS = ("80", "90a", "100a", "120")
# tensor cores · shared memory and copies into it · other memory · warps, barriers, special functions
COUNTED = (
    *("HMMA", "HGMMA", "WARPGROUP", "USETMAXREG"),
    *("LDSM", "LDS", "STS", "LDGSTS", "LDGDEPBAR", "UTMALDG", "UBLKCP", "SYNCS"),
    *("LDG", "STG", "LDL", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG"),
    *("SHFL", "REDUX", "BAR", "WARPSYNC", "MUFU"),
)
AROUND = ("HMMA", "HGMMA", "MUFU", "FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "ISETP", "IMAD", "LOP3", "LDSM")
# warps, registers, shared bytes (and those the system keeps of each block) and blocks of a multiprocessor
LIMITS = {
    "80": (64, 65536, 164 * 1024, 1024, 32),
    "90a": (64, 65536, 228 * 1024, 1024, 32),
    "100a": (64, 65536, 228 * 1024, 1024, 32),
    "120": (48, 65536, 100 * 1024, 1024, 24),
}

Row = dict[str, Any]
Table = dict[str, dict[str, dict[str, Row]]]  # op → architecture → kernel → row


def sources() -> dict[str, Path]:
    return {path.stem: path for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))}


def archs_of(op: str) -> tuple[str, ...]:
    return ("90a",) if op.endswith("_hopper") else ARCHS


@cache
def toolkit() -> str:
    """nvcc's version."""
    out = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V([0-9.]+)", out)
    return found[1] if found else "unknown"


def tool(name: str) -> str:
    if not (path := cuda_toolkit.tool(name)):
        raise UserError(f"{name} not found: install the CUDA toolkit, or pip install -e '.[test]', which brings it")
    return path


def table(ops: list[str] | None = None, archs: tuple[str, ...] = ARCHS, jobs: int = 2) -> Table:
    """The rows of these ops' kernels (all without a choice), compiled side by side; known sources are not compiled
    again (build/static)."""
    known = sources()
    for arch in archs:
        if arch not in ARCHS:
            raise UserError(f"--arch {arch}: choose of {', '.join(ARCHS)}")
    wanted = [(op, arch) for op in ops or known for arch in archs if arch in archs_of(op)]
    with ThreadPoolExecutor(jobs) as pool:
        rows = list(pool.map(lambda pair: kernels(*pair), wanted))
    result: Table = {}
    for (op, arch), row in zip(wanted, rows, strict=True):
        result.setdefault(op, {})[arch] = row
    return result


def kernels(op: str, arch: str) -> dict[str, Row]:
    """The rows of csrc/cuda/<op>.cu for one architecture, by kernel."""
    source, folder = sources()[op], ROOT / "build/static"
    text = "".join([toolkit(), FORMAT, *(path.read_text() for path in included(source))])
    digest = hashlib.sha256(text.encode())
    stem = folder / f"{op}-{arch}-{digest.hexdigest()[:16]}"
    kept = stem.with_suffix(".json")
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{op}-{arch}-*"):
            old.unlink()
        ptx, cubin = stem.with_suffix(".ptx"), stem.with_suffix(".cubin")
        include = f"-I{ROOT}/csrc/include"
        call(tool("nvcc"), "-std=c++20", "-O3", "-ptx", f"-arch=compute_{arch}", include, source, "-o", ptx)
        report = call(tool("ptxas"), "-v", f"-arch=sm_{arch}", ptx, "-o", cubin)
        rows = read(report, ptx.read_text(), call(tool("cuobjdump"), "-sass", cubin), arch)
        partial = stem.with_suffix(".tmp")
        partial.write_text(json.dumps(rows))
        partial.rename(kept)
        ptx.unlink()
        cubin.unlink()
    return json.loads(kept.read_text())


def included(source: Path) -> list[Path]:
    """The file and those of the project that it includes, at any depth."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            near = [f for folder in (path.parent, ROOT / "csrc/include") if (f := folder / name).exists()]
            found += [f for f in near if f not in found]
    return found


def call(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))}:\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout + done.stderr


def read(report: str, ptx: str, sass: str, arch: str) -> dict[str, Row]:
    """The rows from ptxas' report, the PTX (block sizes) and the disassembly."""
    sizes: dict[str, int] = {}
    for entry, size in re.findall(r"\.entry (\w+)\([^{]*?\.(?:max|req)ntid ([\d, ]+)", ptx):
        sizes[entry] = math.prod(map(int, size.split(",")))
    bodies = dict(part.split("\n", 1) for part in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:])
    rows = {}
    for part in report.split("Compiling entry function '")[1:]:
        entry = part.split("'")[0]

        def number(pattern: str, text: str = part) -> int:
            return int(found[1]) if (found := re.search(pattern, text)) else 0

        registers, shared = number(r"Used (\d+) registers"), number(r"(\d+) bytes smem")
        threads = sizes.get(entry, 1024)
        rows[entry] = {
            "threads": threads,
            "registers": registers,
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "shared": shared,
            "occupancy": occupancy(arch, threads, registers, shared),
            **instructions(bodies[entry]),
        }
    names = readable(list(rows))
    return {names[entry]: rows[entry] for entry in sorted(rows, key=lambda e: names[e])}


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps of a multiprocessor ÷ its most. Registers are dealt out to warps by 256."""
    warps, all_registers, all_shared, system, blocks = LIMITS[arch]
    mine = -(-threads // 32)
    fit = min(
        blocks,
        warps // mine,
        all_registers // (-(-registers * 32 // 256) * 256 * mine) if registers else blocks,
        all_shared // (shared + (system if arch != "80" or shared else 0) or 1),
    )
    return round(fit * mine / warps, 3)


def instructions(sass: str) -> Row:
    """Counts of the mnemonics' first words (LDG is a prefix of LDGSTS), without what never runs (@!PT)."""
    code: Counter[str] = Counter()
    widths: dict[str, Counter[str]] = {"LDG": Counter(), "STG": Counter()}
    for never, name in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(@!U?PT\s)?(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]+)", sass):
        if never:
            continue
        words = name.split(".")
        code[words[0]] += 1
        if words[0] in widths:
            bits = next((w for w in words[1:] if w in ("64", "128", "256", "U8", "S8", "U16", "S16")), "32")
            widths[words[0]][str(int(bits.strip("US")) // 8)] += 1
    counted = {name: code[name] for name in COUNTED if code[name]}
    row: Row = {"code": counted}
    row |= {"load": dict(sorted(widths["LDG"].items())), "store": dict(sorted(widths["STG"].items()))}
    return row | {"around": around(sass)} if code["HMMA"] + code["HGMMA"] else row


def around(sass: str) -> dict[str, int]:
    """Counts of AROUND in the straight lines with tensor core products, or with four exponentials and more."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\S+\s+)?([A-Z][A-Z0-9_]+)([^;]*);", sass)
    targets = {int(to, 16) for *_, word, rest in found if word == "BRA" for to in re.findall(r"\b0x([0-9a-f]+)", rest)}
    total: Counter[str] = Counter()
    line: Counter[str] = Counter()
    for address, never, word, _ in [*found, ("0", "", "EXIT", "")]:
        ends = word in ("BRA", "EXIT", "RET")
        if ends or int(address, 16) in targets:
            if line["HMMA"] + line["HGMMA"] or line["MUFU"] >= 4:
                total += line
            line = Counter()
        if not ends and not never.startswith(("@!PT", "@!UPT")):
            line[word] += 1
    return {word: total[word] for word in AROUND if total[word]}


def readable(entries: list[str]) -> dict[str, str]:
    """Kernel names as the source writes them: forward<float>."""
    out = subprocess.run(["c++filt"], input="\n".join(entries), capture_output=True, text=True).stdout.splitlines()
    names = {}
    for entry, name in zip(entries, out, strict=True):
        name = re.sub(r"finetune::|_GLOBAL__N__\w+::|\(anonymous namespace\)::", "", name.removeprefix("void "))
        name = re.sub(r"\([^()]*\)$", "", name).replace("__nv_bfloat16", "bf16").replace("__half", "f16")
        names[entry] = re.sub(r"\((?:bool|int|long|\w*int\d+_t)\)", "", name)
    return names


# --- the golden table


def write(rows: Table) -> None:
    """Puts these ops' rows into the golden table, for kernels that still exist; one line a kernel."""
    toolkit_, kept = golden() if GOLDEN.exists() else (toolkit(), {})
    if toolkit_ != toolkit() and rows.keys() != sources().keys():
        raise UserError(f"the table is of nvcc {toolkit_}, this one is {toolkit()}: write all of it, without OP")
    rows = {op: rows.get(op) or kept[op] for op in sources() if op in rows or op in kept}
    lines = [f'{{"toolkit": "{toolkit()}", "kernels": {{']
    for i, (op, by_arch) in enumerate(rows.items()):
        lines.append(f"{json.dumps(op)}: {{")
        for j, (arch, kernels_) in enumerate(by_arch.items()):
            lines.append(f' "{arch}": {{')
            ends = [","] * (len(kernels_) - 1) + [""]
            lines += [
                f"  {json.dumps(name)}: {json.dumps(row)}{end}"
                for (name, row), end in zip(kernels_.items(), ends, strict=True)
            ]
            lines.append(" }" + ("," if j + 1 < len(by_arch) else ""))
        lines.append("}" + ("," if i + 1 < len(rows) else ""))
    partial = GOLDEN.with_suffix(".tmp")
    partial.parent.mkdir(exist_ok=True)
    partial.write_text("\n".join([*lines, "}}"]) + "\n")
    partial.rename(GOLDEN)


def golden() -> tuple[str, Table]:
    """(toolkit, table) of assets/kernels_static.json."""
    if not GOLDEN.exists():
        raise UserError(f"{GOLDEN} is missing: python -m finetune kernels static --write makes it")
    kept = json.loads(GOLDEN.read_text())
    return kept["toolkit"], kept["kernels"]


def differences(now: Table, before: Table, same_toolkit: bool) -> list[str]:
    """How `now` departs from the golden table: more spilled, registers by more than 8, the same toolkit's counts at
    all, another toolkit's by more than a quarter; other kernels than before; access widths that come or go."""
    found = []
    for op, by_arch in now.items():
        for arch, rows in by_arch.items():
            old_rows = before.get(op, {}).get(arch, {})
            for name in rows.keys() ^ old_rows.keys():
                found.append(f"{op} sm_{arch} {name}: {'new' if name in rows else 'gone'}")
            for name in rows.keys() & old_rows.keys():
                row, old = rows[name], old_rows[name]
                where = f"{op} sm_{arch} {name}"
                if row["spills"] > old["spills"]:
                    found.append(f"{where}: {row['spills']} bytes spilled, were {old['spills']}")
                if abs(row["registers"] - old["registers"]) > 8:
                    found.append(f"{where}: {row['registers']} registers, were {old['registers']}")
                for what in ("threads", "shared"):
                    if row[what] != old[what]:
                        found.append(f"{where}: {what} {row[what]}, was {old[what]}")
                for what in ("code", "load", "store", "around"):
                    now_, then = row.get(what, {}), old.get(what, {})
                    for word in now_.keys() | then.keys():
                        mine, was = now_.get(word, 0), then.get(word, 0)
                        if mine == was:
                            continue
                        if mine != was if same_toolkit else bool(mine) != bool(was) or abs(mine - was) > was / 4 + 2:
                            label = {"code": word, "around": f"{word} around the products"}.get(what)
                            label = label or f"{what}s of {word} bytes"
                            found.append(f"{where}: {mine} {label}, were {was}")
    return sorted(found)
