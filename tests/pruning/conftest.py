"""A small trained network, for the tests of pruning."""

import pytest

from tests.helpers.pruning_network import network, trained_state


@pytest.fixture(scope="session")
def trained():
    return trained_state()


@pytest.fixture
def model(trained):
    network_ = network()
    network_.load_state_dict(trained)
    return network_
