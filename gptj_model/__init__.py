"""What GPT-J is: its configuration, its table of tensors and its Keras model.

Importing this package imports no Keras; `gptj_model.network.model` does.
"""

__version__ = "0.1.0"
