"""Execute a program that receives SIGTERM when the process that started it dies.

Run by path, not imported: `python -I launch.py PARENT_PID PROGRAM ARGUMENT…`. Without it, killing `mirror serve` with
SIGKILL would leave a tritonserver behind that occupies the ports.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Request the signal from the kernel, check that the parent is still alive, and exec."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
