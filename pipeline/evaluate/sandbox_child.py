"""The process inside the sandbox: it limits itself, then runs one program. Standard library only.

``sandbox.py`` starts it as ``python -I sandbox_child.py NONCE CPU_SECONDS MEMORY_BYTES`` in a folder that holds the
program. The nonce in the result file proves that the program ran to its end: a program that exits early writes none.
"""

import os
import sys
from pathlib import Path
from typing import Any

PROGRAM, RESULT = "program.py", "result"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Prefixes of the audit events that a program must not cause: network, other processes, other libraries, files.
FORBIDDEN = (
    *("socket.", "ssl.", "subprocess.", "pty.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.kill", "signal.pthread_kill", "resource.", "ctypes.dlsym", "ctypes.call_function", "sqlite3."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
    *("os.chflags", "os.lockf", "os.utime", "os.setxattr", "os.removexattr", "os.chdir", "shutil.", "tempfile."),
)


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise PermissionError for an audit event that a program must not cause; an audit hook cannot be removed."""
    if event.startswith(FORBIDDEN):
        raise PermissionError(f"the sandbox forbids {event}")
    if event == "open" and arguments[2] & WRITING:
        raise PermissionError(f"the sandbox forbids writing to {arguments[0]!r}")


def limit(cpu_seconds: int, memory: int) -> None:
    """Set this process's limits: CPU seconds, bytes of memory, no core file, files of 4 KiB, 64 open files."""
    import resource  # Windows has none

    for kind, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 4096),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(kind, (most, most))


def main(nonce: str, cpu_seconds: int, memory: int) -> None:
    """Run the program in this folder in an empty namespace, and write whether it passed."""
    program = Path(PROGRAM).read_bytes()
    result = os.open(RESULT, os.O_WRONLY | os.O_CREAT)
    limit(cpu_seconds, memory)
    sys.addaudithook(forbid)
    try:
        exec(compile(program, PROGRAM, "exec"), {})  # noqa: S102
    except BaseException:  # SystemExit too: the tests did not run to their end
        os.write(result, f"{nonce} failed".encode())
    else:
        os.write(result, f"{nonce} passed".encode())
    os._exit(0)  # skip exit handlers that the program registered


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.argv = [PROGRAM]
    main(words[0], int(words[1]), int(words[2]))
