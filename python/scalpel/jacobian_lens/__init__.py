"""The Jacobian lens: for each layer, the mean Jacobian of a model's last residual stream with respect to it."""

from .evaluation import Evaluation
from .fitting import fit
from .interventions import Intervention
from .lens import JacobianLens
from .readout import Readout
from .vectors import token_vectors

__all__ = ["Evaluation", "Intervention", "JacobianLens", "Readout", "fit", "token_vectors"]
