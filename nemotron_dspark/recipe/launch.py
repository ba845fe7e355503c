"""Where a recipe runs: the job's files for torchrun, Slurm, SkyPilot or Docker, and the command that submits them.

`launch/run.sh` is what every node of torchrun and Slurm does; the other file is what the scheduler reads. Neither
knows what was done before: a job that was preempted starts the same commands again, and these go on by themselves. On
several nodes the first one makes answers, all build the cache and train together (torchrun, the same engine as on one),
and the first one ends the recipe. The others wait until its rendezvous port is open.
"""

import dataclasses
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from nemotron_dspark import files
from nemotron_dspark.config import TrainConfig
from nemotron_dspark.config.recipe import Recipe
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.recipe.doctor import SOURCES
from nemotron_dspark.recipe.dry_run import RecipePlan, dry_run
from nemotron_dspark.recipe.work import cache_options, train_options
from nemotron_dspark.training.schedule import most_processes

Place = Literal["torchrun", "slurm", "skypilot", "docker"]
FOLDER = "launch"
_PORT = 29500  # torchrun's own default; every further stage takes the next one
_GRACE = 120  # seconds before a job's time is over, to save and ask for more
_ACCELERATORS = {"h100x8": "H100:8", "h200": "H200:1"}  # SkyPilot's names of the plan's machines
_BUCKET = "~/nds"  # where SkyPilot mounts what outlives a machine
_BASE_IMAGE = "nvidia/cuda:13.0.2-devel-ubuntu24.04"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A job: its files, and what starts it."""

    on: Place
    files: tuple[Path, ...]
    commands: tuple[tuple[str, ...], ...]  # one after the other
    remarks: tuple[str, ...]
    submitted: bool = False
    said: str = ""  # what the last command printed

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self) | {"files": [str(path) for path in self.files]}
        return values | {"commands": [shlex.join(command) for command in self.commands]}


def launch(
    recipe: Recipe,
    file: Path,
    on: Place,
    *,
    nodes: int = 1,
    submit: bool = False,
    package: str = "nemotron-dspark",
    accelerators: str | None = None,
    sbatch: Sequence[str] = (),
) -> Launch:
    """Write the files that run ``recipe``, which lies in ``file``, to the folder `launch`, and perhaps submit them.

    Args:
        package: what pip installs where nothing is installed: a wheel, a URL, or a name on an index.
        accelerators: of each machine, as SkyPilot spells them; None: those of the recipe's ``machine``.
        sbatch: more options of Slurm, such as ``--partition=gpu``.

    Raises:
        InputError: the recipe cannot run there on so many nodes.
        EnvironmentFault: the scheduler's command is missing or refuses.
    """
    plan = dry_run(recipe)
    job = _Job(recipe, file, nodes, plan)
    job.check(on)
    written = {"run.sh": job.script()} if on in ("torchrun", "slurm") else {}
    accelerators = accelerators or _ACCELERATORS.get(recipe.machine)
    commands: list[list[str]] = []
    if on == "slurm":
        written["job.sbatch"] = job.slurm(sbatch)
        commands = [["sbatch", f"{FOLDER}/job.sbatch"]]
    elif on == "skypilot":
        written["sky.yaml"] = job.skypilot(package, accelerators)
        commands = [["sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, f"{FOLDER}/sky.yaml"]]
    elif on == "docker":
        written["Dockerfile"] = _dockerfile(package)
        mounts = ["--volume", f"{Path.cwd()}:/work", "--volume", "nds-hub:/root/.cache/huggingface"]
        run = ["docker", "run", "--rm", "--gpus", "all", "--ipc", "host", *mounts, "nds"]
        commands = [["docker", "build", "--tag", "nds", "--file", f"{FOLDER}/Dockerfile", "."]]
        commands += [[*run, "recipe", "run", str(file)]]
    elif nodes == 1:
        commands = [["bash", f"{FOLDER}/run.sh"]]
    else:
        commands = [["env", "HEAD=…", f"NODE={node}", "bash", f"{FOLDER}/run.sh"] for node in range(nodes)]
    for name, text in written.items():
        files.write_text(Path(FOLDER) / name, text)
    paths = tuple(Path(FOLDER) / name for name in written)
    made = Launch(on, paths, tuple(map(tuple, commands)), tuple(job.remarks(on, package, accelerators)))
    return _submit(made, nodes) if submit else made


class _Job:
    """A recipe on a number of nodes."""

    def __init__(self, recipe: Recipe, file: Path, nodes: int, plan: RecipePlan):
        self.recipe, self.file, self.nodes, self.plan = recipe, file, nodes, plan
        self.gpus = recipe.gpus or plan.machine.gpus  # of each node
        self.name = "nds-" + "".join(c if c.isalnum() else "-" for c in Path(recipe.target[0]).name.lower())[:40]

    def check(self, on: Place) -> None:
        if self.nodes == 1:
            return
        if on not in ("torchrun", "slurm"):
            raise InputError(
                f"On {on} a recipe runs on one node: the others would not see what the first one writes.",
                "Take one node with more GPUs, or --on slurm, whose nodes share a folder.",
            )

    def remarks(self, on: Place, package: str, accelerators: str | None) -> list[str]:
        found = list(self.plan.problems)
        if not (self.gpus or accelerators or on == "docker"):
            found.append(f"No GPU is asked for: {self.plan.machine.title} has none. Set machine or gpus in the recipe.")
        if on in ("skypilot", "docker") and package == "nemotron-dspark":
            found.append("The package is on no index yet: `python -m build --wheel`, then --package dist/….whl.")
        local = [text for text in (*self.recipe.target, *self.recipe.asked) if Path(text).is_absolute()]
        if on in ("skypilot", "docker") and local:
            found.append(f"{', '.join(local)}: put it below this folder, which goes along; nothing else does.")
        return found

    @property
    def command(self) -> str:
        """All of it, on one node."""
        return f"nds recipe run {shlex.quote(str(self.file))}"

    def script(self) -> str:
        """What each node does, in this environment: its machine sees this one's folders."""
        lines = [
            "#!/usr/bin/env bash",
            "# Written by `nds launch`. Every command goes on where it ended.",
            "set -euo pipefail",
        ]
        lines += _activated()
        if self.nodes == 1:
            return "\n".join([*lines, f'exec {self.command} "$@"', ""])
        lines += [
            f"# Runs on each of {self.nodes} nodes, which share this folder: NODE=0, 1, … and HEAD=<host of node 0>.",
            ': "${HEAD:?the host of the first node}" "${NODE:?the number of this node}"',
            'child=; run() { "$@" & child=$!; wait "$child"; }',
            """trap '[ -z "$child" ] || { kill -TERM "$child"; wait "$child"; } || true; exit 143' TERM""",
            f'if [ "$NODE" = 0 ]; then run {self.command} --until answers; fi',
        ]
        for number, (processes, words) in enumerate(self._together()):
            port = _PORT + number
            lines += [
                f'if [ "$NODE" != 0 ]; then until (: > "/dev/tcp/$HEAD/{port}") 2> /dev/null; do sleep 5; done; fi',
                f'run torchrun --nnodes {self.nodes} --nproc-per-node {processes} --node-rank "$NODE" \\',
                f'    --master-addr "$HEAD" --master-port {port} -m nemotron_dspark {shlex.join(words)}',
            ]
        return "\n".join([*lines, f'if [ "$NODE" = 0 ]; then run {self.command}; fi', ""])

    def _together(self) -> Iterator[tuple[int, list[str]]]:
        """What all nodes do together: processes of each, and the command's words."""
        built: set[str] = set()
        for draft in self.plan.drafts:
            cache = draft.get("cache")
            if cache is not None and cache.name not in built:
                built.add(cache.name)
                yield 1, ["cache", "build", *cache_options(cache, draft.run, self.recipe)]
        for draft in self.plan.drafts:
            yield self._processes(draft.run.config.train), ["train", *train_options(draft.run, self.recipe)]

    def _processes(self, config: TrainConfig) -> int:
        if not (found := most_processes(config, self.gpus, self.nodes)):
            raise InputError(
                f"train.global_batch_size={config.global_batch_size} cannot be dealt out to {self.nodes} nodes.",
                f"Set it to a multiple of {self.nodes * config.local_batch_size}, or take another number of nodes.",
            )
        return found

    def slurm(self, options: Sequence[str]) -> str:
        hours = max(1, math.ceil(1.5 * self.plan.total_hours))  # the plan's are estimates; what is over goes on anyway
        wanted = [
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            *([f"--gpus-per-node={self.gpus}"] if self.gpus else []),
            f"--time={hours}:00:00",
            f"--output={FOLDER}/slurm-%j.log",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:USR1@{_GRACE}",
            *options,
        ]
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in wanted)]
        lines += [
            "# Written by `nds launch`. Preempted, or out of time, the job is put back and goes on where it ended.",
            "set -euo pipefail",
            f"cd {shlex.quote(str(Path.cwd()))}",
            'HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export HEAD",
            "trap 'kill -TERM \"$step\"' USR1 TERM  # the steps save, and end with 130 or 143",
            f"srun --kill-on-bad-exit=1 bash -c 'NODE=$SLURM_NODEID exec bash {FOLDER}/run.sh' &",
            "step=$!",
            'code=0; wait "$step" || code=$?',
            "# A signal ends the wait, not the step.",
            'while kill -0 "$step" 2> /dev/null; do code=0; wait "$step" || code=$?; done',
            'if [ "$code" = 130 ] || [ "$code" = 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
            'exit "$code"',
        ]
        return "\n".join([*lines, ""])

    def skypilot(self, package: str, accelerators: str | None) -> str:
        wheel = Path(package).is_file()
        source = f"~/{Path(package).name}" if wheel else package
        disk = max(256, math.ceil(1.2 * self.plan.missing / 1e9) + 100)  # 100 for the system and the environment
        task = {
            "name": self.name,
            "resources": {
                **({"accelerators": accelerators} if accelerators else {}),
                "use_spot": True,
                "disk_size": disk,
                "any_of": [{"infra": cloud} for cloud in ("aws", "gcp", "azure")],
                "job_recovery": {"max_restarts_on_errors": 3},
            },
            "workdir": ".",
            "file_mounts": {
                **({source: package} if wheel else {}),
                _BUCKET: {"name": f"{self.name}-{os.environ.get('USER', 'nds')}".lower(), "mode": "MOUNT_CACHED"},
            },
            "setup": f"python3 -m venv ~/env && ~/env/bin/pip install {source}[all]",
            "run": f"PATH=~/env/bin:$PATH {self.command} --out {_BUCKET}",
        }
        head = (
            "# Written by `nds launch`: spot machines of several clouds. A preempted one is replaced, and the job\n"
            f"# goes on with what the bucket at {_BUCKET} holds. Disk in GB, from the plan.\n"
        )
        return head + yaml.safe_dump(task, sort_keys=False, width=120)


