"""Training data where there is none yet: an LM writes requests from the options' descriptions."""

from dspy_router.synthesis.report import ConfusedPair, SynthesisReport
from dspy_router.synthesis.writer import RequestWriter

__all__ = ["ConfusedPair", "RequestWriter", "SynthesisReport"]
