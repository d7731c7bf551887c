"""The examples for clusters, as far as a dry run goes: bash's and YAML's own reading, and stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml

CLUSTERS = Path(__file__).parents[1] / "docs" / "clusters"


def test_the_batch_script_starts_every_rank_with_the_words_it_is_given(tmp_path: Path) -> None:
    """Stand-ins note their words; blanks and dollars in an override arrive as they are."""
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "activate").touch()
    noted = tmp_path / "noted"
    for name, body in {"scontrol": "printf 'node-a\\nnode-b\\n'", "srun": f'printf "%s\\n" "$@" > {noted}'}.items():
        path = bin_folder / name
        path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        path.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }  # fmt: skip
    words = ["my recipe.yaml", "train.run_name=a $HOME"]
    script = CLUSTERS / "slurm.sbatch"
    subprocess.run(["bash", str(script), *words], cwd=tmp_path, env=environment, check=True)
    assert noted.read_text().splitlines() == [
        "--kill-on-bad-exit=1", "torchrun", "--nnodes=2", "--nproc-per-node=4", "--rdzv-id=77", "--rdzv-backend=c10d",
        "--rdzv-endpoint=node-a:29500", "-m", "dsfreeze", "train", *words, "train.resume_from_checkpoint=auto",
    ]  # fmt: skip
    options = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in options
    assert any(option.startswith("#SBATCH --signal=B:TERM@") for option in options)


def test_the_job_is_one_that_finds_itself() -> None:
    """The endpoint is pod 0's name: JOB-0.SERVICE, where the service selects the job's pods and the pods are of its subdomain."""
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    options = dict(word.removeprefix("--").split("=", 1) for word in container["command"] if word.startswith("--"))
    assert options["rdzv-endpoint"].partition(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert int(options["nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
