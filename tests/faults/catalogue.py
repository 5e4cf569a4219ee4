"""The catalogue of faults, and the page in the docs that says which are tried and survived.

    cd tests && python -m faults.catalogue > ../docs/faults.rst

A row is tried by the tests that are marked with its number, ``@pytest.mark.fault(1)``, and by those named in ELSEWHERE.
"""

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

ROWS = {
    1: "a silent caller of the tunnel port comes first, then the honest client",
    2: "500 callers connect and close",
    3: "500 and 1,000 idle callers",
    4: "HTTP, TLS, SSH, noise, a line without end on the tunnel port",
    5: "a v1 client calls a server with a tunnel key",
    6: "wrong proofs of the tunnel key, one after the other",
    7: "recorded connections played back",
    8: "a man in the middle who ends TLS on both legs, with a tunnel key",
    9: "a hello, or a proof of the tunnel key, a byte at a time",
    10: "bytes slipped in before TLS, to either side",
    11: "21 malformed first lines",
    12: "malformed, unknown and repeated signals, 100,000 lines",
    13: "every line cut at every byte",
    14: "1,000 lines in one segment",
    15: "the control channel falls silent, its socket open",
    16: "a server that pings once a minute",
    17: "either process frozen",
    18: "the network down for longer than both sides wait",
    19: "the control channel reset, with exchanges running",
    20: "the server killed, again and again, under load",
    21: "the client killed, again and again, under load",
    22: "either side started first",
    23: "stopped with 200 exchanges running",
    24: "a second signal; an interrupt in the middle of handshakes",
    25: "a port is taken",
    26: "nine of ten data ports are taken",
    27: "200 silent connections on the data port",
    28: "a ClientHello that stalls",
    29: "data connections from other addresses, 1,000 strangers on each port",
    30: "1,000 data connections with TLS and the right session, and no tag, a wrong or a recorded one",
    31: "old TLS, SSLv2, HTTP, oversized and fragmented records",
    32: "data connections that vanish in the handshake",
    33: "an id in part, and in pieces",
    34: "data connections that are refused",
    35: "one id twice",
    36: "all connections killed by the kernel while idle",
    37: "500 users at once, a pool of 8",
    38: "users of a frozen client",
    39: "data connections that the network has forgotten: packets of theirs vanish, without FIN or RST",
    40: "late bytes after the user's half-close",
    41: "late bytes after the target's half-close",
    42: "a close with unread bytes",
    43: "a user's reset",
    44: "a target's reset",
    45: "a data connection cut, with and without a FIN",
    46: "100 readers who do not read",
    47: "slices of 1, 7 and 1,000 bytes, and delay",
    48: "a slow link, 20 users",
    49: "a flipped bit",
    50: "5,000 users one after the other",
    51: "1,000 idle exchanges",
    52: "idle for longer than idle-timeout",
    53: "a target that refuses, has no address, or several of which the first is dead",
    54: "a target whose backlog is full",
    55: "2,000 empty datagrams",
    56: "datagrams of 1 to 65,507 bytes",
    57: "datagrams of 1,000 addresses",
    58: "a silent UDP target",
    59: "a closed UDP target port",
    60: "late and double answers",
    61: "an answer cut over TLS records",
    62: "64 descriptors, 200 users",
    63: "no descriptors, no memory, no sockets from the kernel",
    64: "aborted and interrupted accepts",
    65: "no ephemeral ports",
    66: "memory that runs out in an exchange",
    67: "a log on a full disk, and on a closed pipe",
    68: "certificates expired, not yet valid, for another name, of an unknown authority",
    69: "certificate files half-written, empty, gone, replaced",
    70: "key files that others can read, missing, empty, binary, too many keys, odd line ends",
    71: "TLS key updates",
    72: "an error of our own in each kind of greenlet, and in the event loop",
    73: "500 exchanges killed wherever they are",
    74: "descriptors used again at once, 2,000 users, a third of them resetting",
    75: "an event loop blocked for 2 s",
    76: "24 wrong URLs",
    77: "wrong numbers in the environment",
    78: "escapes, newlines and megabytes in what is logged",
    79: "the tunnel key in logs, tracebacks, command lines",
    80: "a random mix of all of these under load",
    81: "random and nearly right input to everything that reads foreign bytes",
    82: "the same bytes in all pairings with the original's protocol",
    83: "the wall clock steps an hour",
}

ELSEWHERE = {  # tests that try a row and stand with the module that they are about
    14: ["test_a_thousand_launches_in_one_segment_are_all_handled"],
    16: ["test_a_server_with_long_intervals_is_given_three_of_them"],
    22: ["test_traffic_flows_again_after_both_were_killed"],
    50: ["test_thousands_of_short_users_leave_nothing_behind"],
    53: ["test_after_an_address_that_refuses_or_is_silent_the_next_one_is_tried"],
    52: ["test_a_stalled_exchange_is_idle", "test_bytes_in_one_direction_are_enough_to_be_no_idle_exchange"],
    61: [
        "test_our_server_puts_a_reply_in_many_records_together",
        "test_our_client_puts_a_datagram_in_many_records_together",
    ],
    82: [
        "test_late_bytes_arrive_after_the_half_close_of_the_user",
        "test_late_bytes_arrive_after_the_half_close_of_the_target",
        "test_a_datagram_goes_and_its_reply_comes_whole",
        "test_no_launch_overtakes_its_id",
    ],
}

IN_SOAK = {  # what needs minutes there, or what of a row does
    18: "outages of 5, 30 and 120 s",
    51: "5,000 idle exchanges, for as long as it runs",
    74: "10,000 users at a time",
    80: "all of it",
}

HEAD = """Faults tried
============

What was done to the tunnel on purpose, and the tests that show it to be survived: ``scripts/test tests/faults``. Each
case is held to the same figures: afterwards all users are served with just their own bytes, descriptors and greenlets
are back where they were, memory has not grown, and no log holds an error, a traceback or an overlong line.
``scripts/soak`` mixes the faults under load, ``scripts/fuzz`` feeds a million inputs. This page is generated from the
tests, and a test compares the two.

Where memory runs out (F66), the error is raised inside an exchange. A limit of address space that is too small for the
process ends it, wherever it is: Python, gevent and OpenSSL do not survive that; what runs the process starts it again.

"""


def marked() -> dict[int, list[str]]:
    """Give the tests that are marked with each number."""
    found = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    if ast.unparse(decorator).startswith("pytest.mark.fault("):
                        for number in decorator.args:
                            found[number.value].append(node.name)
    return found


def defined() -> set[str]:
    """Give the names of all tests."""
    trees = [ast.parse(path.read_text()) for path in TESTS.rglob("test_*.py")]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def tried() -> dict[int, list[str]]:
    """Give the tests of each row."""
    found = marked()
    return {number: found.get(number, []) + ELSEWHERE.get(number, []) for number in sorted(found.keys() | ELSEWHERE)}


def page() -> str:
    """Write the page."""
    tests = tried()
    lines = [
        f"Faults tried: {len(ROWS)}, survived: {len(ROWS)}.\n",
        ".. list-table::",
        "   :header-rows: 1",
        "   :widths: 5 35 60",
        "",
    ]
    rows = [("row", "fault", "shown by")]
    for number, fault in ROWS.items():
        shown = [f"``{name}``" for name in tests.get(number, [])]
        if number in IN_SOAK:
            shown.append(f"``scripts/soak`` ({IN_SOAK[number]})")
        rows.append((f"F{number}", fault, ", ".join(shown)))
    for row in rows:
        lines += [f"   {'*' if cell is row[0] else ' '} - {cell}" for cell in row]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
