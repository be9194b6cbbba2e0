"""An engine's process."""

from __future__ import annotations

import os
import signal

import zmq

from understudy.actors.engine import Engine, engine_hello
from understudy.actors.loading import load_runner
from understudy.actors.process import STOP_SIGNALS, address_in, identity_of, settle, tell_dropped
from understudy.protocol.messages import Dying
from understudy.runtime.config import EngineConfig
from understudy.runtime.kit.actor import SUPERVISOR, Send
from understudy.runtime.kit.clock import MonotonicClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.loop import StepLoop, send_all
from understudy.runtime.kit.mailbox import Mailbox
from understudy.runtime.kit.probe import ProcProbe
from understudy.runtime.kit.session import SessionTable
from understudy.runtime.kit.stage import FileStepCard, card_path
from understudy.runtime.log import get_logger
from understudy.runtime.scheduling.scheduler import SchedulerConfig


def run_engine(config: EngineConfig) -> int:
    """Run an engine until it is told to stop.

    Raises:
        ConfigurationError: its model cannot be loaded.
    """
    clock = MonotonicClock()
    identity = identity_of(config.name)
    engine = _make_engine(config, identity, clock)
    mailbox = Mailbox.connect(zmq.Context.instance(), address_in(config.run_dir), identity)
    sessions = SessionTable(identity)
    driver = Driver(engine, sessions, clock)
    loop = StepLoop(driver, mailbox, engine)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.stop())
    settle()
    get_logger().info("engine is up", name=config.name, pid=os.getpid())
    reason = "told to stop"
    try:
        loop.run()
        engine.land()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        # The last will: whoever reads it need not wait for the silence.
        will = driver.sessions.outgoing([Send(SUPERVISOR, Dying(reason))], clock.now())
        send_all(mailbox, will)
        mailbox.close()
        tell_dropped(sessions, mailbox)
    return 0


def _make_engine(config: EngineConfig, identity: str, clock: MonotonicClock) -> Engine:
    loaded = load_runner(config, clock)
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=loaded.max_model_len,
        block_size=config.block_size,
    )
    hello = engine_hello(
        config.name,
        pid=os.getpid(),
        start_time=ProcProbe().start_time(os.getpid()),
        model=config.served_model_name,
        numerics=loaded.numerics,
        scheduler_config=scheduler_config,
        num_blocks=loaded.num_blocks,
        pools_only=loaded.pools_only,
    )
    return Engine(
        hello,
        scheduler_config=scheduler_config,
        num_blocks=loaded.num_blocks,
        # What a token's state is depends on all that follows it where nothing is generated.
        enable_prefix_caching=config.enable_prefix_caching and not loaded.pools_only,
        speculator=loaded.speculator,
        runner=loaded.runner,
        card=FileStepCard(card_path(config.run_dir, config.name), identity),
        clock=clock,
    )
