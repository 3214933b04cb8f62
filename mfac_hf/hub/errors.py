"""What goes wrong with the results that a card is made from."""

__all__ = ["MissingResultsError"]


class MissingResultsError(ValueError):
    """The result files lack something that a card has to say."""
