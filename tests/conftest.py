"""Settings for all tests."""

import torch

torch.set_num_threads(1)  # the networks are small, and threads that wait for each other only slow them down
