"""nbval compares everything but what goes to stderr, where the progress of a training is told."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
