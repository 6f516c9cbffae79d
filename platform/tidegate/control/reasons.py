"""The fixed reasons that conditions carry. Documentation and tests take them from here."""

from __future__ import annotations

from typing import Final

READY: Final = "Ready"
CONFIG_VALID: Final = "ConfigValid"
WEIGHTS_AVAILABLE: Final = "WeightsAvailable"
SCHEDULED: Final = "Scheduled"
PROGRESSING: Final = "Progressing"
DEGRADED: Final = "Degraded"

# The order in which conditions are read and shown.
CONDITION_TYPES: Final = (READY, CONFIG_VALID, WEIGHTS_AVAILABLE, SCHEDULED, PROGRESSING, DEGRADED)

REASONS: Final[dict[str, str]] = {
    # Ready
    "Serving": "A proven revision answers requests.",
    "Asleep": "A proven revision has no replica and wakes on the next request.",
    "Waking": "A proven revision starts its first replica; requests wait.",
    "Unproven": "No revision has loaded and proved itself yet.",
    "Deleting": "The model is deleted; it takes no new requests and finishes those it has.",
    # ConfigValid
    "Valid": "The resource fits the schema.",
    "InvalidConfig": "The file was changed to something invalid; the last valid state stays.",
    "NameTaken": "An older Model of this name stands in another namespace; gateways know one of each.",
    # WeightsAvailable
    "Resolved": "The source was found and its format is one that the engine takes.",
    "Resolving": "The source is being looked at or downloaded.",
    "NotNeeded": "The engine needs no weights.",
    "SourceNotFound": "Nothing lies at the source's address.",
    "SourceFormat": "What lies there is not a checkpoint that the engine takes.",
    "Offline": "The source needs the network and the network is off.",
    "Unauthorized": "The source refuses the token, or needs one.",
    "NoSpace": "The disk has no room for the download.",
    "ChecksumMismatch": "A file's content is not what its checksum says.",
    "SourceUnavailable": "The source could not be read; it is tried again.",
    "NoWeightCache": "The source is downloaded, and the pool has no weight cache to keep it in.",
    "JobFailed": "The Job that looks at the source ended without an answer; it is tried again.",
    # Scheduled
    "Placed": "The machine has what one replica asks for.",
    "TooLittleMemory": "The weights alone are larger than the machine's memory.",
    "TooFewCpus": "One replica asks for more CPU cores than the machine has.",
    "TooFewGpus": "One replica asks for more GPUs than the machine has.",
    "NotChecked": "Not looked at before the weights are known.",
    "NoSuchGroup": "The pool has no group of workers that the model could run in.",
    "TooLittleGpuMemory": "One replica needs more GPU memory than its share or a GPU has.",
    "MemoryUnknown": "The memory of a replica cannot be computed from the checkpoint.",
    "GpusTaken": "The group's GPUs are taken by other models.",
    "CpusTaken": "The group's CPU cores are taken by other models.",
    "MemoryTaken": "The group's memory is taken by other models.",
    "Unschedulable": "Kubernetes finds no node for a pod of the pool.",
    "NoSuchPool": "The Pool that the model names does not exist.",
    "PoolFull": "The pool's maxLiveRevisions is reached; the revision waits for a place.",
    # Progressing
    "Queued": "The revision waits for its turn to be built.",
    "ClusterReady": "The pool's Ray cluster answers.",
    "ClusterRecreating": "The pool's old Ray cluster goes before the new one comes; requests wait.",
    "ClusterStarting": "The pool's Ray cluster starts.",
    "Building": "Ray Serve builds the revision's application.",
    "Loading": "The first replica loads the weights and proves the revision.",
    "Draining": "An older revision finishes its requests and goes.",
    "Settled": "Nothing is left to do.",
    "WaitingToRetry": "The last try failed; the next one comes by itself.",
    # Degraded
    "Healthy": "No replica and no revision has failed.",
    "RevisionFailed": "The newest revision failed; an older one serves where there is one.",
    "ReplicaFailed": "The newest replica start of the serving revision failed.",
    "DeployFailed": "Ray Serve could not build or start the application.",
    "Unhealthy": "Ray Serve finds replicas unhealthy.",
    "ServeRejected": "Ray Serve refused the config.",
    "ServeUnavailable": "Ray Serve does not answer.",
    "RedisUnreachable": "The queue's Redis does not answer; requests are refused until it does.",
    "KubeRayMissing": "The cluster has no KubeRay, or one that Tidegate does not know.",
    "ImagePullFailed": "A pod's image cannot be pulled.",
    "OutOfMemory": "A container took more memory than it may.",
    "CrashLoop": "A container ends again and again.",
    "SecretMissing": "A pod needs a Secret or ConfigMap, or a key of one, that does not exist.",
    "VolumeMissing": "A pod needs a volume that does not exist or cannot be mounted.",
    "Evicted": "Kubernetes took a pod off its node.",
    "PodsRefused": "Kubernetes refuses the pods of the pool.",
}
