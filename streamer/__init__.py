"""Real-time face restoration and honest recognition for video surveillance."""

__version__ = "0.1.0"
