import os
import signal

import pytest
import torch

# A shell starts background jobs with Ctrl-C ignored, and children inherit that. Tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["OMP_NUM_THREADS"] = "1"  # in the programs that tests start
torch.set_num_threads(1)  # also for what is set up once, before the first test


# The files that take longest. They go first, or the other processes would wait for them at the end.
LONGEST = ("test_ranks.py", "test_readme.py", "test_train.py", "test_pipeline.py",
           "test_baselines.py", "test_demo.py", "test_kernels.py", "test_world.py",
           "test_bad_input.py", "test_devices.py", "test_encode.py")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def one_thread():
    """Results must not depend on the number of cores, nor tests on each other's threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    from tests.helpers import Inputs  # which imports the programs

    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def toy_folder(inputs):
    return inputs["toy"]
