"""Errors that are shown to the user as one message, without a traceback."""


class UserError(Exception):
    """Base class for errors shown to the user without a traceback.

    Attributes:
        exit_code: exit status of the command.
        ends_sweep: whether the remaining runs of a sweep are skipped.
        on_every_rank: whether every process of a run raises it, so that rank 0 alone reports it.
    """

    exit_code = 1
    ends_sweep = False
    on_every_rank = False


class ConfigError(UserError, ValueError):
    """A setting or argument that cannot be used."""

    exit_code = 2
    on_every_rank = True


class DataError(UserError, ValueError):
    """A prompt, a line or a data file that cannot be used."""


class MisfitError(DataError):
    """A pair that does not fit the tokenizer, such as prompts of unequal lengths."""


class NoneUsableError(DataError):
    """No example fits the tokenizer and the maximum length."""


class ModelError(UserError, ValueError):
    """A model that cannot be loaded or is not supported."""


class CircuitError(UserError, ValueError):
    """A circuit or scores file that cannot be used."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be written or read."""


class TrainingError(UserError, RuntimeError):
    """Training cannot continue: the loss or its gradient is not finite."""

    on_every_rank = True


class ProcessError(UserError, RuntimeError):
    """Another process of the run failed, died or stopped responding."""


class RankZeroFailed(ProcessError):
    """Rank 0 cannot continue. The other ranks exit silently; rank 0 reports the error."""

    on_every_rank = True


class JobFailed(UserError, RuntimeError):
    """A run failed in processes or in a job of its own, which have reported the reason."""

    def __init__(self, message: str, signal_number: int | None = None) -> None:
        super().__init__(message)
        if signal_number is not None:
            self.exit_code, self.ends_sweep = 128 + signal_number, True


class Interrupted(JobFailed):
    """A signal stopped the run after a checkpoint was saved."""

    on_every_rank = True


class GraphvizMissing(UserError, RuntimeError):
    """The program `dot` of Graphviz is not installed."""
