"""Reports of the state of a mount: what its file ``.stats``, metrics and status page show."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import trio

from warabi import errors
from warabi._core.counters import Totals
from warabi._core.tuning import REPORT_PATIENCE
from warabi.provider.report import counters_report, process_report, target_report

if TYPE_CHECKING:
    from warabi import aio
    from warabi.target.target import Target
    from warabifs.frontends.base import FrontEnd
    from warabifs.fs.filesystem import FileSystem
    from warabifs.mount.options import Options, Source


class MountReport:
    """The reports of one mount.

    Args:
        source: what is mounted.
        mountpoint: where.
        options: how.
        front: counts the kernel's requests.
        files: the file system.
        target: its target.
        local: the target itself if it is in this process.
    """

    def __init__(
        self,
        source: Source,
        mountpoint: str,
        options: Options,
        front: FrontEnd,
        files: FileSystem,
        target: aio.Target,
        local: Target | None,
    ) -> None:
        self._source = source
        self._mountpoint = mountpoint
        self._options = options
        self._front = front
        self._files = files
        self._target = target
        self._local = local

    def own(self) -> dict[str, Any]:
        """Return what this process knows without asking the target, as JSON can have it: as
        ``provider/report.py`` has it for a process, with the counters of the kernel's requests."""
        return {
            "kind": "mount",
            "source": self._source.text,
            "mountpoint": self._mountpoint,
            "front_end": self._options.frontend,
            "options": list(self._options.fixed),
            **process_report(),
            **self._files.statistics(),
            **counters_report(self._front.counters),
        }

    def totals(self) -> list[Totals]:
        """Return what was counted of all requests.  From any thread."""
        return [self._front.counters.totals()]

    async def make(self) -> dict[str, Any]:
        """Return :meth:`own`, and in ``targets`` the mounted target.  The state of an engine's is
        what its provider answers within a second."""
        found = self.own()
        backend = self._source.backend
        one: dict[str, Any] = {
            "provider_id": None if self._source.embedded else self._options.provider_id,
            "type": backend.name if backend is not None else None,
            "path": str(self._source.path) if self._source.path is not None else None,
            "target": None,
            "error": None,
        }
        try:
            with trio.fail_after(REPORT_PATIENCE):
                one["target"] = await self._state()
        except (errors.Exception, OSError) as error:
            one["error"] = str(error)
        except trio.TooSlowError:
            one["error"] = f"the target does not answer within {REPORT_PATIENCE:g} s"
        return {**found, "targets": [one]}

    async def _state(self) -> dict[str, Any]:
        if self._local is not None:
            return await trio.to_thread.run_sync(target_report, self._local, abandon_on_cancel=True)
        call = self._target.call
        total, available, regions = await call("room")
        return {
            "uuid": await call("uuid"),
            "regions": regions,
            "used": await call("used"),
            "total": total,
            "available": available,
            "quota": None,
        }

    async def text(self) -> bytes:
        """Return a report as the file ``.stats`` has it: JSON, indented."""
        return json.dumps(await self.make(), indent=1).encode() + b"\n"
