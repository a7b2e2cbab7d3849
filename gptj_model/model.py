"""The address of the model that every `model.keras` names, and must stay.

Keras imports this module when it opens such a file; the model is in `gptj_model.network.model`.
"""

from __future__ import annotations

from gptj_model.network.model import GPTJ

__all__ = ["GPTJ"]
