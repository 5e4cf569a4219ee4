"""The entry point: keeps signals back, makes blocking code cooperative, then imports and runs the command."""

import signal

# Who is told to read its configuration again, or to open its log anew, while it is only starting does so when it can:
# unhandled, these signals would end it. ``process.take_signals`` ends that. First: to import gevent takes longest.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))

from gevent import monkey  # noqa: E402

monkey.patch_all()

import sys  # noqa: E402  nothing else may stand before the patch

from .cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
