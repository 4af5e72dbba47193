"""localmistral: run Mistral models, and any other GGUF chat model, on your own machine."""

__version__ = "0.1.0"
