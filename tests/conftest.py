"""Settings for all tests."""

import pytest
import torch

pytest.register_assert_rewrite("rule_cases", "support")  # so that a failed comparison is shown in full

torch.set_num_threads(1)  # the networks are small, and threads that wait for each other only slow them down
