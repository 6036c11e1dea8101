"""Penalties in trainings that others run: Lightning, Transformers, Accelerate and skorch.

A module for each of them, imported by name; each needs its package, and says how to install it where it is missing:

- `torchreg.integrations.lightning`: a callback for ``lightning.pytorch.Trainer`` (extra ``lightning``);
- `torchreg.integrations.transformers`: a callback and an optimizer factory for ``transformers.Trainer`` (extra
  ``transformers``);
- `torchreg.integrations.accelerate`: penalties that an ``accelerate.Accelerator`` saves and logs (extra
  ``accelerate``);
- `torchreg.integrations.skorch`: a callback for skorch's nets (extra ``skorch``).

All of them do their work in `torchreg.integrations.regularization.Regularization`, which another loop may use too.
"""

from torchreg.integrations.regularization import Regularization

__all__ = ["Regularization"]
