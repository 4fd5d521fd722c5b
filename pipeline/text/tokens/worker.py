"""A process that encodes: it gets the encoder once, then chunks of records, until its pipe is closed."""

import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue


def work(handle: int) -> None:
    """Answer each chunk that comes through the pipe with what comes of it, in order.

    A thread reads ahead, so that whoever sends never waits for the one who waits for an answer to be taken.
    """
    connection: Connection = Connection(handle)
    inbox: SimpleQueue[bytes | None] = SimpleQueue()
    try:
        encode = connection.recv()
        threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
        while (message := inbox.get()) is not None:
            connection.send(encode(message))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the run ended, however it ended
        return


def _read(connection: Connection, inbox: "SimpleQueue[bytes | None]") -> None:
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        inbox.put(None)
