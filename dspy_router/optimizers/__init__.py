"""`RouteFinetune` and its parts: shells that gather feedback from DSPy programs for `dspy_router.learning`."""
