"""Errors that a message explains, and the exit codes they mean."""

from __future__ import annotations

from mates.engine.pretrain.vigilance import BadStepError
from mates.engine.ranks import LaunchError
from mates.preprocess.artifact import DiskFullError

STEP_FAILED = (RuntimeError, DiskFullError)
"""Errors that are no fault of recipe, argument or input: exit code 1 instead of 2."""


def user_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all that a user needs."""
    from mates.engine.data.blocks import CorpusTooSmallError
    from mates.launchers.local import StepFailedError
    from mates.launchers.locks import RunBusyError
    from mates.launchers.slurm import SlurmError
    from mates.preprocess.artifact import ArtifactError
    from mates.preprocess.corpus import CorpusError
    from mates.preprocess.inputs import InputError
    from mates.preprocess.ranks import RanksError
    from mates.preprocess.tokenizer import TokenizerError
    from mates.preprocess.workers import WorkerDiedError

    return (
        ArtifactError,
        InputError,
        TokenizerError,
        CorpusTooSmallError,
        StepFailedError,
        SlurmError,
        LaunchError,
        RunBusyError,
        CorpusError,
        RanksError,
        WorkerDiedError,
        BadStepError,
    )
