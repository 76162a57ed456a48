"""The documented import name of :mod:`warabi.client`."""

from warabi.client import (
    AsyncCreateRequest,
    AsyncRequest,
    Client,
    Exception,
    RegionID,
    TargetHandle,
)

__all__ = [
    "AsyncCreateRequest",
    "AsyncRequest",
    "Client",
    "Exception",
    "RegionID",
    "TargetHandle",
]
