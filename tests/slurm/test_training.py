"""The demo model's run, interrupted in every way a cluster has, against the same run left alone.

One story, told by the shipped scripts with the real megaqad: a chain of four jobs on two nodes of two ranks. Its
training is told to stop (USR1, as before a time limit), preempted by another job, and loses the node that its batch
script and rank 0 run on. It must end with the numbers, to the last bit, of a training that nothing happened to, and the
chain must go on behind it.
"""

import json
from collections.abc import Callable

import pytest
import torch

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY
from tests.slurm.training import OPTIONS, SETTINGS, STEPS, Run

PATIENCE = 900.0
"""Seconds for anything that needs four ranks to start; about 20 on two idle cores, more on busy ones."""


class Story:
    """One training job, watched."""

    def __init__(self, cluster: Cluster, job_id: str, run: Run) -> None:
        self.cluster = cluster
        self.job_id = job_id
        self.run = run

    def wait(self, what: str, condition: Callable[[dict[str, str]], object]) -> dict[str, str]:
        return self.cluster.wait_for(what, self.job_id, condition, seconds=PATIENCE)

    def train_to(self, step: int) -> None:
        self.wait(f"step {step}", lambda _: self.run.steps() >= step)
        assert self.run.steps() < STEPS - 2, "the training is too fast to be interrupted: give it more steps"

    def comes_back(self, restarts: int) -> dict[str, str]:
        """Wait until the next try has saved a checkpoint; the steps before the last one must stand as they were."""
        self.wait(f"restart {restarts}", lambda job: job["Restarts"] == str(restarts))
        saved, before = self.run.saved(), self.run.lines()
        fields = self.wait(f"restart {restarts} to train", lambda _: self.run.saved() > saved)
        assert self.run.lines()[:saved] == before[:saved], "steps that a checkpoint holds were done again"
        return fields


@pytest.fixture(scope="module")
def chain(cluster: Cluster, peaceful_job: str) -> dict[str, str]:
    """Stage -> job id."""
    script = str(REPOSITORY / "launch" / "chain.sh")
    said = cluster.type(script, *OPTIONS, "--partition=batch", "--", *SETTINGS, "output_dir=interrupted")
    return dict(line.split() for line in said.splitlines())


@pytest.fixture(scope="module")
def story(cluster: Cluster, chain: dict[str, str]) -> Story:
    assert list(chain) == ["quantize", "distill", "export", "verify"]
    end = cluster.wait_for_end(chain["quantize"], seconds=2 * PATIENCE)
    assert end["JobState"] == "COMPLETED", cluster.log(chain["quantize"])
    return Story(cluster, chain["distill"], Run(cluster.folder / "interrupted"))


def test_warning_saves_the_step_it_is_at(story: Story) -> None:
    story.train_to(2)
    story.cluster.type("scancel", "--batch", "--signal=USR1", story.job_id)
    story.wait("the ranks to stop", lambda _: "try 0: interrupted" in story.cluster.log(story.job_id))
    assert story.run.saved() == story.run.steps() >= 2, "the step it stopped at is not the one it saved"
    story.comes_back(1)


def test_preempted_run_makes_way_and_comes_back(story: Story) -> None:
    story.train_to(story.run.saved() + 2)
    urgent = story.cluster.submit(
        "--partition=urgent", "--nodes=3", "--exclusive", "--job-name=urgent", "--output=urgent.log", "--wrap=sleep 1"
    )
    assert story.cluster.wait_for_end(urgent, seconds=PATIENCE)["JobState"] == "COMPLETED"
    assert "try 1: interrupted" in story.cluster.log(story.job_id)
    assert story.run.saved() == story.run.steps(), "the step it stopped at is not the one it saved"
    story.comes_back(2)


def test_lost_node_is_replaced_by_the_spare(story: Story) -> None:
    saved = story.run.saved()
    story.wait("a checkpoint and a step after it", lambda _: story.run.steps() > story.run.saved() > saved)
    lost = story.cluster.job(story.job_id)["BatchHost"]
    story.cluster.kill_node(lost)
    story.comes_back(3)
    nodes = story.cluster.type("scontrol", "show", "hostnames", story.cluster.job(story.job_id)["NodeList"]).split()
    assert sorted(nodes) == sorted({"n1", "n2", "n3"} - {lost})


def test_interrupted_training_ends_as_the_peaceful_one(cluster: Cluster, story: Story, peaceful_job: str) -> None:
    assert cluster.wait_for_end(story.job_id, seconds=PATIENCE)["JobState"] == "COMPLETED", cluster.log(story.job_id)
    assert cluster.wait_for_end(peaceful_job, seconds=PATIENCE)["Restarts"] == "0"
    peaceful = Run(cluster.folder / "peaceful")
    assert [row["step"] for row in story.run.metrics()] == list(range(1, STEPS + 1))
    assert story.run.metrics() == peaceful.metrics()
    interrupted, expected = story.run.state(), peaceful.state()
    assert sorted(interrupted) == sorted(expected) != []
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, interrupted[name])] == []


def test_chain_goes_on_to_a_verified_export(cluster: Cluster, story: Story, chain: dict[str, str]) -> None:
    for stage in ("export", "verify"):
        end = cluster.wait_for_end(chain[stage], seconds=2 * PATIENCE)
        assert end["JobState"] == "COMPLETED", cluster.log(chain[stage])
    assert json.loads((story.run.folder / "verify.json").read_text())["passed"] is True
