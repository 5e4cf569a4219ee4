"""The command as users start it, with doors for tests of faults; the deadlines are shortened from outside.

    FAULT_LIMITS='{"caller_timeout_s": 2}' python tests/faults/launcher.py server://...

SIGUSR1 prints how many greenlets live. SIGUSR2 steps what ``time.time`` says by FAULT_CLOCK_STEP_S, blocks the event loop
for FAULT_BLOCK_S seconds, and kills FAULT_KILLS exchanges, one each millisecond, wherever they are.
FAULT_RAISE="module:function@n,..." lets the n-th call of a function fail as a fault of our own would.
"""

from gevent import monkey

monkey.patch_all()

import gc  # noqa: E402
import importlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import fields, replace  # noqa: E402

import gevent  # noqa: E402

sys.path.pop(0)  # this directory is no place to import from

from nodepass_gevent import cli  # noqa: E402

LIMITS = json.loads(os.environ.get("FAULT_LIMITS", "{}"))
BLOCK_S = float(os.environ.get("FAULT_BLOCK_S", "0"))
STEP_S = float(os.environ.get("FAULT_CLOCK_STEP_S", "0"))
KILLS = int(os.environ.get("FAULT_KILLS", "0"))
roles = []


def hurried(make):
    """Make a role with the given deadlines, be they settings or not."""

    def make_hurried(config):
        settings = {field.name for field in fields(config)}
        limits = replace(config.limits, **{name: value for name, value in LIMITS.items() if name not in settings})
        roles.append(make(replace(config, limits=limits, **{name: LIMITS[name] for name in settings & set(LIMITS)})))
        return roles[-1]

    return make_hurried


def count_greenlets() -> None:
    gc.collect()
    living = sum(isinstance(each, gevent.Greenlet) and not each.dead for each in gc.get_objects())
    os.write(1, b"greenlets %d\n" % living)


def disturb() -> None:
    time_now = time.time
    if STEP_S:
        time.time = lambda: time_now() + STEP_S
    monkey.get_original("time", "sleep")(BLOCK_S)
    if KILLS:
        gevent.spawn(kill_exchanges)


def kill_exchanges() -> None:
    killed = 0
    while killed < KILLS:
        running = [greenlet for greenlet in exchanges_running() if not greenlet.dead]
        if running:
            random.choice(running).kill(block=False)
            killed += 1
        gevent.sleep(0.001)
    os.write(1, b"killed %d\n" % killed)


def exchanges_running() -> list:
    """Give the greenlets of exchanges, whichever group holds them."""
    groups = [role.exchanges for role in roles]
    return [greenlet for group in groups for greenlet in getattr(group, "greenlets", None) or group._pool.greenlets]


def raise_once(where: str) -> None:
    path, number = where.split("@")
    module, name = path.split(":")
    owner, calls = importlib.import_module(module), itertools.count(1)
    *outer, name = name.split(".")
    for each in outer:
        owner = getattr(owner, each)
    function = getattr(owner, name)

    def fail(*args, **kwargs):
        if next(calls) == int(number):
            raise RuntimeError("injected")
        return function(*args, **kwargs)

    setattr(owner, name, fail)


for each in filter(None, os.environ.get("FAULT_RAISE", "").split(",")):
    raise_once(each)
cli.ROLES = {name: hurried(make) for name, make in cli.ROLES.items()}
gevent.signal_handler(signal.SIGUSR1, count_greenlets)
gevent.signal_handler(signal.SIGUSR2, disturb)
sys.exit(cli.main())
