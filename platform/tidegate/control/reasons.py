"""The fixed reasons that conditions carry. Code, documentation and tests take them from here."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal, Self

READY: Final = "Ready"
CONFIG_VALID: Final = "ConfigValid"
WEIGHTS_AVAILABLE: Final = "WeightsAvailable"
SCHEDULED: Final = "Scheduled"
PROGRESSING: Final = "Progressing"
DEGRADED: Final = "Degraded"

# The order in which conditions are read and shown.
CONDITION_TYPES: Final = (READY, CONFIG_VALID, WEIGHTS_AVAILABLE, SCHEDULED, PROGRESSING, DEGRADED)

Outlook = Literal["fine", "passes", "trouble"]
FINE: Final = "fine"
PASSES: Final = "passes"  # it ends by itself, or is meant to be so
TROUBLE: Final = "trouble"  # worth a warning where it keeps a condition from holding


class Reason(StrEnum):
    """One word of the list. `kind` is the condition that it tells of; `Ready` repeats those of the others."""

    kind: str
    sentence: str
    outlook: Outlook

    def __new__(cls, word: str, kind: str, sentence: str, outlook: Outlook = TROUBLE) -> Self:
        reason = str.__new__(cls, word)
        reason._value_ = word
        reason.kind, reason.sentence, reason.outlook = kind, sentence, outlook
        return reason

    @property
    def passes_by_itself(self) -> bool:
        return self.outlook == PASSES

    @classmethod
    def of(cls, word: str) -> Reason | None:
        """Return the member with this word; None for one that is not in the list, as in an old status."""
        found = cls._value2member_map_.get(word)
        return found if isinstance(found, cls) else None

    # fmt: off
    Serving = "Serving", READY, "A proven revision answers requests.", FINE
    Asleep = "Asleep", READY, "A proven revision has no replica and wakes on the next request.", FINE
    Waking = "Waking", READY, "A proven revision starts its first replica; requests wait.", PASSES
    Unproven = "Unproven", READY, "No revision has loaded and proved itself yet.", PASSES
    Deleting = ("Deleting", READY,
        "The model is deleted; it takes no new requests and finishes those it has.", PASSES)
    Drained = ("Drained", READY,
        "An administrator drains the model; it takes no new requests and finishes those it has.", PASSES)
    ClusterReady = "ClusterReady", READY, "The pool's Ray cluster answers.", FINE
    Valid = "Valid", CONFIG_VALID, "The resource fits the schema.", FINE
    InvalidConfig = ("InvalidConfig", CONFIG_VALID,
        "The file was changed to something invalid; the last valid state stays.")
    NameTaken = ("NameTaken", CONFIG_VALID,
        "An older Model of this name stands in another namespace; gateways know one of each.")
    Resolved = ("Resolved", WEIGHTS_AVAILABLE,
        "The source was found and its format is one that the engine takes.", FINE)
    Resolving = "Resolving", WEIGHTS_AVAILABLE, "The source is being looked at or downloaded.", PASSES
    NotNeeded = "NotNeeded", WEIGHTS_AVAILABLE, "The engine needs no weights.", FINE
    SourceNotFound = "SourceNotFound", WEIGHTS_AVAILABLE, "Nothing lies at the source's address."
    SourceChanged = ("SourceChanged", WEIGHTS_AVAILABLE,
        "The source no longer holds what an old revision was made from.")
    SourceFormat = ("SourceFormat", WEIGHTS_AVAILABLE,
        "What lies there is not a checkpoint that the engine takes.")
    UnsupportedModel = ("UnsupportedModel", WEIGHTS_AVAILABLE,
        "The checkpoint is of an architecture or a quantization that is not served.")
    InvalidEngineArgs = ("InvalidEngineArgs", WEIGHTS_AVAILABLE,
        "The spec asks of the checkpoint what it cannot give.")
    Offline = "Offline", WEIGHTS_AVAILABLE, "The source needs the network and the network is off."
    Unauthorized = "Unauthorized", WEIGHTS_AVAILABLE, "The source refuses the token, or needs one."
    NoSpace = "NoSpace", WEIGHTS_AVAILABLE, "The disk has no room for the download."
    ChecksumMismatch = ("ChecksumMismatch", WEIGHTS_AVAILABLE,
        "A file's content is not what its checksum says.")
    SourceUnavailable = ("SourceUnavailable", WEIGHTS_AVAILABLE,
        "The source could not be read; it is tried again.")
    NoWeightCache = ("NoWeightCache", WEIGHTS_AVAILABLE,
        "The source is downloaded, and the pool has no weight cache to keep it in.")
    JobFailed = ("JobFailed", WEIGHTS_AVAILABLE,
        "The Job that looks at the source ended without an answer; it is tried again.")
    Placed = "Placed", SCHEDULED, "The machine has what one replica asks for.", FINE
    TooLittleMemory = "TooLittleMemory", SCHEDULED, "The weights alone are larger than the machine's memory."
    TooFewCpus = "TooFewCpus", SCHEDULED, "One replica asks for more CPU cores than the machine has."
    TooFewGpus = "TooFewGpus", SCHEDULED, "One replica asks for more GPUs than the machine has."
    NotChecked = "NotChecked", SCHEDULED, "Not looked at before the weights are known.", PASSES
    NoSuchGroup = "NoSuchGroup", SCHEDULED, "The pool has no group of workers that the model could run in."
    TooLittleGpuMemory = ("TooLittleGpuMemory", SCHEDULED,
        "One replica needs more GPU memory than its share or a GPU has.")
    MemoryUnknown = ("MemoryUnknown", SCHEDULED,
        "The memory of a replica cannot be computed from the checkpoint.")
    GpusTaken = "GpusTaken", SCHEDULED, "The group's GPUs are taken by models that are always there."
    CpusTaken = "CpusTaken", SCHEDULED, "The group's CPU cores are taken by models that are always there."
    MemoryTaken = "MemoryTaken", SCHEDULED, "The group's memory is taken by models that are always there."
    SurgeTooSmall = ("SurgeTooSmall", SCHEDULED,
        "The rollout needs more accelerators than its bounds allow; the old revision serves.")
    Unschedulable = "Unschedulable", SCHEDULED, "Kubernetes finds no node for a pod of the pool."
    NoSuchPool = "NoSuchPool", SCHEDULED, "The Pool that the model names does not exist."
    PoolFull = ("PoolFull", PROGRESSING,
        "The pool's maxLiveRevisions is reached; the revision waits for a place.")
    WaitingForRoom = ("WaitingForRoom", PROGRESSING,
        "Models at work hold the room of the pool; the replica starts when one of them goes to zero.", PASSES)
    Queued = "Queued", PROGRESSING, "The revision waits for its turn to be built.", PASSES
    ClusterRecreating = ("ClusterRecreating", PROGRESSING,
        "The pool's old Ray cluster goes before the new one comes; requests wait.", PASSES)
    ClusterStarting = "ClusterStarting", PROGRESSING, "The pool's Ray cluster starts.", PASSES
    Building = "Building", PROGRESSING, "Ray Serve builds the revision's application.", PASSES
    Loading = "Loading", PROGRESSING, "The first replica loads the weights and proves the revision.", PASSES
    RolloutQueued = ("RolloutQueued", PROGRESSING,
        "Other rollouts of the Pool come first; the old revision serves.", PASSES)
    RollingOut = "RollingOut", PROGRESSING, "The new revision takes the traffic over step by step.", PASSES
    RolloutPaused = ("RolloutPaused", PROGRESSING,
        "The rollout waits for a person; its gates go on judging.", PASSES)
    WaitingForEvidence = ("WaitingForEvidence", PROGRESSING,
        "Too few requests have ended on the new revision to let it have more.", PASSES)
    RolloutReplaced = ("RolloutReplaced", PROGRESSING,
        "Another revision was asked for before the rollout was complete.", PASSES)
    Draining = "Draining", PROGRESSING, "An older revision finishes its requests and goes.", PASSES
    Settled = "Settled", PROGRESSING, "Nothing is left to do.", FINE
    WaitingToRetry = "WaitingToRetry", PROGRESSING, "The last try failed; the next one comes by itself."
    Healthy = "Healthy", DEGRADED, "No replica and no revision has failed.", FINE
    RolloutAborted = ("RolloutAborted", DEGRADED,
        "The new revision was given up; the one before it takes all traffic.")
    RevisionFailed = ("RevisionFailed", DEGRADED,
        "The newest revision failed; an older one serves where there is one.")
    ReplicaFailed = "ReplicaFailed", DEGRADED, "The newest replica start of the serving revision failed."
    DeployFailed = "DeployFailed", DEGRADED, "Ray Serve could not build or start the application."
    Unhealthy = "Unhealthy", DEGRADED, "Ray Serve finds replicas unhealthy."
    ServeRejected = "ServeRejected", DEGRADED, "Ray Serve refused the config."
    ServeUnavailable = "ServeUnavailable", DEGRADED, "Ray Serve does not answer."
    RedisUnreachable = ("RedisUnreachable", DEGRADED,
        "The queue's Redis does not answer; requests are refused until it does.")
    RedisRefused = ("RedisRefused", DEGRADED,
        "The queue's Redis refuses the password, or is one that Tidegate cannot use; requests are refused.")
    KubeRayMissing = ("KubeRayMissing", DEGRADED,
        "The cluster has no KubeRay, or one that Tidegate does not know.")
    ImagePullFailed = "ImagePullFailed", DEGRADED, "A pod's image cannot be pulled."
    OutOfMemory = "OutOfMemory", DEGRADED, "A container took more memory than it may."
    CrashLoop = "CrashLoop", DEGRADED, "A container ends again and again."
    SecretMissing = ("SecretMissing", DEGRADED,
        "A pod needs a Secret or ConfigMap, or a key of one, that does not exist.")
    VolumeMissing = ("VolumeMissing", DEGRADED,
        "A pod needs a volume that does not exist or cannot be mounted.")
    Evicted = "Evicted", DEGRADED, "Kubernetes took a pod off its node."
    PodsRefused = "PodsRefused", DEGRADED, "Kubernetes refuses the pods of the pool."
    # fmt: on
