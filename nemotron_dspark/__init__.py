"""Train, measure and serve DSpark drafts for targets that are not all attention."""

__version__ = "0.1.0"
