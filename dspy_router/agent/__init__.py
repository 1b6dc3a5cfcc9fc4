"""An agent loop whose steps are decided by a route."""
