"""What a model is worth: HellaSwag's accuracy, and the loss on prepared tokens."""

from gpt2fast.evaluation.hellaswag import (
    Example,
    HellaSwagResult,
    Scores,
    download_examples,
    evaluate_hellaswag,
    read_examples,
    score_examples,
)
from gpt2fast.evaluation.loss import LossResult, evaluate_loss

__all__ = [
    "Example",
    "HellaSwagResult",
    "LossResult",
    "Scores",
    "download_examples",
    "evaluate_hellaswag",
    "evaluate_loss",
    "read_examples",
    "score_examples",
]
