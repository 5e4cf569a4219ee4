"""What the single file runs: the command, which is to know itself by the name of that file."""

import os
import sys

sys.argv[0] = os.environ.pop("NODEPASS_SINGLE_FILE", sys.argv[0])

from nodepass_gevent.__main__ import main  # noqa: E402  it patches, and so wants to be early

sys.exit(main())
