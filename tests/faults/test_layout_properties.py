"""The property of ``tests/training/layouts.py`` on configurations drawn anew, by ``FAULT_SEED``."""

from hypothesis import HealthCheck, given, seed, settings

from tests.faults.conftest import SEED
from tests.training.layouts import check, configurations


@seed(SEED)
@settings(max_examples=80, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(configuration=configurations())
def test_accepted_ones_train_and_resume_refused_ones_say_why(configuration, tmp_path_factory):
    check(configuration, tmp_path_factory)
