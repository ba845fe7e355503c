"""What `nds doctor` reads of this machine, a method for each thing; tests put another object in its place.

torch is imported inside, so that a torch that does not import is a finding too.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemotron_dspark.errors import EnvironmentFault, first_line
from nemotron_dspark.memory import is_unified, meminfo
from nemotron_dspark.resources import tested_versions

PROOF_SECONDS = 300  # the first call of a Triton kernel compiles it
_PIECE = 8_000_000


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]  # (12, 1) is sm_121
    memory: int  # bytes, as CUDA tells
    unified: bool  # shares the processor's memory


@dataclasses.dataclass(frozen=True)
class Torch:
    version: str
    cuda: str | None  # that it was built with; None: a CPU build
    architectures: tuple[str, ...]  # that its kernels were built for: sm_90, compute_120, …
    gpus: tuple[Gpu, ...]
    fault: str | None = None  # why CUDA does not start, where it should


@dataclasses.dataclass(frozen=True)
class KernelProof:
    """How far a kernel was from plain PyTorch: the relative error of the dtype that came nearest to its tolerance."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Probes:
    """The real machine; disk checks are of the disk that ``folder`` lies on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def platform(self) -> tuple[str, str, int, str]:
        """Architecture (x86_64, aarch64), system, processor cores, version of Python."""
        system = f"{platform.system()} {platform.release()}"
        return platform.machine(), system, os.cpu_count() or 1, platform.python_version()

    def driver(self) -> str | None:
        """Version of NVIDIA's driver; None without `nvidia-smi` or where it fails."""
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None

    def torch(self) -> Torch:
        import torch

        fault, gpus = None, ()
        if torch.version.cuda:
            try:
                torch.cuda.init()
                devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
                gpus = tuple(
                    Gpu(its.name, (its.major, its.minor), its.total_memory, is_unified(its)) for its in devices
                )
            except (RuntimeError, AssertionError) as error:
                fault = first_line(error)
        architectures = tuple(torch.cuda.get_arch_list()) if gpus else ()
        return Torch(torch.__version__, torch.version.cuda, architectures, gpus, fault)

    def memory(self) -> dict[str, int]:
        """`/proc/meminfo`, in bytes; empty where there is none."""
        return meminfo()

    def environment(self, name: str) -> str:
        return os.environ.get(name, "")

    def free_disk(self) -> int:
        """Bytes that a user may write where the folder lies."""
        return shutil.disk_usage(self.folder).free

    def disk_speed(self, size: int) -> tuple[float, float]:
        """Bytes a second to write and flush a file of ``size`` bytes, and to read it from the disk. Removes it."""
        piece = os.urandom(_PIECE)  # a disk may compress zeros
        with tempfile.TemporaryFile(dir=self.folder, prefix=".nds-doctor-", buffering=0) as file:
            started = time.perf_counter()
            for _ in range(size // _PIECE):
                file.write(piece)
            os.fsync(file.fileno())
            written = time.perf_counter() - started
            if hasattr(os, "posix_fadvise"):  # or the page cache would be read
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(_PIECE):
                pass
            return size / written, size / (time.perf_counter() - started)

    def requirements(self) -> list[str]:
        """What the installed package asks for, as ``name>=version; extra == 'x'``.

        Raises:
            PackageNotFoundError: it runs from a folder and was never installed.
        """
        return importlib.metadata.requires("nemotron-dspark") or []

    def tested(self) -> dict[str, str]:
        """What the tests ran with: version by package."""
        return tested_versions()

    def version(self, package: str) -> str | None:
        """Installed version; None without it."""
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def on_path(self, command: str) -> str | None:
        return shutil.which(command)

    def prove(self, name: str) -> KernelProof:
        """The proof ``name`` of `gpu_proofs`, in a process of its own; "nccl" in two.

        Raises:
            EnvironmentFault: it did not end well or in time; ``what`` is the last line that it said.
        """
        ranks = [["0"], ["1"]] if name == "nccl" else [[]]
        port = [str(_free_port())] if name == "nccl" else []
        command = [sys.executable, "-m", "nemotron_dspark.recipe.gpu_proofs", name]
        pipe = subprocess.PIPE
        running = [subprocess.Popen([*command, *rank, *port], stdout=pipe, stderr=pipe, text=True) for rank in ranks]
        try:
            said = [process.communicate(timeout=PROOF_SECONDS) for process in running]
        except subprocess.TimeoutExpired:
            raise EnvironmentFault(f"no end after {PROOF_SECONDS} s", "") from None
        finally:
            for process in running:
                process.kill()
                process.wait()
        for process, (_, errors) in zip(running, said, strict=True):
            if process.returncode:
                ending = f"ended by signal {-process.returncode}" if process.returncode < 0 else "failed"
                raise EnvironmentFault((errors.strip().splitlines() or [ending])[-1], "")
        return KernelProof(**json.loads(said[0][0].splitlines()[-1]))

    def port_is_free(self, port: int) -> bool:
        """Whether a server could listen on ``port`` of 127.0.0.1."""
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                return False
            return True

    def has_hub_token(self) -> bool:
        """Whether a login to the Hugging Face hub is stored here; the hub is not asked."""
        from huggingface_hub import get_token

        return get_token() is not None


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]
