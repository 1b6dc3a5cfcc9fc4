"""How a head learns: tensors in, tensors out. Nothing here knows DSPy."""
