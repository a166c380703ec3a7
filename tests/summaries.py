"""What tests read of a run's summary."""


def check_values(summary):
    """The checks by name."""
    return {name: check["value"] for name, check in summary["checks"].items()}


def numbers(summary):
    """Headline results and checks by name."""
    return summary["metrics"] | check_values(summary)
