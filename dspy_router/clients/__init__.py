"""The other face of a route: the `lm` of a plain `dspy.Predict`."""
