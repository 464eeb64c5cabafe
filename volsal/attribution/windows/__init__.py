"""A model applied window by window, explained as one function of the whole scan."""
