"""What each picture shows."""

from .canvas import Canvas


def overview() -> Canvas:
    """Draw who is where: users, server, the firewall, client and service."""
    picture = Canvas(900, 258, "Users, server, client and service")
    picture.text(135, 30, "Internet", "middle small")
    picture.text(700, 30, "private network", "middle small")
    picture.box(512, 42, 370, 202, "box")
    for y in (62, 118, 174):
        picture.box(20, y, 92, 40, "user")
        picture.text(66, y + 25, "user")
        picture.arrow(112, y + 20, 226, 138 + (y - 118) * 0.35)
    picture.box(228, 82, 130, 112)
    picture.text(293, 118, "server", "middle head")
    picture.text(293, 146, "public port", "middle small")
    picture.text(293, 164, "tunnel port", "middle small")
    picture.box(496, 60, 20, 166, "wall")
    picture.text(506, 30, "firewall, NAT", "middle small")
    picture.box(630, 82, 104, 112)
    picture.text(682, 142, "client", "middle head")
    picture.box(786, 104, 84, 68, "service")
    picture.text(828, 142, "service")
    picture.arrow(734, 138, 785, 138)
    picture.arrow(629, 100, 359, 100, "control")
    picture.text(428, 92, "control channel", "middle small")
    picture.arrow(629, 128, 359, 128, "data")
    picture.text(428, 121, "a user's data", "middle small")
    for y in (152, 164, 176):
        picture.arrow(629, y, 359, y, "idle")
    picture.text(427, 194, "ready for next users", "middle small")
    picture.text(573, 214, "only calls out", "middle small")
    return picture


def way() -> Canvas:
    """Draw the way of one user, in time."""
    sides = {"user": 90, "server": 310, "client": 590, "target": 810}
    picture = _sequence(900, 400, "The way of a connection", sides)
    _step(
        picture, sides, 92, "client", "server", "data connections, made ready", "idle", "a pool, before anybody comes"
    )
    _step(picture, sides, 146, "user", "server", "connects to the public port")
    _step(picture, sides, 186, "server", "client", "launch: “a user on 0a1b2c3d”", "control", "on the control channel")
    _step(picture, sides, 240, "client", "target", "connects")
    _step(picture, sides, 240, "client", "server", "another one for the pool", "idle")
    for one, two in (("user", "server"), ("server", "client"), ("client", "target")):
        picture.arrow(sides[one] + 4, 290, sides[two] - 4, 290, "data", both=True)
    picture.text(450, 281, "bytes, both ways", "middle small")
    _step(picture, sides, 340, "user", "server", "ends its sending", "data")
    _step(picture, sides, 340, "server", "client", "end of stream", "data")
    _step(picture, sides, 340, "client", "target", "end of stream", "data")
    last = "The other direction goes on until it ends, too. The data connection is used once."
    picture.text(450, 382, last, "middle small")
    return picture


def handshake() -> Canvas:
    """Draw how two peers of v2 come to a session and a data connection, with a tunnel key."""
    sides = {"client": 150, "server": 750}
    picture = _sequence(900, 580, "The opening of profile v2", sides)
    steps = (
        (90, "client", "connects to the tunnel port", "line"),
        (122, "server", "//off?v=2&n=<nonce>&a=psk1#2 — the offer, and the TLS mode", "control"),
        (154, "client", "//web?v=2#hello", "control"),
        (186, "client", "TLS 1.3, “nodepass-ctl/2”; tls=2: the certificate is verified", "line"),
        (218, "client", "//auth?n=…&m=<proof>&c=udp,fail,…#c", "control"),
        (250, "server", "//auth?s=<session>&m=<proof>&c=…&i=5&p=1024#s", "control"),
        (312, "server", "ping, every 5 s, and its answer", "control"),
        (390, "client", "connects to the tunnel port", "line"),
        (422, "client", "//<session>?v=2#data, and TLS 1.3, “nodepass-data/2”", "data"),
        (454, "client", "session, tag", "data"),
        (486, "server", "id, tag: the data connection is ready", "data"),
        (528, "server", "//<id>#1 — launch, when a user comes", "control"),
    )
    for y, who, words, kind in steps:
        _step(picture, sides, y, who, "server" if who == "client" else "client", words, kind)
    keyless = "The session stands. Without a key: //<session>?c=…#welcome in place of the two proofs."
    picture.text(450, 276, keyless, "middle small")
    picture.line(60, 334, 840, 334, "faint")
    picture.text(450, 354, "and, for each data connection of the pool", "middle small")
    return picture


def udp() -> Canvas:
    """Draw sessions of datagrams."""
    picture = Canvas(900, 250, "UDP sessions")
    for y, address in ((40, "192.0.2.7:51034"), (150, "198.51.100.9:4500")):
        picture.box(16, y, 150, 56, "user")
        picture.text(91, y + 24, "user")
        picture.text(91, y + 43, address, "middle code")
        picture.arrow(166, y + 28, 258, y + 28, "line", both=True)
        picture.text(212, y + 18, "datagrams", "middle small")
        picture.arrow(362, y + 28, 588, y + 28, "data", both=True)
        picture.text(475, y + 18, "one data connection", "middle small")
        picture.text(475, y + 48, "length, bytes, length, bytes …", "middle code")
        picture.arrow(682, y + 28, 766, y + 28, "line", both=True)
        picture.text(724, y + 18, "a socket", "middle small")
    picture.box(259, 24, 102, 198)
    picture.text(310, 118, "server", "middle head")
    picture.text(310, 138, "public port", "middle small")
    picture.box(589, 24, 92, 198)
    picture.text(635, 128, "client", "middle head")
    picture.box(768, 24, 116, 198, "service")
    picture.text(826, 118, "target")
    picture.text(826, 138, "any number", "middle small")
    picture.text(826, 154, "of answers", "middle small")
    last = "A session ends after udp-session-timeout (60 s) of silence in both directions."
    picture.text(450, 240, last, "middle small")
    return picture


def _sequence(width: int, height: int, title: str, sides: dict[str, int]) -> Canvas:
    picture = Canvas(width, height, title)
    for name, x in sides.items():
        picture.line(x, 54, x, height - 40, "faint")
        picture.box(x - 52, 18, 104, 36, {"user": "user", "target": "service"}.get(name, "box"))
        picture.text(x, 41, name, "middle head")
    return picture


def _step(
    picture: Canvas, sides: dict[str, int], y: float, one: str, two: str, words: str, kind: str = "line", more: str = ""
) -> None:
    away = 4 if sides[one] < sides[two] else -4
    picture.arrow(sides[one] + away, y, sides[two] - away, y, kind)
    middle = (sides[one] + sides[two]) / 2
    picture.text(middle, y - 8, words, "middle code" if "//" in words else "middle small")
    if more:
        picture.text(middle, y + 16, more, "middle small")


PICTURES = {"overview": overview, "way": way, "handshake": handshake, "udp": udp}
