"""nbval compares everything but what goes to stderr, where the progress of a training is told, and pictures."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
        # nbval passes over image/png; pictures inside a page depend on the fonts and on zlib just as much.
        collector.sanitize_patterns[r"data:image/png;base64,[A-Za-z0-9+/=]+"] = "a picture"
