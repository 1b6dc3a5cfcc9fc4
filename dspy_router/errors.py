"""The one error class of the package."""


class RouteError(ValueError):
    """Something given to a route or an optimizer cannot be used.

    The message says what was wrong, what was expected and what to do next, and quotes the value.
    It is a `ValueError`, so code that guards DSPy calls with `except ValueError` keeps working.
    """
