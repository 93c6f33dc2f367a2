"""The composition root: one machine, its handlers, its engine and its sockets, wired together and run as a service.

The rule of the file: it knows everybody and decides nothing. Order of start: state directory (locked), machine, attach
socket, control socket, listener, READY. Order of stop: the listener and what may be cancelled, then a switchover that
is under way is waited for, then the sockets. Workloads are never ended by their daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog
import uvloop
from structlog.typing import FilteringBoundLogger

from migrated.control.commands import VERSION
from migrated.control.ports import Services
from migrated.control.server import ControlServer
from migrated.daemon.config import Config, load_config
from migrated.daemon.faults import FaultyStore, fault_point
from migrated.daemon.history import FileHistoryStore
from migrated.daemon.inherited import take_inherited
from migrated.daemon.lock import StateLock
from migrated.daemon.log import configure_log
from migrated.daemon.notify import Notifier
from migrated.daemon.record import FileRecordStore, WatchedStore
from migrated.daemon.site import HostSite
from migrated.daemon.trust import TrustKeeper, check_trust
from migrated.daemon.workload_command import WorkloadCommand
from migrated.devices.attached import register_device, unregister_device
from migrated.devices.global_state import register_global_state
from migrated.devices.kept import KeptSections
from migrated.errors import ConfigError, MigratedError, TlsError
from migrated.machine.attach import AttachServer
from migrated.machine.machine import Machine
from migrated.migration.history import History
from migrated.migration.host import Host, Settings, first_error
from migrated.migration.jobs import Jobs
from migrated.migration.migrator import Migrator
from migrated.migration.ownership import Ownership
from migrated.migration.progress import Progress
from migrated.migration.snapshot_host import SnapshotHost
from migrated.migration.snapshot_store import SnapshotStore
from migrated.migration.snapshots import Snapshots
from migrated.model.handover import Hold
from migrated.model.runstate import RunState
from migrated.ram.content import hash_content
from migrated.ram.load import RamLoad
from migrated.ram.multifd_save import MultifdSave
from migrated.ram.save import RamSave
from migrated.savevm.handlers import SaveVMHandlers
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.registry import SaveVMRegistry
from migrated.wire.ram import RAM_VERSION

TOOL = str(VERSION["package"])
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h, as systemd shows it
EXIT_FAILURE = 1


class Daemon:
    """One daemon for one machine. Everything hangs off this object; there are no process-wide singletons."""

    def __init__(
        self,
        config: Config,
        incoming: str | None,
        log: FilteringBoundLogger,
        inherited: tuple[str, int] | None,
        path: Path,
    ) -> None:
        self._inherited = inherited
        self._config = config
        self._trust = TrustKeeper(config, path, log)
        self._log = log
        self._incoming = incoming
        self._stopping: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._state = Path(config.paths.state)
        self._runtime = Path(config.paths.runtime)

    def stop(self, cause: str) -> None:
        """Ask the daemon to end; ``cause`` is QEMU's ShutdownCause ("host-signal", "host-qmp-quit")."""
        if not self._stopping.done():
            self._stopping.set_result(cause)

    def reload(self) -> None:
        """Read keys and peers again (SIGHUP)."""
        self._trust.reload()

    async def run(self) -> None:
        """Run until `stop`. Raises MigratedError when it cannot start."""
        try:
            # For the lines of those who know no machine: the sockets, the libraries.
            with structlog.contextvars.bound_contextvars(machine=self._config.machine.name):
                await self._run()
        except BaseExceptionGroup as group:
            raise first_error(group) from None

    async def _run(self) -> None:
        async with AsyncExitStack() as stack:
            for directory in (self._state, self._runtime):
                directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(StateLock(self._state))
            notifier = Notifier.from_environment()
            jobs = await stack.enter_async_context(asyncio.TaskGroup())
            migrator = await self._wire(stack, jobs)
            unsubscribe = migrator.subscribe(lambda name, data: notifier.status(_status_line(name, data)))
            stack.callback(unsubscribe)
            migrator.settler.settle()
            idle = [jobs.create_task(job) for job in (notifier.keep_watchdog(), self._trust.watch())]
            notifier.ready()
            self._log.info("ready")
            cause = await self._stopping
            notifier.stopping()
            self._log.info("stopping", cause=cause)
            for task in idle:
                task.cancel()
            await migrator.close()
            await self._history.close()

    async def _wire(self, stack: AsyncExitStack, jobs: asyncio.TaskGroup) -> Migrator:
        config = self._config
        fault_at = fault_point(self._state, self._log)
        records = WatchedStore(FaultyStore(FileRecordStore(self._state), fault_at))
        ownership, lock = Ownership(records), IothreadLock()
        settings = Settings(config.capabilities(), config.parameters())
        registry = SaveVMRegistry(lock)
        outgoing, incoming = Progress(time.monotonic), Progress(time.monotonic)
        relay = _Relay()
        machine = await self._machine(registry, ownership, settings, relay)
        stack.callback(machine.close)
        save = self._ram_save(machine, lock, settings, outgoing, relay)
        load = RamLoad(machine, incoming.stats, lambda: config.workload.attach_timeout)
        registry.register_savevm_live("ram", 0, RAM_VERSION, SaveVMHandlers.of(_Both(save, load)), machine)
        host = Host(
            machine=machine,
            registry=registry,
            lock=lock,
            ownership=ownership,
            global_state=register_global_state(registry),
            kept=KeptSections(registry),
            settings=settings,
            site=HostSite(self._state, self._runtime, machine.ram_blocks, TOOL),
            completeness=[load.check_complete],
            postcopy_save=save,
            postcopy_load=load,
            multifd_save=save.channels,
            multifd_load=load.channels,
            emit=relay,
            clock=time.monotonic,
            log=self._log,
            attach_timeout_s=config.workload.attach_timeout,
            fault_point=fault_at,
        )
        self._load_handlers(registry, machine)
        store = FileHistoryStore(self._state, config.history.keep)
        history = self._history = History(host, store, outgoing, incoming, jobs.create_task)
        records.on_written = history.record_written
        await history.open()
        snapshot_jobs = Jobs(jobs.create_task, relay, self._log)
        migrator = Migrator(
            host,
            outgoing,
            incoming,
            jobs.create_task,
            snapshot_jobs,
            history,
            config.migration.allow,
            self._trust.current,
        )
        relay.target = migrator.emit
        snapshots = SnapshotHost(host, self._snapshot_store(), hash_content, outgoing, incoming, tool=TOOL)
        shots = Snapshots(snapshots, snapshot_jobs, lambda: migrator.busy)
        services = Services(migrator, shots, history, machine, lambda: self.stop("host-qmp-quit"))
        await self._open_sockets(stack, services, machine, migrator)
        await self._open_metrics(stack, host, machine, outgoing)
        return migrator

    def _ram_save(
        self,
        machine: Machine,
        lock: IothreadLock,
        settings: Settings,
        outgoing: Progress,
        on_event: Callable[[str, dict[str, object]], None],
    ) -> RamSave:
        def synced(newly_dirty: int) -> None:
            if outgoing.synced(newly_dirty) and settings.enabled("events"):
                on_event("MIGRATION_PASS", {"pass": outgoing.stats.dirty_sync_count})

        return RamSave(
            machine,
            lock,
            outgoing.stats,
            on_sync=synced,
            postcopy=lambda: settings.enabled("postcopy-ram"),
            cache_bytes=settings.delta_cache_bytes,
            deltas=outgoing.deltas,
            channels=MultifdSave(outgoing.stats, outgoing.packing),
        )

    async def _open_metrics(self, stack: AsyncExitStack, host: Host, machine: Machine, outgoing: Progress) -> None:
        if self._config.metrics.listen is None:
            return
        # 150 ms of imports and 2 MiB, which most daemons do not need.
        from migrated.daemon.metrics_server import open_metrics  # noqa: PLC0415

        server = await open_metrics(self._config, host, machine, self._history, outgoing, self._trust.current)
        stack.push_async_callback(server.close)

    async def _machine(
        self,
        registry: SaveVMRegistry,
        ownership: Ownership,
        settings: Settings,
        on_event: Callable[[str, dict[str, object]], None],
    ) -> Machine:
        config = self._config.machine
        machine = Machine(
            config.name,
            uuid=config.uuid,
            machine_type=config.type,
            initial_run_state=await self._initial_run_state(ownership),
            stop_timeout_s=lambda: settings.seconds("x-migrated-stop-timeout"),
            on_event=on_event,
            on_device_declared=lambda device: register_device(registry, device),
            on_device_withdrawn=lambda device: unregister_device(registry, device),
        )
        if ownership.record.hold is Hold.INCOMPLETE:
            # To look at a mapping is to register it anew, and that would let go of who waits there: with zeros.
            machine.bar(ownership.text())
        return machine

    def _snapshot_store(self) -> SnapshotStore:
        store = SnapshotStore(self._state / "snapshots")
        store.clear()
        return store

    async def _initial_run_state(self, ownership: Ownership) -> RunState:
        """Decide what this host is, from its record first and its configuration second."""
        match ownership.record.hold:
            case Hold.OWNER:
                return ownership.record.run_state
            case Hold.PREPARED:
                # What was loaded went with the process before; it was never started, and the source has all of it.
                await ownership.become(Hold.PARTIAL, peer=ownership.record.peer)
                return RunState.INMIGRATE
            case Hold.PARTIAL:
                return RunState.INMIGRATE
            case Hold.INCOMPLETE:
                # What is missing cannot be told from what is there any more: nobody may touch that memory.
                self._log.error("memory_incomplete", **_advice(ownership))
                return RunState.IO_ERROR
            case Hold.RELEASED | Hold.ACCEPTED:
                self._log.error("outcome_unknown", **_advice(ownership))
                return RunState.FINISH_MIGRATE
            case Hold.MOVED:
                return RunState.POSTMIGRATE
            case Hold.NONE if self._incoming is not None:
                return RunState.INMIGRATE
            case Hold.NONE:
                await ownership.become(Hold.OWNER)
                return RunState.RUNNING

    def _load_handlers(self, registry: SaveVMRegistry, machine: Machine) -> None:
        """Call ``register(registry, machine)`` of every ``[handlers] load`` entry."""
        for entry in self._config.handlers.load:
            module, _, name = entry.partition(":")
            try:
                register = getattr(importlib.import_module(module), name)
                register(registry, machine)
            except Exception as error:  # foreign code, at start: name the entry that failed and end
                raise ConfigError("[handlers] load", entry, f"cannot be loaded: {error!r}") from error
            self._log.info("handler_loaded", entry=entry)

    async def _open_sockets(
        self, stack: AsyncExitStack, services: Services, machine: Machine, migrator: Migrator
    ) -> None:
        config = self._config
        attach = AttachServer(machine, config.attach_socket, mode=config.attach.mode, group=config.attach.group)
        await attach.start()
        stack.push_async_callback(attach.close)
        control = ControlServer(
            services,
            config.control_socket,
            mode=config.control.mode,
            group=config.control.group,
            read_only_group=config.control.read_only_group,
        )
        await control.start()
        stack.push_async_callback(lambda: control.close(self._stopping.result() if self._stopping.done() else None))
        if self._inherited is not None:
            migrator.descriptors.add(*self._inherited)
        if self._incoming not in (None, "defer"):
            await migrator.open_listener(str(self._incoming))
        if config.workload.command:
            command = WorkloadCommand(config.workload.command, self._runtime, config.attach_socket, self._log)
            await stack.enter_async_context(command.running())


