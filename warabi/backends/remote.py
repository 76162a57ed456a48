"""What a backend provides whose targets are on another system, catalogue included."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from warabi.backends.base import Storage
from warabi.metadata.replica import Store


class RemoteTarget(ABC):
    """A target on another system that this process owns exclusively, until it is released.

    Attributes:
        label: the target, as users write it.
        store: where its catalogue is kept.
        storage: where its regions are.
        instead: settings in effect that differ from the configuration.
    """

    label: str
    store: Store
    storage: Storage
    instead: Mapping[str, Any]

    @abstractmethod
    def release(self) -> None:
        """End the ownership; called once, after the catalogue was closed."""
