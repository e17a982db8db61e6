"""What the launch scripts do when ranks die, fail, refuse, stop or are told to, with a stand-in for megaqad.

All jobs are submitted at once, each on a node of its own, so that the slowest (a real time limit, which Slurm counts in
whole minutes) costs what they all cost.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY

SCRIPT = str(REPOSITORY / "launch" / "slurm.sbatch")
STAND_IN = str(REPOSITORY / "tests" / "slurm" / "stand_in.sh")
OPTIONS = ("--partition=single", "--ntasks-per-node=4", "--gpus-per-node=4")


@dataclass(frozen=True)
class Job:
    id: str
    folder: Path
    submitted: float


class Jobs:
    """The jobs of this file, by the name of the stand-in's behaviour (and an ending where two share one)."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._jobs: dict[str, Job] = {}

    def submit(self, name: str, *options: str, **variables: str) -> None:
        folder = self._cluster.folder / name
        folder.mkdir()
        arguments = (*OPTIONS, f"--job-name={name}", *options, SCRIPT, name.partition("-")[0], str(folder))
        job_id = self._cluster.submit(*arguments, environment={"MEGAQAD": STAND_IN, **variables})
        self._jobs[name] = Job(job_id, folder, time.monotonic())

    def __getitem__(self, name: str) -> Job:
        return self._jobs[name]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, peaceful_job: str) -> Jobs:
    jobs = Jobs(cluster)
    jobs.submit("stops_when_told-time_limit", "--time=1", "--signal=B:USR1@45")
    jobs.submit("rank_dies")
    jobs.submit("always_fails", MAX_FAILURES="2")
    jobs.submit("refuses")
    jobs.submit("stops_when_told-signal")
    jobs.submit("stops_when_told-cancel")
    jobs.submit("always_stops", MAX_RESTARTS="1")
    jobs.submit("always_stops-no_requeue", "--no-requeue")
    return jobs


def wait_until_ready(cluster: Cluster, job: Job) -> None:
    """Until all four ranks have their signal handlers."""
    cluster.wait_for("the ranks to be ready", job.id, lambda _: len(list(job.folder.glob("ready.*"))) == 4)


def test_signal_saves_queues_again_and_finishes(cluster: Cluster, jobs: Jobs) -> None:
    job = jobs["stops_when_told-signal"]
    wait_until_ready(cluster, job)
    cluster.type("scancel", "--batch", "--signal=USR1", job.id)
    end = cluster.wait_for_end(job.id)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert (job.folder / "rank0").read_text() == "closed\n", "rank 0 was killed before it had closed its logs"
    assert not (cluster.folder / ".megaqad-slurm" / job.id).exists(), "a finished job leaves no state"


def test_cancelled_job_saves_and_stays_away(cluster: Cluster, jobs: Jobs) -> None:
    job = jobs["stops_when_told-cancel"]
    wait_until_ready(cluster, job)
    cluster.type("scancel", job.id)
    cluster.wait_for("the job to be gone", job.id, lambda fields: fields["JobState"] == "CANCELLED")
    cluster.wait_for("rank 0 to save", job.id, lambda _: (job.folder / "rank0").exists(), seconds=20)
    time.sleep(2)
    assert cluster.job(job.id)["JobState"] == "CANCELLED"
    assert "queued again" not in cluster.log(job.id).replace("not queued again", "")


def test_dead_rank_ends_the_try_in_seconds(cluster: Cluster, jobs: Jobs) -> None:
    end = cluster.wait_for_end(jobs["rank_dies"].id, seconds=60)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert "try 0: failed" in cluster.log(jobs["rank_dies"].id)


def test_failures_in_a_row_are_bounded(cluster: Cluster, jobs: Jobs) -> None:
    end = cluster.wait_for_end(jobs["always_fails"].id)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "1")
    assert "giving up after 2 failures in a row" in cluster.log(jobs["always_fails"].id)


def test_a_mistake_is_not_repeated(cluster: Cluster, jobs: Jobs) -> None:
    end = cluster.wait_for_end(jobs["refuses"].id)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert "0: megaqad: model is not set" in cluster.log(jobs["refuses"].id), "rank 0 must get to say what is wrong"


def test_restarts_are_bounded(cluster: Cluster, jobs: Jobs) -> None:
    end = cluster.wait_for_end(jobs["always_stops"].id)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "1")
    assert "MAX_RESTARTS=1 is reached" in cluster.log(jobs["always_stops"].id)


