"""The task `load_model`."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from alpaca_core import ModelSpec
from prefect_alpaca.tasks.model import loaded, run_logger
from prefect_alpaca.tasks.rows import Json


@task(task_run_name="load {model.base_model}", cache_policy=NO_CACHE, result_serializer="json")
def load_model(model: ModelSpec) -> Json:
    """Load a model, here or at this machine's host, so that the tasks after it find it warm.

    Args:
        model: The recipe.

    Returns:
        The model's status as JSON: name, digest, device, dtype, adapters, `memory_gib` in GiB,
        `load_seconds` in seconds, and more.

    Raises:
        LoadError: If the model cannot be loaded; the message says why, and what to do.
    """
    info = loaded(model).info
    run_logger().info(
        "%s on %s: %.2f GiB, loaded in %.1f s, digest %.12s",
        *(info.name, info.device, info.memory_gib, info.load_seconds, info.digest),
    )
    return info.model_dump(mode="json", exclude={"chat_template"})
