"""The entry point: makes blocking code cooperative before anything else is imported, then runs the command."""

from gevent import monkey

monkey.patch_all()

import signal  # noqa: E402  nothing may stand before the patch
import sys  # noqa: E402

# Who is told to read its configuration again, or to open its log anew, while it is only starting does so when it can:
# unhandled, these signals would end it. ``process.take_signals`` ends that.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))

from .cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
