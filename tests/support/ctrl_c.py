"""For processes that a test interrupts."""

import signal


def listen_to_ctrl_c() -> None:
    """A ``preexec_fn``: a shell that runs the tests in the background ignores SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
