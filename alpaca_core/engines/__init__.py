"""Engines: what implements `alpaca_core.model.LanguageModel`. Only here are torch and transformers imported."""
