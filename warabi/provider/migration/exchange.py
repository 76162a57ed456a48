"""Messages of a migration on a provider's connection: the destination's side, and the request.

Belongs to one connection, in one Trio loop.  A target that is being received is discarded when its
connection ends, unless its commit has begun: that is completed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from warabi._core.tuning import MIGRATION_PATIENCE
from warabi.backends.settings import PathModel
from warabi.errors import Exception, ProtocolError
from warabi.protocol.operations import OPERATIONS, Payload, checked_arguments
from warabi.provider.core import ProviderCore
from warabi.provider.migration import permission
from warabi.provider.migration.options import MigrationPlan, parse
from warabi.provider.migration.send import Sending
from warabi.provider.migration.staging import Staging
from warabi.target.config import checked as checked_config
from warabi.target.target import Target

log = logging.getLogger(__name__)


class Receiving:
    """A target that is being received by a provider.

    Attributes:
        ended: set when it was adopted by the provider, or discarded.
    """

    def __init__(self, core: ProviderCore, plan: MigrationPlan) -> None:
        self.core = core
        self.plan = plan
        self.staging: Staging | None = None
        self.busy = trio.Lock()  # one step at a time
        self.heard = trio.current_time()
        self.ended = trio.Event()

    def end(self) -> None:
        self.core.receiving = None
        self.ended.set()


class Exchange:
    """Executes the operations of ``warabi.provider.migration`` for one connection.

    Args:
        local: whether the peer is a process of this user on this host.
        hang_up: closes the connection.
    """

    def __init__(self, local: bool, hang_up: Callable[[], None]) -> None:
        self._local = local
        self._hang_up = hang_up
        self._receiving: Receiving | None = None

    async def call(self, core: ProviderCore, name: str, arguments: Any, payload: memoryview) -> Any:
        """Execute an operation; returns its result."""
        checked = checked_arguments(name, arguments)
        if OPERATIONS[name].payload is Payload.UPLOAD:
            checked.append(payload)
        method: Callable[..., Awaitable[Any]] = getattr(self, f"_{name}")
        return await method(core, *checked)

    # The source

    async def _migrate(
        self, core: ProviderCore, address: str, provider_id: int, options: str
    ) -> None:
        permission.check_send(core.config, core.provider_id, self._local)
        sending = Sending(core, (address, provider_id), parse(options))
        # A separate thread, so that migrations do not wait for each other.  It continues if the
        # requesting client disconnects, and is stopped when the provider is closed.
        await trio.to_thread.run_sync(
            sending.run, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )

    async def _migration_progress(self, core: ProviderCore) -> tuple[int, int]:
        permission.check_send(core.config, core.provider_id, self._local)
        sending = core.sending
        return (0, 0) if sending is None else (sending.done, sending.total)

    # The destination

    async def _receive_begin(self, core: ProviderCore, text: str) -> None:
        permission.check_receive(core.config, core.provider_id, self._local)
        if self._receiving is not None:
            raise ProtocolError(
                "receive_begin: a migration is already in progress on this connection"
            )
        plan = checked_config(MigrationPlan, text, what="migration")
        receiving = Receiving(core, plan)
        core.begin_receiving(receiving)
        self._receiving = receiving
        try:
            decide_location(plan, core, self._local)
            receiving.staging = await self._step(receiving, Staging, plan)
        except BaseException:
            self._receiving = None
            receiving.end()
            raise
        trio.lowlevel.spawn_system_task(self._watch, receiving)

    async def _watch(self, receiving: Receiving) -> None:
        """Close the connection if the source sends nothing any more, for example since its host
        died."""
        while not receiving.ended.is_set():
            with trio.move_on_at(receiving.heard + MIGRATION_PATIENCE):
                await receiving.ended.wait()
            silent = trio.current_time() - receiving.heard >= MIGRATION_PATIENCE
            if silent and not receiving.ended.is_set() and not receiving.busy.locked():
                log.warning(
                    "migration aborted: the source sent nothing for %g s", MIGRATION_PATIENCE
                )
                self._hang_up()
                return
            if silent:
                receiving.heard = trio.current_time()

    async def _step(self, receiving: Receiving, call: Callable[..., Any], *arguments: Any) -> Any:
        async with receiving.busy:
            receiving.heard = trio.current_time()
            try:
                return await trio.to_thread.run_sync(call, *arguments)
            finally:
                receiving.heard = trio.current_time()

    def _current(self, core: ProviderCore, name: str) -> tuple[Receiving, Staging]:
        receiving = self._receiving
        if receiving is None or receiving.core is not core or receiving.staging is None:
            raise ProtocolError(
                f"{name}: no migration to provider {core.provider_id} is in progress"
            )
        return receiving, receiving.staging

    async def _add(
        self, core: ProviderCore, name: str, call: Callable[[Staging], Callable[[], None]]
    ) -> None:
        receiving, staging = self._current(core, name)
        try:
            await self._step(receiving, call(staging))
        except BaseException:
            await self._drop()
            raise

    async def _receive_rows(self, core: ProviderCore, table: str, payload: memoryview) -> None:
        await self._add(core, "receive_rows", lambda s: lambda: s.add_rows(table, payload))

    async def _receive_data(self, core: ProviderCore, payload: memoryview) -> None:
        await self._add(core, "receive_data", lambda s: lambda: s.add_data(payload))

    async def _receive_finish(self, core: ProviderCore, regions: int) -> None:
        await self._add(core, "receive_finish", lambda s: lambda: s.finish(regions))

    async def _receive_commit(self, core: ProviderCore) -> None:
        receiving, staging = self._current(core, "receive_commit")
        core.check_open()
        receiving.staging = None  # from here on it is kept if the connection ends
        self._receiving = None
        with trio.CancelScope(shield=True):
            try:
                target: Target = await self._step(receiving, staging.commit)
            except BaseException:
                await self._step(receiving, staging.discard)
                raise
            else:
                config = core.config.model_copy(update={"target": receiving.plan.target})
                core.adopt(target, config)
            finally:
                receiving.end()

    async def _receive_abort(self, core: ProviderCore) -> None:
        await self._drop()

    async def _receive_outcome(self, core: ProviderCore, uuid: str) -> bool:
        """Whether the provider has that target, after a pending commit has ended."""
        permission.check_receive(core.config, core.provider_id, self._local)
        receiving = core.receiving
        if receiving is not None and receiving.plan.uuid == uuid:
            await receiving.ended.wait()
        return core.has_target and core.target.uuid == uuid

    async def _drop(self) -> None:
        receiving, self._receiving = self._receiving, None
        if receiving is None:
            return
        staging, receiving.staging = receiving.staging, None
        with trio.CancelScope(shield=True):
            try:
                if staging is not None:
                    await self._step(receiving, staging.discard)
            finally:
                receiving.end()

    async def aclose(self) -> None:
        """Discard an unfinished target after the connection has ended."""
        try:
            await self._drop()
        except (Exception, OSError) as error:
            log.warning("cleanup of an aborted migration failed: %s", error)


def decide_location(plan: MigrationPlan, core: ProviderCore, local: bool) -> None:
    """Determine where the target's files will be, and store it in *plan*.

    Raises:
        PermissionDenied: the peer may not put them there.
    """
    target = plan.target
    path = target.path
    if not isinstance(target.config, PathModel) or path is None:
        return
    if plan.new_root is not None:
        top = (core.config.migration and core.config.migration.root) or ""
        if path.endswith("/") or os.path.isdir(os.path.join(top, path)):
            path = os.path.join(path, os.path.basename(plan.name))
    if "\0" in path:
        raise ProtocolError("receive_begin: a path with a null byte")
    target.config.path = str(permission.place(core.config, path, local))
