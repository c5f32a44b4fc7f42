"""Tell systemd how a service is: a datagram to the socket that it names, if it names one.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

import os
import socket
from collections.abc import Mapping

from deploy.errors import BadInputError

__all__ = ["notify", "watchdog_interval_s"]


def notify(state: str, *, environment: Mapping[str, str] = os.environ) -> bool:
    """Send a state such as "READY=1".

    Returns:
        Whether somebody wanted to know: NOTIFY_SOCKET is set.

    Raises:
        OSError: It is, and nobody listens there.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        # A leading @ stands for the zero byte of an abstract address.
        sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
    return True


def watchdog_interval_s(*, environment: Mapping[str, str] = os.environ) -> float | None:
    """Return how often "WATCHDOG=1" is to be sent: twice in the time that systemd waits.

    Returns:
        None if it does not wait, or waits for another process.

    Raises:
        BadInputError: WATCHDOG_USEC is no number of microseconds.
    """
    wanted, process = environment.get("WATCHDOG_USEC"), environment.get("WATCHDOG_PID")
    if wanted is None or (process is not None and process != str(os.getpid())):
        return None
    if not wanted.isdigit() or int(wanted) == 0:
        raise BadInputError(
            "WATCHDOG_USEC is a number of microseconds",
            found=repr(wanted),
            remedy="start the service by systemd, or unset it",
        )
    return int(wanted) / 2e6
