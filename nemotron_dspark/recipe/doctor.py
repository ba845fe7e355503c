"""What this machine is and whether it is ready, each finding with the one command that mends it.

Checks are functions of `Probes` that return a `Finding`; one that raises becomes a finding too. Where a threshold or a
cure comes from is in docs/doctor.md.
"""

import dataclasses
import importlib.metadata
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from nemotron_dspark._version import __version__
from nemotron_dspark.config.run import ServeConfig
from nemotron_dspark.errors import EnvironmentFault, first_line
from nemotron_dspark.files import size_text as size
from nemotron_dspark.recipe.probes import Gpu, Probes

GIB = 1 << 30
SPEED_FILE = 256_000_000  # bytes written and read to measure a disk
FREE_DISK = 10e9  # below it a fault; below five times as much a warning
SLOW_DISK = 300e6  # bytes a second, a tenth of what `nds plan` counts with
MEM_FREE, MEM_AVAILABLE = 8 * GIB, 24 * GIB  # of a unified memory; below them CUDA is reported to fail
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # CUDA's major version: NVIDIA's driver
RENDEZVOUS = 29500  # torchrun's port
SPARK_UPGRADE = "sudo apt update && sudo apt full-upgrade && sudo reboot"
SOURCES = {  # package: what its build needs, the variable that forbids a ready-made wheel, its repository
    "mamba-ssm": ("einops ninja", "MAMBA_FORCE_BUILD", "state-spaces/mamba"),
    "causal-conv1d": ("ninja", "CAUSAL_CONV1D_FORCE_BUILD", "Dao-AILab/causal-conv1d"),
}

