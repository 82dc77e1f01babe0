"""Find every image of something: text search, a few yes / no, readable boxes."""

__version__ = "0.1.0"
