"""Every error that edgefl raises, in one tree. All of them can be imported from `edgefl`.

    EdgeflError
    |-- ConfigError          a configuration, option or task reference that cannot be used
    |   |-- NotFound         a job, model, device, rollout or blob that the cloud does not have
    |   |-- NotMeasurable    a model for which the cost of compression cannot be measured
    |   `-- SignatureChanged a release with other inputs or outputs than the version before, without consent
    |-- MissingExtra         an optional dependency that this installation lacks
    |-- TaskError            the user's task raised, hung, or returned something that cannot be an update
    |-- TrainerLost          the trainer was killed or could not be started, not because of the task; it is retried
    |-- UpdateRejected       an update refused by a guard, before it changed anything
    |-- QuorumNotMet         a round that ended with too few admitted updates
    |-- StepFailed           after a round's step, parameters are not finite or are out of their dtype's range
    |-- JobFailed            a job that ended before its last round
    |   |-- CutShort         a simulation, ended by a missed quorum or a failed step; holds the result so far
    |   `-- ProcessLost      a simulation whose process ended, and ended again when retried; holds the result so far
    |-- JobCancelled         a job stopped by its operator
    |-- JobPaused            a job paused by its operator; it continues when it is resumed
    |-- BlobDamaged          bytes that do not match the hash in their name
    |-- ProtocolError        bytes that do not follow the protocol
    |-- UploadCutOff         an upload that a newer one replaced, or whose round is over
    |-- ManifestRejected     a bundle or release with a wrong signature, hash, size or version
    |-- ParityError          models that should compute the same but do not: an export, releases on several devices
    |-- AccuracyGateFailed   a compressed model that loses more accuracy than allowed
    |-- RolloutFailed        a release that some device does not serve as told
    |-- EnrolmentRefused     a token or device name that the cloud does not accept
    |-- CloudUnreachable     the cloud or its broker did not answer in time, or a transfer with it was given up
    |   `-- ParentLeft       a call that ended because the device connects to another parent
    |-- CloudRefused         the cloud answered with a refusal
    |-- DeviceUnavailable    a device that is offline, or did not answer a request of the cloud
    |-- CloudStopping        the cloud is stopping; its jobs continue when it is started again
    |-- DiskFull             a disk with too little free space
    |-- PartFailed           a part of a running program that ended and could not be started again
    |-- ProcessFailed        a process of a local fleet that ended, or did not do in time what it should
    |-- HomeError            a home folder that is missing, damaged, taken or of a newer version
    |-- HostError            a host that lacks what a program needs: descriptors, another program
    |   `-- InstallError     a host on which the agent cannot be installed as a service
    `-- OwnFault             a defect in edgefl itself, not in the app that it ran

A message says who failed, what was seen, what was expected and what to do.
"""

from edgefl.terminal.extras import install_command


class EdgeflError(Exception):
    """Base of all errors that edgefl raises on purpose."""


class ConfigError(EdgeflError, ValueError):
    """A configuration, option or task reference that cannot be used."""


class NotMeasurable(ConfigError):
    """What compression costs a model cannot be measured: there is no test data, or it has learned nothing yet."""


class SignatureChanged(ConfigError):
    """A release has other inputs or outputs than the version before, so its clients would have to change."""


class MissingExtra(EdgeflError, ImportError):
    """An optional dependency is missing; the message names the extra that installs it."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the [{extra}] extra: {install_command(extra)}")


class TaskError(EdgeflError):
    """The user's task raised, hung, or returned something that cannot be an update."""


class TrainerLost(EdgeflError):
    """The machine killed the trainer or could not start it. Its work can be retried."""


class UpdateRejected(EdgeflError):
    """An update was refused before it changed anything."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"update of device {device!r} refused: {reason}")
        self.device = device
        self.reason = reason


class QuorumNotMet(EdgeflError):
    """A round ended with fewer admitted updates than its quorum."""


class StepFailed(EdgeflError):
    """After a round's step, parameters are not finite or wrapped around; the job keeps those from before it."""


class JobPaused(EdgeflError):
    """A job was paused by its operator; it continues when it is resumed."""


class BlobDamaged(EdgeflError):
    """Bytes do not match, or no longer match, the hash in their name."""


class JobFailed(EdgeflError):
    """A job ended before its last round; for a job on a fleet, the message comes from the cloud."""


class JobCancelled(EdgeflError):
    """A job was stopped by its operator."""


class ProtocolError(EdgeflError, ValueError):
    """Bytes that do not follow the protocol."""


class UploadCutOff(EdgeflError):
    """A newer upload of the same update has begun, or its round is over; this one must stop writing."""


class ManifestRejected(EdgeflError):
    """A bundle or release with a wrong signature, hash, size or version."""


class ParityError(EdgeflError):
    """Models that should compute the same do not, or a model cannot be exported faithfully."""


class AccuracyGateFailed(EdgeflError):
    """A compressed model loses more of its measure than the gate allows."""


class RolloutFailed(EdgeflError):
    """Devices do not serve a release as told."""


class EnrolmentRefused(EdgeflError):
    """The cloud does not accept this token or device name."""


class CloudUnreachable(EdgeflError):
    """The cloud or its broker did not answer in time, or a transfer with it was given up."""


class ParentLeft(CloudUnreachable):
    """A call ended because the device connects to another parent."""


class CloudRefused(EdgeflError):
    """The cloud answered with a refusal; the message comes from the cloud."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status  # HTTP status code


class NotFound(ConfigError):
    """A job, model, device, rollout or blob that the cloud does not have."""


class HomeError(EdgeflError):
    """A home folder is missing, damaged, in use, or was made by a newer version."""


class DiskFull(EdgeflError):
    """A disk has too little free space; the message says how much is needed, and where."""


class PartFailed(EdgeflError):
    """A part of a running program ended and could not be started again, so the program ends."""


class DeviceUnavailable(EdgeflError):
    """A device is offline, cannot do what was asked, or did not answer in time."""


class CloudStopping(EdgeflError):
    """The cloud is stopping; its jobs continue when it is started again."""


class ProcessFailed(EdgeflError):
    """A process of a local fleet ended, or did not do in time what it should; has the last lines of its log."""


class OwnFault(EdgeflError):
    """edgefl itself failed while it ran a user's app."""


class HostError(EdgeflError):
    """The host lacks what a program needs; the message says what, and how to get it."""


class InstallError(HostError):
    """The agent cannot be installed as a service on this host."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error was caused by too little memory, whether Python or torch raised it."""
    cause: BaseException | None = error
    while cause is not None:
        # torch's allocator raises a RuntimeError.
        if isinstance(cause, MemoryError) or "you tried to allocate" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
