"""Who connected a Unix socket, and the rule that says what they may do."""

from __future__ import annotations

import grp
import os
import socket

import pytest

from migrated.errors import ChannelError, KernelError
from migrated.transport.local_peer import Access, AccessRule, LocalPeer, local_peer

RULE = AccessRule(frozenset({0, 998}), frozenset({1}), frozenset({2}))


def test_the_kernel_says_who_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = local_peer(ours)
    assert peer == LocalPeer(os.getpid(), os.getuid(), frozenset({os.getgid(), *os.getgroups()}))
    assert str(peer) == f"uid {os.getuid()}, process {os.getpid()}"


def test_what_is_no_unix_socket_has_no_peer() -> None:
    with socket.socket(socket.AF_INET) as sock, pytest.raises(KernelError, match="SO_PEERGROUPS"):
        local_peer(sock)


@pytest.mark.parametrize(
    ("uid", "gids", "access"),
    [
        (0, set(), Access.FULL),
        (998, {2}, Access.FULL),
        (1000, {1}, Access.FULL),
        (1000, {1, 2}, Access.FULL),
        (1000, {2, 5}, Access.READ_ONLY),
        (1000, {5}, None),
        (1000, set(), None),
    ],
)
def test_the_rule(uid: int, gids: set[int], access: Access | None) -> None:
    assert RULE.access(LocalPeer(7, uid, frozenset(gids))) is access


def test_groups_are_given_by_name_or_number() -> None:
    name, gid = grp.getgrgid(1).gr_name, 1
    rule = AccessRule.of(name, read_only_group=name)
    assert (rule.gids, rule.read_only_gids) == ({gid}, {gid})
    assert AccessRule.of(gid).gids == {gid}
    assert rule.uids == {0, os.geteuid()}
    with pytest.raises(ChannelError, match="no group 'no such group'"):
        AccessRule.of("no such group")


def test_the_rule_says_who_may() -> None:
    assert str(AccessRule(frozenset({998, 0}))) == "uid 0 or 998"
    assert str(RULE) == f"uid 0 or 998, members of group {grp.getgrgid(1).gr_name}"
    assert str(AccessRule(frozenset({0}), frozenset({4_000_000}))) == "uid 0, members of group 4000000"
