"""Pipes: what goes in comes out, and none is used again that holds a byte."""

import errno
import fcntl
import os
import socket

import pytest
from support import open_pipes

from nodepass_gevent.pipes import SIZE, Pipe, Pipes


@pytest.fixture(autouse=True)
def no_pipe_is_left():
    before = open_pipes()
    yield
    assert open_pipes() == before


@pytest.fixture
def sockets():
    """Give two connected pairs, of which a pipe goes between the inner ends, which do not wait."""
    user, source = socket.socketpair()
    sink, target = socket.socketpair()
    with user, source, sink, target:
        source.setblocking(False)
        sink.setblocking(False)
        yield user, source, sink, target


@pytest.fixture
def pipe():
    pipe = Pipe()
    yield pipe
    pipe.close()


def close_all(*pipes):
    for pipe in pipes:
        pipe.close()


def make_holding(pipe):
    user, source = socket.socketpair()
    with user, source:
        user.sendall(b"foreign")
        assert pipe.fill(source.fileno()) == pipe.held == len(b"foreign")


def test_what_a_pipe_takes_from_a_socket_it_gives_to_another_one(pipe, sockets):
    user, source, sink, target = sockets
    for data in (b"some", b"bytes"):
        user.sendall(data)
        assert pipe.fill(source.fileno()) == pipe.held == len(data)
        assert pipe.drain(sink.fileno()) == len(data)
        assert pipe.held == 0
        assert target.recv(100) == data


def test_a_pipe_does_not_wait(pipe, sockets):
    user, source, sink, _ = sockets
    with pytest.raises(BlockingIOError):
        pipe.fill(source.fileno())
    user.sendall(bytes(100))
    pipe.fill(source.fileno())
    with pytest.raises(BlockingIOError):
        while True:
            sink.send(bytes(65536))
    with pytest.raises(BlockingIOError):
        pipe.drain(sink.fileno())
    assert pipe.held == 100


def test_a_pipe_tells_of_the_end_of_stream(pipe, sockets):
    user, source, _, _ = sockets
    user.close()
    assert pipe.fill(source.fileno()) == 0


def test_what_cannot_be_spliced_is_told_and_the_pipe_is_empty(pipe):
    with open("/proc/self/status") as file, pytest.raises(OSError) as told:
        pipe.fill(file.fileno())
    assert told.value.errno == errno.EINVAL
    assert pipe.held == 0


def test_a_pipe_that_is_given_back_is_taken_again():
    pipes = Pipes(2)
    pipe = pipes.take()
    pipes.give_back(pipe)
    assert pipes.take() is pipe
    pipe.close()


def test_a_pipe_that_holds_bytes_is_closed():
    pipes, before = Pipes(2), open_pipes()
    pipe = pipes.take()
    make_holding(pipe)
    pipes.give_back(pipe)
    assert open_pipes() == before
    other = pipes.take()
    assert other is not pipe
    other.close()


def test_no_more_pipes_are_kept_than_the_limit():
    pipes, before = Pipes(2), open_pipes()
    taken = [pipes.take() for _ in range(5)]
    assert open_pipes() == before + 10
    for pipe in taken:
        pipes.give_back(pipe)
    assert open_pipes() == before + 4
    close_all(pipes.take(), pipes.take())


@pytest.mark.parametrize("last", ["kept", "closed because it holds bytes", "closed because enough are kept"])
def test_there_are_no_more_pipes_than_the_most(last):
    pipes = Pipes(0 if "enough" in last else 2)
    pipes.most = 2
    first, second = pipes.take(), pipes.take()
    with pytest.raises(OSError, match="as many pipes as there may be"):
        pipes.take()
    if "bytes" in last:
        make_holding(first)
    pipes.give_back(first)
    third = pipes.take()
    with pytest.raises(OSError, match="as many pipes as there may be"):
        pipes.take()
    close_all(second, third)


def test_a_pipe_that_could_not_be_made_does_not_count(monkeypatch):
    def fail(_flags):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    pipes = Pipes(2)
    pipes.most = 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", fail)
        with pytest.raises(OSError, match="Too many open files"):
            pipes.take()
    pipes.take().close()


@pytest.mark.parametrize(("size", "is_used"), [(65536, True), (8192, False)], ids=["default size", "two pages"])
def test_a_pipe_without_the_size_that_is_wanted_is_used_where_it_is_better_than_to_copy(monkeypatch, size, is_used):
    """A kernel gives less to a user who has used up his share of pipe memory, which root never has."""

    def shrunk(_descriptor, command, argument=0):
        if command == fcntl.F_SETPIPE_SZ:
            assert argument == SIZE
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        assert command == fcntl.F_GETPIPE_SZ
        return size

    pipes, before = Pipes(2), open_pipes()
    pipes.most = 1
    monkeypatch.setattr(fcntl, "fcntl", shrunk)
    if is_used:
        pipes.take().close()
        return
    for _ in range(2):  # it does not count
        with pytest.raises(OSError, match="no memory for a pipe"):
            pipes.take()
    assert open_pipes() == before


def test_a_pipe_has_the_size_that_is_wanted(pipe):
    assert fcntl.fcntl(pipe._writer, fcntl.F_GETPIPE_SZ) == SIZE
