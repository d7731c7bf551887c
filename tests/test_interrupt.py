"""Signals end a run at the next step. Oracle: POSIX exit codes, and the handlers that were there before."""

import os
import signal

import pytest

from dsfreeze.interrupt import Interrupt, Interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_old_handler_returns(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.flags() == [0.0, 0.0]
        os.kill(os.getpid(), number)
        assert interrupt.first(interrupt.flags()) == number
        assert signal.getsignal(number) == before  # a second one acts at once
    assert signal.getsignal(number) == before


def test_flags_of_several_ranks_add_up():
    interrupt = Interrupt()
    assert interrupt.first([0.0, 3.0]) == signal.SIGTERM
    assert interrupt.first([2.0, 1.0]) == signal.SIGINT


def test_exit_code_says_which():
    assert Interrupted(signal.SIGINT, 5, "checkpoint-5").exit_code == 130
    assert Interrupted(signal.SIGTERM, 5, "checkpoint-5").exit_code == 143
