"""Gradients of the score by the input: plain, by rules, averaged, along paths; ``lean`` makes them cheap."""
