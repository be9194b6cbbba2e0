"""The supervisor's process."""

from __future__ import annotations

import os
import time
from typing import Final

import zmq

from understudy.actors.process import (
    address_in,
    incarnation,
    run,
    settle,
    tell_dropped,
    until_stopped,
)
from understudy.actors.supervisor import Supervisor, restored_entries
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.config import SupervisorConfig
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.keys import KeyWatch
from understudy.runtime.kit.actor import SUPERVISOR
from understudy.runtime.kit.clock import MonotonicClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.loop import ActorLoop
from understudy.runtime.kit.mailbox import Mailbox
from understudy.runtime.kit.probe import ProcProbe
from understudy.runtime.kit.session import SessionTable
from understudy.runtime.kit.stage import NodeStage
from understudy.runtime.log import get_logger
from understudy.runtime.storage.convicts import ConvictDirectory
from understudy.runtime.storage.disk import OsDisk
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.records import Epoch
from understudy.runtime.storage.segment_writer import SyncPolicy

_DAY_S: Final = 86_400


def run_supervisor(config: SupervisorConfig) -> int:
    """Run a supervisor until it is told to stop.

    Raises:
        ConfigurationError: its socket cannot be bound.
    """
    return run(_serve_supervisor(config))


async def _serve_supervisor(config: SupervisorConfig) -> int:
    clock = MonotonicClock()
    config.journal_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = JournalOptions(policy=SyncPolicy(config.journal_sync))
    journal, recovery = Journal.open(OsDisk(config.journal_dir), options, clock.now())
    for damage in recovery.damage:
        get_logger().error("the journal is damaged", what=str(damage))
    # Epochs grow from one supervisor to the next, and from one start of the machine to the next:
    # there is room for a million of them in each millisecond between two starts.
    first_epoch = max(incarnation() << 20, recovery.epoch + 1)
    journal.append([Epoch(first_epoch + (1 << 20))])
    probe = ProcProbe()
    keys = KeyWatch(config.key_file, None, now=clock.now, complain=get_logger().error)
    convicts = ConvictDirectory(config.quarantine_dir)
    supervisor = Supervisor(
        model=config.served_model_name,
        first_epoch=first_epoch,
        journal=journal,
        probe=probe,
        stage=NodeStage(config.run_dir, probe, convicts),
        limits=AdmissionLimits(requests_max=config.queue_max),
        started_at=clock.now(),
        policy_of=keys.policy_of,
        today=lambda: int(time.time() // _DAY_S),
    )
    supervisor.restore(restored_entries(journal, recovery), clock.now(), recovery.usage)
    for fingerprint in convicts.fingerprints():
        supervisor.dispatcher.quarantine.convict(fingerprint, clock.now())
    try:
        mailbox = Mailbox.bind(zmq.Context.instance(), address_in(config.run_dir))
    except zmq.ZMQError as error:
        raise ConfigurationError(f"{config.run_dir}: no socket can be bound: {error}") from error
    sessions = SessionTable(SUPERVISOR, fences=True)
    loop = ActorLoop(Driver(supervisor, sessions, clock), mailbox)
    settle()
    get_logger().info("supervisor is up", run_dir=str(config.run_dir), pid=os.getpid())
    await until_stopped(loop)
    loop.stop()
    tell_dropped(sessions, mailbox)
    journal.close(clock.now())
    return 0
