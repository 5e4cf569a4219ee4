"""NodePass on gevent: a TCP/UDP tunnel with a pool of one-time data connections."""

__version__ = "0.1.0"
