"""The property of ``layouts.py`` on a few configurations, always the same; ``make test-faults`` draws more."""

from hypothesis import HealthCheck, given, settings

from tests.training.layouts import check, configurations


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configuration=configurations())
def test_accepted_ones_train_and_resume_refused_ones_say_why(configuration, tmp_path_factory):
    check(configuration, tmp_path_factory)