def _activated() -> list[str]:
    """The line that gives the script this environment, where it is a virtual one."""
    if sys.prefix == sys.base_prefix:
        return []
    folder = shlex.quote(str(Path(sys.prefix) / "bin"))
    return [f'if [ -d {folder} ]; then PATH={folder}:"$PATH"; fi']


def _dockerfile(package: str) -> str:
    wheel = Path(package).is_file()
    source = f"/tmp/{Path(package).name}" if wheel else package
    needs = " ".join(dict.fromkeys(word for needed, _, _ in SOURCES.values() for word in needed.split()))
    forced = " ".join(f"{force}=TRUE" for _, force, _ in SOURCES.values())
    kernels = " ".join(f"git+https://github.com/{repository}" for _, _, repository in SOURCES.values())
    return f"""\
# Written by `nds launch --on docker`, for x86_64 and for DGX Spark (aarch64). It was never built by this project; prove
# what comes out with: docker run --rm --gpus all nds doctor
FROM {_BASE_IMAGE}
ARG TARGETARCH
RUN apt-get update && apt-get install -y --no-install-recommends git python3-dev python3-venv \\
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/nds
ENV PATH=/opt/nds/bin:$PATH
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cu130
{f"COPY {package} {source}" if wheel else "# With a wheel of your own: nds launch --package dist/….whl"}
RUN pip install --no-cache-dir "{source}[all]" {needs} packaging setuptools wheel
# Kernels of Mamba layers, from source: there are no wheels for CUDA 13, and none for a Spark's sm_121 at all.
RUN if [ "$TARGETARCH" = arm64 ]; then list="12.0+PTX"; else list="8.0;9.0;10.0+PTX;12.0+PTX"; fi \\
    && TORCH_CUDA_ARCH_LIST="$list" {forced} \\
    pip install --no-cache-dir --no-build-isolation --no-deps {kernels}
WORKDIR /work
ENTRYPOINT ["nds"]
"""


def _submit(job: Launch, nodes: int) -> Launch:
    if job.on == "torchrun" and nodes > 1:
        raise InputError(
            "torchrun has nothing to submit to: it is started on each node.",
            f"Run {FOLDER}/run.sh on them as its first lines say, or use --on slurm.",
        )
    said = ""
    for command in job.commands:
        program = shutil.which(command[0])
        if program is None:
            raise EnvironmentFault(
                f"There is no {command[0]} here.",
                f"Copy {FOLDER}/ to where there is one, and run: {shlex.join(command)}",
            )
        capture = subprocess.PIPE if job.on in ("slurm", "skypilot") else None
        ended = subprocess.run([program, *command[1:]], stdout=capture, text=True, check=False)
        if ended.returncode:
            raise EnvironmentFault(
                f"{command[0]} ended with exit code {ended.returncode}.",
                "What it said stands above; correct that, and submit again.",
            )
        said = (ended.stdout or "").strip()
    return dataclasses.replace(job, submitted=True, said=said)
