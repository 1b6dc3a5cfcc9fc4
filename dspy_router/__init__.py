"""Tool choice as a small trained decision inside a DSPy program.

The names below load on first use, so that `import dspy_router` costs nothing beyond `import dspy`.
"""

from typing import TYPE_CHECKING

from dspy_router.lazy import lazy_names

if TYPE_CHECKING:
    from dspy_router.agent.routed_agent import RoutedAgent
    from dspy_router.clients.decision_client import DecisionClient
    from dspy_router.decisions import Decision, record_decisions
    from dspy_router.encoders.onnx import OnnxEncoder
    from dspy_router.encoders.sentence import SentenceEncoder
    from dspy_router.encoders.static import StaticEncoder
    from dspy_router.encoders.token import TokenEncoder
    from dspy_router.errors import RouteError
    from dspy_router.feedback import Feedback
    from dspy_router.optimizers.finetune import RouteFinetune
    from dspy_router.replace import replace_predictor
    from dspy_router.route import DifferentiableRoute
    from dspy_router.split import RoutedPredict

__version__ = "0.1.0"

_HOMES = {
    "Decision": "decisions",
    "DecisionClient": "clients.decision_client",
    "DifferentiableRoute": "route",
    "Feedback": "feedback",
    "OnnxEncoder": "encoders.onnx",
    "RouteError": "errors",
    "RouteFinetune": "optimizers.finetune",
    "RoutedAgent": "agent.routed_agent",
    "RoutedPredict": "split",
    "SentenceEncoder": "encoders.sentence",
    "StaticEncoder": "encoders.static",
    "TokenEncoder": "encoders.token",
    "record_decisions": "decisions",
    "replace_predictor": "replace",
}

__all__ = [
    "Decision",
    "DecisionClient",
    "DifferentiableRoute",
    "Feedback",
    "OnnxEncoder",
    "RouteError",
    "RouteFinetune",
    "RoutedAgent",
    "RoutedPredict",
    "SentenceEncoder",
    "StaticEncoder",
    "TokenEncoder",
    "record_decisions",
    "replace_predictor",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
