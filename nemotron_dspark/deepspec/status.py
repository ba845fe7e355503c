"""What `nds deepspec check` says: versions, devices, packages, and what transformers does wrong with a target."""

import dataclasses
import importlib.metadata
import importlib.util
import platform

from nemotron_dspark.deepspec.checkout import COMMIT, Checkout, find
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.targets import Checkpoint
from nemotron_dspark.targets.spec import LayerKind, TargetSpec

PINNED_TORCH, PINNED_TRANSFORMERS = "2.9.1", "5.10.2"
PACKAGES = ("triton", "prettytable", "tensorboard", "matplotlib", "tqdm", "yaml")  # that DeepSpec's modules import

OVERRIDE = (
    f"DeepSpec pins transformers {PINNED_TRANSFORMERS}, which computes Nemotron-H wrongly without CUDA kernels. The "
    "bridge runs DeepSpec under this environment's transformers (5.15 or newer) instead. Its models, losses and "
    "trainers accept that, as the conformance tests show; ours replace its evaluators, which newer versions break."
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table."""

    item: str
    found: str
    meaning: str = ""
    level: str = "ok"  # "ok", "note" or "missing": DeepSpec cannot run without it


@dataclasses.dataclass(frozen=True)
class Fault:
    """A way in which transformers goes wrong on hybrids; docs/hybrid-notes.md has symptom, cause and cure."""

    what: str
    families: frozenset[str] | None  # model types; None: every target with a recurrent state
    here: bool  # in this environment's versions too; False: up to 5.14 only
    cure: str
    kernels: bool = False  # True: not with mamba-ssm's kernels


_SCANS = frozenset({"nemotron_h", "zamba2"})
_BLOCKS = frozenset({"nemotron_h", "granitemoehybrid", "bamba", "zamba2", "lfm2"})
_STEPS = frozenset({"nemotron_h", "bamba"})
FAULTS = (
    Fault("later tokens change earlier ones beyond chunk_size", _SCANS, False, "newer transformers; proven", True),
    Fault("right padding changes real tokens beyond chunk_size", _SCANS, False, "newer transformers; proven", True),
    Fault("several tokens on a cache give wrong logits", _BLOCKS, False, "our own verify; proven"),
    Fault("several tokens on a cache give wrong logits", frozenset({"jamba"}), True, "our own verify; proven"),
    Fault("crop() forgets attention and keeps the recurrent state", None, True, "our own commit; proven"),
    Fault("a bare DynamicCache() is refused", None, True, "our own state instead of a cache"),
    Fault("one token and several step differently", _STEPS, True, "limits as the config says"),
    Fault("default positions ignore the cache", frozenset({"bamba"}), True, "positions are always passed"),
)


@dataclasses.dataclass(frozen=True)
class FaultSeen:
    """A fault that concerns a target: whether DeepSpec's pin has it, and whether this version has it."""

    what: str
    in_deepspecs_pin: bool
    here: bool
    cure: str


@dataclasses.dataclass(frozen=True)
class BridgeStatus:
    """Whether DeepSpec runs here, and what transformers does wrong with a target."""

    lines: list[Line]
    missing: list[str]  # what DeepSpec cannot run without
    override: str
    target: str | None
    faults: list[FaultSeen]


def status(target: str | None) -> BridgeStatus:
    """Look at this machine, and at ``target`` (folder, alias or hub id) if one is named."""
    try:
        home = find()
    except EnvironmentFault:
        home = None
    spec = Checkpoint.find(target).read_spec() if target else None
    lines = environment(home)
    missing = [line.item for line in lines if line.level == "missing"]
    return BridgeStatus(lines, missing, OVERRIDE, target, faults(spec, kernels=has_kernels(spec)) if spec else [])


def environment(checkout: Checkout | None) -> list[Line]:
    """Rows on the checkout, the versions, the devices and the packages."""
    import torch
    import transformers

    def line(item: str, found: str, meaning: str = "", level: str = "note") -> Line:
        return Line(item, found, meaning, level if meaning else "ok")

    if checkout is None:
        rows = [line("checkout", "none", "run `nds deepspec install`, or set DEEPSPEC_HOME", "missing")]
    elif warnings := checkout.warnings():
        rows = [line("checkout", str(checkout.folder), " ".join(warnings))]
    else:
        rows = [Line("checkout", str(checkout.folder), f"the commit the bridge was made for ({COMMIT[:7]})")]
    other = "" if torch.__version__.startswith(PINNED_TORCH) else f"DeepSpec pins {PINNED_TORCH}"
    rows += [
        line("python", platform.python_version()),
        line("torch", torch.__version__, other),
        Line("transformers", transformers.__version__, f"in place of DeepSpec's {PINNED_TRANSFORMERS}"),
    ]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        rows.append(Line("CUDA", f"{count} × {torch.cuda.get_device_name(0)}", f"torch built for {torch.version.cuda}"))
    else:
        need = "DeepSpec trains and evaluates on GPUs only; `nds train` needs none"
        rows.append(line("CUDA", "none", need, "missing"))
    for name in PACKAGES:
        package = "PyYAML" if name == "yaml" else name
        if importlib.util.find_spec(name) is not None:
            rows.append(line(name, _version(package)))
        else:
            where = "; comes with CUDA builds of torch" if name == "triton" else ""
            rows.append(line(name, "none", f"`pip install {package}`{where}", "missing"))
    return rows


def faults(spec: TargetSpec, *, kernels: bool) -> list[FaultSeen]:
    """The faults that concern ``spec``; ``kernels`` are those of mamba-ssm."""
    recurrent = any(kind.recurrent for kind in spec.layers)
    found = []
    for fault in FAULTS:
        if recurrent if fault.families is None else spec.model_type in fault.families:
            pinned = not (fault.kernels and kernels)
            found.append(FaultSeen(fault.what, pinned, pinned and fault.here, fault.cure))
    return found


def has_kernels(spec: TargetSpec) -> bool:
    """True when mamba-ssm and causal-conv1d are installed, which a target with Mamba layers then uses."""
    mamba = {LayerKind.MAMBA2, LayerKind.MAMBA1, LayerKind.PARALLEL} & set(spec.layers)
    return bool(mamba) and all(importlib.util.find_spec(name) for name in ("mamba_ssm", "causal_conv1d"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "present"
