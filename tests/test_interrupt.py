"""Signals end a run at the next step. Oracle: POSIX exit codes, and the handlers that were there before."""

import os
import signal

import pytest
from launch_kit import signals_obeyed

from dsfreeze.interrupt import Interrupt, Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_old_handler_returns(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.flags() == [0.0, 0.0]
        os.kill(os.getpid(), number)
        assert interrupt.first(interrupt.flags()) == number
    assert signal.getsignal(number) == before


def test_signals_that_come_again_do_not_end_the_checkpoint():
    """A batch system signals every process, and then DeepSpeed's launcher its workers once more."""

    def obeyed(number, frame):
        raise AssertionError(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, obeyed)
    with Interrupt() as interrupt:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert interrupt.flags() == [0.0, 1.0]
    signal.signal(signal.SIGTERM, before)


def test_the_third_ctrl_c_acts_at_once():
    with signals_obeyed(), Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_flags_of_several_ranks_add_up():
    interrupt = Interrupt()
    assert interrupt.first([0.0, 3.0]) == signal.SIGTERM
    assert interrupt.first([2.0, 1.0]) == signal.SIGINT


def test_exit_code_says_which():
    assert Interrupted(signal.SIGINT, 5, "checkpoint-5").exit_code == 130
    assert Interrupted(signal.SIGTERM, 5, "checkpoint-5").exit_code == 143
