import os
import signal
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that wait sleep: on a busy machine spinning ones take minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that all programs that tests start add up in the same order

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
import losses  # noqa: E402

HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}


@pytest.fixture(autouse=True)
def own_signals():
    """A program that ran in this process, perhaps in a fixture, has left handlers and a thread that ends it. And nohup,
    or a shell that starts the tests in the background, has some signals ignored."""
    signal.set_wakeup_fd(-1)
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def straight_line(monkeypatch):
    """For tests that state numbers of the paper's schedule, whatever losses.alpha is just now."""
    monkeypatch.setattr(losses, "alpha", lambda t: 1 - 0.999 * t)
    monkeypatch.setattr(losses, "reveal_rate", lambda t: 1 / t)
