"""What a multimodal language model is: configs, conversations, encoders, connectors, the model and its bundle.

This package knows torch and friends and never Ray; importing it loads no model and no torch.
"""

__version__ = "0.1.0"
