"""A recipe as a job: what is written is valid, short, and goes on after a preemption by stand-ins of sbatch and sky."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner

from nemotron_dspark import cli
from nemotron_dspark.config.recipe import load_recipe
from nemotron_dspark.errors import EnvironmentFault, InputError
from nemotron_dspark.recipe.launch import Place, launch
from nemotron_dspark.recipe.run import run_recipe
from nemotron_dspark.recipe.work import RecipeProgress
from tests.recipe.test_recipe_run import write_recipe

# Each starts the job, ends it with a signal once there is a checkpoint, and starts it again.
SBATCH = """
import os, pathlib, signal, subprocess, sys, time
script = sys.argv[-1]
text = pathlib.Path(script).read_text()
assert "#SBATCH --requeue" in text
environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
with open("job.log", "a") as log:
    for attempt in range(9):
        job = subprocess.Popen(["bash", script], env=environment, stdout=log, stderr=log, start_new_session=True)
        while job.poll() is None and (attempt or not pathlib.Path(@MARK@).exists()):
            time.sleep(0.02)
        if not attempt:
            job.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: has it
        code = job.wait()
        log.write(f"attempt {attempt} ended with {code}\\n")
        log.flush()
        if not os.path.exists("requeued"):
            break
        os.remove("requeued")
print("Submitted batch job 7")
sys.exit(code)
"""
SRUN = 'while [[ "$1" == --* ]]; do shift; done; exec env SLURM_NODEID=0 "$@"'
SCONTROL = '[ "$1" = requeue ] && touch requeued || echo localhost'
SKY = """
import os, pathlib, signal, subprocess, sys, time, yaml
assert sys.argv[1:3] == ["jobs", "launch"]
task = yaml.safe_load(pathlib.Path(sys.argv[-1]).read_text())
with open("job.log", "a") as log:
    for attempt in range(2):
        command = ["bash", "-c", "set -e\\n" + task["run"]]
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        while job.poll() is None and (attempt or not pathlib.Path(os.path.expanduser(@MARK@)).exists()):
            time.sleep(0.02)
        if not attempt:
            os.killpg(job.pid, signal.SIGKILL)  # the machine is gone
        code = job.wait()
        log.write(f"attempt {attempt} ended with {code}\\n")
        log.flush()
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path, tiny_hybrid, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, tiny_hybrid)
    return tmp_path


