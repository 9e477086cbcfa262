"""Waits for all processes of a run by name, and ends all of them when one is lost.

In: `Members`. Out: a `Watch`, once everyone is there. jax's coordination service aborts in C++ where someone stays away,
without saying who, and tells of a death only after its heartbeat's 100 seconds. Here each process opens one TCP connection to
process 0, at the coordinator's own address, before jax takes that port over; it stays open while the run lasts. The kernel
closes the connection of a process that dies, whatever the cause, at once; of a host that is gone, after 30 seconds.
Process 0 tells all others. A process that hangs with its connection alive is left to jax's heartbeat.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from launch.members import Members

_GONE_S = 30
_HELLO_S = 5.0
_MAX_BYTES = 1 << 16
_RESUME = "When all have ended, the same command goes on from the last snapshot."


class Peer:
    """A connection to another process; carries one JSON object a line."""

    def __init__(self, connection: socket.socket, host: str) -> None:
        """Takes over an open connection to a process on `host`."""
        self.connection = connection
        self.host = host
        self._left = b""
        for option, value in (("KEEPIDLE", 10), ("KEEPINTVL", 5), ("KEEPCNT", 4), ("USER_TIMEOUT", _GONE_S * 1000)):
            if hasattr(socket, f"TCP_{option}"):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, **message: Any) -> None:
        """Sends a message; to a process that is gone, nothing: who waits for its answer finds out."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages that have come, after waiting for some bytes; None at the connection's end."""
        try:
            data = self.connection.recv(_MAX_BYTES)
            *lines, self._left = (self._left + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        if not data or len(self._left) > _MAX_BYTES or not all(isinstance(one, dict) for one in messages):
            return None
        return messages

    def is_open(self) -> bool:
        """Returns whether the other side still holds the connection."""
        self.connection.setblocking(False)
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            self.connection.setblocking(True)


def call_roll(members: Members, timeout_s: float) -> Watch:
    """Waits until all processes of the run are there; returns the watch over them, not started yet.

    Raises:
        ValueError: Someone stayed away (named), the coordinator cannot be reached, its port is taken, or two say the same id.
    """
    peers = _gather(members, timeout_s) if members.process_id == 0 else {0: _answer(members, timeout_s)}
    return Watch(members, peers)


def _listen(members: Members) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", members.port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ValueError(
            f"process 0 cannot listen at {members.coordinator}: port {members.port} of this host ({socket.gethostname()}) is "
            f"{'in use' if error.errno == errno.EADDRINUSE else 'not allowed'}; choose another with --coordinator, or with "
            f"JAX_COORDINATOR_PORT under SLURM and Open MPI, the same for all processes"
        ) from None


def _gather(members: Members, timeout_s: float) -> dict[int, Peer]:
    """Returns all others, by id, once they have said theirs to process 0."""
    peers: dict[int, Peer] = {}
    until = time.monotonic() + timeout_s
    with _listen(members) as server:
        while len(peers) < members.num_processes - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                away = [i for i in range(1, members.num_processes) if i not in peers]
                text = _away(members, away, timeout_s)
                for peer in peers.values():
                    peer.send(refused=text)
                    peer.connection.close()
                raise ValueError(text) from None
            _admit(members, Peer(connection, ""), peers)
    # The port is free again for jax.
    for peer in peers.values():
        peer.send(go=True)
    return peers


def _admit(members: Members, peer: Peer, peers: dict[int, Peer]) -> None:
    """Hears who has connected; a stranger is hung up on, a wrong member told why."""
    peer.connection.settimeout(_HELLO_S)
    messages = peer.receive()
    peer.connection.settimeout(None)
    hello = messages[0] if messages else {}
    process_id, told = hello.get("process_id"), hello.get("num_processes")
    if hello.get("run") != "monolith_jax" or not isinstance(process_id, int):
        peer.connection.close()
        return
    peer.host = str(hello.get("host"))
    own_port = "and each run a coordinator's port of its own"
    if told != members.num_processes:
        refused = (
            f"process 0 at {members.coordinator} was told of {members.num_processes} processes, process {process_id} on "
            f"{peer.host} of {told}: give all processes the same --num_processes, {own_port}"
        )
    elif not 0 < process_id < members.num_processes or (process_id in peers and peers[process_id].is_open()):
        first = peers[process_id].host if process_id in peers else members.host
        refused = (
            f"process id {process_id} is given twice, on {first} and {peer.host}: give each process its own --process_id, "
            f"{own_port}"
        )
    else:
        if process_id in peers:
            peers[process_id].connection.close()
        peers[process_id] = peer
        return
    peer.send(refused=refused)
    peer.connection.close()


