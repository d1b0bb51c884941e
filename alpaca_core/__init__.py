"""A language model as a reliable step: generate, reason, answer, verify, and judge by logits.

    with load_model(ModelSpec()) as model:
        judge(model, ["Is Paris the capital of France?"])

Importing this package imports no torch; `load_model` does, once it loads.
"""

from alpaca_core.answering import Answer, answer
from alpaca_core.calibration import Calibration
from alpaca_core.cascading import CascadeJudgment, CascadeMeasurement, cascade, measure_cascade
from alpaca_core.consistency import Vote
from alpaca_core.deciding import Decision, Policy, decide, fit_policy
from alpaca_core.fitting import fit_calibration
from alpaca_core.generation import generate
from alpaca_core.judging import Judgment, judge
from alpaca_core.loading import load_model
from alpaca_core.measuring import Measurement, measure
from alpaca_core.model import Completion, LanguageModel, ModelInfo, RowError
from alpaca_core.ordering import Display, OrderEffect, fit_display, measure_order
from alpaca_core.reasoning import Conclusion, chain_of_thought, conclude, final_answer
from alpaca_core.spec import Label, ModelSpec, NamedAdapter, Sampling
from alpaca_core.tokens import Token, TokenProbability, describe_tokens, next_tokens, show_tokens, special_tokens
from alpaca_core.uses import Outlier, Rating, classify, is_outlier, rate, same_meaning
from alpaca_core.verification import Verification, verify

__all__ = [
    "Answer",
    "Calibration",
    "CascadeJudgment",
    "CascadeMeasurement",
    "Completion",
    "Conclusion",
    "Decision",
    "Display",
    "Judgment",
    "Label",
    "LanguageModel",
    "Measurement",
    "ModelInfo",
    "ModelSpec",
    "NamedAdapter",
    "OrderEffect",
    "Outlier",
    "Policy",
    "Rating",
    "RowError",
    "Sampling",
    "Token",
    "TokenProbability",
    "Verification",
    "Vote",
    "answer",
    "cascade",
    "chain_of_thought",
    "classify",
    "conclude",
    "decide",
    "describe_tokens",
    "final_answer",
    "fit_calibration",
    "fit_display",
    "fit_policy",
    "generate",
    "is_outlier",
    "judge",
    "load_model",
    "measure",
    "measure_cascade",
    "measure_order",
    "next_tokens",
    "rate",
    "same_meaning",
    "show_tokens",
    "special_tokens",
    "verify",
]
