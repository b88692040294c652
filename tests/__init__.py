"""The project's own tests, and the verification that operators run."""

import signal

# Started in the background (`make test &`) a shell has it ignored, and so have all programs that
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
