"""The one convention about labels: positions with this value are no targets."""

IGNORE_INDEX = -100
