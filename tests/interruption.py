"""Cutting a program short at a chosen moment: at its n-th touch of a folder's files it dies, or the disk is full."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# What Python reports (sys.addaudithook) of the calls that change files; os.fsync is not among them.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
FINISHED, RAISED = 0, 3  # how a child ends that was not killed


def run_apart(action: Callable[[], object], watched: Path, at: int = 0, how: str = "kill") -> str:
    """Run `action` in a forked child; at its `at`-th change below `watched` it is cut short (0: never).

    Args:
        how: "kill" for SIGKILL; "error" for an OSError (no space left), raised from the call.

    Returns:
        "finished", "killed", or "raised" (an exception left the action).
    """
    child = os.fork()
    if child == 0:
        status = RAISED
        try:
            _watch(watched, at, how)
            action()
            status = FINISHED
        except Exception as error:
            if how == "kill":  # then nobody asked for an exception
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the child died of signal {os.WTERMSIG(status)}"
        return "killed"
    return "finished" if os.WEXITSTATUS(status) == FINISHED else "raised"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to compare before with after."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _watch(watched: Path, at: int, how: str) -> None:
    seen, prefix, sync = 0, str(watched.absolute()), os.fsync

    def touched() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not reads and (path.startswith(prefix) or not os.path.isabs(path)):  # rmtree names files relatively
            touched()

    def fsync(file: int) -> None:
        touched()
        sync(file)
        touched()

    sys.addaudithook(hook)
    os.fsync = fsync
