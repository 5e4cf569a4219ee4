"""The command as users start it, with doors for tests of faults.

SIGUSR1 prints how many greenlets are at work. SIGUSR2 steps what ``time.time`` says by FAULT_CLOCK_STEP_S, blocks the
event loop for FAULT_BLOCK_S seconds, and kills FAULT_KILLS exchanges, one each millisecond, wherever they are.
FAULT_RAISE="module:function@n,..." lets the n-th call of a function fail as a fault of our own would, with FAULT_ERROR.
"""

from gevent import monkey

monkey.patch_all()

import builtins  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import itertools  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402

sys.path.pop(0)  # this directory is no place to import from

from nodepass_gevent import cli  # noqa: E402

BLOCK_S = float(os.environ.get("FAULT_BLOCK_S", "0"))
STEP_S = float(os.environ.get("FAULT_CLOCK_STEP_S", "0"))
ERROR = getattr(builtins, os.environ.get("FAULT_ERROR", "RuntimeError"))
KILLS = int(os.environ.get("FAULT_KILLS", "0"))
roles = []


def noted(make):
    """Remember the roles that are made."""

    def make_and_note(config, before):
        roles.append(make(config, before))
        return roles[-1]

    return make_and_note


def works(greenlet) -> bool:
    """Whether a greenlet is in code of the product, and no spare one of a crew that waits for work."""
    frame = greenlet.gr_frame
    while frame:
        if "/nodepass_gevent/" in frame.f_code.co_filename and not frame.f_code.co_filename.endswith("/crew.py"):
            return True
        frame = frame.f_back
    return False


def count_greenlets() -> None:
    gc.collect()
    living = sum(isinstance(each, gevent.Greenlet) and works(each) for each in gc.get_objects())
    os.write(1, b"greenlets %d\n" % living)


def disturb() -> None:
    time_now = time.time
    if STEP_S:
        time.time = lambda: time_now() + STEP_S
    monkey.get_original("time", "sleep")(BLOCK_S)
    if KILLS:
        gevent.spawn(kill_exchanges)


def kill_exchanges() -> None:
    for _ in range(KILLS):
        gevent.get_hub().loop.run_callback(kill_one)
        gevent.sleep(0.002)
    os.write(1, b"killed\n")


def kill_one() -> None:
    """Kill an exchange from the event loop, so that it is the one that was looked at."""
    running = [each for role in roles for each in role.exchanges._greenlets.greenlets if works(each)]
    if running:
        random.choice(running).throw(gevent.GreenletExit)


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
            raise ERROR("injected")
        return function(*args, **kwargs)

    setattr(owner, name, fail)


for each in filter(None, os.environ.get("FAULT_RAISE", "").split(",")):
    raise_once(each)
cli.ROLES = {name: noted(make) for name, make in cli.ROLES.items()}
gevent.signal_handler(signal.SIGUSR1, count_greenlets)
gevent.signal_handler(signal.SIGUSR2, disturb)
sys.exit(cli.main())
