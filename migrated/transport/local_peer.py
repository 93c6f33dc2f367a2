"""Who is at the other end of a Unix socket, and what that user may do here.

The rule of the file: only what the kernel vouches for counts. The permissions of a socket's path decide who can
connect; user and groups of the process that connected decide what it may do.

Source: unix(7) SO_PEERCRED, socket(7) SO_PEERGROUPS.
"""

from __future__ import annotations

import grp
import os
import socket
import struct
from dataclasses import dataclass
from enum import Enum

from migrated.errors import ChannelError, KernelError

# Newer than Python 3.11's socket module; asm-generic/socket.h.
SO_PEERGROUPS = 59
_UCRED = struct.Struct("=iII")
#: socket.getsockopt takes no larger buffer: 256 groups.
_GROUPS_BYTES = 1024

ROOT = 0


class Access(Enum):
    """What a local user may do."""

    FULL = "full"
    READ_ONLY = "read-only"


@dataclass(frozen=True, slots=True)
class LocalPeer:
    """The process that connected a Unix socket, as it was then; ``pid`` is 0 where it cannot be seen from here."""

    pid: int
    uid: int
    gids: frozenset[int]

    def __str__(self) -> str:
        return f"uid {self.uid}, process {self.pid}"


def local_peer(sock: socket.socket) -> LocalPeer:
    """Return who connected. Raises KernelError for a process in more than 256 groups."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        raise KernelError("SO_PEERGROUPS", error.errno or 0, f"of process {pid}") from error
    return LocalPeer(pid, uid, frozenset({gid, *struct.unpack(f"={len(raw) // 4}I", raw)}))


@dataclass(frozen=True, slots=True)
class AccessRule:
    """Which users may do what: these users, members of these groups. Numbers, as the kernel gives them."""

    uids: frozenset[int]
    gids: frozenset[int] = frozenset()
    read_only_gids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, group: str | int | None, *, read_only_group: str | None = None) -> AccessRule:
        """Root, this process's user, and members of ``group`` (name or number); those of ``read_only_group`` may look.

        Raises ChannelError for a group that does not exist.
        """
        return cls(frozenset({ROOT, os.geteuid()}), _gids(group), _gids(read_only_group))

    def access(self, peer: LocalPeer) -> Access | None:
        """Return what ``peer`` may do; None for nothing."""
        if peer.uid in self.uids or peer.gids & self.gids:
            return Access.FULL
        return Access.READ_ONLY if peer.gids & self.read_only_gids else None

    def __str__(self) -> str:
        """Who has full access, for whoever was refused."""
        users = f"uid {' or '.join(map(str, sorted(self.uids)))}"
        return f"{users}, members of group {_group_name(min(self.gids))}" if self.gids else users


def _gids(group: str | int | None) -> frozenset[int]:
    if group is None:
        return frozenset()
    if isinstance(group, int):
        return frozenset({group})
    try:
        return frozenset({grp.getgrnam(group).gr_gid})
    except KeyError:
        raise ChannelError(f"There is no group '{group}' on this host") from None


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