State = Literal["ok", "warning", "fault", "skipped"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check saw. ``mend`` is a command for a shell, with a warning or a fault."""

    name: str
    state: State
    found: str
    mend: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """No finding is a fault."""
        return all(finding.state != "fault" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {"nds": __version__, "ready": self.ready, "findings": findings}


def examine(folder: Path | str = ".", probes: Probes | None = None) -> Report:
    """Run every check; ``folder`` says which disk is measured, with a file of 256 MB that is removed.

    Takes seconds on a processor, minutes with a GPU, where kernels are compiled. Nothing is installed or changed, and
    no check ends the others by an error.
    """
    probes = probes or Probes(Path(folder))
    return Report(tuple(_guarded(name, check, probes) for name, check in CHECKS.items()))


def _guarded(name: str, check: Callable[[Probes], Finding], probes: Probes) -> Finding:
    try:
        return dataclasses.replace(check(probes), name=name)
    except Exception as error:
        said = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
        return Finding(name, "fault", said, "nds doctor --json   # and report what it prints")


def _finding(state: State, found: str, mend: str | None = None) -> Finding:
    return Finding("", state, found, mend)


def machine(probes: Probes) -> Finding:
    """Processor, system and versions; nothing to fail."""
    kind, system, cores, python = probes.platform()
    return _finding("ok", f"{kind}, {system}, {cores} processor cores, Python {python}, nds {__version__}")


def gpu(probes: Probes) -> Finding:
    """GPUs that torch sees, and that the driver is there for them."""
    torch, driver = probes.torch(), probes.driver()
    build = f"torch {torch.version} " + (f"with CUDA {torch.cuda}" if torch.cuda else "without CUDA")
    if torch.gpus:
        names = ", ".join(f"{its.name} (sm_{its.capability[0]}{its.capability[1]})" for its in torch.gpus)
        return _finding("ok", f"{len(torch.gpus)} GPU: {names}; driver {driver or 'unknown'}; {build}")
    if driver is None:
        return _finding("skipped", f"no GPU and no NVIDIA driver, everything runs on the processor; {build}")
    if torch.cuda is None:
        return _finding("fault", f"driver {driver}, but {build} cannot use the GPU", _install_torch("cu130"))
    major = int(torch.cuda.split(".")[0])
    oldest = OLDEST_DRIVER.get(major, 0)
    if int(driver.split(".")[0]) < oldest:
        arm = probes.platform()[0] == "aarch64"  # an older CUDA knows nothing of a DGX Spark
        mend = SPARK_UPGRADE if arm else _install_torch("cu126")
        return _finding("fault", f"driver {driver} is too old for {build}: CUDA {major} needs {oldest}", mend)
    hidden = probes.environment("CUDA_VISIBLE_DEVICES")
    reason = f"CUDA_VISIBLE_DEVICES={hidden}" if hidden else torch.fault or "it lists none"
    mend = "unset CUDA_VISIBLE_DEVICES" if hidden else "sudo nvidia-modprobe -u -c=0"
    return _finding("fault", f"driver {driver}, but {build} sees no GPU: {reason}", mend)


def architecture(probes: Probes) -> Finding:
    """Whether torch carries kernels that run on every GPU here."""
    torch = probes.torch()
    if not torch.gpus:
        return _no_gpu()
    unfit = [its for its in torch.gpus if not any(_runs_on(kind, its.capability) for kind in torch.architectures)]
    built = f"torch is built for {', '.join(torch.architectures)}"
    if unfit:
        major, minor = unfit[0].capability
        newer = _install_torch("cu130" if (major, minor) >= (7, 5) else "cu126")  # CUDA 13 dropped the older ones
        return _finding("fault", f"{built}, none of which runs on sm_{major}{minor}", newer)
    return _finding("ok", built)


def _runs_on(built: str, capability: tuple[int, int]) -> bool:
    """Binaries run on later minors of their major, PTX on everything later, ``a`` on the very chip."""
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", built)
    if parts is None:
        return False
    own = (int(parts[2]), int(parts[3]))
    if parts[4] == "a":
        return own == capability
    return own <= capability and (own[0] == capability[0] or (parts[1] == "compute" and not parts[4]))


def memory(probes: Probes) -> Finding:
    """Main memory; on a unified one, what makes CUDA fail although memory is available."""
    now, gpus = probes.memory(), probes.torch().gpus
    if not now:
        return _finding("skipped", "no /proc/meminfo here")
    total, free, available = (now[key] for key in ("MemTotal", "MemFree", "MemAvailable"))
    figures = f"{size(total)}, available {size(available)}, free {size(free)}"
    if not any(its.unified for its in gpus):
        return _finding("ok", f"{figures} of main memory" + "".join(f"; GPU {size(its.memory)}" for its in gpus))
    figures += " of memory shared with the GPU; asking for too much freezes the system"
    if available < MEM_AVAILABLE:
        found = f"{figures}, and allocations were reported to fail with {size(MEM_AVAILABLE)} available"
        return _finding("warning", found, "ps -eo pid,rss,comm --sort=-rss | head   # end what is not needed")
    if free < MEM_FREE:
        mend = "sync && echo 3 | sudo tee /proc/sys/vm/drop_caches && echo 1 | sudo tee /proc/sys/vm/compact_memory"
        return _finding("warning", f"{figures}; files fill it, and CUDA counts only what is free", mend)
    return _finding("ok", f"{figures}: ask `nds plan` first")


def allocator(probes: Probes) -> Finding:
    """``expandable_segments`` of torch's allocator, which fails on a unified memory."""
    gpus = probes.torch().gpus
    if not gpus:
        return _no_gpu()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = probes.environment(name)
        if "expandable_segments:true" in value.lower().replace(" ", "") and any(its.unified for its in gpus):
            found = f"{name}={value}: on a unified memory the driver is reported to refuse it (RM error 0x51)"
            return _finding("warning", found, f"export {name}=expandable_segments:False")
    return _finding("ok", "nothing set that is known to fail")


def disk(probes: Probes) -> Finding:
    """Free space and measured speed of the disk."""
    free = probes.free_disk()
    where = f"{size(free)} free at {probes.folder}"
    mend = f"df -h {shlex.quote(str(probes.folder))} && nds doctor --folder /another/disk"
    if free < FREE_DISK:
        return _finding("fault", f"{where}, too little for any run; speed not measured", mend)
    try:
        written, read = probes.disk_speed(SPEED_FILE)
    except OSError as error:
        return _finding("fault", f"{where}, but a file there cannot be written and read: {first_line(error)}", mend)
    found = f"{where}, writes {written / 1e6:,.0f} MB/s with flush, reads {read / 1e6:,.0f} MB/s ({size(SPEED_FILE)})"
    if free < 5 * FREE_DISK:
        return _finding("warning", f"{found}; a cache of a large target takes far more", mend)
    if min(written, read) < SLOW_DISK:
        return _finding("warning", f"{found}; `nds plan` counts with 1,000 and 3,000", mend)
    return _finding("ok", found)


def versions(probes: Probes) -> Finding:
    """Installed packages against the oldest allowed and those of the tests; of extras only what is installed."""
    try:
        asked = probes.requirements()
    except importlib.metadata.PackageNotFoundError:
        found = "nemotron-dspark runs from a folder and is not installed, so its requirements are unknown"
        return _finding("warning", found, f"{_pip()} install -e .")
    tested = probes.tested()
    core: dict[str, str] = {}
    wrong: dict[str, str] = {}  # requirement: what is wrong with it
    others: dict[str, bool] = {}  # what the tests ran with, where another is here: whether that is a major one above
    for requirement in asked:
        parts = re.match(r"([\w.-]+)>=([\d.]+)", requirement)
        if parts is None or re.search("extra == .(dev|kernels).", requirement):  # kernels have checks of their own
            continue
        name, installed, extra = parts[1], probes.version(parts[1]), "extra ==" in requirement
        if not extra:
            core[name] = f"{name} {installed}"
        if installed is None and not extra:
            wrong[parts[0]] = f"{name} is missing"
        elif installed is not None and _numbers(installed) < _numbers(parts[2]):
            wrong[parts[0]] = f"{name} {installed} is too old"
        elif installed is not None and name in tested and _numbers(installed) != _numbers(tested[name]):
            others[f"{name}=={tested[name]}"] = _numbers(installed)[:1] > _numbers(tested[name])[:1]
    if wrong:
        return _finding("fault", ", ".join(wrong.values()), f"{_pip()} install {shlex.join(wrong)}")
    found = ", ".join(core.values())
    if others:
        found += f"; the tests ran with {', '.join(others)}"
    if newer := [pin for pin, major in others.items() if major]:
        return _finding("warning", found, f"{_pip()} install {shlex.join(newer)}")
    return _finding("ok", found)


def _numbers(version: str) -> tuple[int, ...]:
    """2.9.0a0+nv25.10 as (2, 9, 0): NVIDIA's containers carry builds from before a release that behave like it."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def kernel(package: str) -> Callable[[Probes], Finding]:
    """The check of a package of kernels: installed, imported, and equal to plain PyTorch."""

    def check(probes: Probes) -> Finding:
        installed, gpus = probes.version(package), probes.torch().gpus
        if not gpus:
            return _no_gpu(f"; {package} {installed} was not proven" if installed else f"; {package} is not installed")
        mend = build_command(package, gpus[0])
        if installed is None:
            return _finding("warning", f"{package} is not installed: Mamba layers run as plain PyTorch, slower", mend)
        return _proven(probes, package, f"{package} {installed}: ", lambda said: mend)

    return check


def build_command(package: str, its: Gpu) -> str:
    """The shell command that builds ``package`` from source for a GPU.

    Blackwell and later are built for their major version with PTX: binaries for later minors are missing or wrong.
    """
    needs, force, repository = SOURCES[package]
    major, minor = its.capability
    kinds = f"{major}.0+PTX" if major >= 10 else f"{major}.{minor}"
    install = "install --no-build-isolation --no-deps --no-cache-dir --force-reinstall"
    source = f"git+https://github.com/{repository}"
    build = f"TORCH_CUDA_ARCH_LIST={kinds} {force}=TRUE {_pip()} {install} {source}"
    return f"{_pip()} install {needs} && {build}"


def flex_attention(probes: Probes) -> Finding:
    """FlexAttention, compiled once and equal to dense attention."""
    return _proven(probes, "flex-attention", "", _mend_compile) if probes.torch().gpus else _no_gpu()


def _mend_compile(said: str) -> str:
    if "ptxas" in said or "sm_12" in said:
        return "export TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas"  # Triton's own is older than the GPU
    if re.search(r"Python\.h|compiler|gcc", said):
        return "sudo apt install build-essential python3-dev"
    return "nds train --set train.attention=dense ..."


def nccl(probes: Probes) -> Finding:
    """A sum between two GPUs."""
    if (count := len(probes.torch().gpus)) < 2:
        return _finding("skipped", "one GPU here, two are needed") if count else _no_gpu()
    return _proven(probes, "nccl", "", lambda said: "export NCCL_P2P_DISABLE=1")


def _proven(probes: Probes, name: str, before: str, mend: Callable[[str], str]) -> Finding:
    """The finding of a proof; ``mend`` gets what went wrong."""
    try:
        proof = probes.prove(name)
    except EnvironmentFault as error:
        return _finding("fault", f"{before}does not run: {error.what}", mend(error.what))
    errors = f"relative error {proof.error:.1e}, allowed {proof.tolerance:.0e}"
    if not proof.passed:
        return _finding("fault", f"{before}{proof.what}: wrong numbers, {errors}", mend(""))
    return _finding("ok", f"{before}{proof.what}: {errors}")


def ports(probes: Probes) -> Finding:
    """The ports that a server and torchrun take unless told."""
    serve = ServeConfig().port
    mends = {serve: f"nds serve --port {serve + 1} ...", RENDEZVOUS: f"torchrun --master-port {RENDEZVOUS + 1} ..."}
    taken = [port for port in mends if not probes.port_is_free(port)]
    if taken:
        return _finding("warning", f"in use: {', '.join(map(str, taken))}", "; ".join(mends[port] for port in taken))
    return _finding("ok", f"{serve} (nds serve) and {RENDEZVOUS} (torchrun) are free")


def hub(probes: Probes) -> Finding:
    """Whether a login to the hub is stored; its name and whether it is valid are not asked."""
    if probes.has_hub_token():
        return _finding("ok", "a login is stored; whether the hub accepts it was not asked")
    return _finding("warning", "no login: public targets load all the same, gated ones do not", "hf auth login")


def engines(probes: Probes) -> Finding:
    """Serving engines in this environment or on PATH."""
    packages = ("vllm", "sglang", "tensorrt_llm")
    found = [f"{name} {version}" for name in packages if (version := probes.version(name))]
    found += [path for name in ("vllm", "trtllm-serve", "llama-server") if (path := probes.on_path(name))]
    return _finding("ok" if found else "skipped", ", ".join(found) or "none found; `nds serve` needs none")


def _no_gpu(more: str = "") -> Finding:
    return _finding("skipped", f"no GPU here{more}")


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip"


def _install_torch(build: str) -> str:
    return f"{_pip()} install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


CHECKS: dict[str, Callable[[Probes], Finding]] = {
    "machine": machine,
    "GPU": gpu,
    "architecture": architecture,
    "memory": memory,
    "allocator": allocator,
    "disk": disk,
    "versions": versions,
    "mamba-ssm": kernel("mamba-ssm"),
    "causal-conv1d": kernel("causal-conv1d"),
    "FlexAttention": flex_attention,
    "NCCL": nccl,
    "ports": ports,
    "hub login": hub,
    "engines": engines,
}
