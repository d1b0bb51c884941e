"""Prefect tasks around the verbs of `alpaca_core`: a `ModelSpec` where the core takes a model, JSON out."""

from prefect_alpaca.tasks.cascading import cascade
from prefect_alpaca.tasks.generation import chain_of_thought, conclude, generate
from prefect_alpaca.tasks.judging import judge, verify
from prefect_alpaca.tasks.loading import load_model
from prefect_alpaca.tasks.model import use_model
from prefect_alpaca.tasks.rows import Json, values
from prefect_alpaca.tasks.uses import classify, is_outlier, rate, same_meaning

__all__ = [
    "Json",
    "cascade",
    "chain_of_thought",
    "classify",
    "conclude",
    "generate",
    "is_outlier",
    "judge",
    "load_model",
    "rate",
    "same_meaning",
    "use_model",
    "values",
    "verify",
]
