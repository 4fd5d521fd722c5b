"""The inside of the sandbox: limits its own process, then runs one program. Standard library only.

``pipeline/sandbox.py`` starts it as ``python -I sandboxed.py NONCE CPU_SECONDS MEMORY_BYTES`` in a folder that holds
the program. The nonce in the file of the result proves that the program came to its end: leaving early proves nothing.
"""

import os
import resource
import sys
from pathlib import Path
from typing import Any

PROGRAM, RESULT = "program.py", "result"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of what a program must not do, by their beginnings: network, other processes, other libraries, files.
FORBIDDEN = (
    *("socket.", "ssl.", "subprocess.", "pty.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.kill", "signal.pthread_kill", "resource.", "ctypes.dlsym", "ctypes.call_function", "sqlite3."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.chflags", "os.lockf", "os.utime", "os.setxattr", "os.removexattr", "os.chdir", "shutil.", "tempfile."),
)


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise PermissionError for an audit event that a program must not cause; a hook cannot be taken off again."""
    if event.startswith(FORBIDDEN):
        raise PermissionError(f"the sandbox forbids {event}")
    if event == "open" and arguments[2] & WRITING:
        raise PermissionError(f"the sandbox forbids writing to {arguments[0]!r}")


def limit(cpu_seconds: int, memory: int) -> None:
    """Set the kernel's limits for this process: seconds of the CPU, bytes of memory, no core file, no file of size."""
    for what, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 4096),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))


def main(nonce: str, cpu_seconds: int, memory: int) -> None:
    """Run the program of this folder as a module of its own, and write what came of it."""
    program = Path(PROGRAM).read_bytes()
    result = os.open(RESULT, os.O_WRONLY | os.O_CREAT)
    limit(cpu_seconds, memory)
    sys.addaudithook(forbid)
    try:
        exec(compile(program, PROGRAM, "exec"), {})  # noqa: S102
    except BaseException:  # SystemExit too: the tests did not come to their end
        os.write(result, f"{nonce} failed".encode())
    else:
        os.write(result, f"{nonce} passed".encode())
    os._exit(0)  # no exit handlers of the program


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.argv = [PROGRAM]
    main(words[0], int(words[1]), int(words[2]))
