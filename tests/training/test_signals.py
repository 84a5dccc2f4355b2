import os
import signal

import pytest

from effattn_jax.training.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_flag_and_the_handlers_return(number):
    former = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.received == number.name
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == former


def test_the_second_interrupt_is_not_held_back():
    former = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former


def test_handlers_return_after_an_exception():
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopSignal():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is former
