"""The lists and the check of `experiments.hardware_rules`."""

import numpy as np
import pytest

from experiments import hardware_rules


def test_lists_hold_the_own_block_and_distinct_earlier_ones():
    lists = hardware_rules.lists(50, 3, 8, 2)
    assert lists.shape == (1, 50, 2, 3)
    for t, g in np.ndindex(50, 2):
        blocks = [block for block in lists[0, t, g] if block >= 0]
        assert blocks[0] == t // 8
        assert len(set(blocks)) == len(blocks) == min(3, t // 8 + 1)
        assert max(blocks) <= t // 8


@pytest.mark.slow
def test_a_case_agrees_with_softmax_attention():
    hardware_rules.FLAGS(["hardware_rules"])
    assert hardware_rules.error(16, 2, 4, 16, 64) < hardware_rules.TOLERANCE
