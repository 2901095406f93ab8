"""The Jacobian lens: for each layer, the mean Jacobian of a model's last residual stream with respect to it."""

from .evaluating.evaluation import Evaluation
from .fitting import fit
from .interventions import Intervention
from .lens import JacobianLens
from .reading.readout import Readout
from .reading.transported import Transported, transported
from .reading.vectors import token_vectors

__all__ = [
    "Evaluation",
    "Intervention",
    "JacobianLens",
    "Readout",
    "Transported",
    "fit",
    "token_vectors",
    "transported",
]
