"""`nds doctor` on simulated machines, its kernel comparisons with right and wrong kernels, and the command here."""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

from nemotron_dspark.cli import doctor_command, shell
from nemotron_dspark.errors import EnvironmentFault
from nemotron_dspark.recipe import doctor, gpu_proofs
from nemotron_dspark.recipe.doctor import GIB, Finding, Report, examine
from nemotron_dspark.recipe.probes import Gpu, KernelProof, Probes, Torch
from nemotron_dspark.targets.mamba2 import scan_block

GB10 = Gpu("NVIDIA GB10", (12, 1), 128 * 10**9, unified=True)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * 10**9, unified=False)
CUDA_13 = ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120")
REQUIREMENTS = ("torch>=2.9", "transformers>=5.15", "openai>=2.0; extra == 'data'", "pytest>=8.4; extra == 'dev'")


class Simulated(Probes):
    """A machine of plain values; whatever the real `Probes` reads is a field here."""

    def __init__(self, folder, **changes):
        super().__init__(folder)
        self.processor = ("x86_64", "Linux 6.8", 64, "3.11.9")
        self.driver_version: str | None = "580.95"
        self.build = Torch("2.13.0+cu130", "13.0", CUDA_13, (H100,) * 8)
        self.meminfo = {"MemTotal": 2048 * GIB, "MemFree": 1900 * GIB, "MemAvailable": 2000 * GIB}
        self.variables: dict[str, str] = {}
        self.free, self.speed = 20e12, (3e9, 6e9)
        self.asked, self.packages = REQUIREMENTS, {"torch": "2.13.0+cu130", "transformers": "5.23.0"}
        self.pins = {"torch": "2.13.0", "transformers": "5.23.0"}
        self.packages |= {"mamba-ssm": "2.3.1", "causal-conv1d": "1.6.2"}
        self.paths: dict[str, str] = {}
        self.taken: tuple[int, ...] = ()
        self.token = True
        self.kernels = {}
        self.proven: list[str] = []
        for name, value in changes.items():
            assert hasattr(self, name)
            setattr(self, name, value)

    def platform(self):
        return self.processor

    def driver(self):
        return self.driver_version

    def torch(self):
        return self.build

    def memory(self):
        return self.meminfo

    def environment(self, name):
        return self.variables.get(name, "")

    def free_disk(self):
        return self.free

    def disk_speed(self, size):
        return self.speed

    def requirements(self):
        return list(self.asked)

    def tested(self):
        return self.pins

    def version(self, package):
        return self.packages.get(package)

    def on_path(self, command):
        return self.paths.get(command)

    def prove(self, name):
        self.proven.append(name)
        return self.kernels.get(name, lambda: KernelProof(name, 1e-4, 1e-2))()

    def port_is_free(self, port):
        return port not in self.taken

    def has_hub_token(self):
        return self.token


def spark(folder, **changes):
    """A DGX Spark in order, but for ``changes``."""
    memory = {"MemTotal": 119 * GIB, "MemFree": 90 * GIB, "MemAvailable": 110 * GIB}
    build = Torch("2.13.0+cu130", "13.0", CUDA_13, (GB10,))
    own = {"processor": ("aarch64", "Linux 6.11", 20, "3.12.3"), "meminfo": memory, "build": build, "free": 3e12}
    return Simulated(folder, **own | changes)


def processor_only(folder, **changes):
    """A machine without a GPU and its driver."""
    packages = {"torch": "2.13.0+cpu", "transformers": "5.23.0"}
    own = {"driver_version": None, "build": Torch("2.13.0+cpu", None, (), ()), "packages": packages}
    return Simulated(folder, **own | changes)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def named(report: Report) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


def other_than_ok(report: Report) -> dict[str, str]:
    return {finding.name: finding.state for finding in report.findings if finding.state != "ok"}


# --- whole machines ---


def test_a_spark_in_order_has_no_fault_and_says_what_it_is(folder):
    found = examine(folder, spark(folder))
    assert other_than_ok(found) == {"NCCL": "skipped", "engines": "skipped"}
    assert found.ready
    texts = {name: finding.found for name, finding in named(found).items()}
    assert "aarch64" in texts["machine"]
    assert "sm_121" in texts["GPU"]
    assert "shared with the GPU" in texts["memory"]
    assert "freezes the system" in texts["memory"]


