"""The machine as this process sees it: usable cores, memory, versions. Does not import torch."""

import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


def physical_cores() -> int:
    """Physical cores this process may use: its affinity, without hyperthread siblings, within its cgroup's quota."""
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        if sys.platform == "darwin":
            return int(subprocess.check_output(["sysctl", "-n", "hw.physicalcpu"]))
        return max(1, (os.cpu_count() or 2) // 2)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:  # a container that hides the topology: take each as a core
            cores.add((str(cpu), ""))
    return max(1, math.ceil(min(len(cores), cpu_quota())))


def cpu_quota(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs' worth of time that the cgroups of this process allow (version 2 or 1); infinity without a limit."""
    limit = math.inf
    try:
        groups = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return limit
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mount / "cpu" if controllers else mount
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):  # a parent's quota binds its children
            if folder == base.parent:
                break
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota != "max" and int(quota) > 0:
                limit = min(limit, int(quota) / int(period))
    return limit


_peak_before_reset = 0


def peak_rss_bytes(since_reset: bool = False) -> int:
    """Largest resident set of this process so far, or since the last `reset_peak_rss`."""
    return max(_current_peak(), 0 if since_reset else _peak_before_reset)


def reset_peak_rss() -> bool:
    """Resets the kernel's record of the peak resident set; False where the system cannot."""
    global _peak_before_reset
    highest = peak_rss_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    _peak_before_reset = highest
    return True


def _current_peak() -> int:
    try:  # ru_maxrss would include the parent's size before exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory_bytes() -> int | None:
    """Bytes of memory available without swapping; None where the system does not report it."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def cpu_name() -> str:
    if sys.platform == "darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector extensions that matter to the kernels, as the system names them."""
    x86 = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    arm = ("asimd", "bf16", "sve", "i8mm")
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                present = set(line.split(":", 1)[1].split())
                return [name for name in (*x86, *arm) if name in present]
    except OSError:
        pass
    return []


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("finetune-lab", "torch", "numpy", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe() -> dict[str, Any]:
    """Description of the machine for config.json: enough to decide whether two runs are comparable."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "physical_cores": physical_cores(),
        "memory_bytes": total_memory_bytes(),
    }


def git_revision() -> dict[str, Any] | None:
    """Commit of the project and whether tracked files differ from it; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None
