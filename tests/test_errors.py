import errno

import pytest

from nodepass_gevent.errors import ProtocolError, reason


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (OSError(errno.EACCES, "Permission denied: A:80, it needs CAP_NET_BIND_SERVICE"),
         "permission denied: A:80, it needs CAP_NET_BIND_SERVICE"),
        (OSError("No errno"), "No errno"),
        (ProtocolError("A line"), "A line"),
        (TimeoutError(), "TimeoutError"),
    ],
)  # fmt: skip
def test_why_is_the_text_of_an_errno_with_its_names_as_they_are_or_the_exceptions_own(exc, text):
    assert reason(exc) == text
