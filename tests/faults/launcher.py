"""The command as users start it, with two doors for tests of faults; the deadlines are shortened from outside.

    FAULT_LIMITS='{"caller_timeout_s": 2}' python tests/faults/launcher.py server://...

SIGUSR1 prints how many greenlets live. SIGUSR2 blocks the event loop for FAULT_BLOCK_S seconds and steps what
``time.time`` says by FAULT_CLOCK_STEP_S. Nothing else of the product is touched.
"""

from gevent import monkey

monkey.patch_all()

import gc  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
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


def hurried(make):
    """Make a role with the given deadlines, be they settings or not."""

    def make_hurried(config):
        settings = {field.name for field in fields(config)}
        limits = replace(config.limits, **{name: value for name, value in LIMITS.items() if name not in settings})
        return make(replace(config, limits=limits, **{name: LIMITS[name] for name in settings & set(LIMITS)}))

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


cli.ROLES = {name: hurried(make) for name, make in cli.ROLES.items()}
gevent.signal_handler(signal.SIGUSR1, count_greenlets)
gevent.signal_handler(signal.SIGUSR2, disturb)
sys.exit(cli.main())
