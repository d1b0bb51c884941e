"""One warm model per GPU, shared by every process of a machine.

A flow run is a new process, so a model loaded in it dies with it. The host outlives runs:

    flow runs, scripts                 `client.py`: a `LanguageModel` that asks over HTTP, and imports no torch
         |  JSON over a Unix socket    `protocol.py`; `launcher.py` starts the host where none runs
    host                               `application.py` under `server.py`; `scheduler.py` takes turns between clients
         |  lines of JSON              `supervisor.py` replaces an engine that crashed or hangs
    engine                             `engine.py`: the only process with torch and the weights
"""
