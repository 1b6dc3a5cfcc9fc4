"""A `dspy.Provider` that records what it is given to train on, and answers with the model it was told to make."""

from typing import Any

import dspy
from dspy.clients.provider import Provider, ReinforceJob, TrainingJob

from tests.compat.scripted_model import TUNED


class RecordedTrainingJob(TrainingJob):
    def status(self) -> str:
        return "succeeded" if self.done() else "running"


class RecordedReinforceJob(ReinforceJob):
    """One batch of groups, after which the LM's model is the tuned one, as GRPO's backends do it."""

    def initialize(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.ended = False
        self.lm.provider.reinforced.append(self)

    def get_status(self) -> dict[str, Any]:
        return {"pending_batch_ids": [] if self.groups else [0, 1, 2, 3, 4, 5]}

    def step(self, train_data: list[dict[str, Any]], train_data_format: Any = None) -> None:
        self.groups += train_data
        self.lm.model = f"openai/{TUNED}"

    def terminate(self) -> None:
        self.ended = True

    def save_checkpoint(self, checkpoint_name: str) -> None:
        raise NotImplementedError


class RecordingProvider(Provider):
    def __init__(self) -> None:
        super().__init__()
        self.finetunable = self.reinforceable = True
        self.TrainingJob = RecordedTrainingJob
        self.ReinforceJob = RecordedReinforceJob
        self.tuned: list[TrainingJob] = []
        self.reinforced: list[RecordedReinforceJob] = []

    def finetune(  # type: ignore[override]
        self, job: TrainingJob, model: str, train_data: list[dict[str, Any]], train_data_format: Any,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:  # fmt: skip
        self.tuned.append(job)
        return f"openai/{TUNED}"

    def training(self) -> list[list[Any]]:
        """The data of every job."""
        return [*(job.train_data for job in self.tuned), *(job.groups for job in self.reinforced)]

    def trained_fields(self) -> list[set[str]]:
        """For each job, the field that each completion it was given starts with."""
        return [
            {data["messages"][-1]["content"].split(" ## ]]")[0].removeprefix("[[ ## ") for data in job.train_data}
            for job in self.tuned
        ]


def provider_of(lm: dspy.LM) -> RecordingProvider:
    assert isinstance(lm.provider, RecordingProvider)
    return lm.provider
