"""Every error edgefl raises, in one tree. All of them can be imported from `edgefl`.

    EdgeflError
    |-- ConfigError          a configuration, option or task reference that cannot be used
    |   `-- NotFound         a job, model, device, rollout or blob that the cloud does not have
    |-- MissingExtra         an optional dependency that this installation lacks
    |-- TaskError            the user's task raised, hung, or returned what cannot be an update
    |-- TrainerLost          the trainer was killed or could not be started: not by the task, so it is tried again
    |-- UpdateRejected       an update refused by a guard, before it changed anything
    |-- QuorumNotMet         a round that ended with too few admitted updates
    |-- StepFailed           parameters that a round's step left not finite, or beyond their dtype
    |-- JobFailed            a job that ended before its last round
    |   |-- CutShort         a simulation, by a round under its quorum or a step that failed; has what there is
    |   `-- ProcessLost      a simulation whose own process ended, and again; has what there is
    |-- JobCancelled         a job stopped by its operator
    |-- BlobDamaged          bytes that are not what their name says
    |-- ProtocolError        bytes that are not what the protocol says
    |-- UploadCutOff         an upload whose place a newer one took, or whose round is over
    |-- ManifestRejected     a bundle or release with a wrong signature, hash, size or version
    |-- ParityError          models that should compute the same and do not: an export, releases on several devices
    |-- AccuracyGateFailed   a compressed model that loses more accuracy than allowed
    |-- RolloutFailed        a release that devices do not serve as they were told
    |-- EnrolmentRefused     a token or name the cloud does not accept
    |-- CloudUnreachable     the cloud or its broker did not answer in time, or a transfer with it was given up
    |-- CloudRefused         the cloud answered, and said no
    |-- CloudStopping        the cloud ends; its jobs go on when it is started again
    |-- DiskFull             a disk without the space that something needs
    |-- PartFailed           a part of a running program that ended and could not be started again
    |-- ProcessFailed        a process of a fleet on this machine that ended, or did not do in time what was awaited
    |-- HomeError            a home folder that is missing, damaged, taken or of a newer version
    |-- HostError            a host that lacks what a program needs: descriptors, another program
    |   `-- InstallError     a host on which the agent cannot be installed as a service
    `-- OwnFault             a fault of edgefl itself, not of the app that it ran

A message says who, what was seen, what was wanted and what to do.
"""

from edgefl.terminal.extras import install_command


class EdgeflError(Exception):
    """Base of all errors that edgefl raises on purpose."""


class ConfigError(EdgeflError, ValueError):
    """A configuration, option or task reference that cannot be used."""


class MissingExtra(EdgeflError, ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the [{extra}] extra: {install_command(extra)}")


class TaskError(EdgeflError):
    """The user's task raised, hung, or returned what cannot be an update."""


class TrainerLost(EdgeflError):
    """The machine killed the trainer or could not start it. What it did can be done again."""


class UpdateRejected(EdgeflError):
    """An update was refused before it changed anything."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"update of device {device!r} refused: {reason}")
        self.device = device
        self.reason = reason


class QuorumNotMet(EdgeflError):
    """A round ended with fewer admitted updates than its quorum."""


class StepFailed(EdgeflError):
    """A round's step left parameters that are not finite, or wrapped around; those before it stay."""


class BlobDamaged(EdgeflError):
    """Bytes are not, or no longer, what their name says."""


class JobFailed(EdgeflError):
    """A job ended before its last round; of one on a fleet the message is the cloud's."""


class JobCancelled(EdgeflError):
    """A job was stopped by its operator."""


class ProtocolError(EdgeflError, ValueError):
    """Bytes that are not what the protocol says."""


class UploadCutOff(EdgeflError):
    """A newer upload of the same update has begun, or its round is over: this one writes no more."""


class ManifestRejected(EdgeflError):
    """A bundle or release with a wrong signature, hash, size or version."""


class ParityError(EdgeflError):
    """Models that should compute the same do not, or one cannot be exported so that it would."""


class AccuracyGateFailed(EdgeflError):
    """A compressed model loses more accuracy than the gate allows."""


class RolloutFailed(EdgeflError):
    """Devices do not serve a release as they were told."""


class EnrolmentRefused(EdgeflError):
    """The cloud does not accept this token or device name."""


class CloudUnreachable(EdgeflError):
    """The cloud or its broker did not answer in time, or a transfer with it was given up."""


class CloudRefused(EdgeflError):
    """The cloud answered, and said no; the message is the cloud's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # of HTTP


class NotFound(ConfigError):
    """A job, model, device, rollout or blob that the cloud does not have."""


class HomeError(EdgeflError):
    """A home folder is missing, damaged, in use, or was made by a newer version."""


class DiskFull(EdgeflError):
    """A disk has not the space that something needs; the message says how much, and where."""


class PartFailed(EdgeflError):
    """A part of a running program has ended and could not be started again; so the program ends."""


class CloudStopping(EdgeflError):
    """The cloud ends; its jobs go on when it is started again."""


class ProcessFailed(EdgeflError):
    """A process of a fleet on this machine ended, or did not do in time what was awaited; with its last lines."""


class OwnFault(EdgeflError):
    """Something in edgefl itself failed while it ran somebody else's app."""


class HostError(EdgeflError):
    """The host lacks what a program needs; the message says what, and how to get it."""


class InstallError(HostError):
    """The agent cannot be installed as a service on this host."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error comes of too little memory, whoever noticed it first."""
    cause: BaseException | None = error
    while cause is not None:
        # torch says it with a RuntimeError of its allocator.
        if isinstance(cause, MemoryError) or "you tried to allocate" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