def _away(members: Members, away: list[int], timeout_s: float) -> str:
    ids = ", ".join(map(str, away[:20])) + (f" and {len(away) - 20} more" if len(away) > 20 else "")
    return (
        f"{len(away)} of {members.num_processes} processes did not join within {timeout_s:g} s: process {ids}. "
        f"Check that each was started, that its own output shows no error, and that its host reaches {members.coordinator}; "
        f"slow starts need a longer --join_timeout_s"
    )


def _answer(members: Members, timeout_s: float) -> Peer:
    """Returns the connection to process 0, once it has said that everyone is there."""
    until = time.monotonic() + timeout_s
    last = "nothing answered"
    while (left := until - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((members.host, members.port), timeout=min(left, _HELLO_S))
        except OSError as error:
            last = str(error)
            time.sleep(min(left, 0.1))
            continue
        peer = Peer(connection, members.host)
        # Process 0 counts from its own start, and names those who are away; its word is waited for.
        connection.settimeout(timeout_s + _HELLO_S)
        peer.send(
            run="monolith_jax",
            process_id=members.process_id,
            num_processes=members.num_processes,
            host=socket.gethostname(),
        )
        messages = peer.receive()
        if messages and messages[0].get("go"):
            connection.settimeout(None)
            return peer
        connection.close()
        if messages and "refused" in messages[0]:
            raise ValueError(messages[0]["refused"])
        last = "what answers there does not wait for this process: another program, or a run that goes on already"
        time.sleep(min(left, 0.1))
    raise ValueError(
        f"process {members.process_id} of {members.num_processes} found no coordinator at {members.coordinator} within "
        f"{timeout_s:g} s ({last}). Check that process 0 was started on {members.host}, that its own output shows no error, "
        f"and that the port is open to this host ({socket.gethostname()}); the address comes from {members.told_by}"
    )


class Watch:
    """The connections of a run that goes on, and the thread that looks at them."""

    def __init__(self, members: Members, peers: dict[int, Peer]) -> None:
        """Takes all others (process 0) or process 0 (all others), by id."""
        self._members = members
        self._peers = peers
        self._done: set[int] = set()
        self._lock = threading.Lock()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def start(self) -> None:
        """Starts to look; from now on this process ends when another is lost."""
        self._thread.start()

    def close(self) -> None:
        """Says that this process has nothing left to do, and waits for all others to say so; ends when one is lost before."""
        self._wake.close()
        self._thread.join()

    def fail(self, reason: str) -> NoReturn:
        """Tells the others that this process failed, and ends it with status 1."""
        self._end({"ended": self._members.process_id, "host": socket.gethostname(), "reason": reason[:2000]}, "")

    def _look(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for process_id, peer in self._peers.items():
                selector.register(peer.connection, selectors.EVENT_READ, process_id)
            while len(self._done) <= len(self._peers):
                for key, _ in selector.select():
                    if key.data is None:
                        selector.unregister(self._woken)
                        self._done.add(self._members.process_id)
                        if self._members.process_id:
                            self._peers[0].send(done=True)
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
        for peer in self._peers.values():
            if self._members.process_id == 0:
                peer.send(done=True)
            peer.connection.close()
        self._woken.close()

    def _hear(self, process_id: int) -> bool:
        """Takes in what a process said; returns whether it may say more."""
        messages = self._peers[process_id].receive()
        if messages is None:
            if process_id not in self._done:
                host = self._peers[process_id].host
                self._end({"ended": process_id, "host": host, "reason": ""}, self._sentence(process_id, host, ""))
            return False
        for message in messages:
            if "ended" in message:
                self._end(message, self._sentence(message["ended"], message["host"], message["reason"]))
            self._done.add(process_id)
        return True

    def _sentence(self, process_id: int, host: str, reason: str) -> str:
        who = f"process {process_id} of {self._members.num_processes} (host {host})"
        if reason:
            return f"{who} ended with an error: {reason}\nProcess {self._members.process_id} ends with it. {_RESUME}\n"
        return (
            f"{who} was lost: killed, out of memory, or its host is gone; its own output says more.\n"
            f"Process {self._members.process_id} ends with it. {_RESUME}\n"
        )

    def _end(self, message: dict[str, Any], text: str) -> NoReturn:
        """Passes the word on, prints it last, and ends without waiting for a step that can never end."""
        self._lock.acquire()  # Never released: who comes second has nothing to add.
        if self._members.process_id == 0 or message["ended"] == self._members.process_id:
            for peer in self._peers.values():
                peer.send(**message)
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(0.2)  # Where the main thread holds it, it is not worth jax's abort coming first.
        sys.stderr.flush()
        if text:
            os.write(2, text.encode())
        if self._members.process_id == 0:
            # jax's service ends with this process; let the others print their own last line first.
            until = time.monotonic() + 2.0
            while time.monotonic() < until and any(peer.is_open() for peer in self._peers.values()):
                time.sleep(0.01)
        os._exit(1)