def test_eight_gpus_are_all_proven_and_nothing_is_skipped_but_engines(folder):
    probes = Simulated(folder)
    found = examine(folder, probes)
    assert other_than_ok(found) == {"engines": "skipped"}
    assert probes.proven == ["mamba-ssm", "causal-conv1d", "flex-attention", "nccl"]
    assert "8 GPU" in named(found)["GPU"].found


def test_without_a_gpu_what_needs_one_is_skipped_with_the_reason(folder):
    probes = processor_only(folder)
    found = examine(folder, probes)
    needs_one = {"GPU", "architecture", "allocator", "mamba-ssm", "causal-conv1d", "FlexAttention", "NCCL"}
    assert other_than_ok(found) == dict.fromkeys([*needs_one, "engines"], "skipped")
    assert all("GPU" in named(found)[name].found for name in needs_one)
    assert found.ready
    assert probes.proven == []


# --- kernels: proven, not only imported ---


def right_scan(x, dt, a, b, c, *, chunk_size, D, dt_bias, dt_softplus, return_final_states):
    """The project's own block form, which is not the loop over time that kernels are compared with."""
    dt = F.softplus(dt.float() + dt_bias)
    decay = (dt * a).double().cumsum(1)
    heads, width, state = x.shape[2], x.shape[3], b.shape[3]
    y = scan_block(x.float(), dt, decay, b.float(), c.float(), D, torch.zeros(len(x), heads, width, state))
    weighted = x.double() * (dt * torch.exp(decay[:, -1:] - decay))[..., None]
    final = torch.einsum("bthp,bthn->bhpn", weighted, b.double().repeat_interleave(heads // b.shape[2], 2))
    return y.to(x.dtype), final.float()


def right_update(state, x, dt, a, b, c, *, D, dt_bias, dt_softplus):
    step = F.softplus(dt.float() + dt_bias)
    b, c = (part.float().repeat_interleave(x.shape[1] // part.shape[1], 1)[:, :, None] for part in (b, c))
    state.mul_(torch.exp(a * step[..., None])).add_((step * x.float())[..., None] * b)
    return ((state * c).sum(-1) + D * x.float()).to(x.dtype)


def right_convolution(x, weight, bias, activation):
    padded = F.pad(x.float(), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.float()[:, None], bias.float(), groups=len(weight))).to(x.dtype)


def right_convolution_update(x, window, weight, bias, activation):
    window.copy_(torch.cat((window[:, :, 1:], x[:, :, None]), dim=2))
    return F.silu((window.float() * weight.float()).sum(-1) + bias.float()).to(x.dtype)


def off_in_one_head(scan):
    def wrong(x, *inputs, **options):
        y, final = scan(x, *inputs, **options)
        y[:, 70:, 1] *= 1.1
        return y, final

    return wrong


def test_right_kernels_are_proven():
    assert gpu_proofs.mamba_ssm(right_scan, right_update, "cpu").passed
    assert gpu_proofs.causal_conv1d(right_convolution, right_convolution_update, "cpu").passed
    assert gpu_proofs.flex_attention("cpu").passed


def test_wrong_numbers_of_any_kernel_are_seen():
    def stale(state, *inputs, **options):  # the right output, and a state that is not advanced
        return right_update(state.clone(), *inputs, **options)

    def not_a_number(x, *rest, **options):
        return torch.full_like(right_convolution(x, *rest, **options), torch.nan)

    def without_bias(x, window, weight, bias, activation):
        return right_convolution_update(x, window, weight, bias * 0, activation)

    def wrong_in_bf16(x, weight, bias, activation):
        return right_convolution(x, weight, bias, activation) * (0.9 if x.dtype == torch.bfloat16 else 1)

    assert not gpu_proofs.mamba_ssm(off_in_one_head(right_scan), right_update, "cpu").passed
    assert not gpu_proofs.mamba_ssm(right_scan, stale, "cpu").passed
    assert not gpu_proofs.causal_conv1d(not_a_number, right_convolution_update, "cpu").passed
    assert not gpu_proofs.causal_conv1d(right_convolution, without_bias, "cpu").passed
    wrong = gpu_proofs.causal_conv1d(wrong_in_bf16, right_convolution_update, "cpu")
    assert not wrong.passed
    assert "bfloat16" in wrong.what


def test_flex_attention_with_wrong_numbers_is_seen(monkeypatch):
    real = gpu_proofs.block_attention

    def wrong(anchors, context, block, kind, sight):
        return real(anchors + (kind == "flex"), context, block, kind, sight)

    monkeypatch.setattr(gpu_proofs, "block_attention", wrong)
    assert not gpu_proofs.flex_attention("cpu").passed


def test_wrong_binaries_on_a_spark_are_a_fault_with_the_build_that_mends_it(folder):
    kernels = {
        "mamba-ssm": lambda: gpu_proofs.mamba_ssm(off_in_one_head(right_scan), right_update, "cpu"),
        "causal-conv1d": lambda: gpu_proofs.causal_conv1d(right_convolution, right_convolution_update, "cpu"),
    }
    found = examine(folder, spark(folder, kernels=kernels))
    assert not found.ready
    fault = named(found)["mamba-ssm"]
    assert fault.state == "fault"
    assert "wrong numbers" in fault.found
    assert "TORCH_CUDA_ARCH_LIST=12.0+PTX MAMBA_FORCE_BUILD=TRUE" in fault.mend
    assert "--no-build-isolation --no-deps" in fault.mend
    assert named(found)["causal-conv1d"].state == "ok"


def test_kernels_that_crash_are_a_fault_and_those_not_installed_a_warning(folder):
    def crash():
        raise EnvironmentFault("ImportError: undefined symbol: _ZN3c10", "")

    probes = Simulated(folder, kernels={"mamba-ssm": crash})
    del probes.packages["causal-conv1d"]
    found = named(examine(folder, probes))
    assert found["mamba-ssm"].state == "fault"
    assert "undefined symbol" in found["mamba-ssm"].found
    assert "TORCH_CUDA_ARCH_LIST=9.0 " in found["mamba-ssm"].mend
    assert found["causal-conv1d"].state == "warning"
    assert "CAUSAL_CONV1D_FORCE_BUILD=TRUE" in found["causal-conv1d"].mend


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("ptxas fatal: Value 'sm_121a' is not defined for option 'gpu-name'", "TRITON_PTXAS_PATH"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("CUDA error: an illegal memory access was encountered", "train.attention=dense"),
    ],
)
def test_a_flex_attention_that_does_not_compile_gets_the_cure_of_its_error(folder, said, mend):
    def fail():
        raise EnvironmentFault(said, "")

    found = named(examine(folder, spark(folder, kernels={"flex-attention": fail})))["FlexAttention"]
    assert (found.state, mend in found.mend) == ("fault", True)


def installed_module(folder, monkeypatch, name, text):
    """A module that processes started from here import, and no GPU in them."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_the_installed_kernels_are_proven_in_a_process_of_their_own(folder, monkeypatch):
    text = "def causal_conv1d_fn(x, *rest, **options): return x\ndef causal_conv1d_update(x, *rest): return x\n"
    installed_module(folder, monkeypatch, "causal_conv1d", text)
    proof = Probes(folder).prove("causal-conv1d")
    assert proof.error > 0.5
    assert not proof.passed


def test_a_kernel_that_ends_its_process_does_not_end_the_command(folder, monkeypatch):
    installed_module(folder, monkeypatch, "causal_conv1d", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(EnvironmentFault) as raised:
        Probes(folder).prove("causal-conv1d")
    assert raised.value.what == "ended by signal 11"


def test_a_package_that_does_not_import_is_told_by_its_error(folder, monkeypatch):
    installed_module(folder, monkeypatch, "mamba_ssm", "raise ImportError('undefined symbol: _ZN3c10')")
    with pytest.raises(EnvironmentFault) as raised:
        Probes(folder).prove("mamba-ssm")
    assert raised.value.what == "ImportError: undefined symbol: _ZN3c10"


# --- torch, driver, memory ---


@pytest.mark.parametrize(
    ("build", "driver", "state", "mend"),
    [
        (Torch("2.13.0+cpu", None, (), ()), "580.95", "fault", "whl/cu130"),
        (Torch("2.13.0+cu130", "13.0", (), (), "driver too old"), "550.54", "fault", "whl/cu126"),
        (Torch("2.13.0+cu130", "13.0", (), (), "CUDA unknown error"), "580.95", "fault", "nvidia-modprobe"),
        (Torch("2.13.0+cpu", None, (), ()), None, "skipped", None),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_a_fault(folder, build, driver, state, mend):
    found = named(examine(folder, Simulated(folder, build=build, driver_version=driver)))["GPU"]
    assert found.state == state
    assert found.mend is None if mend is None else mend in found.mend


@pytest.mark.parametrize(
    ("architectures", "state"),
    [
        (("sm_90", "sm_120"), "ok"),  # a binary of an earlier minor
        (("sm_90", "compute_90"), "ok"),  # PTX
        (("sm_90", "sm_100"), "fault"),
        (("sm_90", "sm_120a", "compute_120a"), "fault"),  # for that very chip
        (("sm_120f",), "ok"),
    ],
)
def test_torch_must_carry_kernels_for_the_gpu(folder, architectures, state):
    probes = spark(folder)
    probes.build = dataclasses.replace(probes.build, architectures=architectures)
    assert named(examine(folder, probes))["architecture"].state == state


def test_a_unified_memory_full_of_files_is_a_warning_with_the_command_that_empties_it(folder):
    memory = {"MemTotal": 119 * GIB, "MemFree": 3 * GIB, "MemAvailable": 100 * GIB}
    found = named(examine(folder, spark(folder, meminfo=memory)))["memory"]
    assert found.state == "warning"
    assert "drop_caches" in found.mend
    assert "compact_memory" in found.mend
    assert named(examine(folder, Simulated(folder, meminfo=memory)))["memory"].state == "ok"  # not unified


def test_a_unified_memory_that_programs_hold_is_a_warning_of_its_own(folder):
    memory = {"MemTotal": 119 * GIB, "MemFree": 3 * GIB, "MemAvailable": 20 * GIB}
    found = named(examine(folder, spark(folder, meminfo=memory)))["memory"]
    assert found.state == "warning"
    assert found.mend.startswith("ps ")


def test_expandable_segments_are_warned_of_on_a_unified_memory_only(folder):
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64, expandable_segments: True"}
    found = named(examine(folder, spark(folder, variables=variables)))["allocator"]
    assert found.state == "warning"
    assert found.mend == "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
    assert named(examine(folder, Simulated(folder, variables=variables)))["allocator"].state == "ok"


# --- packages, disk, ports, login, engines ---


@pytest.mark.parametrize("version", ["2.8.0+cu129", None])
def test_a_torch_too_old_or_missing_is_a_fault_with_the_upgrade(folder, version):
    probes = processor_only(folder)
    probes.packages["torch"] = version
    found = named(examine(folder, probes))["versions"]
    assert found.state == "fault"
    assert f"torch {version} is too old" in found.found or "torch is missing" in found.found
    assert found.mend.endswith("-m pip install 'torch>=2.9'")


def test_packages_of_extras_may_be_missing_but_not_old(folder):
    probes = processor_only(folder)
    assert named(examine(folder, probes))["versions"].state == "ok"
    probes.packages["openai"] = "1.99.9"
    found = named(examine(folder, probes))["versions"]
    assert (found.state, found.found) == ("fault", "openai 1.99.9 is too old")


def test_a_build_of_nvidia_from_before_a_release_counts_as_the_release(folder):
    probes = processor_only(folder)
    probes.packages["torch"] = "2.9.0a0+nv25.10"
    assert named(examine(folder, probes))["versions"].state == "ok"


def test_versions_that_the_tests_did_not_run_with_are_named_and_a_major_one_is_a_warning(folder):
    probes = processor_only(folder)
    assert "tests" not in named(examine(folder, probes))["versions"].found
    probes.packages["transformers"] = "5.30.1"
    found = named(examine(folder, probes))["versions"]
    assert found.state == "ok"
    assert found.found.endswith("transformers 5.30.1; the tests ran with transformers==5.23.0")
    probes.packages["transformers"] = "6.0.0"
    found = named(examine(folder, probes))["versions"]
    assert (found.state, found.mend) == ("warning", f"{sys.executable} -m pip install transformers==5.23.0")


def test_the_versions_of_the_tests_are_those_of_the_constraints(folder):
    assert Probes(folder).tested()["huggingface-hub"][0].isdigit()


def test_a_folder_that_was_never_installed_is_a_warning(folder):
    probes = processor_only(folder)

    def not_installed():
        raise importlib.metadata.PackageNotFoundError("nemotron-dspark")

    probes.requirements = not_installed
    found = named(examine(folder, probes))["versions"]
    assert found.state == "warning"
    assert found.mend.endswith("install -e .")


def test_no_disk_left_is_a_fault_and_nothing_is_written_to_it(folder):
    probes = processor_only(folder, free=2e9)
    probes.disk_speed = lambda size: pytest.fail("written to a full disk")
    found = named(examine(folder, probes))["disk"]
    assert found.state == "fault"
    assert "2 GB free" in found.found
    assert "--folder" in found.mend


@pytest.mark.parametrize(("free", "speed"), [(30e9, (3e9, 6e9)), (3e12, (2e8, 6e9)), (3e12, (3e9, 2e8))])
def test_a_small_or_slow_disk_is_a_warning(folder, free, speed):
    assert named(examine(folder, processor_only(folder, free=free, speed=speed)))["disk"].state == "warning"


def test_the_disk_is_measured_and_left_as_it_was(folder):
    written, read = Probes(folder).disk_speed(16_000_000)
    assert written > 0
    assert read > 0
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_fault_of_the_disk(folder):
    probes = processor_only(folder)

    def refuse(size):
        raise PermissionError(13, "Permission denied")

    probes.disk_speed = refuse
    found = named(examine(folder, probes))["disk"]
    assert found.state == "fault"
    assert "Permission denied" in found.found
    assert "--folder" in found.mend


def test_a_port_in_use_is_a_warning_with_another(folder):
    found = named(examine(folder, processor_only(folder, taken=(8000,))))["ports"]
    assert (found.state, found.found, found.mend) == ("warning", "in use: 8000", "nds serve --port 8001 ...")


def test_a_port_that_a_server_holds_is_seen(folder):
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not Probes(folder).port_is_free(port)
    assert Probes(folder).port_is_free(port)


def test_login_and_engines_are_told(folder):
    probes = processor_only(folder, token=False, paths={"llama-server": "/usr/local/bin/llama-server"})
    probes.packages["vllm"] = "0.28.0"
    found = named(examine(folder, probes))
    assert (found["hub login"].state, found["hub login"].mend) == ("warning", "hf auth login")
    assert found["engines"].found == "vllm 0.28.0, /usr/local/bin/llama-server"


# --- the report and the command ---


def test_a_check_that_raises_is_a_fault_and_the_others_go_on(folder):
    probes = processor_only(folder)

    def broken():
        raise RuntimeError("no such ioctl\nand more")

    probes.memory = broken
    found = examine(folder, probes)
    assert named(found)["memory"].state == "fault"
    assert named(found)["memory"].found == "the check itself failed: RuntimeError: no such ioctl"
    assert named(found)["engines"].state == "skipped"


def test_a_torch_that_does_not_import_is_a_finding(folder):
    code = "import sys; sys.modules['torch'] = None\nfrom nemotron_dspark.recipe.doctor import examine\n"
    code += "print(*(f'{f.name}: {f.state}: {f.found}' for f in examine(sys.argv[1]).findings), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert re.search(r"^GPU: fault: .*torch", done.stdout, re.MULTILINE)
    assert re.search(r"^disk: (ok|warning): ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("make", [spark, Simulated, processor_only])
def test_the_json_is_complete_and_every_warning_and_fault_has_a_command(folder, make):
    troubled = make(folder, free=1e9, taken=(8000, 29500), token=False, packages={})
    found = json.loads(json.dumps(examine(folder, troubled).to_json()))
    assert found["ready"] is False
    assert [each["name"] for each in found["findings"]] == list(doctor.CHECKS)
    for each in found["findings"]:
        assert each.keys() == {"name", "state", "found", "mend"}
        assert each["found"]
        assert bool(each["mend"]) == (each["state"] in ("warning", "fault"))


@pytest.fixture
def nds(monkeypatch):
    """Run `nds doctor` with ``arguments`` on the machine of ``probes``."""
    app = typer.Typer()
    app.callback()(lambda: None)
    doctor_command.register(app)

    def run(probes, *arguments):
        monkeypatch.setattr(doctor, "Probes", lambda folder: probes)
        return CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)

    monkeypatch.setattr(shell.out, "_width", 60)
    return run


def test_a_fault_exits_1_and_its_command_is_printed_in_one_line(nds, folder):
    result = nds(spark(folder, kernels={"causal-conv1d": lambda: KernelProof("it", float("nan"), 1e-2)}))
    assert result.exit_code == 1
    assert "1 fault." in result.stdout
    (mend,) = (line for line in result.stdout.splitlines() if "TORCH_CUDA_ARCH_LIST" in line)
    assert mend.endswith("git+https://github.com/Dao-AILab/causal-conv1d")


def test_without_faults_it_exits_0(nds, folder):
    result = nds(processor_only(folder, token=False))
    assert result.exit_code == 0
    assert "No faults." in result.stdout
    assert "hf auth login" in result.stdout


def test_the_command_runs_on_this_machine(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": ""}
    command = [sys.executable, "-m", "nemotron_dspark", "doctor", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["ready"] else 1), done.stderr
    assert [each["name"] for each in found["findings"]] == list(doctor.CHECKS)
    assert not [each for each in found["findings"] if "the check itself failed" in each["found"]]
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.glob(".nds-doctor-*"))