def test_job_that_may_not_be_requeued_says_how_to_go_on(cluster: Cluster, jobs: Jobs) -> None:
    end = cluster.wait_for_end(jobs["always_stops-no_requeue"].id)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "3:0", "0")
    assert "submit the same command to go on" in cluster.log(jobs["always_stops-no_requeue"].id)


def test_sweep_gives_each_array_task_its_settings(cluster: Cluster, jobs: Jobs) -> None:
    options = ["--partition=single", "--ntasks-per-node=1", "--gpus-per-node=1"]
    settings = ["output_dir=sweep", "train.lr=1e-5,3e-6", "data.files=['a b','c']"]
    said = cluster.type(
        str(REPOSITORY / "launch" / "sweep.sh"),
        *options,
        "--",
        "tells_its_settings",
        *settings,
        environment={"MEGAQAD": STAND_IN},
    )
    job_id = said.split()[1].rstrip(":")
    folder = cluster.folder / "sweep"
    assert said.endswith(f"2 runs, listed in {folder}/sweep.txt")
    for task, rate in (("1", "1e-05"), ("2", "3e-06")):
        assert cluster.wait_for_end(f"{job_id}_{task}")["JobState"] == "COMPLETED"
        expected = [f"train.lr={rate}", "data.files=['a b','c']", f"output_dir={folder}/{task}"]
        assert (cluster.folder / f"task{task}").read_text().splitlines() == expected


def test_sweep_refuses_what_is_no_sweep(cluster: Cluster) -> None:
    for settings, reason in (
        (["output_dir=one", "seed=1"], "no setting has several values"),
        (["seed=1,2", "train.lr=1e-5"], "output_dir is not set"),
        (["output_dir=one", "seed=1,2", "train.lr=[1"], "no setting Hydra can read"),
    ):
        command = [str(REPOSITORY / "launch" / "sweep.sh"), "--", "distill", *settings]
        with pytest.raises(AssertionError, match=reason):
            cluster.type(*command)


def test_failed_stage_cancels_the_rest_of_the_chain(cluster: Cluster) -> None:
    said = cluster.type(
        str(REPOSITORY / "launch" / "chain.sh"),
        *OPTIONS,
        "--",
        f"output_dir={cluster.folder}/chain",
        "seed=1",
        environment={"MEGAQAD": STAND_IN, "STAGES": "fails_at_once never later", "MAX_FAILURES": "1"},
    )
    stages = dict(line.split() for line in said.splitlines())
    assert list(stages) == ["fails_at_once", "never", "later"]
    assert cluster.wait_for_end(stages["fails_at_once"])["JobState"] == "FAILED"
    for stage in ("never", "later"):
        assert cluster.wait_for_end(stages[stage])["JobState"] == "CANCELLED"


def test_container_command(cluster: Cluster) -> None:
    """There is no pyxis here: what would be run is read, and its options compared with those that pyxis documents."""
    variables = {
        "DRY_RUN": "1",
        "CONTAINER_IMAGE": "/images/megaqad.sqsh",
        "CONTAINER_MOUNTS": "/models:/models,/runs:/runs",
    }
    arguments = (*OPTIONS, "--cpus-per-task=8", SCRIPT, "distill", "model=/models/a b", "output_dir=/runs/x")
    job_id = cluster.submit(*arguments, environment=variables)
    assert cluster.wait_for_end(job_id)["ExitCode"] == "0:0"
    command = shlex.split(cluster.log(job_id).replace("$'", "'"))
    state = f"{cluster.folder}/.megaqad-slurm/{job_id}"
    options = [word for word in command[1:] if word.startswith("--")]
    assert command[0] == "srun"
    assert options[-4:] == [
        "--container-image=/images/megaqad.sqsh",
        f"--container-mounts=/models:/models,/runs:/runs,{state}:{state}",
        f"--container-workdir={cluster.folder}",
        "--no-container-mount-home",
    ]
    assert "--cpus-per-task=8" in options
    assert command[-5:] == ["rank", "megaqad", "distill", "model=/models/a b", "output_dir=/runs/x"]


def test_time_limit_warns_in_time(cluster: Cluster, jobs: Jobs) -> None:
    """The one job that waits for Slurm's own clock."""
    job = jobs["stops_when_told-time_limit"]
    end = cluster.wait_for_end(job.id, seconds=150)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1")
    assert "warned: the ranks save and stop" in cluster.log(job.id)
    assert (job.folder / "rank0").read_text() == "closed\n"