class _Relay:
    """Events of the machine and the engine, on their way to a migrator that does not exist yet."""

    def __init__(self) -> None:
        self.target: Callable[[str, dict[str, object]], None] = lambda name, data: None

    def __call__(self, name: str, data: dict[str, object]) -> None:
        self.target(name, data)


class _Both:
    """The hooks of both halves of a handler as one object."""

    def __init__(self, *halves: object) -> None:
        self._halves = halves

    def __getattr__(self, name: str) -> Any:
        for half in self._halves:
            if hasattr(half, name):
                return getattr(half, name)
        raise AttributeError(name)


def _advice(ownership: Ownership) -> dict[str, str]:
    """Return what the log says of a record that needs somebody."""
    return {
        "text": ownership.text(),
        "next_step": ownership.next_step(),
        "migration_id": ownership.record.migration_id,
    }


def _status_line(name: str, data: dict[str, object]) -> str:
    return f"{name.lower().replace('_', ' ')}" + (
        f": {', '.join(str(value) for value in data.values())}" if data else ""
    )


def argument_parser() -> argparse.ArgumentParser:
    """Return what the command line may say; the manual page is made of it."""
    parser = argparse.ArgumentParser(prog="migrated", description="live-migration daemon for one machine")
    parser.add_argument("--config", required=True, type=Path, help="configuration file (TOML)")
    parser.add_argument("--incoming", metavar="URI", help="start as a destination: wait at URI, or 'defer'")
    parser.add_argument("--check-config", action="store_true", help="validate the configuration and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``migrated``; return its exit status."""
    arguments = argument_parser().parse_args(argv)
    try:
        config = load_config(arguments.config)
        if arguments.check_config:
            check_trust(config)
    except (ConfigError, TlsError) as error:
        sys.stderr.write(f"migrated: {error}\n")
        return EXIT_CONFIG
    if arguments.check_config:
        sys.stdout.write(f"{arguments.config}: OK (machine {config.machine.name})\n")
        return 0
    log = configure_log(config.log).bind(machine=config.machine.name)
    incoming = arguments.incoming or config.migration.incoming
    try:
        inherited = take_inherited(incoming)
        uvloop.run(_serve(config, incoming, log, inherited, arguments.config))
    except (ConfigError, TlsError) as error:
        log.error("cannot_start", error=str(error), error_id=id_of(error))
        return EXIT_CONFIG
    except (MigratedError, OSError) as error:
        log.error("cannot_start", error=str(error), error_id=id_of(error))
        return EXIT_FAILURE
    return 0


def id_of(error: MigratedError | OSError) -> str:
    """Return the id of whatever keeps a daemon from starting."""
    return error.error_id if isinstance(error, MigratedError) else "host-io"


async def _serve(
    config: Config, incoming: str | None, log: FilteringBoundLogger, inherited: tuple[str, int] | None, path: Path
) -> None:
    daemon = Daemon(config, incoming, log, inherited, path)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop, "host-signal")
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    await daemon.run()
