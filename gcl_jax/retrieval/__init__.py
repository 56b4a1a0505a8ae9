"""From a trained model to embeddings, and from embeddings to answers."""

from gcl_jax.retrieval.embedder import Embedder
from gcl_jax.retrieval.load import load

__all__ = ["Embedder", "load"]
