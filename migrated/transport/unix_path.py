"""Taking, and giving back, the path of a listening Unix socket.

The rule of the file: what is removed is a socket on which nobody answers, or our own; never anything else. Permissions
are set between bind and listen, when nobody can connect yet.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat

from migrated.errors import ChannelError

#: sizeof(sun_path) without the closing NUL (unix(7)).
PATH_MAX_BYTES = 107


def claim_path(sock: socket.socket, path: str) -> None:
    """Bind ``sock`` to ``path``; a socket left behind by a dead process is removed first. Raises ChannelError."""
    if (length := len(os.fsencode(path))) > PATH_MAX_BYTES:
        raise ChannelError(
            f"Failed to listen on '{path}': the path is {length} bytes long, a Unix socket's may be {PATH_MAX_BYTES}"
        )
    try:
        _remove_stale(path)
        sock.bind(path)
    except OSError as error:
        raise _refusal(path, error) from error


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ChannelError(f"Failed to listen on '{path}': something that is not a socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # A listener of another type answers EPROTOTYPE, one with a full backlog EAGAIN: both are alive.
        answer = probe.connect_ex(path)
    if answer != errno.ECONNREFUSED:
        raise ChannelError(f"Failed to listen on '{path}': another process listens there")
    os.unlink(path)


def finish_path(path: str, mode: int, group: str | None) -> None:
    """Set permissions and group of a socket that is bound but does not listen yet. Raises ChannelError."""
    try:
        if group is not None:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        os.chmod(path, mode)
    except KeyError as error:
        _unlink(path)
        raise ChannelError(f"Failed to listen on '{path}': there is no group '{group}'") from error
    except OSError as error:
        _unlink(path)
        raise _refusal(path, error) from error


def release_path(path: str, identity: os.stat_result) -> None:
    """Remove ``path`` if it is still the socket that was bound; somebody else's stays. Never raises."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(path), identity):
            os.unlink(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _refusal(path: str, error: OSError) -> ChannelError:
    return ChannelError(f"Failed to listen on '{path}': {error.strerror or error}")
