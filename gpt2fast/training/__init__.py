"""Training runs: configuration, loop, checkpoints, report.

>>> from gpt2fast.training import load_config, start_run
>>> result = start_run(load_config(None, {"max_steps": 5}))  # doctest: +SKIP
"""

from gpt2fast.training.baseline import Bigram
from gpt2fast.training.checkpoint import CheckpointError
from gpt2fast.training.config import TrainConfig, load_config
from gpt2fast.training.job import Result, resume_run, start_run
from gpt2fast.training.trainer import Diverged, Trainer, evaluate

__all__ = [
    "Bigram",
    "CheckpointError",
    "Diverged",
    "Result",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "load_config",
    "resume_run",
    "start_run",
]
