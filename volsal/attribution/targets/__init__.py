"""The score: one number per volume out of a model's output; ``forms`` reads them from text."""
