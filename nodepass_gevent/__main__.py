"""The entry point: makes blocking code cooperative before anything else is imported, then runs the command."""

from gevent import monkey

monkey.patch_all()

import sys  # noqa: E402  nothing may stand before the patch

from .cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