@pytest.fixture
def programs(folder, monkeypatch):
    """Put programs on the PATH, and this package, under the names that the jobs call."""
    binaries = folder / "bin"
    binaries.mkdir()

    def put(name, text, interpreter="/bin/bash"):
        path = binaries / name
        path.write_text(f"#!{interpreter}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    root = str(Path(cli.__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr("nemotron_dspark.recipe.launch._activated", lambda: [])
    put("nds", f'exec "{sys.executable}" -m nemotron_dspark "$@"')
    put("torchrun", f'exec "{sys.executable}" -m torch.distributed.run "$@"')
    return put


def job_of(folder, on, **options):
    return launch(load_recipe(Path("recipe.yaml")), Path("recipe.yaml"), on, **options)


def finished(folder):
    return (folder / "report.html").is_file() and json.loads((folder / "recipe" / "state.json").read_text())


@pytest.mark.slow
def test_a_slurm_job_that_is_preempted_is_put_back_and_ends_the_recipe(folder, programs):
    programs("sbatch", SBATCH.replace("@MARK@", repr("answers/target.jsonl")), sys.executable)
    programs("srun", SRUN)
    programs("scontrol", SCONTROL)
    done = job_of(folder, "slurm", submit=True)
    assert done.said == "Submitted batch job 7"
    log = (folder / "job.log").read_text()
    assert "attempt 0 ended with 130" in log  # nds saved, and said so
    assert "attempt 1 ended with 0" in log
    assert finished(folder)


@pytest.mark.slow
def test_a_sky_job_whose_machine_is_killed_goes_on_from_its_bucket(folder, programs):
    programs("sky", SKY.replace("@MARK@", repr("~/nds/answers/target.jsonl")), sys.executable)
    job_of(folder, "skypilot", submit=True)
    log = (folder / "job.log").read_text()
    assert "attempt 0 ended with -9" in log
    assert "attempt 1 ended with 0" in log
    assert finished(folder / "home" / "nds")


@pytest.mark.slow
def test_nodes_build_and_train_together_through_torchrun(folder, programs):
    """The first and the last command of node 0 are run here, as they would in the job."""
    job_of(folder, "torchrun", nodes=2)
    run_recipe("recipe.yaml", until="answers")
    programs("nds", 'echo "$@" >> asked')
    nodes = [
        subprocess.Popen(["bash", "launch/run.sh"], env=os.environ | {"HEAD": "localhost", "NODE": str(node)})
        for node in range(2)
    ]
    assert [node.wait(timeout=480) for node in nodes] == [0, 0]
    assert (folder / "asked").read_text().splitlines() == [
        "recipe run recipe.yaml --until answers",
        "recipe run recipe.yaml",
    ]
    seen = RecipeProgress()
    seen.note = lambda text: notes.append(text)
    notes = []
    run_recipe("recipe.yaml", progress=seen)
    assert finished(folder)
    assert "2 steps" in " ".join(notes)


def scripts_of(job):
    return [path for path in job.files if path.suffix in (".sh", ".sbatch")]


@pytest.mark.parametrize("on", get_args(Place))
def test_what_is_written_is_short_and_its_scripts_parse(folder, on):
    job = job_of(folder, on)
    assert all(len(path.read_text().splitlines()) <= 40 for path in job.files)
    for script in scripts_of(job):
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert job.commands


def test_two_nodes_of_slurm_share_a_script(folder):
    job = job_of(folder, "slurm", nodes=2, sbatch=["--partition=gpu"])
    text = (folder / "launch" / "job.sbatch").read_text()
    for option in ("--nodes=2", "--ntasks-per-node=1", "--requeue", "--signal=B:USR1@120", "--partition=gpu"):
        assert f"#SBATCH {option}\n" in text
    run = (folder / "launch" / "run.sh").read_text()
    assert "torchrun --nnodes 2 --nproc-per-node 1" in run
    assert run.index("--until answers") < run.index("torchrun")
    assert run.index("-m nemotron_dspark cache build") < run.index("-m nemotron_dspark train")
    for script in scripts_of(job):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_sky_task_asks_for_spot_machines_of_several_clouds_with_the_plans_disk(folder):
    (folder / "nds.whl").write_text("")
    job_of(folder, "skypilot", package="nds.whl", accelerators="H100:8")
    task = yaml.safe_load((folder / "launch" / "sky.yaml").read_text())
    resources = task["resources"]
    assert (resources["accelerators"], resources["use_spot"], resources["disk_size"]) == ("H100:8", True, 256)
    assert len(resources["any_of"]) > 1
    assert task["file_mounts"]["~/nds.whl"] == "nds.whl"
    assert "nds.whl[all]" in task["setup"]
    assert task["run"].endswith("nds recipe run recipe.yaml --out ~/nds")


def test_a_sky_task_fits_skypilots_own_schema(folder):
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    job_of(folder, "skypilot", accelerators="H100:8")
    task = yaml.safe_load((folder / "launch" / "sky.yaml").read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    for mount in task["file_mounts"].values():
        jsonschema.validate(mount, schemas.get_storage_schema())


def test_an_image_is_built_for_both_architectures_with_kernels_from_source(folder):
    job = job_of(folder, "docker")
    text = (folder / "launch" / "Dockerfile").read_text()
    assert "FROM nvidia/cuda:13." in text
    assert "never built" in text
    for part in ("12.0+PTX", "state-spaces/mamba", "causal-conv1d"):
        assert part in text
    assert job.commands[0][:2] == ("docker", "build")
    assert "recipe.yaml" in job.commands[1]


def test_what_cannot_run_is_refused(folder, monkeypatch):
    for on in ("skypilot", "docker"):
        with pytest.raises(InputError, match="runs on one node"):
            job_of(folder, on, nodes=2)
    with pytest.raises(InputError, match="started on each node"):
        job_of(folder, "torchrun", nodes=2, submit=True)
    with pytest.raises(InputError, match="cannot be dealt out to 3 nodes"):
        job_of(folder, "slurm", nodes=3)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentFault, match="There is no sbatch here"):
        job_of(folder, "slurm", submit=True)


def test_the_command_says_what_was_written_and_what_to_run(folder):
    result = CliRunner().invoke(cli.app, ["launch", "recipe.yaml", "--on", "slurm"], catch_exceptions=False)
    assert "launch/job.sbatch" in result.stdout
    assert "sbatch launch/job.sbatch" in result.stdout
    found = CliRunner().invoke(cli.app, ["launch", "recipe.yaml", "--on", "docker", "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["commands"][0].startswith("docker build")
