"""A process that encodes: it gets the encoder once, then chunks of records, until its pipe is closed."""

from multiprocessing.connection import Connection


def work(handle: int) -> None:
    """Answer each chunk that comes through the pipe with its outcomes and notices."""
    connection: Connection = Connection(handle)
    try:
        encoder = connection.recv()
        while True:
            connection.send(encoder.chunk(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the run ended, however it ended
        return
