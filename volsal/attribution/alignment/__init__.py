"""Where a layer's cells lie on the model's input: traced through the operators, followed back on data, measured."""
